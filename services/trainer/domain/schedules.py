"""Schedules: when runs start by themselves. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from services.trainer.domain.runs import TrainingConfig


@dataclass(frozen=True, slots=True)
class DriftTrigger:
    """Starts a run when the log has moved away from what the model in service was trained on.

    Attributes:
        max_population_stability_index: of items, kinds of events or scores, above which to train.
        min_new_events: fewer say nothing yet.
        min_interval_seconds: the shortest time between two runs.
    """

    max_population_stability_index: float = 0.2
    min_new_events: int = 1_000
    min_interval_seconds: int = 3_600


@dataclass(frozen=True, slots=True)
class Schedule:
    """A schedule as it is stored.

    Attributes:
        cron: five fields in UTC; empty: not by the clock.
        drift: None: not on drift.
        next_run_at: None when paused or only on drift.
        last_run_id: empty before the first.
        checked_at: when drift was last measured.
        last_run_at: when it last started a run.
    """

    schedule_id: str
    model: str
    config: TrainingConfig
    cron: str = ""
    drift: DriftTrigger | None = None
    paused: bool = False
    next_run_at: datetime | None = None
    last_run_id: str = ""
    checked_at: datetime | None = None
    last_run_at: datetime | None = None
