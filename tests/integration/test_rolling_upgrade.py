"""A rolling upgrade N → N+1 → N loses no request: two checkouts side by side, over one database.

N is a commit of the past (SHOPKEEPER_UPGRADE_FROM names another), N+1 the tree that is tested. Two replicas of feedback, profile
and recommend are replaced one after the other, forth and back, while callers record, read and ask without a pause.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import psycopg
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from psycopg import sql
from shopkeeper.feedback.v1 import event_pb2, feedback_service_pb2, feedback_service_pb2_grpc
from shopkeeper.profile.v1 import profile_service_pb2, profile_service_pb2_grpc
from shopkeeper.recommend.v1 import recommend_service_pb2, recommend_service_pb2_grpc

from shared.database import ensure_database
from shared.embedded_postgres import start as start_postgres
from tests.integration.suite import eventually, free_port, view

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[2]
N = os.environ.get("SHOPKEEPER_UPGRADE_FROM", "94cfab19e76d")
# In the order in which a schema's readers come before its writers.
ROLLED = ("recommend", "profile", "feedback")
REPLICAS = 2
# What every caller of gRPC should have: a replica that drains is another replica's call.
RETRIES = json.dumps(
    {
        "loadBalancingConfig": [{"round_robin": {}}],
        "methodConfig": [
            {
                "name": [{}],
                "retryPolicy": {
                    "maxAttempts": 5, "initialBackoff": "0.05s", "maxBackoff": "1s", "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            }
        ],
    }
)  # fmt: skip


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tree of version N, beside this one."""
    commit = subprocess.run(
        ["git", "rev-parse", "--verify", f"{N}^{{commit}}"], cwd=REPOSITORY, capture_output=True, text=True
    )
    if commit.returncode != 0:
        pytest.skip(
            f"version N ({N}) is not in this clone; fetch the history, or set SHOPKEEPER_UPGRADE_FROM"
        )
    directory = tmp_path_factory.mktemp("version-n")
    archive = subprocess.run(
        ["git", "archive", commit.stdout.strip(), "services", "shared", "protos/python"],
        cwd=REPOSITORY, capture_output=True, check=True,
    )  # fmt: skip
    subprocess.run(["tar", "-x", "-C", directory], input=archive.stdout, check=True)
    return directory


