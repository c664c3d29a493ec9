"""Fixtures of the trainer's tests: a log with a pattern in it, a running trainer."""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent import futures
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import numpy as np
import psycopg
import pytest
from shopkeeper.profile.v1 import catalog_service_pb2, catalog_service_pb2_grpc, item_pb2
from shopkeeper.trainer.v1 import trainer_service_pb2_grpc

from services.trainer.__main__ import Trainer
from services.trainer.pipeline.dataset import EventColumns
from services.trainer.settings import TrainerSettings
from shared.channel import open_channel
from shared.telemetry import Telemetry

VIEW, PURCHASE = 3, 6


def walk(users: int, items: int, seed: int = 0, shortest: int = 4, longest: int = 14) -> list[list[int]]:
    """Histories with a pattern: whoever takes item i takes i + 1 next, or sometimes i + 2."""
    generator = np.random.default_rng(seed)
    histories = []
    for _ in range(users):
        item = int(generator.integers(items))
        history = []
        for _ in range(int(generator.integers(shortest, longest))):
            history.append(item)
            item = (item + int(generator.choice([1, 1, 1, 2]))) % items
        histories.append(history)
    return histories


def columns_of(histories: list[list[int]], kind: int = VIEW) -> EventColumns:
    """Histories as the log's columns."""
    user_E = np.repeat(np.arange(len(histories)), [len(h) for h in histories])
    item_E = np.array([item for h in histories for item in h], np.int32)
    order_E = np.array([place for h in histories for place in range(len(h))], np.int64)
    item_count = int(item_E.max(initial=-1)) + 1
    return EventColumns(
        user_E=user_E.astype(np.int64),
        item_E=item_E,
        kind_E=np.full(len(user_E), kind, np.int32),
        time_E=order_E * 60_000_000,
        order_E=np.zeros(len(user_E), np.int64),
        item_ids=[f"item-{index}" for index in range(item_count)],
    )


CATALOGUE_ITEMS = 40


class Catalogue(catalog_service_pb2_grpc.CatalogServiceServicer):
    """A catalogue of `item-0` to `item-<CATALOGUE_ITEMS>`, the last of which nobody ever touched."""

    def ListItems(self, request, context):  # type: ignore[no-untyped-def]
        return catalog_service_pb2.ListItemsResponse(
            items=[
                item_pb2.Item(item_id=f"item-{index}", category_path=["shelf"])
                for index in range(CATALOGUE_ITEMS + 1)
            ]
        )


@pytest.fixture
def catalogue_address() -> Iterator[str]:
    server = grpc.server(futures.ThreadPoolExecutor(2))
    catalog_service_pb2_grpc.add_CatalogServiceServicer_to_server(Catalogue(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(0)


@pytest.fixture
def record(migrate_services: Callable[..., str], database_url: str) -> Callable[..., None]:
    """Returns a function that writes histories into feedback's log, as views of `item-<n>`, a minute apart."""
    migrate_services("feedback", "trainer")

    def write(
        histories: list[list[int]], start: datetime = datetime(2026, 1, 1, tzinfo=UTC), first_user: int = 0
    ) -> None:
        with psycopg.connect(database_url) as connection, connection.cursor() as cursor:
            with cursor.copy(
                "COPY feedback.events (event_key, payload_digest, occurred_at, kind, device, channel, consent, "
                "user_key, item_id) FROM STDIN"
            ) as copy:
                for user, history in enumerate(histories, first_user):
                    user_key = hashlib.sha256(str(user).encode()).digest()[:16]
                    for place, item in enumerate(history):
                        copy.write_row(
                            (
                                uuid.uuid4(),
                                0,
                                start + timedelta(minutes=place),
                                VIEW,
                                0,
                                0,
                                0,
                                user_key,
                                f"item-{item}",
                            )
                        )

    return write


@pytest.fixture
def start_trainer(
    database_url: str, keys_dir: Path, tmp_path: Path
) -> Iterator[Callable[..., tuple[Trainer, trainer_service_pb2_grpc.TrainerServiceStub]]]:
    """Returns a function that starts a trainer on a socket over the test's database."""
    started: list[Trainer] = []
    channels = []

    def start(**changes: object) -> tuple[Trainer, trainer_service_pb2_grpc.TrainerServiceStub]:
        settings = TrainerSettings(
            home=tmp_path,
            listen="127.0.0.1:0",
            keys=keys_dir,
            registry=tmp_path / "registry",
            log_level="error",
            # Nothing answers there: a run must do without a catalogue.
            **{"profile_address": "127.0.0.1:9", **changes},  # type: ignore[arg-type]
        )
        trainer = Trainer(settings, Telemetry("trainer", settings), database_url)
        started.append(trainer)
        channel = open_channel(f"127.0.0.1:{trainer.start()}")
        channels.append(channel)
        return trainer, trainer_service_pb2_grpc.TrainerServiceStub(channel)

    yield start
    for channel in channels:
        channel.close()
    for trainer in started:
        trainer.close()


def eventually(condition: Callable[[], bool], seconds: float = 90.0) -> None:
    """Waits until something holds; fails when it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.05)
