"""The arithmetic of recommending, worked by hand and beside naive twins."""

from __future__ import annotations

import math
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.recommend.domain.catalog import CatalogItem, CatalogStore
from services.recommend.domain.history import (
    DEFAULT_INTERVAL_SECONDS,
    NO_HISTORY,
    History,
    buy_again_scores,
    purchases_of,
)
from services.recommend.domain.item_index import ItemIndex
from services.recommend.domain.live_counts import HALF_LIFE_SECONDS, LiveCounts
from services.recommend.domain.ranking import (
    maximal_marginal_relevance,
    naive_maximal_marginal_relevance,
    top_rows,
)
from shared.event_kinds import EventKind
from shared.tokens import item_digest

DAY = 86_400.0
VIEW, BUY, RETURN = EventKind.ITEM_VIEW, EventKind.PURCHASE, EventKind.RETURN


def history(*events: tuple[int, EventKind, float]) -> History:
    return History(
        np.array([row for row, _, _ in events], np.int32),
        np.array([kind for _, kind, _ in events], np.int32),
        np.array([time for _, _, time in events], np.float64),
    )


class TestTopRows:
    def test_the_best_come_first_and_ties_go_to_the_lower_row(self) -> None:
        scores = np.array([1, 3, 3, -np.inf, 2, 3], np.float32)
        eligible = np.array([1, 1, 1, 1, 1, 1], bool)
        assert top_rows(scores, eligible, 2).tolist() == [1, 2]
        assert top_rows(scores, eligible, 9).tolist() == [1, 2, 5, 4, 0]

    @settings(max_examples=200, deadline=None)
    @given(
        st.lists(
            st.tuples(st.sampled_from([0.0, 1.0, 2.0, -math.inf]), st.booleans()), min_size=1, max_size=40
        ),
        st.integers(1, 45),
    )
    def test_it_agrees_with_sorting(self, entries: list[tuple[float, bool]], count: int) -> None:
        scores = np.array([score for score, _ in entries], np.float32)
        eligible = np.array([allowed for _, allowed in entries], bool)
        allowed = [row for row in range(len(entries)) if eligible[row] and scores[row] > -np.inf]
        expected = sorted(allowed, key=lambda row: (-scores[row], row))[:count]
        assert top_rows(scores, eligible, count).tolist() == expected


