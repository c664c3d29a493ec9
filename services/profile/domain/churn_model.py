"""Who will not buy again: a model that must beat the statistical reference, or leaves the place to it.

Trained on rolling origins: days in the past, each with what was known then and with what came after. The
model is the mean (in log-odds) of a logistic regression and boosted trees, calibrated together with
BG/NBD on days that neither was fitted to (J. Platt, 1999).

    training days  |  calibration day  |  test day, what came after it is used for the verdict alone
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.optimize import brentq, minimize
from scipy.special import expit

from services.profile.domain.boosted_trees import BoostedTrees, BoostingParameters
from services.profile.domain.churn_features import (
    COLUMN,
    DAY_US,
    ChurnExamples,
    churn_examples,
    no_purchase,
    purchase_counts,
)
from services.profile.domain.classification_quality import Quality
from services.profile.domain.logistic_regression import LogisticRegression
from services.profile.domain.purchase_counts import BgNbd, PurchaseCounts
from services.profile.domain.purchase_log import Bool, Float, PurchaseLog
from services.profile.domain.purchase_values import GammaGamma

MAX_ORIGINS = 12
ORIGIN_STEP_DAYS = 14
LEAST_HISTORY_DAYS = 30
LEAST_EXAMPLES = 200
LEAST_OF_EACH_OUTCOME = 30
# Newer days resemble the days ahead more.
ORIGIN_HALF_LIFE_DAYS = 45.0
RIDGE = 30.0
MOST_CALIBRATION_ERROR = 0.15
# A season doubles or halves the odds of the whole shop; what is further off is the reference.
MOST_LEVEL_SHIFT = float(np.log(2.0))

BOOSTING = BoostingParameters()


class ChurnKind(enum.IntEnum):
    """The numbers are the contract's `ChurnModelKind`."""

    BG_NBD = 1
    BOOSTED_TREES = 2


class NotEnoughHistory(ValueError):
    """What there is does not suffice to train on; the message says what is missing."""


@dataclass(frozen=True, slots=True)
class Ensemble:
    """A logistic regression and boosted trees, and how their mean and the reference become a probability.

    Attributes:
        calibration: (bias, slope of the mean, slope of the reference) in log-odds; slopes >= 0.
    """

    logistic: LogisticRegression
    trees: BoostedTrees
    calibration: tuple[float, float, float]

    def raw_log_odds(self, feature_KF: Float) -> Float:
        """Returns the mean of both log-odds, (K,), not calibrated."""
        return 0.5 * (self.logistic.log_odds(feature_KF) + self.trees.log_odds(feature_KF))

    def probabilities(self, feature_KF: Float) -> Float:
        """Returns the probability of no purchase, (K,), in (0, 1), of everybody at one moment.

        Who is likelier to leave comes from the ensemble, how many leave from the reference: a season shifts the
        whole shop, and the days that the calibration was fitted to were of another one.
        """
        bias, own, reference = self.calibration
        reference_K = feature_KF[:, COLUMN["reference_log_odds"]]
        score_K = bias + own * self.raw_log_odds(feature_KF) + reference * reference_K
        return expit(score_K + _level_shift(score_K, reference_K))

    def contributions(self, feature_KF: Float) -> Float:
        """Returns how much each feature moves the calibrated log-odds from the usual, (K, F)."""
        _, own, reference = self.calibration
        moved = 0.5 * own * (self.logistic.contributions(feature_KF) + self.trees.contributions(feature_KF))
        column = COLUMN["reference_log_odds"]
        usual = float(np.median(feature_KF[:, column])) if len(feature_KF) else 0.0
        moved[:, column] += reference * (feature_KF[:, column] - usual)
        return moved


def _level_shift(score_K: Float, reference_K: Float) -> float:
    """Returns what to add to log-odds for their mean probability to be that of other log-odds, as far as may be."""
    if not len(score_K):
        return 0.0
    level = float(expit(reference_K).mean())

    def excess(shift: float) -> float:
        return float(expit(score_K + shift).mean()) - level

    most = MOST_LEVEL_SHIFT
    if excess(-most) >= 0 or excess(most) <= 0:
        return -most if excess(-most) >= 0 else most
    return float(brentq(excess, -most, most, xtol=1e-9))


