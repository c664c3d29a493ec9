"""Runs over gRPC, on a real PostgreSQL, with real training in a process of its own."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import numpy as np
import psycopg
import pytest
from shopkeeper.trainer.v1 import model_pb2, training_run_pb2
from shopkeeper.trainer.v1 import trainer_service_pb2 as pb

from services.trainer.pipeline.event_log import DIRECTORY
from services.trainer.settings import directory_of
from services.trainer.storage import PublishingLease
from shared.bundle import Bundle, Registry, history_from_events, load_bundle, write_bundle
from shared.bundle.history import encoder_inputs
from shared.errors import ShopkeeperError
from shared.grpc_status import from_rpc_error
from shared.keys import read_signing_key, read_verifying_key
from shared.tokens import Watermark
from tests.trainer.conftest import eventually, walk
from tests.trainer.event_files import Events, events_in

State = training_run_pb2.TrainingRun.State
Stage = training_run_pb2.TrainingRun.Stage
TINY = training_run_pb2.TrainingConfig(size=training_run_pb2.TrainingConfig.SIZE_TINY, max_train_seconds=40)


def failure_of(call: Callable[[], object]) -> ShopkeeperError:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return from_rpc_error(caught.value)


def test_a_run_trains_measures_publishes_and_promotes_and_its_journal_can_be_resumed(
    record, start_trainer, tmp_path: Path, keys_dir: Path
) -> None:
    record(walk(users=300, items=60))
    trainer, stub = start_trainer()
    request = pb.CreateTrainingRunRequest(request_id="first", config=TINY)

    created = stub.CreateTrainingRun(request)
    again = stub.CreateTrainingRun(request)

    assert again.run_id == created.run_id
    seen = list(stub.WatchTrainingRun(pb.WatchTrainingRunRequest(run_id=created.run_id), timeout=150))
    run = seen[-1].training_run
    journal = [entry for message in seen for entry in message.progress]
    assert run.state == State.STATE_SUCCEEDED, run.failure
    assert journal[-1].message == f"Version {run.version} is published, and serves."
    assert [entry.sequence_number for entry in journal] == list(range(1, len(journal) + 1))
    assert {Stage.STAGE_READING, Stage.STAGE_TRAINING, Stage.STAGE_EVALUATING, Stage.STAGE_PUBLISHING} <= {
        entry.stage for entry in journal
    }
    passes = [entry for entry in journal if entry.epoch]
    assert passes
    assert all(entry.step > 0 and entry.loss > 0 for entry in passes)
    # Not every pass is measured; the last one is.
    assert {metric.name for entry in passes for metric in entry.metrics} == {"ndcg@10"}
    resumed = list(
        stub.WatchTrainingRun(
            pb.WatchTrainingRunRequest(run_id=created.run_id, after_sequence_number=3), timeout=10
        )
    )
    assert [e.sequence_number for m in resumed for e in m.progress] == list(range(4, len(journal) + 1))

    # What was published is measured, judged, promoted, and loads where it serves.
    curves = events_in(directory_of(tmp_path, run.run_id) / DIRECTORY)
    assert run.promoted
    assert run.gate.verdict == model_pb2.Gate.VERDICT_PASSED
    version = stub.GetModelVersion(pb.GetModelVersionRequest(version="production"))
    assert version.version == run.version
    assert version.run_id == run.run_id
    assert version.aliases == ["production"]
    assert version.data.event_count > 1000
    assert version.data.watermark
    assert "# Model card" in version.card
    ladder = {rung.name: {m.name: m for m in rung.metrics} for rung in version.evaluation.ladder}
    assert next(iter(ladder)) == "blend"
    assert ladder["blend"]["ndcg@10"].low > ladder["popularity"]["ndcg@10"].high
    assert_tells_what_the_card_says(curves, version, passes)
    bundle = load_bundle(
        Registry(tmp_path / "registry").version_path("main", run.version), read_verifying_key(keys_dir)
    )
    # Receipts of erasure are read off these.
    requested_at, created_at = (
        datetime.fromisoformat(bundle.manifest[name]) for name in ("requested_at", "created_at")
    )
    assert requested_at.replace(microsecond=0) <= created_at
    assert Watermark.parse_pg(bytes.fromhex(bundle.manifest["data"]["watermark"]).decode()).xmax > 0
    history = history_from_events(["item-4", "item-5", "item-6"], [3, 3, 3], bundle.index_of)
    query_D = bundle.encoder.encode(*encoder_inputs(history, bundle.item_vectors, bundle.max_history))
    score_I = bundle.item_vectors @ query_D
    score_I[history.indices_H] = -np.inf
    assert bundle.item_ids[int(score_I.argmax())] in {"item-7", "item-8"}

    # What the gate failed is promoted by force alone, and the first one can be had back.
    newest = republish(Registry(tmp_path / "registry"), bundle, keys_dir, verdict="FAILED")
    promote = pb.PromoteModelRequest(version=newest, comment="the shop insists")
    refused = failure_of(lambda: stub.PromoteModel(promote))
    assert refused.reason == "GATE_FAILED"
    assert "not good enough" in refused.message
    forced = stub.PromoteModel(
        pb.PromoteModelRequest(
            version=newest, comment="the shop insists", force=True, expected_current_version=run.version
        )
    )
    assert forced.aliases[0].version == newest
    assert forced.aliases[0].history[0].cause == model_pb2.AliasChange.CAUSE_FORCED
    back = stub.RollbackModel(
        pb.RollbackModelRequest(comment="worse in the shop", expected_current_version=newest)
    )
    assert back.aliases[0].version == run.version
    assert back.aliases[0].history[0].comment == "worse in the shop"
    retried = failure_of(lambda: stub.RollbackModel(pb.RollbackModelRequest(expected_current_version=newest)))
    assert retried.reason == "ALIAS_CHANGED"
    assert failure_of(lambda: stub.RollbackModel(pb.RollbackModelRequest())).reason == "NO_PREVIOUS_VERSION"
    listed = stub.ListModelVersions(pb.ListModelVersionsRequest(page_size=1))
    rest = stub.ListModelVersions(pb.ListModelVersionsRequest(page_size=1, page_token=listed.next_page_token))
    assert [v.version for v in [*listed.model_versions, *rest.model_versions]] == [newest, run.version]
    assert not rest.next_page_token
    watched = []
    for message in stub.WatchAliases(pb.WatchAliasesRequest(), timeout=10):
        if message.snapshot_complete:
            break
        watched.append((message.model, message.alias.alias, message.alias.version))
    assert watched == [("main", "production", run.version)]

    # A process that published and died before it could say so has published.
    with trainer.database.connect() as connection:
        connection.execute(
            "UPDATE training_runs SET state = 'RUNNING', version = '', ended_at = NULL, "
            "heartbeat_at = now() - interval '1 hour' WHERE run_id = %s",
            (run.run_id,),
        )
    get = pb.GetTrainingRunRequest(run_id=run.run_id)
    eventually(lambda: stub.GetTrainingRun(get).state == State.STATE_SUCCEEDED)
    assert stub.GetTrainingRun(get).version == run.version

    # A damaged version is refused whatever is forced.
    weights = Registry(tmp_path / "registry").version_path("main", newest) / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    damaged = failure_of(
        lambda: stub.PromoteModel(pb.PromoteModelRequest(version=newest, comment="x", force=True))
    )
    assert damaged.reason == "BUNDLE_DAMAGED"


def assert_tells_what_the_card_says(
    curves: Events, version: model_pb2.ModelVersion, passes: list[training_run_pb2.TrainingProgress]
) -> None:
    """The run's events hold its curves, and the numbers and the words that its version makes public."""
    assert curves.texts == {"card": version.card}
    shown = {name.removeprefix("card/") for name in curves.pictures}
    assert {"training_curve", "ladder", "slices", "reliability"} <= shown
    assert all(f"({name}.png)" in version.card for name in shown)
    by_step = {entry.step: entry.loss for entry in passes}
    assert {step: pytest.approx(loss) for step, loss in curves.scalars["pass/loss"]} == by_step
    assert [value for _, value in curves.scalars["pass/validation ndcg@10"]] == pytest.approx(
        [metric.value for entry in passes for metric in entry.metrics]
    )
    steps, losses = zip(*curves.scalars["train/loss"], strict=True)
    assert steps[-1] == passes[-1].step
    assert list(steps) == sorted(set(steps))
    assert len(steps) > len(passes)
    assert losses[-1] < losses[0]
    assert len(curves.scalars["train/learning_rate"]) == len(steps)
    outcome = {name: values[-1][1] for name, values in curves.scalars.items()}
    told = 0
    for kind, reports in (("ladder", version.evaluation.ladder), ("slices", version.evaluation.slices)):
        for report in reports:
            for metric in report.metrics:
                assert outcome[f"{kind}/{report.name}/{metric.name}"] == pytest.approx(metric.value)
                told += 1
            ndcg = next(metric for metric in report.metrics if metric.name == "ndcg@10")
            assert outcome[f"{kind}/{report.name}/ndcg@10/low"] == pytest.approx(ndcg.low)
            assert f"{ndcg.value:.4f} [{ndcg.low:.4f}, {ndcg.high:.4f}]" in version.card
    assert told > 50
    assert outcome["gate/passed"] == 1
    assert {name for name in outcome if name.startswith("gate/checks/")} == {
        f"gate/checks/{check.name}" for check in version.gate.checks
    }
    assert f"by {outcome['gate/lead over popularity']:.4f}, interval" in version.card


