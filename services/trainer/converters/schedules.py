"""Schedules and what a tuning is asked."""

from __future__ import annotations

import math

from shopkeeper.trainer.v1 import schedule_pb2, trainer_service_pb2

from services.trainer.converters.checks import Violations, run_id
from services.trainer.converters.config import config_from_proto, config_to_proto
from services.trainer.converters.times import timestamp
from services.trainer.domain.runs import DEFAULT_MODEL, RunKind, Task, check_name
from services.trainer.domain.schedules import DriftTrigger, Schedule

_CRON_LENGTH = 256


def schedule_from_proto(request: trainer_service_pb2.CreateScheduleRequest) -> Schedule:
    """Returns the schedule that a request asks for. Raises InvalidInput."""
    message = request.schedule
    schedule_id = check_name(request.schedule_id, "schedule_id", "")
    violations = Violations()
    violations.check(
        len(message.cron) <= _CRON_LENGTH, "schedule.cron", f"must have at most {_CRON_LENGTH} characters."
    )
    drift = None
    if message.HasField("drift"):
        limit = message.drift.max_population_stability_index
        violations.check(
            limit >= 0 and math.isfinite(limit),
            "schedule.drift.max_population_stability_index",
            "must be above 0, or 0 for 0.2.",
        )
        violations.check(
            message.drift.min_new_events >= 0,
            "schedule.drift.min_new_events",
            "must be at least 1, or 0 for 1,000.",
        )
        violations.check(
            0 <= message.drift.min_interval_seconds <= 31_536_000,
            "schedule.drift.min_interval_seconds",
            "must be at most a year, or 0 for an hour.",
        )
        drift = DriftTrigger(
            limit or 0.2,
            message.drift.min_new_events or 1_000,
            message.drift.min_interval_seconds or 3_600,
        )
    violations.check(
        not message.config.HasField("data_snapshot"),
        "schedule.config.data_snapshot",
        "must be absent: every run would train on the same events.",
    )
    violations.raise_any()
    return Schedule(
        schedule_id=schedule_id,
        model=check_name(message.model, "schedule.model", DEFAULT_MODEL),
        config=config_from_proto(message.config),
        cron=message.cron.strip(),
        drift=drift,
        paused=message.paused,
    )


def schedule_to_proto(schedule: Schedule) -> schedule_pb2.Schedule:
    """Returns a schedule as the contract shows it."""
    message = schedule_pb2.Schedule(
        schedule_id=schedule.schedule_id,
        model=schedule.model,
        config=config_to_proto(schedule.config),
        cron=schedule.cron,
        paused=schedule.paused,
        last_run_id=schedule.last_run_id,
    )
    if schedule.drift:
        message.drift.CopyFrom(
            schedule_pb2.DriftTrigger(
                max_population_stability_index=schedule.drift.max_population_stability_index,
                min_new_events=schedule.drift.min_new_events,
                min_interval_seconds=schedule.drift.min_interval_seconds,
            )
        )
    if schedule.next_run_at:
        message.next_run_time.CopyFrom(timestamp(schedule.next_run_at))
    return message


def tuning_from_proto(request: trainer_service_pb2.TuneModelRequest) -> Task:
    """Returns the budget of a tuning. Raises InvalidInput."""
    violations = Violations()
    violations.check(0 <= request.max_trials <= 1000, "max_trials", "must be in [1, 1000], or 0 for 20.")
    violations.check(
        0 <= request.max_seconds <= 604_800, "max_seconds", "must be in [1, 604800], or 0 for 3600."
    )
    violations.check(
        not request.config.HasField("differential_privacy"),
        "config.differential_privacy",
        "cannot be tuned: each trial would tell of people. Tune on the simulation, then train once.",
    )
    violations.raise_any()
    return Task(
        RunKind.TUNING,
        max_trials=request.max_trials or 20,
        max_seconds=request.max_seconds or 3600,
        resume_run_id=run_id(request.resume_run_id) if request.resume_run_id else "",
    )