@dataclass(frozen=True, slots=True)
class ChurnModel:
    """What serves.

    Attributes:
        horizon_days: the days that probabilities speak of.
        kind: whether the ensemble serves, or the reference.
        ensemble: None where there was too little to train on.
        values: None where no purchase has a value.
        quality, reference_quality: on the test day; None where there was none.
        trained_until_us: nothing later was seen.
    """

    horizon_days: int
    kind: ChurnKind
    reference: BgNbd
    values: GammaGamma | None
    ensemble: Ensemble | None
    quality: Quality | None
    reference_quality: Quality | None
    trained_until_us: int

    def probabilities(self, examples: ChurnExamples) -> Float:
        """Returns the probability of no purchase within the horizon, (K,)."""
        if self.kind is ChurnKind.BOOSTED_TREES and self.ensemble is not None:
            return self.ensemble.probabilities(examples.feature_KF)
        return self.reference.no_purchase_probabilities(examples.counts, float(self.horizon_days))

    def contributions(self, examples: ChurnExamples) -> Float:
        """Returns how much each feature adds to the log-odds of leaving, (K, F)."""
        if self.kind is ChurnKind.BOOSTED_TREES and self.ensemble is not None:
            return self.ensemble.contributions(examples.feature_KF)
        moved = np.zeros(examples.feature_KF.shape)
        column = COLUMN["reference_log_odds"]
        if len(examples):
            values = examples.feature_KF[:, column]
            moved[:, column] = values - np.median(values)
        return moved


@dataclass(frozen=True, slots=True)
class Labelled:
    """Shoppers on one past day, and whether they stayed away thereafter."""

    examples: ChurnExamples
    label_K: Bool
    reference: BgNbd
    origin_us: int


def fit_reference(log: PurchaseLog, now_us: int, start: BgNbd | None = None) -> BgNbd:
    """Returns BG/NBD fitted to what had happened before a moment; raises NotEnoughHistory for nothing."""
    _, counts = purchase_counts(log.before(now_us).orders, now_us)
    if not len(counts):
        raise NotEnoughHistory("nobody has bought anything")
    return BgNbd.fit(counts, start=start)


def fit_values(log: PurchaseLog) -> GammaGamma | None:
    """Returns gamma-gamma fitted to the worth of orders, or None where none has a worth."""
    _, x_K, m_K = order_values(log)
    try:
        return GammaGamma.fit(x_K, m_K)
    except ValueError:
        return None


def order_values(log: PurchaseLog) -> tuple[Float, Float, Float]:
    """Returns by shopper (U,): orders of a worth as bool-like, their number x, and their mean m."""
    orders = log.orders
    worth = orders.amount_O > 0
    x_U = np.bincount(orders.user_O[worth], minlength=log.user_count).astype(np.float64)
    total_U = np.bincount(orders.user_O[worth], orders.amount_O[worth], log.user_count)
    return (x_U > 0).astype(np.float64), x_U, total_U / np.maximum(x_U, 1.0)


class Trainer:
    """Trains on one log. Days that several models share are computed once.

    Args:
        origins: most days in the past to learn from.
        seed: of the rows and features that trees are grown on.
    """

    def __init__(
        self, log: PurchaseLog, horizon_days: int, origins: int = MAX_ORIGINS, seed: int = 0
    ) -> None:
        self._log = log
        self._horizon_days = horizon_days
        self._seed = seed
        self._origins = origins
        self._start: BgNbd | None = None
        self._first_us = int(log.time_us_N.min()) if len(log) else 0
        self._labelled = lru_cache(maxsize=4 * MAX_ORIGINS)(self._label)

    def train(self, now_us: int) -> ChurnModel:
        """Returns the model to serve from `now_us` on, and how good its like was on the test day.

        Raises:
            NotEnoughHistory: not even the reference can be fitted.
        """
        quality, reference_quality = self.evaluate(now_us - self._horizon_us)
        ensemble = None
        if quality is not None:
            ensemble = self.fit(now_us)
        better = (
            ensemble is not None
            and quality is not None
            and reference_quality is not None
            and not objections(quality, reference_quality)
        )
        return ChurnModel(
            self._horizon_days,
            ChurnKind.BOOSTED_TREES if better else ChurnKind.BG_NBD,
            fit_reference(self._log, now_us),
            fit_values(self._log.before(now_us)),
            ensemble,
            quality,
            reference_quality,
            now_us,
        )

    def evaluate(self, test_us: int) -> tuple[Quality | None, Quality | None]:
        """Returns how good a model trained before a day was on it, and how good the reference."""
        test = self._usable(test_us)
        if test is None:
            return None, None
        reference = test.reference.no_purchase_probabilities(test.examples.counts, float(self._horizon_days))
        reference_quality = Quality.of(test.label_K, reference)
        ensemble = self.fit(test_us)
        if ensemble is None:
            return None, reference_quality
        return Quality.of(test.label_K, ensemble.probabilities(test.examples.feature_KF)), reference_quality

    def fit(self, now_us: int) -> Ensemble | None:
        """Returns an ensemble that has seen nothing from `now_us` on; None where that is too little."""
        newest_us = now_us - self._horizon_us
        newest = self._usable(newest_us)
        days = self._days(newest_us)
        if newest is None or not days:
            return None
        earlier = self._days(newest_us - self._horizon_us)
        if earlier:
            logistic, trees = self._fit_base(earlier)
            held_out = newest.examples.feature_KF
            label_K = newest.label_K
        else:
            # Too young a shop for a day of its own: one half of the shoppers calibrates the other's model.
            half = newest.examples.user_K % 2 == 0
            logistic, trees = self._fit_base([_subset(newest, half)])
            held_out = newest.examples.feature_KF[~half]
            label_K = newest.label_K[~half]
        calibration = _calibrate(Ensemble(logistic, trees, (0.0, 1.0, 0.0)), held_out, label_K)
        return Ensemble(*self._fit_base(days), calibration)

    @property
    def _horizon_us(self) -> int:
        return self._horizon_days * DAY_US

    def _days(self, newest_us: int) -> list[Labelled]:
        days = [self._usable(newest_us - k * ORIGIN_STEP_DAYS * DAY_US) for k in range(self._origins)]
        return [day for day in days if day is not None]

    def _usable(self, origin_us: int) -> Labelled | None:
        if origin_us - self._first_us < LEAST_HISTORY_DAYS * DAY_US:
            return None
        day = self._labelled(origin_us)
        leaving = int(day.label_K.sum())
        if (
            len(day.label_K) < LEAST_EXAMPLES
            or min(leaving, len(day.label_K) - leaving) < LEAST_OF_EACH_OUTCOME
        ):
            return None
        return day

    def _label(self, origin_us: int) -> Labelled:
        # Days nearby have parameters nearby.
        reference = self._start = fit_reference(self._log, origin_us, self._start)
        examples = churn_examples(self._log, origin_us, float(self._horizon_days), reference)
        label_K = no_purchase(self._log.orders, examples.user_K, origin_us, float(self._horizon_days))
        return Labelled(examples, label_K, reference, origin_us)

    def _fit_base(self, days: list[Labelled]) -> tuple[LogisticRegression, BoostedTrees]:
        newest_us = max(day.origin_us for day in days)
        feature_KF = np.concatenate([day.examples.feature_KF for day in days])
        label_K = np.concatenate([day.label_K for day in days]).astype(np.float64)
        # A shopper occurs on many days: half a weight, lest the ridge think it knows twice as much.
        weight_K = np.concatenate(
            [
                np.full(
                    len(day.label_K),
                    0.5 * 2.0 ** (-(newest_us - day.origin_us) / DAY_US / ORIGIN_HALF_LIFE_DAYS),
                )
                for day in days
            ]
        )
        rng = np.random.default_rng(self._seed)
        return (
            LogisticRegression.fit(feature_KF, label_K, weight_K, RIDGE),
            BoostedTrees.fit(feature_KF, label_K, weight_K, BOOSTING, rng),
        )


