"""Protobuf <-> domain, and validation of what a caller sent."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp
from shopkeeper.trainer.v1 import model_pb2, training_run_pb2

from services.trainer.domain.runs import (
    PRODUCTION,
    Alias,
    DataWindow,
    EvaluationConfig,
    Model,
    ModelVersion,
    Progress,
    RunState,
    TrainingConfig,
    TrainingRun,
    check_name,
)
from shared.bundle.history import INTEREST_KINDS
from shared.errors import FieldViolation, InvalidInput, Unimplemented
from shared.tokens import TokenSigner

_SIZES = {
    training_run_pb2.TrainingConfig.SIZE_UNSPECIFIED: "small",
    training_run_pb2.TrainingConfig.SIZE_TINY: "tiny",
    training_run_pb2.TrainingConfig.SIZE_SMALL: "small",
    training_run_pb2.TrainingConfig.SIZE_BASE: "base",
    training_run_pb2.TrainingConfig.SIZE_LARGE: "large",
}
_SIZE_OF = {"tiny": 1, "small": 2, "base": 3, "large": 4}
_COMMENT_LENGTH = 1024
_REQUEST_ID_LENGTH = 128


class Violations:
    """Collects what is wrong with a request, so that a caller learns all of it at once."""

    def __init__(self) -> None:
        self._found: list[FieldViolation] = []

    def check(self, right: bool, field: str, problem: str) -> None:
        """Notes a problem unless the value is right."""
        if not right:
            self._found.append(FieldViolation(field, problem))

    def raise_any(self) -> None:
        """Raises InvalidInput when something was noted."""
        if self._found:
            words = "; ".join(f"{v.field} {v.description}" for v in self._found)
            raise InvalidInput("INVALID_REQUEST", words, {}, self._found)


def page_size(value: int) -> int:
    """Returns a page size in [1, 100]; 20 for 0."""
    violations = Violations()
    violations.check(value >= 0, "page_size", "must not be negative; 0 means 20.")
    violations.raise_any()
    return min(value, 100) or 20


def comment(value: str) -> str:
    """Returns a comment of at most 1,024 characters."""
    violations = Violations()
    violations.check(
        len(value) <= _COMMENT_LENGTH, "comment", f"must have at most {_COMMENT_LENGTH} characters."
    )
    violations.raise_any()
    return value


def request_id(value: str) -> str:
    """Returns a request id of at most 128 characters, or nothing."""
    violations = Violations()
    violations.check(
        len(value) <= _REQUEST_ID_LENGTH and "\0" not in value,
        "request_id",
        f"must have at most {_REQUEST_ID_LENGTH} characters and no NUL.",
    )
    violations.raise_any()
    return value


def run_id(value: str) -> str:
    """Returns a run id; anything may be asked for, but not nothing."""
    violations = Violations()
    violations.check(0 < len(value) <= 128 and "\0" not in value, "run_id", "must be the run_id of a run.")
    violations.raise_any()
    return value


def states_from_proto(values: Sequence[int]) -> list[RunState]:
    """Returns the states of a filter."""
    violations = Violations()
    states = []
    for place, value in enumerate(values):
        known = value in training_run_pb2.TrainingRun.State.values() and value != 0
        violations.check(known, f"states[{place}]", "must be a state of TrainingRun.")
        if known:
            name = training_run_pb2.TrainingRun.State.Name(value)  # type: ignore[arg-type]
            states.append(RunState(name.removeprefix("STATE_")))
    violations.raise_any()
    return states


def config_from_proto(message: training_run_pb2.TrainingConfig) -> TrainingConfig:
    """Returns a configuration with every default filled in.

    Raises:
        InvalidInput: naming every field that is wrong.
        Unimplemented: it asks for what this build cannot do.
    """
    if message.HasField("differential_privacy"):
        raise Unimplemented(
            "NOT_BUILT_YET",
            "config.differential_privacy: training with differential privacy is not built yet. Leave it out; the "
            "trainer reads pseudonymous keys only and honours consent and erasure.",
        )
    if message.initial_version:
        raise Unimplemented(
            "NOT_BUILT_YET", "config.initial_version is not built yet; leave it out to train from the start."
        )
    if message.evaluation.split == training_run_pb2.EvaluationConfig.SPLIT_GLOBAL_TIME:
        raise Unimplemented(
            "NOT_BUILT_YET", "config.evaluation.split: only SPLIT_LEAVE_ONE_OUT is built yet; leave it out."
        )
    violations = Violations()
    violations.check(message.size in _SIZES, "config.size", "must be a size of TrainingConfig.")
    violations.check(
        0 <= message.max_train_seconds <= 604_800,
        "config.max_train_seconds",
        "must be in [1, 604800] seconds, or 0 for the size's own.",
    )
    violations.check(
        message.max_memory_bytes >= 0,
        "config.max_memory_bytes",
        "must not be negative; 0 is the server's own.",
    )
    window = _window(message.window, violations)
    evaluation = _evaluation(message.evaluation, violations)
    violations.raise_any()
    return TrainingConfig(
        size=_SIZES[message.size],
        overrides={field.name: _rounded(value) for field, value in message.overrides.ListFields()},
        seed=message.seed,
        window=window,
        evaluation=evaluation,
        max_train_seconds=message.max_train_seconds,
        promote=message.promote if message.HasField("promote") else True,
        promote_alias=check_name(message.promote_alias, "config.promote_alias", PRODUCTION),
        force=message.force,
        refit=message.refit if message.HasField("refit") else True,
        max_memory_bytes=message.max_memory_bytes,
    )


def _rounded(value: float) -> float | int:
    # A float32 of 0.1 arrives as 0.10000000149; what was meant is the shortest that reads the same.
    return value if isinstance(value, int) else float(f"{value:.7g}")


def _window(message: training_run_pb2.DataWindow, violations: Violations) -> DataWindow:
    start = message.start_time.ToDatetime(UTC) if message.HasField("start_time") else None
    end = message.end_time.ToDatetime(UTC) if message.HasField("end_time") else None
    violations.check(
        start is None or end is None or start < end, "config.window.end_time", "must be after start_time."
    )
    for place, kind in enumerate(message.kinds):
        violations.check(
            kind in INTEREST_KINDS,
            f"config.window.kinds[{place}]",
            "must express interest in an item: a view, cart addition, purchase, rating, review, wish, share or "
            "recommendation click.",
        )
    for name, high in (
        ("min_user_events", 10_000),
        ("min_item_events", 1_000_000),
        ("max_user_events", 10_000),
    ):
        value = getattr(message, name)
        violations.check(
            0 <= value <= high, f"config.window.{name}", f"must be in [1, {high}], or 0 for the default."
        )
    violations.check(message.max_user_events != 1, "config.window.max_user_events", "must be at least 2.")
    return DataWindow(
        start_time=start.isoformat() if start else None,
        end_time=end.isoformat() if end else None,
        kinds=tuple(sorted(set(message.kinds))),
        min_user_events=message.min_user_events or 1,
        min_item_events=message.min_item_events or 1,
        max_user_events=message.max_user_events or 200,
    )


def _evaluation(message: training_run_pb2.EvaluationConfig, violations: Violations) -> EvaluationConfig:
    violations.check(message.max_users >= 0, "config.evaluation.max_users", "must not be negative.")
    violations.check(
        message.bootstrap_resamples == 0 or 100 <= message.bootstrap_resamples <= 10_000,
        "config.evaluation.bootstrap_resamples",
        "must be in [100, 10000], or 0 for 1,000.",
    )
    violations.check(
        message.confidence == 0 or 0.5 < message.confidence < 1,
        "config.evaluation.confidence",
        "must be in (0.5, 1), or 0 for 0.95.",
    )
    return EvaluationConfig(
        exclude_seen=message.exclude_seen if message.HasField("exclude_seen") else True,
        max_users=message.max_users or 20_000,
        bootstrap_resamples=message.bootstrap_resamples or 1_000,
        confidence=message.confidence or 0.95,
    )


def config_to_proto(config: TrainingConfig) -> training_run_pb2.TrainingConfig:
    """Returns the configuration as the contract shows it."""
    window = training_run_pb2.DataWindow(
        kinds=config.window.kinds,  # type: ignore[arg-type]
        min_user_events=config.window.min_user_events,
        min_item_events=config.window.min_item_events,
        max_user_events=config.window.max_user_events,
    )
    if config.window.start_time:
        window.start_time.CopyFrom(_time(config.window.start_time))
    if config.window.end_time:
        window.end_time.CopyFrom(_time(config.window.end_time))
    return training_run_pb2.TrainingConfig(
        size=_SIZE_OF[config.size],  # type: ignore[arg-type]
        overrides=training_run_pb2.HyperParameters(**config.overrides),  # type: ignore[arg-type]
        seed=config.seed,
        window=window,
        evaluation=training_run_pb2.EvaluationConfig(
            split=training_run_pb2.EvaluationConfig.SPLIT_LEAVE_ONE_OUT,
            exclude_seen=config.evaluation.exclude_seen,
            max_users=config.evaluation.max_users,
            bootstrap_resamples=config.evaluation.bootstrap_resamples,
            confidence=config.evaluation.confidence,
        ),
        max_train_seconds=config.max_train_seconds,
        promote=config.promote,
        promote_alias=config.promote_alias,
        force=config.force,
        refit=config.refit,
        max_memory_bytes=config.max_memory_bytes,
    )


def run_to_proto(run: TrainingRun) -> training_run_pb2.TrainingRun:
    """Returns the run as the contract shows it."""
    message = training_run_pb2.TrainingRun(
        run_id=run.run_id,
        model=run.model,
        kind=training_run_pb2.TrainingRun.KIND_TRAINING,
        state=training_run_pb2.TrainingRun.State.Value(f"STATE_{run.state}"),
        stage=training_run_pb2.TrainingRun.Stage.Value(f"STAGE_{run.stage}"),
        config=config_to_proto(run.config),
        create_time=_timestamp(run.created_at),
        version=run.version,
        cancel_comment=run.cancel_comment,
        promoted=run.promoted,
    )
    if run.started_at:
        message.start_time.CopyFrom(_timestamp(run.started_at))
    if run.ended_at:
        message.end_time.CopyFrom(_timestamp(run.ended_at))
    if run.latest_progress:
        message.latest_progress.CopyFrom(progress_to_proto(run.latest_progress))
    if run.gate:
        message.gate.CopyFrom(_gate(run.gate))
    if run.failure:
        message.failure.CopyFrom(
            training_run_pb2.RunFailure(reason=run.failure.reason, message=run.failure.message)
        )
    return message


def progress_to_proto(progress: Progress) -> training_run_pb2.TrainingProgress:
    """Returns a journal entry as the contract shows it."""
    return training_run_pb2.TrainingProgress(
        sequence_number=progress.sequence_number,
        create_time=_timestamp(progress.created_at),
        stage=training_run_pb2.TrainingRun.Stage.Value(f"STAGE_{progress.stage}"),
        message=progress.message,
        step=progress.step,
        epoch=progress.epoch,
        max_epochs=progress.max_epochs,
        loss=progress.loss,
        metrics=[model_pb2.Metric(name=name, value=value) for name, value in progress.metrics.items()],
        remaining_seconds=progress.remaining_seconds,
        peak_resident_bytes=progress.peak_resident_bytes,
    )


def model_to_proto(model: Model) -> model_pb2.Model:
    """Returns a model as the contract shows it."""
    return model_pb2.Model(
        name=model.name,
        aliases=[alias_to_proto(alias) for alias in model.aliases],
        latest_version=model.latest_version,
        version_count=model.version_count,
    )


def alias_to_proto(alias: Alias) -> model_pb2.AliasState:
    """Returns an alias as the contract shows it."""
    return model_pb2.AliasState(
        alias=alias.alias,
        version=alias.version,
        previous_version=alias.previous or "",
        change_time=_time(alias.changed_at),
        cause=_cause(alias.cause),
        history=[
            model_pb2.AliasChange(
                version=change.version,
                previous_version=change.previous or "",
                change_time=_time(change.changed_at),
                cause=_cause(change.cause),
                comment=change.comment,
            )
            for change in alias.history
        ],
    )


def version_to_proto(version: ModelVersion) -> model_pb2.ModelVersion:
    """Returns a version as the contract shows it."""
    manifest = version.manifest
    evaluation, data = manifest.get("evaluation", {}), manifest.get("data", {})
    metrics, baselines = manifest.get("metrics", {}), manifest.get("baselines", {})
    message = model_pb2.ModelVersion(
        model=version.model,
        version=version.version,
        create_time=_time(manifest["created_at"]),
        run_id=manifest.get("run_id", ""),
        evaluation=model_pb2.EvaluationReport(
            metrics=_metrics(metrics),
            ladder=[
                model_pb2.LadderRung(name=name, metrics=_metrics(values))
                for name, values in [("blend", metrics), *baselines.items()]
            ],
            slices=[
                model_pb2.Slice(
                    name=part["name"],
                    user_count=part["users"],
                    metrics=_metrics(part["metrics"]),
                    incumbent_metrics=_metrics(part.get("incumbent_metrics", {})),
                )
                for part in manifest.get("slices", [])
            ],
            user_count=evaluation.get("users", 0),
            protocol=evaluation.get("protocol", ""),
            confidence=evaluation.get("confidence", 0.0),
        ),
        gate=_gate(manifest.get("gate", {})),
        data=model_pb2.DataSummary(
            watermark=bytes.fromhex(data.get("watermark", "")),
            event_count=data.get("events", 0),
            user_count=data.get("users", 0),
            item_count=data.get("items", 0),
            attribute_count=data.get("attributes", 0),
        ),
        files=[
            model_pb2.BundleFile(name=name, sha256=entry["sha256"], size_bytes=entry["bytes"])
            for name, entry in sorted(manifest.get("files", {}).items())
        ],
        hyper_parameters=[
            _hyper_parameter(name, value)
            for name, value in sorted(manifest.get("hyper_parameters", {}).items())
        ],
        code_version=manifest.get("code_version", ""),
        aliases=version.aliases,
        card=version.card,
    )
    if data.get("first_event_at"):
        message.data.first_event_time.CopyFrom(_time(data["first_event_at"]))
        message.data.last_event_time.CopyFrom(_time(data["last_event_at"]))
    return message


def sign_run_page(signer: TokenSigner, run: TrainingRun) -> str:
    """Returns the token of the page after a run."""
    return signer.sign("page", f"runs|{run.created_at.isoformat()}|{run.run_id}".encode())


def read_run_page(signer: TokenSigner, token: str) -> tuple[datetime, str] | None:
    """Returns where a page of runs starts; None for the first."""
    if not token:
        return None
    created_at, run = _page_parts(signer, token, "runs", 2)
    return datetime.fromisoformat(created_at), run


def sign_name_page(signer: TokenSigner, kind: str, name: str) -> str:
    """Returns the token of the page after a name; `kind` keeps lists apart."""
    return signer.sign("page", f"{kind}|{name}".encode())


def read_name_page(signer: TokenSigner, kind: str, token: str) -> str:
    """Returns the name after which a page starts; empty for the first."""
    return _page_parts(signer, token, kind, 1)[0] if token else ""


def _page_parts(signer: TokenSigner, token: str, kind: str, count: int) -> list[str]:
    parts = signer.verify("page", token, "page_token").decode().split("|")
    if parts[0] != kind or len(parts) != count + 1:
        problem = "belongs to another list; send one back to the call that gave it."
        raise InvalidInput(
            "INVALID_REQUEST", f"page_token {problem}", {}, [FieldViolation("page_token", problem)]
        )
    return parts[1:]


def _metrics(values: Mapping[str, Any]) -> list[model_pb2.Metric]:
    return [
        model_pb2.Metric(name=name, value=entry["value"], low=entry["low"], high=entry["high"])
        for name, entry in values.items()
    ]


def _gate(gate: Mapping[str, Any]) -> model_pb2.Gate:
    verdict = gate.get("verdict", "UNSPECIFIED")
    return model_pb2.Gate(
        verdict=model_pb2.Gate.Verdict.Value(f"VERDICT_{verdict}"),
        checks=[
            model_pb2.GateCheck(name=check["name"], passed=check["passed"], reason=check["reason"])
            for check in gate.get("checks", [])
        ],
    )


def _hyper_parameter(name: str, value: Any) -> model_pb2.HyperParameterValue:
    if isinstance(value, bool):
        return model_pb2.HyperParameterValue(name=name, flag=value)
    if isinstance(value, (int, float)) and math.isfinite(value):
        return model_pb2.HyperParameterValue(name=name, number=value)
    return model_pb2.HyperParameterValue(name=name, text=str(value))


def _cause(cause: str) -> Any:
    known = model_pb2.AliasChange.Cause.keys()
    name = f"CAUSE_{cause}"
    return model_pb2.AliasChange.Cause.Value(name if name in known else "CAUSE_UNSPECIFIED")


def _timestamp(moment: datetime) -> Timestamp:
    message = Timestamp()
    message.FromDatetime(moment.astimezone(UTC))
    return message


def _time(text: str) -> Timestamp:
    return _timestamp(datetime.fromisoformat(text))
