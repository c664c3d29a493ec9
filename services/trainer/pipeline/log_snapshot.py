"""Day files kept up with the log: what was read once is not read again, and who must be forgotten is.

S0 is the snapshot that the newest set holds, S1 the present one; what is kept of either is its durable part. Read are the events that S1 sees and S0 did not
(decision 0001): a late event, or one whose transaction committed late, is among them whatever its time, and goes to
the day of its time. Beside them:

- people whose consent or erasure is newer than S0 are taken out of every file, and what the view shows of them now is read anew;
- an event that was written anew since S0, as a rotation of keys does, replaces its older self;
- a day of which the server counts another number of events than the files hold (a purge, the log's own retention, a
  restored database), and a day with a damaged file, is read again as a whole.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import asyncpg
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from services.trainer.pipeline.copy_decoding import WITH_EVENT_KEY, RowBlock, arrow_keys, unified
from services.trainer.pipeline.dataset import EventColumns
from services.trainer.pipeline.log_reader import copy_out, one_snapshot, position
from services.trainer.pipeline.snapshot_files import (
    DAY_MICROSECONDS,
    SCHEMA,
    DamagedFile,
    SnapshotDirectory,
    SnapshotFile,
    SnapshotSet,
    table_of,
)
from shared.tokens import Watermark

# A day with more files than this is written anew as one.
_MOST_FILES_A_DAY = 8

_DAY = "floor(extract(epoch FROM occurred_at) / 86400)::int"
_ROWS = f"SELECT {WITH_EVENT_KEY.columns} FROM feedback.training_events_v1"  # noqa: S608
_NEW = f"{_ROWS} WHERE (xid >= $1::text::xid8 AND NOT pg_visible_in_snapshot(xid, $2::text::pg_snapshot)) OR user_key = ANY($3::bytea[])"
_OF_DAYS = f"{_ROWS} WHERE {_DAY} = ANY($1::int[])"
_COUNTS = f"SELECT {_DAY} AS day, count(*) AS events FROM feedback.training_events_v1 GROUP BY 1"  # noqa: S608
_CHANGED_PEOPLE = """
    SELECT user_key FROM feedback.consents_v1
    WHERE xid >= $1::text::xid8 AND NOT pg_visible_in_snapshot(xid, $2::text::pg_snapshot)
    UNION SELECT user_key FROM feedback.tombstones_v1
    WHERE xid >= $1::text::xid8 AND NOT pg_visible_in_snapshot(xid, $2::text::pg_snapshot)
