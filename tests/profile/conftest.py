"""A running profile service over a real log and a socket."""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from shopkeeper.profile.v1 import (
    catalog_service_pb2_grpc,
    item_pb2,
    profile_service_pb2_grpc,
)

from services.profile.__main__ import SERVICE_NAMES, Profile
from services.profile.settings import ProfileSettings
from shared.event_kinds import EventKind
from shared.privacy import Pseudonymizer
from shared.tokens import ConsistencyToken, TokenSigner

DEADLINE_SECONDS = 20.0
NOON = datetime(2026, 3, 2, 12, tzinfo=UTC)


def eventually(condition: Callable[[], Any], what: str = "the condition") -> Any:
    """Returns the first true value of the condition, or fails after a generous deadline."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.01)
    pytest.fail(f"{what} did not come true within {DEADLINE_SECONDS} s")


class Log:
    """Writes feedback's table, as feedback would."""

    def __init__(self, url: str, keys: Path) -> None:
        self.connection = psycopg.connect(url, autocommit=True)
        self._pseudonymizer = Pseudonymizer.from_directory(keys)
        self._signer = TokenSigner.from_directory(keys)
        self._count = itertools.count()

    def key(self, user_id: str) -> bytes:
        return self._pseudonymizer.user_key(user_id)

    def record(
        self,
        user_id: str,
        kind: EventKind = EventKind.ITEM_VIEW,
        item_id: str | None = "item",
        *,
        at: datetime | None = None,
        lines: list[tuple[str, float, int]] | None = None,
        value: float | None = None,
        consent: int = 0,
        connection: psycopg.Connection[Any] | None = None,
    ) -> str:
        """Stores one event; returns its consistency token."""
        number = next(self._count)
        at = at or NOON + timedelta(seconds=number)
        key = uuid.UUID(int=(int(at.timestamp() * 1000) << 80) | (0x7 << 76) | (0x2 << 62) | number)
        row = (
            (connection or self.connection)
            .execute(
                """
            INSERT INTO feedback.events (event_key, payload_digest, occurred_at, kind, device, channel, consent,
                user_key, item_id, value, line_items, line_quantities, line_prices, currency_code)
            VALUES (%s, 0, %s, %s, 0, 0, %s, %s, %s, %s, %s, %s, %s, %s) RETURNING xid::text
            """,
                (
                    key,
                    at,
                    int(kind),
                    consent,
                    self.key(user_id),
                    None if lines else item_id,
                    value,
                    [line[0] for line in lines] if lines else None,
                    [line[1] for line in lines] if lines else None,
                    [line[2] for line in lines] if lines else None,
                    "EUR" if lines else None,
                ),
            )
            .fetchone()
        )
        assert row is not None
        return self.token(int(row[0]))

    def token(self, xid: int) -> str:
        return ConsistencyToken(xid).sign(self._signer)

    def consent(self, user_id: str, personalisation: bool) -> None:
        self.connection.execute(
            "INSERT INTO feedback.consents (user_key, personalisation, updated_at) VALUES (%s, %s, now()) "
            "ON CONFLICT (user_key) DO UPDATE SET personalisation = excluded.personalisation, "
            "xid = pg_current_xact_id()",
            (self.key(user_id), personalisation),
        )

    def forget(self, user_id: str, *, delete_rows: bool = True) -> None:
        with self.connection.transaction():
            self.connection.execute(
                "INSERT INTO feedback.tombstones (tombstone_key, user_keys, erased_at) VALUES (%s, %s, now())",
                (uuid.uuid4().bytes, [self.key(user_id)]),
            )
            if delete_rows:
                self.connection.execute(
                    "DELETE FROM feedback.events WHERE user_key = %s", (self.key(user_id),)
                )


class Shop:
    """A running service, its stubs and its log."""

    def __init__(self, service: Profile, channel: Any, log: Log) -> None:
        self.service = service
        self.log = log
        self.profiles = profile_service_pb2_grpc.ProfileServiceStub(channel)
        self.catalog = catalog_service_pb2_grpc.CatalogServiceStub(channel)


@pytest.fixture
def log(migrate_services: Callable[..., str], keys_dir: Path) -> Iterator[Log]:
    log = Log(migrate_services("feedback", "profile"), keys_dir)
    yield log
    log.connection.close()


@pytest.fixture
def start_profile(
    database_url: str, keys_dir: Path, serve: Callable[..., Any]
) -> Iterator[Callable[..., tuple[Profile, Any]]]:
    """Returns a function that starts a replica and returns it with a channel to it."""
    services: list[Profile] = []

    def start(**settings: Any) -> tuple[Profile, Any]:
        values = {"listen": "127.0.0.1:0", "log_level": "error", "keys": keys_dir, "workers": 64} | settings
        loaded = ProfileSettings(**values)
        service = Profile.wire(loaded, database_url)
        services.append(service)
        channel = serve(service.register, service_names=SERVICE_NAMES, settings=loaded)
        service.start()
        return service, channel

    yield start
    for service in services:
        service.drain()
        service.close()


@pytest.fixture
def shop(log: Log, start_profile: Callable[..., tuple[Profile, Any]]) -> Shop:
    service, channel = start_profile()
    eventually(lambda: service.readiness()[0], "readiness")
    return Shop(service, channel, log)


def item(item_id: str, **fields: Any) -> item_pb2.Item:
    """Returns an item with a title."""
    return item_pb2.Item(item_id=item_id, **({"title": f"Title of {item_id}"} | fields))
