"""The behaviour log, read through the views that feedback publishes.

Postgres packs the fixed part of every row into one `bytea`, which NumPy reads as an array: no object a
row is made but for the texts.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import psycopg

from services.profile.domain.events import (
    EMPTY_WINDOW,
    EVENT,
    HAS_PRICE,
    MAX_WINDOW_EVENTS,
    PERSONALISATION,
    EventBatch,
    EventWindow,
    Vocabulary,
    group_by_user,
)
from services.profile.ports import ChangedUsers, LogChanges
from services.profile.storage.snapshots import NEW_SINCE, new_since, snapshot_of, watermark_of
from shared.database import Database, trusted_sql
from shared.errors import Unavailable
from shared.identity import UserKey
from shared.tokens import Watermark

CHANNEL = "feedback_log"
CHUNK_ROWS = 50_000
_POSTGRES_EPOCH_US = 946_684_800_000_000
_NO_PRICE = -(2**63)

_ROW = np.dtype(
    [
        ("user_high", ">u8"),
        ("user_low", ">u8"),
        ("key_high", ">u8"),
        ("key_low", ">u8"),
        ("line", ">i2"),
        ("kind", ">i2"),
        ("occurred_at", ">i8"),
        ("quantity", ">f4"),
        ("price_micros", ">i8"),
        ("value", ">f4"),
        ("personalisation", "u1"),
        ("device", ">i2"),
        ("channel", ">i2"),
    ]
)

_PACKED = f"""
    string_agg(
        user_key || uuid_send(event_key) || int2send(line) || int2send(kind)
        || timestamptz_send(occurred_at) || float4send(coalesce(quantity, 'NaN'::real))
        || int8send(coalesce(price_micros, {_NO_PRICE})) || float4send(coalesce(value, 'NaN'::real))
        || boolsend(personalisation) || int2send(device) || int2send(channel), ''::bytea),
    array_agg(item_id), array_agg(currency_code)
"""
_COLUMNS = (
    "user_key, event_key, line, kind, occurred_at, quantity, price_micros, value, personalisation, "
    "device, channel, item_id, currency_code"
)

_POLL = trusted_sql(f"""
    SELECT {_PACKED} FROM (
        SELECT {_COLUMNS}, (row_number() OVER () - 1) / {CHUNK_ROWS} AS chunk
        FROM (SELECT {_COLUMNS} FROM feedback.events_v1 WHERE {NEW_SINCE} LIMIT %(limit)s) AS fresh
    ) AS numbered GROUP BY chunk
""")  # noqa: S608
FOLLOWED = "SELECT xid FROM feedback.log_transactions_v1 UNION ALL SELECT xid FROM profile.merged_users"
"""The transactions of all that the log's readers here follow."""

_ERASED = "SELECT user_key FROM feedback.tombstones_v1"
_POLL_ERASED = trusted_sql(f"{_ERASED} WHERE {NEW_SINCE}")
_POLL_CONSENTS = trusted_sql(f"SELECT user_key FROM feedback.consents_v1 WHERE {NEW_SINCE}")  # noqa: S608
_CHANGED = trusted_sql(
    f"SELECT user_key FROM feedback.events_v1 WHERE {NEW_SINCE} UNION "  # noqa: S608
    f"SELECT user_key FROM feedback.consents_v1 WHERE {NEW_SINCE} UNION "
    f"SELECT anonymous_key FROM profile.merged_users WHERE {NEW_SINCE} LIMIT %(limit)s"
)
# Where most shoppers have fewer events than a window, the planner would collect all events of a shopper and
# sort them: an outlier with a million of them must cost no more than a window.
_READ_INDEX_BACKWARDS = (
    "SELECT set_config('enable_sort', 'off', true), set_config('enable_bitmapscan', 'off', true)"
)
_ALL_MERGED = "SELECT anonymous_key, user_key FROM profile.merged_users"
_POLL_MERGED = trusted_sql(f"{_ALL_MERGED} WHERE {NEW_SINCE}")
_LOAD = trusted_sql(f"""
    SELECT {_PACKED}, (
        SELECT array_agg(user_key) FROM feedback.consents_v1
        WHERE user_key = ANY(%(user_keys)s::bytea[]) AND NOT personalisation)
    FROM (
        SELECT wanted_key AS root_key, wanted_key AS name FROM unnest(%(user_keys)s::bytea[]) AS wanted (wanted_key)
        UNION ALL
        SELECT m.user_key, m.anonymous_key FROM profile.merged_users AS m
        WHERE m.user_key = ANY(%(user_keys)s::bytea[])
            AND NOT EXISTS (SELECT FROM feedback.tombstones_v1 AS t WHERE t.user_key = m.anonymous_key)
    ) AS named CROSS JOIN LATERAL (
        SELECT root_key AS user_key, {_COLUMNS.removeprefix("user_key, ")}
        FROM feedback.events_v1 WHERE user_key = name
        ORDER BY event_key DESC, line DESC LIMIT {MAX_WINDOW_EVENTS + 1}
    ) AS newest
""")  # noqa: S608


