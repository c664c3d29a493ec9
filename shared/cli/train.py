"""`shopkeeper train`, `models`, `promote`, `rollback`: the trainer, watched."""

from __future__ import annotations

import time
from typing import Any

import grpc
from shopkeeper.trainer.v1 import model_pb2, trainer_service_pb2, training_run_pb2

from shared.cli.clients import Clients
from shared.cli.output import EXIT_OK, EXIT_PROBLEMS, say, show_json, show_table
from shared.cli.progress import StepProgress
from shared.cli.simulate import LABEL
from shared.errors import FailedPrecondition, Unavailable
from shared.grpc_status import from_rpc_error

CALL_TIMEOUT_SECONDS = 30.0
RECONNECT_SECONDS = 60.0
ENDED = (
    training_run_pb2.TrainingRun.STATE_SUCCEEDED,
    training_run_pb2.TrainingRun.STATE_FAILED,
    training_run_pb2.TrainingRun.STATE_CANCELLED,
)
SIZES = {"tiny": 1, "small": 2, "base": 3, "large": 4}
RUNG_TITLES = {
    "blend": "blend (served)", "transformer": "Transformer", "cooccurrence": "co-occurrence",
    "popularity_decayed": "popularity, decayed", "popularity": "popularity",
}  # fmt: skip

_RUNG_ORDER = {name: number for number, name in enumerate(RUNG_TITLES)}


def create_run(
    clients: Clients, *, model: str = "", size: str = "", max_seconds: int = 0, seed: int = 0, promote: bool = True,
    request_id: str = "", exclude_seen: bool = True,
    initial_version: str = "",
) -> training_run_pb2.TrainingRun:  # fmt: skip
    """Starts a training run and returns it as it is now."""
    config = training_run_pb2.TrainingConfig(max_train_seconds=max_seconds, seed=seed, promote=promote)
    config.evaluation.exclude_seen = exclude_seen
    config.initial_version = initial_version
    if size:
        config.size = SIZES[size]  # type: ignore[assignment]
    request = trainer_service_pb2.CreateTrainingRunRequest(model=model, config=config, request_id=request_id)
    return clients.trainer.CreateTrainingRun(request, timeout=CALL_TIMEOUT_SECONDS)


def repeat_run(clients: Clients, *, model: str, version: str, promote: bool) -> training_run_pb2.TrainingRun:
    """Starts a run with the configuration of the one that made a version, on what that one read.

    Raises:
        FailedPrecondition: the version does not say what it was trained on.
    """
    made = clients.trainer.GetModelVersion(
        trainer_service_pb2.GetModelVersionRequest(model=model, version=version), timeout=CALL_TIMEOUT_SECONDS
    )
    if not made.data.HasField("data_snapshot"):
        raise FailedPrecondition(
            "DATA_SNAPSHOT_GONE",
            f"Version {made.version} does not say what it was trained on: it is private, or was made without day files.",
        )
    run = clients.trainer.GetTrainingRun(
        trainer_service_pb2.GetTrainingRunRequest(run_id=made.run_id), timeout=CALL_TIMEOUT_SECONDS
    )
    run.config.data_snapshot.CopyFrom(made.data.data_snapshot)
    # An alias may point elsewhere by now; the version knows where it began.
    run.config.initial_version = next(
        (value.text for value in made.hyper_parameters if value.name == "initial_version"), ""
    )
    run.config.promote = promote
    request = trainer_service_pb2.CreateTrainingRunRequest(model=made.model, config=run.config)
    return clients.trainer.CreateTrainingRun(request, timeout=CALL_TIMEOUT_SECONDS)


def watch_run(clients: Clients, run_id: str, *, quiet: bool = False) -> training_run_pb2.TrainingRun:
    """Follows a run to its end, across restarts of the trainer, and returns it.

    Raises:
        Unavailable: the trainer stayed away for RECONNECT_SECONDS.
        ShopkeeperError: the run is not known.
    """
    seen = 0
    lost_since: float | None = None
    with StepProgress(f"Training {run_id}", enabled=not quiet) as progress:
        while True:
            request = trainer_service_pb2.WatchTrainingRunRequest(run_id=run_id, after_sequence_number=seen)
            try:
                for answer in clients.trainer.WatchTrainingRun(request):
                    lost_since = None
                    for entry in answer.progress:
                        seen = max(seen, entry.sequence_number)
                        _show_progress(progress, entry, quiet=quiet)
                    if answer.training_run.state in ENDED:
                        return answer.training_run
            except grpc.RpcError as rpc_error:
                if rpc_error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
                    raise
                lost_since = lost_since or time.monotonic()
                if time.monotonic() - lost_since > RECONNECT_SECONDS:
                    error = from_rpc_error(rpc_error)
                    raise Unavailable(
                        "TRAINER_UNREACHABLE", f"The trainer stayed away: {error.message}"
                    ) from rpc_error
                time.sleep(0.5)


def _show_progress(progress: StepProgress, entry: training_run_pb2.TrainingProgress, *, quiet: bool) -> None:
    stage_name = training_run_pb2.TrainingRun.Stage.Name(entry.stage).removeprefix("STAGE_").lower()
    parts = [stage_name]
    if entry.epoch:
        parts.append(f"epoch {entry.epoch}" + (f"/{entry.max_epochs}" if entry.max_epochs else ""))
    if entry.HasField("loss"):
        parts.append(f"loss {entry.loss:.3f}")
    parts += [f"{m.name} {m.value:.4f}" for m in entry.metrics[:2]]
    if len(parts) == 1 and entry.message:
        parts.append(entry.message)
    detail = ", ".join(parts)
    left = entry.remaining_seconds if entry.HasField("remaining_seconds") else None
    # The run's own estimate beats any guess from its stage; a bar never goes back.
    share = progress.elapsed / (progress.elapsed + left) if left is not None and progress.elapsed > 0 else 0.0
    progress.update(max(progress.share, min(1.0, share)), detail=detail, left=left)


