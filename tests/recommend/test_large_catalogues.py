"""A catalogue too large for a pass over all of it: searched, and as correct as a pass."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from shopkeeper.recommend.v1 import recommend_service_pb2 as pb

from services.recommend.domain.catalog import CatalogItem, CatalogStore
from services.recommend.domain.history import History
from services.recommend.domain.item_index import ItemIndex
from services.recommend.domain.live_counts import LiveCounts
from services.recommend.storage.search import ApproximateSearch
from services.recommend.use_cases import scoring
from services.recommend.use_cases.world import join
from shared.event_kinds import EventKind
from tests.recommend.shop import Shop, eventually, ids, item

MakeShop = Callable[..., Shop]
ITEMS = 3_000
DIMENSION = 16


def clustered(items: int, dimension: int, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    centres = random.normal(size=(max(10, items // 100), dimension))
    made = centres[random.integers(0, len(centres), items)] + 0.7 * random.normal(size=(items, dimension))
    return (made / 4).astype(np.float32)


@pytest.mark.parametrize("biased", [False, True])
def test_a_search_finds_ninety_nine_of_a_hundred(biased: bool) -> None:
    vectors_ID = clustered(20_000, 64)
    random = np.random.default_rng(1)
    bias_I = random.normal(size=20_000).astype(np.float32) * (0.3 if biased else 0)
    search = ApproximateSearch(vectors_ID, bias_I)
    found = 0
    for query_D in 2 * vectors_ID[random.choice(20_000, 50)] + random.normal(size=(50, 64)) * 0.2:
        query_D = query_D.astype(np.float32)
        exact = np.argsort(-(vectors_ID @ query_D + bias_I), kind="stable")[:100]
        best = search.best(query_D, 1_000)
        near = best[np.argsort(-(vectors_ID[best] @ query_D + bias_I[best]))[:100]]
        found += len(set(near.tolist()) & set(exact.tolist()))
    assert found / 5_000 >= 0.99


def test_the_partition_is_estimated_from_the_best_and_a_sample() -> None:
    vectors_ID = clustered(20_000, 64)
    bias_I = np.zeros(20_000, np.float32)
    search = ApproximateSearch(vectors_ID, bias_I)
    for query_D in vectors_ID[:20] * 8:
        logits_I = vectors_ID @ query_D
        exact = float(np.logaddexp.reduce(logits_I.astype(np.float64)))
        best = search.best(query_D, 1_000)
        assert search.log_partition(query_D, logits_I[best]) == pytest.approx(exact, abs=0.1)


class TestServed:
    @pytest.fixture
    def shops(self, make_shop: MakeShop) -> tuple[Shop, Shop]:
        """One that searches, one that scores all, with the same model and catalogue."""
        names = [f"item-{n:04d}" for n in range(ITEMS)]
        vectors_ID = clustered(ITEMS, DIMENSION)
        random = np.random.default_rng(2)
        pairs = {
            (names[a], names[b]): float(w)
            for a, b, w in zip(
                random.integers(0, ITEMS, 6_000),
                random.integers(0, ITEMS, 6_000),
                random.random(6_000),
                strict=True,
            )
        }
        made = []
        for exact_search_items in (0, 50_000):
            shop = make_shop(exact_search_items=exact_search_items)
            shop.publish(names, vectors_ID, pairs=pairs)
            shop.profile.upsert(
                *(
                    item(name, price=float(n % 100), brand=f"b{n % 300}", category_path=[f"c{n % 7}"])
                    for n, name in enumerate(names)
                ),
                item("brand-new", brand="b1"),
            )
            shop.start()
            for shopper in range(5):
                events = [(names[int(n)], EventKind.ITEM_VIEW) for n in random.integers(0, ITEMS, 8)]
                shop.profile.record(shop.user_key(f"u{shopper}"), *events)
            eventually(lambda shop=shop: shop.service.profiles.state().entries == 5)  # type: ignore[misc]
            random = np.random.default_rng(2)
            random.integers(0, ITEMS, 6_000), random.integers(0, ITEMS, 6_000), random.random(6_000)
            made.append(shop)
        return made[0], made[1]

    def test_what_is_found_is_what_a_pass_over_all_finds(self, shops: tuple[Shop, Shop]) -> None:
        searched, exact = shops
        for shopper in range(5):
            for filter_text, least in (
                ("", 0.99),
                ("price < 50", 0.99),
                ('category: ANY("c3")', 0.99),
                # Few are left: all of them are scored, and the answer is the same to the last item.
                ('brand: ANY("b7")', 1.0),
                ('brand: ANY("b7", "b8") AND price > 90', 1.0),
            ):
                request = pb.RecommendRequest(user_id=f"u{shopper}", page_size=100, filter=filter_text)
                mine, theirs = searched.stub.Recommend(request), exact.stub.Recommend(request)
                assert len(mine.items) == len(theirs.items)
                assert not mine.degraded
                both = set(ids(mine)) & set(ids(theirs))
                assert len(both) >= least * len(theirs.items)
                scores = {entry.item_id: entry.score for entry in theirs.items}
                for entry in mine.items:
                    if entry.item_id in both and entry.item_id != "brand-new":
                        # Every score is off by the error of one estimate, the partition's.
                        assert entry.score == pytest.approx(scores[entry.item_id], abs=0.2)

    def test_pages_go_on_without_repeats(self, shops: tuple[Shop, Shop]) -> None:
        searched, _ = shops
        seen: list[str] = []
        token = ""
        for _ in range(5):
            answer = searched.stub.Recommend(
                pb.RecommendRequest(user_id="u1", page_size=100, page_token=token)
            )
            seen += ids(answer)
            token = answer.next_page_token
        assert len(seen) == len(set(seen)) == 500

    def test_reasons_name_what_the_score_came_from(self, shops: tuple[Shop, Shop]) -> None:
        searched, exact = shops
        request = pb.RecommendRequest(user_id="u2", page_size=20, include_explanations=True)
        mine, theirs = searched.stub.Recommend(request), exact.stub.Recommend(request)
        of_theirs = {entry.item_id: entry.reasons[0] for entry in theirs.items}
        agree = [
            entry.reasons[0].source_item_id == of_theirs[entry.item_id].source_item_id
            for entry in mine.items
            if entry.item_id in of_theirs
        ]
        assert sum(agree) >= 0.9 * len(agree)
        assert all(entry.reasons for entry in mine.items)

    def test_a_new_item_is_never_lost(self, shops: tuple[Shop, Shop]) -> None:
        searched, _ = shops
        request = pb.RecommendRequest(user_id="u1", page_size=100, filter='brand: ANY("b1")')
        assert ids(searched.stub.Recommend(request))[-1] == "brand-new"

    def test_explain_takes_the_pass_over_all(self, shops: tuple[Shop, Shop]) -> None:
        searched, _ = shops
        request = pb.RecommendRequest(user_id="u1", page_size=10)
        first = searched.stub.Recommend(request).items[0].item_id
        explanation = searched.stub.Explain(pb.ExplainRequest(item_id=first, request=request))
        assert explanation.recommended
        assert explanation.source_scores


def test_where_the_candidates_are_all_filtered_out_every_item_that_is_left_is_scored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A filter that excludes all that the search finds, and leaves more than are ever scored at once."""
    monkeypatch.setattr(scoring, "EXACT_ROWS", 10)
    index = ItemIndex()
    store = CatalogStore(index)
    store.stage([CatalogItem(f"i{n}") for n in range(2_000)], [])
    store.complete_snapshot()

    class Model:
        """Finds the first thousand, and nothing else."""

        item_count = 2_000
        rows_I = np.arange(2_000, dtype=np.int32)

        def read_history(self, history: History) -> History:
            return history

        def encode(self, history: History) -> np.ndarray:
            return np.zeros(2, np.float32)

        def candidates(self, query_D: np.ndarray, history: History, count: int) -> tuple[np.ndarray, float]:
            return np.arange(1_000), 0.0

        def indices_of(self, rows: np.ndarray) -> np.ndarray:
            return rows.astype(np.int64)

        def score_candidates(
            self, query_D: np.ndarray, history: History, indices: np.ndarray, p: float
        ) -> np.ndarray:
            return -indices.astype(np.float32)

    model = Model()
    world = join(model, store.publish())  # type: ignore[arg-type]
    eligible_R = np.arange(2_000) >= 1_500
    history = History(np.array([0], np.int32), np.array([3], np.int32), np.zeros(1))
    scores = scoring.searched_scores(
        world,
        model,  # type: ignore[arg-type]
        history,
        lambda: scoring.popular_scores(world, LiveCounts(), 0.0),
        eligible_R,
        100,
        np.empty(0, np.int32),
    )
    assert np.isfinite(scores.score_R[1_500:]).all()
    assert scores.rows_C is not None
    assert set(range(1_500, 2_000)) <= set(scores.rows_C.tolist())