class PostgresEventLog:
    """Reads the log. One thread polls; any thread loads.

    Args:
        items, currencies: give the texts of events their codes.
    """

    def __init__(self, database: Database, items: Vocabulary, currencies: Vocabulary) -> None:
        self._database = database
        self._items = items
        self._currencies = currencies

    def poll(self, since: Watermark | None, max_events: int) -> LogChanges:
        """See `EventLog.poll`."""
        with self._reading() as (connection, snapshot):
            if since is None:
                watermark = watermark_of(connection, snapshot, FOLLOWED)
                # Fails where the views are not there yet.
                connection.execute("SELECT FROM feedback.events_v1 LIMIT 0")
                connection.execute("SELECT FROM feedback.consents_v1 LIMIT 0")
                erased = connection.execute(trusted_sql(_ERASED), binary=True).fetchall()
                merged = connection.execute(trusted_sql(_ALL_MERGED), binary=True).fetchall()
                return LogChanges(
                    watermark, snapshot, self._batch([]), erased=_keys(erased), merged=_merged_keys(merged)
                )
            watermark = watermark_of(connection, snapshot, FOLLOWED, since)
            if snapshot.xmax < since.xmax:
                return LogChanges(watermark, snapshot, self._batch([]), overflow=True)
            if watermark.xmax == since.xmax and not since.in_progress:
                return LogChanges(watermark, snapshot, self._batch([]))
            new = new_since(since)
            chunks = connection.execute(_POLL, new | {"limit": max_events + 1}, binary=True).fetchall()
            consents = connection.execute(_POLL_CONSENTS, new, binary=True).fetchall()
            erased = connection.execute(_POLL_ERASED, new, binary=True).fetchall()
            merged = connection.execute(_POLL_MERGED, new, binary=True).fetchall()
        batch = self._batch(chunks)
        overflow = len(batch) > max_events
        return LogChanges(
            watermark,
            snapshot,
            self._batch([]) if overflow else batch,
            _keys(consents),
            _keys(erased),
            overflow,
            _merged_keys(merged),
        )

    def load(self, user_keys: Sequence[UserKey]) -> dict[UserKey, EventWindow]:
        """See `EventLog.load`."""
        with self._reading() as (connection, _):
            connection.execute(_READ_INDEX_BACKWARDS)
            rows = connection.execute(_LOAD, {"user_keys": list(user_keys)}, binary=True).fetchall()
        windows = {
            UserKey(bytes(user_key)): EventWindow(np.empty(0, EVENT), consented=False)
            for user_key in rows[0][3] or ()
        }
        for user_key, events in self._batch([row[:3] for row in rows]):
            windows[user_key] = windows.get(user_key, EMPTY_WINDOW).merge(events)
        return windows

    def changed_since(self, since: Watermark, max_users: int) -> ChangedUsers:
        """See `EventLog.changed_since`."""
        with self._reading() as (connection, snapshot):
            if snapshot.xmax < since.xmax:
                return ChangedUsers(None)
            new = new_since(since)
            changed = connection.execute(_CHANGED, new | {"limit": max_users + 1}, binary=True).fetchall()
            erased = connection.execute(_POLL_ERASED, new, binary=True).fetchall()
        return ChangedUsers(
            None if len(changed) > max_users else _keys(changed),
            _keys(erased),
        )

    @contextmanager
    def _reading(self) -> Iterator[tuple[psycopg.Connection[Any], Watermark]]:
        try:
            with snapshot_of(self._database) as reading:
                yield reading
        except (psycopg.errors.UndefinedTable, psycopg.errors.UndefinedColumn) as error:
            raise Unavailable(
                "LOG_UNAVAILABLE",
                "feedback has not published its views yet: start feedback, or run "
                "`python -m services.feedback migrate`.",
                retry_after_seconds=1.0,
            ) from error
        except psycopg.errors.InsufficientPrivilege as error:
            raise Unavailable(
                "LOG_UNAVAILABLE",
                "feedback has not granted its views to the role of this service: run "
                "`python -m services.feedback migrate`.",
                retry_after_seconds=1.0,
            ) from error

    def _batch(self, chunks: Sequence[tuple[Any, ...]]) -> EventBatch:
        chunks = [chunk for chunk in chunks if chunk[0] is not None]
        rows = np.frombuffer(b"".join(bytes(packed) for packed, _, _ in chunks), _ROW)
        events = np.zeros(len(rows), EVENT)
        for name in ("key_high", "key_low", "line", "kind", "quantity", "value", "device", "channel"):
            events[name] = rows[name]
        events["occurred_at_us"] = rows["occurred_at"].astype(np.int64) + _POSTGRES_EPOCH_US
        priced = rows["price_micros"] != _NO_PRICE
        events["price_micros"] = np.where(priced, rows["price_micros"], 0)
        events["flags"] = priced * HAS_PRICE + (rows["personalisation"] != 0) * PERSONALISATION
        at = 0
        for packed, item_ids, currency_codes in chunks:
            end = at + len(packed) // _ROW.itemsize
            events["item"][at:end] = self._items.encode(item_ids)
            events["currency"][at:end] = self._currencies.encode(currency_codes)
            at = end
        return group_by_user(rows["user_high"].astype(np.uint64), rows["user_low"].astype(np.uint64), events)


