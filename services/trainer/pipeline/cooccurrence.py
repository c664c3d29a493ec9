"""The counted companion: what follows what, soon. NumPy and SciPy.

    W[a, b] = sum over people, over events i < j <= i + window with items a, b, of (j - i)^-0.7
    C[a, b] = W[a, b] / (sum_b W[a, b])^0.4        forward: what comes after a
    B[a, b] = W[b, a] / (sum_b W[b, a])^0.4        backward: what came before a

The row's power lies between raw counts, where frequent items drown the rest, and shares of the row, where the evidence of
few weighs as much as that of many.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import scipy.sparse

from services.trainer.pipeline.dataset import Histories, Int64
from shared.bundle.scoring import CooccurrenceMatrix

_LAG_POWER, _ROW_POWER = 0.7, 0.4
# Pairs that are sorted at once: 8 bytes each.
_CHUNK_PAIRS = 8_000_000
_LAG_BITS = 9
# Up to here W is counted in one array of I * I float32 (144 MB), which needs no sorting.
_DENSE_ITEMS = 6_000
# A log of so many pairs is counted over a shorter window: far pairs weigh little, and memory is bounded.
_MAX_PAIRS, _SHORTEST_WINDOW = 30_000_000, 8


def lag_weight(lag: npt.NDArray[np.integer] | int) -> npt.NDArray[np.float64]:
    """Returns the weight of a pair at a distance of `lag` events, at least 1."""
    return np.asarray(lag, np.float64) ** -_LAG_POWER


class PairCounts:
    """W of the module; later events can be added to it.

    Args:
        item_count: I.
        window: the largest distance j - i, in [1, 511].
        event_count: expected, for the bound on pairs.
    """

    def __init__(self, item_count: int, window: int, event_count: int = 0) -> None:
        self._item_count = item_count
        self._window = min(window, max(_SHORTEST_WINDOW, _MAX_PAIRS // max(event_count, 1)))
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
                np.add.at(self._dense_C, pairs, np.float32(lag_weight(lag)))
                continue
            # Key and lag in one number: one sort orders both, and the weight is read from the lag.
            pending.append(pairs << _LAG_BITS | lag)
            pending_pairs += len(pairs)
            if pending_pairs >= _CHUNK_PAIRS:
                self._merge(pending)
                pending, pending_pairs = [], 0
        if pending:
            self._merge(pending)

    def weights(self) -> scipy.sparse.csr_matrix:
        """Returns W, (I, I) float64."""
        count = self._item_count
        if self._dense_C is not None:
            key_N = np.flatnonzero(self._dense_C)
            weight_N = self._dense_C[key_N].astype(np.float64)
        else:
            key_N, weight_N = self._key_N, self._weight_N
        row_N = key_N // max(count, 1)
        indptr_I1 = np.concatenate([[0], np.cumsum(np.bincount(row_N, minlength=count))])
        return scipy.sparse.csr_matrix((weight_N, key_N - row_N * count, indptr_I1), shape=(count, count))

    def matrices(self, max_row: int = 1000) -> tuple[CooccurrenceMatrix, CooccurrenceMatrix]:
        """Returns C and B, each with the `max_row` heaviest entries of every row."""
        weights_II = self.weights()
        forward = _divided(weights_II, max_row)
        return forward, _divided(weights_II.T.tocsr(), max_row)

    def _merge(self, pending: list[npt.NDArray[np.int64]]) -> None:
        packed = np.sort(np.concatenate(pending))
        keys = packed >> _LAG_BITS
        weights = lag_weight(packed & ((1 << _LAG_BITS) - 1))
        if len(self._key_N):
            keys, weights = np.concatenate([self._key_N, keys]), np.concatenate([self._weight_N, weights])
            order = np.argsort(keys, kind="stable")
            keys, weights = keys[order], weights[order]
        first = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
        self._key_N, self._weight_N = keys[first], np.add.reduceat(weights, first)


def count_cooccurrence(
    histories: Histories, window: int, max_row: int = 1000
) -> tuple[CooccurrenceMatrix, CooccurrenceMatrix]:
    """Returns C and B of the histories; see `PairCounts`."""
    counts = PairCounts(histories.item_count, window, len(histories.item_E))
    counts.add(histories)
    return counts.matrices(max_row)


def _divided(weights_II: scipy.sparse.csr_matrix, max_row: int) -> CooccurrenceMatrix:
    """Returns the heaviest entries of each row over the power of the row's sum."""
    count = weights_II.shape[0]
    indptr_I1, column_N, weight_N = weights_II.indptr, weights_II.indices, weights_II.data
    row_N = np.repeat(np.arange(count), np.diff(indptr_I1))
    keep = _heaviest(row_N, weight_N, max_row, count)
    if keep is not None:
        row_N, column_N, weight_N = row_N[keep], column_N[keep], weight_N[keep]
        indptr_I1 = np.concatenate([[0], np.cumsum(np.bincount(row_N, minlength=count))])
    sum_I = np.bincount(row_N, weight_N, minlength=count)
    divided_N = weight_N / sum_I[row_N] ** _ROW_POWER
    return CooccurrenceMatrix(
        indptr_I1.astype(np.int64), column_N.astype(np.int32), divided_N.astype(np.float32)
    )


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
