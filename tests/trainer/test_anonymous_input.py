"""What a run learns from, and what it never sees: keys instead of people, consent, erasure, a cap on one person's share."""

from __future__ import annotations

from pathlib import Path

import psycopg
import pytest
from shopkeeper.trainer.v1 import trainer_service_pb2 as pb
from shopkeeper.trainer.v1 import training_run_pb2

from services.trainer.settings import snapshots_of
from shared.bundle import Registry, load_bundle
from shared.keys import read_verifying_key
from tests.trainer.conftest import walk
from tests.trainer.test_log_snapshots import key_of
from tests.trainer.test_run_lifecycle import TINY, State

ITEMS, CAP = 40, 50
# Each touched items of their own alone, by which they would be known.
BUSY, SAID_NO_IN_EVENTS, WITHDREW, ERASED, IS_A_BOT = range(1000, 1005)


def own_items(user: int, count: int) -> list[int]:
    return [user * 1000 + place for place in range(count)]


def test_a_run_learns_from_who_consents_up_to_the_cap_and_writes_nobodys_key_beside_the_day_files(
    record, start_trainer, database_url: str, tmp_path: Path, keys_dir: Path
) -> None:
    histories = walk(users=200, items=ITEMS, longest=12)
    record(histories)
    for user in (BUSY, SAID_NO_IN_EVENTS, WITHDREW, ERASED, IS_A_BOT):
        record([own_items(user, 300)], first_user=user)
    with psycopg.connect(database_url) as connection:
        connection.execute(
            "UPDATE feedback.events SET consent = 4 WHERE user_key = %s", (key_of(SAID_NO_IN_EVENTS),)
        )
        connection.execute(
            "UPDATE feedback.events SET is_bot = true WHERE user_key = %s", (key_of(IS_A_BOT),)
        )
        connection.execute(
            "INSERT INTO feedback.consents (user_key, training, updated_at) VALUES (%s, false, now())",
            (key_of(WITHDREW),),
        )
        connection.execute(
            "INSERT INTO feedback.tombstones (tombstone_key, user_keys, erased_at) VALUES (%s, %s, now())",
            (b"t" * 32, [key_of(ERASED)]),
        )
    _, stub = start_trainer()
    config = training_run_pb2.TrainingConfig()
    config.CopyFrom(TINY)
    config.overrides.max_epochs = 3
    config.window.max_user_events = CAP

    created = stub.CreateTrainingRun(pb.CreateTrainingRunRequest(config=config))
    *_, last = stub.WatchTrainingRun(pb.WatchTrainingRunRequest(run_id=created.run_id), timeout=120)

    run = last.training_run
    assert run.state == State.STATE_SUCCEEDED, run.failure
    version = stub.GetModelVersion(pb.GetModelVersionRequest(version=run.version))
    assert version.data.user_count == len(histories) + 1
    assert version.data.event_count == sum(map(len, histories)) + CAP
    bundle = load_bundle(
        Registry(tmp_path / "registry").version_path("main", run.version), read_verifying_key(keys_dir)
    )
    newest = own_items(BUSY, 300)[-CAP:]
    walked = {item for history in histories for item in history}
    assert set(bundle.item_ids) == {f"item-{item}" for item in (*walked, *newest)}
    # Whom the files of a version, of a run or of its curves would name: nobody.
    written = [
        path
        for path in tmp_path.rglob("*")
        if path.is_file() and not path.is_relative_to(snapshots_of(tmp_path))
    ]
    assert {"manifest.json", "weights.safetensors", "card.md"} <= {path.name for path in written}
    people = [key_of(user) for user in (*range(len(histories)), BUSY)]
    for path in written:
        content = path.read_bytes()
        assert not [key for key in people if key in content or key.hex().encode() in content], path


@pytest.mark.parametrize("table", ["events", "consents", "tombstones", "data_keys", "erasure_receipts"])
def test_the_trainer_reads_the_log_through_its_views_alone(record, database_url: str, table: str) -> None:
    with psycopg.connect(database_url) as connection:
        there = connection.execute("SELECT to_regclass(%s)", (f"feedback.{table}",)).fetchone()
        connection.execute("SET ROLE shopkeeper_trainer")
        assert connection.execute("SELECT count(*) FROM feedback.training_events_v1").fetchone() == (0,)
        assert there is not None
        assert there[0] is not None
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute(f"SELECT FROM feedback.{table}")
