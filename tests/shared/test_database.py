from __future__ import annotations

import psycopg
import pytest

from shared.database import Database, ensure_database
from shared.errors import Unavailable


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
