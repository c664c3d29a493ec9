"""Item-item baselines of the ladder: item-kNN and EASE. NumPy and SciPy.

U = people, I = items. X is the binary (U, I) matrix of who touched what.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import scipy.linalg
import scipy.sparse

from services.trainer.pipeline.dataset import HeldOut, Histories
from services.trainer.pipeline.evaluation import EASE, ITEM_KNN, Neighbours, choose_query_decay
from shared.bundle.scoring import CooccurrenceMatrix

# EASE inverts an I x I matrix: 1.6 GB and minutes at this size.
EASE_MAX_ITEMS = 20_000
# What every run can afford: a second.
EASE_CHEAP_ITEMS = 2_500
_EASE_L2 = 200.0
_NEIGHBOURS = 200


def _gram(histories: Histories) -> scipy.sparse.csr_matrix:
    """Returns X'X, (I, I): how many people touched both, in float32."""
    shape = (histories.user_count, histories.item_count)
    user_E = np.repeat(np.arange(shape[0]), histories.length_U)
    touched = scipy.sparse.csr_matrix(
        (np.ones(len(user_E), np.float32), (user_E, histories.item_E)), shape=shape
    )
    touched.data[:] = 1.0
    return (touched.T @ touched).tocsr()


def item_knn(histories: Histories, neighbours: int = _NEIGHBOURS) -> CooccurrenceMatrix:
    """Returns cosines between items, the nearest `neighbours` of each (Deshpande & Karypis, 2004)."""
    gram = _gram(histories)
    norm_I = np.sqrt(np.maximum(gram.diagonal(), 1.0))
    row_N = np.repeat(np.arange(gram.shape[0]), np.diff(gram.indptr))
    cosine_N = (gram.data / (norm_I[row_N] * norm_I[gram.indices])).astype(np.float32)
    apart = row_N != gram.indices
    return _nearest(row_N[apart], gram.indices[apart], cosine_N[apart], gram.shape[0], neighbours)


def ease(histories: Histories, l2: float = _EASE_L2, neighbours: int = _NEIGHBOURS) -> CooccurrenceMatrix:
    """Returns the weights of EASE (Steck, 2019), the largest `neighbours` of each row by size.

    P = (X'X + l2 * 1)^-1,  B = 1 - P / diag(P) by column, its diagonal 0.

    Raises:
        ValueError: there are more than EASE_MAX_ITEMS items.
    """
    if histories.item_count > EASE_MAX_ITEMS:
        raise ValueError(f"EASE is for at most {EASE_MAX_ITEMS} items, not {histories.item_count}")
    # In Fortran's order LAPACK factors and inverts in place: one matrix in memory, not three.
    P_II = np.asfortranarray(_gram(histories).toarray(order="F"))
    P_II[np.diag_indices_from(P_II)] += np.float32(l2)
    factor_II, info = scipy.linalg.lapack.spotrf(P_II, lower=1, overwrite_a=1, clean=0)
    inverse_II, info_inverse = scipy.linalg.lapack.spotri(factor_II, lower=1, overwrite_c=1)
    if info or info_inverse:
        raise ValueError("X'X + l2 is not positive definite")
    diagonal_I = inverse_II.diagonal().copy()
    rows, columns, weights = [], [], []
    count = len(diagonal_I)
    keep = min(neighbours, max(count - 1, 1))
    for item in range(count):
        # Only the lower triangle holds the inverse.
        weight_I = np.concatenate([inverse_II[item, :item], inverse_II[item:, item]]) / -diagonal_I
        weight_I[item] = 0.0
        best = np.sort(np.argpartition(-np.abs(weight_I), keep - 1)[:keep])
        rows.append(np.full(len(best), item))
        columns.append(best)
        weights.append(weight_I[best])
    return _compressed(np.concatenate(rows), np.concatenate(columns), np.concatenate(weights), count)


def _nearest(
    row_N: npt.NDArray[np.int64],
    column_N: npt.NDArray[np.int32],
    weight_N: npt.NDArray[np.float32],
    item_count: int,
    neighbours: int,
) -> CooccurrenceMatrix:
    count_I = np.bincount(row_N, minlength=item_count)
    end_I = np.cumsum(count_I)
    keep_N = np.ones(len(row_N), bool)
    for row in np.flatnonzero(count_I > neighbours):
        first, last = end_I[row] - count_I[row], end_I[row]
        far = last - first - neighbours
        keep_N[first + np.argpartition(weight_N[first:last], far - 1)[:far]] = False
    return _compressed(row_N[keep_N], column_N[keep_N], weight_N[keep_N], item_count)


def _compressed(
    row_N: npt.NDArray[np.integer],
    column_N: npt.NDArray[np.integer],
    weight_N: npt.NDArray[np.floating],
    item_count: int,
) -> CooccurrenceMatrix:
    indptr_I1 = np.concatenate([[0], np.cumsum(np.bincount(row_N, minlength=item_count))])
    return CooccurrenceMatrix(
        indptr_I1.astype(np.int64), column_N.astype(np.int32), weight_N.astype(np.float32)
    )


def item_item_baselines(
    histories: Histories,
    training: Histories,
    before_test: Histories,
    validation: HeldOut,
    window: int,
    exclude_seen: bool,
    full_ladder: bool = False,
) -> dict[str, Neighbours]:
    """Returns the item-item baselines for the test, their recency chosen on the validation events.

    Args:
        window: newest events of a history that they look at.
        full_ladder: EASE whatever it costs, else where it takes about a second.
    """
    makers: dict[str, Callable[[Histories], CooccurrenceMatrix]] = {ITEM_KNN: item_knn}
    if histories.item_count <= (EASE_MAX_ITEMS if full_ladder else EASE_CHEAP_ITEMS):
        makers[EASE] = ease
    found = {}
    for name, make in makers.items():
        chosen = choose_query_decay(histories, validation, make(training), window, exclude_seen)
        found[name] = Neighbours.of(make(before_test), chosen.scoring)
    return found
