"""The catalogue in PostgreSQL: one statement writes a thousand items, field by field."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg

from services.profile.domain.items import (
    ALL_FIELDS,
    Attribute,
    Field,
    Item,
    ItemFilter,
    ItemWrite,
    WriteResult,
    WriteStatus,
    rounds_of_distinct_items,
)
from services.profile.ports import CatalogueChanges, StoredItem
from services.profile.storage.snapshots import NEW_SINCE, new_since, snapshot_of, watermark_of
from shared.database import Database, trusted_sql
from shared.errors import Unavailable
from shared.tokens import Watermark

CHANNEL = "profile_items"
CHUNK_ROWS = 2000
ANNOUNCE_SECONDS = 0.02
_WRITTEN = range(1, max(Field) + 1)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

# column, its type, the field whose time decides about it
_COLUMNS: tuple[tuple[str, str, Field], ...] = (
    ("title", "text", Field.TITLE),
    ("description", "text", Field.DESCRIPTION),
    ("brand", "text", Field.BRAND),
    ("category_path", "text[]", Field.CATEGORY_PATH),
    ("attributes", "jsonb", Field.ATTRIBUTES),
    ("price_micros", "bigint", Field.PRICE_MICROS),
    ("list_price_micros", "bigint", Field.LIST_PRICE_MICROS),
    ("currency_code", "text", Field.CURRENCY_CODE),
    ("stock_quantity", "bigint", Field.STOCK_QUANTITY),
    ("primary_item_id", "text", Field.PRIMARY_ITEM_ID),
    ("image_uri", "text", Field.IMAGE),
    ("image_bytes", "bytea", Field.IMAGE),
    ("tags", "text[]", Field.TAGS),
    ("available_from", "timestamptz", Field.AVAILABLE_FROM),
    ("available_until", "timestamptz", Field.AVAILABLE_UNTIL),
    ("margin_micros", "bigint", Field.MARGIN_MICROS),
    ("language_code", "text", Field.LANGUAGE_CODE),
    ("rating_count", "bigint", Field.RATING_COUNT),
    ("rating_mean", "double precision", Field.RATING_MEAN),
    ("withdrawn", "boolean", Field.WITHDRAWN),
    ("deleted", "boolean", Field.DELETED),
)
_NAMES = tuple(name for name, _, _ in _COLUMNS)

_SELECT = "item_id, " + ", ".join(_NAMES) + ", described, update_time, revision"
ITEM_COLUMNS_WITHOUT_PICTURE = _SELECT.replace("image_bytes", "''::bytea AS image_bytes")

# One JSON text carries the batch: the driver's arrays cost six times as much, and none of lists of lists exists.
_WRITE = trusted_sql(
    f"""
    INSERT INTO items AS i (item_id, {", ".join(_NAMES)}, described, written_at_us)
    SELECT item_id, {", ".join(_NAMES)}, described, written_at_us
    FROM json_to_recordset(%s::json) AS incoming (
        item_id text, {", ".join(f"{name} {type_}" for name, type_, _ in _COLUMNS)},
        described boolean, written_at_us bigint[])
    ORDER BY item_id
    ON CONFLICT (item_id) DO UPDATE SET
        {
        ", ".join(
            f"{name} = CASE WHEN excluded.written_at_us[{field}] >= coalesce(i.written_at_us[{field}], 0) "
            f"THEN excluded.{name} ELSE i.{name} END"
            for name, _, field in _COLUMNS
        )
    },
        described = i.described OR excluded.described,
        written_at_us = ARRAY[{
        ", ".join(f"greatest(i.written_at_us[{n}], excluded.written_at_us[{n}])" for n in _WRITTEN)
    }],
        revision = i.revision + 1,
        update_time = clock_timestamp(),
        xid = pg_current_xact_id()
    WHERE (excluded.described AND NOT i.described) OR {
        " OR ".join(f"excluded.written_at_us[{n}] >= coalesce(i.written_at_us[{n}], 0)" for n in _WRITTEN)
    }
    RETURNING item_id, revision
    """  # noqa: S608
)
_FOLLOWED = "SELECT xid FROM items"
_LOCK = "SELECT item_id, revision, deleted FROM items WHERE item_id = ANY(%s) ORDER BY item_id FOR UPDATE"


class PostgresCatalogue:
    """The table `items`."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._announcer = _Announcer(database)

    def close(self) -> None:
        """Ends the announcer."""
        self._announcer.stop()

    def write(self, writes: Sequence[ItemWrite]) -> list[WriteResult]:
        """See `CatalogueStore.write`."""
        results: dict[int, WriteResult] = {}
        with _migrated(), self._database.connect() as connection:
            for writes_of_round in rounds_of_distinct_items(writes):
                for result in self._write_round(connection, writes_of_round):
                    results[result.row] = result
        return [results[write.row] for write in writes]

    def _write_round(
        self, connection: psycopg.Connection[Any], writes: Sequence[ItemWrite]
    ) -> Iterator[WriteResult]:
        conditional = [w for w in writes if w.if_revision is not None or not w.may_create or _deletes(w)]
        current: dict[str, tuple[int, bool]] = {}
        if conditional:
            rows = connection.execute(_LOCK, ([w.item.item_id for w in conditional],)).fetchall()
            current = {item_id: (revision, deleted) for item_id, revision, deleted in rows}
        accepted = []
        for write in writes:
            item_id = write.item.item_id
            revision, deleted = current.get(item_id, (0, True))
            if write.if_revision is not None and write.if_revision != revision:
                yield WriteResult(write.row, item_id, WriteStatus.ETAG_MISMATCH, revision)
            elif not write.may_create and deleted:
                yield WriteResult(write.row, item_id, WriteStatus.NOT_FOUND)
            else:
                accepted.append(write)
        if not accepted:
            return
        cursor = connection.execute(_WRITE, (_json(accepted),))
        revisions = dict(cursor.fetchall())
        superseded = [w.item.item_id for w in accepted if w.item.item_id not in revisions]
        revisions_now = {}
        if superseded:
            rows = connection.execute(
                "SELECT item_id, revision FROM items WHERE item_id = ANY(%s)", (superseded,)
            ).fetchall()
            revisions_now = dict(rows)
        for write in accepted:
            item_id = write.item.item_id
            if _deletes(write) and current.get(item_id, (0, True))[1]:
                yield WriteResult(write.row, item_id, WriteStatus.NOT_FOUND)
            elif item_id in revisions:
                yield WriteResult(write.row, item_id, WriteStatus.STORED, revisions[item_id])
            else:
                yield WriteResult(write.row, item_id, WriteStatus.SUPERSEDED, revisions_now.get(item_id, 0))

    def get(self, item_id: str) -> Item | None:
        """See `CatalogueStore.get`."""
        with _migrated(), self._database.connect() as connection:
            row = connection.execute(
                trusted_sql(f"SELECT {_SELECT} FROM items WHERE item_id = %s AND NOT deleted"),  # noqa: S608
                (item_id,),
            ).fetchone()
        return item_of(row) if row is not None else None

    def page(self, item_filter: ItemFilter, after_item_id: str, limit: int) -> list[Item]:
        """See `CatalogueStore.page`."""
        conditions = ["NOT deleted", "item_id > %(after)s"]
        values: dict[str, Any] = {"after": after_item_id, "limit": limit}
        for condition, name, value in (
            ("category_path[1:%(depth)s] = %(path)s::text[]", "path", list(item_filter.category_path_prefix)),
            ("brand = ANY(%(brands)s)", "brands", list(item_filter.brands)),
            ("tags @> %(tags)s::text[]", "tags", list(item_filter.tags)),
            ("primary_item_id = %(primary)s", "primary", item_filter.primary_item_id),
            ("price_micros >= %(min_price)s", "min_price", item_filter.min_price_micros),
            ("price_micros <= %(max_price)s", "max_price", item_filter.max_price_micros),
            ("currency_code = %(currency)s", "currency", item_filter.currency_code),
        ):
            if value is not None and value not in ([], ""):
                conditions.append(condition)
                values[name] = value
        values["depth"] = len(item_filter.category_path_prefix)
        if item_filter.in_stock_only:
            conditions.append("coalesce(stock_quantity, 1) > 0")
        if item_filter.exclude_withdrawn:
            conditions.append("NOT withdrawn")
        if item_filter.exclude_placeholders:
            conditions.append("described")
        query = trusted_sql(
            f"SELECT {ITEM_COLUMNS_WITHOUT_PICTURE} FROM items WHERE {' AND '.join(conditions)} "  # noqa: S608
            "ORDER BY item_id LIMIT %(limit)s"
        )
        with _migrated(), self._database.connect() as connection:
            return [item_of(row) for row in connection.execute(query, values).fetchall()]

    def load(self) -> Iterator[CatalogueChanges]:
        """See `CatalogueStore.load`."""
        query = trusted_sql(f"SELECT xid::text, {ITEM_COLUMNS_WITHOUT_PICTURE} FROM items")  # noqa: S608
        with _migrated(), snapshot_of(self._database) as (connection, snapshot):
            watermark = watermark_of(connection, snapshot, _FOLLOWED)
            with connection.cursor(name="load_items") as cursor:
                cursor.execute(query)
                while rows := cursor.fetchmany(CHUNK_ROWS):
                    yield CatalogueChanges(watermark, _stored(rows))
            yield CatalogueChanges(watermark, ())

    def poll(self, since: Watermark) -> CatalogueChanges:
        """See `CatalogueStore.poll`."""
        query = trusted_sql(
            f"SELECT xid::text, {ITEM_COLUMNS_WITHOUT_PICTURE} FROM items WHERE {NEW_SINCE}"  # noqa: S608
        )
        with _migrated(), snapshot_of(self._database) as (connection, snapshot):
            watermark = watermark_of(connection, snapshot, _FOLLOWED, since)
            if snapshot.xmax < since.xmax or (watermark.xmax == since.xmax and not since.in_progress):
                return CatalogueChanges(watermark, ())
            rows = connection.execute(query, new_since(since)).fetchall()
        return CatalogueChanges(watermark, _stored(rows))

    def announce(self) -> None:
        """See `CatalogueStore.announce`."""
        self._announcer.wake()


