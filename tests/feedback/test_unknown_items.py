"""Events that name an item which the catalogue does not know are stored, and reported."""

from __future__ import annotations

from collections.abc import Callable

import grpc
from shopkeeper.feedback.v1 import event_pb2
from shopkeeper.profile.v1 import catalog_service_pb2, catalog_service_pb2_grpc, item_pb2

from services.feedback.clients import Catalogue
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
