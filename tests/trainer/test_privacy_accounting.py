"""The accountant beside values that others published, and beside a formula of our own."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import norm

from services.trainer.domain.privacy import GaussianRelease, PrivacyCharge
from services.trainer.privacy.accounting import epsilon_of, epsilon_of_ledger, noise_for


def analytic_delta(noise_multiplier: float, epsilon: float) -> float:
    """delta of the Gaussian mechanism (Balle & Wang, 2018, theorem 8), exact."""
    a = 1 / (2 * noise_multiplier)
    b = epsilon * noise_multiplier
    return float(norm.cdf(a - b) - math.exp(epsilon) * norm.cdf(-a - b))


def analytic_epsilon(noise_multiplier: float, delta: float) -> float:
    return float(brentq(lambda epsilon: analytic_delta(noise_multiplier, epsilon) - delta, 0, 200))


@settings(max_examples=25, deadline=None)
@given(noise=st.floats(0.4, 30.0), delta=st.sampled_from([1e-4, 1e-5, 1e-6]))
def test_one_gaussian_release_costs_what_the_exact_formula_says(noise: float, delta: float) -> None:
    exact = analytic_epsilon(noise, delta)
    found = epsilon_of([GaussianRelease(noise)], delta)
    assert exact - 1e-9 <= found <= exact + 2e-3


def test_releases_of_everybody_compose_as_one_with_less_noise() -> None:
    # Gaussian releases with multipliers z_i are one with 1 / z^2 = sum 1 / z_i^2 (Dong, Roth & Su, 2022).
    together = 1 / math.sqrt(1 / 2.0**2 + 1 / 3.0**2 + 4 / 5.0**2)
    releases = [GaussianRelease(2.0), GaussianRelease(3.0), GaussianRelease(5.0, steps=4)]
    assert epsilon_of(releases, 1e-6) == pytest.approx(analytic_epsilon(together, 1e-6), abs=2e-3)


@pytest.mark.parametrize(
    ("noise", "rate", "steps", "delta", "published"),
    [
        # Abadi et al. (2016), section 5.1 (figure 2): q = .01, sigma = 4, 10,000 steps, delta 1e-5: the moments
        # accountant says 1.26; a tight one says less.
        (4.0, 0.01, 10_000, 1e-5, 1.26),
        # TensorFlow Privacy's tutorial: MNIST, batch 256 of 60,000, noise 1.1, 60 epochs, delta 1e-5: 3.01.
        (1.1, 256 / 60_000, 60 * 60_000 // 256, 1e-5, 3.01),
    ],
)
def test_sampled_steps_cost_no_more_than_looser_accountants_published(
    noise: float, rate: float, steps: int, delta: float, published: float
) -> None:
    found = epsilon_of([GaussianRelease(noise, rate, steps)], delta)
    assert 0.75 * published < found <= published


@pytest.mark.parametrize(("epsilon", "rate", "steps"), [(1.0, 1.0, 1), (8.0, 1.0, 1), (2.0, 0.02, 300)])
def test_the_noise_that_is_chosen_suffices_and_hardly_more(epsilon: float, rate: float, steps: int) -> None:
    release = noise_for(epsilon, 1e-6, rate, steps)
    assert epsilon_of([release], 1e-6) <= epsilon
    less = GaussianRelease(0.99 * release.noise_multiplier, rate, steps)
    assert epsilon_of([less], 1e-6) > epsilon


def test_the_ledger_never_says_more_than_the_plain_sum_where_that_is_valid() -> None:
    charge = PrivacyCharge("a", 1, "main", 0.5, 1e-6, "COUNTS", (noise_for(0.5, 1e-6),))
    assert epsilon_of_ledger([charge], 1e-5) <= 0.5
    assert epsilon_of_ledger([], 1e-5) == 0.0
    # Ten deltas of 1e-5 exceed the ledger's: the sum of epsilons says nothing about delta 1e-5.
    loose = PrivacyCharge("a", 1, "main", 0.001, 1e-5, "COUNTS", (GaussianRelease(1.0),))
    assert epsilon_of_ledger([loose] * 10, 1e-5) > 10 * 0.001


@pytest.mark.parametrize("wrong", [{"noise_multiplier": 0.0}, {"sampling_rate": 0.0}, {"steps": 0}])
def test_a_release_without_noise_people_or_steps_is_no_release(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="out of range"):
        GaussianRelease(**{"noise_multiplier": 1.0, **wrong})  # type: ignore[arg-type]
