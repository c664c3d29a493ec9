"""Disaster drill: the database's disk is lost, the backup is older than an erasure, and who was forgotten stays forgotten."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
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

pytestmark = pytest.mark.slow

EVENTS = 30


def test_after_a_lost_disk_what_was_backed_up_is_there_and_who_was_forgotten_is_not(
    postgres_homes: Callable[[], Path], keys_dir: Path, tmp_path: Path
) -> None:
    home = postgres_homes()
    base = embedded_postgres.start(home)
    with psycopg.connect(base, autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE shop"))
    url = psycopg.conninfo.make_conninfo(base, dbname="shop")
    ensure_database(url)
    registry = home / "registry"
    (registry / "main" / "1").mkdir(parents=True)
    (registry / "main" / "1" / "manifest.json").write_text("{}")
    backup = tmp_path / "backup"
    with serving(url, keys_dir, home) as feedback:
        stored = {event_pb2.EVENT_STATUS_STORED}
        assert record(feedback, "stays", EVENTS) == stored
        assert record(feedback, "goes", EVENTS) == stored
        script("backup.sh", backup, registry, env=environment(url, keys_dir, home))
        receipt = feedback.ForgetUser(feedback_service_pb2.ForgetUserRequest(user_id="goes"), timeout=30)
        assert receipt is not None
        assert count(url) == EVENTS
        newest = script("tombstones.sh", "export", env=environment(url, keys_dir, home))
        assert len(newest.splitlines()) == 2  # The person, and the code.

    # The disk is lost.
    embedded_postgres.stop(home)
    owner = (home / "postgres").stat()
    shutil.rmtree(home / "postgres")
    shutil.rmtree(registry)

    began = time.monotonic()
    again = postgres_homes()
    script(
        "restore.sh",
        backup,
        again / "postgres",
        again / "registry",
        env=os.environ | {"PATH": f"{PROGRAMS}:{os.environ['PATH']}"},
    )
    assert (again / "registry" / "main" / "1" / "manifest.json").exists()
    # Whoever restores gives the files to the database's user, or is that user.
    subprocess.run(["chown", "-R", f"{owner.st_uid}:{owner.st_gid}", again / "postgres"], check=True)
    url = psycopg.conninfo.make_conninfo(embedded_postgres.start(again), dbname="shop")
    # The trap that the drill is about: the backup is older than the erasure.
    assert count(url) == 2 * EVENTS
    env = environment(url, keys_dir, again)
    for _ in range(2):  # Twice does no harm.
        script("tombstones.sh", "replay", env=env, stdin=newest)
        assert finish_erasures(env) == "1 erasures completed\n"
        assert count(url) == EVENTS
    with serving(url, keys_dir, again) as feedback:
        print(f"from nothing to serving: {time.monotonic() - began:.1f} s")
        assert record(feedback, "stays", 1) == {event_pb2.EVENT_STATUS_STORED}
        # Forgotten stays forgotten: what is still in flight of them is not stored.
        assert event_pb2.EVENT_STATUS_STORED not in record(feedback, "goes", 1)
        assert count(url) == EVENTS + 1


def test_a_backup_is_never_written_over_another(tmp_path: Path) -> None:
    outcome = subprocess.run(
        [SCRIPTS / "backup.sh", tmp_path], env={**os.environ, "DATABASE_URL": "postgresql:///none"}, capture_output=True, text=True
    )  # fmt: skip
    assert outcome.returncode == 2
    assert "exists" in outcome.stderr


def test_a_damaged_backup_is_not_restored(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory() as directory:
        backup = Path(directory)
        (backup / "database").mkdir()
        (backup / "taken-at").write_text("2026-01-01T00:00:00Z\n")
        outcome = subprocess.run(
            [SCRIPTS / "restore.sh", backup, tmp_path / "data"], capture_output=True, text=True,
            env={**os.environ, "PATH": f"{PROGRAMS}:{os.environ['PATH']}"},
        )  # fmt: skip
        assert outcome.returncode != 0
        assert not (tmp_path / "data").exists()
