"""A newcomer's first hour with the command line, against the real suite that it starts."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.integration.suite import eventually

COMMAND = Path(sys.executable).parent / "shopkeeper"

pytestmark = pytest.mark.slow


class Terminal:
    """Runs commands in one home directory."""

    def __init__(self, home: Path) -> None:
        self.home = home

    def run(self, *arguments: str, seconds: float = 120.0) -> subprocess.CompletedProcess[str]:
        environment = {
            k: v for k, v in os.environ.items() if not k.startswith("SHOPKEEPER_") and k != "DATABASE_URL"
        }
        outcome = subprocess.run(
            [COMMAND, *arguments, "--home", str(self.home)],
            capture_output=True,
            text=True,
            timeout=seconds,
            env=environment,
            stdin=subprocess.DEVNULL,
            check=False,
        )
        assert "Traceback" not in outcome.stderr
        return outcome

    def json(self, *arguments: str, seconds: float = 120.0) -> dict:
        outcome = self.run(*arguments, "--json", seconds=seconds)
        assert outcome.returncode == 0, outcome.stderr
        return json.loads(outcome.stdout)


def free_port_range() -> int:
    """Returns a port that is free, as are the next three, and the same four a hundred higher."""
    for _ in range(100):
        first = random.randrange(20_000, 28_000)  # Below the range from which the kernel picks.
        try:
            for port in [first + n for n in (0, 1, 2, 3, 100, 101, 102, 103)]:
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first
    raise AssertionError("no free ports")


@pytest.fixture(scope="module")
def terminal(postgres_homes: Callable[[], Path]) -> Iterator[Terminal]:
    terminal = Terminal(postgres_homes())
    first_port = free_port_range()
    try:
        up = terminal.run("up", "--first-port", str(first_port), "--detach")
        assert up.returncode == 0, up.stderr
        yield terminal
    finally:
        terminal.run("down")


@pytest.fixture(scope="module")
def stocked(terminal: Terminal) -> Terminal:
    made = terminal.run("simulate", "--shoppers", "300", "--items", "60", "--days", "30")
    assert made.returncode == 0, made.stderr
    assert "SIMULATION" in made.stdout + made.stderr
    return terminal


@pytest.fixture(scope="module")
def trained(stocked: Terminal) -> Terminal:
    run = stocked.run("train", "--watch", "--size", "tiny", "--max-seconds", "10")
    assert run.returncode == 0, run.stdout + run.stderr
    return stocked


def test_before_anything_runs_the_remedy_is_named(tmp_path: Path) -> None:
    terminal = Terminal(tmp_path / "nothing")
    outcome = terminal.run("recommend", "alice")
    if outcome.returncode == 0:
        pytest.skip("a suite answers at the usual ports of this machine")
    assert outcome.returncode == 3
    assert "shopkeeper up" in outcome.stderr
    assert terminal.run("doctor").returncode == 1


def test_a_second_suite_in_the_same_home_is_refused(terminal: Terminal) -> None:
    again = terminal.run("up", "--detach")
    assert again.returncode == 2
    assert "shopkeeper down" in again.stderr


def test_the_doctor_finds_a_healthy_suite_healthy(terminal: Terminal) -> None:
    assert terminal.run("doctor").returncode == 0


def test_a_model_is_listed_with_its_gate_and_alias(trained: Terminal) -> None:
    text = json.dumps(trained.json("models"))
    assert "production" in text
    assert "PASSED" in text


def test_what_a_simulation_says_is_labelled_wherever_it_is_said(trained: Terminal) -> None:
    (version,) = trained.json("models")["model_versions"]
    assert version["evaluation"]["protocol"].startswith("SIMULATION")
    assert "SIMULATION" in trained.run("models").stdout
    assert "SIMULATION" in trained.run("metrics").stdout
    assert trained.json("metrics")["label"] == "SIMULATION"
    (card,) = trained.home.glob("registry/main/*/card.md")
    assert "**SIMULATION" in card.read_text()


def test_a_shopper_is_recommended_something_and_told_why(trained: Terminal) -> None:
    answer = trained.json("recommend", "shopper-00001", "-n", "3")
    assert [item["position"] for item in answer["items"]] == [1, 2, 3]
    assert all(item["reasons"] for item in answer["items"])
    first = answer["items"][0]["item_id"]
    explained = trained.json("explain", "shopper-00001", first)
    assert explained["recommended"] is True


def test_a_wrong_filter_is_shown_with_its_place(trained: Terminal) -> None:
    outcome = trained.run("recommend", "shopper-00001", "--filter", "price < oops")
    assert outcome.returncode == 2
    assert "column 9" in outcome.stderr


def test_nothing_to_roll_back_to_is_said(trained: Terminal) -> None:
    outcome = trained.run("rollback")
    assert outcome.returncode == 1
    assert "NO_PREVIOUS_VERSION" in outcome.stderr


def test_a_version_is_made_again_from_what_it_was_trained_on(trained: Terminal) -> None:
    (made,) = trained.json("models")["model_versions"]
    again = trained.run("train", "--repeat", "production", "--no-promote", "--watch", "--json")
    # It cannot beat the version that it repeats, so the gate fails it.
    assert again.returncode == 1, again.stderr
    run = json.loads(again.stdout)
    assert run["state"] == "STATE_SUCCEEDED"
    assert run["data_snapshot"] == made["data"]["data_snapshot"]
    refused = trained.run("train", "--repeat", "nothing")
    assert refused.returncode == 2
    assert "MODEL_VERSION_NOT_FOUND" in refused.stderr


def test_a_forgotten_shopper_has_no_profile(trained: Terminal) -> None:
    assert trained.json("profile", "shopper-00002")["live"]["history"]
    receipt = trained.json("forget", "shopper-00002", "--yes")
    anew = trained.json("receipt", receipt["receipt_id"])
    assert anew["model_versions"] == receipt["model_versions"] != []
    eventually(
        "the profile is empty",
        lambda: not trained.json("profile", "shopper-00002").get("live", {}).get("history"),
    )


def test_items_that_the_catalogue_does_not_know_are_listed(trained: Terminal) -> None:
    def compared() -> bool:
        return trained.json("unknown-items")["compared"] is not None

    eventually("the log is compared with the catalogue", compared)
    assert trained.json("unknown-items")["total"] == 0


def test_a_crashed_service_is_started_again(trained: Terminal) -> None:
    def of_this_home() -> dict[int, psutil.Process]:
        found = {}
        for process in psutil.process_iter():
            try:
                if "services.profile" in process.cmdline() and process.environ().get(
                    "SHOPKEEPER_HOME"
                ) == str(trained.home):
                    found[process.pid] = process
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    (victim,) = of_this_home()
    os.kill(victim, signal.SIGKILL)
    eventually("another process serves", lambda: set(of_this_home()) - {victim})
    eventually("the doctor is content", lambda: trained.run("doctor").returncode == 0, 60)


def test_a_file_with_bad_rows_brings_in_the_others(trained: Terminal, tmp_path: Path) -> None:
    events = tmp_path / "events.csv"
    events.write_text(
        "user_id,item_id,timestamp,event_type\n"
        "ann,item-00001,2026-01-02T10:00:00Z,view\n"
        "ben,item-00002,not a date,view\n"
        "cid,item-00003,2026-01-02T10:02:00Z,view\n"
    )
    outcome = trained.run("import", str(events))
    assert outcome.returncode == 1, outcome.stdout + outcome.stderr
    said = outcome.stdout + outcome.stderr
    assert "not a date" in said
    assert "events.csv" in said
    assert len(trained.json("profile", "ann")["live"]["history"]) == 1
    missing = trained.run("import", str(tmp_path / "nowhere.csv"))
    assert missing.returncode == 2
