"""The four services as processes, and what an integrator would do with them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import grpc
from google.protobuf.timestamp_pb2 import Timestamp
from grpc_health.v1 import health_pb2, health_pb2_grpc
from shopkeeper.feedback.v1 import event_pb2, feedback_service_pb2, feedback_service_pb2_grpc
from shopkeeper.profile.v1 import catalog_service_pb2_grpc, profile_service_pb2_grpc
from shopkeeper.recommend.v1 import recommend_service_pb2_grpc
from shopkeeper.trainer.v1 import trainer_service_pb2_grpc

from shared.channel import open_channel
from shared.tls import TlsDirectory

SERVICES = ("feedback", "profile", "trainer", "recommend")
START_SECONDS = 60.0
POLICY = Path(__file__).resolve().parents[2] / "deploy" / "k8s" / "base" / "policy.yaml"
CATEGORIES, ITEMS_PER_CATEGORY, SHOPPERS, VIEWS = 5, 12, 240, 12
T = TypeVar("T")


def eventually(what: str, probe: Callable[[], T | None], seconds: float = 30.0) -> T:
    """Returns the first true answer of `probe`; failures of the transport count as none."""
    deadline, last = time.monotonic() + seconds, "nothing"
    while time.monotonic() < deadline:
        try:
            if answer := probe():
                return answer
        except grpc.RpcError as error:
            last = f"{error.code().name}: {error.details()}"
        time.sleep(0.05)
    raise AssertionError(f"{what}: not within {seconds:.0f} s; last answer {last}")


def item_id(category: int, index: int) -> str:
    """Returns the id of an item of the test shop; indices wrap around within the category."""
    return f"c{category}-{index % ITEMS_PER_CATEGORY:02d}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Suite:
    """Four processes on free ports, sharing one database URL, one registry and one set of keys.

    With `certificates`, a directory of `shopkeeper certs`, they speak mutual TLS under the shipped policy; the stubs are the operator's.
    `settings` are more variables for all of them.
    """

    home: Path
    database_url: str
    keys: Path
    certificates: Path | None = None
    settings: dict[str, str] = field(default_factory=dict)
    ports: dict[str, int] = field(default_factory=lambda: {name: free_port() for name in SERVICES})
    metrics_ports: dict[str, int] = field(default_factory=lambda: {name: free_port() for name in SERVICES})
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    channels: dict[str, grpc.Channel] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in SERVICES:
            self.channels[name] = self.channel(name)
        self.feedback = feedback_service_pb2_grpc.FeedbackServiceStub(self.channels["feedback"])
        self.profile = profile_service_pb2_grpc.ProfileServiceStub(self.channels["profile"])
        self.catalog = catalog_service_pb2_grpc.CatalogServiceStub(self.channels["profile"])
        self.trainer = trainer_service_pb2_grpc.TrainerServiceStub(self.channels["trainer"])
        self.recommend = recommend_service_pb2_grpc.RecommendServiceStub(self.channels["recommend"])

    def channel(self, service: str, identity: str = "operator") -> grpc.Channel:
        """Returns a channel to a service, as somebody where the suite asks who calls."""
        tls = TlsDirectory(self.certificates / identity) if self.certificates is not None else None
        return open_channel(f"127.0.0.1:{self.ports[service]}", tls=tls)

    def start(self, *names: str) -> None:
        """Starts services and waits until their health says so."""
        for name in names or SERVICES:
            environment = {
                **os.environ,
                "SHOPKEEPER_HOME": str(self.home),
                "SHOPKEEPER_KEYS": str(self.keys),
                "SHOPKEEPER_LISTEN": f"127.0.0.1:{self.ports[name]}",
                "SHOPKEEPER_METRICS_PORT": str(self.metrics_ports[name]),
                "SHOPKEEPER_LOG_LEVEL": "info",
                "DATABASE_URL": self.database_url,
                **{f"SHOPKEEPER_{n.upper()}_ADDRESS": f"127.0.0.1:{p}" for n, p in self.ports.items()},
                **self.settings,
            }
            if self.certificates is not None:
                environment["SHOPKEEPER_TLS"] = str(self.certificates / name)
                environment["SHOPKEEPER_POLICY"] = str(POLICY)
            log = self.log(name).open("ab")
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-m", f"services.{name}"], env=environment, stdout=log, stderr=log
            )
            log.close()
        for name in names or SERVICES:
            eventually(
                f"{name} is healthy (see {self.log(name)})",
                lambda name=name: self.healthy(name),
                START_SECONDS,
            )

    def log(self, name: str) -> Path:
        return self.home / f"{name}.log"

    def healthy(self, name: str) -> bool:
        stub = health_pb2_grpc.HealthStub(self.channels[name])
        response = stub.Check(health_pb2.HealthCheckRequest(), timeout=2)
        return response.status == health_pb2.HealthCheckResponse.SERVING

    def kill(self, name: str) -> None:
        """Ends a service as a crash would: without notice."""
        self.processes[name].send_signal(signal.SIGKILL)
        self.processes[name].wait(10)

    def stop(self) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                process.terminate()
        for process in self.processes.values():
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
        for channel in self.channels.values():
            channel.close()

    def record(
        self, events: Sequence[event_pb2.Event], timeout: float = 20.0
    ) -> feedback_service_pb2.RecordEventsResponse:
        request = feedback_service_pb2.RecordEventsRequest(events=events)
        return self.feedback.RecordEvents(request, timeout=timeout)


def view(user_id: str, item_id: str, *, seconds_ago: float = 0.0, token: str = "") -> event_pb2.Event:
    """Returns an item view with a fresh event id."""
    occurred_at = Timestamp()
    occurred_at.FromNanoseconds(int((time.time() - seconds_ago) * 1e3) * 1_000_000)
    return event_pb2.Event(
        event_id=uuid.uuid4().hex,
        user_id=user_id,
        occurred_at=occurred_at,
        attribution_token=token,
        item_view=event_pb2.ItemView(item_id=item_id),
    )