"""


@dataclass(slots=True)
class Refresh:
    """What a refresh did.

    Attributes:
        chosen: the newest set now.
        read: events that came from PostgreSQL.
        people: of whom something changed.
        read_again: days that were read as a whole though they had files.
    """

    chosen: SnapshotSet
    read: int = 0
    people: int = 0
    read_again: list[int] = field(default_factory=list)


@dataclass(slots=True)
class _News:
    watermark: str
    people: list[bytes]
    rows: pa.Table
    counts: dict[int, int]
    starts_anew: bool


def refresh(conninfo: str, directory: SnapshotDirectory, damaged: Iterable[int] = ()) -> Refresh:
    """Brings the day files up to the log; the caller holds `directory.locked`.

    Args:
        damaged: days to read again, whatever their files say.

    Raises:
        LOG_ERRORS of `log_reader`: the log cannot be read, or a file cannot be written; the set before stays.
    """
    return asyncio.run(_refresh(conninfo, directory, set(damaged)))


async def _refresh(conninfo: str, directory: SnapshotDirectory, damaged: set[int]) -> Refresh:
    before = directory.current()
    async with one_snapshot(conninfo) as connection:
        news = await _news(connection, before)
        days: dict[int, list[SnapshotFile]] = {}
        if before is not None and not news.starts_anew:
            days = {day: list(files) for day, files in before.days.items()}
        forgotten: list[tuple[int, SnapshotFile]] = []
        new_of_day = dict(by_day(news.rows))
        for day in days.keys() - damaged:
            try:
                forgotten += _without(directory, day, days, news.people, new_of_day.get(day))
            except DamagedFile:
                damaged.add(day)
        for day, rows in new_of_day.items():
            if day not in damaged:
                days.setdefault(day, []).append(directory.write(day, rows))
        wrong = {
            day
            for day in days.keys() | news.counts.keys() | damaged
            if day in damaged or sum(f.rows for f in days.get(day, ())) != news.counts.get(day, 0)
        }
        read = len(news.rows)
        if wrong:
            again = await _rows(connection, _OF_DAYS, sorted(wrong))
            read += len(again)
            fresh = dict(by_day(again))
            for day in wrong:
                forgotten += [(day, file) for file in days.pop(day, ())]
                if day in fresh:
                    days[day] = [directory.write(day, fresh[day])]
    for day in days:
        if len(days[day]) > _MOST_FILES_A_DAY:
            days[day] = [directory.write(day, pa.concat_tables(directory.read(day, f) for f in days[day]))]
    chosen = SnapshotSet(news.watermark, {day: tuple(files) for day, files in days.items() if files})
    directory.publish(chosen)
    listed = {(day, file) for day, files in chosen.days.items() for file in files}
    if before is not None and news.starts_anew:
        forgotten += [(day, file) for day, files in before.days.items() for file in files]
    directory.collect([gone for gone in forgotten if gone not in listed])
    had = before.days.keys() if before is not None else set[int]()
    return Refresh(chosen, read, len(news.people), sorted(wrong & had))


async def _news(connection: asyncpg.Connection[Any], before: SnapshotSet | None) -> _News:
    reached, snapshot = await position(connection)
    watermark = reached.to_pg()
    # A restored database counts its transactions anew: what lies ahead of the server is of another one.
    starts_anew = before is None or Watermark.parse_pg(before.watermark).xmax > snapshot.xmax
    counts = {row["day"]: row["events"] for row in await connection.fetch(_COUNTS)}
    if before is None or starts_anew:
        return _News(watermark, [], await _rows(connection, _ROWS), counts, True)
    since = (str(Watermark.parse_pg(before.watermark).xmin), before.watermark)
    people = [bytes(row["user_key"]) for row in await connection.fetch(_CHANGED_PEOPLE, *since)]
    rows = await _rows(connection, _NEW, *since, people)
    return _News(watermark, people, rows, counts, False)


def _without(
    directory: SnapshotDirectory,
    day: int,
    days: dict[int, list[SnapshotFile]],
    people: Sequence[bytes],
    new: pa.Table | None,
) -> list[tuple[int, SnapshotFile]]:
    """Takes people, and events that came anew, out of a day's files; returns the files that had them."""
    if not people and new is None:
        return []
    people_set = pa.array(people, pa.binary(16))
    replaced, left = [], []
    for file in days[day]:
        table = directory.read(day, file)
        gone = pc.is_in(table["user_key"], people_set)
        if new is not None:
            gone = pc.or_(gone, pc.is_in(table["event_key"], new["event_key"].combine_chunks()))
        if not pc.any(gone).as_py():
            left.append(file)
            continue
        replaced.append((day, file))
        rest = table.filter(pc.invert(gone))
        if len(rest):
            left.append(directory.write(day, rest))
    days[day] = left
    return replaced


def by_day(table: pa.Table) -> Iterable[tuple[int, pa.Table]]:
    """Yields each day of `time` with its events, in the order of their keys."""
    if not len(table):
        return
    day_E = table["time"].to_numpy() // DAY_MICROSECONDS
    order = pc.sort_indices(table.append_column("day", pa.array(day_E)), [("day", "ascending"), ("event_key", "ascending"), ("line", "ascending")])  # fmt: skip
    table, day_E = table.take(order), day_E[order.to_numpy()]
    bounds = np.flatnonzero(np.diff(day_E)) + 1
    for first, last in zip([0, *bounds], [*bounds, len(day_E)], strict=True):
        yield int(day_E[first]), table.slice(int(first), int(last - first))


async def _rows(connection: asyncpg.Connection[Any], statement: str, *arguments: Any) -> pa.Table:
    tables: list[pa.Table] = []

    def keep(block: RowBlock) -> None:
        tables.append(
            table_of(
                {
                    "event_key": block.event,
                    "user_key": arrow_keys(block.user_key_E),
                    "item_id": block.item.dictionary_decode(),
                    "kind": block.kind_E,
                    "time": block.time_E,
                    "line": block.line_E,
                }
            )
        )

    await copy_out(connection, statement, *arguments, layout=WITH_EVENT_KEY, keep=keep)
    return pa.concat_tables(tables) if tables else SCHEMA.empty_table()


