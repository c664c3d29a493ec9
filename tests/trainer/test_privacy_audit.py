"""The audit: the bound beside published numbers, the control that must be caught, the private release that must pass."""

from __future__ import annotations

import math
import os

import numpy as np
import pytest

from services.trainer.domain.hyper_parameters import HyperParameters
from services.trainer.domain.privacy import GaussianRelease
from services.trainer.privacy.accounting import epsilon_of, noise_for
from services.trainer.privacy.audit import (
    audit_counts,
    audit_gradients,
    epsilon_refuted,
    judge_guesses,
    p_value,
)
from services.trainer.privacy.randomness import SecureRandom
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
    # A lower bound that says something grows with the canaries.
    control = audit_counts(people, 4000, 0.0, DELTA, generator)
    assert control.right == control.guesses == 2000
    assert control.epsilon > epsilon + 1
    private = audit_counts(people, 4000, noise_for(epsilon, DELTA).noise_multiplier, DELTA, generator)
    assert private.epsilon <= epsilon
    # Not for want of looking: the attack does better than coins.
    assert private.right > private.guesses / 2


# Each costs a training. `make verify-privacy` also catches runs that do not sample, or do not clip.
EVERY_LIE = os.environ.get("SHOPKEEPER_AUDIT") == "all"
LIES: dict[str, dict[str, float]] = {
    "as claimed": {},
    "noise off": {"noise": 0.0},
    "sampling off": {"sampling_rate": 1.0},
    "clipping off": {"clipping": False},
}
CANARIES, CLIP = 400, 0.01
# Epsilon 2, nearly.
CLAIMED = GaussianRelease(1.81, sampling_rate=0.1, steps=40)
SIZE = HyperParameters(
    dimension=8, heads=2, max_history=5, dropout=0.0, negatives=8, batch_tokens=64, learning_rate=1e-3
)


@pytest.mark.parametrize("name", list(LIES) if EVERY_LIE else ["as claimed", "noise off"])
def test_canaries_in_the_gradients_catch_a_run_that_lies_and_no_other(name: str) -> None:
    generator = np.random.default_rng(3)
    taken = 100
    items = taken + CANARIES * (SIZE.max_history + 1)
    starts = generator.integers(0, taken, 200)
    people = histories_of([[(start + step) % taken for step in range(5)] for start in starts.tolist()], items)
    claimed = epsilon_of([CLAIMED], DELTA)
    audit = audit_gradients(
        people, CANARIES, CLAIMED, CLIP, DELTA, generator, SIZE, random=SecureRandom(bytes(32)), **LIES[name]
    )  # type: ignore[arg-type]
    print(
        f"{name}: epsilon >= {audit.epsilon:.2f}, {audit.right} of {audit.guesses} right; claimed {claimed:.2f}"
    )
    assert (audit.epsilon > claimed) == (name != "as claimed")
