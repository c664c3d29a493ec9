"""Reading by commit order: what one snapshot of PostgreSQL sees and an earlier one did not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
from psycopg import IsolationLevel

from shared.database import Database, trusted_sql
from shared.tokens import Watermark

# NOT pg_visible_in_snapshot(xid, since), in a form that an index on xid serves even while a transaction that
# began long ago holds the snapshot's xmin back.
NEW_SINCE = "(xid >= %(xmax)s::text::xid8 OR xid = ANY(%(in_progress)s::text[]::xid8[]))"


def new_since(since: Watermark) -> dict[str, Any]:
    """Returns the parameters of NEW_SINCE."""
    return {"xmax": str(since.xmax), "in_progress": [str(xid) for xid in sorted(since.in_progress)]}


def watermark_of(
    connection: psycopg.Connection[Any], snapshot: Watermark, followed: str, since: Watermark | None = None
) -> Watermark:
    """Returns how far a reader is who has read everything that the snapshot shows.

    Args:
        connection: whose statements see the snapshot.
        followed: a query of the `xid` of every row that the reader follows.
        since: how far it was before. Where that lies ahead of the snapshot, as after the database was replaced by
            an older one, so it does ahead of what is returned.
    """
    known = 0 if since is None or since.xmax > snapshot.xmax else since.xmax - 1
    row = connection.execute(
        trusted_sql(
            f"SELECT f.xid::text FROM ({followed}) AS f "  # noqa: S608
            "WHERE f.xid > %(known)s::text::xid8 ORDER BY f.xid DESC LIMIT 1"
        ),
        {"known": str(known)},
    ).fetchone()
    return snapshot.durable(int(row[0]) if row else known)


@contextmanager
def snapshot_of(database: Database) -> Iterator[tuple[psycopg.Connection[Any], Watermark]]:
    """Lends a connection whose statements all see one snapshot, and that snapshot.

    Raises:
        Unavailable: the database does not answer.
    """
    with database.connect() as connection:
        connection.isolation_level = IsolationLevel.REPEATABLE_READ
        connection.read_only = True
        try:
            with connection.transaction():
                row = connection.execute("SELECT pg_current_snapshot()::text").fetchone()
                assert row is not None
                yield connection, Watermark.parse_pg(row[0])
        finally:
            # The pool lends the connection to others.
            if not connection.broken:
                connection.isolation_level = None
                connection.read_only = None
