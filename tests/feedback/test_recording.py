"""What is recorded, once, and what each row is told."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import psycopg
import pytest
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from shopkeeper.feedback.v1 import event_pb2, feedback_service_pb2

from shared.tokens import AttributionToken, ConsistencyToken, TokenSigner, Watermark, item_digests
from tests.feedback.conftest import (
    DUPLICATE,
    QUARANTINED,
    REJECTED,
    STORED,
    Shop,
    event,
    eventually,
    item_view,
    now_ms,
    uuid7,
)


def test_an_event_is_stored(shop: Shop) -> None:
    answer = shop.record(item_view(item_id="lamp"))
    assert [result.status for result in answer.results] == [STORED]
    assert answer.consistency_token
    assert shop.sql("SELECT item_id, kind FROM feedback.events_v1", role="shopkeeper_profile") == [
        ("lamp", 3)
    ]


def test_every_kind_is_stored_and_seen_by_readers(shop: Shop) -> None:
    lines = [
        event_pb2.OrderLine(item_id="lamp", quantity=2, price_micros=9_990_000),
        event_pb2.OrderLine(item_id='so"f\\a, {x}', price_micros=0),
    ]
    details = {
        "search": event_pb2.Search(query="red lamp", result_count=3),
        "page_view": event_pb2.PageView(
            placement="home",
            impressions=[event_pb2.Impression(item_id="a"), event_pb2.Impression(item_id="b")],
        ),
        "item_view": event_pb2.ItemView(item_id="a", dwell_seconds=3.5, price_micros=1, currency_code="EUR"),
        "add_to_cart": event_pb2.AddToCart(item_id="a", quantity=2),
        "remove_from_cart": event_pb2.RemoveFromCart(item_id="a"),
        "purchase": event_pb2.Purchase(order_id="o1", lines=lines, currency_code="EUR"),
        "item_return": event_pb2.ItemReturn(order_id="o1", lines=lines[:1], currency_code="EUR"),
        "rating": event_pb2.Rating(item_id="a", stars=4),
        "review": event_pb2.Review(item_id="a", text="Schön", stars=5),
        "wish_list": event_pb2.WishList(item_id="a"),
        "share": event_pb2.Share(item_id="a", medium="link"),
        "recommendation_click": event_pb2.RecommendationClick(item_id="a", position=2),
        "ad_impression": event_pb2.AdImpression(campaign_id="c", item_id="a"),
        "ad_click": event_pb2.AdClick(campaign_id="c", position=1),
        "support_question": event_pb2.SupportQuestion(text="Where is it?"),
        "support_verdict": event_pb2.SupportVerdict(answer_id="x", helpful=True),
        "survey": event_pb2.Survey(csat=5, nps=9, comment="ok"),
    }
    events = [event(**{name: detail}) for name, detail in details.items()]
    answer = shop.record(*events)
    assert [(result.status, result.message) for result in answer.results] == [(STORED, "")] * 17
    rows = shop.sql(
        "SELECT kind, line, item_id, quantity, price_micros, currency_code, value FROM feedback.events_v1 "
        "ORDER BY kind, line"
    )
    assert [row[0] for row in rows] == [1, 2, 3, 4, 5, 6, 6, *range(7, 18)]
    assert (6, 0, "lamp", 2.0, 9_990_000, "EUR", None) in rows
    assert (6, 1, 'so"f\\a, {x}', 1.0, 0, "EUR", None) in rows
    assert (3, 0, "a", None, 1, "EUR", 3.5) in rows


LINE = event_pb2.OrderLine(item_id="a")
# The least that each kind says, and what of it is required: the table of docs/feedback.md.
LEAST: dict[str, tuple[Message, dict[str, str]]] = {
    "search": (event_pb2.Search(query="lamp"), {"query": "query"}),
    "page_view": (event_pb2.PageView(), {}),
    "item_view": (event_pb2.ItemView(item_id="a"), {"item_id": "item_id"}),
    "add_to_cart": (event_pb2.AddToCart(item_id="a"), {"item_id": "item_id"}),
    "remove_from_cart": (event_pb2.RemoveFromCart(item_id="a"), {"item_id": "item_id"}),
    "purchase": (event_pb2.Purchase(lines=[LINE]), {"lines": "lines"}),
    "item_return": (event_pb2.ItemReturn(lines=[LINE]), {"lines": "lines"}),
    "rating": (event_pb2.Rating(item_id="a", stars=4), {"item_id": "item_id", "stars": "stars"}),
    "review": (event_pb2.Review(item_id="a", text="fine"), {"item_id": "item_id", "text": "text"}),
    "wish_list": (event_pb2.WishList(item_id="a"), {"item_id": "item_id"}),
    "share": (event_pb2.Share(item_id="a"), {"item_id": "item_id"}),
    "recommendation_click": (event_pb2.RecommendationClick(item_id="a"), {"item_id": "item_id"}),
    "ad_impression": (event_pb2.AdImpression(campaign_id="c"), {"campaign_id": "campaign_id"}),
    "ad_click": (event_pb2.AdClick(campaign_id="c"), {"campaign_id": "campaign_id"}),
    "support_question": (event_pb2.SupportQuestion(text="where?"), {"text": "text"}),
    "support_verdict": (
        event_pb2.SupportVerdict(answer_id="a", helpful=False),
        {"answer_id": "answer_id", "helpful": "helpful"},
    ),
    # One of the two answers; without either the first is asked for.
    "survey": (event_pb2.Survey(nps=0), {"nps": "csat"}),
}


def test_each_kind_is_stored_with_the_least_it_needs_and_refused_without_any_of_it(shop: Shop) -> None:
    assert set(LEAST) == {field.name for field in event_pb2.Event.DESCRIPTOR.oneofs_by_name["detail"].fields}
    for kind, (least, required) in LEAST.items():
        events, paths = [event(**{kind: least})], []
        for field, named in required.items():
            lacking = type(least)()
            lacking.CopyFrom(least)
            lacking.ClearField(field)
            events.append(event(**{kind: lacking}))
            paths.append(f"events[{len(paths) + 1}].{kind}.{named}")
        whole, *refused = shop.record(*events).results
        assert whole.status == STORED, (kind, whole.message)
        assert [result.status for result in refused] == [REJECTED] * len(required), kind
        assert {result.reason for result in refused} <= {event_pb2.EVENT_REASON_REQUIRED}
        assert [result.field for result in refused] == paths
    assert shop.count() == len(LEAST) == 17


def test_a_retry_is_a_duplicate(shop: Shop) -> None:
    first = item_view()
    assert shop.statuses(first) == [STORED]
    assert shop.statuses(first, item_view()) == [DUPLICATE, STORED]
    assert shop.count() == 2


def test_a_retry_of_a_plain_id_is_a_duplicate(shop: Shop) -> None:
    at = Timestamp(seconds=1_700_000_000)
    assert shop.statuses(item_view(event_id="order-17", occurred_at=at)) == [STORED]
    assert shop.statuses(item_view(event_id="order-17", occurred_at=at)) == [DUPLICATE]
    assert shop.count() == 1


def test_the_same_id_with_another_payload_is_rejected(shop: Shop) -> None:
    event_id = uuid7()
    assert shop.statuses(item_view(event_id=event_id, item_id="a")) == [STORED]
    result = shop.record(item_view(event_id=event_id, item_id="b")).results[0]
    assert (result.status, result.reason) == (REJECTED, event_pb2.EVENT_REASON_PAYLOAD_CONFLICT)
    assert result.field == "events[0].event_id"
    assert shop.sql("SELECT item_id FROM feedback.events") == [("a",)]


def test_duplicates_within_one_batch_are_stored_once(shop: Shop) -> None:
    twice, event_id = item_view(), uuid7()
    answer = shop.statuses(
        twice,
        twice,
        item_view(event_id=event_id, item_id="a"),
        item_view(event_id=event_id, item_id="b"),
        item_view(event_id=event_id, item_id="a"),
    )
    assert answer == [STORED, DUPLICATE, STORED, REJECTED, DUPLICATE]
    assert shop.count() == 2


def test_callers_that_send_the_same_events_at_once_store_them_once(shop: Shop) -> None:
    events = [item_view() for _ in range(50)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: shop.statuses(*events), range(8)))
    for row in range(50):
        assert sorted(answer[row] for answer in answers) == [STORED] + [DUPLICATE] * 7
    assert shop.count() == 50


def test_the_time_of_an_event_defaults_to_that_of_its_id(shop: Shop) -> None:
    shop.record(item_view(event_id=uuid7(1_600_000_000_123)))
    (moment,) = shop.sql("SELECT occurred_at FROM feedback.events")[0]
    assert round(moment.timestamp() * 1000) == 1_600_000_000_123


def test_a_quarantined_event_is_kept_but_not_shown(shop: Shop) -> None:
    ahead = Timestamp(seconds=now_ms() // 1000 + 3600)
    result = shop.record(item_view(occurred_at=ahead)).results[0]
    assert (result.status, result.reason) == (QUARANTINED, event_pb2.EVENT_REASON_CLOCK_AHEAD)
    assert result.field == "events[0].occurred_at"
    assert shop.count() == 1
    assert shop.sql("SELECT count(*) FROM feedback.events_v1") == [(0,)]
    assert shop.sql("SELECT count(*) FROM feedback.training_events_v1") == [(0,)]


def test_an_event_of_a_distant_time_is_not_lost(shop: Shop) -> None:
    assert shop.statuses(item_view(event_id=uuid7(253_000_000_000_000)), item_view(event_id=uuid7(1))) == [
        QUARANTINED,
        QUARANTINED,
    ]
    assert shop.sql("SELECT count(*) FROM feedback.events_default") == [(2,)]


def token_for(shop: Shop, *items: str, issued_at_ms: int | None = None, variant: str = "") -> str:
    token = AttributionToken(
        b"12345678",
        now_ms() if issued_at_ms is None else issued_at_ms,
        "home",
        "default",
        "v1",
        variant,
        item_digests(items),
        np.array([0.5, 0.25][: len(items)], dtype=np.float32),
    )
    return token.sign(TokenSigner.from_directory(shop.keys))


def test_an_attribution_token_credits_the_recommendation(shop: Shop) -> None:
    click = event(
        attribution_token=token_for(shop, "sofa", "lamp"),
        recommendation_click=event_pb2.RecommendationClick(item_id="lamp", position=9),
    )
    assert shop.statuses(click) == [STORED]
    row = shop.sql(
        "SELECT recommendation_id, placement, serving_config, model_version, variant, position, propensity "
        "FROM feedback.events"
    )
    # The token's position counts, not the client's.
    assert row == [(b"12345678", "home", "default", "v1", None, 2, 0.25)]


@pytest.mark.parametrize("fault", ["forged", "expired"])
def test_a_bad_token_costs_the_credit_but_not_the_event(shop: Shop, fault: str) -> None:
    token = token_for(shop, "lamp", issued_at_ms=0 if fault == "expired" else None)
    if fault == "forged":
        token = ("A" if token[0] != "A" else "B") + token[1:]
    result = shop.record(item_view(attribution_token=token)).results[0]
    reasons = {
        "forged": event_pb2.EVENT_REASON_ATTRIBUTION_INVALID,
        "expired": event_pb2.EVENT_REASON_ATTRIBUTION_EXPIRED,
    }
    assert (result.status, result.reason) == (STORED, reasons[fault])
    assert shop.sql("SELECT item_id, recommendation_id FROM feedback.events") == [("lamp", None)]


def test_the_consistency_token_names_the_commit(shop: Shop) -> None:
    signer = TokenSigner.from_directory(shop.keys)
    before = Watermark.parse_pg(shop.sql("SELECT pg_current_snapshot()::text")[0][0])
    first = item_view()
    token = ConsistencyToken.verify(signer, shop.record(first).consistency_token)
    after = Watermark.parse_pg(shop.sql("SELECT pg_current_snapshot()::text")[0][0])
    assert not before.covers(token)
    assert after.covers(token)
    # A duplicate is as durable: its token is covered no sooner than the row itself.
    again = ConsistencyToken.verify(signer, shop.record(first).consistency_token)
    assert again.xid >= token.xid


def test_nothing_durable_means_no_token(shop: Shop) -> None:
    assert shop.record(item_view(user_id="")).consistency_token == ""


def test_a_batch_that_is_too_large_is_refused_whole(shop: Shop) -> None:
    with pytest.raises(grpc.RpcError) as failure:
        shop.record(*[item_view()] * 1001)
    assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_stream_acknowledges_each_batch_in_order(shop: Shop) -> None:
    def batches():  # type: ignore[no-untyped-def]
        for number in range(20):
            yield feedback_service_pb2.StreamEventsRequest(
                batch_number=number, events=[item_view(), item_view(user_id="" if number == 7 else "ada")]
            )

    answers = list(shop.stub.StreamEvents(batches(), timeout=30))
    assert [answer.batch_number for answer in answers] == list(range(20))
    assert [result.status for result in answers[7].results] == [STORED, REJECTED]
    assert shop.count() == 39


def test_an_error_in_mid_stream_keeps_its_code_and_what_was_acknowledged(shop: Shop) -> None:
    def batches():  # type: ignore[no-untyped-def]
        yield feedback_service_pb2.StreamEventsRequest(batch_number=1, events=[item_view()])
        yield feedback_service_pb2.StreamEventsRequest(batch_number=2)

    stream = shop.stub.StreamEvents(batches(), timeout=30)
    assert next(stream).batch_number == 1
    with pytest.raises(grpc.RpcError) as failure:
        next(stream)
    assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_readers_are_woken_after_a_commit_and_not_for_each(shop: Shop) -> None:
    with psycopg.connect(shop.url, autocommit=True) as listener:
        listener.execute("LISTEN feedback_log")
        start = time.monotonic()
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda _: shop.record(item_view()), range(60)))
        seen = eventually(lambda: list(listener.notifies(timeout=0.5)))
        elapsed = time.monotonic() - start
        assert 1 <= len(seen) <= elapsed / 0.02 + 1
