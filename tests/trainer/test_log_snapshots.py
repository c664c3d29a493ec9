"""Day files: they are the view, whatever happened to the log, to the disk or to whoever wrote them."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import psycopg
import pytest

from services.trainer.pipeline import snapshot_files
from services.trainer.pipeline.dataset import EventColumns
from services.trainer.pipeline.log_snapshot import Refresh, damaged_days, read_set, read_through, refresh
from services.trainer.pipeline.snapshot_files import SnapshotDirectory
from shared.bundle.history import INTEREST_KINDS
from shared.database import Database
from tests.trainer.conftest import eventually, walk

DAY = timedelta(days=1)
START = datetime(2026, 1, 1, tzinfo=UTC)


def key_of(user: int) -> bytes:
    return hashlib.sha256(str(user).encode()).digest()[:16]


@pytest.fixture
def conninfo(record, database_url: str) -> str:
    database = Database(database_url, schema="trainer")
    database.close()
    return database.conninfo


@pytest.fixture
def directory(tmp_path: Path) -> SnapshotDirectory:
    return SnapshotDirectory(tmp_path / "snapshots")


def change(database_url: str, statement: str, *arguments: object) -> None:
    with psycopg.connect(database_url) as connection:
        connection.execute(statement, arguments)  # type: ignore[arg-type]


def in_view(database_url: str) -> list[tuple]:
    with psycopg.connect(database_url) as connection:
        rows = connection.execute(
            "SELECT user_key, item_id, kind, (extract(epoch FROM occurred_at) * 1000000)::bigint, line "
            "FROM feedback.training_events_v1"
        ).fetchall()
    users = {key: number for number, key in enumerate(sorted({row[0] for row in rows}))}
    return sorted((users[user], *rest) for user, *rest in rows)


def in_files(directory: SnapshotDirectory) -> list[tuple]:
    chosen = directory.current()
    assert chosen is not None
    return rows_of(read_set(directory, chosen, kinds=range(100)))


def rows_of(events: EventColumns) -> list[tuple]:
    return sorted(
        (user, events.item_ids[item], kind, time, line)
        for user, item, kind, time, line in zip(
            events.user_E.tolist(), events.item_E.tolist(), events.kind_E.tolist(), events.time_E.tolist(),
            events.order_E.tolist(), strict=True,
        )
    )  # fmt: skip


def bytes_on_disk(directory: SnapshotDirectory) -> bytes:
    """What the files say, with nothing compressed away: keys and ids as they stand in Parquet."""
    tables = [snapshot_files.pq.read_table(path) for path in directory.path.glob("days/*/*.parquet")]
    return b"".join(key for table in tables for key in table["user_key"].cast("binary").to_pylist())


def test_the_first_reading_is_the_view_and_the_second_reads_nothing(
    record, database_url, conninfo, directory
) -> None:
    for day in range(3):
        record(walk(users=20, items=12, seed=day), START + day * DAY)
    first = refresh(conninfo, directory)
    assert first.read == len(in_view(database_url)) > 0
    assert in_files(directory) == in_view(database_url)
    again = refresh(conninfo, directory)
    assert (again.read, again.read_again) == (0, [])
    assert again.chosen.days == first.chosen.days


def test_yesterday_is_read_once(record, database_url, conninfo, directory) -> None:
    record(walk(users=20, items=12), START)
    refresh(conninfo, directory)
    record(walk(users=5, items=12, seed=2), START + DAY)
    second = refresh(conninfo, directory)
    assert second.read == len(in_view(database_url)) - second.chosen.rows_of(20454)
    assert len(second.chosen.days) == 2
    assert in_files(directory) == in_view(database_url)


def test_an_event_of_yesterday_that_comes_today_is_not_lost(
    record, database_url, conninfo, directory
) -> None:
    record(walk(users=20, items=12), START + DAY)
    refresh(conninfo, directory)
    record(walk(users=5, items=12, seed=3), START, first_user=100)
    assert refresh(conninfo, directory).read > 0
    assert in_files(directory) == in_view(database_url)


def test_a_transaction_that_commits_after_the_reading_is_not_lost(
    record, database_url, conninfo, directory
) -> None:
    record(walk(users=10, items=12), START)
    with psycopg.connect(database_url) as late:
        late.execute(
            "INSERT INTO feedback.events (event_key, payload_digest, occurred_at, kind, device, channel, consent, user_key, "
            "item_id) VALUES (gen_random_uuid(), 0, %s, 3, 0, 0, 0, %s, 'late')",
            (START, key_of(3)),
        )
        # It has its number already; newer ones commit, and are read, before it does.
        record(walk(users=10, items=12, seed=5), START, first_user=50)
        refresh(conninfo, directory)
        assert not any(row[1] == "late" for row in in_files(directory))
    assert refresh(conninfo, directory).read == 1
    assert in_files(directory) == in_view(database_url)
    assert any(row[1] == "late" for row in in_files(directory))


def test_an_erased_person_leaves_every_file_with_the_next_reading(
    record, database_url, conninfo, directory
) -> None:
    record(walk(users=20, items=12), START)
    record(walk(users=20, items=12, seed=1), START + DAY)
    refresh(conninfo, directory)
    assert key_of(7) in bytes_on_disk(directory)
    change(
        database_url,
        "INSERT INTO feedback.tombstones (tombstone_key, user_keys, erased_at) VALUES (%s, %s, now())",
        b"t" * 32,
        [key_of(7)],
    )
    done = refresh(conninfo, directory)
    assert done.people == 1
    # No rows of others were read again for it.
    assert done.read == 0
    assert in_files(directory) == in_view(database_url)
    assert key_of(7) not in bytes_on_disk(directory)
    assert key_of(8) in bytes_on_disk(directory)


def test_who_withdraws_consent_leaves_and_who_gives_it_again_comes_back(
    record, database_url, conninfo, directory
) -> None:
    record(walk(users=20, items=12), START)
    everything = in_view(database_url)
    refresh(conninfo, directory)
    consent = (
        "INSERT INTO feedback.consents (user_key, training, updated_at) VALUES (%s, %s, now()) ON CONFLICT (user_key) "
        "DO UPDATE SET training = excluded.training, xid = pg_current_xact_id()"
    )
    change(database_url, consent, key_of(7), False)
    refresh(conninfo, directory)
    assert in_files(directory) == in_view(database_url) != everything
    assert key_of(7) not in bytes_on_disk(directory)
    change(database_url, consent, key_of(7), True)
    refresh(conninfo, directory)
    assert in_files(directory) == everything


def test_an_event_that_is_written_anew_is_held_once(record, database_url, conninfo, directory) -> None:
    record(walk(users=20, items=12), START)
    refresh(conninfo, directory)
    change(
        database_url,
        "UPDATE feedback.events SET user_key = %s, xid = pg_current_xact_id() WHERE user_key = %s",
        b"n" * 16,
        key_of(7),
    )
    refresh(conninfo, directory)
    assert in_files(directory) == in_view(database_url)
    assert key_of(7) not in bytes_on_disk(directory)


def test_what_the_log_purged_leaves_the_files(record, database_url, conninfo, directory) -> None:
    record(walk(users=20, items=12), START)
    record(walk(users=20, items=12, seed=1), START + DAY)
    refresh(conninfo, directory)
    change(
        database_url,
        "DELETE FROM feedback.events WHERE user_key = %s AND occurred_at < %s",
        key_of(7),
        START + DAY,
    )
    done = refresh(conninfo, directory)
    assert done.read_again == [20454]
    assert in_files(directory) == in_view(database_url)
    change(database_url, "DELETE FROM feedback.events WHERE occurred_at < %s", START + DAY)
    assert list(refresh(conninfo, directory).chosen.days) == [20455]


@pytest.mark.parametrize("damage", ["flipped", "cut short", "gone"])
def test_a_damaged_file_is_found_and_its_day_read_again(
    record, database_url, conninfo, directory, damage: str
) -> None:
    record(walk(users=20, items=12), START)
    record(walk(users=20, items=12, seed=1), START + DAY)
    before = refresh(conninfo, directory).chosen
    path = directory.file_path(20454, before.days[20454][0])
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(content if damage == "flipped" else content[:-9])
    assert damaged_days(directory, before) == [20454]
    told: list[str] = []
    events = read_through(conninfo, directory, report=told.append, kinds=INTEREST_KINDS)
    assert events is not None
    assert rows_of(events) == in_view(database_url)
    assert "1 days were read again" in told[-1]


def test_the_same_set_gives_the_same_arrays_though_the_log_went_on(
    record, database_url, conninfo, directory
) -> None:
    record(walk(users=20, items=12), START)
    first = read_through(conninfo, directory, kinds=INTEREST_KINDS)
    record(walk(users=20, items=15, seed=4), START, first_user=500)
    newer = read_through(conninfo, directory, kinds=INTEREST_KINDS)
    assert first is not None
    assert newer is not None
    assert len(newer) > len(first)
    again = read_through(conninfo, directory, watermark=first.watermark.decode(), kinds=INTEREST_KINDS)
    assert again is not None
    assert again.snapshot == first.snapshot != newer.snapshot
    for name in ("user_E", "item_E", "kind_E", "time_E", "order_E"):
        np.testing.assert_array_equal(getattr(again, name), getattr(first, name))
    assert list(again.item_ids) == list(first.item_ids)


def test_a_window_of_a_set_is_the_window_of_the_log(record, conninfo, database_url, directory) -> None:
    record(walk(users=20, items=12), START)
    record(walk(users=20, items=12, seed=1), START + DAY)
    refresh(conninfo, directory)
    chosen = directory.current()
    assert chosen is not None
    low, high = START + timedelta(minutes=3), START + DAY + timedelta(minutes=2)
    some = rows_of(read_set(directory, chosen, start_time=low, end_time=high, kinds=[3]))
    bounds = (low.timestamp() * 1e6, high.timestamp() * 1e6)
    assert [row[1:] for row in some] == [
        r[1:] for r in in_view(database_url) if bounds[0] <= r[3] < bounds[1]
    ]


def test_a_full_disk_leaves_the_set_as_it_was(
    record, conninfo, database_url, directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(walk(users=20, items=12), START)
    before = refresh(conninfo, directory).chosen
    record(walk(users=5, items=12, seed=2), START + DAY)
    real, calls = snapshot_files.write_atomically, 0

    def full_at(number: int) -> Callable[[Path, bytes], None]:
        def write(path: Path, content: bytes) -> None:
            nonlocal calls
            calls += 1
            if calls > number:
                raise OSError(28, "No space left on device")
            real(path, content)

        return write

    # The day file, then the set, then (the day file being there) what names the newest.
    for number in (0, 1, 1):
        calls = 0
        monkeypatch.setattr(snapshot_files, "write_atomically", full_at(number))
        with pytest.raises(OSError, match="No space"):
            refresh(conninfo, directory)
        assert directory.current() == before
        assert damaged_days(directory, before) == []
    monkeypatch.setattr(snapshot_files, "write_atomically", real)
    refresh(conninfo, directory)
    assert in_files(directory) == in_view(database_url)


# Ends itself with the n-th rename, before or after it: the worst moments there are.
_KILLED = """
import os, signal, sys
from pathlib import Path
from services.trainer.pipeline.log_snapshot import refresh
from services.trainer.pipeline.snapshot_files import SnapshotDirectory
conninfo, path, number, after = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4] == "after"
real, calls = os.replace, 0
def replace(source, target):
    global calls
    calls += 1
    if calls == number and not after: os.kill(os.getpid(), signal.SIGKILL)
    real(source, target)
    if calls == number: os.kill(os.getpid(), signal.SIGKILL)
