"""Every test that the threat model names is there."""

from __future__ import annotations

import re

import pytest

from tests.architecture.test_arrows import REPOSITORY

TEXT = (REPOSITORY / "docs" / "security.md").read_text()


def named() -> list[tuple[str, str]]:
    """Returns (file, test or nothing) of each mention; `…` is the file before."""
    found, file = [], ""
    for mention in re.findall(r"`((?:tests/[\w/]+\.py|…)(?:::\w+)?)`", TEXT):
        path, _, test = mention.partition("::")
        file = file if path == "…" else path
        found.append((file, test))
    return found


@pytest.mark.parametrize(("file", "test"), named())
def test_the_test_of_a_threat_exists(file: str, test: str) -> None:
    text = (REPOSITORY / file).read_text()
    assert not test or f"def {test}(" in text


def test_every_threat_has_a_test() -> None:
    table = TEXT.partition("## Threats")[2].partition("### Open")[0]
    rows = [row for row in table.splitlines() if row.startswith("| ") and not row.startswith("| an attacker")]
    assert len(rows) >= 15
    assert [row for row in rows if "`tests/" not in row and "`…::" not in row] == []
