"""Items by what they are: vectors of words, traits and pictures, as profile streams them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shopkeeper.recommend.v1 import recommend_service_pb2 as pb
from shopkeeper.recommend.v1 import recommendation_pb2

from services.recommend.domain.catalog import CatalogItem, CatalogStore
from services.recommend.domain.content_vectors import NO_VECTORS, ContentVectorStore
from services.recommend.domain.history import History
from services.recommend.domain.item_index import ItemIndex
from services.recommend.use_cases.weighted_sum import content_scores
from shared.event_kinds import EventKind
from tests.recommend.shop import Shop, causes, eventually, ids, item
from tests.recommend.test_rules import create, mine
from tests.recommend.test_service import IDS, VECTORS
from tests.recommend.test_weighted_sum import SUM, sources

Reason = recommendation_pb2.Reason
# Leaves and leather: what the model learnt is of two dimensions as well, and has nothing to do with these.
CONTENT = {"tea-1": [1.0, 0.0], "tea-2": [0.8, 0.6], "tea-3": [0.6, 0.8]} | {
    f"shoe-{n}": [0.0, 1.0] for n in (1, 2, 3)
}


@pytest.fixture
def shop(make_shop: Callable[..., Shop]) -> Shop:
    shop = make_shop()
    shop.publish(IDS, VECTORS)
    shop.profile.vectors.update(CONTENT)
    shop.profile.upsert(*(item(item_id) for item_id in IDS))
    return shop.start()


def similar(shop: Shop, item_id: str, **fields: object) -> pb.SimilarItemsResponse:
    request = pb.SimilarItemsRequest(item_id=item_id, include_explanations=True, **fields)  # type: ignore[arg-type]
    return shop.stub.SimilarItems(request, timeout=5)


def arrives(shop: Shop, item_id: str, vector: list[float]) -> None:
    shop.profile.vectors[item_id] = vector
    shop.profile.upsert(item(item_id))
    eventually(lambda: shop.service.catalog_store.vectors.current.count == len(shop.profile.vectors))  # type: ignore[union-attr]


def test_a_new_item_is_similar_to_what_it_is_like_and_says_so(shop: Shop) -> None:
    arrives(shop, "tea-new", [0.96, 0.28])
    answer = similar(shop, "tea-1")
    entry = next(entry for entry in answer.items if entry.item_id == "tea-new")
    assert entry.score == pytest.approx(0.96, abs=1e-6)
    (reason,) = entry.reasons
    assert (reason.kind, reason.source_item_id) == (Reason.KIND_SIMILAR_TO, "tea-1")
    assert reason.contribution == pytest.approx(entry.score)


def test_what_resembles_a_new_item_is_found_by_vector(shop: Shop) -> None:
    arrives(shop, "tea-new", [1.0, 0.0])
    answer = similar(shop, "tea-new")
    assert ids(answer) == ["tea-1", "tea-2", "tea-3"], "shoes have nothing in common with it"
    assert [entry.score for entry in answer.items] == pytest.approx([1.0, 0.8, 0.6], abs=1e-6)
    assert {reason.source_item_id for entry in answer.items for reason in entry.reasons} == {"tea-new"}
    assert causes(answer) == {"ITEM_UNKNOWN_TO_MODEL"}


def test_a_new_item_is_a_candidate_by_its_vector(shop: Shop) -> None:
    create(shop, {}, scorer=SUM, sources=sources(content=1, popular=0.01))
    shop.profile.record(shop.user_key("ann"), ("tea-1", EventKind.ITEM_VIEW))
    arrives(shop, "tea-new", [0.96, 0.28])
    eventually(lambda: ids(mine(shop, user_id="ann", page_size=1)) == ["tea-new"])
    first = mine(shop, user_id="ann", page_size=1, include_explanations=True).items[0]
    assert [reason.kind for reason in first.reasons] == [Reason.KIND_SIMILAR_TO]
    # Another content, another place.
    shop.profile.vectors["tea-new"] = [0.28, 0.96]
    shop.profile.upsert(item("tea-new"))
    eventually(lambda: ids(mine(shop, user_id="ann", page_size=2)) == ["tea-2", "tea-3"])


def test_a_deleted_item_is_nobody_s_likeness(shop: Shop) -> None:
    arrives(shop, "tea-new", [1.0, 0.0])
    shop.profile.delete("tea-new")
    eventually(lambda: "tea-new" not in ids(similar(shop, "tea-1")))
    assert shop.service.catalog_store.vectors.current.count == len(CONTENT)  # type: ignore[union-attr]


def test_vectors_of_another_space_void_those_before(shop: Shop) -> None:
    shop.profile.vector_version = "space-2"
    shop.profile.vectors = {"tea-1": [0.0, 1.0, 0.0], "hat": [0.0, 0.6, 0.8]}
    shop.profile.upsert(item("tea-1"), item("hat"))
    vectors = shop.service.catalog_store.vectors  # type: ignore[union-attr]
    eventually(lambda: (vectors.current.version, vectors.current.count) == ("space-2", 2))
    arrives(shop, "tea-new", [0.0, 1.0, 0.0])
    assert ids(similar(shop, "tea-new")) == ["tea-1", "hat"]


def test_a_shop_that_wants_none_asks_for_none(make_shop: Callable[..., Shop]) -> None:
    shop = make_shop(content_vector_items=0)
    shop.profile.vectors.update(CONTENT)
    shop.profile.upsert(*(item(item_id) for item_id in IDS))
    shop.start()
    assert shop.service.catalog_store.vectors.current is NO_VECTORS  # type: ignore[union-attr]


def test_a_catalogue_beyond_the_limit_keeps_none() -> None:
    store = ContentVectorStore(2)
    store.put("s", np.array([0, 1], np.int32), [[1.0, 0.0], [0.0, 1.0]])
    assert store.current.count == 2
    store.put("s", np.array([2], np.int32), [[1.0, 0.0]])
    assert (store.current, store.wanted) == (NO_VECTORS, False)
    store.put("s", np.array([0], np.int32), [[1.0, 0.0]])
    assert store.current is NO_VECTORS


@settings(max_examples=100, deadline=None)
@given(
    described=st.integers(2, 20),
    seen=st.lists(st.integers(0, 19), min_size=1, max_size=14),
    seed=st.integers(0, 1000),
)
def test_scores_agree_with_a_loop_over_events_and_items(described: int, seen: list[int], seed: int) -> None:
    random = np.random.default_rng(seed)
    store = CatalogStore(ItemIndex(), max_vectors=100)
    store.stage([CatalogItem(f"i{n}", tags=("all",)) for n in range(described)], [])
    known = np.flatnonzero(random.random(described) < 0.8)
    vectors = random.normal(size=(len(known), 3))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    store.vectors.put("s", known.astype(np.int32), vectors.tolist())
    catalog = store.publish()
    vector_of = dict(zip(known.tolist(), vectors, strict=True))
    rows = np.array(seen, np.int32)
    found = content_scores(catalog, History(rows, np.full(len(rows), 3), np.arange(float(len(rows)))))
    newest = [row for row in seen[-10:] if row in vector_of]
    if not newest or len(known) < described / 2:
        return
    for row in range(described):
        naive = sum(
            0.8**age * float(vector_of[event] @ vector_of[row])
            for age, event in enumerate(reversed(newest))
            if row in vector_of
        )
        if row in seen[-10:] or naive <= 1e-6:
            assert found[row] == -np.inf or found[row] < 1e-5
        else:
            assert found[row] == pytest.approx(naive, abs=1e-5)
