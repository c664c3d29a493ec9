"""Private runs killed while they write their charge and right after: charged or not, never refunded."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
from shopkeeper.trainer.v1 import trainer_service_pb2 as pb

from shared.bundle import Registry
from tests.trainer.conftest import CATALOGUE_ITEMS as ITEMS
from tests.trainer.conftest import eventually, walk
from tests.trainer.test_privacy_runs import State, ended, request_of


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
