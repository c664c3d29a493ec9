"""Arrays in safetensors files: written by its library, read by mapping the file into memory.

The library's own reader copies; a catalogue of a million items is 256 MB that
the page cache can share between processes.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save

_DTYPES = {"F32": np.float32, "I64": np.int64, "I32": np.int32, "U8": np.uint8}
_MAX_HEADER_BYTES = 1 << 20


def encode_arrays(arrays: Mapping[str, npt.NDArray[np.generic]]) -> bytes:
    """Returns a safetensors file of C-ordered arrays (float32, int64, int32 or uint8).

    Raises:
        ValueError: an array has another dtype.
    """
    allowed = {np.dtype(dtype) for dtype in _DTYPES.values()}
    for name, array in arrays.items():
        if array.dtype not in allowed:
            raise ValueError(
                f"array {name} has dtype {array.dtype}; a bundle holds {sorted(map(str, allowed))}"
            )
    return save({name: np.ascontiguousarray(array) for name, array in arrays.items()})


def map_arrays(path: Path) -> dict[str, npt.NDArray[np.generic]]:
    """Returns read-only views into the file.

    Raises:
        ValueError: it is no safetensors file, or one of other dtypes, or its parts do not tile it.
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    if size < 8:
        raise ValueError("it is shorter than its header's length")
    content = np.memmap(path, dtype=np.uint8, mode="r")
    header_bytes = int.from_bytes(content[:8].tobytes(), "little")
    if header_bytes > min(_MAX_HEADER_BYTES, size - 8):
        raise ValueError(f"its header of {header_bytes} bytes does not fit")
    header = json.loads(content[8 : 8 + header_bytes].tobytes())
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    start = 8 + header_bytes
    arrays: dict[str, npt.NDArray[np.generic]] = {}
    extents = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype = np.dtype(_DTYPES[entry["dtype"]])
            shape = tuple(int(length) for length in entry["shape"])
            first, last = (int(offset) for offset in entry["data_offsets"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"array {name} is not described ({error!r})") from error
        if min(shape, default=0) < 0 or last - first != dtype.itemsize * math.prod(shape):
            raise ValueError(f"array {name} does not fill its {last - first} bytes")
        extents.append((first, last))
        view = content[start + first : start + last]
        arrays[name] = np.frombuffer(view, dtype=dtype).reshape(shape)
    position = 0
    for first, last in sorted(extents):
        if first != position:
            raise ValueError("its arrays leave a gap or overlap")
        position = last
    if start + position != size:
        raise ValueError(f"it has {size - start - position} bytes too many")
    return arrays


def release_pages(array: npt.NDArray[np.generic]) -> None:
    """Gives the memory of a mapped file back, whichever of its arrays is given; what is read again comes back alone.

    To verify a file is to read all of it; to serve takes parts. Does nothing to an array that is in memory.
    """
    owner: object = array
    while owner is not None and not isinstance(owner, mmap.mmap):
        owner = owner.obj if isinstance(owner, memoryview) else getattr(owner, "base", None)
    if isinstance(owner, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        owner.madvise(mmap.MADV_DONTNEED)


class Vocabulary(Sequence[str]):
    """The item ids of a model in index order, as UTF-8 in one array."""

    def __init__(self, utf8_N: npt.NDArray[np.uint8], offsets_I1: npt.NDArray[np.int64]) -> None:
        """Takes all ids joined, and the I + 1 byte offsets at which they start.

        Raises:
            ValueError: the offsets are no ascending run from 0 to N, an id is no UTF-8, or one occurs twice.
        """
        ascending = (
            offsets_I1.ndim == 1
            and len(offsets_I1) > 0
            and offsets_I1[0] == 0
            and offsets_I1[-1] == len(utf8_N)
            and bool(np.all(np.diff(offsets_I1) > 0))
        )
        if not ascending:
            raise ValueError("its offsets do not tile the ids")
        text = utf8_N.tobytes()
        bounds = offsets_I1.tolist()
        self._ids = [text[first:last].decode() for first, last in pairwise(bounds)]
        self._index = {item_id: index for index, item_id in enumerate(self._ids)}
        if len(self._index) != len(self._ids):
            raise ValueError("an item id occurs twice")

    @classmethod
    def of(cls, item_ids: Sequence[str]) -> Vocabulary:
        """Builds a vocabulary; raises ValueError for an empty or repeated id."""
        utf8_N, offsets_I1 = join_utf8(item_ids)
        return cls(utf8_N, offsets_I1)

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        return self._ids[index]

    def index_of(self, item_id: str) -> int | None:
        """Returns the item's index, or None for an item that the model does not know."""
        return self._index.get(item_id)


def join_utf8(item_ids: Sequence[str]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Returns the ids joined as UTF-8 bytes (N,), and where each starts (I + 1,)."""
    encoded = [item_id.encode() for item_id in item_ids]
    offsets_I1 = np.zeros(len(encoded) + 1, np.int64)
    np.cumsum([len(item_id) for item_id in encoded], out=offsets_I1[1:])
    return np.frombuffer(b"".join(encoded), np.uint8), offsets_I1
