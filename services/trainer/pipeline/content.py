"""What encoders made of items' text and pictures, as vectors that training reads. NumPy only.

The encoders are not here: whoever has vectors, of any width and from any model, writes a file of them. They are turned to their
principal axes and cut to the widest few, so that their memory is bounded and no direction that all items share is left.

N = items with a vector, I = items of the model, W = width in the file, C = width in training.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]

_MAX_WIDTH = 64
_MAX_FILE_WIDTH = 8_192
# Rows turned at once: a file of many wide vectors is not held twice.
_CHUNK_ROWS = 16_384


@dataclass(frozen=True, slots=True, eq=False)
class ContentVectors:
    """Vectors of items.

    Attributes:
        item_ids: whose, each once.
        vector_NW: finite, of any length.
    """

    item_ids: Sequence[str]
    vector_NW: Float32

    @classmethod
    def read(cls, path: Path) -> ContentVectors:
        """Reads a file of `numpy.savez(path, item_ids=…, vectors=…)`: N strings, and (N, W) numbers.

        Raises:
            ValueError: it is no such file.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                ids_N, vector_NW = file["item_ids"], file["vectors"]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise _invalid(path, str(error).strip() or type(error).__name__) from error
        if ids_N.ndim != 1 or ids_N.dtype.kind not in "US":
            raise _invalid(path, "item_ids must be one row of strings")
        if vector_NW.ndim != 2 or len(vector_NW) != len(ids_N) or vector_NW.dtype.kind not in "fiu":
            raise _invalid(path, f"vectors must be numbers, ({len(ids_N)}, width)")
        if not 1 <= vector_NW.shape[1] <= _MAX_FILE_WIDTH:
            raise _invalid(path, f"vectors must be 1 to {_MAX_FILE_WIDTH} wide")
        item_ids = ids_N.astype(str).tolist()
        if len(set(item_ids)) != len(item_ids):
            raise _invalid(path, "an item occurs twice")
        vector_NW = np.asarray(vector_NW, np.float32)
        if not np.isfinite(vector_NW).all():
            raise _invalid(path, "a vector holds what is no number")
        return cls(item_ids, vector_NW)


def align(item_ids: Sequence[str], content: ContentVectors | None, width: int = _MAX_WIDTH) -> Float32 | None:
    """Returns a vector of length 1 of each item, (I, C), zeros of one without; None where next to none has one.

    C is `width`, or that of the file where it is narrower.
    """
    if content is None:
        return None
    row_of = {item_id: row for row, item_id in enumerate(content.item_ids)}
    row_I = np.array([row_of.get(item_id, -1) for item_id in item_ids], np.int64)
    known = np.flatnonzero(row_I >= 0)
    if len(known) < 2:
        return None
    vector_NW, row_K = content.vector_NW, row_I[known]
    wide = vector_NW.shape[1]
    mean_W = np.zeros(wide)
    second_WW = np.zeros((wide, wide))
    for first in range(0, len(row_K), _CHUNK_ROWS):
        part_KW = vector_NW[row_K[first : first + _CHUNK_ROWS]].astype(np.float64)
        mean_W += part_KW.sum(axis=0)
        second_WW += part_KW.T @ part_KW
    mean_W /= len(row_K)
    _, axes_WW = np.linalg.eigh(second_WW / len(row_K) - np.outer(mean_W, mean_W))
    axes_WC = axes_WW[:, ::-1][:, : min(width, wide)]
    found_IC = np.zeros((len(item_ids), axes_WC.shape[1]), np.float32)
    for first in range(0, len(row_K), _CHUNK_ROWS):
        turned_KC = (vector_NW[row_K[first : first + _CHUNK_ROWS]] - mean_W) @ axes_WC
        length_K = np.linalg.norm(turned_KC, axis=1, keepdims=True)
        found_IC[known[first : first + _CHUNK_ROWS]] = turned_KC / np.maximum(length_K, 1e-12)
    return found_IC


def _invalid(path: Path, why: str) -> ValueError:
    return ValueError(
        f"{path.name} is no file of item vectors: {why}. Write it with numpy.savez(path, item_ids=…, vectors=…)"
    )
