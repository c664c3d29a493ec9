"""The power is cut: what was acknowledged is on the disk, and a server that does not sync is caught.

PostgreSQL runs on a file system in a file. At the cut everything stops where it stands, and the file is copied as
it is: what only the page cache holds is gone. PostgreSQL then recovers from the copy.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import psycopg
import pytest

from shared import embedded_postgres
from shared.database import ensure_database, migrate
from tests.feedback.disks import Disk, disks, kill_all, postmaster, stop_still
from tests.feedback.history import History, anomalies
from tests.feedback.nursery import Nursery
from tests.feedback.test_crash_sweep import Shoppers, stored_events

EVENTS = 600


@pytest.fixture
def root() -> Iterator[Path]:
    with disks() as root:
        yield root


@pytest.fixture
def nursery() -> Iterator[Nursery]:
    nursery = Nursery()
    yield nursery
    nursery.close()


def survivors(
    root: Path, nursery: Nursery, keys: Path, home: Path, *, fsync: bool, cuts: int = 1
) -> tuple[History, list[str]]:
    """Acknowledges events, cuts the power in the midst of it, and returns what is left in the recovered log."""
    disk, history, rng = Disk(root, "disk0", 400), History(), random.Random(11)
    url = prepared(disk.home, fsync=fsync)
    disk.sync()
    shoppers = Shoppers(history, 5)
    for cut in range(1, cuts + 1):
        port = nursery.start(url, keys, home, mistake=None if fsync else "trust any server")
        enough = len(history.acknowledged) + EVENTS + rng.randrange(200)
        cut_off = threading.Event()
        visit = threading.Thread(
            target=lambda port=port, cut_off=cut_off: shoppers.visit(port, until=cut_off.is_set)
        )  # type: ignore[misc]
        visit.start()
        try:
            while len(history.acknowledged) < enough:
                assert visit.is_alive()
                cut_off.wait(0.005)
            # PostgreSQL first: after it stands still no acknowledgement can be on its way but those of what is on disk.
            stopped = stop_still(postmaster(disk.home))
            stopped += stop_still(psutil.Process(nursery.pid))
            after = Disk(root, f"disk{cut}", copy_of=disk.image)
        finally:
            cut_off.set()
            nursery.kill()
        kill_all(stopped)
        visit.join(60)
        # The instance of the package belongs to the disk that is gone.
        embedded_postgres.stop(disk.home)
        disk.close()
        disk = after
        url = prepared(disk.home, fsync=fsync)
    return history, stored_events(url)


def prepared(home: Path, *, fsync: bool) -> str:
    base = embedded_postgres.start(home)
    with psycopg.connect(base, autocommit=True) as connection:
        if not fsync:
            connection.execute("ALTER SYSTEM SET fsync = off")
            connection.execute("SELECT pg_reload_conf()")
    ensure_database(base)
    migrate(base, "feedback")
    return base


def test_what_was_acknowledged_before_a_power_cut_is_there_after_it(
    root: Path, nursery: Nursery, keys_dir: Path, tmp_path: Path
) -> None:
    history, stored = survivors(root, nursery, keys_dir, tmp_path, fsync=True, cuts=3)
    assert len(history.acknowledged) >= 3 * EVENTS
    assert anomalies(history, stored) == {}


def test_the_checker_catches_a_server_that_does_not_sync(
    root: Path, nursery: Nursery, keys_dir: Path, tmp_path: Path
) -> None:
    history, stored = survivors(root, nursery, keys_dir, tmp_path, fsync=False)
    assert set(anomalies(history, stored)) == {"lost"}
