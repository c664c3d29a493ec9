"""How good a ranker is: by impression, by calibration, and by what its order would have earned. Pure.

Order is valued under the position-based click model (Li et al., 2018): an item that earned r at position k would have
earned r theta(k') / theta(k) at k', with theta the chance that a place is looked at; the ratio is clipped.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize

from services.trainer.ranker.examples import Examples
from shared.bundle.ranker import MAX_POSITION
from shared.ranking_metrics import Interval, bootstrap_intervals

Float = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]

MAX_RATIO = 10.0
_BINS = 15


def auc(score_N: npt.NDArray[np.floating], label_N: npt.NDArray[np.bool_]) -> float:
    """Returns the chance that a positive has a higher score than a negative, ties half; 0.5 where one is missing."""
    positives = int(label_N.sum())
    negatives = len(label_N) - positives
    if not positives or not negatives:
        return 0.5
    _, inverse_N, counts = np.unique(score_N, return_inverse=True, return_counts=True)
    rank_N = (np.cumsum(counts) - (counts - 1) / 2)[inverse_N]
    return float((rank_N[label_N].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def log_loss(p_N: npt.NDArray[np.floating], label_N: npt.NDArray[np.bool_]) -> float:
    """Returns the mean negative log-likelihood."""
    clipped_N = np.clip(p_N.astype(np.float64), 1e-7, 1 - 1e-7)
    return float(-np.where(label_N, np.log(clipped_N), np.log1p(-clipped_N)).mean())


def reliability(
    p_N: npt.NDArray[np.floating], label_N: npt.NDArray[np.bool_], bins: int = _BINS
) -> tuple[Float, Float, Int64]:
    """Returns mean prediction, share of positives and number of bins of equally many impressions."""
    order = np.argsort(p_N, kind="stable")
    parts = [part for part in np.array_split(order, bins) if len(part)]
    return (
        np.array([p_N[part].mean(dtype=np.float64) for part in parts]),
        np.array([label_N[part].mean() for part in parts]),
        np.array([len(part) for part in parts]),
    )


def expected_calibration_error(p_N: npt.NDArray[np.floating], label_N: npt.NDArray[np.bool_]) -> float:
    """Returns the mean distance of prediction and share of positives, over bins of equally many impressions."""
    if not len(p_N):
        return 0.0
    predicted, observed, count = reliability(p_N, label_N)
    return float(np.abs(predicted - observed) @ count / count.sum())


def platt(logit_N: Float, label_N: npt.NDArray[np.bool_]) -> tuple[float, float]:
    """Returns slope and intercept of the logistic regression on one logit (Platt, 1999, with his smoothed targets).

    The slope stays above 0: a calibration never turns the order round.
    """
    positives = float(label_N.sum())
    target_N = np.where(label_N, (positives + 1) / (positives + 2), 1 / (len(label_N) - positives + 2))

    def loss(parameters: Float) -> tuple[float, Float]:
        slope = np.exp(parameters[0])
        z_N = slope * logit_N + parameters[1]
        p_N = 1 / (1 + np.exp(-np.clip(z_N, -40, 40)))
        value = np.mean(np.logaddexp(0, z_N) - target_N * z_N) + 1e-4 * parameters[0] ** 2
        error_N = p_N - target_N
        return float(value), np.array(
            [np.mean(error_N * slope * logit_N) + 2e-4 * parameters[0], np.mean(error_N)]
        )

    found = minimize(loss, np.zeros(2), jac=True, method="L-BFGS-B", bounds=[(-3, 3), (-10, 10)])
    return float(np.exp(found.x[0])), float(found.x[1])


def examination(position_logits_K: npt.NDArray[np.floating]) -> Float:
    """Returns theta of each position, (K,), 1 for the first, at most 1, never rising with the position."""
    theta_K = np.exp(position_logits_K.astype(np.float64))
    return np.minimum.accumulate(np.minimum(theta_K / theta_K[0], 1.0))


def values_of_order(
    score_N: npt.NDArray[np.floating], reward_N: Float, examples: Examples, theta_K: Float
) -> Float:
    """Returns what each page would have earned in the order of a score, (P,), pages ascending.

    Args:
        reward_N: what each impression earned where it stood.
        theta_K: chance that each place is looked at.
    """
    _, place_N = np.unique(examples.page_N, return_inverse=True)
    order = np.lexsort((-score_N, place_N))
    sorted_place = place_N[order]
    starts = np.flatnonzero(np.diff(sorted_place, prepend=-1))
    counted = np.arange(len(order)) - np.repeat(starts, np.diff(np.append(starts, len(order))))
    # The page keeps its places: the best item takes the first that was taken, whatever others stood between.
    by_position = np.lexsort((examples.position_N, place_N))
    new_position_N = np.empty(len(order), np.int64)
    new_position_N[order] = examples.position_N[by_position][starts[sorted_place] + counted]
    last = MAX_POSITION - 1
    old_N = theta_K[np.minimum(examples.position_N - 1, last)]
    new_N = theta_K[np.minimum(new_position_N - 1, last)]
    earned_N = reward_N * examples.weight_N * np.minimum(new_N / old_N, MAX_RATIO)
    return np.asarray(np.bincount(place_N, earned_N), np.float64)


def lead_over(
    value_P: Float, other_P: Float, examples: Examples, seed: int, resamples: int, confidence: float
) -> Interval:
    """Returns the mean lead a page of one order over another, with its interval over people."""
    _, first = np.unique(examples.page_N, return_index=True)
    _, person_P = np.unique(examples.user_N[first], return_inverse=True)
    lead_U = np.bincount(person_P, value_P - other_P)
    pages_U = np.bincount(person_P)
    # Sums over the mean number of pages: people with many pages count for as much as they see.
    return bootstrap_intervals(
        (lead_U / pages_U.mean())[:, None], np.random.default_rng(seed), resamples, confidence
    )[0]


def ndcg_of_order(score_N: npt.NDArray[np.floating], gain_N: Float, page_N: Int64, k: int = 10) -> float:
    """Returns NDCG@k over all pages: what was gained at 1 / log2(1 + rank), over the most that could have been.

    Pages are summed before they are divided: where gains are weighted for where they were made, a page counts for
    its weight, which a mean of quotients would cancel.
    """
    _, place_N = np.unique(page_N, return_inverse=True)

    def dcg(by: npt.NDArray[np.floating]) -> float:
        order = np.lexsort((-by, place_N))
        starts = np.flatnonzero(np.diff(place_N[order], prepend=-1))
        rank = np.arange(len(order)) - np.repeat(starts, np.diff(np.append(starts, len(order))))
        return float(gain_N[order] @ np.where(rank < k, 1 / np.log2(rank + 2), 0.0))

    best = dcg(gain_N)
    return dcg(score_N) / best if best > 0 else 0.0
