"""The second stage of a run, from the log to the bundle. SIMULATION: a shop that showed pages and was answered."""

from __future__ import annotations

import hashlib
import json
import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest
from shopkeeper.trainer.v1 import trainer_service_pb2 as pb
from shopkeeper.trainer.v1 import training_run_pb2

from services.trainer.ranker.responses import read_responses
from shared.bundle import load_bundle
from shared.bundle.ranker import RANKER
from shared.database import Database
from shared.event_kinds import EventKind
from shared.keys import read_verifying_key
from shared.simulation.history import Scale
from tests.trainer.simulated_impressions import simulated_shop

State = training_run_pb2.TrainingRun.State
START = datetime(2026, 1, 1, tzinfo=UTC)
_COLUMNS = (
    "event_key, payload_digest, occurred_at, kind, device, channel, consent, user_key, item_id, position, propensity, "
    "recommendation_id, placement, impression_items, impression_positions, impression_propensities, price_micros, "
    "currency_code, line_items, line_positions, is_bot, quarantine_reason"
)


def key_of(user: int) -> bytes:
    return hashlib.sha256(str(user).encode()).digest()[:16]


def write(url: str, rows: list[dict[str, Any]]) -> None:
    """Appends rows to the log; what is not named is NULL."""
    names = _COLUMNS.split(", ")
    fixed = {"payload_digest": 0, "device": 0, "channel": 0, "consent": 0, "is_bot": False}
    with psycopg.connect(url) as connection, connection.cursor() as cursor:
        with cursor.copy(f"COPY feedback.events ({_COLUMNS}) FROM STDIN") as copy:
            for row in rows:
                whole = {"event_key": uuid.uuid4(), **fixed, **row}
                copy.write_row([whole.get(name) for name in names])


def page(number: int, user: int, minute: float, items: list[str], **fields: Any) -> dict[str, Any]:
    return {
        "occurred_at": START + timedelta(minutes=minute), "kind": 2, "user_key": key_of(user),
        "recommendation_id": number.to_bytes(8, "big"), "placement": "home", "impression_items": items,
        "impression_positions": list(range(1, len(items) + 1)),
        "impression_propensities": [1.0] * len(items), **fields,
    }  # fmt: skip


def act(kind: EventKind, number: int, user: int, minute: float, item: str, **fields: Any) -> dict[str, Any]:
    return {
        "occurred_at": START + timedelta(minutes=minute), "kind": int(kind), "user_key": key_of(user), "item_id": item,
        "recommendation_id": number.to_bytes(8, "big"), "position": 1, "propensity": 1.0, **fields,
    }  # fmt: skip


@pytest.fixture
def log_url(migrate_services: Any, database_url: str) -> str:
    migrate_services("feedback", "trainer")
    return database_url


def test_responses_are_read_as_they_were_logged(log_url: str) -> None:
    click, cart, buy = EventKind.RECOMMENDATION_CLICK, EventKind.ADD_TO_CART, EventKind.PURCHASE
    order = {
        "occurred_at": START + timedelta(minutes=9), "kind": int(buy), "user_key": key_of(2),
        "recommendation_id": (2).to_bytes(8, "big"), "line_items": ["c", "x"], "line_positions": [1, None],
    }  # fmt: skip
    before = act(
        EventKind.ITEM_VIEW, 0, 1, 1, "z", recommendation_id=None, price_micros=7, currency_code="EUR"
    )
    write(
        log_url,
        [
            before,
            page(1, 1, 5, ["a", "b"]),
            page(1, 1, 6, ["a", "b"]),
            act(click, 1, 1, 7, "b"),
            page(2, 2, 8, ["c", "x"], impression_propensities=[0.25, None]),
            order,
            page(3, 3, 8, ["a"], consent=4),
            page(4, 4, 8, ["a"], is_bot=True),
            page(6, 4, 8, ["a"], quarantine_reason=1),
            act(cart, 5, 1, 9, "a"),
        ],
    )
    database = Database(log_url, schema="trainer")
    with database.dedicated_connection(autocommit=True) as connection:
        connection.execute("SET ROLE shopkeeper_trainer")
        found = read_responses(connection, None, "", 100)
        newest = read_responses(connection, START + timedelta(minutes=7), "", 100)
    database.close()
    shown = [
        (int(page), int(place), found.item_ids[item], round(float(propensity), 3), labels.tolist())
        for page, place, item, propensity, labels in zip(
            found.page_N, found.position_N, found.item_N, found.propensity_N, found.labels_NT, strict=True
        )
    ]
    # Shown twice is shown once, and first; what has no propensity or no consent, is a bot's or in quarantine is not there.
    assert shown == [
        (0, 1, "a", 1.0, [False] * 3),
        (0, 2, "b", 1.0, [True, False, False]),
        (1, 1, "c", 0.25, [True, False, True]),
    ]
    assert found.time_N[0] == int((START + timedelta(minutes=5)).timestamp() * 1e6)
    past = {found.item_ids[item] for item in found.event_item_E}
    assert {"z", "b", "c"} <= past
    assert found.price_of == {"z": 7}
    assert len(newest) == 1


