"""Experiments: created, reported, stopped."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from services.feedback.domain.experiments import (
    GUARD_CONFIDENCE_LEVEL,
    Experiment,
    Judgement,
    Observation,
    State,
    StopCause,
    judge,
)
from services.feedback.domain.metrics import Dimension, Measurement, MetricsQuery
from services.feedback.ports import Clock, ExperimentStore, MetricsStore


@dataclass(frozen=True, slots=True)
class ExperimentReport:
    """What an experiment has shown until a moment."""

    experiment: Experiment
    observation: Observation
    judgement: Judgement
    measured: Measurement
    confidence_level: float
    reported_at: datetime


class RunExperiments:
    """Creates, reports and stops experiments."""

    def __init__(self, store: ExperimentStore, metrics: MetricsStore, clock: Clock) -> None:
        self._store = store
        self._metrics = metrics
        self._clock = clock

    def create(self, experiment: Experiment) -> Experiment:
        """Starts an experiment; raises as `ExperimentStore.create` does."""
        return self._store.create(experiment)

    def get(self, experiment_id: str) -> Experiment:
        """Returns an experiment; raises NotFound."""
        return self._store.get(experiment_id)

    def page(
        self, placement: str, state: State | None, after: tuple[datetime, str] | None, size: int
    ) -> tuple[list[Experiment], bool]:
        """Returns a page of experiments, newest first, and whether there are more."""
        found = self._store.list_newest(placement, state, after, size + 1)
        return found[:size], len(found) > size

    def stop(self, experiment_id: str, expected_version: int | None) -> Experiment:
        """Stops an experiment because somebody asked for it; raises as `ExperimentStore.stop` does."""
        return self._store.stop(experiment_id, expected_version, StopCause.REQUESTED, self._clock.now())

    def report(self, experiment_id: str, confidence_level: float) -> ExperimentReport:
        """Returns what an experiment has shown; raises NotFound."""
        experiment, now = self._store.get(experiment_id), self._clock.now()
        observation = self._store.observe(experiment, now)
        measured = self._metrics.measure(
            MetricsQuery(
                experiment.created_at,
                experiment.stopped_at or now,
                [Dimension.VARIANT],
                confidence_level=confidence_level,
                variants=experiment.labels,
                observed_until=now,
            )
        )
        judgement = judge(experiment, observation, confidence_level)
        return ExperimentReport(experiment, observation, judgement, measured, confidence_level, now)

    def stop_broken(self) -> list[Experiment]:
        """Stops every running experiment whose guard rail or split is broken; returns those it stopped."""
        stopped = []
        for experiment in self._store.list_running():
            if experiment.report_only:
                continue
            now = self._clock.now()
            observation = self._store.observe(experiment, now)
            cause = judge(experiment, observation, GUARD_CONFIDENCE_LEVEL).cause_to_stop
            if cause is not None:
                stopped.append(self._store.stop(experiment.experiment_id, None, cause, now))
        return stopped
