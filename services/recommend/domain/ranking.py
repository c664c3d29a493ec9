"""Order: the best by score, and likeness paid for.

Every function breaks ties by row, so that one request has one answer.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int32]


_BLOCKS = 16


def top_rows(
    score_R: Float32, eligible_R: npt.NDArray[np.bool_], count: int, rows_C: Rows | None = None
) -> Rows:
    """Returns the rows of the `count` highest scores among the eligible, best first, int32.

    Rows with a score of -inf have none and are never returned. Ties: the lower row first.

    Args:
        rows_C: the only rows that have a score, ascending; None: look at all.
    """
    if rows_C is None:
        masked_R = np.where(eligible_R, score_R, np.float32(-np.inf))
        rows = (masked_R >= _lower_bound(masked_R, count)).nonzero()[0]
        scores = masked_R[rows]
    else:
        rows = rows_C[eligible_R[rows_C]].astype(np.intp)
        scores = score_R[rows]
    if count < len(rows):
        threshold = np.partition(scores, len(rows) - count)[len(rows) - count]
        near = scores >= threshold
        rows, scores = rows[near], scores[near]
    # Stable: rows ascend, so of equal scores the lower row stays first.
    order = (-scores).argsort(kind="stable")[:count]
    if len(order) and scores[order[-1]] == -np.inf:
        order = order[scores[order] > -np.inf]
    return rows[order].astype(np.int32)


def _lower_bound(score_R: Float32, count: int) -> np.float32:
    """Returns a value that at least `count` scores reach, or -inf.

    The count-th largest of the maxima of disjoint blocks is one, and costs a sixteenth of a partition.
    """
    width = len(score_R) // _BLOCKS
    if width <= count:
        return np.float32(-np.inf)
    maxima_W = score_R[: _BLOCKS * width].reshape(_BLOCKS, width).max(axis=0)
    return np.float32(np.partition(maxima_W, width - count)[width - count])


def maximal_marginal_relevance(
    relevance_C: Float32, unit_vectors_CD: Float32, strength: float, count: int
) -> npt.NDArray[np.int64]:
    """Returns the places of `count` candidates in the order of maximal marginal relevance.

    Carbonell and Goldstein (1998): each time the candidate with the highest
    (1 - strength) * relevance - strength * max cosine to those already taken.
    Relevance is first scaled to [0, 1] over the candidates. Ties: the earlier candidate.

    Args:
        relevance_C: scores, best first.
        unit_vectors_CD: vectors of length 1, or 0 where a candidate has none.
        strength: in [0, 1]; 0 keeps the order.
        count: at most C.
    """
    candidate_count = len(relevance_C)
    count = min(count, candidate_count)
    if strength <= 0 or count <= 1:
        return np.arange(count)
    low, high = float(relevance_C.min()), float(relevance_C.max())
    scaled_C = (relevance_C - low) / (high - low) if high > low else np.ones_like(relevance_C)
    gain_C = np.float32(1 - strength) * scaled_C
    # Row t: what is left of each candidate's gain beside t alone; nothing of its own, as it is taken.
    left_CC = gain_C - (unit_vectors_CD @ unit_vectors_CD.T) * np.float32(strength)
    left_CC.ravel()[:: candidate_count + 1] = -np.inf
    order = [int(gain_C.argmax())]
    net_C = left_CC[order[0]].copy()
    while len(order) < count:
        best = int(net_C.argmax())
        order.append(best)
        np.minimum(net_C, left_CC[best], out=net_C)
    return np.array(order, dtype=np.int64)


def determinantal_point_process(
    relevance_C: Float32, unit_vectors_CD: Float32, strength: float, count: int
) -> npt.NDArray[np.int64]:
    """Returns the places of `count` candidates, greedily the likeliest of a determinantal point process.

    Chen, Zhang and Zhou (2018), their fast greedy algorithm: each time the candidate that adds most to
    log det of L over those taken, with L_ij = q_i q_j (1 + cosine_ij) / 2 for i other than j, q_i^2 for i = j,
    and q_i = exp((1 - strength) / (2 strength) * relevance_i). Relevance is first scaled to [0, 1]. By a
    Cholesky factor that grows by a row each time. Arguments as `maximal_marginal_relevance`.
    """
    candidate_count = len(relevance_C)
    count = min(count, candidate_count)
    if strength <= 0 or count <= 1:
        return np.arange(count)
    kernel_CC = dpp_kernel(relevance_C, unit_vectors_CD, strength)
    left_C = kernel_CC.diagonal().copy()
    factor_KC = np.zeros((count, candidate_count))
    order: list[int] = []
    for k in range(count):
        best = int(left_C.argmax())
        order.append(best)
        root = np.sqrt(max(left_C[best], 1e-12))
        factor_KC[k] = (kernel_CC[best] - factor_KC[:k, best] @ factor_KC[:k]) / root
        left_C -= factor_KC[k] ** 2
        left_C[order] = -np.inf
    return np.array(order, dtype=np.int64)


def dpp_kernel(relevance_C: Float32, unit_vectors_CD: Float32, strength: float) -> npt.NDArray[np.float64]:
    """Returns L of `determinantal_point_process`, (C, C), float64, for a strength above 0."""
    low, high = float(relevance_C.min()), float(relevance_C.max())
    scaled_C = (
        (relevance_C.astype(np.float64) - low) / (high - low) if high > low else np.ones(len(relevance_C))
    )
    quality_C = np.exp((1 - strength) / (2 * strength) * (scaled_C - 1))
    likeness_CC = (1 + (unit_vectors_CD @ unit_vectors_CD.T).astype(np.float64)) / 2
    np.fill_diagonal(likeness_CC, 1.0)
    return likeness_CC * quality_C[:, None] * quality_C


def naive_determinantal_point_process(
    relevance_C: Float32, unit_vectors_CD: Float32, strength: float, count: int
) -> list[int]:
    """The slow, readable twin of `determinantal_point_process`: a determinant for every candidate of every step."""
    kernel_CC = dpp_kernel(relevance_C, unit_vectors_CD, strength)
    taken: list[int] = []
    while len(taken) < min(count, len(kernel_CC)):
        rest = [c for c in range(len(kernel_CC)) if c not in taken]
        determinants = [np.linalg.det(kernel_CC[np.ix_([*taken, c], [*taken, c])]) for c in rest]
        taken.append(rest[int(np.argmax(determinants))])
    return taken


def naive_maximal_marginal_relevance(
    relevance_C: Float32, unit_vectors_CD: Float32, strength: float, count: int
) -> list[int]:
    """The slow, readable twin of `maximal_marginal_relevance`."""
    low, high = min(relevance_C.tolist()), max(relevance_C.tolist())
    scaled = [(r - low) / (high - low) if high > low else 1.0 for r in relevance_C.tolist()]
    taken: list[int] = []
    while len(taken) < min(count, len(scaled)):
        best, best_gain = -1, -np.inf
        for c in range(len(scaled)):
            if c in taken:
                continue
            likeness = max((float(unit_vectors_CD[c] @ unit_vectors_CD[t]) for t in taken), default=0.0)
            gain = (1 - strength) * scaled[c] - strength * likeness
            if gain > best_gain:
                best, best_gain = c, gain
        taken.append(best)
    return taken
