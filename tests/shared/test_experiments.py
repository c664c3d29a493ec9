"""Who sees which variant: sticky, fair, independent, and the same in every language."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.experiments import Assignment, Split, VariantShare, assign, point

PEOPLE = 20_000


def split(
    *weights: float, salt: str = "checkout", traffic: float = 1.0, experiment_id: str = "checkout"
) -> Split:
    variants = [
        VariantShare(f"v{number}", weight, f"config-{number}") for number, weight in enumerate(weights)
    ]
    return Split(experiment_id, salt, traffic, variants)


def people(count: int = PEOPLE, seed: int = 1) -> list[bytes]:
    rng = random.Random(seed)
    return [rng.randbytes(16) for _ in range(count)]


def variant_of(user_key: bytes, of: Split) -> str | None:
    assignment = assign(user_key, of)
    return assignment.variant_id if assignment else None


def test_other_languages_compute_the_same_points() -> None:
    # These numbers are part of the contract: a change of any of them assigns everybody anew.
    key = bytes(range(16))
    assert point("traffic", "checkout", key) == 0.471225936776952
    assert point("variant", "checkout", key) == 0.36492647500442066
    assert point("variant", "größe", bytes(16)) == 0.37960360040183827


def test_an_assignment_names_what_to_serve_and_what_events_carry() -> None:
    found = assign(bytes(16), split(1))
    assert found == Assignment("checkout", "v0", "config-0")
    assert found is not None
    assert found.label == "checkout/v0"


@given(
    st.binary(min_size=16, max_size=16),
    st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=10),
    st.text(max_size=20),
)
def test_the_same_person_always_gets_the_same_variant(
    user_key: bytes, weights: list[float], salt: str
) -> None:
    first = variant_of(user_key, split(*weights, salt=salt))
    assert first == variant_of(user_key, split(*weights, salt=salt))
    assert first is not None


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=5), st.integers(0, 10**9))
def test_shares_converge_to_the_weights(weights: list[float], number: int) -> None:
    keys = people(4_000, seed=number)
    counts = Counter(variant_of(key, split(*weights, salt=f"salt-{number}")) for key in keys)
    for index, weight in enumerate(weights):
        share = weight / sum(weights)
        # Five standard deviations: some hundred comparisons, each failing once in two million.
        tolerance = 5 * math.sqrt(share * (1 - share) / len(keys))
        assert counts[f"v{index}"] / len(keys) == pytest.approx(share, abs=tolerance)


def test_experiments_are_independent_of_each_other() -> None:
    keys = people()
    one, other = split(1, 1, salt="one"), split(1, 1, salt="other")
    together = Counter((variant_of(key, one), variant_of(key, other)) for key in keys)
    expected = len(keys) / 4
    chi_squared = sum((together[pair] - expected) ** 2 / expected for pair in together)
    assert len(together) == 4
    assert chi_squared < 21.1  # 0.9999 quantile with 3 degrees of freedom.


def test_who_takes_part_says_nothing_about_the_variant() -> None:
    keys = people()
    counts = Counter(variant_of(key, split(1, 1, traffic=0.3)) for key in keys)
    taking_part = counts["v0"] + counts["v1"]
    assert taking_part / len(keys) == pytest.approx(0.3, abs=5 * math.sqrt(0.21 / len(keys)))
    assert counts["v0"] / taking_part == pytest.approx(0.5, abs=5 * math.sqrt(0.25 / taking_part))


@given(
    st.binary(min_size=16, max_size=16),
    st.floats(0.001, 1),
    st.floats(0.001, 1),
    st.lists(st.floats(0.1, 10), min_size=2, max_size=4),
)
def test_more_traffic_adds_people_and_moves_nobody(
    user_key: bytes, one: float, other: float, weights: list[float]
) -> None:
    smaller, larger = sorted((one, other))
    before = variant_of(user_key, split(*weights, traffic=smaller))
    if before is not None:
        assert variant_of(user_key, split(*weights, traffic=larger)) == before


def test_weights_count_relative_to_each_other() -> None:
    for key in people(500):
        assert variant_of(key, split(1, 3)) == variant_of(key, split(0.25, 0.75))


def test_a_variant_that_is_split_moves_nobody_of_the_others() -> None:
    for key in people(500):
        before = variant_of(key, split(2, 2))
        assert (before == "v0") == (variant_of(key, split(2, 1, 1)) == "v0")
