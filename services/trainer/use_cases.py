"""What the trainer's callers can do. Pure: the world is behind ports."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Generic, TypeVar

from services.trainer.domain.hyper_parameters import resolve
from services.trainer.domain.runs import (
    Alias,
    Model,
    ModelVersion,
    Progress,
    RunState,
    TrainingConfig,
    TrainingRun,
)
from services.trainer.ports import ModelRegistry, RunStarter, RunStore
from shared.errors import (
    Aborted,
    DataLoss,
    FailedPrecondition,
    FieldViolation,
    InvalidInput,
    NotFound,
)

T = TypeVar("T")
_JOURNAL_PAGE = 200


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """A page of a list, and whether more follows."""

    items: Sequence[T]
    has_more: bool


class TrainingRuns:
    """Runs: create, read, watch, cancel.

    Args:
        wait: sleeps for about so many seconds, or until something may have changed.
        max_queued: runs that may wait.
    """

    def __init__(
        self, store: RunStore, starter: RunStarter, *, wait: Callable[[float], None], max_queued: int
    ) -> None:
        self._store, self._starter, self._wait, self._max_queued = store, starter, wait, max_queued

    def create(self, model: str, config: TrainingConfig, request_id: str) -> TrainingRun:
        """Queues a run; the same request again returns the same run. Raises InvalidInput for hyper-parameters out of range."""
        # Refused here, where the caller still listens, not in the run's process.
        resolve(config.size, config.overrides)
        run = self._store.create(model, config, request_id=request_id, max_queued=self._max_queued)
        self._starter.wake()
        return run

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


class Models:
    """Versions and aliases: read, promote, roll back, watch."""

    def __init__(self, registry: ModelRegistry, *, wait: Callable[[float], None]) -> None:
        self._registry, self._wait = registry, wait

    def list(self, page_size: int, after: str) -> Page[Model]:
        """Returns a page of models by name, after that name."""
        names = [name for name in self._registry.list_models() if name > after]
        models = [self.get(name) for name in names[:page_size]]
        return Page(models, len(names) > page_size)

    def get(self, name: str) -> Model:
        """Returns a model; raises NotFound."""
        model = self._registry.model(name)
        if model is None:
            raise NotFound(
                "MODEL_NOT_FOUND",
                f"There is no model {name} yet; CreateTrainingRun makes its first version.",
                {"model": name},
            )
        return model

    def list_versions(
        self, model: str, page_size: int, before: str
    ) -> tuple[Page[ModelVersion], Sequence[str]]:
        """Returns a page of versions, newest first, older than `before`; and which of the page are damaged."""
        self.get(model)
        names = [name for name in self._registry.list_versions(model) if not before or name < before]
        found, damaged = [], []
        for name in names[:page_size]:
            try:
                found.append(self._registry.version(model, name))
            except DataLoss:
                damaged.append(name)
        return Page(found, len(names) > page_size), damaged

    def get_version(self, model: str, version_or_alias: str) -> ModelVersion:
        """Returns a version, named by itself or by an alias, with its card."""
        self.get(model)
        alias = self._registry.alias(model, version_or_alias)
        return self._registry.version(model, alias.version if alias else version_or_alias, with_card=True)

    def promote(
        self, model: str, version: str, alias: str, *, force: bool, comment: str, expected: str | None
    ) -> Model:
        """Points an alias at a version.

        Raises:
            NotFound: there is no such version.
            DataLoss: it would not load.
            FailedPrecondition: GATE_FAILED, and not `force`.
            InvalidInput: `force` without a comment.
            Aborted: the alias does not point at `expected`.
        """
        if force and not comment:
            problem = "must say why when force is set; it is kept in the alias's history."
            raise InvalidInput(
                "INVALID_REQUEST", f"comment {problem}", {}, [FieldViolation("comment", problem)]
            )
        found = self._registry.version(model, version)
        self._registry.verify(model, version)
        passed = found.verdict != "FAILED"
        if not passed and not force:
            raise FailedPrecondition(
                "GATE_FAILED",
                f"The gate failed version {version}: {'; '.join(found.gate_reasons) or 'no verdict'}. Promote "
                "another version, or set force and say why.",
                {"model": model, "version": version, "verdict": found.verdict},
            )
        cause = "PROMOTED" if passed else "FORCED"
        self._registry.point(model, alias, version, cause=cause, comment=comment, expected=expected)
        return self.get(model)

    def roll_back(self, model: str, alias: str, *, comment: str, expected: str | None) -> Model:
        """Points an alias at the version before, which must still load."""
        current = self._registry.alias(model, alias)
        if current is not None and current.previous is not None:
            if expected is not None and current.version != expected:
                raise Aborted(
                    "ALIAS_CHANGED",
                    f"Alias {alias} of model {model} points at {current.version}, not at {expected}; read it again.",
                    {"model": model, "alias": alias, "version": current.version},
                )
            self._registry.verify(model, current.previous)
        self._registry.point_back(model, alias, comment=comment, expected=expected)
        return self.get(model)

    def watch_aliases(
        self, model: str, is_wanted: Callable[[], bool]
    ) -> Iterator[tuple[str, Alias | None, bool]]:
        """Yields (model, alias, snapshot complete): every alias, then each change, and heartbeats between."""
        known: dict[tuple[str, str], str] = {}
        complete = False
        quiet_seconds = 0.0
        while is_wanted():
            for name in [model] if model else self._registry.list_models():
                for alias in self._registry.aliases(name):
                    if known.get((name, alias.alias)) != alias.changed_at:
                        known[name, alias.alias] = alias.changed_at
                        quiet_seconds = 0.0
                        yield name, alias, complete
            if not complete or quiet_seconds >= 5.0:
                complete, quiet_seconds = True, 0.0
                yield "", None, True
            self._wait(0.5)
            quiet_seconds += 0.5


def _no_run(run_id: str) -> NotFound:
    return NotFound(
        "TRAINING_RUN_NOT_FOUND", "There is no such run; ListTrainingRuns names them.", {"runId": run_id}
    )
