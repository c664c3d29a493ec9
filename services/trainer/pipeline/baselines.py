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

# EASE inverts a matrix of as many rows: 400 MB and a minute at this size. Of larger catalogues, whose own tables are large too, so
# many of the most popular take part as need a third of that.
EASE_MAX_ITEMS, EASE_ITEMS_OF_LARGER = 14_000, 8_000
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


def ease(
    histories: Histories,
    l2: float = _EASE_L2,
    neighbours: int = _NEIGHBOURS,
    max_items: int = EASE_MAX_ITEMS,
    items_of_larger: int = EASE_ITEMS_OF_LARGER,
) -> CooccurrenceMatrix:
    """Returns the weights of EASE (Steck, 2019), the largest `neighbours` of each row by size.

    P = (X'X + l2 * 1)^-1,  B[i, j] = -P[i, j] / P[j, j],  B[i, i] = 0.

    Of more than `max_items` items the most popular `items_of_larger` take part; the others have no weights.
    """
    gram = _gram(histories)
    items = gram.shape[0]
    taking = np.arange(items)
    if items > max_items:
        taking = np.sort(np.argsort(-gram.diagonal(), kind="stable")[: min(max_items, items_of_larger)])
        gram = gram[taking][:, taking]
    inverse = _SymmetricInverse(gram, l2)
    diagonal_J = inverse.diagonal()
    count = len(taking)
    rows, columns, weights = [], [], []
    keep = min(neighbours, max(count - 1, 1))
    for item in range(count):
        weight_J = inverse.row(item) / -diagonal_J
        weight_J[item] = 0.0
        best = np.sort(np.argpartition(-np.abs(weight_J), keep - 1)[:keep])
        rows.append(np.full(len(best), taking[item]))
        columns.append(taking[best])
        weights.append(weight_J[best])
    return _compressed(np.concatenate(rows), np.concatenate(columns), np.concatenate(weights), items)


class _SymmetricInverse:
    """(G + l2 * 1)^-1 of a sparse symmetric matrix, in half the memory of a dense one.

    LAPACK's rectangular full packed format (Gustavson et al., 2010), here lower and of even order N = 2 K: columns below
    K of the lower triangle stand in an (N + 1, K) array from row 1 on, the lower triangle of the rest stands transposed
    in the upper triangle above.
    """

    def __init__(self, gram: scipy.sparse.csr_matrix, l2: float) -> None:
        self._count = gram.shape[0]
        order = self._count + self._count % 2
        self._half = half = order // 2
        packed = np.zeros((order + 1, half), np.float32, order="F")
        lower = scipy.sparse.tril(gram).tocoo()
        left = lower.col < half
        packed[lower.row[left] + 1, lower.col[left]] = lower.data[left]
        packed[lower.col[~left] - half, lower.row[~left] - half] = lower.data[~left]
        first, last = np.arange(half), np.arange(half, order)
        packed[first + 1, first] += np.float32(l2)
        packed[last - half, last - half] += np.float32(l2)
        flat = packed.reshape(-1, order="F")
        flat, info = scipy.linalg.lapack.spftrf(order, flat, transr="N", uplo="L", overwrite_a=1)
        flat, info_inverse = scipy.linalg.lapack.spftri(order, flat, transr="N", uplo="L", overwrite_a=1)
        if info or info_inverse:
            raise ValueError("X'X + l2 is not positive definite")
        self._packed = flat.reshape((order + 1, half), order="F")

    def row(self, index: int) -> npt.NDArray[np.float32]:
        """Returns one row, which is also a column."""
        packed, half = self._packed, self._half
        if index < half:
            found = np.concatenate([packed[index + 1, :index], packed[index + 1 :, index]])
        else:
            place = index - half
            found = np.concatenate([packed[index + 1, :], packed[:place, place], packed[place, place:]])
        return found[: self._count]

    def diagonal(self) -> npt.NDArray[np.float32]:
        """Returns the diagonal."""
        place = np.arange(self._half)
        found = np.concatenate([self._packed[place + 1, place], self._packed[place, place]])
        return found[: self._count]


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
        full_ladder: EASE though it may cost a minute, else where it takes about a second.
    """
    makers: dict[str, Callable[[Histories], CooccurrenceMatrix]] = {ITEM_KNN: item_knn}
    if full_ladder or histories.item_count <= EASE_CHEAP_ITEMS:
        makers[EASE] = ease
    found = {}
    for name, make in makers.items():
        matrix = make(training)
        chosen = choose_query_decay(histories, validation, matrix, window, exclude_seen)
        if before_test is not training:
            matrix = make(before_test)
        found[name] = Neighbours.of(matrix, chosen.scoring)
    return found