def evaluation_of(clients: Clients, run: training_run_pb2.TrainingRun) -> model_pb2.EvaluationReport:
    """Returns the measures of the version that a run published, or those of a run that only evaluated."""
    if not run.version or run.evaluation.ladder:
        return run.evaluation
    request = trainer_service_pb2.GetModelVersionRequest(model=run.model, version=run.version)
    return clients.trainer.GetModelVersion(request, timeout=CALL_TIMEOUT_SECONDS).evaluation


def show_run(clients: Clients, run: training_run_pb2.TrainingRun, *, as_json: bool) -> int:
    """Prints how a run ended; returns the exit code: 0 when it succeeded and its gate passed."""
    passed = run.gate.verdict in (model_pb2.Gate.VERDICT_PASSED, model_pb2.Gate.VERDICT_FORCED)
    succeeded = run.state == training_run_pb2.TrainingRun.STATE_SUCCEEDED
    if as_json:
        show_json(run)
    elif succeeded:
        show_evaluation(evaluation_of(clients, run), f"Version {run.version}")
        _say_gate(run.gate, promoted=run.promoted)
    else:
        state = training_run_pb2.TrainingRun.State.Name(run.state).removeprefix("STATE_").lower()
        why = f": {run.failure.message} ({run.failure.reason})" if run.failure.reason else ""
        say(f"The run {run.run_id} {state}{why}")
    return EXIT_OK if succeeded and passed else EXIT_PROBLEMS


def _say_gate(gate: model_pb2.Gate, *, promoted: bool) -> None:
    verdict = model_pb2.Gate.Verdict.Name(gate.verdict).removeprefix("VERDICT_").lower()
    say(f"Gate {verdict}; {'in production now' if promoted else 'not promoted'}.")
    for check in gate.checks:
        if not check.passed:
            say(f"  {check.name}: {check.reason}")


def evaluation_rows(report: model_pb2.EvaluationReport) -> list[tuple[str, str, str]]:
    """Returns (model, HR@10, NDCG@10) of each rung of the ladder, with intervals."""
    return [
        (
            RUNG_TITLES.get(rung.name, rung.name),
            _with_interval(metric_of(rung.metrics, "hr@10")),
            _with_interval(metric_of(rung.metrics, "ndcg@10")),
        )
        for rung in sorted(report.ladder, key=lambda rung: _RUNG_ORDER.get(rung.name, len(_RUNG_ORDER)))
    ]


def metric_of(metrics: Any, name: str) -> model_pb2.Metric | None:
    """Returns the metric of that name, or None."""
    return next((m for m in metrics if m.name == name), None)


def rung_of(report: model_pb2.EvaluationReport, name: str) -> model_pb2.LadderRung | None:
    """Returns the rung of that name, or None."""
    return next((r for r in report.ladder if r.name == name), None)


def _with_interval(metric: model_pb2.Metric | None) -> str:
    if metric is None:
        return ""
    interval = (
        f" [{metric.low:.4f}, {metric.high:.4f}]"
        if metric.HasField("low") and metric.HasField("high")
        else ""
    )
    return f"{metric.value:.4f}{interval}"


def show_evaluation(report: model_pb2.EvaluationReport, title: str) -> None:
    """Prints the ladder of the served model and its baselines."""
    confidence = f", {report.confidence:.0%} intervals" if report.confidence else ""
    show_table(
        f"{title}: offline, {report.user_count:,} people, {report.protocol}{confidence}",
        ("model", "#HR@10", "#NDCG@10"),
        evaluation_rows(report),
    )


def show_models(clients: Clients, model: str, *, as_json: bool) -> None:
    """Prints the versions of a model, newest first, with their measures and aliases."""
    answer = clients.trainer.ListModelVersions(
        trainer_service_pb2.ListModelVersionsRequest(model=model, page_size=50), timeout=CALL_TIMEOUT_SECONDS
    )
    if as_json:
        show_json(answer)
        return
    rows = []
    for version in answer.model_versions:
        metrics = version.evaluation.metrics
        rows.append(
            (
                version.version,
                ", ".join(version.aliases),
                model_pb2.Gate.Verdict.Name(version.gate.verdict).removeprefix("VERDICT_").lower(),
                _with_interval(metric_of(metrics, "hr@10")),
                _with_interval(metric_of(metrics, "ndcg@10")),
                f"{version.data.event_count:,}",
                version.create_time.ToJsonString()[:19].replace("T", " "),
            )
        )
    simulated = any(v.evaluation.protocol.startswith(LABEL) for v in answer.model_versions)
    show_table(
        f"{LABEL}: model versions" if simulated else "Model versions", ("version", "aliases", "gate", "#HR@10", "#NDCG@10", "#events", "made (UTC)"), rows,
        note="" if rows else "None yet: `shopkeeper train --watch` makes one.",
    )  # fmt: skip
    for damaged in answer.damaged_versions:
        say(f"{damaged} is damaged and cannot be served; `shopkeeper doctor` says how.")


def show_alias(model: model_pb2.Model, alias: str, *, as_json: bool) -> None:
    """Prints where an alias points."""
    if as_json:
        show_json(model)
        return
    for state in model.aliases:
        if state.alias == alias:
            say(f"{model.name}: {alias} is {state.version} (before: {state.previous_version or 'nothing'}).")
