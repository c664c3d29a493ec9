"""Churn models in the registry: `churn/<version>/{manifest.json, model.json, card.md, reliability.png}`, data only, signed."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from services.profile.domain.boosted_trees import BoostedTrees
from services.profile.domain.churn_features import FEATURES
from services.profile.domain.churn_model import ChurnKind, ChurnModel, Ensemble, objections
from services.profile.domain.classification_quality import Quality
from services.profile.domain.logistic_regression import LogisticRegression
from services.profile.domain.purchase_counts import BgNbd
from services.profile.domain.purchase_values import GammaGamma
from services.profile.domain.reliability_diagram import BLUE, ORANGE, reliability_diagram
from shared.bundle.manifest import (
    CARD,
    MANIFEST,
    SCHEMA_VERSION,
    canonical_json,
    damaged,
    sha256_of,
    sign_manifest,
)
from shared.bundle.registry import PRODUCTION, STAGING_PREFIX, Registry, fsync_directory
from shared.bundle.writer import new_version
from shared.errors import DataLoss, NotFound

MODEL = "churn"
MODEL_FILE = "model.json"
DIAGRAM = "reliability.png"
MAX_MODEL_BYTES = 64 << 20


class ChurnModels:
    """Publishes and loads; implements `ports.ChurnModels`."""

    def __init__(self, root: Path, public_key: Ed25519PublicKey) -> None:
        self._registry = Registry(root)
        self._public_key = public_key

    def current_version(self) -> str | None:
        """See `ports.ChurnModels`."""
        state = self._registry.alias(MODEL, PRODUCTION)
        return state.version if state else None

    def load(self, version: str) -> ChurnModel:
        """See `ports.ChurnModels`."""
        directory = self._registry.version_path(MODEL, version)
        try:
            manifest = self._registry.read_manifest(MODEL, version, self._public_key)
        except NotFound as error:
            raise damaged(directory, MANIFEST, "it is not there") from error
        return _read(directory, manifest)

    def publish(self, model: ChurnModel, signing_key: Ed25519PrivateKey) -> str:
        """Writes a version by one rename, points `production` at it and returns its id.

        Either verdict is published: a version whose gate failed serves the reference.
        """
        now = datetime.now(UTC)
        version = new_version(now)
        parent = self._registry.root / MODEL
        parent.mkdir(parents=True, exist_ok=True)
        staging = parent / f"{STAGING_PREFIX}{version}"
        try:
            staging.mkdir()
            _write(staging / MODEL_FILE, canonical_json(_to_json(model)))
            _write(staging / CARD, _card(version, model).encode())
            _write(staging / DIAGRAM, _diagram(model))
            manifest = {
                "schema_version": SCHEMA_VERSION,
                "model": MODEL,
                "version": version,
                "created_at": now.isoformat(timespec="seconds"),
                "files": {
                    name: dict(zip(("sha256", "bytes"), sha256_of(staging / name), strict=True))
                    for name in (CARD, DIAGRAM, MODEL_FILE)
                },
                "data": {"trained_until": _iso(model.trained_until_us)},
                "hyper_parameters": {"horizon_days": model.horizon_days},
                "metrics": _metrics(model.quality),
                "baselines": {"bg_nbd": _metrics(model.reference_quality)},
                "gate": {"verdict": verdict(model), "reasons": gate_reasons(model)},
            }
            _write(staging / MANIFEST, canonical_json(sign_manifest(manifest, signing_key)))
            fsync_directory(staging)
            # What could not be loaded is not published.
            _read(staging, manifest)
            os.rename(staging, self._registry.version_path(MODEL, version))
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        fsync_directory(parent)
        self._registry.set_alias(
            MODEL, PRODUCTION, version, reason="GATE_PASSED" if verdict(model) == "PASSED" else "PROMOTED"
        )
        return version


def verdict(model: ChurnModel) -> str:
    """Returns whether the ensemble may take the reference's place: PASSED or FAILED."""
    return "PASSED" if model.kind is ChurnKind.BOOSTED_TREES else "FAILED"


def gate_reasons(model: ChurnModel) -> list[str]:
    """Returns why it may not; empty when it may."""
    if model.kind is ChurnKind.BOOSTED_TREES:
        return []
    if model.quality is None or model.reference_quality is None:
        return ["there is too little history for a time split; the reference serves"]
    return [*objections(model.quality, model.reference_quality), "the reference serves"]


def _read(directory: Path, manifest: dict[str, Any]) -> ChurnModel:
    try:
        described = manifest["files"][MODEL_FILE]
        path = directory / MODEL_FILE
        if path.stat().st_size > MAX_MODEL_BYTES:
            raise damaged(directory, MODEL_FILE, f"it is larger than {MAX_MODEL_BYTES} bytes")
        if sha256_of(path) != (described["sha256"], described["bytes"]):
            raise damaged(directory, MODEL_FILE, "its digest does not fit")
        return _from_json(json.loads(path.read_bytes()))
    except DataLoss:
        raise
    except OSError as error:
        raise damaged(directory, MODEL_FILE, error.strerror or str(error)) from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise damaged(directory, MODEL_FILE, f"it is no churn model ({error!r})") from error


