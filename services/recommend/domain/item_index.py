"""One row number per item id, for the life of the process."""

from __future__ import annotations

import threading
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from shared.tokens import item_digest


class ItemIndex:
    """Gives every item id a row, once and for ever; rows count from 0 without gaps.

    Catalogue, histories, live counts and models all speak in rows, so that a request combines
    them by array operations. Rows are never taken back: an id that is deleted and comes again
    has its old row. Reading takes no lock.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._row_of: dict[str, int] = {}
        self._ids: list[str] = []
        self._digests_R: npt.NDArray[np.uint64] = np.empty(1024, dtype=np.uint64)

    def __len__(self) -> int:
        return len(self._ids)

    def row_of(self, item_id: str) -> int | None:
        """Returns the item's row, or None where this process has not heard of it."""
        return self._row_of.get(item_id)

    def id_of(self, row: int) -> str:
        """Returns the id of a row."""
        return self._ids[row]

    def intern(self, item_ids: Iterable[str]) -> npt.NDArray[np.int32]:
        """Returns the rows of the items, in their order, int32; new ids are appended."""
        row_of = self._row_of
        rows = []
        for item_id in item_ids:
            row = row_of.get(item_id)
            rows.append(self._append(item_id) if row is None else row)
        return np.array(rows, dtype=np.int32)

    def digests(self, size: int) -> npt.NDArray[np.uint64]:
        """Returns the digests (`shared.tokens.item_digest`) of the first `size` rows, uint64."""
        return self._digests_R[:size]

    def _append(self, item_id: str) -> int:
        with self._lock:
            row = self._row_of.get(item_id)
            if row is not None:
                return row
            row = len(self._ids)
            if row == len(self._digests_R):
                # A reader keeps the old array: the rows that it knows are the same in both.
                self._digests_R = np.concatenate([self._digests_R, np.empty(row, dtype=np.uint64)])
            self._digests_R[row] = item_digest(item_id)
            self._ids.append(item_id)
            # Last: whoever finds the row finds everything about it.
            self._row_of[item_id] = row
            return row
