"""Old model versions go, unless something points at them."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

from services.trainer.retirement import Retirement
from shared.bundle import Registry
from shared.telemetry import get_logger

NOW = datetime(2026, 7, 1, tzinfo=UTC)


def registry_of(root: Path, **ages_days: int) -> Registry:
    for version, days in ages_days.items():
        (root / "main" / version).mkdir(parents=True)
        manifest = {
            "schema_version": 1,
            "model": "main",
            "version": version,
            "created_at": (NOW - timedelta(days=days)).isoformat(),
        }
        (root / "main" / version / "manifest.json").write_text(json.dumps(manifest))
    return Registry(root)


def retired(registry: Registry) -> list[str]:
    return [v for _, v in Retirement(registry, 30, get_logger("trainer"), lambda: NOW).run()]


def test_versions_older_than_the_retention_are_removed(tmp_path: Path) -> None:
    registry = registry_of(tmp_path, v1=31, v2=30, v3=29)
    assert retired(registry) == ["v2", "v1"]
    assert registry.list_versions("main") == ["v3"]
    assert sorted(path.name for path in (tmp_path / "main").iterdir()) == ["aliases", "v3"]


def test_a_version_that_an_alias_names_stays_until_it_is_replaced(tmp_path: Path) -> None:
    registry = registry_of(tmp_path, v1=90, v2=1)
    registry.set_alias("main", "production", "v1", reason="PROMOTED")
    assert retired(registry) == []
    registry.set_alias("main", "production", "v2", reason="PROMOTED")
    assert retired(registry) == ["v1"]


def test_a_removal_cut_short_is_completed(tmp_path: Path) -> None:
    registry = registry_of(tmp_path, v2=31)
    (tmp_path / "main" / ".retired-v1").mkdir()
    assert retired(registry) == ["v2"]
    assert not (tmp_path / "main" / ".retired-v1").exists()


def test_a_damaged_manifest_keeps_nothing_else_from_going(tmp_path: Path) -> None:
    registry = registry_of(tmp_path, v1=31, v2=31)
    (tmp_path / "main" / "v2" / "manifest.json").write_text("{")
    assert retired(registry) == ["v1"]