class _Announcer:
    """Sends NOTIFY on a connection of its own, at most every 20 ms.

    A NOTIFY inside of every write would make all commits queue for one lock.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._due = threading.Event()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def wake(self) -> None:
        with self._lock:
            if self._thread is None and not self._stopping.is_set():
                self._thread = threading.Thread(target=self._run, name="announce-items", daemon=True)
                self._thread.start()
        self._due.set()

    def stop(self) -> None:
        self._stopping.set()
        self._due.set()
        with self._lock:
            thread = self._thread
        if thread is not None:
            thread.join(2.0)

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                with self._database.dedicated_connection(autocommit=True) as connection:
                    while not self._stopping.is_set():
                        self._due.wait()
                        self._due.clear()
                        connection.execute(trusted_sql(f"NOTIFY {CHANNEL}"))
                        self._stopping.wait(ANNOUNCE_SECONDS)
            except (psycopg.Error, Unavailable):
                self._stopping.wait(0.5)


def _deletes(write: ItemWrite) -> bool:
    return write.item.deleted and Field.DELETED in write.fields


def _json(writes: Sequence[ItemWrite]) -> str:
    times: dict[tuple[int, frozenset[Field]], list[int | None]] = {}
    rows = []
    for write in writes:
        key = (write.write_time_us, write.fields)
        written_at_us = times.get(key)
        if written_at_us is None:
            written_at_us = times[key] = [
                write.write_time_us if slot in write.fields else None for slot in _WRITTEN
            ]
        item = write.item
        rows.append(
            {
                "item_id": item.item_id,
                "title": item.title,
                "description": item.description,
                "brand": item.brand,
                "category_path": item.category_path,
                # A list, not an object: the order is the shop's.
                "attributes": [(attribute.key, attribute.value) for attribute in item.attributes],
                "price_micros": item.price_micros,
                "list_price_micros": item.list_price_micros,
                "currency_code": item.currency_code,
                "stock_quantity": item.stock_quantity,
                "primary_item_id": item.primary_item_id,
                "image_uri": item.image_uri,
                "image_bytes": "\\x" + item.image_bytes.hex(),
                "tags": item.tags,
                "available_from": _iso(item.available_from_us),
                "available_until": _iso(item.available_until_us),
                "margin_micros": item.margin_micros,
                "language_code": item.language_code,
                "rating_count": item.rating_count,
                "rating_mean": item.rating_mean,
                "withdrawn": item.withdrawn,
                "deleted": item.deleted,
                "described": write.describes,
                "written_at_us": written_at_us,
            }
        )
    return json.dumps(rows, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _iso(time_us: int | None) -> str | None:
    return None if time_us is None else (_EPOCH + timedelta(microseconds=time_us)).isoformat()


def _micros(time: datetime | None) -> int | None:
    return None if time is None else (time - _EPOCH) // timedelta(microseconds=1)


def _stored(rows: Sequence[tuple[Any, ...]]) -> list[StoredItem]:
    return [StoredItem(item_of(row[1:]), int(row[0])) for row in rows]


def item_of(row: Sequence[Any]) -> Item:
    values = dict(zip(("item_id", *_NAMES), row, strict=False))
    described, update_time, revision = row[-3:]
    return Item(
        item_id=values["item_id"],
        title=values["title"],
        description=values["description"],
        brand=values["brand"],
        category_path=tuple(values["category_path"]),
        attributes=tuple(
            # JSON does not tell 1.0 from 1; the contract has one kind of number.
            Attribute(key, float(value) if isinstance(value, int) and not isinstance(value, bool) else value)
            for key, value in values["attributes"]
        ),
        price_micros=values["price_micros"],
        list_price_micros=values["list_price_micros"],
        currency_code=values["currency_code"],
        stock_quantity=values["stock_quantity"],
        primary_item_id=values["primary_item_id"],
        image_uri=values["image_uri"],
        image_bytes=bytes(values["image_bytes"]),
        tags=tuple(values["tags"]),
        available_from_us=_micros(values["available_from"]),
        available_until_us=_micros(values["available_until"]),
        margin_micros=values["margin_micros"],
        language_code=values["language_code"],
        rating_count=values["rating_count"],
        rating_mean=values["rating_mean"],
        withdrawn=values["withdrawn"],
        placeholder=not described,
        deleted=values["deleted"],
        update_time_us=_micros(update_time) or 0,
        revision=revision,
    )


@contextmanager
def _migrated() -> Iterator[None]:
    try:
        yield
    except psycopg.errors.UndefinedTable as error:
        raise Unavailable(
            "DATABASE_UNAVAILABLE",
            "The schema of this service is not there yet: run `python -m services.profile migrate`.",
            retry_after_seconds=1.0,
        ) from error


assert set(ALL_FIELDS) == {field for _, _, field in _COLUMNS}
