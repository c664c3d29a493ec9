"""Bounded contributions and noisy counts, each beside a naive twin."""

from __future__ import annotations

from collections import defaultdict
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest, norm

from services.trainer.pipeline.dataset import Cleaning, EventColumns, Histories, clean
from services.trainer.privacy.contributions import (
    GRID,
    MAX_EVENTS,
    POPULARITY_SHARE,
    WINDOW,
    Shares,
    over_catalogue,
    shares_of_people,
    sum_shares,
    take_people,
)
from services.trainer.privacy.counts import (
    FALSE_NEIGHBOURS_AN_ITEM,
    add_noise,
    cooccurrence_of,
    threshold_of,
    vectors_of,
)
from services.trainer.privacy.measuring import NUMBERS, SENSITIVITY, person_numbers, summarise
from services.trainer.privacy.randomness import SecureRandom
from tests.trainer.conftest import columns_of

ITEMS = 7
KEY = bytes(range(32))

people = st.lists(st.lists(st.integers(0, ITEMS - 1), min_size=1, max_size=70), min_size=1, max_size=8)


def histories_of(rows: list[list[int]], items: int = ITEMS) -> Histories:
    length_U = np.array([len(row) for row in rows], np.int64)
    item_E = np.array([item for row in rows for item in row], np.int32)
    return Histories(
        np.concatenate([[0], np.cumsum(length_U)]).astype(np.int64),
        item_E,
        np.full(len(item_E), 3, np.int32),
        np.arange(len(item_E), dtype=np.int64),
        [f"item-{index}" for index in range(items)],
        np.arange(len(rows)),
    )


def naive_share(row: list[int], clip_norm: float, items: int) -> tuple[dict[int, int], dict[int, int]]:
    """One person's share by the module's formula, pair by pair."""
    newest = row[-MAX_EVENTS:]
    weight: dict[int, float] = defaultdict(float)
    for later in range(len(newest)):
        for earlier in range(max(0, later - WINDOW), later):
            weight[newest[earlier] * items + newest[later]] += 1 / (later - earlier)
    pair_scale = (1 - POPULARITY_SHARE) ** 0.5 / max(sum(w * w for w in weight.values()) ** 0.5, clip_norm)
    taken = set(newest)
    item_scale = POPULARITY_SHARE**0.5 / max(len(taken) ** 0.5, clip_norm)
    pairs = {pair: int(w * pair_scale * GRID) for pair, w in weight.items()}
    return pairs, {item: int(item_scale * GRID) for item in taken}


@settings(max_examples=60, deadline=None)
@given(rows=people, clip_norm=st.floats(0.05, 20.0))
def test_a_share_is_what_the_formula_says_and_its_norm_is_bounded_exactly(
    rows: list[list[int]], clip_norm: float
) -> None:
    found: dict[int, tuple[dict[int, int], dict[int, int]]] = {user: ({}, {}) for user in range(len(rows))}
    for user_N, pair_N, weight_N, item_P, _count_P in shares_of_people(histories_of(rows), clip_norm):
        for user, pair, weight in zip(user_N.tolist(), pair_N.tolist(), weight_N.tolist(), strict=True):
            found[user][0][pair] = weight
        assert item_P.size
    total = sum_shares(histories_of(rows), clip_norm)
    expected_pairs: dict[int, int] = defaultdict(int)
    for user, row in enumerate(rows):
        pairs, _items = naive_share(row, clip_norm, ITEMS)
        # One grid unit of rounding between two orders of the same sum.
        for pair in pairs.keys() | found[user][0].keys():
            assert abs(pairs.get(pair, 0) - found[user][0].get(pair, 0)) <= 1
        alone = sum_shares(histories_of([row]), clip_norm)
        squared = sum(Fraction(value) ** 2 for value in alone.weight_N.tolist())
        squared += sum(Fraction(value) ** 2 for value in alone.popularity_I.tolist())
        # Exact, in whole numbers: no tolerance.
        assert squared <= Fraction(GRID) ** 2
        for pair, weight in zip(alone.pair_N.tolist(), alone.weight_N.tolist(), strict=True):
            expected_pairs[pair] += weight
    assert dict(zip(total.pair_N.tolist(), total.weight_N.tolist(), strict=True)) == dict(expected_pairs)


@settings(max_examples=40, deadline=None)
@given(rows=people, extra=st.lists(st.integers(0, ITEMS - 1), min_size=1, max_size=300))
def test_neighbouring_data_sets_differ_by_no_more_than_the_bound(
    rows: list[list[int]], extra: list[int]
) -> None:
    def dense(shares: Shares) -> np.ndarray:
        cells = np.zeros(ITEMS * ITEMS + ITEMS, object)
        cells[shares.pair_N] = shares.weight_N
        cells[ITEMS * ITEMS :] = shares.popularity_I
        return cells

    # Somebody is added in the middle: nobody else's share may change with them.
    without = dense(sum_shares(histories_of(rows), 1.0))
    with_them = dense(sum_shares(histories_of([rows[0], extra, *rows[1:]]), 1.0))
    assert sum(int(value) ** 2 for value in with_them - without) <= GRID**2


def test_the_items_of_the_output_are_those_of_the_catalogue_whatever_people_did() -> None:
    catalogue = ["a", "b", "c", "d", "e"]
    events = columns_of([[0, 1, 2], [2, 1]])
    named = EventColumns(
        events.user_E, events.item_E, events.kind_E, events.time_E, events.order_E, ["b", "withdrawn", "d"]
    )
    found = over_catalogue(named, Cleaning(), catalogue)
    assert list(found.item_ids) == catalogue
    assert found.item_E.tolist() == [1, 3, 3]
    nothing = over_catalogue(columns_of([]), Cleaning(), catalogue)
    assert list(nothing.item_ids) == catalogue
    assert nothing.user_count == 0


