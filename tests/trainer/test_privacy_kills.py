"""Private runs killed before, amid and after their charge: never computed uncharged, never refunded, none charged twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
from shopkeeper.trainer.v1 import trainer_service_pb2 as pb

from shared.bundle import Registry
from shared.database import Database
from tests.trainer.conftest import CATALOGUE_ITEMS as ITEMS
from tests.trainer.conftest import eventually, walk
from tests.trainer.test_privacy_ledger import charge_of_one, ledger_of
from tests.trainer.test_privacy_runs import State, ended, request_of

# A private run over a made-up log, which dies at a place of the ledger's conversation with PostgreSQL. It says when it
# first touches anything of people.
PROGRAM = textwrap.dedent(
    """
    import os, signal, sys
    import psycopg
    from services.trainer.domain.privacy import DifferentialPrivacy, PrivacyCharge
    from services.trainer.pipeline.plan import Plan
    from services.trainer.privacy import training
    from services.trainer.privacy.accounting import epsilon_of_ledger
    from services.trainer.privacy.ledger import PostgresPrivacyLedger
    from shared.database import Database
    from tests.trainer.conftest import columns_of, walk

    url, attempt, fatal = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    ledger = PostgresPrivacyLedger(Database(url, schema="trainer"), 10.0, 1e-5, epsilon_of_ledger)
    ledger.budget("main")
    places = 0

    def fatal_here(what):
        global places
        if places == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        print(f"place {places} {what.strip()}", flush=True)
        places += 1

    def watched(owner, name):
        original = getattr(owner, name)
        def call(self, *arguments, **named):
            words = str(arguments[0]).split(" (")[0][:40] if arguments else ""
            fatal_here(f"before {name} {words}")
            found = original(self, *arguments, **named)
            fatal_here(f"after {name} {words}")
            return found
        setattr(owner, name, call)

    original_over = training.over_catalogue
    def over(*arguments):
        print("touched", flush=True)
        return original_over(*arguments)
    training.over_catalogue = over

    def charge(releases):
        for owner, name in ((psycopg.Cursor, "execute"), (psycopg.Connection, "commit")):
            watched(owner, name)
        ledger.charge(PrivacyCharge("killed", attempt, "main", 1.0, 1e-6, "COUNTS", tuple(releases)))
        fatal_here("after the charge")

    catalogue = {f"item-{index}": ["shelf=1"] for index in range(40)}
    training.train_privately(
        columns_of(walk(users=50, items=40)), catalogue, DifferentialPrivacy(1.0), Plan(), model_name="main",
        report=lambda *_, **__: None, charge=charge,
    )
    print("published", flush=True)
    """
)

EVERY_PLACE = os.environ.get("SHOPKEEPER_CHARGE_KILLS") == "all"


@pytest.fixture
def database(migrate_services: Callable[..., str], database_url: str) -> Iterator[Database]:
    migrate_services("trainer")
    opened = Database(database_url, schema="trainer")
    yield opened
    opened.close()


def run_until(database_url: str, attempt: int, fatal: int) -> list[str]:
    """Returns what a run said that dies at a place; -1 is nowhere."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, database_url, str(attempt), str(fatal)],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
    )
    assert done.returncode == (0 if fatal < 0 else -signal.SIGKILL)
    return done.stdout.splitlines()


def attempts_charged(database: Database) -> list[int]:
    return sorted(charge.attempt for charge in ledger_of(database, 10).budget("main").charges)


def test_a_run_killed_before_or_after_any_statement_of_its_charge_has_touched_nobody_uncharged(
    database: Database, database_url: str
) -> None:
    whole = run_until(database_url, 1, -1)
    assert whole[-1] == "published"
    places = [line.split(" ", 2)[2] for line in whole if line.startswith("place")]
    assert attempts_charged(database) == [1]
    committed = places.index("after commit")
    inserted = next(place for place, what in enumerate(places) if what.startswith("before execute INSERT"))
    assert inserted < committed < places.index("after the charge")
    expected = [1]
    # Each place costs a process: those around the commit, and with `make verify-privacy` every other.
    fatal_places = list(range(len(places))) if EVERY_PLACE else [committed - 1, committed]
    for attempt, fatal in enumerate(fatal_places, 2):
        said = run_until(database_url, attempt, fatal)
        assert "touched" not in said
        if fatal >= committed:
            expected.append(attempt)
        # No refund, and nothing charged twice, however it died.
        assert attempts_charged(database) == expected, places[fatal]
    # What was charged cannot be charged again by the same attempt.
    with pytest.raises(psycopg.errors.UniqueViolation):
        ledger_of(database, 10).charge(charge_of_one("killed", attempt=expected[-1]))
    assert attempts_charged(database) == expected


