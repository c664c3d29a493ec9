"""The catalogue, kept up to date from `WatchItems`."""

from __future__ import annotations

import math
import threading
import time
from typing import Any

import grpc
import numpy as np
from google.protobuf.timestamp_pb2 import Timestamp
from shopkeeper.profile.v1 import catalog_service_pb2, catalog_service_pb2_grpc, item_pb2
from shopkeeper.recommend.v1 import recommendation_pb2

from services.recommend.clients.stream import ReconnectingStream
from services.recommend.domain.catalog import CatalogItem, CatalogStore
from services.recommend.domain.item_index import ItemIndex
from services.recommend.ports import StreamState

_LOADING_PUBLISH_SECONDS = 1.0
_MICROS = 1_000_000


class CatalogClient:
    """Keeps the catalogue up to date from `WatchItems`. Implements `ports.CatalogStream`."""

    def __init__(self, channel: grpc.Channel, store: CatalogStore, index: ItemIndex) -> None:
        self._stub = catalog_service_pb2_grpc.CatalogServiceStub(channel)
        self._store = store
        self._index = index
        self._watermark = b""
        self._complete = False
        self._published = 0.0
        self._first_complete = threading.Event()
        self._stream = ReconnectingStream("items", self._open, self._consume, self._begin_anew)

    def start(self) -> None:
        """Begins to follow the stream."""
        self._stream.start()

    def stop(self) -> None:
        """Ends the following."""
        self._stream.stop()

    def wait_until_complete(self, timeout_seconds: float) -> bool:
        """Waits for the end of the first snapshot; returns whether it has come."""
        return self._first_complete.wait(timeout_seconds)

    def state(self) -> StreamState:
        stream = self._stream
        return StreamState(
            name="items",
            connected=stream.connected,
            last_message_time=stream.last_message_time,
            watermark=self._watermark,
            watermark_time=stream.last_message_time,
            entries=len(self._store.current.items),
            last_error="" if stream.connected else stream.last_error,
            complete=self._first_complete.is_set(),
        )

    def _begin_anew(self) -> None:
        self._watermark = b""

    def _open(self) -> Any:
        return self._stub.WatchItems(
            catalog_service_pb2.WatchItemsRequest(
                resume_token=self._watermark, with_vectors=self._store.vectors.wanted
            )
        )

    def _consume(self, message: catalog_service_pb2.WatchItemsResponse) -> None:
        if message.reset:
            self._store.begin_snapshot()
            self._complete, self._watermark = False, b""
        self._store.stage(map(catalog_item_from_proto, message.upserted), message.deleted_item_ids)
        if message.vectors:
            known = [
                (row, vector.values)
                for vector in message.vectors
                if (row := self._index.row_of(vector.item_id)) is not None
            ]
            rows = np.array([row for row, _ in known], np.int32)
            self._store.vectors.put(message.vector_version, rows, [values for _, values in known])
        if message.snapshot_complete and not self._complete:
            self._store.complete_snapshot()
            self._complete = True
        now = time.monotonic()
        # While a snapshot arrives, a new state for each message would copy the columns each time.
        if self._complete or now - self._published > _LOADING_PUBLISH_SECONDS:
            self._store.publish()
            self._published = now
        if message.watermark:
            self._watermark = message.watermark
        if self._complete:
            self._first_complete.set()


def catalog_item_from_proto(item: item_pb2.Item) -> CatalogItem:
    """Returns what recommending needs of a record, which is kept without its margin and picture bytes."""
    texts: dict[str, str] = {}
    numbers: dict[str, float] = {}
    flags: dict[str, bool] = {}
    for attribute in item.attributes:
        match attribute.WhichOneof("value"):
            case "text":
                texts[attribute.key] = attribute.text
            case "number" if math.isfinite(attribute.number):
                numbers[attribute.key] = attribute.number
            case "flag":
                flags[attribute.key] = attribute.flag
    fields: Any = item  # The stubs know every field by name; here names vary.

    def number_of(field: str, divisor: float = 1.0) -> float | None:
        return getattr(fields, field) / divisor if fields.HasField(field) else None

    def time_of(field: str) -> float | None:
        return _seconds(getattr(fields, field)) if fields.HasField(field) else None

    return CatalogItem(
        item_id=item.item_id,
        title=item.title,
        brand=item.brand,
        category_path=tuple(item.category_path),
        tags=tuple(item.tags),
        currency=item.currency_code,
        language=item.language_code,
        primary_item_id=item.primary_item_id,
        price=number_of("price_micros", _MICROS),
        list_price=number_of("list_price_micros", _MICROS),
        stock=number_of("stock_quantity"),
        rating=number_of("rating_mean"),
        rating_count=number_of("rating_count"),
        available_from=time_of("available_from"),
        available_until=time_of("available_until"),
        update_time=time_of("update_time"),
        texts=texts,
        numbers=numbers,
        flags=flags,
        withdrawn=item.withdrawn,
        placeholder=item.placeholder,
        record=wire_record_of(item),
    )


def wire_record_of(item: item_pb2.Item) -> bytes:
    """Returns `item_id` and `item` of a serialised `RecommendedItem`, made once and spliced into every answer.

    Without its margin, which is never shown, and bytes of pictures, which do not belong in a list.
    """
    entry = recommendation_pb2.RecommendedItem(item_id=item.item_id)
    entry.item.CopyFrom(item)
    entry.item.ClearField("margin_micros")
    entry.item.ClearField("image_bytes")
    return entry.SerializeToString()


def _seconds(timestamp: Timestamp) -> float:
    return timestamp.seconds + timestamp.nanos * 1e-9
