"""A release is the same whoever makes it, and carries nothing under terms that it may not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from deploy import licences
from tests.deploy.kustomize import REPOSITORY


@pytest.mark.slow
def test_two_releases_of_one_commit_are_alike_byte_for_byte(tmp_path: Path) -> None:
    sums = []
    for name in ("one", "other"):
        outcome = subprocess.run(
            [REPOSITORY / "deploy" / "release.sh", "9.9.9", tmp_path / name],
            env={
                **os.environ, "ALLOW_DIRTY": "1", "NO_IMAGES": "1", "PYTHON": sys.executable, "TOOLS": str(tmp_path / "tools"),
            },
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        if outcome.returncode == 3:
            pytest.skip(outcome.stderr)
        assert outcome.returncode == 0, outcome.stderr
        sums.append((tmp_path / name / "SHA256SUMS").read_text())
    assert sums[0] == sums[1]
    assert "shopkeeper_protos-" in sums[0]
    assert "CHANGELOG.md" in sums[0]
    for image in (*licences.IMAGES, "registry-mirror"):
        assert f"sbom-{image}.cdx.json" in sums[0]
    parts = json.loads((tmp_path / "one" / "sbom-recommend.cdx.json").read_text())["components"]
    assert {part["name"] for part in parts} >= {"grpcio", "numpy", "ai-edge-litert"}
    assert len((tmp_path / "one" / "CHANGELOG.md").read_text().splitlines()) > 10


def test_everything_that_images_carry_may_be_given_on() -> None:
    report, wrong = licences.report()
    assert wrong == []
    assert "| grpcio |" in report


@pytest.mark.parametrize("text", ["GPL-3.0-only", "GNU General Public License v3", "AGPL-3.0", "SSPL-1.0"])
def test_terms_that_bind_the_suite_are_refused(text: str) -> None:
    assert licences.REFUSED.search(text)


@pytest.mark.parametrize(
    "text", ["LGPL-3.0-only", "GNU Lesser General Public License v3 (LGPLv3)", "Apache-2.0", "BSD-3-Clause"]
)
def test_terms_that_only_ask_to_be_named_pass(text: str) -> None:
    assert not licences.REFUSED.search(text)
    assert licences.ALLOWED.search(text)
