"""The command line: every failure is one clear line with a remedy and a documented exit code."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from shared.cli.app import app
from shared.cli.installation import SERVICES, Installation, RunState, configured_addresses, free_first_port
from shared.cli.output import EXIT_PROBLEMS, EXIT_UNREACHABLE, EXIT_USAGE

COMMANDS = (
    "up", "down", "import", "mappings", "simulate", "train", "watch", "models", "promote", "rollback", "recommend",
    "explain", "profile", "forget", "receipt", "verify-receipt", "unknown-items", "metrics", "doctor", "demo",
)  # fmt: skip


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home whose services are nowhere: the ports are free."""
    first = free_first_port(21_000)
    for name, address in configured_addresses(first).items():
        monkeypatch.setenv(f"SHOPKEEPER_{name.upper()}_ADDRESS", address)
    monkeypatch.delenv("DATABASE_URL", raising=False)
    monkeypatch.setenv("SHOPKEEPER_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def is_one_clear_line(result: Result) -> bool:
    return "Traceback" not in result.output and len(result.stderr.strip().splitlines()) == 1


def test_help_names_every_command_and_the_exit_codes() -> None:
    result = run("--help")
    assert result.exit_code == 0
    assert all(command in result.output for command in COMMANDS)
    assert "Exit codes: 0" in result.output


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_says_the_exit_codes(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "Exit codes" in result.output


@pytest.mark.parametrize(
    "arguments",
    [("recommend", "u"), ("profile", "u"), ("explain", "u", "i"), ("models",), ("promote", "v"), ("rollback",),
     ("forget", "u", "--yes"), ("receipt", "r"), ("unknown-items",), ("metrics",)],
)  # fmt: skip
def test_without_a_suite_a_command_says_how_to_start_one(home: Path, arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert result.exit_code == EXIT_UNREACHABLE
    assert is_one_clear_line(result)
    assert "shopkeeper up" in result.stderr


def test_an_error_is_json_where_json_was_asked_for(home: Path) -> None:
    result = run("models", "--json")
    assert result.exit_code == EXIT_UNREACHABLE
    assert json.loads(result.stderr)["error"]["reason"] == "SERVICE_UNREACHABLE"
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("import", "/nowhere/at/all"), "does not exist"),
        (("train", "--size", "huge"), "tiny, small, base, large"),
        (("forget", "u"), "--yes"),
        (("simulate", "--items", "3"), "24"),
        (("recommend",), "Missing argument"),
    ],
)
def test_wrong_usage_is_exit_code_2(home: Path, arguments: tuple[str, ...], told: str) -> None:
    result = run(*arguments)
    assert result.exit_code == EXIT_USAGE
    assert told in result.output
    assert "Traceback" not in result.output


def test_a_bad_mapping_is_named_before_anything_is_sent(home: Path, tmp_path: Path) -> None:
    mapping = tmp_path / "m.yaml"
    mapping.write_text("name: x\nsorces: []\n")
    (tmp_path / "x.csv").write_text("a\n1\n")
    result = run("import", str(tmp_path / "x.csv"), "--mapping", str(mapping))
    assert result.exit_code == EXIT_USAGE
    assert is_one_clear_line(result)
    assert "'sources'" in result.stderr


def test_a_taken_port_is_one_line_that_names_the_port_and_the_remedy(home: Path) -> None:
    first = free_first_port(22_000)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", first + 1))
        taken.listen()
        result = run("up", "--first-port", str(first))
    assert result.exit_code == EXIT_USAGE
    assert is_one_clear_line(result)
    assert f"Port {first + 1} on 127.0.0.1, which profile needs, is taken" in result.stderr
    assert "--first-port" in result.stderr