def republish(registry: Registry, bundle: Bundle, keys_dir: Path, verdict: str) -> str:
    """Publishes a version's arrays again under another verdict."""
    fields = {
        name: value
        for name, value in bundle.manifest.items()
        if name not in ("signature", "files", "version", "created_at", "run_id")
    }
    fields["gate"] = {"verdict": verdict, "reasons": ["beats_popularity: not good enough"], "checks": []}
    path = registry.version_path(bundle.model, bundle.version)
    return write_bundle(
        registry,
        bundle.model,
        arrays={
            "item_vectors": bundle.item_vectors,
            "item_bias": bundle.item_bias,
            "popularity": bundle.popularity,
            **bundle.companion.to_arrays(),
        },
        vocabulary=list(bundle.item_ids),
        encoder_bytes=(path / "encoder.tflite").read_bytes(),
        manifest_fields=fields,
        attachments={},
        signing_key=read_signing_key(keys_dir),
        now=datetime.now(UTC) + timedelta(seconds=2),
    )


def test_a_new_version_must_beat_the_one_in_service_on_events_that_are_newer_than_it(
    record, start_trainer, tmp_path: Path
) -> None:
    record(walk(users=200, items=40))
    _, stub = start_trainer()

    def train(**fields: object) -> training_run_pb2.TrainingRun:
        config = training_run_pb2.TrainingConfig()
        config.CopyFrom(TINY)
        # Four runs: the pattern is learned in a few passes.
        config.overrides.max_epochs = 20
        config.MergeFrom(training_run_pb2.TrainingConfig(**fields))  # type: ignore[arg-type]
        run = stub.CreateTrainingRun(pb.CreateTrainingRunRequest(config=config))
        *_, last = stub.WatchTrainingRun(pb.WatchTrainingRunRequest(run_id=run.run_id), timeout=150)
        assert last.training_run.state == State.STATE_SUCCEEDED, last.training_run.failure
        return last.training_run

    def check_of(run: training_run_pb2.TrainingRun, name: str) -> model_pb2.GateCheck:
        return next(check for check in run.gate.checks if check.name == name)

    first = train()
    assert first.promoted
    # Nothing new: it cannot be better.
    same = train(seed=1)
    assert same.gate.verdict == model_pb2.Gate.VERDICT_FAILED
    assert not same.promoted
    assert first.version in check_of(same, "beats_incumbent").reason
    assert "too few held-out events" in check_of(same, "beats_incumbent").reason
    # Fashion turns round: what followed an item now goes before it.
    later = [list(reversed(history)) for history in walk(users=300, items=40, seed=9)]
    record(later, start=datetime(2026, 2, 1, tzinfo=UTC), first_user=1000)
    new = train()
    beaten = check_of(new, "beats_incumbent")
    assert beaten.passed, beaten.reason
    assert "people whose events are newer than it" in beaten.reason
    assert check_of(new, "slice_no_worse").passed
    assert new.promoted
    parts = stub.GetModelVersion(pb.GetModelVersionRequest(version=new.version)).evaluation.slices
    assert any(part.incumbent_metrics for part in parts)
    # Told to, a run puts into service what the gate failed, and says so for good.
    forced = train(seed=2, force=True)
    assert forced.gate.verdict == model_pb2.Gate.VERDICT_FORCED
    assert forced.promoted
    assert not check_of(forced, "beats_incumbent").passed
    history = stub.GetModel(pb.GetModelRequest()).aliases[0].history
    causes = model_pb2.AliasChange
    assert [change.cause for change in history] == [
        causes.CAUSE_FORCED,
        causes.CAUSE_GATE_PASSED,
        causes.CAUSE_GATE_PASSED,
    ]


