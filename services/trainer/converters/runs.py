"""Runs and their journals."""

from __future__ import annotations

from shopkeeper.trainer.v1 import model_pb2, training_run_pb2

from services.trainer.converters.config import config_to_proto
from services.trainer.converters.data_snapshots import snapshot_to_proto
from services.trainer.converters.models import gate_to_proto, report_to_proto
from services.trainer.converters.times import timestamp
from services.trainer.domain.runs import Progress, TrainingRun


def run_to_proto(run: TrainingRun) -> training_run_pb2.TrainingRun:
    """Returns the run as the contract shows it."""
    message = training_run_pb2.TrainingRun(
        run_id=run.run_id,
        model=run.model,
        kind=training_run_pb2.TrainingRun.Kind.Value(f"KIND_{run.task.kind}"),
        state=training_run_pb2.TrainingRun.State.Value(f"STATE_{run.state}"),
        stage=training_run_pb2.TrainingRun.Stage.Value(f"STAGE_{run.stage}"),
        config=config_to_proto(run.config),
        create_time=timestamp(run.created_at),
        version=run.version,
        cancel_comment=run.cancel_comment,
        promoted=run.promoted,
        schedule_id=run.schedule_id,
        evaluation=report_to_proto(run.evaluation) if run.evaluation else None,
        data_snapshot=snapshot_to_proto(run.data_snapshot) if run.data_snapshot else None,
        trials=[
            training_run_pb2.TuningTrial(
                trial_number=trial.trial_number,
                hyper_parameters=training_run_pb2.HyperParameters(**trial.overrides),  # type: ignore[arg-type]
                validation_ndcg_at_10=trial.validation_ndcg_at_10,
                elapsed_seconds=trial.elapsed_seconds,
            )
            for trial in run.trials
        ],
    )
    if run.started_at:
        message.start_time.CopyFrom(timestamp(run.started_at))
    if run.ended_at:
        message.end_time.CopyFrom(timestamp(run.ended_at))
    if run.latest_progress:
        message.latest_progress.CopyFrom(progress_to_proto(run.latest_progress))
    if run.gate:
        message.gate.CopyFrom(gate_to_proto(run.gate))
    if run.failure:
        message.failure.CopyFrom(
            training_run_pb2.RunFailure(reason=run.failure.reason, message=run.failure.message)
        )
    return message


def progress_to_proto(progress: Progress) -> training_run_pb2.TrainingProgress:
    """Returns a journal entry as the contract shows it."""
    return training_run_pb2.TrainingProgress(
        sequence_number=progress.sequence_number,
        create_time=timestamp(progress.created_at),
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