def test_histories_over_the_catalogue_are_those_of_cleaning_otherwise() -> None:
    generator = np.random.default_rng(3)
    events = columns_of([generator.integers(0, 20, 9).tolist() for _ in range(30)])
    ours, theirs = over_catalogue(events, Cleaning(), sorted(events.item_ids)), clean(events, Cleaning())
    assert [ours.item_ids[i] for i in ours.item_E] == [theirs.item_ids[i] for i in theirs.item_E]
    some = take_people(ours, np.array([1, 4]))
    assert some.item_E.tolist() == [
        *ours.item_E[ours.start_U1[1] : ours.start_U1[2]],
        *ours.item_E[ours.start_U1[4] : ours.start_U1[5]],
    ]


def test_every_cell_gets_noise_of_the_promised_size_also_the_empty_ones() -> None:
    items = 60
    empty = Shares(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(items, np.int64))
    random = SecureRandom(KEY)
    noise_multiplier = 2.0
    kept, above, popular = [], [], []
    for _ in range(300):
        counts = add_noise(empty, noise_multiplier, random)
        kept.append(len(counts.pair_N))
        above += (counts.weight_N / counts.noise).tolist()
        popular += (counts.popularity_I / counts.noise).tolist()
        assert len(set(counts.pair_N.tolist())) == len(counts.pair_N)
    # Half a false neighbour an item: 30 of 3,600 cells.
    assert np.mean(kept) == pytest.approx(FALSE_NEIGHBOURS_AN_ITEM * items, rel=0.05)
    assert kstest(popular, norm.cdf).pvalue > 1e-3
    bar = threshold_of(items)
    truncated = lambda z: 1 - norm.sf(z) / norm.sf(bar)  # noqa: E731
    assert kstest(above, truncated).pvalue > 1e-3


def test_cells_with_a_count_get_the_same_noise() -> None:
    items, value = 30, 50 * GRID
    full = Shares(
        np.arange(items * items), np.full(items * items, value, np.int64), np.zeros(items, np.int64)
    )
    counts = add_noise(full, 1.5, SecureRandom(KEY))
    assert len(counts.pair_N) == items * items
    assert kstest((counts.weight_N - value) / counts.noise, norm.cdf).pvalue > 1e-3


def test_a_false_neighbour_never_takes_the_place_of_a_counted_pair() -> None:
    items = 12
    taken = np.array([0, 5, 6, 7, 100, 143])
    shares = Shares(taken, np.full(6, 10 * GRID, np.int64), np.zeros(items, np.int64))
    seen: set[int] = set()
    for number in range(400):
        counts = add_noise(shares, 1.0, SecureRandom(number.to_bytes(32, "big")))
        false = set(counts.pair_N.tolist()) - set(taken.tolist())
        assert len(counts.pair_N) == len(set(counts.pair_N.tolist()))
        seen |= false
    # Every other cell turns up sooner or later, none beyond the last.
    assert seen == set(range(items * items)) - set(taken.tolist())


def test_without_noise_the_companion_is_the_counted_matrix() -> None:
    rows = [[0, 1, 2], [0, 1], [3, 4, 5, 6]]
    matrix = cooccurrence_of(add_noise(sum_shares(histories_of(rows), 1.0), 0.0, SecureRandom(KEY)))
    dense = matrix.to_dense()
    assert set(zip(*np.nonzero(dense), strict=True)) == {
        (0, 1), (0, 2), (1, 2), (3, 4), (3, 5), (3, 6), (4, 5), (4, 6), (5, 6),
    }  # fmt: skip
    assert dense[0, 1] > dense[0, 2]


def test_item_vectors_say_what_is_taken_together() -> None:
    rows = [[0, 1, 2] * 3, [1, 2, 0] * 3, [3, 4, 5, 6] * 3] * 20
    vectors = vectors_of(
        cooccurrence_of(add_noise(sum_shares(histories_of(rows), 1.0), 0.0, SecureRandom(KEY)))
    )
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    assert unit[0] @ unit[1] > unit[0] @ unit[4]
    empty = Shares(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(ITEMS, np.int64))
    assert np.isfinite(vectors_of(cooccurrence_of(add_noise(empty, 0.0, SecureRandom(KEY))))).all()


def test_what_a_measured_person_adds_is_bounded_and_the_noise_has_the_promised_size() -> None:
    ranks = np.array([1, 3, 10, 11, 500])
    numbers = person_numbers(ranks, ranks[::-1].copy())
    assert numbers.shape == (5, NUMBERS)
    assert (np.linalg.norm(numbers, axis=1) <= SENSITIVITY).all()
    random = SecureRandom(KEY)
    found = np.array([summarise(np.zeros((0, NUMBERS)), 3.0, random).people for _ in range(3000)])
    assert kstest(found / (3.0 * SENSITIVITY), norm.cdf).pvalue > 1e-3


def test_secret_coins_and_gaps_are_independent_with_the_probability_asked_for() -> None:
    random = SecureRandom(KEY)
    coins = random.coins(200_000, 0.03)
    places = random.successes(200_000, 0.03)
    for found in (np.flatnonzero(coins), places):
        assert len(found) == pytest.approx(6000, abs=5 * np.sqrt(6000))
        assert kstest(found / 200_000, "uniform").pvalue > 1e-3
        gaps = np.diff(found)
        assert np.mean(gaps == 1) == pytest.approx(0.03, abs=0.01)
    assert not np.array_equal(SecureRandom().uniform(4), SecureRandom().uniform(4))