@contextmanager
def blocked(database_url: str, table: str, condition: str) -> Iterator[Callable[[], int]]:
    """Lets a statement on a table wait, just before it is done, for the end of the block; yields how many wait."""
    with psycopg.connect(database_url, autocommit=True) as holder:
        holder.execute("SELECT pg_advisory_lock(4711)")
        holder.execute(
            "CREATE FUNCTION trainer.wait_for_test() RETURNS trigger LANGUAGE plpgsql AS "
            "'BEGIN PERFORM pg_advisory_lock_shared(4711); PERFORM pg_advisory_unlock_shared(4711); RETURN NEW; END'"
        )
        holder.execute(
            f"CREATE TRIGGER wait_for_test BEFORE INSERT ON trainer.{table} FOR EACH ROW WHEN ({condition}) "
            "EXECUTE FUNCTION trainer.wait_for_test()"  # type: ignore[arg-type]
        )

        def waiting() -> int:
            row = holder.execute(
                "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objid = 4711 AND NOT granted"
            ).fetchone()
            assert row is not None
            return int(row[0])

        try:
            yield waiting
        finally:
            holder.execute("SELECT pg_advisory_unlock(4711)")


def test_a_run_killed_right_after_its_charge_publishes_nothing_and_stays_charged(
    record,
    start_trainer,
    catalogue_address: str,
    tmp_path: Path,
    database_url: str,
) -> None:
    record(walk(users=200, items=ITEMS))
    trainer, stub = start_trainer(profile_address=catalogue_address)
    with blocked(database_url, "run_progress", "NEW.message LIKE '%charged%'") as waiting:
        created = stub.CreateTrainingRun(request_of(2.0))
        # The charge is written, and the run cannot go on.
        eventually(lambda: waiting() == 1)
        charges = stub.GetPrivacyBudget(pb.GetPrivacyBudgetRequest()).charges
        assert [charge.run_id for charge in charges] == [created.run_id]
        os.kill(trainer.supervisor.processes()[created.run_id], signal.SIGKILL)
    run, _journal = ended(stub, created.run_id)
    assert run.state == State.STATE_FAILED
    assert run.failure.reason == "PROCESS_DIED"
    assert not Registry(tmp_path / "registry").list_versions("main")
    charges = stub.GetPrivacyBudget(pb.GetPrivacyBudgetRequest()).charges
    assert [(charge.run_id, charge.epsilon) for charge in charges] == [(created.run_id, 2.0)]


def test_a_run_killed_while_it_writes_its_charge_is_not_charged(
    record,
    start_trainer,
    catalogue_address: str,
    tmp_path: Path,
    database_url: str,
) -> None:
    record(walk(users=200, items=ITEMS))
    trainer, stub = start_trainer(profile_address=catalogue_address)
    with blocked(database_url, "privacy_charges", "true") as waiting:
        created = stub.CreateTrainingRun(request_of(2.0))
        eventually(lambda: waiting() == 1)
        os.kill(trainer.supervisor.processes()[created.run_id], signal.SIGKILL)
        run, journal = ended(stub, created.run_id)
    assert run.failure.reason == "PROCESS_DIED"
    assert not any("charged" in message for message in journal)
    # PostgreSQL finds out that nobody is there any more, and takes the row back.
    eventually(lambda: not stub.GetPrivacyBudget(pb.GetPrivacyBudgetRequest()).charges)
    assert not Registry(tmp_path / "registry").list_versions("main")


@pytest.mark.skipif(not EVERY_PLACE, reason="takes 20 seconds; the ledger's own test of attempts takes one")
def test_a_run_that_the_next_trainer_starts_anew_pays_anew_and_once(
    record,
    start_trainer,
    catalogue_address: str,
    database_url: str,
) -> None:
    record(walk(users=200, items=ITEMS))
    first, stub = start_trainer(profile_address=catalogue_address, cancel_grace_seconds=1)
    with blocked(database_url, "run_progress", "NEW.message LIKE '%charged%'") as waiting:
        created = stub.CreateTrainingRun(request_of(2.0))
        eventually(lambda: waiting() == 1)
        first.supervisor.stop()
    _second, stub = start_trainer(profile_address=catalogue_address)
    run, _journal = ended(stub, created.run_id)
    assert run.state == State.STATE_SUCCEEDED, run.failure
    charges = stub.GetPrivacyBudget(pb.GetPrivacyBudgetRequest()).charges
    # The first attempt may have told something before it died, such as its gate's verdict; its noise was another.
    assert [(charge.run_id, charge.attempt) for charge in charges] == [(run.run_id, 2), (run.run_id, 1)]
