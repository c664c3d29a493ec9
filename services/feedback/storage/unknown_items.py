"""Counts, from the log itself, the items that the catalogue does not know.

One replica does it for all, a page of transactions at a time; the counts and how far they go are committed together, so
that a crash loses nothing and counts nothing twice. While the catalogue is not known it waits, and misses nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import psycopg
from prometheus_client import Gauge

from services.feedback.domain.unknown_items import UnknownItem, UnknownItemOrder, UnknownItemsPage
from services.feedback.storage.log_pages import PAGE_ROWS, LogPage, next_page, unhurried
from shared.database import Database, trusted_sql

_DELETED_AT_ONCE = 10_000
_UNKNOWN = Gauge(
    "shopkeeper_feedback_unknown_items",
    "Items that events name and the catalogue does not know; the marking replica.",
)

# An event that names an item several times counts once for it.
_NAMED = """
WITH fresh AS (
    SELECT item_id, line_items, impression_items, received_at FROM feedback.events AS e
    WHERE e.xid >= %(after)s::xid8 AND e.xid < %(before)s::xid8
        AND (
            NOT EXISTS (SELECT FROM feedback.rewriting_transactions AS r WHERE r.xid = e.xid)
            OR EXISTS (SELECT FROM feedback.rewritten_uncounted AS u WHERE u.event_key = e.event_key)
        )
), named AS (
    SELECT item_id, received_at FROM fresh WHERE line_items IS NULL AND impression_items IS NULL
    UNION ALL
    SELECT n.item_id, f.received_at FROM fresh AS f
    CROSS JOIN LATERAL (SELECT DISTINCT unnest(ARRAY[f.item_id] || f.line_items || f.impression_items)) AS n (item_id)
    WHERE f.line_items IS NOT NULL OR f.impression_items IS NOT NULL
)
SELECT item_id, count(*), min(received_at), max(received_at) FROM named
WHERE item_id <> '' GROUP BY item_id
"""
_ADD = """
INSERT INTO feedback.unknown_items AS u (item_id, event_count, first_seen_at, last_seen_at)
SELECT * FROM unnest(%s::text[], %s::bigint[], %s::timestamptz[], %s::timestamptz[])
ON CONFLICT (item_id) DO UPDATE SET
    event_count = u.event_count + excluded.event_count,
    first_seen_at = LEAST(u.first_seen_at, excluded.first_seen_at),
    last_seen_at = GREATEST(u.last_seen_at, excluded.last_seen_at)
