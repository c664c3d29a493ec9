"""What items are, as vectors: words, traits and picture, as profile has read them."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int32]

_FIRST_ROWS = 1024


class ContentVectors:
    """Vectors of unit length by row of the item index, all of one space.

    Unlike the columns of the catalogue they are written in place: a request may see the old vector of one
    item and the new one of another, which compare all the same.

    Attributes:
        version: of the space.
        count: items that have a vector.
    """

    __slots__ = ("_vectors_RD", "count", "known_R", "version")

    def __init__(self, version: str, rows: int, dimension: int) -> None:
        self.version = version
        self.count = 0
        self._vectors_RD = np.zeros((rows, dimension), np.float32)
        self.known_R = np.zeros(rows, np.bool_)

    @property
    def dimension(self) -> int:
        return self._vectors_RD.shape[1]

    def __len__(self) -> int:
        return len(self.known_R)

    def knows(self, row: int) -> bool:
        """Returns whether an item has a vector."""
        return row < len(self.known_R) and bool(self.known_R[row])

    def known_of(self, rows: Rows) -> Rows:
        """Returns those of the rows that have a vector, in their order."""
        rows = rows[rows < len(self.known_R)]
        return rows[self.known_R[rows]]

    def of(self, rows: Rows) -> Float32:
        """Returns the vectors of rows that have one, float32, (C, D)."""
        return self._vectors_RD[rows]

    def products(self, query_D: Float32, size: int) -> Float32:
        """Returns the inner product of a query with each of the first `size` rows, (R,); -inf without a vector."""
        product_R = np.full(size, -np.inf, np.float32)
        shared = min(size, len(self.known_R))
        known_R = self.known_R[:shared]
        product_R[:shared] = np.where(known_R, self._vectors_RD[:shared] @ query_D, np.float32(-np.inf))
        return product_R

    def grown(self, rows: int) -> ContentVectors:
        """Returns a copy with room for more rows."""
        copy = ContentVectors(self.version, rows, self.dimension)
        copy.count = self.count
        copy._vectors_RD[: len(self)] = self._vectors_RD
        copy.known_R[: len(self)] = self.known_R
        return copy

    def put(self, rows: Rows, vectors_ND: Float32) -> None:
        """Sets the vectors of rows that there is room for."""
        self.count += int(np.count_nonzero(~self.known_R[rows]))
        self._vectors_RD[rows] = vectors_ND
        # After the vector: whoever sees the row known sees what is known.
        self.known_R[rows] = True

    def drop(self, rows: Rows) -> None:
        """Forgets the vectors of rows."""
        known = self.known_of(rows)
        self.count -= len(known)
        self.known_R[known] = False


NO_VECTORS = ContentVectors("", 0, 0)


class ContentVectorStore:
    """Takes vectors in. Reading `current` takes no lock.

    Args:
        max_items: with more items than these none is kept, for each takes 1.5 kB and a pass over all some
            150 ns.
    """

    def __init__(self, max_items: int) -> None:
        self._max_items = max_items
        self._lock = threading.Lock()
        self.current = NO_VECTORS

    @property
    def wanted(self) -> bool:
        """Whether vectors are kept at all."""
        return self._max_items > 0

    def put(self, version: str, rows: Rows, vectors: Sequence[Sequence[float]]) -> None:
        """Takes vectors of one space in; those of another space are void from then on."""
        if not self.wanted or not len(rows):
            return
        vectors_ND = np.array(vectors, np.float32)
        with self._lock:
            known = self.current
            if known.version != version or known.dimension != vectors_ND.shape[1]:
                known = ContentVectors(version, _FIRST_ROWS, vectors_ND.shape[1])
            largest = int(rows.max())
            if largest >= len(known):
                known = known.grown(max(largest + 1, 2 * len(known)))
            known.put(rows, vectors_ND)
            if known.count > self._max_items:
                self._max_items, known = 0, NO_VECTORS
            self.current = known

    def drop(self, rows: Rows) -> None:
        """Forgets the vectors of items that were deleted."""
        with self._lock:
            self.current.drop(rows)
