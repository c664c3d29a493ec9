"""How a model ranks: the Transformer's softmax blended with counted co-occurrence.

    logits_i = v_i · q + b_i
    c_i      = sum over the last `window` history items h of query_decay^age(h) * C[h, i]
    score_i  = logits_i - log sum_j exp logits_j + lambda * log(1 + scale * c_i)

q is the encoder's output for the history, v and b are the item vectors and
biases, C is the directed co-occurrence matrix, age is 0 for the newest item.
The one implementation of training's evaluation and of serving.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shared.bundle.manifest import ScoringParameters

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class CooccurrenceMatrix:
    """C in compressed rows: row = earlier item, column = later item, already normalised.

    Attributes:
        indptr_I1: where each row starts, (I + 1,), int64.
        indices_N: columns, (nnz,), int32.
        weights_N: entries, (nnz,), float32, at least 0.
    """

    indptr_I1: Int64
    indices_N: npt.NDArray[np.int32]
    weights_N: Float32

    @property
    def item_count(self) -> int:
        """I, the number of rows and columns."""
        return len(self.indptr_I1) - 1

    def to_dense(self) -> Float32:
        """Returns C as (I, I) float32: 4 bytes a cell, for catalogues of a few thousand items."""
        dense_II = np.zeros((self.item_count, self.item_count), np.float32)
        row_N = np.repeat(np.arange(self.item_count), np.diff(self.indptr_I1))
        dense_II[row_N, self.indices_N] = self.weights_N
        return dense_II


def _gather_rows(matrix: CooccurrenceMatrix, rows_R: Int64) -> tuple[npt.NDArray[np.int32], Float32, Int64]:
    """Returns the columns, weights and lengths of rows, one after the other."""
    starts_R = matrix.indptr_I1[rows_R]
    lengths_R = matrix.indptr_I1[rows_R + 1] - starts_R
    ends_R = np.cumsum(lengths_R)
    total = int(ends_R[-1]) if len(ends_R) else 0
    positions_N = np.arange(total) + np.repeat(starts_R - (ends_R - lengths_R), lengths_R)
    return matrix.indices_N[positions_N], matrix.weights_N[positions_N], lengths_R


def _recent(history_H: Int64, scoring: ScoringParameters) -> tuple[Int64, npt.NDArray[np.float64]]:
    """Returns the last `window` items of a history, oldest first, and their decayed weights."""
    recent_R = history_H[-scoring.window :]
    ages_R = np.arange(len(recent_R) - 1, -1, -1)
    return recent_R, np.float64(scoring.query_decay) ** ages_R.astype(np.float64)


def cooccurrence_scores(matrix: CooccurrenceMatrix, history_H: Int64, scoring: ScoringParameters) -> Float32:
    """Returns c for every item, (I,), of one history of item indices, oldest first."""
    recent_R, decay_R = _recent(history_H, scoring)
    columns_N, weights_N, lengths_R = _gather_rows(matrix, recent_R)
    decayed_N = weights_N * np.repeat(decay_R, lengths_R)
    return np.bincount(columns_N, decayed_N, minlength=matrix.item_count).astype(np.float32)


def cooccurrence_neighbours(
    matrix: CooccurrenceMatrix, history_H: Int64, scoring: ScoringParameters
) -> tuple[Int64, Float32]:
    """Returns the items whose c is above 0, (M,), ascending, and their c, (M,).

    For retrieval in large catalogues: costs what the history's rows hold, whatever I is.
    """
    recent_R, decay_R = _recent(history_H, scoring)
    columns_N, weights_N, lengths_R = _gather_rows(matrix, recent_R)
    decayed_N = weights_N * np.repeat(decay_R, lengths_R)
    items_M, inverse_N = np.unique(columns_N, return_inverse=True)
    return items_M.astype(np.int64), np.bincount(inverse_N, decayed_N, minlength=len(items_M)).astype(
        np.float32
    )


def cooccurrence_contributions(
    matrix: CooccurrenceMatrix, history_H: Int64, candidates_C: Int64, scoring: ScoringParameters
) -> Float32:
    """Returns what each history item adds to c of each candidate, (C, H), float32.

    Rows sum to `cooccurrence_scores` of the candidates. Items beyond the window add 0. The largest
    entry of a row answers "because you looked at …".
    """
    contributions_CH = np.zeros((len(candidates_C), len(history_H)), np.float32)
    recent_R, decay_R = _recent(history_H, scoring)
    if not len(recent_R) or not len(candidates_C):
        return contributions_CH
    columns_N, weights_N, lengths_R = _gather_rows(matrix, recent_R)
    order_C = np.argsort(candidates_C, kind="stable")
    sorted_C = candidates_C[order_C]
    row_N = np.repeat(np.arange(len(recent_R)), lengths_R)
    # A candidate may be listed twice: every place of it gets the entry.
    first_N = np.searchsorted(sorted_C, columns_N, "left")
    last_N = np.searchsorted(sorted_C, columns_N, "right")
    offset = len(history_H) - len(recent_R)
    for repeat in range(int((last_N - first_N).max(initial=0))):
        hit_N = first_N + repeat < last_N
        places = order_C[first_N[hit_N] + repeat]
        contributions_CH[places, offset + row_N[hit_N]] += weights_N[hit_N] * decay_R[row_N[hit_N]]
    return contributions_CH


def log_partition(logits_BI: Float32) -> Float32:
    """Returns log sum_i exp logits_i of each row, (B,), without overflow."""
    largest_B1 = logits_BI.max(axis=-1, keepdims=True)
    return (largest_B1 + np.log(np.exp(logits_BI - largest_B1).sum(axis=-1, keepdims=True)))[..., 0]


def blended_scores(logits_BI: Float32, cooccurrence_BI: Float32, scoring: ScoringParameters) -> Float32:
    """Returns the score of every item, (B, I) or (I,), float32, as in the module's formula."""
    log_softmax_BI = logits_BI - log_partition(logits_BI)[..., None]
    if scoring.lambda_ == 0:
        return log_softmax_BI
    return log_softmax_BI + np.float32(scoring.lambda_) * np.log1p(
        np.float32(scoring.scale) * cooccurrence_BI
    )