def read_set(
    directory: SnapshotDirectory,
    chosen: SnapshotSet,
    *,
    start_time: datetime | None = None,
    end_time: datetime | None = None,
    kinds: Sequence[int],
) -> EventColumns:
    """Returns the events of a set, as `read_events` would; the same set gives the same arrays, bit for bit.

    Raises:
        DamagedFile: a file is missing, or its digest does not fit.
    """
    low = _microseconds(start_time) if start_time else None
    high = _microseconds(end_time) if end_time else None
    users: list[pa.DictionaryArray] = []
    items: list[pa.DictionaryArray] = []
    numbers: list[tuple[Any, Any, Any]] = []
    for day, files in sorted(chosen.days.items()):
        if (low is not None and (day + 1) * DAY_MICROSECONDS <= low) or (
            high is not None and day * DAY_MICROSECONDS >= high
        ):
            continue
        for file in files:
            table = directory.read(day, file)
            time_E = table["time"].to_numpy()
            keep_E = np.isin(table["kind"].to_numpy(), list(kinds))
            if low is not None:
                keep_E &= time_E >= low
            if high is not None:
                keep_E &= time_E < high
            table = table.filter(pa.array(keep_E)).combine_chunks()
            if not len(table):
                continue
            users.append(table["user_key"].chunk(0).dictionary_encode())
            items.append(table["item_id"].chunk(0).dictionary_encode())
            numbers.append(tuple(table[name].to_numpy() for name in ("kind", "time", "line")))
    user_E, _ = unified(users, pa.binary(16))
    item_E, item_ids = unified(items, pa.string())
    kinds_, times, lines = zip(*numbers, strict=True) if numbers else ((), (), ())
    nothing = [np.zeros(0, np.int64)]
    return EventColumns(
        user_E=user_E.astype(np.int64),
        item_E=item_E,
        kind_E=np.concatenate(kinds_ or nothing).astype(np.int32),
        time_E=np.concatenate(times or nothing).astype(np.int64),
        order_E=np.concatenate(lines or nothing).astype(np.int64),
        item_ids=item_ids.to_pylist(),
        watermark=Watermark.parse_pg(chosen.watermark).encode(),
        snapshot=chosen.digest,
    )


def _microseconds(moment: datetime) -> int:
    return round(moment.timestamp() * 1_000_000)


def read_through(
    conninfo: str,
    directory: SnapshotDirectory,
    *,
    watermark: str = "",
    report: Callable[[str], None] = lambda _: None,
    **window: Any,
) -> EventColumns | None:
    """Returns the events of the log through the day files, brought up to it first.

    Args:
        watermark: of an earlier reading that must be repeated; empty for now.
        report: told in words what was done.

    Returns:
        None where the set of that watermark is gone, as after an erasure.

    Raises:
        LOG_ERRORS: the log cannot be read or a file cannot be written.
    """
    with directory.locked():
        if watermark:
            kept = directory.set_of_watermark(watermark)
            try:
                return None if kept is None else read_set(directory, kept, **window)
            except DamagedFile:
                return None
        damaged: set[int] = set()
        for _ in range(2):
            done = refresh(conninfo, directory, damaged)
            report(_in_words(done))
            try:
                return read_set(directory, done.chosen, **window)
            except DamagedFile:
                # Every damaged file at once: the log shall be asked once more, not once a file.
                damaged = set(damaged_days(directory, done.chosen))
        return None


def read_again(directory: SnapshotDirectory, digest: str, **window: Any) -> EventColumns | None:
    """Returns the events of the set of that digest; None where it, or a file of it, is gone."""
    with directory.locked():
        kept = directory.load_set(digest)
        try:
            return None if kept is None else read_set(directory, kept, **window)
        except DamagedFile:
            return None


def damaged_days(directory: SnapshotDirectory, chosen: SnapshotSet) -> list[int]:
    """Returns the days of a set with a file that is missing or whose digest does not fit."""
    found = []
    for day, files in chosen.days.items():
        try:
            for file in files:
                directory.read(day, file)
        except DamagedFile:
            found.append(day)
    return sorted(found)


def _in_words(done: Refresh) -> str:
    held = sum(done.chosen.rows_of(day) for day in done.chosen.days)
    words = f"{done.read:,} events came from the log, {held - min(done.read, held):,} from day files; they hold {len(done.chosen.days):,} days."
    if done.people:
        words += f" {done.people:,} people changed their consent or were erased."
    if done.read_again:
        words += f" {len(done.read_again):,} days were read again."
    return words
