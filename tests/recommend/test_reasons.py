"""A reason is true: take its cause away, and what it claims goes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from shopkeeper.recommend.v1 import recommend_service_pb2 as pb
from shopkeeper.recommend.v1 import recommendation_pb2

from tests.recommend.shop import Shop
from tests.recommend.test_service import recommend

Reason = recommendation_pb2.Reason
ITEMS = [f"item-{n}" for n in range(40)]
MUTE = "mute"
"""Nothing follows it: in the place of an event it leaves the others their ages, and counts for nothing."""
COUNTED = (Reason.KIND_BECAUSE_YOU_VIEWED, Reason.KIND_BECAUSE_YOU_BOUGHT, Reason.KIND_BECAUSE_YOU_SAVED)


@pytest.fixture
def shop(make_shop: Callable[..., Shop]) -> Shop:
    random = np.random.default_rng(7)
    pairs = {
        (ITEMS[a], ITEMS[b]): float(random.uniform(0.01, 0.9))
        for a, b in random.integers(0, 40, (150, 2)).tolist()
        if a != b
    }
    shop = make_shop()
    shop.publish([*ITEMS, MUTE], random.normal(size=(41, 4)).astype(np.float32), pairs=pairs)
    return shop.start()


def counted_part(shop: Shop, item_id: str, events: list[dict[str, str]]) -> float:
    request = pb.RecommendRequest(context_events=events, page_size=100)  # type: ignore[arg-type]
    explained = shop.stub.Explain(pb.ExplainRequest(request=request, item_id=item_id), timeout=5)
    source = recommendation_pb2.CANDIDATE_SOURCE_COOCCURRENCE
    return sum(entry.contribution for entry in explained.source_scores if entry.source == source)


def test_without_the_event_that_a_reason_names_the_score_is_lower_by_what_it_says(shop: Shop) -> None:
    random = np.random.default_rng(11)
    checked = {"sequence": 0, "counted": 0}
    for _ in range(25):
        events = [{"item_id": ITEMS[n]} for n in random.choice(40, int(random.integers(1, 6)), replace=False)]
        answer = recommend(shop, context_events=events, page_size=100, include_explanations=True)
        assert len(answer.items) >= 40 - len(events)
        for entry in answer.items:
            if {"item_id": entry.item_id} in events or entry.item_id == MUTE:
                continue
            (reason,) = entry.reasons
            if not reason.source_item_id:
                # No event of which the score would miss anything: none may be named.
                continue
            rest = [event for event in events if event["item_id"] != reason.source_item_id]
            assert len(rest) == len(events) - 1, "the cause is an event of the shopper"
            if not rest:
                continue
            if reason.kind == Reason.KIND_SEQUENCE and checked["sequence"] < 200:
                without = recommend(shop, context_events=rest, page_size=100)
                score = {other.item_id: other.score for other in without.items}[entry.item_id]
                assert entry.score - score == pytest.approx(reason.contribution, abs=2e-4)
                assert reason.contribution > 0
                checked["sequence"] += 1
            elif reason.kind in COUNTED and checked["counted"] < 60:
                muted = [
                    {"item_id": MUTE} if event["item_id"] == reason.source_item_id else event
                    for event in events
                ]
                fallen = counted_part(shop, entry.item_id, events) - counted_part(shop, entry.item_id, muted)
                assert fallen == pytest.approx(reason.contribution, abs=2e-4)
                checked["counted"] += 1
    assert checked["sequence"] > 50
    assert checked["counted"] > 30
