"""Runs and versions, as the trainer thinks of them. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any

from services.trainer.domain.privacy import DifferentialPrivacy
from shared.errors import FieldViolation, InvalidInput

NAME = re.compile(r"^[a-z0-9][a-z0-9_-]{0,62}$")
DEFAULT_MODEL = "main"
PRODUCTION = "production"
# Exit code of a run's process that the trainer, not a caller, told to stop (EX_TEMPFAIL).
EXIT_INTERRUPTED = 75


class RunKind(StrEnum):
    """What a run does; names as in the proto, without the prefix."""

    TRAINING = "TRAINING"
    EVALUATION = "EVALUATION"
    TUNING = "TUNING"


class RunState(StrEnum):
    """Where a run stands; names as in the proto, without the prefix."""

    QUEUED = "QUEUED"
    RUNNING = "RUNNING"
    CANCELLING = "CANCELLING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"

    @property
    def has_ended(self) -> bool:
        """Whether it will never change again."""
        return self in (RunState.SUCCEEDED, RunState.FAILED, RunState.CANCELLED)


@dataclass(frozen=True, slots=True)
class DataWindow:
    """Which part of the log takes part. Times are RFC 3339 or None; see the proto for the rest."""

    start_time: str | None = None
    end_time: str | None = None
    kinds: tuple[int, ...] = ()
    min_user_events: int = 1
    min_item_events: int = 1
    max_user_events: int = 200


@dataclass(frozen=True, slots=True)
class DataSnapshot:
    """What a run read, by name.

    Attributes:
        snapshot_set: digest of the set of day files.
        catalogue: digest of the items' attributes; empty for the catalogue as it is.
        watermark: `pg_snapshot` of the log that the set holds, as text; empty where it is only asked for.
    """

    snapshot_set: str
    catalogue: str = ""
    watermark: str = ""


@dataclass(frozen=True, slots=True)
class EvaluationConfig:
    """How a model is measured. `split` is "leave_one_out" or "global_time"."""

    split: str = "leave_one_out"
    exclude_seen: bool = True
    max_users: int = 20_000
    bootstrap_resamples: int = 1_000
    confidence: float = 0.95


@dataclass(frozen=True, slots=True)
class TrainingConfig:
    """What to train, with every default filled in. `overrides` holds departures from the size, by name."""

    size: str = "small"
    overrides: Mapping[str, float | int] = field(default_factory=dict)
    seed: int = 0
    window: DataWindow = DataWindow()
    evaluation: EvaluationConfig = EvaluationConfig()
    max_train_seconds: int = 0
    promote: bool = True
    promote_alias: str = PRODUCTION
    force: bool = False
    refit: bool = True
    max_memory_bytes: int = 0
    differential_privacy: DifferentialPrivacy | None = None
    initial_version: str = ""
    data_snapshot: DataSnapshot | None = None

    def to_json(self) -> dict[str, Any]:
        """Returns a form that `from_json` reads."""
        fields = asdict(self)
        fields["overrides"] = dict(self.overrides)
        fields["window"]["kinds"] = list(self.window.kinds)
        if self.data_snapshot is None:
            # Requests of an earlier build keep their digest.
            del fields["data_snapshot"]
        return fields

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> TrainingConfig:
        """Reads the form of `to_json`; fields of a later build are ignored."""
        known = {name: fields[name] for name in cls.__dataclass_fields__ if name in fields}
        window = dict(known.pop("window", {}))
        window["kinds"] = tuple(window.get("kinds", ()))
        evaluation = known.pop("evaluation", {})
        private = known.pop("differential_privacy", None)
        snapshot = known.pop("data_snapshot", None)
        return cls(
            **known,
            differential_privacy=DifferentialPrivacy.from_json(private) if private else None,
            data_snapshot=DataSnapshot(**snapshot) if snapshot else None,
            window=DataWindow(**{n: window[n] for n in DataWindow.__dataclass_fields__ if n in window}),
            evaluation=EvaluationConfig(
                **{n: evaluation[n] for n in EvaluationConfig.__dataclass_fields__ if n in evaluation}
            ),
        )


@dataclass(frozen=True, slots=True)
class Task:
    """What a run is to do beside its configuration.

    Attributes:
        version: of an evaluation: the version or alias to measure.
        max_trials, max_seconds: of a tuning.
        resume_run_id: of a tuning: the run whose trials to keep; empty for none.
    """

    kind: RunKind = RunKind.TRAINING
    version: str = ""
    max_trials: int = 0
    max_seconds: int = 0
    resume_run_id: str = ""

    def to_json(self) -> dict[str, Any]:
        """Returns a form that `from_json` reads, without what is at its default."""
        return {
            name: value
            for name, value in asdict(self).items()
            if name != "kind" and value != self.__dataclass_fields__[name].default
        }

    @classmethod
    def from_json(cls, kind: str, fields: Mapping[str, Any]) -> Task:
        """Reads the form of `to_json`; fields of a later build are ignored."""
        known = {n: fields[n] for n in cls.__dataclass_fields__ if n in fields and n != "kind"}
        return cls(RunKind(kind), **known)


@dataclass(frozen=True, slots=True)
class Trial:
    """The outcome of one trial of a tuning run: departures from the size, by name, and what they gave."""

    trial_number: int
    overrides: Mapping[str, float | int]
    validation_ndcg_at_10: float
    elapsed_seconds: float


@dataclass(frozen=True, slots=True)
class RunFailure:
    """Why a run failed: a reason of the contract, and words."""

    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Progress:
    """One entry of a run's journal. Stage as in the proto, without the prefix."""

    sequence_number: int
    created_at: datetime
    stage: str
    message: str
    step: int = 0
    epoch: int = 0
    max_epochs: int = 0
    loss: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    remaining_seconds: float | None = None
    peak_resident_bytes: int = 0


