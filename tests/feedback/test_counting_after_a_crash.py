"""What is counted from the log goes on after a crash of PostgreSQL: no number that it has passed is given out again."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import psycopg

from services.feedback.domain.bots import BotRules
from services.feedback.storage.bot_marks import BotMarks
from services.feedback.storage.unknown_items import PostgresUnknownItems
from shared.database import Database
from tests.own_postgres import OwnPostgres


def test_bots_and_unknown_items_are_counted_on(postgres_homes: Callable[[], Path]) -> None:
    own_postgres = OwnPostgres(postgres_homes(), "feedback")

    def record(item_id: str) -> int:
        with psycopg.connect(own_postgres.url) as connection:
            row = connection.execute(
                "INSERT INTO feedback.events (event_key, payload_digest, occurred_at, kind, device, channel, consent, "
                "user_key, item_id) VALUES (%s, 0, now(), 3, 0, 0, 0, %s, %s) RETURNING xid::text",
                (uuid.uuid4(), b"u" * 16, item_id),
            ).fetchone()
        assert row is not None
        return int(row[0])

    with closing(Database(own_postgres.url, schema="feedback", pool_size=2)) as database:
        known: frozenset[str] = frozenset({"other"})
        for step, table, counted in (
            (BotMarks(database, BotRules(1000, 1000, 10)).step, "bot_watermark", "SELECT sum(views) FROM feedback.bot_windows WHERE seconds = 3600"),
            (PostgresUnknownItems(database, lambda: known).step, "unknown_items_watermark", "SELECT sum(event_count) FROM feedback.unknown_items"),
        ):  # fmt: skip
            record("strange")
            step()
            with psycopg.connect(own_postgres.url) as connection:
                before = connection.execute(counted).fetchone()
            assert before is not None
            burnt = own_postgres.burn()
            # Sees them end, and remembers it.
            step()
            own_postgres.crash()
            assert record("strange") > burnt
            step()
            with psycopg.connect(own_postgres.url) as connection:
                assert connection.execute(counted).fetchone() == (before[0] + 1,)
                watermark = connection.execute(f"SELECT xid::text FROM feedback.{table}").fetchone()
            assert watermark is not None
            assert int(watermark[0]) > burnt
