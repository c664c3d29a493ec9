"""Work that one replica does for all."""

from __future__ import annotations

import threading
from collections.abc import Callable

import psycopg

from shared.database import Database
from shared.errors import ShopkeeperError, Unavailable
from shared.telemetry import get_logger


class ExclusiveWorker:
    """A thread that works while it holds an advisory lock; when it dies, another replica's takes over.

    Args:
        lock: the key of the lock.
        work: does a piece of work; returns whether there was any. It must be harmless to do it twice: a
            connection that broke gives the lock away before this process knows.
        idle_seconds: the wait after there was none, which `wake` cuts short.
    """

    def __init__(
        self, name: str, database: Database, lock: int, work: Callable[[], bool], *, idle_seconds: float
    ) -> None:
        self._name = name
        self._database = database
        self._lock = lock
        self._work = work
        self._idle_seconds = idle_seconds
        self._stopped = threading.Event()
        self._wake = threading.Event()
        self._logger = get_logger(database.schema)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begins."""
        self._thread.start()

    def wake(self) -> None:
        """Says that there is work; returns at once."""
        self._wake.set()

    def stop(self, timeout_seconds: float = 5.0) -> None:
        """Ends after the piece of work under way. `work` should itself look for the end of the service."""
        self._stopped.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout_seconds)

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                with self._database.dedicated_connection() as connection:
                    row = connection.execute("SELECT pg_try_advisory_lock(%s)", (self._lock,)).fetchone()
                    while row is not None and row[0] and not self._stopped.is_set():
                        self._wake.clear()
                        if not self._work():
                            self._wake.wait(self._idle_seconds)
                        # A lock that is lost says so here.
                        connection.execute("SELECT 1")
            except (psycopg.OperationalError, Unavailable):
                pass
            except Exception as error:
                reason = error.reason if isinstance(error, ShopkeeperError) else type(error).__name__
                self._logger.error("background work failed", worker=self._name, cause=reason)
            self._stopped.wait(1.0)