def test_a_home_that_cannot_be_made_is_named(home: Path, tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    result = run("up", "--home", str(blocker / "home"))
    assert result.exit_code == EXIT_USAGE
    assert is_one_clear_line(result)
    assert "--home" in result.stderr


def test_an_unreachable_database_is_one_line_without_its_password(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://shop:secret-word@127.0.0.1:1/shop")
    result = run("up")
    assert result.exit_code == EXIT_UNREACHABLE
    assert "DATABASE_URL" in result.stderr
    assert "secret-word" not in result.output
    assert "Traceback" not in result.output


def test_a_wrong_setting_is_named_without_a_traceback(home: Path) -> None:
    environment = {"SHOPKEEPER_DRAIN_SECONDS": "soon", "PATH": "/usr/bin:/bin", "SHOPKEEPER_HOME": str(home)}
    finished = subprocess.run(
        [sys.executable, "-m", "shared.cli.app", "models"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == EXIT_USAGE
    assert "SHOPKEEPER_DRAIN_SECONDS" in finished.stderr
    assert "Traceback" not in finished.stderr


def test_output_that_is_no_terminal_has_no_control_characters(home: Path) -> None:
    output = run("mappings").output + run("doctor").output + run("models").output
    assert "\x1b" not in output
    assert "\r" not in output


def test_down_where_nothing_is_up_is_fine(home: Path) -> None:
    assert run("down").exit_code == 0


def test_a_second_up_names_the_first(home: Path) -> None:
    import os

    installation = Installation(home)
    installation.write_state(
        RunState(os.getppid(), configured_addresses(), {}, {}, "embedded", 0.0, ready=True)
    )
    result = run("up")
    assert result.exit_code == EXIT_USAGE
    assert "shopkeeper down" in result.stderr


def test_the_state_of_a_dead_supervisor_is_not_believed(home: Path) -> None:
    finished = subprocess.Popen([sys.executable, "-c", ""])
    finished.wait()
    installation = Installation(home)
    installation.write_state(
        RunState(finished.pid, configured_addresses(), {}, {}, "embedded", 0.0, ready=True)
    )
    assert installation.running() is None


def test_the_state_file_is_private_and_gives_the_addresses(home: Path) -> None:
    import os

    installation = Installation(home)
    addresses = {name: f"127.0.0.1:{9_000 + n}" for n, name in enumerate(SERVICES)}
    installation.write_state(RunState(os.getpid(), addresses, {}, {}, "embedded", 0.0, ready=True))
    assert installation.addresses() == addresses
    assert installation.state_path.stat().st_mode & 0o077 == 0


def test_the_demo_erases_nothing_that_no_demo_made(home: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "diary.txt").write_text("dear diary")
    result = run("demo", "--once", "--home", str(precious))
    assert result.exit_code == EXIT_USAGE
    assert (precious / "diary.txt").read_text() == "dear diary"


# Doctor.


def findings(result: Result) -> dict[str, dict[str, str]]:
    return {finding["check"]: finding for finding in json.loads(result.stdout)}


def test_doctor_finds_that_nothing_is_up_and_says_the_remedy(home: Path) -> None:
    result = run("doctor", "--json")
    assert result.exit_code == EXIT_PROBLEMS
    found = findings(result)
    assert found["feedback"]["verdict"] == "wrong"
    assert "shopkeeper up" in found["feedback"]["remedy"]
    assert all(f["remedy"] for f in found.values() if f["verdict"] != "ok")


def test_doctor_finds_keys_that_are_missing_or_that_others_may_read(home: Path) -> None:
    from shared.keys import ensure_development_keys

    keys = home / "keys"
    ensure_development_keys(keys)
    (keys / "master_key.hex").unlink()
    (keys / "token_key.hex").chmod(0o644)
    found = findings(run("doctor", "--json"))
    assert found["key master_key"]["verdict"] == "wrong"
    assert found["key token_key.hex"]["remedy"] == f"chmod 600 {keys / 'token_key.hex'}"


def test_doctor_finds_another_program_on_a_port(home: Path) -> None:
    address = Installation(home).addresses()["trainer"]
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", int(address.rpartition(":")[2])))
        taken.listen()
        found = findings(run("doctor", "--json"))
    assert "another program" in found["trainer"]["finding"] or "DEADLINE" in found["trainer"]["finding"]
    assert found["trainer"]["verdict"] == "wrong"


def test_doctor_finds_an_unreachable_database(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://shop:secret-word@127.0.0.1:1/shop")
    result = run("doctor", "--json")
    assert findings(result)["database"]["verdict"] == "wrong"
    assert "secret-word" not in result.output


def test_doctor_finds_commits_that_are_not_durable_and_schemas_that_are_not_migrated(
    home: Path, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from psycopg.conninfo import conninfo_to_dict, make_conninfo

    options = conninfo_to_dict(database_url).get("options") or ""
    monkeypatch.setenv(
        "DATABASE_URL", make_conninfo(database_url, options=f"{options} -c synchronous_commit=off")
    )
    found = findings(run("doctor", "--json"))
    assert found["database commits"]["verdict"] == "wrong"
    assert found["schema feedback"]["remedy"] == "python -m services.feedback migrate"
