"""Every reason for absence: Explain names it, alone, and it goes when its cause does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from shopkeeper.profile.v1 import item_pb2
from shopkeeper.recommend.v1 import recommend_service_pb2 as pb

from services.recommend.domain.recommendation import Verdict
from shared.event_kinds import EventKind
from tests.recommend.shop import Shop, eventually, item
from tests.recommend.test_rules import IDS, VECTORS, create, record

ABSENT = "i3"


@dataclass(frozen=True)
class Case:
    """How an item comes to be missing.

    Attributes:
        record: what the catalogue says of it.
        event: what the shopper has done with it.
        request: fields of the request.
        rule: of the serving config.
    """

    record: Any = None
    event: EventKind | None = None
    request: dict[str, Any] = field(default_factory=dict)
    rule: dict[str, Any] | None = None
    item_id: str = ABSENT


CASES = {
    Verdict.NOT_IN_CATALOG: Case(record=item_pb2.Item(item_id=ABSENT, placeholder=True)),
    Verdict.WITHDRAWN: Case(record=record(3, withdrawn=True)),
    Verdict.OUT_OF_STOCK: Case(record=record(3, stock_quantity=0)),
    Verdict.NOT_AVAILABLE_NOW: Case(record=record(3, available_until=Timestamp(seconds=1))),
    Verdict.EXCLUDED: Case(request={"exclude_item_ids": [ABSENT]}),
    Verdict.IN_CART: Case(request={"cart_item_ids": [ABSENT]}),
    Verdict.OWNED: Case(event=EventKind.PURCHASE),
    Verdict.FILTER_EXPRESSION: Case(request={"filter": 'NOT brand: ANY("b0")'}),
    Verdict.CONTEXT_ITEM: Case(request={"context_item_id": ABSENT, "placement": "item_page"}),
    Verdict.RULE: Case(rule={"exclude": {"filter": 'brand: ANY("b0")'}}),
    Verdict.NO_SCORE: Case(record=item("brand-new"), item_id="brand-new"),
    Verdict.SEEN: Case(event=EventKind.ITEM_VIEW),
}


@pytest.fixture
def shop(make_shop: Callable[..., Shop]) -> Shop:
    shop = make_shop(configuration_poll_seconds=0.02)
    shop.publish(IDS, VECTORS)
    shop.profile.upsert(*(record(n) for n in range(12)))
    return shop.start()


def test_every_verdict_has_a_case() -> None:
    assert set(CASES) == set(Verdict) - {Verdict.PASSED}


@pytest.mark.parametrize("verdict", CASES, ids=lambda verdict: verdict.name.lower())
def test_an_absence_has_its_verdict_and_its_sentence(shop: Shop, verdict: Verdict) -> None:
    case = CASES[verdict]
    create(shop, {} if case.rule is None else {"r": case.rule})

    def explained(**fields: Any) -> pb.ExplainResponse:
        request = pb.RecommendRequest(serving_config="mine", user_id="ann", page_size=5, **fields)
        return shop.stub.Explain(pb.ExplainRequest(request=request, item_id=case.item_id), timeout=5)

    if case.rule is None and case.item_id == ABSENT:
        before = explained()
        assert before.recommended, "nothing speaks against it yet"
        assert list(before.verdicts) == [Verdict.PASSED]
    if case.record is not None:
        shop.profile.upsert(case.record)
    if case.event is not None:
        shop.profile.record(shop.user_key("ann"), (ABSENT, case.event))

    def is_told() -> bool:
        try:
            return verdict in explained(**case.request).verdicts
        except grpc.RpcError:
            # A new item that has not arrived yet.
            return False

    eventually(is_told)
    found = explained(**case.request)
    # What was bought, or is looked at now, was seen too.
    seen_too = verdict in (Verdict.OWNED, Verdict.CONTEXT_ITEM)
    assert set(found.verdicts) <= ({verdict, Verdict.SEEN} if seen_too else {verdict})
    assert not found.recommended
    assert found.findings[0].startswith("Not recommended: ")
    assert case.item_id not in [
        entry.item_id
        for entry in shop.stub.Recommend(
            pb.RecommendRequest(serving_config="mine", user_id="ann", page_size=5, **case.request), timeout=5
        ).items
    ]


def test_an_item_that_is_only_overtaken_is_told_where_the_page_ends(shop: Shop) -> None:
    create(shop, {})
    request = pb.RecommendRequest(serving_config="mine", page_size=2)
    found = shop.stub.Explain(pb.ExplainRequest(request=request, item_id=ABSENT), timeout=5)
    assert (found.recommended, list(found.verdicts), found.position) == (False, [Verdict.PASSED], 4)
    assert found.score < found.page_threshold_score
    assert "nothing speaks against it" in found.findings[0]
