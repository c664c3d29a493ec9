"""What the use cases need of the world."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Protocol

from services.trainer.domain.privacy import PrivacyBudget
from services.trainer.domain.runs import (
    Alias,
    Model,
    ModelVersion,
    Progress,
    RunCount,
    RunState,
    Task,
    TrainingConfig,
    TrainingRun,
)
from services.trainer.domain.schedules import Schedule


class RunStore(Protocol):
    """Runs and their journals, durable."""

    def create(
        self,
        model: str,
        config: TrainingConfig,
        task: Task,
        *,
        request_id: str,
        max_queued: int,
        schedule_id: str = "",
    ) -> TrainingRun:
        """Adds a queued run, or returns the one that this request made before.

        Raises:
            AlreadyExists: REQUEST_ID_REUSED: the request id belongs to another request.
            ResourceExhausted: TOO_MANY_RUNS: `max_queued` runs wait already.
        """

    def get(self, run_id: str) -> TrainingRun | None:
        """Returns a run, or None."""

    def list(
        self,
        *,
        model: str,
        states: Sequence[RunState],
        limit: int,
        before: tuple[datetime, str] | None,
    ) -> Sequence[TrainingRun]:
        """Returns runs, newest first, after the one at `before` (its creation and id)."""

    def request_cancel(self, run_id: str, comment: str) -> TrainingRun | None:
        """Cancels a queued run, marks a running one CANCELLING, leaves others; returns it, or None."""

    def progress_after(self, run_id: str, sequence_number: int, limit: int) -> Sequence[Progress]:
        """Returns journal entries with greater numbers, in order."""


class PrivacyLedger(Protocol):
    """What releases told about people, for ever."""

    def budget(self, model: str) -> PrivacyBudget:
        """Returns limit and spending of all models, and the charges of one, newest first."""


class ModelRegistry(Protocol):
    """The directory of published versions."""

    def list_models(self) -> Sequence[str]:
        """Returns names, sorted."""

    def model(self, name: str) -> Model | None:
        """Returns a model with its aliases, or None."""

    def list_versions(self, model: str) -> Sequence[str]:
        """Returns versions, newest first."""

    def version(self, model: str, version: str, *, with_card: bool = False) -> ModelVersion:
        """Returns a version.

        Raises:
            NotFound: MODEL_VERSION_NOT_FOUND.
            DataLoss: BUNDLE_DAMAGED.
        """

    def verify(self, model: str, version: str) -> None:
        """Raises DataLoss unless the version would load."""

    def alias(self, model: str, alias: str) -> Alias | None:
        """Returns an alias, or None."""

    def aliases(self, model: str) -> Sequence[Alias]:
        """Returns the aliases of a model, by name."""

    def point(
        self, model: str, alias: str, version: str, *, cause: str, comment: str, expected: str | None
    ) -> Alias:
        """Points an alias; raises Aborted where it does not point at `expected`."""

    def point_back(self, model: str, alias: str, *, comment: str, expected: str | None) -> Alias:
        """Points an alias at the version before; raises as `shared.bundle.Registry.roll_back_alias`."""


class ScheduleStore(Protocol):
    """Schedules, durable."""

    def add(self, schedule: Schedule) -> Schedule:
        """Adds a schedule; raises AlreadyExists: SCHEDULE_EXISTS."""

    def list(self, *, limit: int, after: str) -> Sequence[Schedule]:
        """Returns schedules by id, after that id."""

    def delete(self, schedule_id: str) -> bool:
        """Deletes a schedule; returns whether there was one."""


class RunStarter(Protocol):
    """Who starts queued runs and stops cancelled ones."""

    def wake(self) -> None:
        """Says that there is something to start or to stop."""


class RunOverview(Protocol):
    """What became of all runs."""

    def counts(self) -> Sequence[RunCount]:
        """Returns the runs by model, state, verdict and cause; raises Unavailable."""
        ...
