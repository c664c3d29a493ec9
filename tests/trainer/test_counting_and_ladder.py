"""The counted companion and the ladder, against loops that follow the formulas."""

from __future__ import annotations

import numpy as np
import pytest

from services.trainer.pipeline.cooccurrence import count_cooccurrence
from services.trainer.pipeline.dataset import Cleaning, clean, hold_out
from services.trainer.pipeline.evaluation import (
    BLEND,
    Contestants,
    climb_ladder,
    popularity,
    rank_by_fixed_scores,
    rank_by_query,
)
from services.trainer.pipeline.gate import judge
from services.trainer.pipeline.report import report_of
from shared.bundle import ScoringParameters
from shared.bundle.scoring import Companion, CooccurrenceMatrix, naive_blended_scores
from shared.ranking_metrics import Interval
from tests.trainer.conftest import columns_of, walk


def dense(matrix: CooccurrenceMatrix) -> np.ndarray:
    C = np.zeros((matrix.item_count, matrix.item_count))
    for row in range(matrix.item_count):
        for n in range(matrix.indptr_I1[row], matrix.indptr_I1[row + 1]):
            C[row, matrix.indices_N[n]] += matrix.weights_N[n]
    return C


def naive_cooccurrence(histories, window: int) -> tuple[np.ndarray, np.ndarray]:
    W = np.zeros((histories.item_count, histories.item_count))
    for user in range(histories.user_count):
        items = histories.item_E[histories.start_U1[user] : histories.start_U1[user + 1]]
        for i in range(len(items)):
            for j in range(i + 1, min(i + window, len(items) - 1) + 1):
                W[items[i], items[j]] += (j - i) ** -0.7

    def divided(weights: np.ndarray) -> np.ndarray:
        sums = weights.sum(axis=1, keepdims=True)
        return np.divide(weights, sums**0.4, out=np.zeros_like(weights), where=sums > 0)

    return divided(W), divided(W.T)


@pytest.mark.parametrize("dense_items", [0, 6_000])
@pytest.mark.parametrize("window", [1, 4, 50])
def test_cooccurrence_equals_the_loop_over_pairs(monkeypatch, dense_items: int, window: int) -> None:
    monkeypatch.setattr("services.trainer.pipeline.cooccurrence._DENSE_ITEMS", dense_items)
    histories = clean(columns_of(walk(users=60, items=20, longest=30)), Cleaning())
    for found, expected in zip(
        count_cooccurrence(histories, window), naive_cooccurrence(histories, window), strict=True
    ):
        np.testing.assert_allclose(dense(found), expected, rtol=1e-5)


def test_cooccurrence_counted_in_small_portions_is_the_same(monkeypatch) -> None:
    monkeypatch.setattr("services.trainer.pipeline.cooccurrence._DENSE_ITEMS", 0)
    histories = clean(columns_of(walk(users=60, items=20, longest=30)), Cleaning())
    whole = dense(count_cooccurrence(histories, 50)[0])
    monkeypatch.setattr("services.trainer.pipeline.cooccurrence._CHUNK_PAIRS", 50)
    np.testing.assert_allclose(dense(count_cooccurrence(histories, 50)[0]), whole, rtol=1e-6)


def test_a_long_log_is_counted_over_a_shorter_window(monkeypatch) -> None:
    histories = clean(columns_of(walk(users=60, items=20, longest=30)), Cleaning())
    monkeypatch.setattr("services.trainer.pipeline.cooccurrence._MAX_PAIRS", 10 * len(histories.item_E))
    np.testing.assert_allclose(
        dense(count_cooccurrence(histories, 50)[0]), naive_cooccurrence(histories, 10)[0], rtol=1e-5
    )


def test_a_row_keeps_its_heaviest_entries() -> None:
    histories = clean(columns_of([[0, 1, 2, 3]] * 3 + [[0, 1]]), Cleaning())
    row = dense(count_cooccurrence(histories, 50, max_row=2)[0])[0]
    assert (row > 0).tolist() == [False, True, True, False]


def ladder_case(exclude_seen: bool):
    histories = clean(columns_of(walk(users=50, items=15, longest=9)), Cleaning())
    held_out = hold_out(histories, 1, exclude_seen)
    generator = np.random.default_rng(3)
    vectors_ID = generator.normal(size=(histories.item_count, 4)).astype(np.float32)
    query_BD = generator.normal(size=(len(held_out), 4)).astype(np.float32)
    forward, backward = count_cooccurrence(histories.without_last(1), 50)
    factors_IR = generator.normal(size=(2, histories.item_count, 3)).astype(np.float32)
    contestants = Contestants(
        vectors_ID,
        generator.normal(size=histories.item_count).astype(np.float32),
        Companion(ScoringParameters(0.7, backward=-0.3, repeat=0.2), forward, backward, *factors_IR),
        popularity(histories.without_last(1)),
        popularity(histories.without_last(1), 30.0),
    )
    return histories, held_out, query_BD, contestants