class Fleet:
    """Replicas of the services, each of one version or the other."""

    def __init__(self, home: Path, database_url: str, keys: Path, versions: dict[str, Path]) -> None:
        self.home, self.database_url, self.keys, self.versions = home, database_url, keys, versions
        self.ports = {name: [free_port() for _ in range(REPLICAS)] for name in ROLLED}
        self.processes: dict[tuple[str, int], subprocess.Popen[bytes]] = {}

    def target(self, service: str) -> str:
        return "ipv4:" + ",".join(f"127.0.0.1:{port}" for port in self.ports[service])

    def environment(self, version: str) -> dict[str, str]:
        checkout = self.versions[version]
        return {
            **os.environ,
            # Before the packages that are installed in place.
            "PYTHONPATH": f"{checkout}:{checkout / 'protos' / 'python'}",
            "SHOPKEEPER_HOME": str(self.home),
            "SHOPKEEPER_KEYS": str(self.keys),
            "SHOPKEEPER_REGISTRY": str(self.home / "registry"),
            "SHOPKEEPER_AUTO_MIGRATE": "false",
            "SHOPKEEPER_PROFILE_ADDRESS": self.target("profile"),
            "DATABASE_URL": self.database_url,
        }

    def migrate(self, version: str) -> None:
        for service in ("feedback", "profile", "trainer"):
            subprocess.run(
                [sys.executable, "-m", f"services.{service}", "migrate"],
                cwd=self.versions[version], env=self.environment(version), check=True, timeout=120,
            )  # fmt: skip

    def start(self, service: str, replica: int, version: str) -> None:
        port = self.ports[service][replica]
        log = (self.home / f"{service}-{replica}.log").open("ab")
        self.processes[service, replica] = subprocess.Popen(
            [sys.executable, "-m", f"services.{service}"], cwd=self.versions[version], stdout=log, stderr=log,
            env={**self.environment(version), "SHOPKEEPER_LISTEN": f"127.0.0.1:{port}"},
        )  # fmt: skip
        log.close()
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = health_pb2_grpc.HealthStub(channel)  # type: ignore[attr-defined]

            def serving() -> bool:
                answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=2, wait_for_ready=True)
                return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

            eventually(f"{service} {replica} of {version} serves", serving, 90)

    def stop(self, service: str, replica: int) -> None:
        process = self.processes.pop((service, replica))
        process.send_signal(signal.SIGTERM)
        process.wait(60)

    def roll(self, version: str) -> None:
        for service in ROLLED:
            for replica in range(REPLICAS):
                self.stop(service, replica)
                self.start(service, replica, version)

    def end(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait(10)


class Callers:
    """Threads that call without a pause, and remember each failure."""

    def __init__(self, fleet: Fleet) -> None:
        options = [
            ("grpc.service_config", RETRIES),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 500),
        ]
        self.channels = {name: grpc.insecure_channel(fleet.target(name), options) for name in ROLLED}
        feedback = feedback_service_pb2_grpc.FeedbackServiceStub(self.channels["feedback"])
        profile = profile_service_pb2_grpc.ProfileServiceStub(self.channels["profile"])
        recommend = recommend_service_pb2_grpc.RecommendServiceStub(self.channels["recommend"])
        self.acknowledged: list[str] = []
        self.answered: Counter[str] = Counter()
        self.failures: list[str] = []
        self.stopped = threading.Event()

        def record() -> None:
            event = view("upgrade-shopper", f"item-{uuid.uuid4().hex[:4]}")
            answer = feedback.RecordEvents(
                feedback_service_pb2.RecordEventsRequest(events=[event]), timeout=20
            )
            assert answer.results[0].status == event_pb2.EVENT_STATUS_STORED
            self.acknowledged.append(event.event_id)

        def read() -> None:
            profile.GetProfile(profile_service_pb2.GetProfileRequest(user_id="upgrade-shopper"), timeout=20)

        def ask() -> None:
            recommend.Recommend(recommend_service_pb2.RecommendRequest(user_id="upgrade-shopper"), timeout=20)

        record()
        self.threads = [
            threading.Thread(target=self._loop, args=(call,), daemon=True) for call in (record, read, ask)
        ]

    def _loop(self, call: Callable[[], Any]) -> None:
        while not self.stopped.wait(0.02):
            try:
                call()
                self.answered[call.__name__] += 1
            except grpc.RpcError as error:
                self.failures.append(
                    f"{time.strftime('%X')} {call.__name__} {error.code().name} {error.details()}"
                )

    def __enter__(self) -> Callers:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self.stopped.set()
        for thread in self.threads:
            thread.join(30)
        for channel in self.channels.values():
            channel.close()


def test_a_rolling_upgrade_and_its_way_back_lose_no_request(
    checkout: Path, postgres_homes: Callable[[], Path], keys_dir: Path
) -> None:
    home = postgres_homes()
    url = start_postgres(home)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE upgrade"))
    url = psycopg.conninfo.make_conninfo(url, dbname="upgrade")
    ensure_database(url)
    fleet = Fleet(home, url, keys_dir, {"N": checkout, "N+1": REPOSITORY})
    try:
        fleet.migrate("N")
        for service in reversed(ROLLED):
            for replica in range(REPLICAS):
                fleet.start(service, replica, "N")
        with Callers(fleet) as callers:
            time.sleep(1.0)
            # Expand while N serves, then replace; on the way back the schema stays.
            fleet.migrate("N+1")
            fleet.roll("N+1")
            fleet.roll("N")
            time.sleep(1.0)
        assert callers.failures == []
        assert min(callers.answered[name] for name in ("record", "read", "ask")) > 100, callers.answered
        with psycopg.connect(url) as connection:
            row = connection.execute("SELECT count(*) FROM feedback.events").fetchone()
        # Each once: a call that was retried is no second event.
        assert row == (len(callers.acknowledged),)
    finally:
        fleet.end()