def _to_json(model: ChurnModel) -> dict[str, Any]:
    ensemble = model.ensemble
    return {
        "features": list(FEATURES),
        "horizon_days": model.horizon_days,
        "kind": model.kind.name,
        "reference": model.reference.to_json(),
        "values": model.values.to_json() if model.values else None,
        "quality": model.quality.to_json() if model.quality else None,
        "reference_quality": model.reference_quality.to_json() if model.reference_quality else None,
        "trained_until_us": model.trained_until_us,
        "ensemble": None
        if ensemble is None
        else {
            "calibration": list(ensemble.calibration),
            "logistic": {
                "bias": ensemble.logistic.bias,
                "coefficients": ensemble.logistic.coefficient_F.tolist(),
                "means": ensemble.logistic.mean_F.tolist(),
                "scales": ensemble.logistic.scale_F.tolist(),
            },
            "trees": {
                "bias": ensemble.trees.bias,
                "features": ensemble.trees.feature_MV.tolist(),
                # JSON has no infinity.
                "thresholds": np.minimum(ensemble.trees.threshold_MV, np.finfo(np.float64).max).tolist(),
                "leaves": ensemble.trees.leaf_ML.tolist(),
            },
        },
    }


def _from_json(fields: dict[str, Any]) -> ChurnModel:
    if fields["features"] != list(FEATURES):
        raise ValueError("it was trained on other features than this service computes")
    ensemble = None
    if (stored := fields["ensemble"]) is not None:
        logistic, trees = stored["logistic"], stored["trees"]
        bias, own, reference = (float(value) for value in stored["calibration"])
        vectors = [np.array(logistic[name], np.float64) for name in ("coefficients", "means", "scales")]
        features = np.array(trees["features"], np.int64)
        thresholds, leaves = (np.array(trees[name], np.float64) for name in ("thresholds", "leaves"))
        if any(vector.shape != (len(FEATURES),) for vector in vectors):
            raise ValueError("its logistic regression has another number of features")
        nodes = leaves.shape[1] - 1
        if (
            nodes & (nodes + 1)
            or features.shape != thresholds.shape
            or features.shape != (len(leaves), nodes)
        ):
            raise ValueError("its trees do not fit together")
        if features.size and not (features.min() >= 0 and features.max() < len(FEATURES)):
            raise ValueError("its trees ask about features that do not exist")
        if not all(np.isfinite(array).all() for array in (*vectors, thresholds, leaves)):
            raise ValueError("it holds a number that is not finite")
        ensemble = Ensemble(
            LogisticRegression(float(logistic["bias"]), *vectors),
            BoostedTrees(float(trees["bias"]), features, thresholds, leaves),
            (bias, own, reference),
        )
    horizon = int(fields["horizon_days"])
    if not 1 <= horizon <= 365:
        raise ValueError("its horizon is out of range")
    return ChurnModel(
        horizon,
        ChurnKind[fields["kind"]],
        BgNbd.from_json(fields["reference"]),
        GammaGamma.from_json(fields["values"]) if fields["values"] else None,
        ensemble,
        Quality.from_json(fields["quality"]) if fields["quality"] else None,
        Quality.from_json(fields["reference_quality"]) if fields["reference_quality"] else None,
        int(fields["trained_until_us"]),
    )


def _metrics(quality: Quality | None) -> dict[str, Any]:
    if quality is None:
        return {}
    return {name: {"value": value} for name, value in asdict(quality).items() if name != "reliability"}


def _card(version: str, model: ChurnModel) -> str:
    lines = [
        f"# Churn model {version}",
        "",
        f"Probability of no purchase within {model.horizon_days} days. Verdict: {verdict(model)}.",
        *(f"- {reason}" for reason in gate_reasons(model)),
        "",
        "| on the test day | AUC | logarithmic loss | calibration error |",
        "|---|---|---|---|",
    ]
    for name, quality in (("model", model.quality), ("BG/NBD", model.reference_quality)):
        if quality is not None:
            lines.append(
                f"| {name} | {quality.auc:.4f} | {quality.log_loss:.4f} | {quality.expected_calibration_error:.4f} |"
            )
    lines += [
        "",
        f"![reliability]({DIAGRAM})",
        "",
        "Predicted across, observed upwards; blue the model, orange BG/NBD, the area of a dot by its shoppers.",
    ]
    for name, quality in (("model", model.quality), ("BG/NBD", model.reference_quality)):
        if quality is not None:
            lines += [
                "",
                f"Reliability of the {name}:",
                "",
                "| predicted | observed | shoppers |",
                "|---|---|---|",
            ]
            lines += [
                f"| {b.mean_predicted:.3f} | {b.observed_share:.3f} | {b.count} |"
                for b in quality.reliability
            ]
    return "\n".join(lines) + "\n"


def _diagram(model: ChurnModel) -> bytes:
    qualities = ((model.reference_quality, ORANGE), (model.quality, BLUE))
    return reliability_diagram([(one.reliability, colour) for one, colour in qualities if one is not None])


def _iso(time_us: int) -> str:
    return datetime.fromtimestamp(time_us / 1e6, UTC).isoformat(timespec="seconds")


def _write(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
