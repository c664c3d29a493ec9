"""The catalogue: row by row, field by field, newest write wins, watchers learn of it."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shopkeeper.profile.v1 import catalog_service_pb2 as pb
from shopkeeper.profile.v1 import item_pb2

from shared import grpc_status
from shared.errors import InvalidInput, NotFound
from tests.profile.conftest import Shop, eventually, item

STORED = pb.ITEM_WRITE_STATUS_STORED
SUPERSEDED = pb.ITEM_WRITE_STATUS_SUPERSEDED
REJECTED = pb.ITEM_WRITE_STATUS_REJECTED
NOT_FOUND = pb.ITEM_WRITE_STATUS_NOT_FOUND
ETAG_MISMATCH = pb.ITEM_WRITE_STATUS_ETAG_MISMATCH


def at(seconds: float) -> Timestamp:
    time = Timestamp()
    time.FromDatetime(datetime(2026, 3, 1, tzinfo=UTC) + timedelta(seconds=seconds))
    return time


def upsert(shop: Shop, *items: item_pb2.Item, write_time: Timestamp | None = None) -> list[Any]:
    return list(shop.catalog.UpsertItems(pb.UpsertItemsRequest(items=items, write_time=write_time)).results)


def inventory(shop: Shop, *entries: pb.InventoryEntry) -> list[Any]:
    return list(shop.catalog.SetInventory(pb.SetInventoryRequest(entries=entries)).results)


def patch(shop: Shop, changes: item_pb2.Item, *paths: str, **fields: Any) -> Any:
    item_patch = pb.ItemPatch(item=changes, update_mask=FieldMask(paths=paths), **fields)
    return shop.catalog.PatchItems(pb.PatchItemsRequest(patches=[item_patch])).results[0]


def get(shop: Shop, item_id: str) -> item_pb2.Item:
    return shop.catalog.GetItem(pb.GetItemRequest(item_id=item_id))


def statuses(results: list[Any]) -> list[int]:
    return [result.status for result in results]


FULL = item_pb2.Item(
    item_id="boot-1",
    title="Ankle boot",
    description='A boot, "soft" \\ and {warm}',
    brand="Größe & Söhne",
    category_path=["Women", "Shoes, and more", 'Boots "x"'],
    attributes=[
        item_pb2.Attribute(key="colour", text="红色"),
        item_pb2.Attribute(key="heel", number=4.5),
        item_pb2.Attribute(key="count", number=2.0),
        item_pb2.Attribute(key="vegan", flag=False),
        item_pb2.Attribute(key="empty", text=""),
    ],
    price_micros=99_000_000,
    list_price_micros=120_000_000,
    currency_code="EUR",
    stock_quantity=0,
    primary_item_id="boot",
    image_uri="https://shop.example/boot.jpg",
    tags=["sale", "new, hot"],
    available_from=at(0),
    available_until=at(100),
    margin_micros=-5,
    language_code="zh-Hans",
    rating_count=3,
    rating_mean=4.5,
    withdrawn=True,
)


def test_an_item_comes_back_as_it_was_written(shop: Shop) -> None:
    [result] = upsert(shop, FULL)
    assert result.status == STORED
    stored = get(shop, "boot-1")
    assert stored.etag == result.etag != ""
    assert stored.HasField("update_time")
    stored.ClearField("etag")
    stored.ClearField("update_time")
    assert stored == FULL

    picture = b"\x89PNG\r\n\x1a\n" + b"\x00\xff" * 100
    upsert(shop, item("picture", image_bytes=picture))
    assert get(shop, "picture").image_bytes == picture


_TEXT = st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), max_size=12)
_WORDS = st.one_of(_TEXT, st.sampled_from(['"', "\\", "{}", "NULL", "null", "a,b", " ", "\n", "𝔘", "'"]))
_SOME = _WORDS.filter(bool)
_MICROS = st.one_of(st.none(), st.integers(0, 2**63 - 1))
_ITEMS = st.builds(
    item_pb2.Item,
    title=_WORDS,
    description=_WORDS,
    brand=_WORDS,
    category_path=st.lists(_SOME, max_size=4),
    attributes=st.lists(
        st.one_of(
            st.builds(item_pb2.Attribute, key=_SOME, text=_WORDS),
            st.builds(item_pb2.Attribute, key=_SOME, number=st.floats(allow_nan=False, allow_infinity=False)),
            st.builds(item_pb2.Attribute, key=_SOME, flag=st.booleans()),
        ),
        max_size=4,
        unique_by=lambda attribute: attribute.key,
    ),
    price_micros=_MICROS,
    list_price_micros=_MICROS,
    currency_code=st.just("EUR"),
    stock_quantity=_MICROS,
    tags=st.lists(_SOME, max_size=4, unique=True),
    margin_micros=st.one_of(st.none(), st.integers(-(2**63), 2**63 - 1)),
    available_from=st.one_of(
        st.none(), st.builds(Timestamp, seconds=st.integers(-62_135_596_800, 253_402_300_799))
    ),
    rating_count=st.one_of(st.none(), st.integers(1, 2**63 - 1)),
    withdrawn=st.booleans(),
)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(items=st.lists(_ITEMS, min_size=1, max_size=20))
def test_any_legal_item_comes_back_as_it_was_written(shop: Shop, items: list[item_pb2.Item]) -> None:
    for number, entry in enumerate(items):
        entry.item_id = f"item-{number}"
    results = upsert(shop, *items)
    assert [(r.status, list(r.violations)) for r in results] == [(STORED, [])] * len(items)
    stored = {entry.item_id: entry for entry in shop.catalog.ListItems(pb.ListItemsRequest()).items}
    for entry in items:
        back = stored[entry.item_id]
        back.ClearField("etag")
        back.ClearField("update_time")
        # Minus zero is zero to JSON's numbers.
        for attribute in (*entry.attributes, *back.attributes):
            if attribute.number == 0 and attribute.HasField("number"):
                attribute.number = 0.0
        assert back == entry


def test_an_upsert_replaces_every_field_also_those_that_are_not_set(shop: Shop) -> None:
    upsert(shop, FULL)
    upsert(shop, item_pb2.Item(item_id="boot-1", title="Plain"))

    stored = get(shop, "boot-1")
    assert stored.title == "Plain"
    assert not stored.brand
    assert not stored.HasField("price_micros")
    assert not stored.tags


def test_one_bad_row_harms_no_other_and_every_problem_of_it_is_named(shop: Shop) -> None:
    bad = item_pb2.Item(
        item_id="bad\x00", price_micros=-1, rating_mean=float("nan"), tags=["a", "a"], language_code="!"
    )
    results = upsert(shop, item("one"), bad, item("two"))

    assert statuses(results) == [STORED, REJECTED, STORED]
    assert {violation.field for violation in results[1].violations} == {
        "items[1].item_id",
        "items[1].price_micros",
        "items[1].currency_code",
        "items[1].rating_mean",
        "items[1].tags",
        "items[1].language_code",
    }
    assert get(shop, "two").title == "Title of two"


BAD_ITEMS = {
    "item_id": item(""),
    "title": item("i", title="x" * 1001),
    "description": item("i", description="a\x00b"),
    "brand": item("i", brand="x" * 257),
    "category_path": item("i", category_path=["x"] * 17),
    "category_path[1]": item("i", category_path=["x", ""]),
    "attributes[0].key": item("i", attributes=[item_pb2.Attribute(text="x")]),
    "attributes[0]": item("i", attributes=[item_pb2.Attribute(key="x")]),
    "attributes[0].number": item("i", attributes=[item_pb2.Attribute(key="x", number=float("inf"))]),
    "attributes[1].key": item("i", attributes=[item_pb2.Attribute(key="x", flag=True)] * 2),
    "list_price_micros": item("i", list_price_micros=-1, currency_code="EUR"),
    "currency_code": item("i", price_micros=1, currency_code="euro"),
    "stock_quantity": item("i", stock_quantity=-1),
    "primary_item_id": item("i", primary_item_id="\n"),
    "image_uri": item("i", image_uri="javascript:alert(1)"),
    "image_bytes": item("i", image_bytes=b"GIF89a"),
    "tags[0]": item("i", tags=[""]),
    "available_from": item("i", available_from=Timestamp(seconds=10**15)),
    "available_until": item("i", available_from=at(5), available_until=at(5)),
    "rating_count": item("i", rating_count=-1),
    "rating_mean": item("i", rating_count=2, rating_mean=5.1),
    "language_code": item("i", language_code="e"),
}


def test_a_bad_field_is_named(shop: Shop, subtests: pytest.Subtests) -> None:
    for field, bad in BAD_ITEMS.items():
        with subtests.test(field):
            [result] = upsert(shop, bad)
            assert result.status == REJECTED
            assert [violation.field for violation in result.violations] == [f"items[0].{field}"]


def test_batches_of_none_and_of_too_many_are_refused(shop: Shop) -> None:
    for items in ([], [item(str(number)) for number in range(1001)]):
        with pytest.raises(grpc.RpcError) as failure:
            upsert(shop, *items)
        error = grpc_status.from_rpc_error(failure.value)
        assert isinstance(error, InvalidInput)
        assert [violation.field for violation in error.violations] == ["items"]


def test_a_thousand_items_with_repeated_ids_apply_in_order(shop: Shop) -> None:
    results = upsert(shop, *(item(f"i-{n % 400}", title=f"title {n}") for n in range(1000)))

    assert set(statuses(results)) == {STORED}
    assert get(shop, "i-0").title == "title 800"
    assert get(shop, "i-399").title == "title 799"


def test_an_older_inventory_write_never_wins(shop: Shop) -> None:
    upsert(shop, item("tea"), write_time=at(0))
    newer = pb.InventoryEntry(item_id="tea", stock_quantity=5, write_time=at(20))
    older = pb.InventoryEntry(
        item_id="tea", stock_quantity=9, price_micros=100, currency_code="EUR", write_time=at(10)
    )

    assert statuses(inventory(shop, newer)) == [STORED]
    # Its price is the newest there is, its stock is not.
    assert statuses(inventory(shop, older)) == [STORED]
    stored = get(shop, "tea")
    assert (stored.stock_quantity, stored.price_micros) == (5, 100)
    [result] = inventory(shop, older, newer)[:1]
    assert result.status == STORED  # The same write again: nothing changes.
    oldest = pb.InventoryEntry(item_id="tea", stock_quantity=7, write_time=at(1))
    [result] = inventory(shop, oldest)
    assert result.status == SUPERSEDED
    assert result.etag == get(shop, "tea").etag
    assert get(shop, "tea").stock_quantity == 5


def test_writes_of_one_item_end_the_same_in_any_order(shop: Shop) -> None:
    def writes(item_id: str) -> list[Callable[[], Any]]:
        return [
            lambda: upsert(shop, item(item_id, title="first", brand="A", tags=["x"]), write_time=at(1)),
            lambda: inventory(shop, pb.InventoryEntry(item_id=item_id, stock_quantity=4, write_time=at(3))),
            lambda: patch(
                shop,
                item_pb2.Item(item_id=item_id, title="patched"),
                "title",
                write_time=at(4),
                allow_missing=True,
            ),
            lambda: shop.catalog.DeleteItems(pb.DeleteItemsRequest(item_ids=[item_id], write_time=at(2))),
            lambda: upsert(shop, item(item_id, title="second", brand="B"), write_time=at(2.5)),
        ]

    ends = set()
    for number, order in enumerate(itertools.permutations(range(5))):
        if number % 6:
            continue
        item_id = f"item-{number}"
        steps = writes(item_id)
        for step in order:
            steps[step]()
        end = get(shop, item_id)
        for field in ("item_id", "etag", "update_time"):
            end.ClearField(field)
        ends.add(end.SerializeToString(deterministic=True))
    assert len(ends) == 1
    end = item_pb2.Item.FromString(ends.pop())
    assert (end.title, end.brand, end.stock_quantity, list(end.tags)) == ("patched", "B", 4, [])


def test_a_patch_writes_the_named_fields_only(shop: Shop) -> None:
    upsert(shop, FULL)
    result = patch(shop, item_pb2.Item(item_id="boot-1", title="New", brand="ignored"), "title", "image")

    assert result.status == STORED
    stored = get(shop, "boot-1")
    assert (stored.title, stored.brand) == ("New", "Größe & Söhne")
    assert not stored.WhichOneof("image")


BAD_PATCHES: list[tuple[item_pb2.Item, list[str], str]] = [
    (item("i"), [], "patches[0].update_mask"),
    (item("i"), ["item_id"], "patches[0].update_mask"),
    (item("i"), ["etag"], "patches[0].update_mask"),
    (item("i"), ["nonsense"], "patches[0].update_mask"),
    (item("i", price_micros=1), ["price_micros"], "patches[0].item.currency_code"),
    (item("i", price_micros=1), ["price_micros", "currency_code"], "patches[0].item.currency_code"),
    (item(""), ["title"], "patches[0].item.item_id"),
]


def test_a_bad_patch_names_the_field(shop: Shop, subtests: pytest.Subtests) -> None:
    for changes, paths, field in BAD_PATCHES:
        with subtests.test(field, paths=paths):
            result = patch(shop, changes, *paths)
            assert result.status == REJECTED
            assert [violation.field for violation in result.violations] == [field]


def test_a_patch_creates_an_item_only_where_that_is_allowed(shop: Shop) -> None:
    assert patch(shop, item("new"), "title").status == NOT_FOUND
    assert patch(shop, item("new"), "title", allow_missing=True).status == STORED
    assert not get(shop, "new").placeholder


def test_inventory_of_an_unknown_item_makes_a_placeholder_until_it_is_described(shop: Shop) -> None:
    inventory(shop, pb.InventoryEntry(item_id="unknown", stock_quantity=3))
    assert get(shop, "unknown").placeholder

    upsert(shop, item("unknown"), write_time=at(0))
    stored = get(shop, "unknown")
    assert not stored.placeholder
    assert (stored.title, stored.stock_quantity) == ("Title of unknown", 3)


def test_a_stale_etag_is_refused_and_the_current_one_is_not(shop: Shop) -> None:
    [first] = upsert(shop, item("tea"))
    [second] = upsert(shop, item("tea", etag=first.etag, title="second"))
    assert second.status == STORED

    for etag in (first.etag, "nonsense", "f" * 40):
        [result] = upsert(shop, item("tea", etag=etag, title="third"))
        assert result.status == ETAG_MISMATCH
    assert get(shop, "tea").title == "second"


def test_a_deleted_item_is_gone_and_an_older_write_does_not_bring_it_back(shop: Shop) -> None:
    upsert(shop, item("tea"), write_time=at(0))
    delete = pb.DeleteItemsRequest(item_ids=["tea", "never", ""], write_time=at(10))
    results = list(shop.catalog.DeleteItems(delete).results)
    assert statuses(results) == [STORED, NOT_FOUND, REJECTED]
    assert results[2].violations[0].field == "item_ids[2]"

    upsert(shop, item("tea"), item("never"), write_time=at(5))
    for item_id in ("tea", "never"):
        with pytest.raises(grpc.RpcError) as failure:
            get(shop, item_id)
        assert isinstance(grpc_status.from_rpc_error(failure.value), NotFound)
    upsert(shop, item("tea"), write_time=at(11))
    assert get(shop, "tea").title == "Title of tea"


def test_a_write_time_in_the_future_is_refused(shop: Shop) -> None:
    future = Timestamp()
    future.FromDatetime(datetime.now(UTC) + timedelta(hours=1))
    [result] = inventory(shop, pb.InventoryEntry(item_id="i", stock_quantity=1, write_time=future))
    assert result.violations[0].field == "entries[0].write_time"
    with pytest.raises(grpc.RpcError) as failure:
        upsert(shop, item("i"), write_time=future)
    assert failure.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_pages_hold_every_item_once_in_order(shop: Shop) -> None:
    ids = [f"item-{number}" for number in range(23)] + ["Zebra", "中文", "ähre"]
    upsert(shop, *(item(item_id, image_bytes=b"\xff\xd8\xff123") for item_id in ids))
    seen: list[str] = []
    token = ""
    while True:
        page = shop.catalog.ListItems(pb.ListItemsRequest(page_size=5, page_token=token))
        assert len(page.items) <= 5
        assert not any(entry.HasField("image_bytes") for entry in page.items)
        seen += [entry.item_id for entry in page.items]
        if not (token := page.next_page_token):
            break
    assert seen == sorted(ids, key=str.encode)


def test_a_page_token_is_refused_when_forged_or_of_another_filter(shop: Shop) -> None:
    upsert(shop, *(item(f"item-{number}", brand="A") for number in range(3)))
    token = shop.catalog.ListItems(pb.ListItemsRequest(page_size=1)).next_page_token
    for request in (
        pb.ListItemsRequest(page_token=token, filter=pb.ItemFilter(brands=["A"])),
        pb.ListItemsRequest(page_token=token[:-2] + "AA"),
        pb.ListItemsRequest(page_size=-1),
        pb.ListItemsRequest(filter=pb.ItemFilter(min_price_micros=3)),
    ):
        with pytest.raises(grpc.RpcError) as failure:
            shop.catalog.ListItems(request)
        assert failure.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_a_filter_selects(shop: Shop) -> None:
    upsert(
        shop,
        item("boot", brand="A", category_path=["Women", "Shoes"], price_micros=50, currency_code="EUR"),
        item("coat", brand="B", category_path=["Women", "Coats"], tags=["warm", "new"], stock_quantity=0),
        item("tea", brand="A", primary_item_id="teas", withdrawn=True, price_micros=5, currency_code="EUR"),
    )
    inventory(shop, pb.InventoryEntry(item_id="bare", stock_quantity=1))

    def found(**conditions: Any) -> list[str]:
        request = pb.ListItemsRequest(filter=pb.ItemFilter(**conditions))
        return [entry.item_id for entry in shop.catalog.ListItems(request).items]

    assert found() == ["bare", "boot", "coat", "tea"]
    assert found(category_path_prefix=["Women"]) == ["boot", "coat"]
    assert found(category_path_prefix=["Women", "Shoes"]) == ["boot"]
    assert found(brands=["A"]) == ["boot", "tea"]
    assert found(tags=["new"]) == ["coat"]
    assert found(primary_item_id="teas") == ["tea"]
    assert found(in_stock_only=True) == ["bare", "boot", "tea"]
    assert found(min_price_micros=6, currency_code="EUR") == ["boot"]
    assert found(max_price_micros=6, currency_code="EUR") == ["tea"]
    assert found(exclude_withdrawn=True, exclude_placeholders=True) == ["boot", "coat"]


class ItemsWatcher:
    """Applies a stream of items, as recommend does."""

    def __init__(self, shop: Shop, resume_token: bytes = b"") -> None:
        self.items: dict[str, item_pb2.Item] = {}
        self.told: list[str] = []
        self.watermark = b""
        self.complete = False
        self.resets = 0
        self.error: grpc.RpcError | None = None
        self.call = shop.catalog.WatchItems(pb.WatchItemsRequest(resume_token=resume_token))
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            for message in self.call:
                if message.reset:
                    self.items.clear()
                    self.resets += 1
                for entry in message.upserted:
                    self.items[entry.item_id] = entry
                    self.told.append(entry.item_id)
                for item_id in message.deleted_item_ids:
                    self.items.pop(item_id, None)
                    self.told.append(item_id)
                self.watermark = message.watermark or self.watermark
                self.complete = self.complete or message.snapshot_complete
        except grpc.RpcError as error:
            self.error = error

    def stop(self) -> None:
        self.call.cancel()
        self._thread.join(10)


@pytest.fixture
def watch_items(shop: Shop) -> Iterator[Callable[..., ItemsWatcher]]:
    watchers: list[ItemsWatcher] = []

    def start(resume_token: bytes = b"") -> ItemsWatcher:
        watchers.append(ItemsWatcher(shop, resume_token))
        eventually(lambda: watchers[-1].complete or watchers[-1].error, "the snapshot")
        return watchers[-1]

    yield start
    for watcher in watchers:
        watcher.stop()


def test_a_watcher_gets_the_whole_catalogue_then_every_change(
    shop: Shop, watch_items: Callable[..., ItemsWatcher]
) -> None:
    upsert(shop, *(item(f"item-{number}", image_bytes=b"\xff\xd8\xff1") for number in range(1000)))
    upsert(shop, *(item(f"more-{number}") for number in range(500)))
    shop.catalog.DeleteItems(pb.DeleteItemsRequest(item_ids=["more-0"]))
    watchers = [watch_items(), watch_items()]
    for watcher in watchers:
        eventually(lambda w=watcher: len(w.items) == 1499)  # type: ignore[misc]
        assert not watcher.items["item-7"].HasField("image_bytes")

    upsert(shop, item("item-7", title="changed"), item("new"))
    inventory(shop, pb.InventoryEntry(item_id="item-8", stock_quantity=2))
    shop.catalog.DeleteItems(pb.DeleteItemsRequest(item_ids=["item-9"]))
    for watcher in watchers:
        eventually(lambda w=watcher: w.items["item-7"].title == "changed")  # type: ignore[misc]
        eventually(lambda w=watcher: "new" in w.items)  # type: ignore[misc]
        eventually(lambda w=watcher: w.items["item-8"].stock_quantity == 2)  # type: ignore[misc]
        eventually(lambda w=watcher: "item-9" not in w.items)  # type: ignore[misc]
    assert watchers[0].items == watchers[1].items


def test_a_watcher_of_items_resumes_and_hears_of_what_it_missed_alone(
    shop: Shop, watch_items: Callable[..., ItemsWatcher], start_profile: Callable[..., Any]
) -> None:
    upsert(shop, *(item(f"item-{number}") for number in range(50)))
    first = watch_items()
    eventually(lambda: len(first.items) == 50)
    upsert(shop, item("last"))
    eventually(lambda: "last" in first.items)
    # The message that told of it may have been followed by one that says how far the stream is.
    first.stop()
    upsert(shop, item("item-3", title="missed"))
    shop.catalog.DeleteItems(pb.DeleteItemsRequest(item_ids=["item-4"]))

    second = watch_items(first.watermark)
    eventually(lambda: "item-4" in second.told and second.items.get("item-3"))
    assert second.resets == 0
    assert second.items["item-3"].title == "missed"
    assert set(second.told) <= {"item-3", "item-4", "last"}

    service, channel = start_profile()
    eventually(lambda: service.readiness()[0])
    third = ItemsWatcher(Shop(service, channel, shop.log), first.watermark)
    eventually(lambda: third.complete)
    third.stop()
    assert third.resets == 0
    assert {"item-3", "item-4"} <= set(third.told) <= {"item-3", "item-4", "last"}


def test_a_malformed_resume_token_is_refused(watch_items: Callable[..., ItemsWatcher]) -> None:
    watcher = watch_items(b"\xff\x00")

    assert watcher.error is not None
    assert watcher.error.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_a_catalogue_write_of_a_long_transaction_reaches_the_watcher(
    shop: Shop, watch_items: Callable[..., ItemsWatcher], database_url: str
) -> None:
    import psycopg

    upsert(shop, item("slow"), item("quick"))
    watcher = watch_items()
    with psycopg.connect(database_url) as slow:
        slow.execute(
            "UPDATE profile.items SET title = 'late', xid = pg_current_xact_id() WHERE item_id = 'slow'"
        )
        upsert(shop, item("quick", title="changed"))
        eventually(lambda: watcher.items["quick"].title == "changed")
        assert watcher.items["slow"].title != "late"
        slow.commit()
    eventually(lambda: watcher.items["slow"].title == "late")
