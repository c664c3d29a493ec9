"""Sources and weights as a serving config names them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from shopkeeper.recommend.v1 import recommend_service_pb2 as pb
from shopkeeper.recommend.v1 import recommendation_pb2 as words
from shopkeeper.recommend.v1.serving_config_pb2 import ServingConfig

from services.recommend.domain.catalog import CatalogItem, CatalogStore
from services.recommend.domain.history import History
from services.recommend.domain.item_index import ItemIndex
from services.recommend.use_cases.weighted_sum import content_scores
from shared.event_kinds import EventKind
from tests.recommend.shop import Shop, eventually, ids, item
from tests.recommend.test_rules import IDS, VECTORS, create, explain, mine, record
from tests.recommend.test_service import failure

SUM = ServingConfig.SCORER_WEIGHTED_SUM


@pytest.fixture
def shop(make_shop: Callable[..., Shop]) -> Shop:
    shop = make_shop()
    shop.publish(IDS, VECTORS)
    shop.profile.upsert(*(record(n) for n in range(12)))
    return shop.start()


def sources(**weights: float) -> list[dict[str, Any]]:
    return [
        {"source": words.CandidateSource.Value(f"CANDIDATE_SOURCE_{name.upper()}"), "weight": weight}
        for name, weight in weights.items()
    ]


def test_an_item_resembles_by_what_few_items_share() -> None:
    store = CatalogStore(ItemIndex())
    store.stage(
        [
            CatalogItem("seen", brand="rare", tags=("common",)),
            CatalogItem("same-brand", brand="rare"),
            CatalogItem("same-tag", tags=("common",)),
            *(CatalogItem(f"other-{n}") for n in range(4)),
            CatalogItem("same-tag-too", tags=("common",)),
        ],
        [],
    )
    catalog = store.publish()
    history = History(np.array([0], np.int32), np.array([3], np.int32), np.array([1.0]))
    # 8 items; 2 of the brand, 3 with the tag: log(1 + 8/2), log(1 + 8/3).
    expected = [-np.inf, np.log(5), np.log(11 / 3), *[-np.inf] * 4, np.log(11 / 3)]
    assert content_scores(catalog, history) == pytest.approx(expected)


def test_a_weight_says_what_the_first_of_a_source_is_worth(shop: Shop) -> None:
    create(shop, {}, scorer=SUM, sources=sources(popular=2, sequence=1))
    context = [{"item_id": "i5"}]
    answer = mine(shop, context_events=context, placement="search", page_size=12, include_trace=True)
    by_id = {entry.item_id: entry.score for entry in answer.items}
    assert len(by_id) == 12
    explained = explain(shop, "i3", context_events=context, placement="search")
    parts = {entry.source: entry for entry in explained.source_scores}
    assert set(parts) == {words.CANDIDATE_SOURCE_POPULAR, words.CANDIDATE_SOURCE_SEQUENCE}
    assert sum(part.contribution for part in parts.values()) == pytest.approx(by_id["i3"], abs=1e-6)
    # The most popular item gets the whole of its source's weight.
    first = explain(shop, "i0", context_events=context, placement="search").source_scores
    popular = next(part for part in first if part.source == words.CANDIDATE_SOURCE_POPULAR)
    assert (popular.rank, popular.contribution) == (1, pytest.approx(2.0))
    score = next(stage for stage in answer.trace.stages if stage.name == "score")
    assert score.detail == "popular 2 x 12 candidates, sequence 1 x 12 candidates"
    assert list(answer.trace.sources) == [words.CANDIDATE_SOURCE_POPULAR, words.CANDIDATE_SOURCE_SEQUENCE]


def test_a_new_item_is_found_by_what_it_is(shop: Shop) -> None:
    create(shop, {}, scorer=SUM, sources=sources(content=1, popular=0.01))
    fields: dict[str, Any] = {"context_events": [{"item_id": "i5"}], "include_explanations": True}
    # i5 is of brand b2; tea, as half of the shop is, says nothing.
    shop.profile.upsert(item("fresh", brand="b2", category_path=["all", "tea"]))
    eventually(lambda: set(ids(mine(shop, page_size=4, **fields))) == {"i2", "i8", "i11", "fresh"})
    reason = mine(shop, page_size=2, **fields).items[0].reasons[0]
    assert reason.kind == words.Reason.KIND_SIMILAR_TO


def test_counted_neighbours_name_the_event(make_shop: Callable[..., Shop]) -> None:
    shop = make_shop()
    shop.publish(IDS, VECTORS, pairs={("i1", "i7"): 0.5})
    shop.profile.upsert(*(record(n) for n in range(12)))
    shop.start()
    create(shop, {}, scorer=SUM, sources=sources(cooccurrence=1))
    shop.profile.record(shop.user_key("ann"), ("i1", EventKind.ITEM_VIEW))
    eventually(lambda: ids(mine(shop, user_id="ann", page_size=1)) == ["i7"])
    reason = mine(shop, user_id="ann", page_size=1, include_explanations=True).items[0].reasons[0]
    assert (reason.kind, reason.source_item_id) == (words.Reason.KIND_BECAUSE_YOU_VIEWED, "i1")


def test_without_any_candidate_what_is_popular_stands_in(shop: Shop) -> None:
    create(
        shop, {}, scorer=SUM, sources=sources(content=1, buy_again=1, cooccurrence=1, cosine=1, trending=1)
    )
    assert ids(mine(shop, page_size=3)) == ["i0", "i1", "i2"]


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"scorer": SUM}, "serving_config.sources"),
        ({"scorer": SUM, "sources": sources(popular=0)}, "serving_config.sources"),
        ({"scorer": SUM, "sources": sources(popular=1001)}, "serving_config.sources[0].weight"),
        ({"scorer": SUM, "sources": sources(popular=1) * 2}, "serving_config.sources[1].source"),
        ({"scorer": SUM, "sources": sources(rule=1)}, "serving_config.sources[0].source"),
        ({"sources": sources(popular=1)}, "serving_config.sources"),
    ],
)
def test_a_wrong_source_is_named(shop: Shop, fields: dict[str, Any], path: str) -> None:
    request = pb.CreateServingConfigRequest(serving_config_id="mine", serving_config=fields)
    error = failure(lambda: shop.stub.CreateServingConfig(request))
    assert error.reason == "INVALID_REQUEST"
    assert path in [violation.field for violation in error.violations]


def test_sources_survive_a_restart_and_an_update(shop: Shop) -> None:
    create(shop, {}, scorer=SUM, sources=sources(popular=1, new_items=3))
    got = shop.stub.GetServingConfig(pb.GetServingConfigRequest(serving_config_id="mine"))
    assert [(entry.weight, entry.candidate_limit) for entry in got.sources] == [(1, 1000), (3, 1000)]
    changed = ServingConfig(serving_config_id="mine", display_name="Renamed", etag=got.etag)
    request = pb.UpdateServingConfigRequest(serving_config=changed, update_mask={"paths": ["display_name"]})
    assert list(shop.stub.UpdateServingConfig(request).sources) == list(got.sources)
