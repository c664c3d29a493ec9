"""TrainingConfig and its parts."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Literal

from shopkeeper.trainer.v1 import trainer_service_pb2, training_run_pb2

from services.trainer.converters.checks import Violations
from services.trainer.converters.data_snapshots import snapshot_from_proto, snapshot_to_proto
from services.trainer.converters.privacy import privacy_from_proto, privacy_to_proto
from services.trainer.converters.times import time_of
from services.trainer.domain.runs import (
    NAME,
    PRODUCTION,
    DataWindow,
    EvaluationConfig,
    TrainingConfig,
    check_name,
)
from shared.bundle.history import INTEREST_KINDS

_SIZES = {
    training_run_pb2.TrainingConfig.SIZE_UNSPECIFIED: "small",
    training_run_pb2.TrainingConfig.SIZE_TINY: "tiny",
    training_run_pb2.TrainingConfig.SIZE_SMALL: "small",
    training_run_pb2.TrainingConfig.SIZE_BASE: "base",
    training_run_pb2.TrainingConfig.SIZE_LARGE: "large",
}
_SPLIT_OF = {
    "leave_one_out": training_run_pb2.EvaluationConfig.SPLIT_LEAVE_ONE_OUT,
    "global_time": training_run_pb2.EvaluationConfig.SPLIT_GLOBAL_TIME,
}
_SPLITS = {
    training_run_pb2.EvaluationConfig.SPLIT_UNSPECIFIED: "leave_one_out",
    training_run_pb2.EvaluationConfig.SPLIT_LEAVE_ONE_OUT: "leave_one_out",
    training_run_pb2.EvaluationConfig.SPLIT_GLOBAL_TIME: "global_time",
}
_SIZE_OF = {"tiny": 1, "small": 2, "base": 3, "large": 4}


def config_from_proto(message: training_run_pb2.TrainingConfig) -> TrainingConfig:
    """Returns a configuration with every default filled in.

    Raises:
        InvalidInput: naming every field that is wrong.
    """
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
    private = privacy_from_proto(message, violations)
    violations.check(
        not message.initial_version or NAME.fullmatch(message.initial_version) is not None,
        "config.initial_version",
        "must be a version, or an alias such as production.",
    )
    violations.check(
        private is None or not message.initial_version,
        "config.initial_version",
        "must be empty with differential_privacy: weights that learned without it would tell what it hides.",
    )
    snapshot = (
        snapshot_from_proto(message.data_snapshot, violations, "config.data_snapshot")
        if message.HasField("data_snapshot")
        else None
    )
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
        differential_privacy=private,
        initial_version=message.initial_version,
        data_snapshot=snapshot,
    )


def evaluation_from_proto(request: trainer_service_pb2.EvaluateModelRequest) -> TrainingConfig:
    """Returns what an evaluation measures with, every default filled in. Raises InvalidInput."""
    violations = Violations()
    read = _window(request.window, violations, "window")
    measured = _evaluation(request.evaluation, violations, "evaluation")
    snapshot = (
        snapshot_from_proto(request.data_snapshot, violations, "data_snapshot")
        if request.HasField("data_snapshot")
        else None
    )
    violations.raise_any()
    return TrainingConfig(window=read, evaluation=measured, promote=False, data_snapshot=snapshot)


def _rounded(value: float) -> float | int:
    # A float32 of 0.1 arrives as 0.10000000149; what was meant is the shortest that reads the same.
    return value if isinstance(value, int) else float(f"{value:.7g}")


def _window(
    message: training_run_pb2.DataWindow, violations: Violations, path: str = "config.window"
) -> DataWindow:
    start, end = (
        _moment(message, "start_time", violations, path),
        _moment(message, "end_time", violations, path),
    )
    violations.check(
        start is None or end is None or start < end, f"{path}.end_time", "must be after start_time."
    )
    for place, kind in enumerate(message.kinds):
        violations.check(
            kind in INTEREST_KINDS,
            f"{path}.kinds[{place}]",
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
            0 <= value <= high, f"{path}.{name}", f"must be in [1, {high}], or 0 for the default."
        )
    violations.check(message.max_user_events != 1, f"{path}.max_user_events", "must be at least 2.")
    return DataWindow(
        start_time=start.isoformat() if start else None,
        end_time=end.isoformat() if end else None,
        kinds=tuple(sorted(set(message.kinds))),
        min_user_events=message.min_user_events or 1,
        min_item_events=message.min_item_events or 1,
        max_user_events=message.max_user_events or 200,
    )


def _moment(
    window: training_run_pb2.DataWindow,
    name: Literal["start_time", "end_time"],
    violations: Violations,
    path: str,
) -> datetime | None:
    if not window.HasField(name):
        return None
    try:
        return getattr(window, name).ToDatetime(UTC)
    except (ValueError, OverflowError):
        violations.check(False, f"{path}.{name}", "must be a time of the years 1 to 9999.")
        return None


def _evaluation(
    message: training_run_pb2.EvaluationConfig, violations: Violations, path: str = "config.evaluation"
) -> EvaluationConfig:
    violations.check(message.max_users >= 0, f"{path}.max_users", "must not be negative.")
    violations.check(
        message.bootstrap_resamples == 0 or 100 <= message.bootstrap_resamples <= 10_000,
        f"{path}.bootstrap_resamples",
        "must be in [100, 10000], or 0 for 1,000.",
    )
    violations.check(
        message.confidence == 0 or 0.5 < message.confidence < 1,
        f"{path}.confidence",
        "must be in (0.5, 1), or 0 for 0.95.",
    )
    violations.check(message.split in _SPLITS, f"{path}.split", "must be a split of EvaluationConfig.")
    return EvaluationConfig(
        split=_SPLITS.get(message.split, "leave_one_out"),
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
        window.start_time.CopyFrom(time_of(config.window.start_time))
    if config.window.end_time:
        window.end_time.CopyFrom(time_of(config.window.end_time))
    return training_run_pb2.TrainingConfig(
        size=_SIZE_OF[config.size],  # type: ignore[arg-type]
        overrides=training_run_pb2.HyperParameters(**config.overrides),  # type: ignore[arg-type]
        seed=config.seed,
        window=window,
        evaluation=training_run_pb2.EvaluationConfig(
            split=_SPLIT_OF[config.evaluation.split],
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
        differential_privacy=privacy_to_proto(config.differential_privacy),
        initial_version=config.initial_version,
        data_snapshot=snapshot_to_proto(config.data_snapshot) if config.data_snapshot else None,
    )