@dataclass(frozen=True, slots=True)
class TrainingRun:
    """A run as it is stored.

    Attributes:
        gate: as in the manifest, or None.
        evaluation: measures in the manifest's form; of an evaluation that has ended.
        trials: of a tuning, best first.
        data_snapshot: what it read, once it has; None where that has no name, or is nobody's to know.
    """

    run_id: str
    model: str
    state: RunState
    stage: str
    config: TrainingConfig
    created_at: datetime
    started_at: datetime | None = None
    ended_at: datetime | None = None
    latest_progress: Progress | None = None
    version: str = ""
    gate: Mapping[str, Any] | None = None
    failure: RunFailure | None = None
    cancel_comment: str = ""
    promoted: bool = False
    attempt: int = 0
    task: Task = Task()
    evaluation: Mapping[str, Any] | None = None
    trials: tuple[Trial, ...] = ()
    schedule_id: str = ""
    data_snapshot: DataSnapshot | None = None


@dataclass(frozen=True, slots=True)
class AliasChange:
    """One change of an alias; `cause` as in the proto, without the prefix."""

    version: str
    previous: str | None
    changed_at: str
    cause: str
    comment: str = ""


@dataclass(frozen=True, slots=True)
class Alias:
    """Where an alias points, and has pointed, newest first."""

    alias: str
    version: str
    previous: str | None
    changed_at: str
    cause: str
    history: tuple[AliasChange, ...] = ()


@dataclass(frozen=True, slots=True)
class Model:
    """A line of versions."""

    name: str
    aliases: tuple[Alias, ...]
    latest_version: str
    version_count: int


@dataclass(frozen=True, slots=True)
class ModelVersion:
    """A version: its manifest, the aliases that point at it, and the card where it was asked for."""

    model: str
    version: str
    manifest: Mapping[str, Any]
    aliases: tuple[str, ...] = ()
    card: str = ""

    @property
    def verdict(self) -> str:
        """PASSED, FAILED or FORCED; FAILED where the manifest has none."""
        return str(self.manifest.get("gate", {}).get("verdict", "FAILED"))

    @property
    def gate_reasons(self) -> tuple[str, ...]:
        """Findings of the checks that failed."""
        return tuple(str(reason) for reason in self.manifest.get("gate", {}).get("reasons", ()))


def check_name(name: str, field_name: str, default: str) -> str:
    """Returns the name, or the default for an empty one.

    Raises:
        InvalidInput: it does not match `^[a-z0-9][a-z0-9_-]{0,62}$`.
    """
    name = name or default
    if not NAME.fullmatch(name):
        problem = f"must match {NAME.pattern}: lower-case letters, digits, - and _, at most 63."
        raise InvalidInput(
            "INVALID_REQUEST", f"{field_name} {problem}", {}, [FieldViolation(field_name, problem)]
        )
    return name


@dataclass(frozen=True, slots=True)
class RunCount:
    """Runs of one kind.

    Attributes:
        verdict: the gate's, or empty where none was reached.
        by_drift: whether a schedule started them because behaviour had drifted.
        count: how many.
        last_end_seconds: end of the latest, seconds since 1970; 0 where none has ended.
    """

    model: str
    state: str
    verdict: str
    by_drift: bool
    count: int
    last_end_seconds: float
