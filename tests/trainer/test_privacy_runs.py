"""Private runs over gRPC, on a real PostgreSQL, with a catalogue on a socket."""

from __future__ import annotations

import json
import re
from pathlib import Path

import grpc
import numpy as np
import pytest
from shopkeeper.trainer.v1 import model_pb2, training_run_pb2
from shopkeeper.trainer.v1 import trainer_service_pb2 as pb

from services.trainer.pipeline.event_log import DIRECTORY
from services.trainer.settings import directory_of
from shared.bundle import Registry, cooccurrence_scores, load_bundle
from shared.grpc_status import from_rpc_error
from shared.keys import read_verifying_key
from tests.trainer.conftest import CATALOGUE_ITEMS as ITEMS
from tests.trainer.conftest import walk

State = training_run_pb2.TrainingRun.State
Guarantee = model_pb2.PrivacyGuarantee


def request_of(epsilon: float, name: str = "", **private: object) -> pb.CreateTrainingRunRequest:
    return pb.CreateTrainingRunRequest(
        request_id=name,
        config=training_run_pb2.TrainingConfig(
            size=training_run_pb2.TrainingConfig.SIZE_TINY,
            differential_privacy=training_run_pb2.DifferentialPrivacy(epsilon=epsilon, **private),  # type: ignore[arg-type]
        ),
    )


def ended(stub, run_id: str) -> tuple[training_run_pb2.TrainingRun, list[str]]:  # type: ignore[no-untyped-def]
    seen = list(stub.WatchTrainingRun(pb.WatchTrainingRunRequest(run_id=run_id), timeout=150))
    entries = [entry for message in seen for entry in message.progress]
    # Of a private run: how much memory it takes tells how many people there are.
    assert not any(entry.peak_resident_bytes for entry in entries)
    return seen[-1].training_run, [entry.message for entry in entries]


def numbers_1500(text: str) -> list[str]:
    """Returns where a text says 1500 as a number of its own; digits inside of another number or a digest say nothing."""
    return re.findall(r".{0,40}(?<![\w.])1[,_ ]?500(?:\.0*)?(?![\w]|[.,]\d).{0,20}", text)


def test_a_number_is_found_however_it_is_written_and_not_inside_of_another() -> None:
    for told in (
        "1500",
        '{"people": 1500}',
        "[1500, 2]",
        "of 1,500 people.",
        "1500.0",
        "people=1500\n",
        "(1 500)",
    ):
        assert numbers_1500(told), told
    for other in (
        "0.21500638",
        "0.1500",
        "15000",
        "21500",
        "1500.25",
        "1,500,000",
        "1,500.5",
        "a91500fe",
        "1500e3",
    ):
        assert numbers_1500(other) == [], other


def test_a_private_run_publishes_noisy_numbers_alone_and_is_charged_once(
    record, start_trainer, catalogue_address: str, tmp_path: Path, keys_dir: Path
) -> None:
    record(walk(users=1500, items=ITEMS))
    _trainer, stub = start_trainer(profile_address=catalogue_address)
    run, journal = ended(stub, stub.CreateTrainingRun(request_of(4.0)).run_id)
    assert run.state == State.STATE_SUCCEEDED, run.failure
    assert run.gate.verdict == model_pb2.Gate.VERDICT_PASSED, run.gate
    version = stub.GetModelVersion(pb.GetModelVersionRequest(version="production"))
    assert version.privacy.mechanism == Guarantee.MECHANISM_COUNTS
    assert version.privacy.unit == Guarantee.UNIT_PERSON
    assert version.privacy.adjacency == Guarantee.ADJACENCY_ADD_OR_REMOVE_ONE
    assert 3.9 < version.privacy.epsilon <= 4.0
    assert version.privacy.delta == 1e-6
    assert version.privacy.noise_multiplier > 1
    assert "one person" in version.card
    # Neither the exact number of people nor of events, nor when they did what.
    directory = Registry(tmp_path / "registry").version_path("main", run.version)
    manifest = json.loads((directory / "manifest.json").read_text())
    # It has no second stage, and says why.
    assert manifest["ranker"]["served"] is False
    assert "budget" in manifest["ranker"]["why_not"]
    assert f"**None: {manifest['ranker']['why_not']}.**" in version.card
    # Made from a sum with noise, so by chance it is any number of that size.
    manifest["data"].pop("users")
    told = json.dumps(manifest) + "\n" + (directory / "card.md").read_text() + "\n" + "\n".join(journal)
    assert numbers_1500(told) == []
    assert manifest["data"]["events"] == 0
    assert manifest["data"]["watermark"] == ""
    assert manifest["data"]["first_event_at"] == manifest["data"]["last_event_at"]
    assert set(manifest["files"]) == {
        "card.md", "encoder.tflite", "vocabulary.safetensors", "weights.safetensors",
    }  # fmt: skip
    # Curves are exact.
    assert not (directory_of(tmp_path, run.run_id) / DIRECTORY).exists()
    bundle = load_bundle(directory, read_verifying_key(keys_dir))
    # Also the item that nobody touched: the items are the catalogue's.
    assert bundle.item_count == ITEMS + 1
    assert bundle.last_seen is None
    one, two = bundle.index_of("item-7"), bundle.index_of("item-8")
    assert int(cooccurrence_scores(bundle.cooccurrence, np.array([one]), bundle.scoring).argmax()) == two
    budget = stub.GetPrivacyBudget(pb.GetPrivacyBudgetRequest())
    assert [(charge.run_id, charge.epsilon, charge.attempt) for charge in budget.charges] == [
        (run.run_id, 4.0, 1)
    ]
    assert 0 < budget.epsilon_spent <= 4.0