def naive_rank(score_I: np.ndarray, target: int, seen: set[int]) -> int:
    competing = [i for i in range(len(score_I)) if i == target or i not in seen]
    return 1 + sum(
        1 for i in competing if score_I[i] > score_I[target] or (score_I[i] == score_I[target] and i < target)
    )


def test_ranks_of_the_blend_and_of_the_transformer_are_those_of_the_formulas(monkeypatch) -> None:
    # Chunks of a few people, so that their seams are tested too.
    monkeypatch.setattr("services.trainer.pipeline.evaluation._CHUNK_CELLS", 100)
    for exclude_seen in (True, False):
        histories, held_out, query_BD, contestants = ladder_case(exclude_seen)
        climb = climb_ladder(histories, held_out, query_BD, contestants, exclude_seen)
        ranks, best_B20 = climb.ranks, climb.best_B20
        for row in range(len(held_out)):
            items, _ = held_out.prefix(histories, row)
            seen = set(items.tolist()) if exclude_seen else set()
            score_I = naive_blended_scores(
                contestants.item_vectors_ID,
                contestants.item_bias_I,
                contestants.companion,
                query_BD[row],
                items.astype(np.int64),
            )
            target = int(held_out.target_B[row])
            assert ranks[BLEND][row] == naive_rank(score_I, target, seen)
            place = best_B20[row].tolist().index(target) + 1
            assert place == ranks[BLEND][row]
            assert not seen & (set(best_B20[row, : histories.item_count - len(seen)].tolist()) - {target})
        np.testing.assert_array_equal(
            ranks["transformer"],
            rank_by_query(histories, held_out, query_BD, contestants.item_vectors_ID, exclude_seen),
        )


def test_ranks_by_fixed_scores_are_those_of_the_whole_matrix() -> None:
    for exclude_seen in (True, False):
        histories, held_out, _, contestants = ladder_case(exclude_seen)
        score_I = contestants.popularity_I
        for row, rank in enumerate(rank_by_fixed_scores(histories, held_out, score_I, exclude_seen)):
            seen = set(held_out.prefix(histories, row)[0].tolist()) if exclude_seen else set()
            assert rank == naive_rank(score_I, int(held_out.target_B[row]), seen)


def test_popularity_halves_with_every_half_life() -> None:
    events = columns_of([[0, 1], [1, 0]])
    day = 86_400_000_000
    histories = clean(
        type(events)(
            events.user_E,
            events.item_E,
            events.kind_E,
            np.array([0, 10, 20, 30]) * day,
            events.order_E,
            events.item_ids,
        ),
        Cleaning(),
    )
    np.testing.assert_allclose(popularity(histories), [2, 2])
    np.testing.assert_allclose(popularity(histories, 10.0), [1 / 8 + 1, 1 / 4 + 1 / 2])


def report_with(lead: Interval, users: int = 100):
    histories, held_out, query_BD, contestants = ladder_case(True)
    climb = climb_ladder(histories, held_out, query_BD, contestants, True)
    report = report_of(
        histories, held_out, climb, contestants.item_vectors_ID,
        seed=0, protocol="", resamples=100, confidence=0.95,
    )  # fmt: skip
    fields = {name: getattr(report, name) for name in report.__dataclass_fields__}
    return type(report)(**{**fields, "lead_over_popularity": lead, "user_count": users})


def test_the_gate_wants_the_whole_interval_above_popularity_and_says_its_reasons() -> None:
    good = {
        "weights_finite": True,
        "parity": 1e-6,
        "encoder_milliseconds": 0.2,
        "size_bytes": 1000,
        "max_size_bytes": 2000,
        "force": False,
    }
    ahead, unsure = Interval(0.02, 0.01, 0.03), Interval(0.02, -0.001, 0.04)
    assert judge(report_with(ahead), **good).verdict == "PASSED"
    failed = judge(report_with(unsure), **good)
    assert failed.verdict == "FAILED"
    assert not failed.may_serve
    assert [c.name for c in failed.checks if not c.passed] == ["beats_popularity"]
    assert judge(report_with(unsure), **{**good, "force": True}).verdict == "FORCED"
    for change, check in (
        ({"parity": 2e-5}, "parity"),
        ({"parity": float("inf")}, "parity"),
        ({"weights_finite": False}, "finite_weights"),
        ({"encoder_milliseconds": 30.0}, "latency"),
        ({"size_bytes": 3000}, "size"),
    ):
        verdict = judge(report_with(ahead), **{**good, **change})
        assert [c.name for c in verdict.checks if not c.passed] == [check]
    few = judge(report_with(ahead, users=3), **good)
    assert [c.name for c in few.checks if not c.passed] == ["enough_people"]
