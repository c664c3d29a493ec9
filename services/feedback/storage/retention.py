"""What is older than it may be goes; and what an operator wants gone."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta

import psycopg

from services.feedback.storage.partitions import (
    REMEMBER,
    drop_month,
    erase_from_default,
    existing_months,
    forget_remembered,
    month_of,
    partition_name,
    remember_month,
)
from shared.database import Database
from shared.telemetry import get_logger

_PAGE_ROWS = 20_000

# Pages by key: each is short, whatever the size of the log, and what is done stays done.
_PURGE = """
WITH page AS MATERIALIZED (
    SELECT event_key, occurred_at, kind FROM feedback.events WHERE event_key > %(after)s
    ORDER BY event_key LIMIT %(page)s
), doomed AS (
    SELECT event_key FROM page
    WHERE occurred_at < %(end)s AND (%(start)s::timestamptz IS NULL OR occurred_at >= %(start)s)
        AND (%(kinds)s::smallint[] IS NULL OR kind = ANY (%(kinds)s))
){erased}
SELECT (SELECT count(*) FROM {counted}), (SELECT count(*) FROM page),
    (SELECT event_key FROM page ORDER BY event_key DESC LIMIT 1)
"""
_COUNT_PAGE = _PURGE.format(erased="", counted="doomed")
_ERASE_PAGE = _PURGE.format(
    erased=", erased AS (DELETE FROM feedback.events AS e USING doomed AS d "  # noqa: S608
    "WHERE e.event_key = d.event_key RETURNING e.user_key, e.key_version, e.received_at), "
    f"remembered AS ({REMEMBER.format(gone='erased')})",
    counted="erased",
)


class PostgresPurge:
    """Counts or erases events of a time range."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def purge(
        self,
        start: datetime | None,
        end: datetime,
        kinds: Sequence[int],
        *,
        force: bool,
        goes_on: Callable[[], bool],
    ) -> int:
        """Returns the number of events that are erased, or would be without `force`.

        Leaves no tombstones: an event that is sent again is stored again. Ends early, with what is done,
        when `goes_on` says no.
        """
        statement = _ERASE_PAGE if force else _COUNT_PAGE
        total, after = 0, uuid.UUID(int=0)
        while goes_on():
            with self._database.connect() as connection:
                row = connection.execute(
                    statement,
                    {
                        "after": after,
                        "page": _PAGE_ROWS,
                        "start": start,
                        "end": end,
                        "kinds": list(kinds) or None,
                    },
                ).fetchone()
            assert row is not None
            count, looked_at, last = row
            total += count
            if looked_at < _PAGE_ROWS:
                break
            after = last
        return total


class Retention:
    """Drops months that lie wholly before the retention.

    Args:
        days: events older than this go, a month at a time; 0 keeps them for ever.
    """

    def __init__(self, database: Database, days: int, now: Callable[[], datetime]) -> None:
        self._database = database
        self._days = days
        self._now = now
        self._logger = get_logger("feedback")

    def run(self) -> bool:
        """Drops what is due; returns False, for there is nothing more to do at once."""
        if not self._days:
            return False
        cutoff = month_of(self._now() - timedelta(days=self._days))
        with self._database.connect() as connection:
            due = sorted(month for month in existing_months(connection) if month < cutoff)
        for month in due:
            with self._database.connect() as connection:
                remembered_below = remember_month(connection, month)
            with self._database.connect() as connection:
                try:
                    rows = drop_month(connection, month, remembered_below)
                except psycopg.errors.LockNotAvailable:
                    # A training run reads the log. There is time: the next round tries again.
                    self._logger.info("retention put off", month=partition_name(month))
                    continue
            self._logger.info("month dropped", month=partition_name(month), rows=rows)
        with self._database.connect() as connection:
            if rows := erase_from_default(connection, cutoff):
                self._logger.info("old events without a month erased", rows=rows)
        if due:
            with self._database.connect() as connection:
                forget_remembered(connection)
        return False
