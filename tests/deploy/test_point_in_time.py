"""A mistake is undone by going to the moment before it; who was forgotten after that moment stays forgotten."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest
from psycopg import sql
from shopkeeper.feedback.v1 import event_pb2, feedback_service_pb2

from shared import embedded_postgres
from shared.database import ensure_database
from tests.deploy.drills import (
    PROGRAMS,
    SCRIPTS,
    count,
    environment,
    finish_erasures,
    record,
    script,
    serving,
)
from tests.integration.suite import eventually

pytestmark = pytest.mark.slow

BEFORE, BETWEEN = 30, 10
STORED = {event_pb2.EVENT_STATUS_STORED}


def archiving(home: Path, archive: Path) -> str:
    """Starts a PostgreSQL that archives its log as docs/runbooks/restore.md says; returns its URL."""
    url = embedded_postgres.start(home)
    owner = (home / "postgres").stat()
    # The database's own user may not be let into the checkout.
    command = archive / "archive.sh"
    archive.mkdir()
    shutil.copy(SCRIPTS / "archive.sh", command)
    for path in (archive, command):
        os.chown(path, owner.st_uid, owner.st_gid)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("ALTER SYSTEM SET archive_mode = on")
        connection.execute(
            sql.SQL("ALTER SYSTEM SET archive_command = {}").format(
                sql.Literal(f"{command} {archive}/log %p %f")
            )
        )
    (archive / "log").mkdir()
    os.chown(archive / "log", owner.st_uid, owner.st_gid)
    embedded_postgres.stop(home)
    return embedded_postgres.start(home)


def everything_is_archived(url: str) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        row = connection.execute("SELECT pg_walfile_name(pg_switch_wal())").fetchone()
        assert row is not None

        def archived() -> bool:
            done = connection.execute("SELECT last_archived_wal FROM pg_stat_archiver").fetchone()
            return done is not None and done[0] is not None and done[0] >= row[0]

        eventually("the last segment is archived", archived, 30)


def restored(home: Path, backup: Path, owner: os.stat_result, **to: str) -> str:
    """Restores into a home, starts PostgreSQL there, and returns the URL of its database `shop`."""
    path = f"{PROGRAMS}:{os.environ['PATH']}"
    script("restore.sh", backup, home / "postgres", env={**os.environ, "PATH": path, **to})
    subprocess.run(["chown", "-R", f"{owner.st_uid}:{owner.st_gid}", home / "postgres"], check=True)
    return psycopg.conninfo.make_conninfo(embedded_postgres.start(home), dbname="shop")


def in_recovery(url: str) -> bool:
    with psycopg.connect(url) as connection:
        row = connection.execute("SELECT pg_is_in_recovery()").fetchone()
    assert row is not None
    return bool(row[0])


def test_the_moment_before_a_mistake_comes_back_without_who_was_forgotten_after_it(
    postgres_homes: Callable[[], Path], keys_dir: Path, tmp_path: Path
) -> None:
    home, kept = postgres_homes(), postgres_homes()
    os.chmod(kept, 0o755)
    base = archiving(home, kept / "archive")
    log = str(kept / "archive" / "log")
    with psycopg.connect(base, autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE shop"))
    url = psycopg.conninfo.make_conninfo(base, dbname="shop")
    ensure_database(url)
    backup = tmp_path / "backup"
    with serving(url, keys_dir, home) as feedback:
        assert record(feedback, "stays", BEFORE) == STORED
        assert record(feedback, "goes", BEFORE) == STORED
        script("backup.sh", backup, env=environment(url, keys_dir, home))
        # In no backup: what comes back of this comes from the archived log.
        assert record(feedback, "stays-too", BETWEEN) == STORED
        with psycopg.connect(url) as connection:
            row = connection.execute("SELECT clock_timestamp()::text").fetchone()
        assert row is not None
        moment = str(row[0])
        time.sleep(0.05)
        assert feedback.ForgetUser(feedback_service_pb2.ForgetUserRequest(user_id="goes"), timeout=30)
    with psycopg.connect(url) as connection:
        connection.execute("DELETE FROM feedback.events")
    assert count(url) == 0
    everything_is_archived(url)
    owner = (home / "postgres").stat()
    embedded_postgres.stop(home)
    shutil.rmtree(home / "postgres")

    began = time.monotonic()
    # The list of the forgotten is newer than the moment: it comes from the end of the log.
    looked = postgres_homes()
    last = restored(looked, backup, owner, ARCHIVE=log, READ_ONLY="1")
    eventually("the log is read to its end", lambda: count(last) == 0, 60)
    assert in_recovery(last)
    newest = script("tombstones.sh", "export", env=environment(last, keys_dir, looked))
    assert len(newest.splitlines()) == 2  # The person, and the code.
    embedded_postgres.stop(looked)
    assert not list(Path(log).glob("00000002*")), "a cluster that is only looked at has archived something"

    again = postgres_homes()
    url = restored(again, backup, owner, ARCHIVE=log, TARGET_TIME=moment)
    eventually("the moment is reached", lambda: not in_recovery(url), 60)
    # The trap: the moment is older than the erasure.
    assert count(url) == 2 * BEFORE + BETWEEN
    env = environment(url, keys_dir, again)
    script("tombstones.sh", "replay", env=env, stdin=newest)
    assert finish_erasures(env) == "1 erasures completed\n"
    assert count(url) == BEFORE + BETWEEN
    with serving(url, keys_dir, again) as feedback:
        print(f"from nothing to serving the moment: {time.monotonic() - began:.1f} s")
        assert record(feedback, "stays", 1) == STORED
        assert event_pb2.EVENT_STATUS_STORED not in record(feedback, "goes", 1)
        assert count(url) == BEFORE + BETWEEN + 1
    # It goes on archiving, on a line of its own.
    everything_is_archived(url)
    assert list(Path(log).glob("00000002*"))


def archive(directory: Path, segment: Path, name: str) -> int:
    outcome = subprocess.run([SCRIPTS / "archive.sh", directory, segment, name], capture_output=True)
    return outcome.returncode


def test_a_segment_is_archived_whole_once_and_never_over_another(tmp_path: Path) -> None:
    segment, kept = tmp_path / "segment", tmp_path / "kept"
    kept.mkdir()
    segment.write_bytes(b"one")
    assert archive(kept, segment, "0001") == 0
    assert archive(kept, segment, "0001") == 0
    segment.write_bytes(b"another")
    assert archive(kept, segment, "0001") != 0
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == {"0001": b"one"}


def test_a_segment_that_cannot_be_kept_is_not_said_to_be(tmp_path: Path) -> None:
    segment = tmp_path / "segment"
    segment.write_bytes(b"one")
    assert archive(tmp_path / "nowhere", segment, "0001") != 0


@pytest.mark.parametrize(
    ("to", "said"),
    [
        ({"TARGET_TIME": "2026-01-31 13:37:00+00"}, "need ARCHIVE"),
        ({"READ_ONLY": "1"}, "need ARCHIVE"),
        ({"TARGET_TIME": "2026-01-31 13:37:00", "ARCHIVE": "/kept"}, "time zone"),
    ],
)
def test_a_moment_that_is_not_clear_is_not_guessed(tmp_path: Path, to: dict[str, str], said: str) -> None:
    outcome = subprocess.run(
        [SCRIPTS / "restore.sh", tmp_path / "backup", tmp_path / "data"], env={**os.environ, **to}, capture_output=True, text=True
    )  # fmt: skip
    assert outcome.returncode == 2
    assert said in outcome.stderr
