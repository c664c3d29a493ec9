"""Batches into the services: protobufs built at the last moment, several calls under way, retries.

A retry is harmless: events carry ids that the log recognises for ever, items are whole records.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import grpc
from google.protobuf.timestamp_pb2 import Timestamp
from shopkeeper.feedback.v1 import event_pb2, feedback_service_pb2, feedback_service_pb2_grpc
from shopkeeper.profile.v1 import catalog_service_pb2, catalog_service_pb2_grpc, item_pb2

from shared.errors import ShopkeeperError, Unavailable
from shared.event_kinds import EventKind
from shared.grpc_status import from_rpc_error
from shared.importing.batches import UNKNOWN_PRICE, EventBatch, ItemRecord

CALLS_UNDER_WAY = 4
CALL_TIMEOUT_SECONDS = 60.0
RETRY_SECONDS = 60.0
FIRST_BACK_OFF_SECONDS = 0.1
MAX_BACK_OFF_SECONDS = 5.0
SAMPLES = 10
_RETRYABLE = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.ABORTED,
)
_MEASURES = (EventKind.PURCHASE, EventKind.RETURN)
T = TypeVar("T")


@dataclass(slots=True)
class UploadReport:
    """What the services said about each row."""

    events: Counter[str] = field(default_factory=Counter)
    items: Counter[str] = field(default_factory=Counter)
    lines: int = 0
    retries: int = 0
    samples: list[str] = field(default_factory=list)
    consistency_token: str = ""

    @property
    def refused(self) -> int:
        """Returns how many events and items are not in the suite as they should be."""
        return self.events["rejected"] + self.events["quarantined"] + self.items["rejected"]


def event_messages(batch: EventBatch) -> list[event_pb2.Event]:
    """Returns the events of a batch as the contract's messages."""
    messages = []
    offsets = batch.offsets.tolist()
    quantities, prices = batch.quantities.tolist(), batch.price_micros.tolist()
    values, times = batch.values.tolist(), batch.occurred_at_us.tolist()
    items, currencies = batch.item_ids, batch.currency_codes
    tokens = batch.attribution_tokens or [""] * len(batch)
    for e, kind in enumerate(batch.kinds.tolist()):
        seconds, micros = divmod(times[e], 1_000_000)
        event = event_pb2.Event(
            event_id=batch.event_ids[e],
            user_id=batch.user_ids[e],
            occurred_at=Timestamp(seconds=seconds, nanos=micros * 1_000),
            session_id=batch.session_ids[e],
            attribution_token=tokens[e],
            channel=event_pb2.CHANNEL_IMPORT,
        )
        first, last = offsets[e], offsets[e + 1]
        if kind in _MEASURES:
            order = event.purchase if kind == EventKind.PURCHASE else event.item_return
            order.order_id = batch.order_ids[e]
            add = order.lines.add
            for at in range(first, last):
                if prices[at] == UNKNOWN_PRICE:
                    add(item_id=items[at], quantity=quantities[at])
                else:
                    add(item_id=items[at], quantity=quantities[at], price_micros=prices[at])
                    order.currency_code = currencies[at]
        else:
            text = batch.texts[e] if kind == EventKind.REVIEW else batch.queries[e]
            _fill_single(event, kind, items[first] if last > first else "", values[e], text)
            if kind in (EventKind.ITEM_VIEW, EventKind.ADD_TO_CART) and prices[first] != UNKNOWN_PRICE:
                detail = event.item_view if kind == EventKind.ITEM_VIEW else event.add_to_cart
                detail.price_micros, detail.currency_code = prices[first], currencies[first]
            if kind == EventKind.ADD_TO_CART:
                event.add_to_cart.quantity = quantities[first]
            elif kind == EventKind.REMOVE_FROM_CART:
                event.remove_from_cart.quantity = quantities[first]
        messages.append(event)
    return messages


def _fill_single(event: event_pb2.Event, kind: int, item_id: str, value: float, text: str) -> None:
    if kind == EventKind.ITEM_VIEW:
        event.item_view.item_id = item_id
    elif kind == EventKind.ADD_TO_CART:
        event.add_to_cart.item_id = item_id
    elif kind == EventKind.REMOVE_FROM_CART:
        event.remove_from_cart.item_id = item_id
    elif kind == EventKind.RATING:
        event.rating.item_id = item_id
        event.rating.stars = value
    elif kind == EventKind.REVIEW:
        event.review.item_id = item_id
        event.review.text = text
        if value == value:  # NaN: no stars were given.
            event.review.stars = value
    elif kind == EventKind.WISH_LIST:
        event.wish_list.item_id = item_id
    elif kind == EventKind.SHARE:
        event.share.item_id = item_id
    elif kind == EventKind.RECOMMENDATION_CLICK:
        event.recommendation_click.item_id = item_id
    elif kind == EventKind.SEARCH:
        event.search.query = text
    elif kind == EventKind.PAGE_VIEW:
        event.page_view.SetInParent()
        if item_id:
            event.page_view.impressions.add(item_id=item_id)
    else:
        raise ValueError(f"{EventKind(kind).name} cannot be imported from columns")


