from __future__ import annotations

from pathlib import Path

import pytest

from shared.settings import ServiceSettings, load_settings


def test_every_wrong_setting_is_reported_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SHOPKEEPER_LISTEN", "nowhere")
    monkeypatch.setenv("SHOPKEEPER_WORKERS", "many")
    monkeypatch.setenv("SHOPKEEPER_LOG_LEVEL", "loud")
    with pytest.raises(SystemExit) as ended:
        load_settings(ServiceSettings)
    assert ended.value.code == 2
    problems = capsys.readouterr().err.splitlines()
    assert {line.split(":")[0] for line in problems} == {
        "SHOPKEEPER_LISTEN",
        "SHOPKEEPER_WORKERS",
        "SHOPKEEPER_LOG_LEVEL",
    }


def test_registry_and_keys_lie_under_home_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOPKEEPER_HOME", "/data")
    monkeypatch.setenv("SHOPKEEPER_KEYS", "/secrets")
    settings = load_settings(ServiceSettings)
    assert settings.registry_path == Path("/data/registry")
    assert settings.keys_path == Path("/secrets")


def test_the_database_url_has_the_name_that_operators_know(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://somewhere/shop")
    assert load_settings(ServiceSettings).database_url == "postgresql://somewhere/shop"


def test_every_setting_is_described() -> None:
    assert [name for name, field in ServiceSettings.model_fields.items() if not field.description] == []


def test_a_secret_comes_from_a_file_and_a_variable_goes_before_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "DATABASE_URL").write_text("postgresql://from-a-file/shop\n")
    monkeypatch.delenv("DATABASE_URL", raising=False)
    monkeypatch.setenv("SHOPKEEPER_SECRETS", str(tmp_path))
    assert load_settings(ServiceSettings).database_url == "postgresql://from-a-file/shop"
    monkeypatch.setenv("DATABASE_URL", "postgresql://from-a-variable/shop")
    assert load_settings(ServiceSettings).database_url == "postgresql://from-a-variable/shop"