def test_too_little_data_fails_with_the_numbers_and_leaves_nothing(
    record, start_trainer, tmp_path: Path
) -> None:
    record([[1, 2, 3], [2, 3, 4], [1, 3, 5]])
    _, stub = start_trainer()
    run = stub.CreateTrainingRun(pb.CreateTrainingRunRequest(config=TINY))

    *_, last = stub.WatchTrainingRun(pb.WatchTrainingRunRequest(run_id=run.run_id), timeout=150)

    assert last.training_run.state == State.STATE_FAILED
    assert last.training_run.failure.reason == "TOO_LITTLE_DATA"
    assert "3 people with at least 3 events" in last.training_run.failure.message
    assert not Registry(tmp_path / "registry").versions()


def test_a_killed_process_fails_the_run_and_a_cancelled_one_stops_and_nothing_is_published(
    record, start_trainer, tmp_path: Path
) -> None:
    record(walk(users=300, items=60))
    trainer, stub = start_trainer(max_run_attempts=1)
    # So many passes without patience that it would train for a minute.
    endless = training_run_pb2.TrainingConfig(
        size=training_run_pb2.TrainingConfig.SIZE_TINY,
        max_train_seconds=60,
        overrides=training_run_pb2.HyperParameters(max_epochs=1000, patience=1000),
    )
    killed = stub.CreateTrainingRun(pb.CreateTrainingRunRequest(config=endless))
    waiting = stub.CreateTrainingRun(pb.CreateTrainingRunRequest(config=endless))
    dropped = stub.CreateTrainingRun(pb.CreateTrainingRunRequest(config=endless))

    def get(run_id: str) -> training_run_pb2.TrainingRun:
        return stub.GetTrainingRun(pb.GetTrainingRunRequest(run_id=run_id))

    stub.CancelTrainingRun(pb.CancelTrainingRunRequest(run_id=dropped.run_id, comment="not needed"))
    assert get(dropped.run_id).state == State.STATE_CANCELLED
    eventually(lambda: get(killed.run_id).stage == Stage.STAGE_TRAINING)
    # One run of a model at a time.
    assert get(waiting.run_id).state == State.STATE_QUEUED
    os.kill(trainer.supervisor.processes()[killed.run_id], signal.SIGKILL)
    eventually(lambda: get(killed.run_id).state == State.STATE_FAILED)
    assert get(killed.run_id).failure.reason == "PROCESS_DIED"
    assert "SIGKILL" in get(killed.run_id).failure.message

    eventually(lambda: get(waiting.run_id).stage == Stage.STAGE_TRAINING)
    answer = stub.CancelTrainingRun(
        pb.CancelTrainingRunRequest(run_id=waiting.run_id, comment="changed my mind")
    )
    assert answer.state in (State.STATE_CANCELLING, State.STATE_CANCELLED)
    eventually(lambda: get(waiting.run_id).state == State.STATE_CANCELLED)
    assert get(waiting.run_id).cancel_comment == "changed my mind"
    assert (
        stub.CancelTrainingRun(pb.CancelTrainingRunRequest(run_id=waiting.run_id)).state
        == State.STATE_CANCELLED
    )
    refused = failure_of(lambda: stub.CancelTrainingRun(pb.CancelTrainingRunRequest(run_id=killed.run_id)))
    assert refused.reason == "TRAINING_RUN_ENDED"
    assert not Registry(tmp_path / "registry").versions()
    eventually(lambda: not trainer.supervisor.processes())


