"""Events that name an item which the catalogue does not know are stored, and reported."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
import pytest
from shopkeeper.feedback.v1 import event_pb2, feedback_service_pb2
from shopkeeper.profile.v1 import catalog_service_pb2, catalog_service_pb2_grpc, item_pb2

from services.feedback.clients import Catalogue
from services.feedback.storage.unknown_items import PostgresUnknownItems
from services.feedback.use_cases import RecordEvents
from tests.feedback.conftest import QUARANTINED, STORED, Shop, event, item_view, now_ms, uuid7

UNKNOWN_ITEM = event_pb2.EVENT_REASON_UNKNOWN_ITEM


class Shelf(catalog_service_pb2_grpc.CatalogServiceServicer):
    """Items in pages of two."""

    def __init__(self, *items: str) -> None:
        self.items = list(items)

    def ListItems(
        self, request: catalog_service_pb2.ListItemsRequest, context: grpc.ServicerContext
    ) -> catalog_service_pb2.ListItemsResponse:
        start = int(request.page_token or 0)
        items = [item_pb2.Item(item_id=item) for item in self.items[start : start + 2]]
        rest = str(start + 2) if start + 2 < len(self.items) else ""
        return catalog_service_pb2.ListItemsResponse(items=items, next_page_token=rest)


def catalogue_of(
    shelf: Shelf, serve: Callable[..., grpc.Channel], shop: Shop, max_items: int = 100
) -> Catalogue:
    channel = serve(
        lambda server: catalog_service_pb2_grpc.add_CatalogServiceServicer_to_server(shelf, server)
    )
    catalogue = Catalogue(channel, 0, max_items)
    record_events: RecordEvents = shop.feedback.servicer._use_cases.record_events
    record_events._items = catalogue
    return catalogue


def reasons(shop: Shop, *events: event_pb2.Event) -> list[int]:
    results = shop.record(*events).results
    assert {result.status for result in results} == {STORED}
    return [result.reason for result in results]


def order(*items: str) -> event_pb2.Event:
    return event(purchase=event_pb2.Purchase(lines=[event_pb2.OrderLine(item_id=item) for item in items]))


def test_an_event_of_an_unknown_item_is_stored_and_reported(
    shop: Shop, serve: Callable[..., grpc.Channel]
) -> None:
    shelf = Shelf("lamp", "sofa", "bed")
    catalogue = catalogue_of(shelf, serve, shop)
    assert reasons(shop, item_view(item_id="chair")) == [0]
    catalogue.read()
    page = event(page_view=event_pb2.PageView(impressions=[event_pb2.Impression(item_id="chair")]))
    search = event(search=event_pb2.Search(query="chair"))
    batch = (item_view(), item_view(item_id="chair"), order("bed", "chair"), order("bed"), page, search)
    assert reasons(shop, *batch) == [0, UNKNOWN_ITEM, UNKNOWN_ITEM, 0, UNKNOWN_ITEM, 0]
    assert shop.count() == 7
    shelf.items.append("chair")
    catalogue.read()
    assert reasons(shop, item_view(item_id="chair")) == [0]


def test_what_keeps_an_event_from_readers_is_said_before_an_unknown_item(
    shop: Shop, serve: Callable[..., grpc.Channel]
) -> None:
    catalogue_of(Shelf("lamp"), serve, shop).read()
    ahead = item_view(item_id="chair", event_id=uuid7(now_ms() + 600_000))
    result = shop.record(ahead).results[0]
    assert (result.status, result.reason) == (QUARANTINED, event_pb2.EVENT_REASON_CLOCK_AHEAD)


def test_a_catalogue_that_is_empty_or_too_large_makes_nothing_unknown(
    shop: Shop, serve: Callable[..., grpc.Channel]
) -> None:
    catalogue_of(Shelf(), serve, shop).read()
    assert reasons(shop, item_view(item_id="chair")) == [0]
    catalogue_of(Shelf("a", "b", "c", "d"), serve, shop, max_items=3).read()
    assert reasons(shop, item_view(item_id="chair")) == [0]


# The list


class Comparison:
    """A catalogue, and the counting of what it does not know."""

    def __init__(self, shop: Shop, *known: str, page_rows: int = 100_000) -> None:
        self.known: frozenset[str] | None = frozenset(known) if known else None
        self._store = PostgresUnknownItems(shop.feedback.database, lambda: self.known, page_rows=page_rows)

    def compare(self) -> None:
        while self._store.step():
            pass


def page_of_names(shop: Shop, **fields: Any) -> feedback_service_pb2.ListUnknownItemsResponse:
    return shop.stub.ListUnknownItems(feedback_service_pb2.ListUnknownItemsRequest(**fields), timeout=10)


def listed(shop: Shop, **fields: Any) -> list[tuple[str, int]]:
    return [(item.item_id, item.event_count) for item in page_of_names(shop, **fields).unknown_items]


def page_view(*items: str) -> event_pb2.Event:
    return event(
        page_view=event_pb2.PageView(impressions=[event_pb2.Impression(item_id=item) for item in items])
    )


@pytest.mark.parametrize("page_rows", [1, 3, 100_000])
def test_every_unknown_item_is_listed_with_its_events_each_counted_once(shop: Shop, page_rows: int) -> None:
    comparison = Comparison(shop, "lamp", page_rows=page_rows)
    retried = item_view(item_id="chair")
    shop.record(retried, item_view(), order("chair", "chair", "bed"), page_view("lamp", "desk", "bed"))
    comparison.compare()
    shop.record(retried, item_view(item_id="chair"), event(search=event_pb2.Search(query="chair")))
    comparison.compare()
    comparison.compare()
    assert listed(shop) == [("chair", 3), ("bed", 2), ("desk", 1)]
    # The naive count.
    for item in page_of_names(shop).unknown_items:
        ((count, first, last),) = shop.sql(
            "SELECT count(*), min(received_at), max(received_at) FROM feedback.events "
            "WHERE %s = ANY (item_id || line_items || impression_items)",
            item.item_id,
        )
        assert item.event_count == count
        assert item.first_seen_time.ToMicroseconds() == round(first.timestamp() * 1e6)
        assert item.last_seen_time.ToMicroseconds() == round(last.timestamp() * 1e6)


def test_an_item_that_the_catalogue_learns_leaves_the_list(shop: Shop) -> None:
    comparison = Comparison(shop, "lamp")
    shop.record(item_view(item_id="chair"), item_view(item_id="bed"))
    comparison.compare()
    comparison.known = frozenset({"lamp", "chair"})
    comparison.compare()
    assert listed(shop) == [("bed", 1)]


def test_while_the_catalogue_cannot_be_read_nothing_is_missed(shop: Shop) -> None:
    comparison = Comparison(shop)
    shop.record(item_view(item_id="chair"))
    comparison.compare()
    answer = page_of_names(shop)
    assert (len(answer.unknown_items), answer.HasField("compared_time")) == (0, False)
    comparison.known = frozenset({"lamp"})
    comparison.compare()
    assert listed(shop) == [("chair", 1)]
    assert page_of_names(shop).HasField("compared_time")


def test_the_list_is_read_page_by_page_in_either_order(shop: Shop) -> None:
    for count, item in enumerate(("a", "b", "c", "d", "e"), 1):
        shop.record(*[item_view(item_id=item) for _ in range(1 + count % 3)])
    Comparison(shop, "lamp").compare()
    everything = {item: 1 + count % 3 for count, item in enumerate(("a", "b", "c", "d", "e"), 1)}
    by_count = sorted(everything.items(), key=lambda entry: (-entry[1], entry[0]))
    for order_, expected in ((0, by_count), (1, by_count), (2, sorted(everything.items()))):
        found: list[tuple[str, int]] = []
        token, pages = "", 0
        while token or not pages:
            answer = page_of_names(shop, page_size=2, page_token=token, order=order_)
            found += [(item.item_id, item.event_count) for item in answer.unknown_items]
            assert answer.total_size == 5
            token, pages = answer.next_page_token, pages + 1
        assert (found, pages) == (expected, 3)


@pytest.mark.parametrize("fields", [{"page_size": -1}, {"order": 7}, {"page_token": "x"}])
def test_a_listing_that_cannot_be_is_refused(shop: Shop, fields: dict[str, Any]) -> None:
    with pytest.raises(grpc.RpcError) as failure:
        page_of_names(shop, **fields)
    assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_token_of_one_order_does_not_go_on_in_another(shop: Shop) -> None:
    shop.record(item_view(item_id="a"), item_view(item_id="b"))
    Comparison(shop, "lamp").compare()
    token = page_of_names(shop, page_size=1).next_page_token
    with pytest.raises(grpc.RpcError) as failure:
        page_of_names(shop, page_token=token, order=2)
    assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT
