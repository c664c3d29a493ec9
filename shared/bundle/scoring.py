"""How a model ranks: the Transformer's softmax blended with what was counted and what attributes say.

    logits_i = sequence * v_i · q + bias_i
    c_i      = sum over the last `window` history items h of query_decay^age(h) * C[h, i]
    b_i      = the same with the backward counts B: what used to come before h
    r_i      = the same with the identity: the history itself, for shops where people come back to an item
    score_i  = logits_i - log sum_j exp logits_j
               + lambda * log(1 + scale * c_i) + backward * log(1 + scale * b_i) + repeat * log(1 + scale * r_i)
               + mean_h(a_h) · k_i

q is the encoder's output for the history, v and bias are the item vectors and biases, C and B the directed
co-occurrence matrices, age is 0 for the newest item. a and k are attribute factors (`attribute_queries`,
`attribute_keys`), the mean is weighted by query_decay^age over the same window. Their weight in the blend is within
them. The one implementation of training's evaluation and of serving.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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


@dataclass(frozen=True, slots=True, eq=False)
class Companion:
    """Everything that is added to the Transformer's log-softmax.

    Attributes:
        scoring: the weights.
        forward, backward: C and B; without B its term is 0.
        attribute_queries_IR, attribute_keys_IR: a and k; without them their term is 0.
    """

    scoring: ScoringParameters
    forward: CooccurrenceMatrix
    backward: CooccurrenceMatrix | None = None
    attribute_queries_IR: Float32 | None = None
    attribute_keys_IR: Float32 | None = None

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Any], scoring: ScoringParameters) -> Companion:
        """Returns the companion of a bundle's arrays, see `shared.bundle.reader`."""

        def counts(name: str) -> CooccurrenceMatrix:
            return CooccurrenceMatrix(
                arrays[f"{name}_indptr"], arrays[f"{name}_indices"], arrays[f"{name}_weights"]
            )

        backward = counts("backward") if "backward_indptr" in arrays else None
        queries, keys = arrays.get("attribute_queries"), arrays.get("attribute_keys")
        return cls(scoring, counts("cooccurrence"), backward, queries, keys)

    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Returns the arrays that `from_arrays` reads."""
        found: dict[str, npt.NDArray[Any]] = {}
        for name, matrix in (("cooccurrence", self.forward), ("backward", self.backward)):
            if matrix is not None:
                found[f"{name}_indptr"] = matrix.indptr_I1
                found[f"{name}_indices"] = matrix.indices_N
                found[f"{name}_weights"] = matrix.weights_N
        if self.attribute_queries_IR is not None and self.attribute_keys_IR is not None:
            found["attribute_queries"] = self.attribute_queries_IR
            found["attribute_keys"] = self.attribute_keys_IR
        return found

    def _counted_parts(self) -> list[tuple[float, CooccurrenceMatrix]]:
        parts = [(self.scoring.lambda_, self.forward), (self.scoring.backward, self.backward)]
        return [(weight, matrix) for weight, matrix in parts if weight != 0 and matrix is not None]

    def _damped(self, c: Float32) -> Float32:
        return np.log1p(np.float32(self.scoring.scale) * c)

    def counted(self, history_H: Int64, forward_I: Float32 | None = None) -> Float32:
        """Returns what counts and repeats add to the score of every item, (I,), float32.

        Args:
            history_H: item indices, oldest first.
            forward_I: c, where the caller has it already.
        """
        added_I = np.zeros(self.forward.item_count, np.float32)
        for weight, matrix in self._counted_parts():
            if matrix is self.forward and forward_I is not None:
                items_M = np.flatnonzero(forward_I)
                c_M = forward_I[items_M]
            else:
                items_M, c_M = cooccurrence_neighbours(matrix, history_H, self.scoring)
            added_I[items_M] += np.float32(weight) * self._damped(c_M)
        if self.scoring.repeat:
            items_M, r_M = _repeats(history_H, self.scoring)
            added_I[items_M] += np.float32(self.scoring.repeat) * self._damped(r_M)
        return added_I

    def attribute_query(self, history_H: Int64) -> Float32 | None:
        """Returns mean_h(a_h), (R,), float32: its product with k_i is the attribute term. None without attributes."""
        if self.attribute_queries_IR is None or not len(history_H):
            return None
        recent_R, decay_R = _recent(history_H, self.scoring)
        weight_R = (decay_R / decay_R.sum()).astype(np.float32)
        return weight_R @ self.attribute_queries_IR[recent_R]

    def content(self, history_H: Int64) -> Float32 | None:
        """Returns the attribute term of every item, (I,), float32; None where there is none."""
        query_R = self.attribute_query(history_H)
        if query_R is None or self.attribute_keys_IR is None:
            return None
        # `dot` and not `@`, which takes half as long again for a matrix and a vector.
        content_I: Float32 = np.dot(self.attribute_keys_IR, query_R)
        return content_I

    def added(self, history_H: Int64) -> Float32:
        """Returns everything that is added to the log-softmax of every item, (I,), float32."""
        added_I = self.counted(history_H)
        content_I = self.content(history_H)
        return added_I if content_I is None else added_I + content_I

    def added_to(self, history_H: Int64, candidates_C: Int64) -> Float32:
        """Returns `added` of candidates alone, (C,), float32; costs what they and the history's rows hold."""
        added_C = np.zeros(len(candidates_C), np.float32)
        parts = [
            (weight, *cooccurrence_neighbours(matrix, history_H, self.scoring))
            for weight, matrix in self._counted_parts()
        ]
        if self.scoring.repeat:
            parts.append((self.scoring.repeat, *_repeats(history_H, self.scoring)))
        for weight, items_M, c_M in parts:
            if len(items_M):
                place_C = np.minimum(np.searchsorted(items_M, candidates_C), len(items_M) - 1)
                hit_C = items_M[place_C] == candidates_C
                added_C[hit_C] += np.float32(weight) * self._damped(c_M[place_C[hit_C]])
        query_R = self.attribute_query(history_H)
        if query_R is not None and self.attribute_keys_IR is not None:
            added_C += self.attribute_keys_IR[candidates_C] @ query_R
        return added_C

    def losses(self, history_H: Int64, candidates_C: Int64) -> Float32:
        """Returns by how much counts and repeats would add less without each history item, (C, H), float32.

        The others keep their ages. The largest of a row answers "because you looked at …".
        """
        lost_CH = np.zeros((len(candidates_C), len(history_H)), np.float32)
        parts = [
            (weight, cooccurrence_contributions(matrix, history_H, candidates_C, self.scoring))
            for weight, matrix in self._counted_parts()
        ]
        if self.scoring.repeat:
            recent_R, decay_R = _recent(history_H, self.scoring)
            own_CH = np.zeros_like(lost_CH)
            own_CH[:, len(history_H) - len(recent_R) :] = (candidates_C[:, None] == recent_R) * decay_R
            parts.append((self.scoring.repeat, own_CH))
        for weight, part_CH in parts:
            total_C1 = part_CH.sum(axis=1, keepdims=True)
            without_CH = self._damped(np.maximum(total_C1 - part_CH, 0))
            lost_CH += np.float32(weight) * (self._damped(total_C1) - without_CH)
        return lost_CH


