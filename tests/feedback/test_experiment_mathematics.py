"""What experiments rest on: clustered ratios, always-valid intervals, the check of the split."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.feedback.domain.clustered import ClusteredSums
from services.feedback.domain.experiments import (
    Experiment,
    GuardRail,
    Observation,
    StopCause,
    VariantObservation,
    Verdict,
    judge,
)
from services.feedback.domain.metrics import Metric, z_of
from services.feedback.domain.sample_ratio import (
    chi_squared_survival,
    sample_ratio_p_value,
    sequential_sample_ratio_p_value,
)
from services.feedback.domain.sequential import always_valid_width, difference_interval, mixture_precision
from shared.experiments import VariantShare

# The chi-squared distribution and the check of the split


@pytest.mark.parametrize(
    ("x", "degrees_of_freedom", "probability"),
    [
        # Quantiles of the usual tables (NIST/SEMATECH e-Handbook, 1.3.6.7.4).
        (3.841458820694124, 1, 0.05),
        (6.634896601021213, 1, 0.01),
        (10.827566170662733, 1, 0.001),
        (5.991464547107979, 2, 0.05),
        (9.210340371976182, 2, 0.01),
        (16.918977604620448, 9, 0.05),
        (27.877164871256568, 9, 0.001),
    ],
)
def test_chi_squared_agrees_with_the_tables(x: float, degrees_of_freedom: int, probability: float) -> None:
    assert chi_squared_survival(x, degrees_of_freedom) == pytest.approx(probability, rel=1e-10)


@given(st.floats(0, 200))
def test_chi_squared_agrees_with_its_closed_forms(x: float) -> None:
    assert chi_squared_survival(x, 1) == pytest.approx(math.erfc(math.sqrt(x / 2)), rel=1e-9, abs=1e-300)
    assert chi_squared_survival(x, 2) == pytest.approx(math.exp(-x / 2), rel=1e-9)
    assert chi_squared_survival(x, 4) == pytest.approx(math.exp(-x / 2) * (1 + x / 2), rel=1e-9)


def test_a_split_by_hand() -> None:
    # 821,588 and 815,482 people at 50:50 (Fabijan et al., 2019): broken, though it looks even.
    assert sample_ratio_p_value([821_588, 815_482], [1, 1]) == pytest.approx(1.8e-6, rel=0.05)
    assert sample_ratio_p_value([821_588, 815_482], [3, 3]) < 0.001
    # (60 - 50)^2 / 50 + (40 - 50)^2 / 50 = 4.
    assert sample_ratio_p_value([60, 40], [1, 1]) == pytest.approx(math.erfc(math.sqrt(2)))
    assert sample_ratio_p_value([500, 250, 250], [2, 1, 1]) == 1
    assert sample_ratio_p_value([0, 0], [1, 1]) == 1


def test_the_sequential_check_by_hand() -> None:
    # The Bayes factor, one person after the other: each turns up with (alpha + count) / (A + total) or with theta.
    sequence, theta = [0] * 40 + [1] * 30, [0.25, 0.75]
    counts, bayes_factor = [0, 0], 1.0
    for variant in sequence:
        bayes_factor *= (100 * theta[variant] + counts[variant]) / (100 + sum(counts)) / theta[variant]
        counts[variant] += 1
    assert bayes_factor > 100
    assert sequential_sample_ratio_p_value(counts, [1, 3]) == pytest.approx(1 / bayes_factor)
    assert sequential_sample_ratio_p_value([0, 0], [1, 1]) == 1


def test_a_right_split_looked_at_after_every_person_is_seldom_called_broken() -> None:
    rng = np.random.default_rng(5)
    experiments, people, level = 400, 2_000, 0.05
    fixed = sequential = 0
    for _ in range(experiments):
        first_T = np.cumsum(rng.random(people) < 0.5)[99::20]
        totals_T = np.arange(1, people + 1)[99::20]
        splits = [[int(k), int(n - k)] for k, n in zip(first_T, totals_T, strict=True)]
        sequential += min(sequential_sample_ratio_p_value(split, [1, 1]) for split in splits) < level
        fixed += bool(np.any((first_T - totals_T / 2) ** 2 / (totals_T / 4) > 3.8415))
    assert sequential / experiments <= level
    # The positive control: Pearson's test, looked at as often, cries wolf.
    assert fixed / experiments > 3 * level


def test_the_sequential_check_finds_a_broken_split() -> None:
    assert sequential_sample_ratio_p_value([5_300, 4_700], [1, 1]) < 0.001
    assert sequential_sample_ratio_p_value([5_030, 4_970], [1, 1]) == 1


# Ratios whose unit is the person


def test_clustered_sums_agree_with_a_naive_delta_method() -> None:
    rng = np.random.default_rng(1)
    n_P = rng.integers(1, 20, 300).astype(np.float64)
    x_P = rng.binomial(n_P.astype(int), rng.beta(1, 9, 300)).astype(np.float64)
    sums = ClusteredSums.of(x_P, n_P)
    ratio = sum(x_P) / sum(n_P)
    residuals = [(x - ratio * n) / np.mean(n_P) for x, n in zip(x_P, n_P, strict=True)]
    assert sums.ratio == pytest.approx(ratio)
    assert sums.variance == pytest.approx(np.var(residuals, ddof=1) / len(n_P))
    assert (sums.people, sums.earners) == (300, np.count_nonzero(x_P))


def test_people_who_click_alike_make_intervals_wider_than_their_impressions_do() -> None:
    # 100 people with 50 impressions each, of whom half always click: 100 answers, not 5,000.
    x_P = np.repeat([50.0, 0.0], 50)
    interval = ClusteredSums.of(x_P, np.full(100, 50.0)).interval(0.95)
    assert interval is not None
    assert (interval.upper - interval.value) / z_of(0.95) == pytest.approx(math.sqrt(0.25 / 100), rel=0.01)


def test_without_two_people_nothing_is_said() -> None:
    assert ClusteredSums().ratio is None
    assert ClusteredSums().variance is None
    assert ClusteredSums.of(np.ones(1), np.ones(1)).interval(0.95) is None


# Always-valid intervals


def test_the_width_by_hand_and_never_that_of_a_single_look() -> None:
    # t rho^2 = 1: sqrt(4 log(sqrt(2) / 0.05)).
    assert always_valid_width(100, 0.05, 0.1) == pytest.approx(math.sqrt(4 * math.log(math.sqrt(2) / 0.05)))
    rho = mixture_precision(0.05, 10_000)
    for people in (100, 1_000, 10_000, 100_000, 10**7):
        assert always_valid_width(people, 0.05, rho) > z_of(0.95)


@pytest.mark.parametrize("alpha", [0.05, 0.001])
def test_the_sequence_is_narrowest_about_where_it_was_asked_to_be(alpha: float) -> None:
    here = always_valid_width(10_000, alpha, mixture_precision(alpha, 10_000))
    best = min(always_valid_width(10_000, alpha, rho) for rho in np.geomspace(1e-4, 1, 400))
    assert here == pytest.approx(best, rel=0.005)


@dataclass(frozen=True)
class Visits:
    """Visits in the order of time: who, in which variant, what they saw and clicked; shape (V,)."""

    user_V: npt.NDArray[np.int64]
    variant_P: npt.NDArray[np.int64]
    shown_V: npt.NDArray[np.float64]
    clicked_V: npt.NDArray[np.float64]


def simulate(rng: np.random.Generator, people: int, rates: tuple[float, float]) -> Visits:
    """Returns visits of people who come back and differ in how much they click."""
    variant_P = (rng.random(people) < 0.5).astype(np.int64)
    mean_P = np.take(rates, variant_P)
    rate_P = rng.beta(2 * mean_P, 2 * (1 - mean_P))
    visits_P = 1 + rng.poisson(2.0, people)
    user_V = np.repeat(np.arange(people), visits_P)
    # First visits spread over the experiment, later ones after them.
    time_V = np.repeat(np.sort(rng.random(people)), visits_P) + rng.exponential(0.2, len(user_V))
    user_V = user_V[np.argsort(time_V)]
    shown_V = rng.integers(1, 12, len(user_V))
    return Visits(
        user_V, variant_P, shown_V.astype(np.float64), rng.binomial(shown_V, rate_P[user_V]).astype(float)
    )


def looks(visits: Visits, count: int) -> list[tuple[ClusteredSums, ClusteredSums]]:
    """Returns what is known of (control, treatment) at moments spread over the visits."""
    people, seen = len(visits.variant_P), []
    x_P, n_P, first = np.zeros(people), np.zeros(people), 0
    for last in np.linspace(len(visits.user_V) / count, len(visits.user_V), count).astype(int):
        x_P += np.bincount(visits.user_V[first:last], visits.clicked_V[first:last], people)
        n_P += np.bincount(visits.user_V[first:last], visits.shown_V[first:last], people)
        first = last
        control, treatment = (
            ClusteredSums.of(x_P[visits.variant_P == arm], n_P[visits.variant_P == arm]) for arm in (0, 1)
        )
        seen.append((control, treatment))
    return seen


def test_an_a_a_experiment_looked_at_all_the_time_is_seldom_called_different() -> None:
    rng = np.random.default_rng(7)
    experiments, alpha = 400, 0.05
    always_valid = single_look = 0
    for _ in range(experiments):
        wrong, naively_wrong = False, False
        for control, treatment in looks(simulate(rng, 2_000, (0.05, 0.05)), 60):
            interval = difference_interval(treatment, control, alpha, 1_000)
            if interval is None:
                continue
            wrong |= not interval.lower <= 0 <= interval.upper
            assert control.variance is not None
            assert treatment.variance is not None
            error = math.sqrt(control.variance + treatment.variance)
            naively_wrong |= abs(interval.value) > z_of(0.95) * error
        always_valid += wrong
        single_look += naively_wrong
    assert always_valid / experiments <= alpha
    # The positive control: an interval for one look, looked at as often, is wrong in far more than 5 of 100.
    assert single_look / experiments > 3 * alpha


def test_a_real_difference_is_found_and_held() -> None:
    rng = np.random.default_rng(8)
    intervals = [
        difference_interval(treatment, control, 0.05, 5_000)
        for control, treatment in looks(simulate(rng, 8_000, (0.05, 0.08)), 40)
    ]
    known = [interval for interval in intervals if interval is not None]
    assert known[-1].lower > 0
    assert all(interval.lower <= 0.03 <= interval.upper for interval in known)


def test_nothing_is_said_of_a_few_people_or_a_few_clicks() -> None:
    few = ClusteredSums.of(np.ones(99), np.full(99, 10.0))
    many = ClusteredSums.of(np.ones(200), np.full(200, 10.0))
    idle = ClusteredSums.of(np.zeros(200), np.full(200, 10.0))
    assert difference_interval(few, many, 0.05, 1_000) is None
    assert difference_interval(idle, idle, 0.05, 1_000) is None
    # Nothing at all in one variant is the worst news of all, and must be told.
    interval = difference_interval(idle, many, 0.05, 1_000)
    assert interval is not None
    assert interval.upper <= interval.value + 1e-9 < 0


# Judgement


def experiment(*guard_rails: GuardRail, variants: int = 2) -> Experiment:
    return Experiment(
        "checkout",
        "home",
        [VariantShare(f"v{number}", 1, "default") for number in range(variants)],
        "checkout",
        datetime.now(UTC),
        guard_rails=guard_rails,
    )


def observed(people: int, **rates: float) -> VariantObservation:
    """Returns people with ten chances each, whose metrics have these rates."""
    sums = {}
    for name, rate in rates.items():
        n_P = np.full(people, 10.0)
        x_P = np.zeros(people)
        # Half of the people earn twice the rate.
        x_P[: people // 2] = 20.0 * rate
        sums[Metric[name.upper()]] = ClusteredSums.of(x_P, n_P)
    return VariantObservation(people, sums)


def test_a_better_variant_wins_and_the_best_of_several() -> None:
    arms = [observed(5_000, click_through_rate=rate) for rate in (0.05, 0.06, 0.07)]
    judgement = judge(experiment(variants=3), Observation(arms), 0.95)
    assert (judgement.verdict, judgement.winner) == (Verdict.BETTER, 2)
    assert judgement.differences[0] is None
    assert judgement.differences[1] is not None
    assert judgement.differences[1].value == pytest.approx(0.01)
    assert judgement.cause_to_stop is None


@pytest.mark.parametrize(
    ("rates", "verdict"),
    [
        ((0.05, 0.0501), Verdict.UNDECIDED),
        ((0.05, 0.03), Verdict.WORSE),
        ((0.05, 0.03, 0.0501), Verdict.UNDECIDED),
        ((0.05, 0.03, 0.02), Verdict.WORSE),
    ],
)
def test_a_verdict_follows_from_the_intervals(rates: tuple[float, ...], verdict: Verdict) -> None:
    arms = [observed(5_000, click_through_rate=rate) for rate in rates]
    judgement = judge(experiment(variants=len(rates)), Observation(arms), 0.95)
    assert (judgement.verdict, judgement.winner) == (verdict, None)


def test_a_broken_split_makes_every_comparison_invalid() -> None:
    arms = [observed(5_000, click_through_rate=0.05), observed(6_000, click_through_rate=0.09)]
    judgement = judge(experiment(), Observation(arms), 0.95)
    assert judgement.sample_ratio_mismatch
    assert (judgement.verdict, judgement.winner) == (Verdict.INVALID, None)
    assert judgement.cause_to_stop is StopCause.SAMPLE_RATIO_MISMATCH


@pytest.mark.parametrize(
    ("tolerated_loss", "rate", "broken"),
    [(0.0, 0.03, True), (0.1, 0.03, True), (0.4, 0.03, False), (0.0, 0.0499, False), (0.2, 0.05, False)],
)
def test_a_guard_rail_breaks_when_the_loss_is_surely_more_than_is_borne(
    tolerated_loss: float, rate: float, broken: bool
) -> None:
    guarded = experiment(GuardRail(Metric.CONVERSION_RATE, tolerated_loss))
    arms = [
        observed(5_000, click_through_rate=0.05, conversion_rate=0.05),
        observed(5_000, click_through_rate=0.09, conversion_rate=rate),
    ]
    judgement = judge(guarded, Observation(arms), 0.95)
    assert judgement.broken_guard_rails == [[], [Metric.CONVERSION_RATE] if broken else []]
    assert judgement.cause_to_stop is (StopCause.GUARD_RAIL if broken else None)
    # Clicks bought with sales do not win.
    assert judgement.verdict is (Verdict.UNDECIDED if broken else Verdict.BETTER)


def test_the_loss_of_a_negative_nps_is_counted_in_points() -> None:
    def scores(promoters: int, detractors: int, people: int = 3_000) -> VariantObservation:
        x_P = np.zeros(people)
        x_P[:promoters], x_P[promoters : promoters + detractors] = 100.0, -100.0
        return VariantObservation(people, {Metric.NPS: ClusteredSums.of(x_P, np.ones(people))})

    control, worse = scores(600, 900), scores(300, 1_500)  # -10 and -40 points
    for tolerated_loss, broken in ((0.0, True), (0.1, True), (0.29, False)):
        guarded = experiment(GuardRail(Metric.NPS, tolerated_loss))
        judgement = judge(guarded, Observation([control, worse]), 0.95)
        assert bool(judgement.broken_guard_rails[1]) is broken


def test_revenue_is_compared_for_a_thousand_impressions() -> None:
    sums = ClusteredSums.of(np.array([2.0, 0.0]), np.array([10.0, 30.0]))
    scaled = VariantObservation(2, {Metric.REVENUE_PER_MILLE: sums}).of(Metric.REVENUE_PER_MILLE)
    assert scaled.ratio == pytest.approx(50)
    assert scaled.variance == pytest.approx(1e6 * (sums.variance or 0))