os.replace = replace
refresh(conninfo, SnapshotDirectory(Path(path)))
"""


@pytest.mark.parametrize("moment", ["before", "after"])
def test_whoever_is_killed_while_writing_leaves_a_whole_set(
    record, conninfo, database_url, directory, moment: str
) -> None:
    record(walk(users=20, items=12), START)
    refresh(conninfo, directory)
    record(walk(users=5, items=12, seed=2), START + DAY)
    record(walk(users=5, items=12, seed=3), START + 2 * DAY)
    killed = 0
    for number in range(1, 5):
        ended = subprocess.run(
            [sys.executable, "-c", _KILLED, conninfo, str(directory.path), str(number), moment], check=False
        )
        killed += ended.returncode == -signal.SIGKILL
        chosen = directory.current()
        assert chosen is not None
        assert damaged_days(directory, chosen) == []
    assert killed >= 2
    refresh(conninfo, directory)
    assert in_files(directory) == in_view(database_url)
    listed = {f"{f.sha256}.parquet" for files in directory.current().days.values() for f in files}  # type: ignore[union-attr]
    on_disk = {path.name for path in directory.path.glob("days/*/*")}
    kept = {
        f"{f.sha256}.parquet"
        for path in directory.path.glob("sets/*.json")
        for files in directory.load_set(path.stem).days.values()  # type: ignore[union-attr]
        for f in files
    }
    assert listed <= on_disk <= kept


def test_who_was_erased_leaves_the_files_of_a_trainer_that_trains_nothing(
    record, database_url, conninfo, start_trainer, tmp_path: Path
) -> None:
    record(walk(users=20, items=12), START)
    directory = SnapshotDirectory(tmp_path / "snapshots")
    refresh(conninfo, directory)
    change(
        database_url,
        "INSERT INTO feedback.tombstones (tombstone_key, user_keys, erased_at) VALUES (%s, %s, now())",
        b"t" * 32,
        [key_of(7)],
    )
    assert key_of(7) in bytes_on_disk(directory)
    start_trainer(snapshot_upkeep_seconds=0.1)
    eventually(lambda: key_of(7) not in bytes_on_disk(directory))
    assert in_files(directory) == in_view(database_url)


def test_sets_past_their_time_go_and_the_newest_stays(record, conninfo, directory) -> None:
    record(walk(users=20, items=12), START)
    old = refresh(conninfo, directory).chosen
    record(walk(users=5, items=12, seed=2), START + DAY)
    new = refresh(conninfo, directory).chosen
    for path in directory.path.glob("sets/*.json"):
        os.utime(path, (0, 0))
    directory.collect()
    assert directory.load_set(old.digest) is None
    assert directory.current() == new


def test_a_day_of_many_files_becomes_one(record, database_url, conninfo, directory) -> None:
    for number in range(10):
        record(walk(users=2, items=12, seed=number), START, first_user=10 * number)
        done = refresh(conninfo, directory)
    assert len(done.chosen.days[20454]) < 5
    assert in_files(directory) == in_view(database_url)


def test_files_of_another_database_are_read_anew(record, database_url, conninfo, directory) -> None:
    record(walk(users=20, items=12), START)
    chosen = refresh(conninfo, directory).chosen
    directory.publish(snapshot_files.SnapshotSet("900000000:900000000:", chosen.days))
    done = refresh(conninfo, directory)
    assert isinstance(done, Refresh)
    assert done.read == len(in_view(database_url))
    assert in_files(directory) == in_view(database_url)