def test_a_run_whose_trainer_stops_waits_for_the_next_one(record, start_trainer) -> None:
    record([[1, 2, 3]])
    first, stub = start_trainer()
    run = stub.CreateTrainingRun(pb.CreateTrainingRunRequest(config=TINY))
    eventually(lambda: run.run_id in first.supervisor.processes())
    first.supervisor.stop()
    state = stub.GetTrainingRun(pb.GetTrainingRunRequest(run_id=run.run_id)).state
    # It may have found out that there is too little data before it was told to stop.
    assert state in (State.STATE_QUEUED, State.STATE_FAILED)

    _, stub = start_trainer()

    eventually(
        lambda: (
            stub.GetTrainingRun(pb.GetTrainingRunRequest(run_id=run.run_id)).failure.reason
            == "TOO_LITTLE_DATA"
        )
    )


def test_a_run_without_a_heartbeat_is_started_anew_and_in_the_end_given_up(record, start_trainer) -> None:
    record([[1, 2, 3]])
    trainer, stub = start_trainer(max_run_attempts=2, run_silence_seconds=1.0)
    trainer.supervisor.stop()
    run = stub.CreateTrainingRun(pb.CreateTrainingRunRequest(config=TINY))
    # As a trainer leaves it that is killed together with its run's process.
    with trainer.database.connect() as connection:
        connection.execute(
            "UPDATE training_runs SET state = 'RUNNING', attempt = 2, "
            "heartbeat_at = now() - interval '1 hour' WHERE run_id = %s",
            (run.run_id,),
        )
    _, stub = start_trainer(max_run_attempts=2, run_silence_seconds=1.0)
    eventually(
        lambda: stub.GetTrainingRun(pb.GetTrainingRunRequest(run_id=run.run_id)).state == State.STATE_FAILED
    )
    assert stub.GetTrainingRun(pb.GetTrainingRunRequest(run_id=run.run_id)).failure.reason == "INTERRUPTED"


def test_each_holder_of_the_lease_gets_a_greater_number_and_a_lost_session_publishes_nothing(
    record, start_trainer, database_url: str
) -> None:
    trainer, _ = start_trainer()
    first, second = PublishingLease(trainer.database, "main"), PublishingLease(trainer.database, "main")
    assert first.try_acquire()
    assert not second.try_acquire()
    # The server ends the first one's session, as a network that is cut does; its process knows nothing of it.
    with psycopg.connect(database_url) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND granted "
            "AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
        )
    eventually(second.try_acquire, 10)
    assert second.fence > first.fence > 0
    written = []
    with pytest.raises(psycopg.OperationalError):
        first.publish("run-x", 1, lambda: written.append("a version"))
    assert written == []
    first.close()
    second.close()
