"""A run that is killed goes on from its last whole pass, or begins anew; nothing of it is visible before its end."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from shopkeeper.trainer.v1 import trainer_service_pb2 as pb
from shopkeeper.trainer.v1 import training_run_pb2

from services.trainer.domain.hyper_parameters import resolve
from services.trainer.pipeline.budget import Budget
from services.trainer.pipeline.checkpoint import CHECKPOINT, Checkpoints, TrainingState, fingerprint_of
from services.trainer.pipeline.dataset import Cleaning, clean, encode_attributes
from services.trainer.settings import directory_of
from shared.bundle import Registry
from tests.trainer.conftest import columns_of, eventually, walk

State = training_run_pb2.TrainingRun.State
Stage = training_run_pb2.TrainingRun.Stage
# `make verify-runs` kills many times.
KILLS = int(os.environ.get("SHOPKEEPER_RUN_KILLS", "1"))


def state() -> TrainingState:
    return TrainingState(
        [np.arange(6, dtype=np.float32).reshape(2, 3), np.array(7, np.int32)],
        [np.ones((2, 3), np.float32)],
        {"epoch": 3, "best": float("nan")},
    )


@pytest.fixture
def checkpoints(tmp_path: Path) -> tuple[Checkpoints, list[str]]:
    said: list[str] = []
    made = Checkpoints(tmp_path, said.append)
    made.belong_to("these events")
    return made, said


def test_what_was_noted_is_what_is_gone_on_from(checkpoints) -> None:
    made, said = checkpoints
    assert made.load() is None
    assert made.save(state())
    found = made.load()
    assert found is not None
    for ours, theirs in zip(found.weights, state().weights, strict=True):
        np.testing.assert_array_equal(ours, theirs)
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    np.testing.assert_array_equal(found.best_weights[0], np.ones((2, 3)))
    assert found.progress["epoch"] == 3
    assert said == []


def test_no_byte_of_a_checkpoint_can_change_unnoticed(checkpoints, tmp_path: Path) -> None:
    made, said = checkpoints
    made.save(state())
    path = tmp_path / CHECKPOINT
    content = path.read_bytes()
    for place in range(0, len(content), 7):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert made.load() is None, place
    for length in (0, 10, 32, len(content) - 1):
        path.write_bytes(content[:length])
        assert made.load() is None
    assert all("refused" in words for words in said)


def test_a_checkpoint_of_other_events_is_refused(checkpoints) -> None:
    made, said = checkpoints
    made.save(state())
    made.belong_to("somebody was forgotten since")
    assert made.load() is None
    assert "events, the size or the code are others" in said[0]


def test_a_fingerprint_is_of_everything_that_the_outcome_depends_on() -> None:
    histories = clean(columns_of(walk(users=30, items=9)), Cleaning())
    fewer = clean(columns_of(walk(users=30, items=9)[1:]), Cleaning())
    none = encode_attributes(histories.item_ids, {})
    some = encode_attributes(histories.item_ids, {f"item-{n}": ["a"] for n in range(9)})
    tiny = resolve("tiny", {}).to_json()
    prints = [
        fingerprint_of(histories, none, tiny, 0, "v1"),
        fingerprint_of(fewer, none, tiny, 0, "v1"),
        fingerprint_of(histories, some, tiny, 0, "v1"),
        fingerprint_of(histories, none, {**tiny, "dropout": 0.1}, 0, "v1"),
        fingerprint_of(histories, none, tiny, 1, "v1"),
        fingerprint_of(histories, none, tiny, 0, "v2"),
    ]
    assert len(set(prints)) == len(prints)
    assert prints[0] == fingerprint_of(histories, none, tiny, 0, "v1")


def test_writing_takes_a_small_share_of_the_time_and_a_full_disk_costs_no_run(tmp_path: Path) -> None:
    made = Checkpoints(tmp_path)
    now = [0.0]

    def slow_clock() -> float:
        now[0] += 1.0
        return now[0]

    assert made.save(state(), now=slow_clock)
    # It took a second: not again within twenty.
    assert not made.save(state(), now=slow_clock)
    now[0] += 20.0
    assert made.save(state(), now=slow_clock)
    (tmp_path / "file").write_text("")
    said: list[str] = []
    assert not Checkpoints(tmp_path / "file", said.append).save(state())
    assert "training goes on without" in said[0]


def test_a_training_that_goes_on_ends_with_the_same_weights_as_one_that_was_never_cut(tmp_path: Path) -> None:
    from services.trainer.pipeline.sequence_model import SequenceModel
    from services.trainer.pipeline.training import train

    histories = clean(columns_of(walk(users=120, items=30)), Cleaning())
    attributes = encode_attributes(histories.item_ids, {f"item-{n}": [f"half:{n // 15}"] for n in range(30)})
    size = resolve("tiny", {"max_epochs": 6, "negatives": 8})
    quality = iter(np.linspace(0.1, 0.9, 100))

    def run(directory: Path | None, stop_after_steps: int | None = None):  # type: ignore[no-untyped-def]
        model = SequenceModel(histories.item_count, attributes, size, seed=3)
        made = None
        if directory is not None:
            made = Checkpoints(directory)
            made.belong_to("x")
        steps = 0

        def on_step(_done: int, _all: int) -> None:
            nonlocal steps
            steps += 1

        # Time stands still: nothing depends on how fast this machine is.
        budget = Budget(1e6, 0, clock=lambda: 0.0)
        budget.resume()
        found = train(
            model, histories, lambda: next(quality), lambda _: None, budget,
            lambda: stop_after_steps is not None and steps >= stop_after_steps, on_step, made,
        )  # fmt: skip
        return model, found, steps

    whole, (best, reports), steps = run(None)
    _, (_, partial), cut_steps = run(tmp_path, stop_after_steps=steps // 2)
    assert cut_steps < steps
    assert len(partial) < len(reports)
    again, (best_again, reports_again), more_steps = run(tmp_path)
    # Which of the passes before the cut was noted last depends on how long the disk takes.
    assert 0 < steps - more_steps <= cut_steps
    assert best_again == best
    assert [(r.epoch, r.step, r.loss) for r in reports_again] == [(r.epoch, r.step, r.loss) for r in reports]
    for ours, theirs in zip(again.state(), whole.state(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_killed_run_goes_on_and_nothing_is_visible_before_its_end(
    record, start_trainer, tmp_path: Path
) -> None:
    record(walk(users=300, items=60))
    trainer, stub = start_trainer(max_run_attempts=KILLS + 2)
    config = training_run_pb2.TrainingConfig(
        size=training_run_pb2.TrainingConfig.SIZE_TINY, max_train_seconds=60, refit=False
    )
    generator = np.random.default_rng(0)
    registry = Registry(tmp_path / "registry")
    went_on, kills_of = 0, {}

    def run_and_kill(kills: int) -> None:
        """Starts a run, kills it up to so often, and sees it end; a fast machine may end it before."""
        nonlocal went_on
        published = len(registry.versions())
        run = stub.CreateTrainingRun(pb.CreateTrainingRunRequest(config=config))
        get = pb.GetTrainingRunRequest(run_id=run.run_id)
        checkpoint = directory_of(tmp_path, run.run_id) / CHECKPOINT
        kills_of[run.run_id] = 0
        for kill in range(kills):

            def wanted(kill: int = kill) -> bool:
                # Of each run the first kill comes after a pass was noted: it must go on from there.
                begun = run.run_id in trainer.supervisor.processes() and (kill > 0 or checkpoint.exists())
                return begun or stub.GetTrainingRun(get).version != ""

            eventually(wanted)
            time.sleep(0.1 if kill == 0 else float(generator.uniform(0, 15)))
            process = trainer.supervisor.processes().get(run.run_id)
            if process is None or stub.GetTrainingRun(get).state != State.STATE_RUNNING:
                break
            os.kill(process, signal.SIGKILL)
            kills_of[run.run_id] += 1
            eventually(lambda process=process: trainer.supervisor.processes().get(run.run_id) != process)
            ended = stub.GetTrainingRun(get)
            # Killed after its version had appeared, it is adopted; else nothing is there.
            assert len(registry.versions()) - published == (ended.state == State.STATE_SUCCEEDED)
        messages = list(stub.WatchTrainingRun(pb.WatchTrainingRunRequest(run_id=run.run_id), timeout=200))
        ended = messages[-1].training_run
        assert ended.state == State.STATE_SUCCEEDED, ended.failure
        journal = [entry.message for message in messages for entry in message.progress]
        went_on += sum("killed by SIGKILL; the run goes on from its checkpoint" in words for words in journal)
        assert not any("refused" in words for words in journal)
        assert len(registry.versions()) == published + 1
        eventually(lambda: not checkpoint.exists(), 10)

    while sum(kills_of.values()) < KILLS:
        # As many runs as it takes, and no more: one that is never hit ends this.
        assert len(kills_of) < 2 * KILLS + 2
        run_and_kill(KILLS - sum(kills_of.values()))
    assert went_on >= 1
    print(f"{KILLS} kills, runs: {len(kills_of)}; {went_on} times one went on from its checkpoint.")
