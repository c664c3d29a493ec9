from __future__ import annotations

from collections.abc import Callable

import psycopg
import pytest
import sqlalchemy

from shared import deadline
from shared.database import Database, ensure_database
from shared.errors import DeadlineExceeded, Unavailable


def test_each_service_acts_under_its_own_role_in_its_own_schema(database_url: str) -> None:
    database = Database(database_url, schema="profile")
    try:
        with database.connect() as connection:
            row = connection.execute(
                "SELECT current_user, current_schema(), current_setting('timezone')"
            ).fetchone()
        assert row == ("shopkeeper_profile", "profile", "UTC")
    finally:
        database.close()


def test_no_service_reads_the_schema_of_another(database_url: str) -> None:
    feedback = Database(database_url, schema="feedback")
    trainer = Database(database_url, schema="trainer")
    try:
        with feedback.connect() as connection:
            connection.execute("CREATE TABLE secret (id int)")
        with pytest.raises(psycopg.errors.InsufficientPrivilege), trainer.connect() as connection:
            connection.execute("SELECT * FROM feedback.secret")
    finally:
        feedback.close()
        trainer.close()


def test_setting_up_a_database_twice_changes_nothing(database_url: str) -> None:
    ensure_database(database_url)
    ensure_database(database_url)


def test_an_unreachable_database_is_unavailable_with_a_time_to_retry() -> None:
    database = Database("postgresql://nobody@127.0.0.1:1/none", schema="feedback")
    try:
        with pytest.raises(Unavailable) as failure, database.begin():
            pass
        assert failure.value.reason == "DATABASE_UNAVAILABLE"
        assert failure.value.retry_after_seconds > 0
    finally:
        database.close()


def by_pool(database: Database, *statements: str) -> None:
    with database.connect() as connection:
        for statement in statements:
            connection.execute(statement)


def by_engine(database: Database, *statements: str) -> None:
    with database.begin() as connection:
        for statement in statements:
            connection.execute(sqlalchemy.text(statement))


@pytest.mark.parametrize("run", [by_pool, by_engine])
def test_a_wait_ends_with_the_deadline_of_the_call_and_gives_its_connection_up(
    database_url: str, run: Callable[..., None]
) -> None:
    database = Database(database_url, schema="feedback", pool_size=1)
    try:
        deadline.begin(0.3)
        with pytest.raises(DeadlineExceeded):
            run(database, "SELECT pg_sleep(30)")
        deadline.end()
        # The one connection that there may be is free again.
        run(database, "SELECT 1")
    finally:
        deadline.end()
        database.close()


@pytest.mark.parametrize("run", [by_pool, by_engine])
def test_a_server_that_may_not_write_is_unavailable(database_url: str, run: Callable[..., None]) -> None:
    database = Database(database_url, schema="feedback")
    try:
        with pytest.raises(Unavailable):
            run(database, "SET TRANSACTION READ ONLY", "CREATE TABLE forbidden (id int)")
    finally:
        database.close()


def test_who_finds_no_free_connection_is_told_to_come_back(database_url: str) -> None:
    database = Database(database_url, schema="feedback", pool_size=1)
    try:
        with database.connect():
            deadline.begin(0.2)
            with pytest.raises(DeadlineExceeded), database.connect():
                pass
            deadline.end()
    finally:
        deadline.end()
        database.close()