class TestDiversity:
    def test_a_twin_of_the_best_gives_way_to_something_else(self) -> None:
        # Relevance 1.0, 0.9, 0.0 after scaling; the second is the first's twin, the third is foreign to it.
        relevance = np.array([10.0, 9.0, 0.0], np.float32)
        vectors = np.array([[1, 0], [1, 0], [0, 1]], np.float32)
        # 0.4 * 0.9 - 0.6 * 1 = -0.24 < 0.4 * 0 - 0.6 * 0 = 0
        assert maximal_marginal_relevance(relevance, vectors, 0.6, 3).tolist() == [0, 2, 1]
        # 0.9 * 0.9 - 0.1 * 1 = 0.71 > 0
        assert maximal_marginal_relevance(relevance, vectors, 0.1, 3).tolist() == [0, 1, 2]

    @settings(max_examples=100, deadline=None)
    @given(
        st.integers(1, 12), st.integers(1, 12), st.sampled_from([0.1, 0.5, 0.9]), st.integers(0, 2**32 - 1)
    )
    def test_it_agrees_with_its_naive_twin(
        self, candidates: int, count: int, strength: float, seed: int
    ) -> None:
        random = np.random.default_rng(seed)
        relevance = -np.sort(-random.normal(size=candidates)).astype(np.float32)
        vectors = random.normal(size=(candidates, 4)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        expected = naive_maximal_marginal_relevance(relevance, vectors, strength, count)
        assert maximal_marginal_relevance(relevance, vectors, strength, count).tolist() == expected


class TestHistory:
    def test_context_events_come_last_and_known_ones_count_once(self) -> None:
        known = history((1, VIEW, 10.0), (2, BUY, 20.0))
        context = history((2, BUY, 20.0), (3, VIEW, 15.0), (4, VIEW, 20.0))
        joined = known.followed_by(context)
        assert joined.rows_N.tolist() == [1, 3, 2, 4]
        assert NO_HISTORY.followed_by(context) is context
        assert context.followed_by(NO_HISTORY) is context

    def test_an_item_sent_back_is_not_owned(self) -> None:
        events = history((1, BUY, 1), (2, BUY, 2), (2, RETURN, 3), (3, BUY, 4), (3, BUY, 5), (3, RETURN, 6))
        assert events.owned_rows().tolist() == [1, 3]

    def test_purchases_are_summed_up_by_item(self) -> None:
        events = history((7, BUY, 0), (7, BUY, 10 * DAY), (7, BUY, 30 * DAY), (5, BUY, 3 * DAY), (9, VIEW, 1))
        found = purchases_of(events)
        assert found.rows_P.tolist() == [5, 7]
        assert found.counts_P.tolist() == [1, 3]
        assert found.newest_P.tolist() == [3 * DAY, 30 * DAY]
        assert math.isnan(found.interval_P[0])
        assert found.interval_P[1] == 15 * DAY

    def test_an_item_is_most_due_when_its_own_interval_has_passed(self) -> None:
        found = purchases_of(history((7, BUY, 0), (7, BUY, 10 * DAY)))
        due = [float(buy_again_scores(found, (10 + days) * DAY)[0]) for days in (5, 10, 20)]
        assert due[1] == pytest.approx(2.0)  # bought twice, exactly due
        assert due[0] == pytest.approx(1.0)  # half the interval
        assert due[2] == pytest.approx(1.0)  # twice the interval
        once = purchases_of(history((7, BUY, 0)))
        assert float(buy_again_scores(once, DEFAULT_INTERVAL_SECONDS)[0]) == pytest.approx(1.0)


class TestLiveCounts:
    def test_a_history_sent_again_counts_once(self) -> None:
        counts = LiveCounts()
        first = history((1, VIEW, 100.0), (2, VIEW, 200.0))
        more = history(
            (1, VIEW, 100.0), (2, VIEW, 200.0), (2, BUY, 300.0), (3, EventKind.REMOVE_FROM_CART, 301.0)
        )
        for events in (first, first, more):
            counts.record(b"u", events.rows_N, events.kinds_N, events.times_N)
        assert counts.trending(5, 3600, now=400.0).tolist() == [0, 1, 2, 0, 0]

    def test_popularity_halves_with_the_half_life(self) -> None:
        counts = LiveCounts()
        counts.record(b"u", *arrays(history((0, VIEW, 0.0), (1, VIEW, HALF_LIFE_SECONDS))))
        popularity = counts.popularity(2, now=HALF_LIFE_SECONDS)
        assert popularity.tolist() == pytest.approx([0.5, 1.0])

    def test_popularity_survives_many_half_lives(self) -> None:
        counts = LiveCounts()
        for life in range(0, 400, 40):
            counts.record(b"u", *arrays(history((0, VIEW, life * HALF_LIFE_SECONDS))))
        counts.record(b"v", *arrays(history((1, VIEW, 400 * HALF_LIFE_SECONDS))))
        popularity = counts.popularity(2, now=400 * HALF_LIFE_SECONDS)
        assert popularity[1] == pytest.approx(1.0)
        assert popularity[0] == pytest.approx(2.0**-40, rel=1e-3)

    def test_the_window_decides_what_trends(self) -> None:
        counts = LiveCounts()
        counts.record(b"u", *arrays(history((0, VIEW, 0.0), (1, VIEW, 2 * DAY))))
        assert counts.trending(2, DAY, now=2 * DAY).tolist() == [0, 1]
        assert counts.trending(2, 3 * DAY, now=2 * DAY).tolist() == [1, 1]


def arrays(events: History) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return events.rows_N, events.kinds_N, events.times_N


class TestItemIndex:
    def test_a_row_is_for_ever_and_knows_its_digest(self) -> None:
        index = ItemIndex()
        ids = [f"item-{n}" for n in range(3000)]
        rows = index.intern(ids)
        assert index.intern(reversed(ids)).tolist() == rows.tolist()[::-1]
        assert rows.tolist() == list(range(3000))
        assert index.digests(3000).tolist() == [item_digest(item_id) for item_id in ids]

    def test_many_threads_agree(self) -> None:
        index = ItemIndex()
        found: list[list[int]] = []
        ids = [f"item-{n}" for n in range(500)]
        threads = [
            threading.Thread(target=lambda: found.append(index.intern(ids).tolist())) for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(index) == 500
        assert all(rows == found[0] for rows in found)


class TestCatalog:
    def test_a_published_state_never_changes(self) -> None:
        store = CatalogStore(ItemIndex())
        store.stage([CatalogItem("a", brand="X", price=1.0)], [])
        before = store.publish()
        store.stage([CatalogItem("a", brand="Y", price=2.0), CatalogItem("b", brand="X")], [])
        after = store.publish()
        assert before.numbers("price").tolist() == [1.0]
        assert before.posting(("brand", "X")).rows.tolist() == [0]
        assert after.numbers("price")[0] == 2.0
        assert after.posting(("brand", "X")).rows.tolist() == [1]
        assert after.version == before.version + 1
        assert store.publish() is after

    def test_a_new_snapshot_takes_effect_when_it_is_complete(self) -> None:
        store = CatalogStore(ItemIndex())
        store.stage([CatalogItem("kept"), CatalogItem("gone"), CatalogItem("sold", withdrawn=True)], [])
        store.complete_snapshot()
        store.publish()
        store.begin_snapshot()
        store.stage([CatalogItem("kept")], [])
        during = store.publish()
        assert set(during.items) == {0, 1, 2}
        assert during.flags("withdrawn").tolist() == [False, False, True]
        store.stage([CatalogItem("sold", withdrawn=True)], [])
        store.complete_snapshot()
        assert store.publish().flags("deleted").tolist() == [False, True, False]

    @settings(max_examples=100, deadline=None)
    @given(
        st.lists(
            st.tuples(
                st.sampled_from("abcd"),
                st.none()
                | st.builds(
                    CatalogItem,
                    item_id=st.just(""),
                    brand=st.sampled_from(["", "X", "Y"]),
                    tags=st.lists(st.sampled_from("pq"), unique=True).map(tuple),
                    numbers=st.dictionaries(st.sampled_from("k"), st.sampled_from([0.0, 1.0, 2.0])),
                    price=st.none() | st.sampled_from([1.0, 2.0]),
                ),
                st.booleans(),
            ),
            max_size=20,
        )
    )
    def test_changes_one_by_one_end_as_the_last_state_at_once(
        self, changes: list[tuple[str, CatalogItem | None, bool]]
    ) -> None:
        from dataclasses import replace

        index = ItemIndex()
        index.intern("abcd")
        stepwise, at_once = CatalogStore(index), CatalogStore(index)
        final: dict[str, CatalogItem] = {}
        for item_id, item, publishes in changes:
            if item is None:
                stepwise.stage([], [item_id])
                final.pop(item_id, None)
            else:
                final[item_id] = replace(item, item_id=item_id)
                stepwise.stage([final[item_id]], [])
            if publishes:
                stepwise.publish()
        at_once.stage(final.values(), [])
        one, other = stepwise.publish(), at_once.publish()
        assert one.items == other.items
        assert np.array_equal(one.numbers("price"), other.numbers("price"), equal_nan=True)
        assert one.postings.keys() == other.postings.keys()
        for key, posting in one.postings.items():
            assert posting.rows.tolist() == other.postings[key].rows.tolist()
            if posting.values is not None:
                assert posting.values.tolist() == other.postings[key].values.tolist()