def test_a_run_beyond_the_budget_is_refused_before_its_first_step(
    record, start_trainer, catalogue_address: str, tmp_path: Path
) -> None:
    record(walk(users=60, items=ITEMS))
    _trainer, stub = start_trainer(profile_address=catalogue_address, privacy_epsilon_limit=1.2)
    first, _journal = ended(stub, stub.CreateTrainingRun(request_of(1.0, "first")).run_id)
    assert first.state == State.STATE_SUCCEEDED
    second, journal = ended(stub, stub.CreateTrainingRun(request_of(1.0, "second")).run_id)
    assert second.state == State.STATE_FAILED
    assert second.failure.reason == "PRIVACY_BUDGET_EXHAUSTED"
    assert not any("charged" in message for message in journal)
    assert [charge.run_id for charge in stub.GetPrivacyBudget(pb.GetPrivacyBudgetRequest()).charges] == [
        first.run_id
    ]


def test_a_run_without_a_catalogue_is_refused_and_not_charged(record, start_trainer) -> None:
    record(walk(users=60, items=ITEMS))
    _trainer, stub = start_trainer()
    run, _journal = ended(stub, stub.CreateTrainingRun(request_of(1.0)).run_id)
    assert run.failure.reason == "CATALOGUE_NEEDED"
    assert not stub.GetPrivacyBudget(pb.GetPrivacyBudgetRequest()).charges


def test_promises_out_of_range_are_refused_with_their_field_and_a_shop_may_require_one(
    start_trainer, migrate_services
) -> None:
    migrate_services("feedback", "trainer")
    _trainer, stub = start_trainer(privacy_required=True)

    def refused(request: pb.CreateTrainingRunRequest) -> str:
        with pytest.raises(grpc.RpcError) as caught:
            stub.CreateTrainingRun(request)
        return from_rpc_error(caught.value).message

    assert "config.differential_privacy is required" in refused(pb.CreateTrainingRunRequest())
    for wrong, field in [
        ({"epsilon": 0.0}, "epsilon"),
        ({"epsilon": float("nan")}, "epsilon"),
        ({"epsilon": 1.0, "delta": 0.5}, "delta"),
        ({"epsilon": 1.0, "clip_norm": -1.0}, "clip_norm"),
        ({"epsilon": 1.0, "unit": 7}, "unit"),
        ({"epsilon": 1.0, "mechanism": 9}, "mechanism"),
    ]:
        assert f"config.differential_privacy.{field}" in refused(request_of(**wrong)), wrong  # type: ignore[arg-type]
    with pytest.raises(grpc.RpcError) as exact:
        stub.EvaluateModel(pb.EvaluateModelRequest())
    assert "measures without noise" in from_rpc_error(exact.value).message
    rare = request_of(1.0)
    rare.config.window.min_item_events = 5
    assert "config.window.min_item_events" in refused(rare)
    with pytest.raises(grpc.RpcError) as tuned:
        stub.TuneModel(pb.TuneModelRequest(config=request_of(1.0).config))
    assert "config.differential_privacy" in from_rpc_error(tuned.value).message
