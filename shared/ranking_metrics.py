"""Measures of rankings, after Järvelin & Kekäläinen (2002) and the usual practice of the field. Pure.

B = rankings, L = ranked positions, I = items, M = measures, K = cut-off. Position 0 is the top.
Every item of the catalogue is ranked; nothing here samples negatives (Krichene & Rendle, 2020).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Float = npt.NDArray[np.float64]
Bool = npt.NDArray[np.bool_]
Int = npt.NDArray[np.int64]


class Interval(NamedTuple):
    """A mean with the interval that holds it at the stated confidence."""

    value: float
    low: float
    high: float


def rank_of_target(score_BI: npt.NDArray[np.floating], target_B: Int, excluded_BI: Bool | None = None) -> Int:
    """Returns the rank of each target among all items, (B,), 1 for the top.

    Ties keep item order. Items that are `excluded_BI` do not compete, but for the target itself.
    A score that is not a number never beats another.
    """
    rows_B = np.arange(len(target_B))
    target_score_B1 = score_BI[rows_B, target_B][:, None]
    competing_BI = None if excluded_BI is None else ~excluded_BI
    better_BI = score_BI > target_score_B1
    tied_BI = score_BI == target_score_B1
    if competing_BI is not None:
        better_BI &= competing_BI
        tied_BI &= competing_BI
    rank_B = 1 + np.count_nonzero(better_BI, axis=1)
    # Few rankings have a tie beside the target's with itself: only those pay for the order within it.
    some = np.flatnonzero(np.count_nonzero(tied_BI, axis=1) > tied_BI[rows_B, target_B])
    before_SI = np.arange(score_BI.shape[1])[None, :] < target_B[some, None]
    rank_B[some] += np.count_nonzero(tied_BI[some] & before_SI, axis=1)
    return np.asarray(rank_B, np.int64)


def hits_of_rank(rank_B: Int, length: int) -> Bool:
    """Returns hit_BL of rankings with one relevant item each, at 1-based `rank_B`; none where the rank exceeds L."""
    return rank_B[:, None] == np.arange(1, length + 1)[None, :]


def hr_at_k(hit_BL: Bool, k: int) -> Float:
    """Returns HR@k, (B,): 1 where a relevant item is among the first k, else 0."""
    return np.asarray(hit_BL[:, :k].any(axis=1), np.float64)


def recall_at_k(hit_BL: Bool, relevant_B: Int, k: int) -> Float:
    """Returns Recall@k, (B,): the share of the relevant items, `relevant_B` many, in the first k; 0 where none is."""
    return hit_BL[:, :k].sum(axis=1) / np.maximum(relevant_B, 1)


def precision_at_k(hit_BL: Bool, k: int) -> Float:
    """Returns Precision@k, (B,): the share of the first k positions that are relevant."""
    return np.asarray(hit_BL[:, :k].sum(axis=1) / k, np.float64)


def ndcg_at_k(hit_BL: Bool, relevant_B: Int, k: int) -> Float:
    """Returns NDCG@k of binary relevance, (B,), in [0, 1]; 0 where nothing is relevant.

    Gain 1, discount 1 / log2(position + 1), against the ranking with all relevant items on top.
    """
    discount_L = 1.0 / np.log2(np.arange(2, max(k, hit_BL.shape[1]) + 2))
    dcg_B = hit_BL[:, :k] @ discount_L[: min(k, hit_BL.shape[1])]
    ideal_K = np.concatenate([[0.0], np.cumsum(discount_L[:k])])
    ideal_B = ideal_K[np.minimum(relevant_B, k)]
    return np.divide(dcg_B, ideal_B, out=np.zeros(len(hit_BL)), where=ideal_B > 0)


def reciprocal_rank(hit_BL: Bool) -> Float:
    """Returns 1 / position of the first relevant item, (B,); 0 where there is none. Its mean is MRR."""
    first_B = hit_BL.argmax(axis=1)
    return np.where(hit_BL.any(axis=1), 1.0 / (first_B + 1), 0.0)


def coverage_at_k(top_BL: npt.NDArray[np.integer], item_count: int, k: int) -> float:
    """Returns the share of the I items that somebody has among the first k; negative entries are empty places."""
    shown = np.unique(top_BL[:, :k])
    return float((shown >= 0).sum() / item_count) if item_count else 0.0


def bootstrap_intervals(
    value_BM: Float, generator: np.random.Generator, resamples: int = 1000, confidence: float = 0.95
) -> list[Interval]:
    """Returns the mean of each measure over rankings with its percentile bootstrap interval (Efron, 1979).

    All measures share the resamples, so an interval of a difference is paired: pass the difference.

    Args:
        value_BM: one row a ranking, one column a measure; at least one row.
        generator: the only source of chance.
        resamples: rows are drawn anew this often.
        confidence: probability within, in (0, 1).
    """
    count = len(value_BM)
    if count == 0:
        raise ValueError("a mean of no rankings has no interval")
    mean_RM = np.empty((resamples, value_BM.shape[1]))
    chunk = max(1, min(resamples, 2_000_000 // count))
    for first in range(0, resamples, chunk):
        rows = min(chunk, resamples - first)
        drawn_RB = generator.integers(0, count, size=(rows, count))
        drawn_RB += np.arange(rows)[:, None] * count
        weight_RB = np.bincount(drawn_RB.ravel(), minlength=rows * count).reshape(rows, count)
        mean_RM[first : first + rows] = weight_RB @ value_BM / count
    tail = 100 * (1 - confidence) / 2
    low_M, high_M = np.percentile(mean_RM, [tail, 100 - tail], axis=0)
    mean_M = value_BM.mean(axis=0)
    return [
        Interval(float(mean), float(low), float(high))
        for mean, low, high in zip(mean_M, low_M, high_M, strict=True)
    ]