def item_message(record: ItemRecord) -> item_pb2.Item:
    """Returns an item as the contract's message."""
    item = item_pb2.Item(
        item_id=record.item_id,
        title=record.title,
        description=record.description,
        brand=record.brand,
        category_path=record.category_path,
        withdrawn=record.withdrawn,
    )
    if record.image_uri:
        item.image_uri = record.image_uri
    if record.price_micros != UNKNOWN_PRICE:
        item.price_micros = record.price_micros
        item.currency_code = record.currency_code
    if record.created_at_us is not None:
        item.available_from.FromMicroseconds(record.created_at_us)
    for key, value in record.attributes.items():
        attribute = item.attributes.add(key=key)
        if isinstance(value, bool):
            attribute.flag = value
        elif isinstance(value, str):
            attribute.text = value
        else:
            attribute.number = value
    return item


class Uploader:
    """Sends batches over channels to feedback (events) and profile (items).

    Raises from every method:
        Unavailable: a service stayed away for RETRY_SECONDS.
        ShopkeeperError: what the service answered to a whole batch.
    """

    def __init__(
        self,
        feedback: grpc.Channel,
        profile: grpc.Channel,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.report = UploadReport()
        self._record = feedback_service_pb2_grpc.FeedbackServiceStub(feedback).RecordEvents
        self._upsert = catalog_service_pb2_grpc.CatalogServiceStub(profile).UpsertItems
        self._clock = clock
        self._sleep = sleep

    def send_events(self, batches: Iterable[EventBatch]) -> Iterator[int]:
        """Sends batches of at most 1,000 events; yields the number of events after each one's commit."""
        pairs = ((b, feedback_service_pb2.RecordEventsRequest(events=event_messages(b))) for b in batches)
        for batch, answer in self._windowed(pairs, self._record):
            self.report.lines += len(batch.item_ids)
            self._count_events(batch.event_ids, answer)
            yield len(batch)

    def send_event_messages(self, events: Sequence[event_pb2.Event]) -> str:
        """Sends events that exist as messages, in calls of at most 1,000; returns the last consistency token."""
        chunks = [events[i : i + 1_000] for i in range(0, len(events), 1_000)]
        pairs = ((c, feedback_service_pb2.RecordEventsRequest(events=c)) for c in chunks)
        for chunk, answer in self._windowed(pairs, self._record):
            self._count_events([e.event_id for e in chunk], answer)
        return self.report.consistency_token

    def send_items(self, batches: Iterable[Sequence[ItemRecord]]) -> Iterator[int]:
        """Sends items, at most 500 a batch; yields the number of items after each answer."""
        pairs = (
            (b, catalog_service_pb2.UpsertItemsRequest(items=[item_message(r) for r in b])) for b in batches
        )
        for batch, answer in self._windowed(pairs, self._upsert):
            for result in answer.results:
                name = catalog_service_pb2.ItemWriteStatus.Name(result.status)
                status = name.removeprefix("ITEM_WRITE_STATUS_").lower()
                self.report.items[status] += 1
                if status == "rejected" and len(self.report.samples) < SAMPLES:
                    what = "; ".join(f"{v.field}: {v.description}" for v in result.violations)
                    self.report.samples.append(f"item {result.item_id}: {what}")
            yield len(batch)

    def _count_events(self, event_ids: Sequence[str], answer: Any) -> None:
        counts: Counter[int] = Counter()
        for event_id, result in zip(event_ids, answer.results, strict=True):
            counts[result.status] += 1
            refused = result.status in (event_pb2.EVENT_STATUS_REJECTED, event_pb2.EVENT_STATUS_QUARANTINED)
            if refused and len(self.report.samples) < SAMPLES:
                status = event_pb2.EventStatus.Name(result.status).removeprefix("EVENT_STATUS_").lower()
                self.report.samples.append(f"event {event_id} {status}: {result.field} {result.message}")
        for code, count in counts.items():
            name = event_pb2.EventStatus.Name(code)  # type: ignore[arg-type]
            self.report.events[name.removeprefix("EVENT_STATUS_").lower()] += count
        self.report.consistency_token = answer.consistency_token or self.report.consistency_token

    def _windowed(self, pairs: Iterable[tuple[T, Any]], method: Any) -> Iterator[tuple[T, Any]]:
        """Yields (batch, answer) in order, with up to CALLS_UNDER_WAY calls on their way."""
        under_way: deque[tuple[T, Any, Any]] = deque()
        for batch, request in pairs:
            under_way.append((batch, request, method.future(request, timeout=CALL_TIMEOUT_SECONDS)))
            if len(under_way) == CALLS_UNDER_WAY:
                yield self._answered(under_way.popleft(), method)
        while under_way:
            yield self._answered(under_way.popleft(), method)

    def _answered(self, call: tuple[T, Any, Any], method: Any) -> tuple[T, Any]:
        batch, request, future = call
        deadline = self._clock() + RETRY_SECONDS
        back_off = FIRST_BACK_OFF_SECONDS
        while True:
            try:
                return batch, future.result()
            except grpc.RpcError as rpc_error:
                error: ShopkeeperError = from_rpc_error(rpc_error)
                if rpc_error.code() not in _RETRYABLE:
                    raise error from rpc_error
                if self._clock() + back_off > deadline:
                    raise Unavailable(
                        error.reason, f"gave up after {RETRY_SECONDS:.0f} s: {error.message}"
                    ) from rpc_error
                self.report.retries += 1
                self._sleep(back_off)
                back_off = min(2 * back_off, MAX_BACK_OFF_SECONDS)
                future = method.future(request, timeout=CALL_TIMEOUT_SECONDS)
