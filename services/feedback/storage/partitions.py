"""Monthly partitions of the log, created when a month first appears.

A row whose month has no partition goes to `events_default`. PostgreSQL refuses
to attach a partition while the default one holds rows of its range, so those
are moved first, in the same transaction and with the `xid` they had: to readers
nothing happens.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import numpy as np
import numpy.typing as npt
import psycopg
from psycopg import sql

from services.feedback.domain.event_key import first_event_key
from shared.database import trusted_sql

FIRST_MONTH = (2000 - 1970) * 12
# The locks of the log, in one family: whoever stores shares WRITERS, whoever erases takes it alone for a moment.
WRITERS_LOCK = 0x46424C57
PARTITIONS_LOCK = 0x46424C50
LOCK_TIMEOUT_MS = 300

REMEMBER = """
INSERT INTO feedback.purged_people AS p (user_key, key_version, first_received_at)
SELECT user_key, max(key_version), min(received_at) FROM {gone} GROUP BY user_key ORDER BY user_key
ON CONFLICT (user_key) DO UPDATE SET first_received_at = excluded.first_received_at
WHERE excluded.first_received_at < p.first_received_at
"""
"""Remembers since when models may hold people whose events go, for their receipts; `gone` has the events."""


def months_of(event_keys: npt.NDArray[np.void]) -> npt.NDArray[np.int64]:
    """Returns the distinct months of event keys of 16 bytes, as months since January 1970, ascending."""
    ms = (event_keys.view(">u8").reshape(-1, 2)[:, 0] >> 16).astype(np.int64)
    return np.unique(ms.astype("datetime64[ms]").astype("datetime64[M]").astype(np.int64))


def month_of(moment: datetime) -> int:
    """Returns the months since January 1970 of a moment."""
    moment = moment.astimezone(UTC)
    return (moment.year - 1970) * 12 + moment.month - 1


def _first_key_of_month(month: int) -> str:
    first = datetime(1970 + month // 12, month % 12 + 1, 1, tzinfo=UTC)
    return first_event_key(int(first.timestamp() * 1000)).hex()


def partition_name(month: int) -> str:
    """Returns the table of a month, such as `events_y2026m03`."""
    return f"events_y{1970 + month // 12}m{month % 12 + 1:02d}"


def existing_months(connection: psycopg.Connection[Any]) -> set[int]:
    """Returns the months that have a partition."""
    rows = connection.execute(
        "SELECT c.relname FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid "
        "WHERE i.inhparent = 'feedback.events'::regclass AND c.relname LIKE 'events_y%'"
    ).fetchall()
    return {(int(name[8:-3]) - 1970) * 12 + int(name[-2:]) - 1 for (name,) in rows}


def ensure_month(connection: psycopg.Connection[Any], month: int) -> None:
    """Creates and attaches the partition of a month, in one transaction; does nothing where it exists.

    Rows of the month that the default partition holds are moved into it.

    Raises:
        psycopg.errors.LockNotAvailable: a long reader holds the default partition. Its rows are safe
            there; try again later.
    """
    name = sql.Identifier("feedback", partition_name(month))
    low, high = _first_key_of_month(month), _first_key_of_month(month + 1)
    with connection.transaction():
        # Attaching waits for every reader of the log, and all else would wait behind it: rather give up soon.
        connection.execute(sql.SQL("SET LOCAL lock_timeout = {}").format(sql.Literal(LOCK_TIMEOUT_MS)))
        # Replicas that meet a new month at once must not both create it, nor wait for each other in a circle.
        connection.execute("SELECT pg_advisory_xact_lock(%s)", (PARTITIONS_LOCK,))
        if month in existing_months(connection):
            return
        # Writers to the default partition wait until its rows are moved and the new one is attached.
        connection.execute("LOCK TABLE feedback.events_default IN ACCESS EXCLUSIVE MODE")
        connection.execute(
            sql.SQL(
                "CREATE TABLE {name} (LIKE feedback.events INCLUDING DEFAULTS INCLUDING CONSTRAINTS INCLUDING INDEXES)"
            ).format(name=name)
        )
        bounds = {"low": sql.Literal(low), "high": sql.Literal(high), "name": name}
        connection.execute(
            sql.SQL(
                "WITH moved AS (DELETE FROM feedback.events_default "
                "WHERE event_key >= {low}::uuid AND event_key < {high}::uuid RETURNING *) "
                "INSERT INTO {name} SELECT * FROM moved"
            ).format(**bounds)
        )
        connection.execute(
            sql.SQL(
                "ALTER TABLE feedback.events ATTACH PARTITION {name} FOR VALUES FROM ({low}) TO ({high})"
            ).format(**bounds)
        )


def remember_month(connection: psycopg.Connection[Any], month: int) -> int:
    """Remembers whose events a month holds; returns the transaction below which all of them have been remembered."""
    connection.execute("SET LOCAL statement_timeout = 0")
    row = connection.execute("SELECT pg_snapshot_xmin(pg_current_snapshot())::text").fetchone()
    connection.execute(trusted_sql(REMEMBER.format(gone=f"feedback.{partition_name(month)}")))
    return int(row[0]) if row else 0


def forget_remembered(connection: psycopg.Connection[Any]) -> None:
    """Drops what was remembered of people who were forgotten meanwhile: their tombstones tell."""
    connection.execute(
        "DELETE FROM feedback.purged_people AS p USING ("
        "SELECT unnest(user_keys) AS user_key FROM feedback.tombstones) AS t WHERE p.user_key = t.user_key"
    )


def drop_month(connection: psycopg.Connection[Any], month: int, remembered_below: int) -> int:
    """Detaches and drops the partition of a month, in one transaction; returns the number of its rows.

    An event of that month that comes later goes to the default partition, or makes the month anew.

    Args:
        remembered_below: what `remember_month` returned; whose events came since is remembered here.

    Raises:
        psycopg.errors.LockNotAvailable: a long reader holds the log; try again later.
    """
    name = sql.Identifier("feedback", partition_name(month))
    with connection.transaction():
        connection.execute(sql.SQL("SET LOCAL lock_timeout = {}").format(sql.Literal(LOCK_TIMEOUT_MS)))
        connection.execute("SELECT pg_advisory_xact_lock(%s)", (PARTITIONS_LOCK,))
        if month not in existing_months(connection):
            return 0
        connection.execute(sql.SQL("ALTER TABLE feedback.events DETACH PARTITION {}").format(name))
        late = f"(SELECT * FROM feedback.{partition_name(month)} WHERE xid >= %s::text::xid8) AS late"  # noqa: S608
        connection.execute(trusted_sql(REMEMBER.format(gone=late)), (str(remembered_below),))
        row = connection.execute(sql.SQL("SELECT count(*) FROM {}").format(name)).fetchone()
        connection.execute(sql.SQL("DROP TABLE {}").format(name))
    return int(row[0]) if row else 0


def erase_from_default(connection: psycopg.Connection[Any], month: int) -> int:
    """Erases events before a month that no month's partition took; returns their number."""
    row = connection.execute(
        trusted_sql(
            "WITH erased AS (DELETE FROM feedback.events_default WHERE event_key < %s::uuid "  # noqa: S608
            f"RETURNING user_key, key_version, received_at), remembered AS ({REMEMBER.format(gone='erased')}) "
            "SELECT count(*) FROM erased"
        ),
        (_first_key_of_month(month),),
    ).fetchone()
    return int(row[0]) if row else 0
