"""After a crash PostgreSQL gives out anew the numbers of transactions of which nothing was on disk: no run may skip them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest

from services.trainer.pipeline.log_reader import read_events
from services.trainer.pipeline.log_snapshot import read_through
from services.trainer.pipeline.snapshot_files import SnapshotDirectory
from shared.bundle.history import INTEREST_KINDS
from shared.database import Database
from shared.tokens import Watermark
from tests.own_postgres import OwnPostgres


@pytest.fixture(scope="module")
def own_postgres(postgres_homes: Callable[[], Path]) -> OwnPostgres:
    return OwnPostgres(postgres_homes(), "feedback", "trainer")


@pytest.fixture
def database_url(own_postgres: OwnPostgres) -> str:
    return own_postgres.url


def test_what_reuses_numbers_is_read_by_the_next_run_and_not_by_the_one_before(
    own_postgres: OwnPostgres, record, tmp_path: Path
) -> None:
    conninfo = Database(own_postgres.url, schema="trainer").conninfo
    directory = SnapshotDirectory(tmp_path)
    record([[1, 2], [3]])
    with own_postgres.numbers_to_be_reused():
        first = read_events(conninfo)
        kept = read_through(conninfo, directory, kinds=INTEREST_KINDS)
    assert kept is not None
    assert len(first) == len(kept) == 3
    record([[4, 5]], first_user=10)
    with psycopg.connect(own_postgres.url) as connection:
        # So many of the day that its count alone would not tell: what is new is found by its transaction.
        connection.execute("DELETE FROM feedback.events WHERE item_id IN ('item-1', 'item-2')")
    # A run that is repeated reads what it read, less what is gone.
    for watermark in (first.watermark, kept.watermark):
        repeated = read_events(conninfo, as_of=watermark.decode())
        assert sorted(set(repeated.item_ids)) == ["item-3"]
    newer = read_through(conninfo, directory, kinds=INTEREST_KINDS)
    assert newer is not None
    assert {"item-4", "item-5"} <= set(newer.item_ids)
    with psycopg.connect(own_postgres.url) as connection:
        row = connection.execute("SELECT xid::text FROM feedback.events WHERE item_id = 'item-4'").fetchone()
    assert row is not None
    # A receipt goes by this: a person who was buried later is in what was read before.
    assert not Watermark.decode(first.watermark).covers(int(row[0]))
    assert Watermark.decode(newer.watermark).covers(int(row[0]))
