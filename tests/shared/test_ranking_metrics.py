"""Ranking measures against cases worked by hand and loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.ranking_metrics import (
    bootstrap_intervals,
    coverage_at_k,
    hits_of_rank,
    hr_at_k,
    ndcg_at_k,
    precision_at_k,
    rank_of_target,
    recall_at_k,
    reciprocal_rank,
)


def naive_ndcg(hits: list[bool], relevant: int, k: int) -> float:
    dcg = sum(1 / math.log2(place + 2) for place, hit in enumerate(hits[:k]) if hit)
    ideal = sum(1 / math.log2(place + 2) for place in range(min(relevant, k)))
    return dcg / ideal if ideal else 0.0


def test_measures_of_a_ranking_worked_by_hand() -> None:
    hit_BL = np.array([[False, True, False, True], [False, False, False, False]])
    relevant_B = np.array([3, 1])
    assert hr_at_k(hit_BL, 1).tolist() == [0, 0]
    assert hr_at_k(hit_BL, 2).tolist() == [1, 0]
    assert recall_at_k(hit_BL, relevant_B, 4).tolist() == pytest.approx([2 / 3, 0])
    assert precision_at_k(hit_BL, 4).tolist() == [0.5, 0]
    # A list shorter than k does not make its precision better.
    assert precision_at_k(hit_BL, 8).tolist() == [0.25, 0]
    assert reciprocal_rank(hit_BL).tolist() == [0.5, 0]
    expected = (1 / math.log2(3) + 1 / math.log2(5)) / (1 + 1 / math.log2(3) + 0.5)
    assert ndcg_at_k(hit_BL, relevant_B, 4).tolist() == pytest.approx([expected, 0])


@given(
    st.lists(st.booleans(), min_size=1, max_size=12),
    st.integers(0, 5),
    st.integers(1, 15),
)
def test_ndcg_equals_the_loop_and_stays_within_its_bounds(hits: list[bool], missed: int, k: int) -> None:
    relevant = sum(hits) + missed
    value = ndcg_at_k(np.array([hits]), np.array([relevant]), k)[0]
    assert value == pytest.approx(naive_ndcg(hits, relevant, k))
    assert 0 <= value <= 1 + 1e-12


def test_nothing_relevant_is_zero_and_not_an_error() -> None:
    hit_BL = np.zeros((1, 5), bool)
    none = np.array([0])
    assert ndcg_at_k(hit_BL, none, 5).tolist() == [0]
    assert recall_at_k(hit_BL, none, 5).tolist() == [0]


def test_a_rank_counts_who_is_better_and_ties_keep_item_order() -> None:
    score_BI = np.array([[3.0, 1.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    assert rank_of_target(score_BI, np.array([2, 1])).tolist() == [2, 2]
    assert rank_of_target(score_BI, np.array([3, 0])).tolist() == [3, 1]


def test_excluded_items_do_not_compete_but_the_target_does() -> None:
    score_BI = np.array([[3.0, 1.0, 5.0, 2.0]])
    excluded_BI = np.array([[True, False, True, True]])
    assert rank_of_target(score_BI, np.array([3]), excluded_BI).tolist() == [1]
    assert rank_of_target(score_BI, np.array([1]), excluded_BI).tolist() == [1]


def test_a_rank_beyond_the_list_is_no_hit() -> None:
    assert hits_of_rank(np.array([1, 3, 4]), 3).tolist() == [
        [True, False, False],
        [False, False, True],
        [False, False, False],
    ]


def test_coverage_counts_distinct_items_and_no_empty_places() -> None:
    assert coverage_at_k(np.array([[0, 1, 9], [1, -1, 9]]), item_count=10, k=2) == 0.2


def test_the_bootstrap_interval_is_that_of_the_normal_law_for_many_rankings() -> None:
    value_BM = np.random.default_rng(0).normal(1.0, 2.0, size=(4_000, 1))
    (interval,) = bootstrap_intervals(value_BM, np.random.default_rng(1), 2_000, 0.95)
    half = 1.96 * value_BM.std() / math.sqrt(4_000)
    assert interval.value == pytest.approx(value_BM.mean())
    assert interval.low == pytest.approx(value_BM.mean() - half, abs=half * 0.1)
    assert interval.high == pytest.approx(value_BM.mean() + half, abs=half * 0.1)


def test_the_bootstrap_repeats_by_its_generator_and_needs_a_ranking() -> None:
    value_BM = np.random.default_rng(0).random((50, 3))
    first = bootstrap_intervals(value_BM, np.random.default_rng(7))
    assert first == bootstrap_intervals(value_BM, np.random.default_rng(7))
    with pytest.raises(ValueError, match="no rankings"):
        bootstrap_intervals(np.zeros((0, 1)), np.random.default_rng(0))
