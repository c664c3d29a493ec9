"""Rows of PostgreSQL's binary COPY into columns: NumPy and Arrow, no Python object a row.

A row is a count of fields and then, for each, its length and its bytes
(https://www.postgresql.org/docs/current/sql-copy.html). The columns of fixed width come first and the item id
last, so that a row is a fixed head and a tail whose length the head tells. E = events, B = bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

# What the head of a row is as COPY sends it: int16 count, then int32 length and value of each field.
_HEAD = np.dtype(
    [
        ("fields", ">i2"),
        ("user_length", ">i4"),
        ("user", "V16"),
        ("kind_length", ">i4"),
        ("kind", ">i2"),
        ("time_length", ">i4"),
        ("time", ">i8"),
        ("order_length", ">i4"),
        ("order", ">i2"),
        ("item_length", ">i4"),
    ]
)
COLUMNS = "user_key, kind, occurred_at, line, item_id"
_WIDTHS = {"fields": 5, "user_length": 16, "kind_length": 2, "time_length": 8, "order_length": 2}
_MODEL = np.zeros(1, _HEAD)
_FREE = np.full(_HEAD.itemsize, 255, np.uint8).view(_HEAD)
for _name, _width in _WIDTHS.items():
    _MODEL[_name] = _FREE[_name] = _width
# The bytes of a head that are the same in every row, by place.
_FIXED_BYTES = {
    place: low
    for place, (low, high) in enumerate(zip(_MODEL.tobytes(), _FREE.tobytes(), strict=True))
    if low == high
}
_SIGNATURE = b"PGCOPY\n\xff\r\n\x00"
_TRAILER = b"\xff\xff"
# Postgres counts microseconds from 2000.
_EPOCH_MICROSECONDS = 946_684_800_000_000


@dataclass(frozen=True, slots=True, eq=False)
class RowBlock:
    """Some rows as columns.

    Attributes:
        user: dictionary of 16-byte user keys, int32 indices, (E,).
        item: dictionary of item ids, int32 indices, (E,).
        kind_E: int16. time_E: microseconds since 1970, int64. line_E: int16.
    """

    user: pa.DictionaryArray
    item: pa.DictionaryArray
    kind_E: npt.NDArray[np.int16]
    time_E: npt.NDArray[np.int64]
    line_E: npt.NDArray[np.int16]


class CopyDecoder:
    """Takes the bytes of a COPY as they come, in pieces of any length, and gives them back as columns."""

    def __init__(self) -> None:
        self._rest = b""
        self._begun = self._ended = False
        self.blocks: list[RowBlock] = []

    def feed(self, content: bytes | bytearray) -> None:
        """Decodes what is complete and keeps the rest for the next piece.

        Raises:
            ValueError: it is no such COPY: its header, a null, or a field of another width.
        """
        content = self._rest + content if self._rest else content
        first = 0
        if not self._begun:
            header = len(_SIGNATURE) + 8
            if len(content) < header:
                self._rest = bytes(content)
                return
            if bytes(content[: len(_SIGNATURE)]) != _SIGNATURE:
                raise ValueError("not a binary COPY")
            first = header + int.from_bytes(content[header - 4 : header], "big")
            self._begun = True
        content_B = np.frombuffer(content, np.uint8)[first:]
        start_E, used = row_starts(content_B)
        if len(start_E):
            self.blocks.append(_block(content_B, start_E))
        self._rest = content_B[used:].tobytes()
        if self._rest[:2] == _TRAILER:
            self._ended = True

    def finish(self) -> list[RowBlock]:
        """Returns every row.

        Raises:
            ValueError: the COPY was cut short, or goes on behind its end.
        """
        if not self._ended or len(self._rest) != len(_TRAILER):
            raise ValueError("not a complete binary COPY")
        return self.blocks


def row_starts(content_B: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.int64], int]:
    """Returns where each complete row begins, and where the first incomplete one does.

    A head has 18 bytes that are alike in every row. Where they stand is where a row may begin; that each row ends where the
    next one begins proves it. Should random bytes of a user key look like a head, the rows are walked one by one.

    Raises:
        ValueError: something else than a row.
    """
    size = _HEAD.itemsize
    if len(content_B) < size:
        return np.zeros(0, np.int64), 0
    start_E = np.flatnonzero(content_B[1 : len(content_B) - size + 2] == 5)
    for place, value in _FIXED_BYTES.items():
        if place != 1:
            start_E = start_E[content_B[start_E + place] == value]
    end_E = _ends(content_B, start_E)
    if not len(start_E) or start_E[0] != 0 or (start_E[1:] != end_E[:-1]).any():
        return _walk(content_B)
    whole = len(start_E) - int(end_E[-1] > len(content_B))
    used = int(end_E[whole - 1]) if whole else 0
    # Behind the last row is the beginning of another one or the end, and nothing that was not understood.
    if len(content_B) - used >= size and whole == len(start_E):
        raise ValueError("a row of the COPY has another shape: a null, or a field of another type")
    return start_E[:whole], used


def _ends(content_B: npt.NDArray[np.uint8], start_E: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    size = _HEAD.itemsize
    length_E = np.zeros(len(start_E), np.int64)
    for place in range(size - 4, size):
        length_E = (length_E << 8) | content_B[start_E + place]
    return start_E + size + length_E


def _walk(content_B: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.int64], int]:
    size, place, starts = _HEAD.itemsize, 0, []
    while place + size <= len(content_B):
        if any(content_B[place + offset] != value for offset, value in _FIXED_BYTES.items()):
            if bytes(content_B[place : place + 2]) == _TRAILER:
                break
            raise ValueError("a row of the COPY has another shape: a null, or a field of another type")
        end = int(_ends(content_B, np.array([place]))[0])
        if end > len(content_B):
            break
        starts.append(place)
        place = end
    return np.array(starts, np.int64), place


def _block(content_B: npt.NDArray[np.uint8], start_E: npt.NDArray[np.int64]) -> RowBlock:
    size, count = _HEAD.itemsize, len(start_E)
    heads = np.lib.stride_tricks.sliding_window_view(content_B, size)[start_E]
    head_E = heads.reshape(-1).view(_HEAD)
    # Every other value of this array is an item id; between them lie the heads.
    offsets = np.empty(2 * count + 1, np.int32)
    offsets[0:-1:2] = start_E + size
    offsets[1::2] = offsets[0:-1:2] + head_E["item_length"]
    offsets[-1] = offsets[-2]
    laid_out = pa.Array.from_buffers(
        pa.string(), 2 * count, [None, pa.py_buffer(offsets), pa.py_buffer(content_B)]
    )
    items = laid_out.take(pa.array(2 * np.arange(count, dtype=np.int32)))
    keys = pa.Array.from_buffers(
        pa.binary(16), count, [None, pa.py_buffer(np.ascontiguousarray(head_E["user"]))]
    )
    return RowBlock(
        keys.dictionary_encode(),
        items.dictionary_encode(),
        head_E["kind"].astype(np.int16),
        head_E["time"].astype(np.int64) + _EPOCH_MICROSECONDS,
        head_E["order"].astype(np.int16),
    )


def unified(blocks: list[Any], kind: pa.DataType) -> tuple[npt.NDArray[np.int32], pa.Array]:
    """Returns (indices of all, (E,), the one dictionary in byte order) of dictionary arrays; empties the list."""
    if not blocks:
        return np.zeros(0, np.int32), pa.array([], kind)
    together = pa.chunked_array(blocks).unify_dictionaries()
    blocks.clear()
    dictionary = together.chunk(together.num_chunks - 1).dictionary
    order = np.asarray(pa.compute.sort_indices(dictionary.cast(pa.binary())))
    rank = np.empty(len(order), np.int32)
    rank[order] = np.arange(len(order), dtype=np.int32)
    index_E = np.empty(len(together), np.int32)
    first = 0
    for chunk in together.chunks:
        index_E[first : first + len(chunk)] = rank[chunk.indices.to_numpy()]
        first += len(chunk)
    return index_E, dictionary.take(pa.array(order))
