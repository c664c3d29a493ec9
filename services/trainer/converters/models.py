"""Models, versions, aliases and measures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from shopkeeper.trainer.v1 import model_pb2

from services.trainer.converters.data_snapshots import snapshot_to_proto
from services.trainer.converters.privacy import guarantee_to_proto
from services.trainer.converters.times import time_of
from services.trainer.domain.runs import Alias, DataSnapshot, Model, ModelVersion


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
        change_time=time_of(alias.changed_at),
        cause=_cause(alias.cause),
        history=[
            model_pb2.AliasChange(
                version=change.version,
                previous_version=change.previous or "",
                change_time=time_of(change.changed_at),
                cause=_cause(change.cause),
                comment=change.comment,
            )
            for change in alias.history
        ],
    )


def version_to_proto(version: ModelVersion) -> model_pb2.ModelVersion:
    """Returns a version as the contract shows it."""
    manifest = version.manifest
    data = manifest.get("data", {})
    message = model_pb2.ModelVersion(
        model=version.model,
        version=version.version,
        create_time=time_of(manifest["created_at"]),
        run_id=manifest.get("run_id", ""),
        evaluation=report_to_proto(manifest),
        gate=gate_to_proto(manifest.get("gate", {})),
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
    if manifest.get("privacy"):
        message.privacy.CopyFrom(guarantee_to_proto(manifest["privacy"]))
    if data.get("snapshot"):
        watermark = bytes.fromhex(data.get("watermark", "")).decode()
        snapshot = DataSnapshot(data["snapshot"], data.get("catalogue", ""), watermark)
        message.data.data_snapshot.CopyFrom(snapshot_to_proto(snapshot))
    if data.get("first_event_at"):
        message.data.first_event_time.CopyFrom(time_of(data["first_event_at"]))
        message.data.last_event_time.CopyFrom(time_of(data["last_event_at"]))
    return message


def report_to_proto(fields: Mapping[str, Any]) -> model_pb2.EvaluationReport:
    """Returns measures in the manifest's form as the contract shows them."""
    evaluation = fields.get("evaluation", {})
    metrics, baselines = fields.get("metrics", {}), fields.get("baselines", {})
    return model_pb2.EvaluationReport(
        metrics=metrics_to_proto(metrics),
        ladder=[
            model_pb2.LadderRung(name=name, metrics=metrics_to_proto(values))
            for name, values in [("blend", metrics), *baselines.items()]
        ],
        slices=[
            model_pb2.Slice(
                name=part["name"],
                user_count=part["users"],
                metrics=metrics_to_proto(part["metrics"]),
                incumbent_metrics=metrics_to_proto(part.get("incumbent_metrics", {})),
            )
            for part in fields.get("slices", [])
        ],
        user_count=evaluation.get("users", 0),
        protocol=evaluation.get("protocol", ""),
        confidence=evaluation.get("confidence", 0.0),
    )


def metrics_to_proto(values: Mapping[str, Any]) -> list[model_pb2.Metric]:
    """Returns the manifest's measures as the contract shows them."""
    return [
        model_pb2.Metric(name=name, value=entry["value"], low=entry["low"], high=entry["high"])
        for name, entry in values.items()
    ]


def gate_to_proto(gate: Mapping[str, Any]) -> model_pb2.Gate:
    """Returns the manifest's verdict as the contract shows it."""
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