class Listener:
    """Waits for NOTIFY on a channel and calls back; connects again for as long as it takes.

    Losing a notification is harmless: whoever is woken also polls.
    """

    def __init__(self, database: Database, channel: str, on_notify: Callable[[], None]) -> None:
        self._database = database
        self._channel = channel
        self._on_notify = on_notify
        self._stopping = threading.Event()

    def run(self) -> None:
        """Listens until `stop`."""
        while not self._stopping.is_set():
            try:
                with self._database.dedicated_connection(autocommit=True) as connection:
                    connection.execute(trusted_sql(f"LISTEN {self._channel}"))
                    # What was announced while nobody listened.
                    self._on_notify()
                    while not self._stopping.is_set():
                        for _ in connection.notifies(timeout=0.5, stop_after=1):
                            self._on_notify()
            except (psycopg.Error, Unavailable):
                self._stopping.wait(0.5)

    def stop(self) -> None:
        """Ends `run` within half a second."""
        self._stopping.set()


def _keys(rows: Sequence[tuple[Any, ...]]) -> list[UserKey]:
    return [UserKey(bytes(user_key)) for (user_key,) in rows]


def _merged_keys(rows: Sequence[tuple[Any, ...]]) -> list[tuple[UserKey, UserKey | None]]:
    return [
        (UserKey(bytes(anonymous)), None if root is None else UserKey(bytes(root)))
        for anonymous, root in rows
    ]
