"""A PostgreSQL that belongs to one test, so that it can be killed."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import psycopg

from shared import embedded_postgres
from shared.database import ensure_database, migrate


class OwnPostgres:
    """The process that answers, and all that it has forked.

    Args:
        services: whose schemas it holds.
    """

    def __init__(self, home: Path, *services: str) -> None:
        self._home = home
        self.url = embedded_postgres.start(home)
        ensure_database(self.url)
        for service in services:
            migrate(self.url, service)
        with psycopg.connect(self.url, autocommit=True) as connection:
            # Commits of its own bring to the disk what a test wants lost.
            connection.execute("ALTER SYSTEM SET autovacuum = off")
            connection.execute("SELECT pg_reload_conf()")

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal to every process; waits for the end of those that it kills."""
        # The parent first: it would start anew what dies.
        processes = [self._postmaster(), *self._postmaster().children(recursive=True)]
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        if number is signal.SIGKILL:
            psutil.wait_procs(processes, 20)

    def start_again(self) -> None:
        """Starts it on the same data; it answers when this returns."""
        from embedded_postgres import PostgresServer

        # On a busy machine it recovers for longer than the package waits.
        with contextlib.suppress(subprocess.TimeoutExpired):
            PostgresServer._instances[(self._home / "postgres").resolve()].ensure_postgres_running()
        deadline = time.monotonic() + 90
        while True:
            try:
                psycopg.connect(self.url, connect_timeout=5).close()
                return
            except psycopg.OperationalError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    @contextlib.contextmanager
    def numbers_to_be_reused(self) -> Iterator[None]:
        """In the block, snapshots show transactions as ended whose numbers are given out again after it.

        The server crashes at the end of the block, and is up again after it. Whoever commits in the block brings
        the transactions to the disk, and fails the test.
        """
        burnt = self.burn()
        yield
        self.crash()
        with psycopg.connect(self.url) as connection:
            assert self._rolled_back(connection) < burnt, "no number is given out again"

    def burn(self, count: int = 50) -> int:
        """Rolls transactions back of which nothing reaches the disk until somebody commits; returns the last number."""
        writers = []
        for process in self._postmaster().children():
            # Others come and go: workers, and who just left.
            with contextlib.suppress(psutil.NoSuchProcess):
                if "walwriter" in " ".join(process.cmdline()):
                    process.suspend()
                    writers.append(process)
        assert len(writers) == 1
        with psycopg.connect(self.url) as connection:
            return [self._rolled_back(connection) for _ in range(count)][-1]

    def crash(self) -> None:
        """Kills every process, and starts anew."""
        self.signal(signal.SIGKILL)
        self.start_again()

    @staticmethod
    def _rolled_back(connection: psycopg.Connection) -> int:
        row = connection.execute("SELECT pg_current_xact_id()::text").fetchone()
        connection.rollback()
        assert row is not None
        return int(row[0])

    def _postmaster(self) -> psutil.Process:
        return psutil.Process(int((self._home / "postgres" / "postmaster.pid").read_text().splitlines()[0]))