def objections(quality: Quality, reference: Quality) -> list[str]:
    """Returns why a model may not take the reference's place; empty when it may."""
    reasons = []
    if quality.auc <= reference.auc:
        reasons.append(f"AUC {quality.auc:.4f} is not above the reference's {reference.auc:.4f}")
    if quality.log_loss >= reference.log_loss:
        reasons.append(
            f"logarithmic loss {quality.log_loss:.4f} is not below the reference's {reference.log_loss:.4f}"
        )
    if quality.expected_calibration_error > MOST_CALIBRATION_ERROR:
        reasons.append(
            f"calibration error {quality.expected_calibration_error:.3f} is above {MOST_CALIBRATION_ERROR}"
        )
    return reasons


def _subset(day: Labelled, chosen_K: Bool) -> Labelled:
    counts = day.examples.counts
    examples = ChurnExamples(
        day.examples.user_K[chosen_K],
        day.examples.feature_KF[chosen_K],
        PurchaseCounts(counts.x_N[chosen_K], counts.t_x_N[chosen_K], counts.T_N[chosen_K]),
    )
    return Labelled(examples, day.label_K[chosen_K], day.reference, day.origin_us)


def _calibrate(ensemble: Ensemble, feature_KF: Float, label_K: Bool) -> tuple[float, float, float]:
    """Returns the Platt scaling of two scores; slopes that are never negative keep the order of each."""
    own_K = ensemble.raw_log_odds(feature_KF)
    reference_K = feature_KF[:, COLUMN["reference_log_odds"]]
    label = label_K.astype(np.float64)

    def loss(parameters: Float) -> tuple[float, Float]:
        bias, own, reference = parameters
        score_K = bias + own * own_K + reference * reference_K
        value = float((np.logaddexp(0.0, score_K) - label * score_K).mean())
        slope_K = (expit(score_K) - label) / len(label)
        gradient = np.array([slope_K.sum(), slope_K @ own_K, slope_K @ reference_K])
        # Towards what is believed without evidence: the model as it stands.
        prior = parameters - np.array([0.0, 0.75, 0.25])
        return value + 1e-3 * float(prior @ prior), gradient + 2e-3 * prior

    result = minimize(
        loss,
        np.array([0.0, 0.75, 0.25]),
        jac=True,
        method="L-BFGS-B",
        bounds=[(-4.0, 4.0), (0.0, 4.0), (0.0, 4.0)],
    )
    bias, own, reference = result.x.tolist()
    return bias, own, reference