def _repeats(history_H: Int64, scoring: ScoringParameters) -> tuple[Int64, Float32]:
    """Returns the distinct items of the window, ascending, and r of each."""
    recent_R, decay_R = _recent(history_H, scoring)
    items_M, inverse_R = np.unique(recent_R, return_inverse=True)
    return items_M, np.bincount(inverse_R, decay_R, minlength=len(items_M)).astype(np.float32)


def blended_scores(logits_BI: Float32, added_BI: Float32) -> Float32:
    """Returns the score of every item, (B, I) or (I,), float32, as in the module's formula.

    Args:
        logits_BI: sequence * v · q + bias.
        added_BI: what the companion adds.
    """
    return logits_BI - log_partition(logits_BI)[..., None] + added_BI


def score_candidates(
    item_vectors_ID: Float32,
    item_bias_I: Float32,
    companion: Companion,
    query_D: Float32,
    history_H: Int64,
    candidates_C: Int64,
    log_partition_of_query: float = 0.0,
) -> Float32:
    """Returns the scores of candidates alone, (C,), float32.

    Equal to `blended_scores` where `log_partition_of_query` is that of all items' logits; without it
    every score is higher by that one constant, which changes no order.
    """
    logits_C = np.float32(companion.scoring.sequence) * (item_vectors_ID[candidates_C] @ query_D)
    logits_C += item_bias_I[candidates_C] - np.float32(log_partition_of_query)
    return logits_C + companion.added_to(history_H, candidates_C)


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
    companion: Companion,
    query_D: Float32,
    history_H: Int64,
) -> npt.NDArray[np.float64]:
    """The slow, readable twin of everything above: the formula in loops, (I,), float64."""
    scoring, item_count = companion.scoring, companion.forward.item_count
    logits = [
        scoring.sequence
        * float(sum(float(v) * float(q) for v, q in zip(item_vectors_ID[i], query_D, strict=True)))
        + float(item_bias_I[i])
        for i in range(item_count)
    ]
    largest = max(logits)
    partition = largest + float(np.log(sum(np.exp(logit - largest) for logit in logits)))
    recent = list(enumerate(reversed(history_H.tolist())))[: scoring.window]
    score = [logit - partition for logit in logits]
    for weight, matrix in ((scoring.lambda_, companion.forward), (scoring.backward, companion.backward)):
        c = [0.0] * item_count
        for age, item in recent:
            if matrix is not None:
                for n in range(int(matrix.indptr_I1[item]), int(matrix.indptr_I1[item + 1])):
                    c[int(matrix.indices_N[n])] += scoring.query_decay**age * float(matrix.weights_N[n])
        for i in range(item_count):
            score[i] += weight * float(np.log(1 + scoring.scale * c[i]))
    total = sum(scoring.query_decay**age for age, _ in recent)
    for i in range(item_count):
        repeated = sum(scoring.query_decay**age for age, item in recent if item == i)
        score[i] += scoring.repeat * float(np.log(1 + scoring.scale * repeated))
        if companion.attribute_queries_IR is not None and companion.attribute_keys_IR is not None:
            for age, item in recent:
                resemblance = (
                    companion.attribute_queries_IR[item].astype(np.float64) @ companion.attribute_keys_IR[i]
                )
                score[i] += scoring.query_decay**age / total * float(resemblance)
    return np.array(score)
