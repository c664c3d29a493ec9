"""Renders what lies in deploy/k8s with the kustomize inside of kubectl."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
K8S = REPOSITORY / "deploy" / "k8s"
OVERLAYS = sorted(path.name for path in (K8S / "overlays").iterdir() if path.is_dir())
COMPONENTS = sorted(path.name for path in (K8S / "components").iterdir() if path.is_dir())
# single-node makes smaller what others bring.
NEEDS = {"single-node": ["registry-pvc"]}
TARGETS = [*(f"overlays/{name}" for name in OVERLAYS), "base", *(f"components/{name}" for name in COMPONENTS)]


def kubectl() -> str:
    """Returns the program, or skips."""
    program = shutil.which("kubectl")
    if program is None:
        pytest.skip("kubectl is not installed: deploy/k8s is not rendered here")
    return program


@functools.cache
def rendered(target: str) -> str:
    """Returns the YAML of an overlay, of the base, or of a component over the base."""
    if not target.startswith("components/"):
        return _build(K8S / target)
    name = target.removeprefix("components/")
    # Beside the base: kustomize wants relative paths.
    with tempfile.TemporaryDirectory(prefix=".render-", dir=K8S) as directory:
        components = "".join(f"  - ../components/{each}\n" for each in [*NEEDS.get(name, []), name])
        Path(directory, "kustomization.yaml").write_text(
            "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\nnamespace: shopkeeper\n"
            f"resources:\n  - ../base\ncomponents:\n{components}"
        )
        return _build(Path(directory))


def objects(target: str) -> list[dict[str, Any]]:
    """Returns the objects of a target."""
    return [each for each in yaml.safe_load_all(rendered(target)) if each]


def pod_of(manifest: dict[str, Any]) -> dict[str, Any] | None:
    """Returns the pod's spec inside of a workload, or None."""
    spec = manifest.get("spec") or {}
    if manifest["kind"] == "CronJob":
        spec = spec["jobTemplate"]["spec"]
    if manifest["kind"] in {"Deployment", "StatefulSet", "Job", "CronJob"}:
        pod: dict[str, Any] = spec["template"]["spec"]
        return pod
    return None


def _build(directory: Path) -> str:
    outcome = subprocess.run(
        [kubectl(), "kustomize", str(directory)],
        capture_output=True, text=True, timeout=60, env={**os.environ, "HOME": str(directory)},
    )  # fmt: skip
    assert outcome.returncode == 0, outcome.stderr
    # A warning is a construct that the next version refuses.
    assert not outcome.stderr.strip(), outcome.stderr
    return outcome.stdout