"""
_PAGE = {
    UnknownItemOrder.EVENT_COUNT: (
        "WHERE %(count)s::bigint IS NULL OR event_count < %(count)s OR (event_count = %(count)s AND item_id > %(item)s) "
        "ORDER BY event_count DESC, item_id"
    ),
    UnknownItemOrder.ITEM_ID: "WHERE %(item)s::text IS NULL OR item_id > %(item)s ORDER BY item_id",
}


# Which rows of some shoppers were not counted yet.
_UNCOUNTED = """
SELECT e.event_key, e.xid >= w.xid AND (
    NOT EXISTS (SELECT FROM feedback.rewriting_transactions AS r WHERE r.xid = e.xid)
    OR EXISTS (SELECT FROM feedback.rewritten_uncounted AS n WHERE n.event_key = e.event_key)
) AS uncounted
FROM feedback.unknown_items_watermark AS w
CROSS JOIN unnest(%(old)s::bytea[], %(versions)s::smallint[]) AS u (user_key, key_version)
JOIN feedback.events AS e ON e.user_key = u.user_key AND e.key_version = u.key_version
"""
_NOTE_UNCOUNTED = """
INSERT INTO feedback.rewritten_uncounted (event_key, xid)
SELECT event_key, pg_current_xact_id() FROM unnest(%s::uuid[]) AS u (event_key)
ON CONFLICT (event_key) DO UPDATE SET xid = excluded.xid
"""


def note_rewriting(connection: psycopg.Connection[Any], parameters: Mapping[str, Any]) -> None:
    """Notes, in the transaction that is about to store rows of shoppers anew, which of them were counted before.

    Args:
        parameters: `old`, keys of shoppers; `versions`, the version of each.
    """
    # The count stands still until this has ended.
    connection.execute("SELECT FROM feedback.unknown_items_watermark FOR SHARE")
    rows = connection.execute(_UNCOUNTED, parameters).fetchall()
    uncounted = sorted(key for key, is_uncounted in rows if is_uncounted)
    # Where none was counted the transaction is one like any other.
    if len(uncounted) < len(rows):
        connection.execute("INSERT INTO feedback.rewriting_transactions (xid) VALUES (pg_current_xact_id())")
        connection.execute(_NOTE_UNCOUNTED, (uncounted,))


class PostgresUnknownItems:
    """The UnknownItemStore, and the work of counting.

    Args:
        known: the items of the catalogue; None while it cannot tell.
    """

    def __init__(
        self,
        database: Database,
        known: Callable[[], frozenset[str] | None],
        *,
        page_rows: int = PAGE_ROWS,
        wait: Callable[[float], object] = lambda seconds: None,
    ) -> None:
        self._database = database
        self._known = known
        self._page_rows = page_rows
        self._wait = wait
        self._compared_with: frozenset[str] | None = None

    def page(self, order: UnknownItemOrder, after: tuple[int, str] | None, limit: int) -> UnknownItemsPage:
        """Returns at most `limit` items that come after a (number of events, id)."""
        count, item = after or (None, None)
        with self._database.connect() as connection:
            rows = connection.execute(
                trusted_sql(
                    "SELECT item_id, event_count, first_seen_at, last_seen_at FROM feedback.unknown_items "  # noqa: S608
                    f"{_PAGE[order]} LIMIT %(limit)s"
                ),
                {"count": count, "item": item, "limit": limit + 1},
            ).fetchall()
            row = connection.execute(
                "SELECT (SELECT count(*) FROM feedback.unknown_items), compared_at FROM feedback.unknown_items_watermark"
            ).fetchone()
        assert row is not None
        return UnknownItemsPage(
            [UnknownItem(*one) for one in rows[:limit]], len(rows) > limit, row[0], row[1]
        )

    def step(self) -> bool:
        """Counts the next page of the log; returns whether there is another one."""
        known = self._known()
        if known is None:
            return False
        with unhurried(self._wait):
            # Before the page: what has become known is gone before anything is counted as of this catalogue.
            if known is not self._compared_with:
                self._forget(known)
                self._compared_with = known
            page = self._count(known)
        return not page.is_last

    def _count(self, known: frozenset[str]) -> LogPage:
        with self._database.connect() as connection:
            connection.execute("SET LOCAL statement_timeout = 0")
            page = next_page(connection, "unknown_items_watermark", self._page_rows)
            if not page.is_empty:
                named = [row for row in connection.execute(_NAMED, page.bounds) if row[0] not in known]
                if named:
                    # Sorted, as every writer of several rows does.
                    connection.execute(_ADD, [list(column) for column in zip(*sorted(named), strict=True)])
                for table in ("rewriting_transactions", "rewritten_uncounted"):
                    connection.execute(
                        trusted_sql(f"DELETE FROM feedback.{table} WHERE xid < %s::xid8"),  # noqa: S608
                        (page.before,),
                    )
            connection.execute(
                "UPDATE feedback.unknown_items_watermark SET xid = GREATEST(xid, %s::xid8), "
                "compared_at = CASE WHEN %s THEN now() ELSE compared_at END",
                (page.before, page.is_last),
            )
            if page.is_last:
                row = connection.execute("SELECT count(*) FROM feedback.unknown_items").fetchone()
                _UNKNOWN.set(row[0] if row else 0)
        return page

    def _forget(self, known: frozenset[str]) -> None:
        last = ""
        while True:
            with self._database.connect() as connection:
                items = [
                    item
                    for (item,) in connection.execute(
                        "SELECT item_id FROM feedback.unknown_items WHERE item_id > %s ORDER BY item_id LIMIT %s",
                        (last, _DELETED_AT_ONCE),
                    )
                ]
                if not items:
                    return
                connection.execute(
                    "DELETE FROM feedback.unknown_items WHERE item_id = ANY (%s)",
                    ([item for item in items if item in known],),
                )
            last = items[-1]
