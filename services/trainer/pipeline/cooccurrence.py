"""The counted companion: what follows what, soon. Pure NumPy.

    C[a, b] = sum over people, over events i < j <= i + window with items a, b, of 1 / (j - i)
    C[a, b] is divided by the square root of row a's sum

Directed (a before b). Against raw counts the root keeps frequent items from drowning the rest; against
shares of the row it keeps the evidence of many above that of few.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from services.trainer.pipeline.dataset import Histories, Int64
from shared.bundle.scoring import CooccurrenceMatrix

# Pairs that are sorted at once: 8 bytes each.
_CHUNK_PAIRS = 8_000_000
_LAG_BITS = 9
# Up to here C is counted in one array of I * I float32 (144 MB), which needs no sorting.
_DENSE_ITEMS = 6_000


class PairCounts:
    """The sums above, before the division; later events can be added to them.

    Args:
        item_count: I.
        window: the largest distance j - i, in [1, 511].
    """

    def __init__(self, item_count: int, window: int) -> None:
        self._item_count, self._window = item_count, window
        self._dense_C: npt.NDArray[np.float32] | None = None
        if item_count <= _DENSE_ITEMS:
            self._dense_C = np.zeros(item_count * item_count, np.float32)
        self._key_N, self._weight_N = np.zeros(0, np.int64), np.zeros(0, np.float64)

    def add(self, histories: Histories, from_U: Int64 | int = 0, to_U: Int64 | None = None) -> None:
        """Adds the pairs whose later event stands at a place in [from, to) of its history, 0 for the first."""
        length_U = histories.length_U
        last_U = length_U if to_U is None else np.minimum(to_U, length_U)
        place_E = np.arange(len(histories.item_E)) - np.repeat(histories.start_U1[:-1], length_U)
        wanted_E = (place_E >= np.repeat(np.broadcast_to(from_U, length_U.shape), length_U)) & (
            place_E < np.repeat(last_U, length_U)
        )
        later = np.flatnonzero(wanted_E)
        item_E = histories.item_E.astype(np.int64)
        pending: list[npt.NDArray[np.int64]] = []
        pending_pairs = 0
        for lag in range(1, self._window + 1):
            later = later[place_E[later] >= lag]
            if not len(later):
                break
            pairs = item_E[later - lag] * self._item_count + item_E[later]
            if self._dense_C is not None:
                np.add.at(self._dense_C, pairs, np.float32(1.0 / lag))
                continue
            # Key and lag in one number: one sort orders both, and the weight is read from the lag.
            pending.append(pairs << _LAG_BITS | lag)
            pending_pairs += len(pairs)
            if pending_pairs >= _CHUNK_PAIRS:
                self._merge(pending)
                pending, pending_pairs = [], 0
        if pending:
            self._merge(pending)

    def matrix(self, max_row: int = 1000) -> CooccurrenceMatrix:
        """Returns the divided matrix of what was added, with the `max_row` heaviest entries of each row."""
        count = self._item_count
        if self._dense_C is not None:
            key_N = np.flatnonzero(self._dense_C)
            weight_N = self._dense_C[key_N].astype(np.float64)
        else:
            key_N, weight_N = self._key_N, self._weight_N
        row_N = key_N // max(count, 1)
        keep = _heaviest(row_N, weight_N, max_row, count)
        if keep is not None:
            key_N, row_N, weight_N = key_N[keep], row_N[keep], weight_N[keep]
        column_N = key_N - row_N * count
        sum_I = np.bincount(row_N, weight_N, minlength=count)
        indptr_I1 = np.concatenate([[0], np.cumsum(np.bincount(row_N, minlength=count))]).astype(np.int64)
        normalised_N = weight_N / np.sqrt(sum_I[row_N])
        return CooccurrenceMatrix(indptr_I1, column_N.astype(np.int32), normalised_N.astype(np.float32))

    def _merge(self, pending: list[npt.NDArray[np.int64]]) -> None:
        packed = np.sort(np.concatenate(pending))
        keys = packed >> _LAG_BITS
        weights = 1.0 / (packed & ((1 << _LAG_BITS) - 1))
        if len(self._key_N):
            keys, weights = np.concatenate([self._key_N, keys]), np.concatenate([self._weight_N, weights])
            order = np.argsort(keys, kind="stable")
            keys, weights = keys[order], weights[order]
        first = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
        self._key_N, self._weight_N = keys[first], np.add.reduceat(weights, first)


def count_cooccurrence(histories: Histories, window: int, max_row: int = 1000) -> CooccurrenceMatrix:
    """Returns the matrix of the histories; see `PairCounts`."""
    counts = PairCounts(histories.item_count, window)
    counts.add(histories)
    return counts.matrix(max_row)


def _heaviest(
    row_N: npt.NDArray[np.int64], weight_N: npt.NDArray[np.float64], max_row: int, item_count: int
) -> npt.NDArray[np.bool_] | None:
    """Returns which entries to keep, (N,), of entries sorted by row; None for all."""
    count_I = np.bincount(row_N, minlength=item_count)
    crowded = np.flatnonzero(count_I > max_row)
    if not len(crowded):
        return None
    end_I = np.cumsum(count_I)
    keep_N = np.ones(len(row_N), bool)
    for row in crowded:
        first, last = end_I[row] - count_I[row], end_I[row]
        lightest = np.argpartition(weight_N[first:last], last - first - max_row - 1)[: last - first - max_row]
        keep_N[first + lightest] = False
    return keep_N
