"""Pages of unknown items, to the domain and back."""

from __future__ import annotations

from shopkeeper.feedback.v1 import feedback_service_pb2

from services.feedback.converters.metrics import invalid
from services.feedback.converters.people import to_timestamp
from services.feedback.domain.unknown_items import UnknownItemOrder, UnknownItemsPage
from shared.tokens import TokenSigner, pack_page, unpack_page

DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE = 100, 1_000
_PAGE = "unknown_items_page"


def from_list_unknown_items(
    request: feedback_service_pb2.ListUnknownItemsRequest, signer: TokenSigner
) -> tuple[UnknownItemOrder, tuple[int, str] | None, int]:
    """Returns the order, after which (number of events, id) the page begins, and its size; raises InvalidInput."""
    if request.page_size < 0:
        raise invalid("page_size", "must be 0 to 1,000.")
    if request.order and int(request.order) not in UnknownItemOrder.__members__.values():
        raise invalid("order", "is no order of this contract.")
    order = UnknownItemOrder(request.order or UnknownItemOrder.EVENT_COUNT)
    size = min(request.page_size or DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE)
    if not request.page_token:
        return order, None, size
    in_order, count, item_id = unpack_page(signer.verify(_PAGE, request.page_token))
    if int(in_order) != order:
        raise invalid("page_token", "is of a listing in another order.")
    return order, (int(count), item_id), size


def to_list_unknown_items(
    order: UnknownItemOrder, page: UnknownItemsPage, signer: TokenSigner
) -> feedback_service_pb2.ListUnknownItemsResponse:
    """Returns a page as the contract says it."""
    token = ""
    if page.has_more:
        last = page.items[-1]
        token = signer.sign(_PAGE, pack_page([str(int(order)), str(last.event_count), last.item_id]))
    return feedback_service_pb2.ListUnknownItemsResponse(
        unknown_items=[
            feedback_service_pb2.UnknownItem(
                item_id=item.item_id,
                event_count=item.event_count,
                first_seen_time=to_timestamp(item.first_seen_at),
                last_seen_time=to_timestamp(item.last_seen_at),
            )
            for item in page.items
        ],
        next_page_token=token,
        total_size=page.total,
        compared_time=to_timestamp(page.compared_at) if page.compared_at else None,
    )
