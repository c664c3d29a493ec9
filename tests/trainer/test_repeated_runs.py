"""Runs that go on from others: one repeated from what it read, one that begins at the weights of another."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import psycopg
import pytest
from shopkeeper.trainer.v1 import data_snapshot_pb2, model_pb2, schedule_pb2, training_run_pb2
from shopkeeper.trainer.v1 import trainer_service_pb2 as pb

from services.trainer.converters.config import config_from_proto, config_to_proto
from services.trainer.domain.runs import DataSnapshot, RunState, TrainingConfig, TrainingRun
from services.trainer.pipeline.catalogue_files import CatalogueFiles
from services.trainer.run.work import Work
from services.trainer.settings import TrainerSettings
from shared.telemetry import Telemetry
from shared.tokens import Watermark
from tests.trainer.conftest import CATALOGUE_ITEMS, Catalogue, columns_of, walk
from tests.trainer.test_log_snapshots import key_of
from tests.trainer.test_run_lifecycle import State, failure_of

DAY_1, DAY_2 = datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 1, 2, tzinfo=UTC)
# Time enough that the clock shortens nothing.
TINY = training_run_pb2.TrainingConfig(
    size=training_run_pb2.TrainingConfig.SIZE_TINY,
    overrides=training_run_pb2.HyperParameters(max_epochs=12),
    max_train_seconds=3600,
)
# What a version is, apart from when and by which run it was made.
TRAINED = ("weights.safetensors", "encoder.tflite", "training.safetensors", "vocabulary.txt")


@pytest.fixture
def train(start_trainer, catalogue_address: str) -> Callable[..., training_run_pb2.TrainingRun]:
    _, stub = start_trainer(profile_address=catalogue_address)

    def run(config: training_run_pb2.TrainingConfig) -> training_run_pb2.TrainingRun:
        created = stub.CreateTrainingRun(pb.CreateTrainingRunRequest(config=config))
        seen = list(stub.WatchTrainingRun(pb.WatchTrainingRunRequest(run_id=created.run_id), timeout=150))
        journals[created.run_id] = [(e.step, e.loss) for m in seen for e in m.progress if e.HasField("loss")]
        return seen[-1].training_run

    journals: dict[str, list[tuple[int, float]]] = {}
    run.stub, run.journals = stub, journals  # type: ignore[attr-defined]
    return run


def digests(version: model_pb2.ModelVersion) -> dict[str, str]:
    return {file.name: file.sha256 for file in version.files if file.name.startswith(TRAINED)}


def test_a_run_is_repeated_bit_for_bit_from_what_it_read_and_refreshed_from_its_weights(
    record, train, database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub = train.stub
    record(walk(users=250, items=CATALOGUE_ITEMS), DAY_1)
    first = train(TINY)
    assert first.state == State.STATE_SUCCEEDED, first.failure
    made = stub.GetModelVersion(pb.GetModelVersionRequest(version=first.version))
    assert made.data.data_snapshot == first.data_snapshot
    assert Watermark.parse_pg(first.data_snapshot.watermark.decode()).encode() == made.data.watermark

    # The log goes on, and so does the catalogue.
    record(walk(users=250, items=CATALOGUE_ITEMS, seed=7), DAY_2)
    monkeypatch.setattr(Catalogue, "ListItems", lambda *_: pb.ListModelsResponse())
    again = training_run_pb2.TrainingConfig()
    again.CopyFrom(first.config)
    again.data_snapshot.CopyFrom(first.data_snapshot)
    repeated = train(again)
    assert repeated.state == State.STATE_SUCCEEDED, repeated.failure
    assert repeated.data_snapshot == first.data_snapshot
    same = stub.GetModelVersion(pb.GetModelVersionRequest(version=repeated.version))
    assert len(digests(made)) >= 3
    assert train.journals[repeated.run_id] == train.journals[first.run_id]
    assert digests(same) == digests(made)
    assert same.data == made.data
    assert same.evaluation.metrics == made.evaluation.metrics

    # A refresh reads what is new, in a quarter of the passes.
    refreshed = train(
        training_run_pb2.TrainingConfig(
            size=TINY.size, overrides=TINY.overrides, initial_version=first.version
        )
    )
    assert refreshed.state == State.STATE_SUCCEEDED, refreshed.failure
    assert refreshed.data_snapshot.snapshot_set != first.data_snapshot.snapshot_set
    newer = stub.GetModelVersion(pb.GetModelVersionRequest(version=refreshed.version))
    parameters = {p.name: p.text or p.number for p in newer.hyper_parameters}
    before = {p.name: p.text or p.number for p in made.hyper_parameters}
    assert parameters["initial_version"] == first.version
    assert parameters["max_epochs"] == round(before["max_epochs"] / 4)
    assert newer.data.event_count > made.data.event_count
    assert digests(newer) != digests(made)
    ladder = {rung.name: {m.name: m.value for m in rung.metrics} for rung in newer.evaluation.ladder}
    assert ladder["blend"]["ndcg@10"] > 2 * ladder["popularity"]["ndcg@10"]

    # Whoever is erased is in no repetition: what held them is gone, and that is said.
    with psycopg.connect(database_url) as connection:
        connection.execute(
            "INSERT INTO feedback.tombstones (tombstone_key, user_keys, erased_at) VALUES (%s, %s, now())",
            (b"t" * 32, [key_of(0)]),
        )
    measured = stub.EvaluateModel(pb.EvaluateModelRequest(version=first.version))
    *_, last = stub.WatchTrainingRun(pb.WatchTrainingRunRequest(run_id=measured.run_id), timeout=60)
    assert last.training_run.state == State.STATE_SUCCEEDED, last.training_run.failure
    assert last.training_run.data_snapshot.snapshot_set
    gone = train(again)
    assert gone.failure.reason == "DATA_SNAPSHOT_GONE"
    assert "Leave data_snapshot out" in gone.failure.message


def test_what_names_no_snapshot_is_refused(record, start_trainer) -> None:
    _, stub = start_trainer()
    named = data_snapshot_pb2.DataSnapshot(snapshot_set="../CURRENT", catalogue="A" * 64)
    config = training_run_pb2.TrainingConfig(data_snapshot=named)
    refused = failure_of(lambda: stub.CreateTrainingRun(pb.CreateTrainingRunRequest(config=config)))
    assert [v.field for v in refused.violations] == [
        "config.data_snapshot.snapshot_set",
        "config.data_snapshot.catalogue",
    ]
    refused = failure_of(lambda: stub.EvaluateModel(pb.EvaluateModelRequest(data_snapshot=named)))
    assert [v.field for v in refused.violations] == ["data_snapshot.snapshot_set", "data_snapshot.catalogue"]
    named = data_snapshot_pb2.DataSnapshot(snapshot_set="a" * 64)
    schedule = schedule_pb2.Schedule(
        cron="0 3 * * *", config=training_run_pb2.TrainingConfig(data_snapshot=named)
    )
    refused = failure_of(
        lambda: stub.CreateSchedule(pb.CreateScheduleRequest(schedule_id="nightly", schedule=schedule))
    )
    assert [v.field for v in refused.violations] == ["schedule.config.data_snapshot"]


def test_a_snapshot_survives_the_store_and_its_absence_changes_no_request() -> None:
    message = training_run_pb2.TrainingConfig()
    message.data_snapshot.snapshot_set, message.data_snapshot.catalogue = "a" * 64, "b" * 64
    config = config_from_proto(message)
    assert TrainingConfig.from_json(config.to_json()) == config
    assert config_to_proto(config).data_snapshot == message.data_snapshot
    # Requests are told apart by a digest of this; a retry must find what an earlier build stored.
    assert "data_snapshot" not in TrainingConfig().to_json()


def test_a_catalogue_comes_back_in_its_order_and_goes_when_it_is_old_or_damaged(tmp_path: Path) -> None:
    files = CatalogueFiles(tmp_path / "catalogues", retention_days=1)
    attributes = {"b": ["z", "a"], "a": [], "ö": ["brand:é"]}
    digest = files.keep(attributes, now=0.0)
    assert list(files.load(digest).items()) == list(attributes.items())
    other = files.keep({}, now=80_000.0)
    assert files.load(other) == {}
    assert files.keep(attributes, now=90_000.0) == digest
    files.keep({"c": ["x"]}, now=170_000.0)
    assert files.load(digest) is not None
    assert files.load(other) is None
    (path,) = tmp_path.glob(f"catalogues/{digest}*")
    path.write_bytes(path.read_bytes()[:-1])
    assert files.load(digest) is None


class Journal:
    """A store that remembers what it was told."""

    def __init__(self) -> None:
        self.words: list[str] = []
        self.snapshots: list[DataSnapshot] = []

    def append_progress(self, run_id: str, stage: str, message: str, **fields: object) -> None:
        self.words.append(message)

    def set_data_snapshot(self, run_id: str, snapshot: DataSnapshot) -> None:
        self.snapshots.append(snapshot)


def test_a_catalogue_that_cannot_be_kept_costs_the_repetition_and_not_the_run(tmp_path: Path) -> None:
    store = Journal()
    run = TrainingRun("run-1", "main", RunState.RUNNING, "READING", TrainingConfig(), DAY_1)
    settings = TrainerSettings(home=tmp_path, profile_address="127.0.0.1:9", catalogue_timeout_seconds=0.1)
    logger = Telemetry("trainer", settings).logger
    work = Work(run, settings, cast("Any", None), cast("Any", store), cast("Any", None), logger)
    events = replace(columns_of([[0, 1]]), snapshot="a" * 64, watermark=b"")

    kept = work.read_catalogue(events)
    assert store.snapshots == [DataSnapshot("a" * 64, kept.digest)]

    # A file stands where the directory would.
    shutil.rmtree(tmp_path / "catalogues")
    (tmp_path / "catalogues").write_bytes(b"")
    assert work.read_catalogue(events).digest == ""
    assert len(store.snapshots) == 1
    assert "cannot be kept" in store.words[-1]
