"""The audit: the bound beside published numbers, the control that must be caught, the private release that must pass."""

from __future__ import annotations

import math

import numpy as np
import pytest

from services.trainer.privacy.accounting import noise_for
from services.trainer.privacy.audit import audit_counts, epsilon_refuted, judge_guesses, p_value
from tests.trainer.test_privacy_counts import histories_of

DELTA = 1e-6


def test_without_delta_the_bound_is_that_of_coins_with_the_accuracy_of_randomised_response() -> None:
    # Exact: all of r guesses right refutes epsilon where (1 / (1 + e^-epsilon))^r < 5%.
    for guesses in (10, 100, 1000):
        accuracy = 0.05 ** (1 / guesses)
        assert epsilon_refuted(guesses, guesses, guesses, 0.0) == pytest.approx(
            math.log(accuracy / (1 - accuracy)), abs=1e-6
        )
    # Half right proves nothing.
    assert epsilon_refuted(1000, 1000, 500, 0.0) == 0.0


def test_delta_makes_the_bound_weaker_and_never_stronger() -> None:
    bounds = [epsilon_refuted(1000, 500, 470, delta) for delta in (0.0, 1e-6, 1e-5, 1e-4)]
    assert bounds == sorted(bounds, reverse=True)
    assert p_value(100, 0, 0, 1.0, 1e-6) == 1.0


def test_a_mechanism_of_known_epsilon_is_bounded_by_it_and_nearly_reached() -> None:
    # Randomised response at epsilon 2, whose best guess is right with probability e^2 / (1 + e^2).
    generator = np.random.default_rng(1)
    included = generator.random(20_000) < 0.5
    told = np.where(generator.random(20_000) < 1 / (1 + math.exp(-2)), included, ~included)
    audit = judge_guesses(told + 0.01 * generator.random(20_000), included, 18_000, 0.0)
    assert 1.8 < audit.epsilon <= 2.0


@pytest.mark.parametrize("epsilon", [1.0, 4.0])
def test_canaries_in_the_counts_are_caught_without_noise_and_not_with_it(epsilon: float) -> None:
    generator = np.random.default_rng(2)
    items = 120
    starts = generator.integers(0, items, 2000)
    people = histories_of([[(start + step) % items for step in range(4)] for start in starts.tolist()], items)
    control = audit_counts(people, 4000, 0.0, DELTA, generator)
    assert control.right == control.guesses == 2000
    assert control.epsilon > epsilon + 1
    private = audit_counts(people, 4000, noise_for(epsilon, DELTA).noise_multiplier, DELTA, generator)
    assert private.epsilon <= epsilon
    # Not for want of looking: the attack does better than coins.
    assert private.right > private.guesses / 2
