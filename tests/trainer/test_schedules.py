"""Runs that start by themselves: by the clock and on drift."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import psycopg
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from shopkeeper.trainer.v1 import schedule_pb2, training_run_pb2
from shopkeeper.trainer.v1 import trainer_service_pb2 as pb

from services.trainer.clock import next_run_at
from services.trainer.domain.drift import bins_of_items, drift_of_items, population_stability_index
from services.trainer.drift import DriftMeter
from shared.database import Database
from shared.keys import read_signing_key
from tests.trainer.conftest import eventually, walk
from tests.trainer.test_evaluations_and_tunings import next_item_version
from tests.trainer.test_run_lifecycle import failure_of

NIGHT = "30 2 * * *"


def moment(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


@pytest.mark.parametrize(
    ("cron", "after", "then"),
    [
        (NIGHT, "2026-03-01 02:29", "2026-03-01 02:30"),
        (NIGHT, "2026-03-01 02:30", "2026-03-02 02:30"),
        ("*/15 * * * *", "2026-12-31 23:50", "2027-01-01 00:00"),
        ("0 4 * * SUN", "2026-11-24 12:00", "2026-11-29 04:00"),
        # A leap day comes again.
        ("0 0 29 2 *", "2026-01-01 00:00", "2028-02-29 00:00"),
    ],
)
def test_the_clock_says_when(cron: str, after: str, then: str) -> None:
    assert next_run_at(cron, moment(after)) == moment(then)


@pytest.mark.parametrize("cron", ["", "* * * *", "* * * * * *", "61 * * * *", "0 0 30 2 *", "@daily", "x"])
def test_what_is_no_cron_expression_is_refused(cron: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        next_run_at(cron, moment("2026-01-01 00:00"))


def schedule(schedule_id: str, **fields: object) -> pb.CreateScheduleRequest:
    return pb.CreateScheduleRequest(
        schedule_id=schedule_id,
        schedule=schedule_pb2.Schedule(**fields),  # type: ignore[arg-type]
    )


def test_schedules_are_created_listed_and_deleted(record, start_trainer) -> None:
    _, stub = start_trainer()
    created = stub.CreateSchedule(schedule("nightly", cron=NIGHT))
    assert created.model == "main"
    assert created.config.size == training_run_pb2.TrainingConfig.SIZE_SMALL
    at = created.next_run_time.ToDatetime(UTC)
    assert (at.hour, at.minute) == (2, 30)
    assert timedelta(0) < at - datetime.now(UTC) <= timedelta(days=1)
    paused = stub.CreateSchedule(schedule("a-paused-one", cron="* * * * *", paused=True))
    assert not paused.HasField("next_run_time")
    drift = stub.CreateSchedule(schedule("on-drift", model="other", drift=schedule_pb2.DriftTrigger()))
    assert drift.drift.max_population_stability_index == pytest.approx(0.2)
    assert drift.drift.min_new_events == 1000
    assert drift.drift.min_interval_seconds == 3600

    first = stub.ListSchedules(pb.ListSchedulesRequest(page_size=2))
    rest = stub.ListSchedules(pb.ListSchedulesRequest(page_size=2, page_token=first.next_page_token))
    listed = [s.schedule_id for s in [*first.schedules, *rest.schedules]]
    assert listed == ["a-paused-one", "nightly", "on-drift"]
    assert first.schedules[1] == created

    assert (
        failure_of(lambda: stub.CreateSchedule(schedule("nightly", cron=NIGHT))).reason == "SCHEDULE_EXISTS"
    )
    for wrong in (
        schedule("Nightly", cron=NIGHT),
        schedule("x", cron="every night"),
        schedule("x"),
        schedule("x", drift=schedule_pb2.DriftTrigger(max_population_stability_index=-1)),
    ):
        assert failure_of(lambda wrong=wrong: stub.CreateSchedule(wrong)).reason == "INVALID_REQUEST"
    stub.DeleteSchedule(pb.DeleteScheduleRequest(schedule_id="nightly"))
    gone = failure_of(lambda: stub.DeleteSchedule(pb.DeleteScheduleRequest(schedule_id="nightly")))
    assert gone.reason == "SCHEDULE_NOT_FOUND"


def test_a_moment_starts_one_run_whatever_the_number_of_trainers_and_missed_ones_are_made_up_for_once(
    record, start_trainer
) -> None:
    trainer, stub = start_trainer()
    other, _ = start_trainer()
    for each in (trainer, other):
        each.supervisor.stop()
        each.scheduler.stop()
    stub.CreateSchedule(schedule("often", cron="*/5 * * * *"))
    # No trainer ran for an hour.
    with trainer.database.connect() as connection:
        connection.execute("UPDATE schedules SET next_run_at = next_run_at - interval '1 hour'")
    trainer.scheduler.tick()
    other.scheduler.tick()
    runs = stub.ListTrainingRuns(pb.ListTrainingRunsRequest()).training_runs
    assert [run.schedule_id for run in runs] == ["often"]
    (kept,) = stub.ListSchedules(pb.ListSchedulesRequest()).schedules
    assert kept.last_run_id == runs[0].run_id
    now = Timestamp()
    now.GetCurrentTime()
    assert kept.next_run_time.seconds > now.seconds

    # Killed between the run's creation and the note of it: the same moment is the same run.
    with trainer.database.connect() as connection:
        request_id = connection.execute("SELECT request_id FROM training_runs").fetchone()[0]  # type: ignore[index]
        connection.execute(
            "UPDATE schedules SET next_run_at = %s", (datetime.fromisoformat(request_id.split(" ", 2)[2]),)
        )
    other.scheduler.tick()
    assert len(stub.ListTrainingRuns(pb.ListTrainingRunsRequest()).training_runs) == 1


def test_the_servers_own_thread_starts_what_is_due(record, start_trainer) -> None:
    trainer, stub = start_trainer()
    stub.CreateSchedule(schedule("nightly", cron=NIGHT))
    with trainer.database.connect() as connection:
        connection.execute("UPDATE schedules SET next_run_at = clock_timestamp()")
    eventually(lambda: len(stub.ListTrainingRuns(pb.ListTrainingRunsRequest()).training_runs) == 1, 20)


def test_the_stability_index_is_that_of_the_formula() -> None:
    expected, actual = np.array([60, 30, 10]), np.array([20, 30, 50])
    e = [(x + 0.5) / 101.5 for x in (60, 30, 10)]
    a = [(x + 0.5) / 101.5 for x in (20, 30, 50)]
    by_hand = sum((y - x) * math.log(y / x) for x, y in zip(e, a, strict=True))
    assert population_stability_index(expected, actual) == pytest.approx(by_hand)
    assert population_stability_index(expected, 7 * expected) < 1e-3


def test_noise_is_no_drift_and_a_new_fashion_or_many_new_items_are() -> None:
    generator = np.random.default_rng(0)
    share = 1 / np.arange(1, 2001)
    old = generator.multinomial(50_000, share / share.sum())
    same = generator.multinomial(1_000, share / share.sum())
    assert drift_of_items(old, same) < 0.2
    assert drift_of_items(old, generator.multinomial(1_000, np.roll(share, 7) / share.sum())) > 0.2
    with_new = np.append(same, 300)
    assert drift_of_items(np.append(old, 0), with_new) > 0.2
    assert len(np.unique(bins_of_items(np.append(old, 0)))) == 61


def test_a_log_that_has_moved_away_starts_a_run_and_one_that_has_not_does_not(
    record, start_trainer, database_url: str, tmp_path: Path, keys_dir: Path
) -> None:
    record(walk(users=200, items=12))
    with psycopg.connect(database_url) as connection:
        row = connection.execute("SELECT pg_current_snapshot()::text").fetchone()
    assert row is not None
    path = next_item_version(
        tmp_path / "registry", read_signing_key(keys_dir), 0, watermark=row[0].encode().hex()
    )
    trainer, stub = start_trainer(drift_check_seconds=1e-6)
    trainer.supervisor.stop()
    trainer.scheduler.stop()
    stub.PromoteModel(pb.PromoteModelRequest(version=path.name))
    stub.CreateSchedule(schedule("drift", drift=schedule_pb2.DriftTrigger(min_new_events=500)))

    def runs() -> list[training_run_pb2.TrainingRun]:
        # Stopped above: the test turns its wheel.
        trainer.scheduler._stopping.clear()
        trainer.scheduler.tick()
        return list(stub.ListTrainingRuns(pb.ListTrainingRunsRequest()).training_runs)

    assert runs() == []
    record(walk(users=100, items=12, seed=2), first_user=1000)
    # Enough that is new, and all of it alike.
    assert runs() == []
    record([[0, 1] * 5] * 150, first_user=2000)
    (run,) = runs()
    assert run.schedule_id == "drift"
    told = {
        (sample.labels["model"], sample.labels["of"]): sample.value
        for family in trainer.metrics.collect()
        for sample in family.samples
        if sample.name == "shopkeeper_trainer_drift"
    }
    assert told.keys() == {("main", "items"), ("main", "kinds")}
    assert told["main", "items"] > 0.2 > told["main", "kinds"]
    # Not again within the schedule's interval.
    assert len(runs()) == 1


@pytest.mark.parametrize(
    ("late", "drifted"), [("0.02 + 0.08 * random()", False), ("0.3 + 0.5 * random()", True)]
)
def test_scores_that_a_version_no_longer_gives_as_it_used_to_are_drift(
    record, database_url: str, late: str, drifted: bool
) -> None:
    database = Database(database_url, schema="trainer")
    with psycopg.connect(database_url) as connection:
        for moment, score in (("2026-01-01", "0.02 + 0.08 * random()"), ("2026-01-09", late)):
            for version, shown in (("v1", score), ("another", "0.9")):
                connection.execute(
                    "INSERT INTO feedback.events (event_key, payload_digest, occurred_at, kind, device, channel, consent, "
                    "user_key, recommendation_id, model_version, impression_items, impression_positions, impression_propensities) "
                    f"SELECT gen_random_uuid(), 0, %s, 2, 0, 0, 0, %s, %s, %s, ARRAY['item-1'], ARRAY[1], ARRAY[({shown})::real] "
                    "FROM generate_series(1, 900)",
                    (moment, b"k" * 16, b"r" * 8, version),
                )
    with database.connect() as connection:
        scores = DriftMeter._scores(connection, "v1")
    database.close()
    assert scores.sum(axis=0).tolist() == [900, 900]
    assert (population_stability_index(scores[:, 0], scores[:, 1]) > 0.2) == drifted
