"""The feedback service over a real PostgreSQL and a real socket."""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, LiteralString

import grpc
import psycopg
import pytest
from psycopg import sql
from shopkeeper.feedback.v1 import event_pb2, feedback_service_pb2, feedback_service_pb2_grpc

from services.feedback.__main__ import Feedback, wire
from services.feedback.servicer import SERVICE_NAME
from services.feedback.settings import FeedbackSettings
from shared.database import migrate

STORED = event_pb2.EVENT_STATUS_STORED
DUPLICATE = event_pb2.EVENT_STATUS_DUPLICATE
QUARANTINED = event_pb2.EVENT_STATUS_QUARANTINED
REJECTED = event_pb2.EVENT_STATUS_REJECTED


_sequence = itertools.count()


def uuid7(at_ms: int | None = None) -> str:
    """Returns a fresh UUIDv7; later ones of the same millisecond are larger."""
    ms = time.time_ns() // 1_000_000 if at_ms is None else at_ms
    order = next(_sequence) & 0xFFF
    value = (ms << 80) | (0x7 << 76) | (order << 64) | (0b10 << 62) | (uuid.uuid4().int & ((1 << 62) - 1))
    return str(uuid.UUID(int=value))


def item_view(user_id: str = "ada", item_id: str = "lamp", **fields: Any) -> event_pb2.Event:
    """Returns an item view with a fresh id."""
    detail = fields.pop("item_view", event_pb2.ItemView(item_id=item_id))
    return event_pb2.Event(
        event_id=fields.pop("event_id", uuid7()), user_id=user_id, item_view=detail, **fields
    )


def event(user_id: str = "ada", **fields: Any) -> event_pb2.Event:
    """Returns an event with a fresh id."""
    return event_pb2.Event(event_id=fields.pop("event_id", uuid7()), user_id=user_id, **fields)


@dataclass(frozen=True, slots=True)
class Shop:
    """A running service, its stub, and its database."""

    stub: feedback_service_pb2_grpc.FeedbackServiceStub
    feedback: Feedback
    url: str
    keys: Path
    registry: Path

    def record(self, *events: event_pb2.Event) -> feedback_service_pb2.RecordEventsResponse:
        return self.stub.RecordEvents(feedback_service_pb2.RecordEventsRequest(events=events), timeout=20)

    def statuses(self, *events: event_pb2.Event) -> list[int]:
        return [result.status for result in self.record(*events).results]

    def sql(self, query: str, *parameters: Any, role: str | None = None) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.url) as connection:
            if role:
                connection.execute(f"SET ROLE {role}")
            cursor = connection.execute(query, parameters or None)
            return cursor.fetchall() if cursor.description else []

    @property
    def imports(self) -> Path:
        """The directory of files to import; not made yet."""
        return self.registry.parent / "imports"

    def count(self) -> int:
        return int(self.sql("SELECT count(*) FROM feedback.events")[0][0])


@pytest.fixture(scope="session")
def migrated_template(postgres_server: str) -> Iterator[str]:
    """Name of a migrated database to copy: a copy is made in a tenth of the time of a migration."""
    name = f"template_{uuid.uuid4().hex}"
    _administer(postgres_server, "CREATE DATABASE {}", name)
    url = psycopg.conninfo.make_conninfo(postgres_server, dbname=name)
    migrate(url, "feedback")
    yield name
    _administer(postgres_server, "DROP DATABASE {} WITH (FORCE)", name)


@pytest.fixture
def database_url(postgres_server: str, migrated_template: str) -> Iterator[str]:
    """URL of a fresh, migrated database."""
    name = f"test_{uuid.uuid4().hex}"
    _administer(postgres_server, "CREATE DATABASE {} TEMPLATE {}", name, migrated_template)
    yield psycopg.conninfo.make_conninfo(postgres_server, dbname=name)
    _administer(postgres_server, "DROP DATABASE {} WITH (FORCE)", name)


def _administer(url: str, statement: LiteralString, *names: str) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(sql.SQL(statement).format(*map(sql.Identifier, names)))


@pytest.fixture
def shop(
    database_url: str, keys_dir: Path, tmp_path: Path, serve: Callable[..., grpc.Channel]
) -> Iterator[Shop]:
    settings = FeedbackSettings(
        listen="127.0.0.1:0",
        log_level="warning",
        keys=keys_dir,
        registry=tmp_path / "registry",
        import_directory=tmp_path / "imports",
    )
    feedback = wire(settings, database_url)
    channel = serve(feedback.register, service_names=(SERVICE_NAME,), settings=settings)
    yield Shop(
        feedback_service_pb2_grpc.FeedbackServiceStub(channel),
        feedback,
        database_url,
        keys_dir,
        tmp_path / "registry",
    )
    feedback.close()


def eventually(condition: Callable[[], Any], timeout_seconds: float = 15.0) -> Any:
    """Polls until the condition is true, and returns it."""
    deadline = time.monotonic() + timeout_seconds
    while True:
        if result := condition():
            return result
        assert time.monotonic() < deadline, "did not come true in time"
        time.sleep(0.02)


def now_ms() -> int:
    """Returns the time now in milliseconds since 1970."""
    return int(datetime.now(UTC).timestamp() * 1000)
