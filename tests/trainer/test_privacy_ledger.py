"""The ledger on a real PostgreSQL: append-only, never overspent, never refunded."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta

import psycopg
import pytest

from services.trainer.domain.privacy import PrivacyCharge
from services.trainer.privacy.accounting import epsilon_of, epsilon_of_ledger, noise_for
from services.trainer.privacy.ledger import PostgresPrivacyLedger
from shared.database import Database
from shared.errors import FailedPrecondition

DELTA = 1e-5
RELEASE_OF_ONE = noise_for(1.0, 1e-6)


def charge_of_one(run: str, attempt: int = 1, model: str = "main") -> PrivacyCharge:
    return PrivacyCharge(run, attempt, model, 1.0, 1e-6, "COUNTS", (RELEASE_OF_ONE,))


@pytest.fixture
def database(migrate_services: Callable[..., str], database_url: str) -> Iterator[Database]:
    migrate_services("trainer")
    opened = Database(database_url, schema="trainer")
    yield opened
    opened.close()


def ledger_of(database: Database, limit: float) -> PostgresPrivacyLedger:
    return PostgresPrivacyLedger(database, limit, DELTA, epsilon_of_ledger)


def count(database: Database) -> int:
    with database.connect() as connection:
        row = connection.execute("SELECT count(*) FROM privacy_charges").fetchone()
    assert row is not None
    return int(row[0])


def turn_back(database: Database, age: timedelta) -> None:
    """Makes every charge so much older."""
    with database.connect() as connection:
        # The only way to a past: before the rule was there.
        connection.execute("ALTER TABLE privacy_charges DISABLE TRIGGER append_only")
        connection.execute("GRANT UPDATE ON privacy_charges TO shopkeeper_trainer")
        connection.execute("UPDATE privacy_charges SET charged_at = charged_at - %s", (age,))


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE privacy_charges SET epsilon = 0.1",
        "DELETE FROM privacy_charges",
        "TRUNCATE privacy_charges",
    ],
)
@pytest.mark.parametrize("with_privilege", [False, True], ids=["without privilege", "granted anew"])
def test_a_charge_can_be_neither_changed_nor_taken_back(
    database: Database, statement: str, with_privilege: bool
) -> None:
    ledger_of(database, 10).charge(charge_of_one("a"))
    with database.connect() as connection:
        if with_privilege:
            connection.execute("GRANT ALL ON privacy_charges TO shopkeeper_trainer")
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute(statement)  # type: ignore[call-overload]
        connection.rollback()
    assert [charge.epsilon for charge in ledger_of(database, 10).budget("main").charges] == [1.0]


def test_charges_past_the_limit_are_refused_and_not_written(database: Database) -> None:
    ledger = ledger_of(database, 2.0)
    ledger.charge(charge_of_one("a"))
    ledger.charge(charge_of_one("b"))

    def spend_on() -> None:
        for number in range(10):
            ledger.charge(charge_of_one(f"c{number}"))

    with pytest.raises(FailedPrecondition) as refused:
        spend_on()
    assert refused.value.reason == "PRIVACY_BUDGET_EXHAUSTED"
    assert 0 <= float(refused.value.metadata["epsilonLeft"]) < 1
    budget = ledger.budget("main")
    assert len(budget.charges) == count(database) >= 2
    assert budget.epsilon_spent <= 2.0


def test_the_limit_holds_for_all_models_together(database: Database) -> None:
    ledger = ledger_of(database, 1.2)
    ledger.charge(charge_of_one("a", model="main"))
    with pytest.raises(FailedPrecondition):
        ledger.charge(charge_of_one("b", model="other"))
    assert ledger.budget("other").charges == []
    assert ledger.budget("other").epsilon_spent == pytest.approx(ledger.budget("main").epsilon_spent)


def test_each_attempt_of_a_run_is_charged_and_no_attempt_twice(database: Database) -> None:
    ledger = ledger_of(database, 100)
    ledger.charge(charge_of_one("a", attempt=1))
    ledger.charge(charge_of_one("a", attempt=2))
    with pytest.raises(psycopg.errors.UniqueViolation):
        ledger.charge(charge_of_one("a", attempt=2))
    assert count(database) == 2


def test_a_charge_of_more_than_a_year_ago_no_longer_counts(database: Database) -> None:
    ledger = ledger_of(database, 1.2)
    ledger.charge(charge_of_one("a"))
    turn_back(database, timedelta(days=365, minutes=1))
    assert ledger.budget("main").epsilon_spent == 0
    ledger.charge(charge_of_one("b"))
    assert [charge.run_id for charge in ledger.budget("main").charges] == ["b", "a"]


def test_charges_at_the_same_time_do_not_overspend_together(database: Database) -> None:
    ledger = ledger_of(database, 2.0)
    allowed: list[str] = []
    refused: list[str] = []
    start = threading.Barrier(6)

    def spend(run: str) -> None:
        start.wait()
        try:
            ledger.charge(charge_of_one(run))
            allowed.append(run)
        except FailedPrecondition:
            refused.append(run)

    threads = [threading.Thread(target=spend, args=(f"run-{number}",)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert refused
    assert len(allowed) == count(database)
    assert ledger.budget("main").epsilon_spent <= 2.0


def test_a_clock_that_is_set_back_dates_no_charge_before_the_ones_already_there(database: Database) -> None:
    ledger = ledger_of(database, 2.0)
    ledger.charge(charge_of_one("a"))
    # The clock went back by 400 days: what was charged lies so far ahead of it.
    turn_back(database, -timedelta(days=400))
    ledger.charge(charge_of_one("b"))
    newest, oldest = ledger.budget("main").charges
    assert newest.charged_at is not None
    assert oldest.charged_at is not None
    assert newest.charged_at >= oldest.charged_at
    with pytest.raises(FailedPrecondition):
        ledger.charge(PrivacyCharge("c", 1, "main", 1.9, 1e-6, "COUNTS", (noise_for(1.9, 1e-6),)))
    # The clock is right again: both are of today, and count.
    turn_back(database, timedelta(days=400))
    assert ledger.budget("main").epsilon_spent == pytest.approx(
        epsilon_of_ledger([charge_of_one("a"), charge_of_one("b")], DELTA)
    )


def test_a_clock_that_ran_ahead_leaves_its_charges_counting_until_their_own_year_is_over(
    database: Database,
) -> None:
    ledger = ledger_of(database, 1.2)
    ledger.charge(charge_of_one("a"))
    turn_back(database, -timedelta(days=30))
    with pytest.raises(FailedPrecondition) as refused:
        ledger.charge(charge_of_one("b"))
    fits_at = datetime.fromisoformat(refused.value.metadata["fitsAt"])
    assert fits_at - datetime.now(UTC) > timedelta(days=394)


def test_nobody_may_say_when_a_charge_was_made(database: Database) -> None:
    with database.connect() as connection:
        connection.execute(
            "INSERT INTO privacy_charges (run_id, attempt, model, epsilon, delta, mechanism, releases, charged_at) "
            "VALUES ('old', 1, 'main', 1, 1e-6, 'COUNTS', '[{\"noise_multiplier\": 4.5}]', '2020-01-01')"
        )
    (charge,) = ledger_of(database, 10).budget("main").charges
    assert charge.charged_at is not None
    assert datetime.now(UTC) - charge.charged_at < timedelta(minutes=5)


def test_a_refusal_says_what_is_left_and_when_the_budget_returns(database: Database) -> None:
    ledger = ledger_of(database, 1.2)
    ledger.charge(charge_of_one("a"))
    charged_at = ledger.budget("main").charges[0].charged_at
    assert charged_at is not None
    with pytest.raises(FailedPrecondition) as refused:
        ledger.charge(charge_of_one("b"))
    left = 1.2 - ledger.budget("main").epsilon_spent
    assert float(refused.value.metadata["epsilonLeft"]) == pytest.approx(left, abs=1e-5)
    fits_at = datetime.fromisoformat(refused.value.metadata["fitsAt"])
    assert timedelta(0) <= fits_at - charged_at - timedelta(days=365) <= timedelta(seconds=1)
    assert refused.value.metadata["fitsAt"] in refused.value.message
    # Once the year has turned it does fit.
    turn_back(database, fits_at - datetime.now(UTC) + timedelta(seconds=1))
    ledger.charge(charge_of_one("b"))
    assert count(database) == 2


def test_a_refusal_names_the_last_charge_that_must_go_before_this_one_fits(database: Database) -> None:
    ledger = ledger_of(database, 2.0)
    ledger.charge(charge_of_one("a"))
    turn_back(database, timedelta(days=100))
    ledger.charge(charge_of_one("b"))
    wish = PrivacyCharge("c", 1, "main", 1.9, 1e-6, "COUNTS", (noise_for(1.9, 1e-6),))
    with pytest.raises(FailedPrecondition) as refused:
        ledger.charge(wish)
    newest = ledger.budget("main").charges[0].charged_at
    assert newest is not None
    fits_at = datetime.fromisoformat(refused.value.metadata["fitsAt"])
    assert abs(fits_at - newest - timedelta(days=365)) <= timedelta(seconds=1)


def test_a_wish_beyond_the_limit_itself_is_told_that_waiting_is_no_use(database: Database) -> None:
    ledger = ledger_of(database, 0.5)
    with pytest.raises(FailedPrecondition, match="ask for less") as refused:
        ledger.charge(charge_of_one("a"))
    assert refused.value.metadata["fitsAt"] == ""
    assert count(database) == 0


def test_a_process_that_is_killed_right_after_its_charge_stays_charged(
    database: Database, database_url: str
) -> None:
    program = textwrap.dedent(
        """
        import sys, time
        from services.trainer.privacy.accounting import epsilon_of_ledger
        from services.trainer.privacy.ledger import PostgresPrivacyLedger
        from services.trainer.domain.privacy import GaussianRelease, PrivacyCharge
        from shared.database import Database
        ledger = PostgresPrivacyLedger(Database(sys.argv[1], schema="trainer"), 10.0, 1e-5, epsilon_of_ledger)
        ledger.charge(PrivacyCharge("killed", 1, "main", 1.0, 1e-6, "COUNTS", (GaussianRelease(4.5),)))
        print("charged", flush=True)
        time.sleep(600)
        """
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, database_url], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "charged\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert [charge.run_id for charge in ledger_of(database, 10).budget("main").charges] == ["killed"]


def test_a_year_of_releases_costs_less_than_their_sum_and_more_than_one(database: Database) -> None:
    ledger = ledger_of(database, 100.0)
    for number in range(8):
        ledger.charge(charge_of_one(f"run-{number}"))
    spent = ledger.budget("main").epsilon_spent
    together = epsilon_of([RELEASE_OF_ONE] * 8, DELTA)
    # Renyi composition is valid, so never below the tight value, and not far above it.
    assert together <= spent <= 1.2 * together < 8.0
