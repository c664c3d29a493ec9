"""Measuring a version anew, and searching for better hyper-parameters, as runs."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from shopkeeper.trainer.v1 import trainer_service_pb2 as pb
from shopkeeper.trainer.v1 import training_run_pb2

from services.trainer.domain.hyper_parameters import resolve
from services.trainer.domain.runs import Trial
from services.trainer.pipeline.dataset import EventColumns
from services.trainer.pipeline.evaluate import evaluate_version
from services.trainer.pipeline.plan import Plan
from services.trainer.pipeline.tune import Search
from shared.bundle import Bundle, Registry, ScoringParameters, load_bundle, write_bundle
from shared.bundle.sum_encoder import build_sum_encoder
from shared.keys import read_signing_key
from tests.trainer.conftest import columns_of, walk
from tests.trainer.test_run_lifecycle import failure_of

ITEMS, L, D = 12, 1, 12
Run = training_run_pb2.TrainingRun
Config = training_run_pb2.TrainingConfig
Split = training_run_pb2.EvaluationConfig


def next_item_version(
    root: Path, key: Ed25519PrivateKey, trained_until_minute: int, watermark: str = ""
) -> Path:
    """Publishes a version that foretells the item after the last one; returns its directory."""
    registry = Registry(root)
    # The query is the last item's vector; item i answers to the vector of item i - 1. No counts.
    vectors_ID = np.roll(np.eye(ITEMS), 0, axis=0) + 3 * np.roll(np.eye(ITEMS), -1, axis=1)
    version = write_bundle(
        registry,
        "main",
        arrays={
            "item_vectors": vectors_ID.astype(np.float32),
            "item_bias": np.zeros(ITEMS, np.float32),
            "popularity": np.ones(ITEMS, np.float32),
            "cooccurrence_indptr": np.zeros(ITEMS + 1, np.int64),
            "cooccurrence_indices": np.zeros(0, np.int32),
            "cooccurrence_weights": np.zeros(0, np.float32),
        },
        vocabulary=[f"item-{n}" for n in range(ITEMS)],
        encoder_bytes=build_sum_encoder(L, D),
        manifest_fields={
            "encoder": {"max_history": L, "dimension": D},
            "scoring": ScoringParameters(0.0).to_json(),
            "data": {
                "last_event_at": datetime.fromtimestamp(60 * trained_until_minute, UTC).isoformat(),
                "watermark": watermark,
            },
            "gate": {"verdict": "PASSED", "reasons": [], "checks": []},
        },
        attachments={},
        signing_key=key,
    )
    return registry.version_path("main", version)


@pytest.fixture
def measure(tmp_path: Path) -> Callable[..., dict]:
    key = Ed25519PrivateKey.generate()

    def run(events: EventColumns, trained_until_minute: int, **plan: object) -> dict:
        bundle: Bundle = load_bundle(next_item_version(tmp_path, key, trained_until_minute), key.public_key())
        return evaluate_version(
            bundle,
            events,
            Plan(resamples=100, **plan),
            seed=0,
            report=lambda *_, **__: None,  # type: ignore[arg-type]
        )

    return run


def test_a_version_is_asked_about_events_that_are_newer_than_it(measure) -> None:
    events = columns_of(walk(users=200, items=ITEMS, seed=1, longest=11))
    found = measure(events, trained_until_minute=5, exclude_seen=False)
    assert "Only events newer" in found["evaluation"]["protocol"]
    assert 20 <= found["evaluation"]["users"] < 200
    assert found["metrics"]["ndcg@10"]["low"] > found["baselines"]["popularity"]["ndcg@10"]["high"]
    assert found["metrics"]["recall@10"] == found["metrics"]["hr@10"]
    assert {"item_knn", "ease", "popularity", "popularity_decayed", "cooccurrence"} <= set(found["baselines"])
    for name in ("coverage@10", "novelty@10", "diversity@10", "popularity_bias@10", "ece@20", "mrr"):
        assert np.isfinite(found["metrics"][name]["value"]), name
    assert any("6 to 20 events" in part["name"] for part in found["slices"])


def test_where_it_may_have_seen_the_answers_that_is_said(measure) -> None:
    events = columns_of(walk(users=200, items=ITEMS, seed=1))
    found = measure(events, trained_until_minute=10_000)
    assert "CAUTION" in found["evaluation"]["protocol"]
    assert "flatter" in found["evaluation"]["protocol"]


def test_a_split_by_time_tests_nothing_before_its_moment_and_counts_nothing_after_it(measure) -> None:
    # Until minute 99 everybody takes the next item; from then on, the one after that.
    generator = np.random.default_rng(0)
    rows = []
    for user in range(300):
        item, begins = int(generator.integers(ITEMS)), int(generator.integers(90))
        for step in range(10):
            rows.append((user, item, begins + step))
            item = (item + 1) % ITEMS
    user_E, item_E, minute_E = np.array(rows).T
    events = EventColumns(
        user_E.astype(np.int64), item_E.astype(np.int32), np.full(len(rows), 3, np.int32),
        minute_E.astype(np.int64) * 60_000_000, np.zeros(len(rows), np.int64), [f"item-{n}" for n in range(ITEMS)],
    )  # fmt: skip
    found = measure(events, trained_until_minute=40, split="global_time", exclude_seen=False)
    assert found["evaluation"]["split"] == "global_time"
    assert found["evaluation"]["protocol"].startswith("Global time split")
    # Some begin after the moment, or end before it: they are not asked.
    assert 20 <= found["evaluation"]["users"] < 150


def test_a_search_begins_with_the_size_and_keeps_what_it_knows() -> None:
    size = resolve("tiny", {})
    search = Search(size, [], seed=0)
    first = search.ask()
    assert first == {
        "learning_rate": size.learning_rate,
        "dropout": size.dropout,
        "filter_share": size.filter_share,
        "dimension": size.dimension,
    }
    search.tell(Trial(1, first, 0.25, 1.0))
    assert search.best == 0.25
    second = search.ask()
    assert second != first
    resolve("tiny", second)
    other_size = {**first, "dimension": 1024}
    resumed = Search(size, [Trial(1, first, 0.25, 1.0), Trial(2, other_size, 0.9, 1.0)], seed=0)
    # What lies outside of the space teaches nothing here.
    assert resumed.best == 0.25
    assert resumed.ask() != first


def test_a_trial_that_is_worse_than_the_others_at_its_pass_is_given_up() -> None:
    search = Search(resolve("tiny", {}), [], seed=0)
    for number in range(1, 6):
        asked = search.ask()
        for quality in (0.3, 0.35, 0.4, 0.45):
            search.is_hopeless(quality)
        search.tell(Trial(number, asked, 0.45, 1.0))
    search.ask()
    assert [search.is_hopeless(q) for q in (0.01, 0.01, 0.01)][-1]


def test_any_version_is_measured_as_a_run_that_publishes_nothing(
    record, start_trainer, tmp_path: Path, keys_dir: Path
) -> None:
    record(walk(users=120, items=ITEMS, seed=1))
    # The log begins in 2026; the version knows nothing of it.
    path = next_item_version(tmp_path / "registry", read_signing_key(keys_dir), 0)
    _, stub = start_trainer()
    stub.PromoteModel(pb.PromoteModelRequest(version=path.name))

    assert (
        failure_of(lambda: stub.EvaluateModel(pb.EvaluateModelRequest(version="nothing"))).reason
        == "MODEL_VERSION_NOT_FOUND"
    )
    request = pb.EvaluateModelRequest(
        request_id="e", evaluation=Split(split=Split.SPLIT_GLOBAL_TIME, exclude_seen=False)
    )
    created = stub.EvaluateModel(request)
    assert stub.EvaluateModel(request).run_id == created.run_id
    *_, last = stub.WatchTrainingRun(pb.WatchTrainingRunRequest(run_id=created.run_id), timeout=60)
    run = last.training_run

    assert run.state == Run.STATE_SUCCEEDED, run.failure
    assert run.kind == Run.KIND_EVALUATION
    assert not run.version
    ladder = {rung.name: {m.name: m for m in rung.metrics} for rung in run.evaluation.ladder}
    assert ladder["blend"]["ndcg@10"].low > ladder["popularity"]["ndcg@10"].value
    assert "Global time split" in run.evaluation.protocol
    assert run.evaluation.slices
    assert Registry(tmp_path / "registry").list_versions("main") == [path.name]


def test_a_search_keeps_every_trial_and_goes_on_from_another(record, start_trainer) -> None:
    record(walk(users=120, items=ITEMS, seed=1))
    _, stub = start_trainer()
    config = Config(
        size=Config.SIZE_TINY, overrides=training_run_pb2.HyperParameters(max_epochs=2), max_train_seconds=5
    )
    first = stub.TuneModel(pb.TuneModelRequest(config=config, max_trials=2, max_seconds=100))
    *_, last = stub.WatchTrainingRun(pb.WatchTrainingRunRequest(run_id=first.run_id), timeout=120)
    run = last.training_run
    assert run.state == Run.STATE_SUCCEEDED, run.failure
    assert run.kind == Run.KIND_TUNING
    assert sorted(trial.trial_number for trial in run.trials) == [1, 2]
    assert run.trials[0].validation_ndcg_at_10 >= run.trials[1].validation_ndcg_at_10 > 0
    by_number = {trial.trial_number: trial for trial in run.trials}
    assert by_number[1].hyper_parameters.dimension == 16

    more = stub.TuneModel(
        pb.TuneModelRequest(config=config, max_trials=1, max_seconds=100, resume_run_id=first.run_id)
    )
    *_, last = stub.WatchTrainingRun(pb.WatchTrainingRunRequest(run_id=more.run_id), timeout=120)
    resumed = {trial.trial_number: trial for trial in last.training_run.trials}
    assert sorted(resumed) == [1, 2, 3]
    assert resumed[1] == by_number[1]
    trained = stub.CreateTrainingRun(pb.CreateTrainingRunRequest(config=config))
    stub.CancelTrainingRun(pb.CancelTrainingRunRequest(run_id=trained.run_id))
    refused = failure_of(lambda: stub.TuneModel(pb.TuneModelRequest(resume_run_id=trained.run_id)))
    assert refused.reason == "INVALID_REQUEST"
    assert "must be a tuning run" in refused.message
