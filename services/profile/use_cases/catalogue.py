"""The catalogue in memory: one encoded record an item, shared by all watchers, and what portraits need."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from operator import invert

from services.profile.domain.items import Item, ItemFilter, ItemWrite, PriceLevels, WriteResult, WriteStatus
from services.profile.domain.messages import ItemsMessage
from services.profile.domain.portrait import UNKNOWN_ITEM, ItemFacts
from services.profile.ports import CatalogueStore, Metrics, StoredItem
from services.profile.use_cases.subscriptions import Subscription, Subscriptions
from shared.errors import NotFound, Unavailable
from shared.tokens import Watermark

POLL_SECONDS = 0.25
SHELVES_MAX_AGE_US = 5_000_000
MAX_RETRY_SECONDS = 2.0
MAX_TASTES = 20
MAX_TASTE_CHARACTERS = 64
MAX_ITEMS_IN_MESSAGE = 1000
MAX_MESSAGE_BYTES = 1 << 20
MAX_VECTORS_IN_MESSAGE = 500


@dataclass(frozen=True, slots=True)
class Record:
    """An item in memory.

    Attributes:
        encoded: as it goes to watchers; None when deleted.
        xid: the transaction that wrote it last.
        tastes: attributes that a taste may be about.
    """

    item_id: str
    encoded: bytes | None
    xid: int
    category_path: tuple[str, ...]
    brand: str
    price_micros: int | None
    list_price_micros: int | None
    currency_code: str
    tastes: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class _Shelves:
    """What the catalogue as a whole says of its shelves, (top category, currency), and so of an item.

    Attributes:
        discount_shares: of the items with a list price those that sell below it.
        facts: by place, with the record that they were made of.
    """

    levels: PriceLevels = field(default_factory=PriceLevels)
    discount_shares: dict[tuple[str, str], float] = field(default_factory=dict)
    facts: dict[int, tuple[Record, ItemFacts]] = field(default_factory=dict)

    @classmethod
    def of(cls, records: Sequence[Record]) -> _Shelves:
        counts: dict[tuple[str, str], list[int]] = {}
        priced = []
        for record in records:
            if record.price_micros is None or not record.category_path or record.encoded is None:
                continue
            shelf = (record.category_path[0], record.currency_code)
            priced.append((*shelf, record.price_micros))
            if record.list_price_micros:
                count = counts.setdefault(shelf, [0, 0])
                count[0] += record.price_micros < record.list_price_micros
                count[1] += 1
        shares = {shelf: below / listed for shelf, (below, listed) in counts.items()}
        return cls(PriceLevels.of(priced), shares)


def tastes(item: Item) -> tuple[tuple[str, str], ...]:
    """Returns the attributes of an item that a taste may be about: short texts, and flags that are set.

    A number is a measure, not a taste.
    """
    found: dict[str, str] = {}
    for attribute in item.attributes:
        if attribute.value is True:
            found[attribute.key] = "true"
        elif isinstance(attribute.value, str) and 0 < len(attribute.value) <= MAX_TASTE_CHARACTERS:
            found[attribute.key] = attribute.value
        if len(found) == MAX_TASTES:
            break
    return tuple(found.items())


# Returns the version of the vectors' space, and (item id, float32 little endian) of the items that have one.
VectorsOf = Callable[[Sequence[str]], tuple[str, list[tuple[str, bytes]]]]


class Catalogue:
    """The catalogue. Writes go to the store, and come to memory the way every replica's do: by its log.

    One thread calls `run`; anybody may call the rest.

    Args:
        encode: turns an item into the bytes that watchers get.
        clock_us: microseconds since 1970.
    """

    def __init__(
        self,
        store: CatalogueStore,
        encode: Callable[[Item], bytes],
        metrics: Metrics,
        clock_us: Callable[[], int],
    ) -> None:
        self._store = store
        self._encode = encode
        self._clock_us = clock_us
        # Grows only: a watcher's place in its snapshot is a number, not a copy.
        self._records: list[Record] = []
        self._place_of: dict[str, int] = {}
        self._watermark: Watermark | None = None
        self._subscriptions: Subscriptions[int] = Subscriptions(
            lambda count: metrics.watchers("items", count)
        )
        self._shelves = _Shelves()
        self._shelves_time_us = 0
        self._shelves_stale = True
        self._shelves_lock = threading.Lock()
        self._nudged = threading.Event()
        self._stopping = threading.Event()
        self._touch: Callable[[Sequence[str]], None] = lambda _item_ids: None
        self._vectors_of: VectorsOf = lambda _item_ids: ("", [])
        self.problem = ""

    def follow_vectors(self, touch: Callable[[Sequence[str]], None], vectors_of: VectorsOf) -> None:
        """Says whom to tell of written items, and whom to ask for the vectors that watchers want."""
        self._touch, self._vectors_of = touch, vectors_of

    def publish_vectors(self, item_ids: Sequence[str]) -> None:
        """Tells watchers that want vectors of those that are new."""
        places = [~place for item_id in item_ids if (place := self._place_of.get(item_id)) is not None]
        if self._watermark is not None:
            self._subscriptions.offer(places)

    @property
    def loaded(self) -> bool:
        """Whether the catalogue has been read into memory."""
        return self._watermark is not None

    def write(self, writes: Sequence[ItemWrite]) -> list[WriteResult]:
        """Stores writes; returns one result each, in their order.

        Raises:
            Unavailable: the database does not answer; nothing was written, or it is unknown whether.
        """
        if not writes:
            return []
        results = self._store.write(writes)
        if any(result.status != WriteStatus.REJECTED for result in results):
            self._store.announce()
        return results

    def get(self, item_id: str) -> Item:
        """Returns an item as stored, with its picture.

        Raises:
            NotFound: there is none, or it is deleted.
        """
        item = self._store.get(item_id)
        if item is None:
            raise NotFound(
                "ITEM_NOT_FOUND", "No item has this id; write it with UpsertItems.", {"itemId": item_id}
            )
        return item

    def page(self, item_filter: ItemFilter, after_item_id: str, size: int) -> tuple[list[Item], bool]:
        """Returns the items behind an id in the order of ids, and whether more follow."""
        items = self._store.page(item_filter, after_item_id, size + 1)
        return items[:size], len(items) > size

    def has(self, item_id: str) -> bool:
        """Returns whether the catalogue in memory holds an item that is not deleted."""
        place = self._place_of.get(item_id)
        return place is not None and self._records[place].encoded is not None

    def facts(self, item_id: str) -> ItemFacts:
        """Returns what portraits need of an item; nothing is known of an item that is not there."""
        place = self._place_of.get(item_id)
        if place is None:
            return UNKNOWN_ITEM
        record = self._records[place]
        shelves = self._shelves_of_now()
        known = shelves.facts.get(place)
        # Of this very record: a write may have come between.
        if known is not None and known[0] is record:
            return known[1]
        level, discount_share = None, 0.0
        if record.price_micros is not None and record.category_path:
            shelf = (record.category_path[0], record.currency_code)
            level = shelves.levels.level(*shelf, record.price_micros)
            discount_share = shelves.discount_shares.get(shelf, 0.0)
        facts = ItemFacts(
            record.category_path,
            record.brand,
            level,
            record.tastes,
            record.list_price_micros,
            record.currency_code,
            discount_share,
        )
        shelves.facts[place] = (record, facts)
        return facts

    def nudge(self) -> None:
        """Makes the next poll begin at once."""
        self._nudged.set()

    def run(self, on_outcome: Callable[[], None] = lambda: None) -> None:
        """Loads, then polls until `stop`; survives every outage of the database."""
        retry_seconds = POLL_SECONDS
        while not self._stopping.is_set():
            try:
                self.poll()
                self.problem = ""
                retry_seconds = POLL_SECONDS
                on_outcome()
                self._nudged.wait(POLL_SECONDS)
                self._nudged.clear()
            except Unavailable as error:
                self.problem = error.message
                on_outcome()
                self._stopping.wait(retry_seconds)
                retry_seconds = min(MAX_RETRY_SECONDS, 2 * retry_seconds)

    def stop(self) -> None:
        """Ends `run` and every watcher."""
        self._stopping.set()
        self._nudged.set()
        self._subscriptions.close()

    def poll(self) -> None:
        """Reads everything the first time, then what is new, and publishes it."""
        if self._watermark is None:
            self._load()
            return
        changes = self._store.poll(self._watermark)
        if changes.watermark.xmax < self._watermark.xmax:
            # The database was replaced by an older one: what it does not hold is gone.
            kept = self._load()
            for place, record in enumerate(self._records):
                if record.item_id not in kept:
                    self._records[place] = replace(record, encoded=None)
            self._subscriptions.reset()
            return
        places = self._put(changes.items)
        self._subscriptions.publish(places, (), changes.watermark, self._clock_us())
        self._watermark = changes.watermark

    def watch(
        self,
        resume: Watermark | None,
        is_active: Callable[[], bool],
        heartbeat_seconds: float = POLL_SECONDS,
        *,
        with_vectors: bool = False,
    ) -> Iterator[ItemsMessage]:
        """Yields the whole catalogue, or what changed since `resume`, then every change, until closed.

        With vectors, those of all items follow at the beginning, and each again when it is new.

        Raises:
            Unavailable: the catalogue has not been loaded yet.
        """
        watermark = self._watermark
        if watermark is None:
            raise Unavailable(
                "CATALOGUE_LOADING", "The catalogue is still being read into memory; retry. " + self.problem
            )
        # An item's vector goes by the complement of its place, so that it coalesces apart from the item.
        wants = None if with_vectors else (lambda place: place >= 0)
        subscription: Subscription[int] = Subscription(wants, max_pending=2**62)
        self._subscriptions.add(subscription)
        try:
            # Another replica's watermark may be a little ahead; one far ahead is of another database.
            if resume is not None and resume.xmax <= watermark.xmax + 1_000_000:
                watermark = self._watermark or watermark
                missed = [
                    place for place, record in enumerate(self._records) if not resume.covers(record.xid)
                ]
                subscription.offer(missed, (), watermark, 0)
                subscription.offer(map(invert, range(len(self._records))), (), None, 0)
            else:
                yield from self._snapshot(subscription, watermark)
            subscription.release()
            complete = False
            while is_active() and not subscription.closed:
                delivery = subscription.take(MAX_ITEMS_IN_MESSAGE, heartbeat_seconds if complete else 0.0)
                if delivery.reset:
                    complete = False
                    yield from self._snapshot(subscription, self._watermark or watermark)
                    continue
                complete = complete or delivery.watermark is not None
                yield from self._messages(delivery.changed, delivery.watermark, complete)
        finally:
            self._subscriptions.remove(subscription)

    def _snapshot(self, subscription: Subscription[int], watermark: Watermark) -> Iterator[ItemsMessage]:
        # What changes from here on is pending in the subscription: the pages need not be of one moment.
        subscription.offer((), (), watermark, 0)
        yield ItemsMessage((), (), None, False, True)
        records = self._records
        place, end = 0, len(records)
        while place < end:
            page: list[bytes] = []
            size = 0
            while place < end and len(page) < MAX_ITEMS_IN_MESSAGE and size < MAX_MESSAGE_BYTES:
                encoded = records[place].encoded
                place += 1
                if encoded is not None:
                    page.append(encoded)
                    size += len(encoded)
            if page:
                yield ItemsMessage(page, (), None, False, False)
        subscription.offer(map(invert, range(end)), (), None, 0)

    def _messages(
        self, places: Sequence[int], watermark: Watermark | None, complete: bool
    ) -> Iterator[ItemsMessage]:
        upserted: list[bytes] = []
        deleted: list[str] = []
        size = 0
        of_vectors = [self._records[~place].item_id for place in places if place < 0]
        for place in places:
            if place < 0:
                continue
            record = self._records[place]
            if record.encoded is None:
                deleted.append(record.item_id)
                continue
            if upserted and size + len(record.encoded) > MAX_MESSAGE_BYTES:
                yield ItemsMessage(upserted, (), None, False, False)
                upserted, size = [], 0
            upserted.append(record.encoded)
            size += len(record.encoded)
        if of_vectors:
            # After the items that they are of.
            if upserted or deleted:
                yield ItemsMessage(upserted, deleted, None, False, False)
                upserted, deleted = [], []
            for first in range(0, len(of_vectors), MAX_VECTORS_IN_MESSAGE):
                version, vectors = self._vectors_of(of_vectors[first : first + MAX_VECTORS_IN_MESSAGE])
                if vectors:
                    yield ItemsMessage((), (), None, False, False, vectors, version)
        if upserted or deleted or watermark is not None:
            yield ItemsMessage(upserted, deleted, watermark, complete, False)

    def _load(self) -> set[str]:
        watermark = self._watermark
        item_ids: set[str] = set()
        for chunk in self._store.load():
            self._put(chunk.items)
            item_ids.update(stored.item.item_id for stored in chunk.items)
            watermark = chunk.watermark
        self._watermark = watermark
        return item_ids

    def _put(self, stored_items: Sequence[StoredItem]) -> list[int]:
        places = []
        for stored in stored_items:
            item = stored.item
            record = Record(
                item.item_id,
                None if item.deleted else self._encode(item),
                stored.xid,
                item.category_path,
                item.brand,
                item.price_micros,
                item.list_price_micros,
                item.currency_code,
                tastes(item),
            )
            place = self._place_of.get(item.item_id)
            if place is None:
                place = len(self._records)
                self._records.append(record)
                # Published last: a reader that finds the place also finds the record.
                self._place_of[item.item_id] = place
            else:
                self._records[place] = record
            places.append(place)
        if places:
            self._shelves_stale = True
            self._touch([stored.item.item_id for stored in stored_items])
        return places

    def _shelves_of_now(self) -> _Shelves:
        if not self._shelves_stale:
            return self._shelves
        now_us = self._clock_us()
        due = now_us - self._shelves_time_us > SHELVES_MAX_AGE_US
        # One thread sorts; the others go on with the shelves of a moment ago.
        if due and self._shelves_lock.acquire(blocking=False):
            try:
                self._shelves_stale = False
                self._shelves = _Shelves.of(self._records)
                self._shelves_time_us = now_us
            finally:
                self._shelves_lock.release()
        return self._shelves
