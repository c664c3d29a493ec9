"""Wakes the readers of the log.

From a connection of its own, and at most once an interval: a NOTIFY takes a lock
of the whole cluster until its transaction ends, so that one inside of every
insert would serialise all commits.
"""

from __future__ import annotations

import threading
from typing import Any

import psycopg

from shared.database import Database
from shared.errors import Unavailable

CHANNEL = "feedback_log"


class LogNotifier:
    """Sends NOTIFY feedback_log after `wake`, soon and seldom."""

    def __init__(self, database: Database, *, interval_seconds: float = 0.02) -> None:
        self._database = database
        self._interval_seconds = interval_seconds
        self._pending = threading.Event()
        self._stopped = threading.Event()
        self._connection: psycopg.Connection[Any] | None = None
        self._thread = threading.Thread(target=self._run, name="notifier", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Asks for a notification; returns at once."""
        self._pending.set()

    def close(self) -> None:
        """Stops the thread."""
        self._stopped.set()
        self._pending.set()
        self._thread.join(5.0)

    def _run(self) -> None:
        while True:
            self._pending.wait()
            if self._stopped.is_set():
                break
            self._pending.clear()
            try:
                if self._connection is None:
                    self._connection = self._database.dedicated_connection()
                self._connection.execute(f"NOTIFY {CHANNEL}")
            except (psycopg.Error, Unavailable):
                # Readers poll besides; the next commit tries again.
                if self._connection is not None:
                    self._connection.close()
                    self._connection = None
            self._stopped.wait(self._interval_seconds)
        if self._connection is not None:
            self._connection.close()