def rows_of_simulation(
    events: Any, log: Any, ids: list[str]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Returns the rows of the time before any recommender, and of the pages after it."""
    first = int(events.time_E.min())
    minute_E = (events.time_E - first) / 60e6
    before = [
        act(EventKind(kind), 0, who, at, ids[item], recommendation_id=None, position=None, propensity=None)
        for who, kind, item, at in zip(
            events.user_E.tolist(),
            events.kind_E.tolist(),
            events.item_E.tolist(),
            minute_E.tolist(),
            strict=True,
        )
        if kind != EventKind.PURCHASE
    ]
    last = float(minute_E.max())
    base = float(log.day_P.min())
    after = []
    for number, (who, day) in enumerate(zip(log.who_P.tolist(), log.day_P.tolist(), strict=True), 1):
        at = last + 10 + (day - base) * 1_440
        items = [ids[item] for item in log.items_PK[number - 1].tolist()]
        after.append(page(number, who, at, items))
        for place in np.flatnonzero(log.clicked_PK[number - 1]).tolist():
            after.append(
                act(EventKind.RECOMMENDATION_CLICK, number, who, at + 0.4, items[place], position=place + 1)
            )
            if log.carted_PK[number - 1, place]:
                after.append(
                    act(EventKind.ADD_TO_CART, number, who, at + 0.6, items[place], position=place + 1)
                )
    return before, after


def test_a_run_teaches_a_second_stage_on_what_the_version_before_it_showed(
    log_url: str, start_trainer: Any, tmp_path: Path, keys_dir: Path
) -> None:
    scale = Scale(seed=5, shoppers=300, items=60, days=30, visits_per_shopper=6)
    shop = simulated_shop(scale, 1_700, position_decay=1.0, noise=0.5)
    before, after = rows_of_simulation(shop.events, shop.log, list(shop.world.shop.item_ids))
    write(log_url, before)
    _, stub = start_trainer()
    config = training_run_pb2.TrainingConfig(
        size=training_run_pb2.TrainingConfig.SIZE_TINY, promote=True, force=True, max_train_seconds=4,
    )  # fmt: skip

    def run(request_id: str) -> tuple[str, dict[str, Any]]:
        created = stub.CreateTrainingRun(pb.CreateTrainingRunRequest(request_id=request_id, config=config))
        seen = list(stub.WatchTrainingRun(pb.WatchTrainingRunRequest(run_id=created.run_id), timeout=200))
        done = seen[-1].training_run
        assert done.state == State.STATE_SUCCEEDED, done.failure
        directory = tmp_path / "registry" / "main" / done.version
        return done.version, json.loads((directory / "manifest.json").read_text())

    first, manifest = run("first")
    assert manifest["ranker"]["served"] is False
    assert "no version was in service" in manifest["ranker"]["why_not"]
    assert not (tmp_path / "registry" / "main" / first / RANKER).exists()

    write(log_url, after)
    second, manifest = run("second")
    directory = tmp_path / "registry" / "main" / second
    described = manifest["ranker"]
    pages = len(shop.log.who_P)
    assert 0.7 * pages <= described["facts"]["pages"] <= pages
    assert described["measures"]["click_auc"] > 0.6
    assert described["facts"]["examination_at_10"] < 0.5
    card = (directory / "card.md").read_text()
    assert "## Second stage" in card
    assert "second_stage_reliability.png" in manifest["files"]
    bundle = load_bundle(directory, read_verifying_key(keys_dir))
    # Served or not, manifest, files and what loads agree.
    assert described["served"] == (RANKER in manifest["files"]) == (bundle.ranker is not None)
    assert described["served"] == (described["lead"]["low"] > 0)
    assert described["served"] == ("**Served.**" in card)