def score_candidates(
    item_vectors_ID: Float32,
    item_bias_I: Float32,
    matrix: CooccurrenceMatrix,
    query_D: Float32,
    history_H: Int64,
    candidates_C: Int64,
    scoring: ScoringParameters,
    log_partition_of_query: float = 0.0,
) -> Float32:
    """Returns the scores of candidates alone, (C,), float32.

    Equal to `blended_scores` where `log_partition_of_query` is that of all items' logits; without it
    every score is higher by that one constant, which changes no order.
    """
    logits_C = item_vectors_ID[candidates_C] @ query_D + item_bias_I[candidates_C]
    scores_C = logits_C - np.float32(log_partition_of_query)
    if scoring.lambda_ == 0:
        return scores_C
    items_M, c_M = cooccurrence_neighbours(matrix, history_H, scoring)
    c_C = np.zeros(len(candidates_C), np.float32)
    if len(items_M):
        place_C = np.minimum(np.searchsorted(items_M, candidates_C), len(items_M) - 1)
        hit_C = items_M[place_C] == candidates_C
        c_C[hit_C] = c_M[place_C[hit_C]]
    return scores_C + np.float32(scoring.lambda_) * np.log1p(np.float32(scoring.scale) * c_C)


def cooccurrence_scores_of_batch(
    matrix: CooccurrenceMatrix,
    histories: list[Int64],
    scoring: ScoringParameters,
    dense_II: Float32 | None = None,
) -> Float32:
    """Returns c for every item of each history, (B, I), float32.

    With `dense_II`, the matrix as `to_dense` returns it, crowded rows cost a tenth of the time.
    """
    if dense_II is not None:
        c_BI = np.zeros((len(histories), matrix.item_count), np.float32)
        for row, history_H in enumerate(histories):
            recent_R, decay_R = _recent(history_H, scoring)
            c_BI[row] = decay_R.astype(np.float32) @ dense_II[recent_R]
        return c_BI
    recents = [_recent(history_H, scoring) for history_H in histories]
    if not recents:
        return np.zeros((0, matrix.item_count), np.float32)
    rows_R = np.concatenate([recent_R for recent_R, _ in recents])
    decay_R = np.concatenate([decay for _, decay in recents])
    batch_R = np.repeat(np.arange(len(recents)), [len(recent_R) for recent_R, _ in recents])
    columns_N, weights_N, lengths_R = _gather_rows(matrix, rows_R)
    cells_N = np.repeat(batch_R * matrix.item_count, lengths_R) + columns_N
    decayed_N = weights_N * np.repeat(decay_R, lengths_R)
    cells = len(recents) * matrix.item_count
    return (
        np.bincount(cells_N, decayed_N, minlength=cells)
        .astype(np.float32)
        .reshape(len(recents), matrix.item_count)
    )


def naive_blended_scores(
    item_vectors_ID: Float32,
    item_bias_I: Float32,
    matrix: CooccurrenceMatrix,
    query_D: Float32,
    history_H: Int64,
    scoring: ScoringParameters,
) -> npt.NDArray[np.float64]:
    """The slow, readable twin of everything above: the formula in loops, (I,), float64."""
    item_count = matrix.item_count
    logits = [
        float(sum(float(v) * float(q) for v, q in zip(item_vectors_ID[i], query_D, strict=True)))
        + float(item_bias_I[i])
        for i in range(item_count)
    ]
    largest = max(logits)
    partition = largest + float(np.log(sum(np.exp(logit - largest) for logit in logits)))
    c = [0.0] * item_count
    for age, item in enumerate(reversed(history_H.tolist())):
        if age >= scoring.window:
            break
        for n in range(int(matrix.indptr_I1[item]), int(matrix.indptr_I1[item + 1])):
            c[int(matrix.indices_N[n])] += scoring.query_decay**age * float(matrix.weights_N[n])
    return np.array(
        [
            logits[i] - partition + scoring.lambda_ * float(np.log(1 + scoring.scale * c[i]))
            for i in range(item_count)
        ]
    )
