"""The answers of whole populations are what serving would show each of them."""

from __future__ import annotations

import numpy as np
import pytest

from services.trainer.pipeline import answering
from services.trainer.pipeline.answering import best_items, top_items
from services.trainer.pipeline.batch_companion import BatchCompanion
from services.trainer.pipeline.cooccurrence import count_cooccurrence
from services.trainer.pipeline.dataset import Cleaning, Histories, clean, everyone
from services.trainer.pipeline.evaluation import Contestants, popularity
from shared.bundle.manifest import ScoringParameters
from shared.bundle.scoring import Companion, naive_blended_scores
from tests.trainer.conftest import columns_of, walk


def served_on(histories: Histories, seed: int = 0) -> tuple[Contestants, np.ndarray]:
    generator = np.random.default_rng(seed)
    factors = generator.normal(size=(2, histories.item_count, 4)).astype(np.float32)
    scoring = ScoringParameters(0.7, 5.0, window=4, sequence=0.8, backward=-0.3, repeat=0.4)
    companion = Companion(scoring, *count_cooccurrence(histories, 50), *factors)
    vectors_ID, bias_I = (
        generator.normal(size=(histories.item_count, 8)),
        generator.normal(size=histories.item_count),
    )
    counts_I = popularity(histories)
    query_BD = generator.normal(size=(histories.user_count, 8)).astype(np.float32)
    return Contestants(
        vectors_ID.astype(np.float32), bias_I.astype(np.float32), companion, counts_I, counts_I
    ), query_BD


@pytest.mark.parametrize("people_at_once", [1, 7, 1000])
def test_everybody_gets_the_items_that_the_formula_puts_first(
    monkeypatch: pytest.MonkeyPatch, people_at_once: int
) -> None:
    histories = clean(columns_of([*walk(users=40, items=30, longest=12), [3]]), Cleaning())
    monkeypatch.setattr(answering, "_SCORES", people_at_once * histories.item_count)
    served, query_BD = served_on(histories)
    asked = everyone(histories)
    best_BK = best_items(histories, asked, query_BD, served, exclude_seen=True, k=20)
    for row in range(len(asked)):
        seen = asked.prefix(histories, row)[0].astype(np.int64)
        score_I = naive_blended_scores(
            served.item_vectors_ID, served.item_bias_I, served.companion, query_BD[row], seen
        )
        if not len(seen):
            score_I = served.popularity_I.astype(np.float64)
        score_I[seen] = -np.inf
        found = best_BK[row][best_BK[row] >= 0]
        assert len(found) == min(20, histories.item_count - len(set(seen.tolist())))
        # Items of one score may change places.
        np.testing.assert_allclose(score_I[found], np.sort(score_I)[::-1][: len(found)], rtol=1e-4, atol=1e-4)


def test_in_place_as_much_is_added_as_serving_adds() -> None:
    histories = clean(columns_of(walk(users=60, items=20, longest=12)), Cleaning())
    served, _ = served_on(histories)
    seen = [np.array([4, 1, 4]), np.zeros(0, np.int64), np.arange(9)]
    known_I = np.arange(histories.item_count) % 3 != 1
    for known in (None, known_I):
        score_BI = np.ones((3, histories.item_count), np.float32)
        BatchCompanion(served.companion, known).add_to(score_BI, seen)
        for row, history_H in enumerate(seen):
            read_H = history_H if known is None else history_H[known[history_H]]
            read_H = read_H[np.append(True, read_H[1:] != read_H[:-1])[: len(read_H)]]
            np.testing.assert_allclose(
                score_BI[row], 1 + served.companion.added(read_H), rtol=1e-4, atol=1e-5
            )


@pytest.mark.parametrize("items", [1, 19, 20, 5_000, 8_191, 8_192])
def test_the_best_of_a_row_are_those_that_sorting_finds(items: int) -> None:
    generator = np.random.default_rng(items)
    score_BI = generator.permuted(np.tile(np.arange(items, dtype=np.float32), (6, 1)), axis=1)
    # Where the best stand side by side, and where hardly anything competes.
    score_BI[1] = np.arange(items)
    score_BI[2, 3:] = -np.inf
    best_BK = top_items(score_BI, 20)
    assert best_BK.shape == (6, min(20, items))
    for row in (0, 1, 3, 4, 5):
        assert best_BK[row].tolist() == np.argsort(-score_BI[row])[:20].tolist()
    some = min(3, items)
    assert sorted(best_BK[2, :some].tolist()) == list(range(some))
