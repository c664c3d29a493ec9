"""Runs: create, read, watch, cancel."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from datetime import datetime

from services.trainer.domain.hyper_parameters import resolve
from services.trainer.domain.runs import Progress, RunKind, RunState, Task, TrainingConfig, TrainingRun
from services.trainer.ports import ModelRegistry, RunStarter, RunStore
from services.trainer.use_cases.pages import Page
from shared.errors import FailedPrecondition, FieldViolation, InvalidInput, NotFound

_JOURNAL_PAGE = 200


class TrainingRuns:
    """Runs: create, read, watch, cancel.

    Args:
        wait: sleeps for about so many seconds, or until something may have changed.
        max_queued: runs that may wait.
    """

    def __init__(
        self,
        store: RunStore,
        starter: RunStarter,
        registry: ModelRegistry,
        *,
        wait: Callable[[float], None],
        max_queued: int,
    ) -> None:
        self._store, self._starter, self._registry = store, starter, registry
        self._wait, self._max_queued = wait, max_queued

    def create(self, model: str, config: TrainingConfig, request_id: str) -> TrainingRun:
        """Queues a training; the same request again returns the same run.

        Raises:
            InvalidInput: hyper-parameters are out of range.
            NotFound: there is no version `config.initial_version`.
        """
        # Refused here, where the caller still listens, not in the run's process.
        resolve(config.size, config.overrides)
        if config.initial_version:
            self._require_version(model, config.initial_version)
        return self._queue(model, config, Task(), request_id)

    def evaluate(self, model: str, version: str, config: TrainingConfig, request_id: str) -> TrainingRun:
        """Queues the measuring of a version, named by itself or by an alias; raises NotFound."""
        self._require_version(model, version)
        return self._queue(model, config, Task(RunKind.EVALUATION, version=version), request_id)

    def tune(self, model: str, config: TrainingConfig, task: Task, request_id: str) -> TrainingRun:
        """Queues a search for hyper-parameters.

        Raises:
            InvalidInput: hyper-parameters are out of range, or the run to resume is no tuning of this model.
            NotFound: there is no run to resume.
        """
        resolve(config.size, config.overrides)
        if task.resume_run_id:
            resumed = self.get(task.resume_run_id)
            if resumed.task.kind != RunKind.TUNING or resumed.model != model:
                problem = f"must be a tuning run of model {model}."
                raise InvalidInput(
                    "INVALID_REQUEST",
                    f"resume_run_id {problem}",
                    {},
                    [FieldViolation("resume_run_id", problem)],
                )
        return self._queue(model, config, task, request_id)

    def _queue(self, model: str, config: TrainingConfig, task: Task, request_id: str) -> TrainingRun:
        run = self._store.create(model, config, task, request_id=request_id, max_queued=self._max_queued)
        self._starter.wake()
        return run

    def _require_version(self, model: str, version: str) -> None:
        alias = self._registry.alias(model, version)
        self._registry.version(model, alias.version if alias else version)

    def get(self, run_id: str) -> TrainingRun:
        """Returns a run; raises NotFound."""
        run = self._store.get(run_id)
        if run is None:
            raise _no_run(run_id)
        return run

    def list(
        self, model: str, states: Sequence[RunState], page_size: int, before: tuple[datetime, str] | None
    ) -> Page[TrainingRun]:
        """Returns a page of runs, newest first."""
        found = self._store.list(model=model, states=states, limit=page_size + 1, before=before)
        return Page(found[:page_size], len(found) > page_size)

    def cancel(self, run_id: str, comment: str) -> TrainingRun:
        """Stops a run.

        Raises:
            NotFound: there is no such run.
            FailedPrecondition: TRAINING_RUN_ENDED, otherwise than by being cancelled.
        """
        run = self._store.request_cancel(run_id, comment)
        if run is None:
            raise _no_run(run_id)
        if run.state in (RunState.SUCCEEDED, RunState.FAILED):
            raise FailedPrecondition(
                "TRAINING_RUN_ENDED",
                f"The run has ended ({run.state.lower()}); there is nothing to cancel.",
                {"runId": run_id, "state": run.state},
            )
        self._starter.wake()
        return run

    def watch(
        self, run_id: str, after: int, is_wanted: Callable[[], bool]
    ) -> Iterator[tuple[Sequence[Progress], TrainingRun]]:
        """Yields journal entries after a number as they come, until the run has ended and all are sent."""
        run = self.get(run_id)
        newest = self._store.progress_after(run_id, after - 1, 1) if after > 0 else ()
        if after > 0 and not newest:
            last = run.latest_progress.sequence_number if run.latest_progress else 0
            problem = f"is beyond the run's last entry, {last}; send 0 to see everything."
            raise InvalidInput(
                "INVALID_REQUEST",
                f"after_sequence_number {problem}",
                {},
                [FieldViolation("after_sequence_number", problem)],
            )
        reported: TrainingRun | None = None
        while is_wanted():
            # The run first: whatever it wrote before it ended is then in the journal read next.
            run = self.get(run_id)
            entries = self._store.progress_after(run_id, after, _JOURNAL_PAGE)
            if entries:
                after = entries[-1].sequence_number
            changed = reported is None or (run.state, run.stage) != (reported.state, reported.stage)
            if entries or changed:
                yield entries, run
                reported = run
            if len(entries) == _JOURNAL_PAGE:
                continue
            if run.state.has_ended:
                return
            self._wait(0.25)


def _no_run(run_id: str) -> NotFound:
    return NotFound(
        "TRAINING_RUN_NOT_FOUND", "There is no such run; ListTrainingRuns names them.", {"runId": run_id}
    )
