"""Pages of the log by the transactions that stored them, for work that one replica does for all.

How far the work has come is committed with its result: a crash loses nothing and does nothing twice. PostgreSQL may give
numbers out again after a crash, but none below that of a transaction that it recovers, and so none that such a
commit has passed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psycopg

from shared.database import trusted_sql

# A page takes a tenth of a second or less: calls that are served meanwhile wait for the processor that long at most.
PAGE_ROWS = 5_000

# Transactions below the horizon have ended: nothing can appear behind it, so a number is watermark enough.
_PAGE_END = """
SELECT w.xid::text, pg_snapshot_xmin(pg_current_snapshot())::text, (
    SELECT e.xid::text FROM feedback.events AS e
    WHERE e.xid >= w.xid AND e.xid < pg_snapshot_xmin(pg_current_snapshot())
    ORDER BY e.xid OFFSET %s LIMIT 1
)
FROM feedback.{watermark} AS w FOR UPDATE
"""


@dataclass(frozen=True, slots=True)
class LogPage:
    """Rows whose transaction is at least `after` and below `before`, both as text.

    Attributes:
        is_last: nothing that has ended lies behind it.
    """

    after: str
    before: str
    is_last: bool

    @property
    def is_empty(self) -> bool:
        """Whether no transaction can be in it."""
        return int(self.before) <= int(self.after)

    @property
    def bounds(self) -> dict[str, str]:
        """The parameters `after` and `before` of a statement."""
        return {"after": self.after, "before": self.before}


def next_page(connection: psycopg.Connection[Any], watermark: str, rows: int) -> LogPage:
    """Returns the page that comes next, of at least so many rows where there are; the watermark is locked.

    Args:
        watermark: the table that says how far the work has come.
    """
    row = connection.execute(trusted_sql(_PAGE_END.format(watermark=watermark)), (rows,)).fetchone()
    assert row is not None
    after, horizon, page_end = row
    # A transaction is looked through whole, however large.
    before = horizon if page_end is None else str(max(int(page_end), int(after) + 1))
    return LogPage(after, before, page_end is None)


@contextmanager
def unhurried(wait: Callable[[float], object]) -> Iterator[None]:
    """Waits behind the block nine times as long as it took: a tenth of one core at most. Work lags behind the log and catches up."""
    began = time.monotonic()
    yield
    wait(9 * (time.monotonic() - began))
