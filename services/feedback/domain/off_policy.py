"""What another policy would have earned on past traffic, from the propensities logged with it.

Notation: N impressions of A distinct items by P people. Impression i showed item a_i at position k_i, which the
policy in service did with propensity p_i and the target policy would have done with probability t_i; it earned
r_i. Items are taken to earn by themselves and by their position, not by their neighbours: the item-position
model of Li, Abbasi-Yadkori, Kveton, Muthukrishnan, Vinay and Wen ("Offline evaluation of ranking policies with
click models", KDD 2018). The value of a policy is what an impression earns on average.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from services.feedback.domain.clustered import ClusteredSums
from services.feedback.domain.metrics import Interval
from shared.errors import FailedPrecondition

REQUIRED_EFFECTIVE_SAMPLE_SIZE = 100.0
REQUIRED_SUPPORTED_FRACTION = 0.9
REQUIRED_PEOPLE = 30
_FOLDS = 2
# How many average impressions an item is given beforehand, so that one lucky click is no click rate.
_PRIOR_IMPRESSIONS = 10.0

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class LoggedImpressions:
    """Impressions with their propensities and what they earned.

    Attributes:
        items: ids of the A items shown.
        item_N: index of the item, in [0, A).
        position_N: from 1.
        propensity_N: in (0, 1].
        reward_N: at least 0.
        person_N: which person, in [0, P).
        recommendation_N: the 8 bytes of the recommendation's id, big-endian, signed.
        currency_code: of the reward; empty unless it is money.
    """

    items: Sequence[str]
    item_N: Indices
    position_N: Indices
    propensity_N: Floats
    reward_N: Floats
    person_N: Indices
    recommendation_N: Indices
    currency_code: str = ""


class TargetPolicy(Protocol):
    """The policy to be valued."""

    def over_items(self, items: Sequence[str]) -> Floats | None:
        """Returns the probability of each item at every position, shape (A,), or None if it depends on more."""
        ...

    def of_impressions(self, impressions: LoggedImpressions) -> Floats:
        """Returns t, the probability of what was shown where it was shown, shape (N,)."""
        ...


@dataclass(frozen=True, slots=True)
class SoftmaxPolicy:
    """Shows items with the softmax of score / temperature; items without a score have 0. No scores: uniform."""

    score_of: Mapping[str, float]
    temperature: float = 1.0

    def over_items(self, items: Sequence[str]) -> Floats:
        """Returns the softmax over the items, shape (A,)."""
        score_A = np.array([self.score_of.get(item, 0.0) for item in items], np.float64)
        if not len(score_A):
            return score_A
        with np.errstate(over="ignore"):
            weight_A = np.exp((score_A - score_A.max()) / self.temperature)
        return np.asarray(weight_A / weight_A.sum(), np.float64)

    def of_impressions(self, impressions: LoggedImpressions) -> Floats:
        """Returns t, shape (N,)."""
        return self.over_items(impressions.items)[impressions.item_N]


@dataclass(frozen=True, slots=True)
class GivenPolicy:
    """Shows (recommendation, item) with a given probability; pairs without one have 0."""

    probability_of: Mapping[tuple[int, str], float]

    def over_items(self, items: Sequence[str]) -> None:
        """Returns None: what it would show otherwise is not known."""
        return

    def of_impressions(self, impressions: LoggedImpressions) -> Floats:
        """Returns t, shape (N,)."""
        pairs = zip(impressions.recommendation_N.tolist(), impressions.item_N.tolist(), strict=True)
        probability_of, items = self.probability_of, impressions.items
        return np.array(
            [probability_of.get((recommendation, items[item]), 0.0) for recommendation, item in pairs],
            np.float64,
        )


@dataclass(frozen=True, slots=True)
class PolicyEstimate:
    """What the target policy would have earned for an impression; intervals are over people.

    Attributes:
        inverse_propensity, self_normalised, doubly_robust: the estimates.
        logged: what the policy in service earned.
        effective_sample_size: (sum w)^2 / sum w^2.
        clipped_fraction: share of the weights that were clipped.
        supported_fraction: mean weight before clipping.
    """

    inverse_propensity: Interval
    self_normalised: Interval
    doubly_robust: Interval
    logged: Interval
    effective_sample_size: float
    impression_count: int
    clipped_fraction: float
    supported_fraction: float


def estimate_policy_value(
    impressions: LoggedImpressions,
    policy: TargetPolicy,
    weight_clip: float,
    confidence_level: float,
) -> PolicyEstimate:
    """Returns three estimates of the value of a policy.

    With w_i = min(t_i / p_i, weight_clip):
    inverse propensity scoring, mean(w r) (Horvitz and Thompson, 1952);
    self-normalised, sum(w r) / sum(w) (Swaminathan and Joachims, NIPS 2015);
    doubly robust, mean(q_bar + w (r - q)) (Dudik, Langford and Li, ICML 2011), with q from `reward_model` and
    q_bar its mean under the target policy. Fitted on other people than those it is applied to, it adds no bias.

    Raises:
        FailedPrecondition: OVERLAP_TOO_THIN. The target policy mostly does what the policy in service never did,
            or the weights rest on a few impressions.
    """
    target_N = policy.of_impressions(impressions)
    weight_N = target_N / impressions.propensity_N
    w_N = np.minimum(weight_N, weight_clip)
    _refuse_thin_overlap(impressions, weight_N, w_N, confidence_level)
    q_N, q_bar_N = reward_model(impressions, policy.over_items(impressions.items))
    r_N, one_N = impressions.reward_N, np.ones_like(w_N)
    return PolicyEstimate(
        _ratio(impressions, w_N * r_N, one_N, confidence_level),
        _ratio(impressions, w_N * r_N, w_N, confidence_level),
        _ratio(impressions, q_bar_N + w_N * (r_N - q_N), one_N, confidence_level),
        _ratio(impressions, r_N, one_N, confidence_level),
        effective_sample_size(w_N),
        len(w_N),
        float(np.mean(weight_N > weight_clip)),
        float(np.mean(weight_N)),
    )


def effective_sample_size(w_N: Floats) -> float:
    """Returns (sum w)^2 / sum w^2 (Kish, 1965), at most N; 0 where every weight is 0."""
    squares = float(w_N @ w_N)
    return float(w_N.sum()) ** 2 / squares if squares > 0 else 0.0


def reward_model(impressions: LoggedImpressions, target_A: Floats | None) -> tuple[Floats, Floats]:
    """Returns q, the reward expected of each impression, and q_bar, its mean under the target policy; shape (N,).

    An item earns lambda_a f_k at position k: f_k is the mean reward at the position over that of all, lambda_a
    the item's mean corrected for where it stood, shrunk towards the mean of all. Where the target policy is not
    known over all items, lambda is the mean of all: then q_bar is q, whatever the policy would show.

    Each half of the people gets the model of the other half.
    """
    q_N, q_bar_N = np.zeros(len(impressions.item_N)), np.zeros(len(impressions.item_N))
    fold_N = impressions.person_N % _FOLDS
    for fold in range(_FOLDS):
        fitted, applied = fold_N != fold, fold_N == fold
        position_applied = impressions.position_N[applied]
        mean, factor_K = _position_factors(
            impressions.position_N[fitted], impressions.reward_N[fitted], int(impressions.position_N.max())
        )
        f = factor_K[position_applied]
        if target_A is None:
            q_N[applied] = q_bar_N[applied] = mean * f
            continue
        item_fitted = impressions.item_N[fitted]
        a = len(impressions.items)
        chances_A = np.bincount(item_fitted, factor_K[impressions.position_N[fitted]], a)
        earned_A = np.bincount(item_fitted, impressions.reward_N[fitted], a)
        lambda_A = (earned_A + _PRIOR_IMPRESSIONS * mean) / (chances_A + _PRIOR_IMPRESSIONS)
        q_N[applied] = lambda_A[impressions.item_N[applied]] * f
        q_bar_N[applied] = float(target_A @ lambda_A) * f
    return q_N, q_bar_N


def _position_factors(position_M: Indices, reward_M: Floats, last: int) -> tuple[float, Floats]:
    mean = float(reward_M.mean()) if len(reward_M) else 0.0
    shown_K = np.bincount(position_M, minlength=last + 1)
    earned_K = np.bincount(position_M, reward_M, last + 1)
    if mean == 0:
        return mean, np.ones(last + 1)
    return mean, (earned_K / mean + _PRIOR_IMPRESSIONS) / (shown_K + _PRIOR_IMPRESSIONS)


def _ratio(impressions: LoggedImpressions, x_N: Floats, n_N: Floats, confidence_level: float) -> Interval:
    x_P = np.bincount(impressions.person_N, x_N).astype(np.float64)
    n_P = np.bincount(impressions.person_N, n_N).astype(np.float64)
    interval = ClusteredSums.of(x_P, n_P).interval(confidence_level)
    assert interval is not None, "REQUIRED_PEOPLE are there"
    return interval


def _refuse_thin_overlap(
    impressions: LoggedImpressions, weight_N: Floats, w_N: Floats, confidence_level: float
) -> None:
    people = len(np.unique(impressions.person_N[w_N > 0]))
    size = effective_sample_size(w_N)
    supported = float(weight_N.mean()) if len(weight_N) else 0.0
    problem = ""
    if people < REQUIRED_PEOPLE:
        problem = f"Only {people} people saw what the target policy shows; {REQUIRED_PEOPLE} are needed."
    elif size < REQUIRED_EFFECTIVE_SAMPLE_SIZE:
        problem = (
            f"The weights are worth {size:.1f} impressions; {REQUIRED_EFFECTIVE_SAMPLE_SIZE:.0f} are needed. "
            "The target policy rarely does what was done."
        )
    elif (
        _ratio(impressions, weight_N, np.ones_like(weight_N), confidence_level).upper
        < REQUIRED_SUPPORTED_FRACTION
    ):
        # Weights average 1 where every choice of the target policy had a chance; what is missing was never tried.
        problem = (
            f"Only {supported:.0%} of the target policy's choices were ever tried; "
            f"{REQUIRED_SUPPORTED_FRACTION:.0%} are needed. The policy in service explores too little."
        )
    if problem:
        raise FailedPrecondition(
            "OVERLAP_TOO_THIN",
            f"{problem} Take a longer range, explore more, or value a policy nearer to the one in service.",
            {
                "effectiveSampleSize": f"{size:.6g}",
                "requiredEffectiveSampleSize": f"{REQUIRED_EFFECTIVE_SAMPLE_SIZE:g}",
                "supportedFraction": f"{supported:.6g}",
                "requiredSupportedFraction": f"{REQUIRED_SUPPORTED_FRACTION:g}",
                "impressionCount": str(len(weight_N)),
                "userCount": str(people),
                "requiredUserCount": str(REQUIRED_PEOPLE),
            },
        )
