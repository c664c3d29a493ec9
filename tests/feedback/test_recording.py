"""What is recorded, once, and what each row is told."""

from __future__ import annotations

from tests.feedback.conftest import DUPLICATE, REJECTED, STORED, Shop, event, item_view, uuid7

from shopkeeper.feedback.v1 import event_pb2


def test_an_event_is_stored(shop: Shop) -> None:
    answer = shop.record(item_view(item_id="lamp"))
    assert [result.status for result in answer.results] == [STORED]
    assert answer.consistency_token
    assert shop.sql("SELECT item_id, kind FROM feedback.events_v1", role="shopkeeper_profile") == [("lamp", 3)]


def test_every_kind_is_stored_and_seen_by_readers(shop: Shop) -> None:
    lines = [
        event_pb2.OrderLine(item_id="lamp", quantity=2, price_micros=9_990_000),
        event_pb2.OrderLine(item_id='so"f\\a, {x}', price_micros=0),
    ]
    details = {
        "search": event_pb2.Search(query="red lamp", result_count=3),
        "page_view": event_pb2.PageView(
            placement="home", impressions=[event_pb2.Impression(item_id="a"), event_pb2.Impression(item_id="b")]
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


def test_a_retry_is_a_duplicate(shop: Shop) -> None:
    first = item_view()
    assert shop.statuses(first) == [STORED]
    assert shop.statuses(first, item_view()) == [DUPLICATE, STORED]
    assert shop.count() == 2


def test_the_same_id_with_another_payload_is_rejected(shop: Shop) -> None:
    event_id = uuid7()
    assert shop.statuses(item_view(event_id=event_id, item_id="a")) == [STORED]
    result = shop.record(item_view(event_id=event_id, item_id="b")).results[0]
    assert (result.status, result.reason) == (REJECTED, event_pb2.EVENT_REASON_PAYLOAD_CONFLICT)
    assert result.field == "events[0].event_id"
    assert shop.sql("SELECT item_id FROM feedback.events") == [("a",)]
