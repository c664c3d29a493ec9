"""The counted companion: what follows what, soon. Pure NumPy.

    C[a, b] = sum over people, over events i < j <= i + window with items a, b, of 1 / (j - i)
    C[a, b] is divided by the square root of row a's sum

Directed (a before b). Against raw counts the root keeps frequent items from drowning the rest; against
shares of the row it keeps the evidence of many above that of few.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from services.trainer.pipeline.dataset import Histories
from shared.bundle.scoring import CooccurrenceMatrix

# Pairs that are sorted at once: 8 bytes each.
_CHUNK_PAIRS = 8_000_000
_LAG_BITS = 9


def count_cooccurrence(histories: Histories, window: int, max_row: int = 1000) -> CooccurrenceMatrix:
    """Returns the matrix of the histories.

    Args:
        window: the largest distance j - i, in [1, 511].
        max_row: the heaviest entries of a row that are kept.
    """
    item_count = histories.item_count
    user_E = np.repeat(np.arange(histories.user_count), histories.length_U)
    item_E = histories.item_E.astype(np.int64)
    keys, weights = np.zeros(0, np.int64), np.zeros(0, np.float64)
    pending: list[npt.NDArray[np.int64]] = []
    pending_pairs = 0
    longest = int(histories.length_U.max(initial=0))
    for lag in range(1, min(window, longest - 1) + 1):
        same = user_E[lag:] == user_E[:-lag]
        pairs = item_E[:-lag][same] * item_count + item_E[lag:][same]
        # Key and lag in one number: one sort orders both, and the weight is read from the lag.
        pending.append(pairs << _LAG_BITS | lag)
        pending_pairs += len(pairs)
        if pending_pairs >= _CHUNK_PAIRS:
            keys, weights = _merge(keys, weights, pending)
            pending, pending_pairs = [], 0
    if pending:
        keys, weights = _merge(keys, weights, pending)
    row_N, column_N = keys // max(item_count, 1), keys % max(item_count, 1)
    if len(keys):
        keep = _heaviest(row_N, weights, max_row)
        row_N, column_N, weights = row_N[keep], column_N[keep], weights[keep]
    sum_I = np.bincount(row_N, weights, minlength=item_count)
    indptr_I1 = np.concatenate([[0], np.cumsum(np.bincount(row_N, minlength=item_count))]).astype(np.int64)
    normalised_N = weights / np.sqrt(sum_I[row_N])
    return CooccurrenceMatrix(indptr_I1, column_N.astype(np.int32), normalised_N.astype(np.float32))


def _merge(
    keys: npt.NDArray[np.int64], weights: npt.NDArray[np.float64], pending: list[npt.NDArray[np.int64]]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    packed = np.sort(np.concatenate(pending))
    new_keys = packed >> _LAG_BITS
    new_weights = 1.0 / (packed & ((1 << _LAG_BITS) - 1))
    if len(keys):
        new_keys, new_weights = np.concatenate([keys, new_keys]), np.concatenate([weights, new_weights])
        order = np.argsort(new_keys, kind="stable")
        new_keys, new_weights = new_keys[order], new_weights[order]
    if not len(new_keys):
        return new_keys, new_weights
    first = np.flatnonzero(np.concatenate([[True], new_keys[1:] != new_keys[:-1]]))
    return new_keys[first], np.add.reduceat(new_weights, first)


def _heaviest(
    row_N: npt.NDArray[np.int64], weight_N: npt.NDArray[np.float64], max_row: int
) -> npt.NDArray[np.int64]:
    """Returns the positions of each row's heaviest entries, in their order."""
    if np.bincount(row_N).max() <= max_row:
        return np.arange(len(row_N))
    order = np.lexsort((-weight_N, row_N))
    ordered = row_N[order]
    place = np.arange(len(row_N)) - np.searchsorted(ordered, ordered, "left")
    return np.sort(order[place < max_row])
