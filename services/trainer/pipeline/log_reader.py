"""The log from Postgres into arrays: binary COPY over asyncpg, decoded by NumPy and Arrow, no Python object an event.

libpq hands a COPY over row by row, and a Python object for each row costs more than the row does the server. asyncpg
hands over whatever the socket held; a thread decodes it while the server makes the next rows.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from urllib.parse import urlencode

import asyncpg
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from psycopg.conninfo import conninfo_to_dict

from services.trainer.pipeline.copy_decoding import (
    WITHOUT_EVENT_KEY,
    CopyDecoder,
    KeyNumbers,
    RowBlock,
    RowLayout,
    unified,
)
from services.trainer.pipeline.dataset import EventColumns
from shared.bundle.history import INTEREST_KINDS
from shared.tokens import Watermark

# Decoded at once: enough to amortise NumPy's calls, little beside the arrays.
_PIECE_BYTES = 2_000_000
# Of libpq's settings those that asyncpg knows by another name, or not at all.
_ONLY_LIBPQ = ("connect_timeout", "keepalives", "keepalives_idle", "keepalives_interval", "keepalives_count")
_CONNECT_SECONDS = 5.0

# What reading may raise: the server's answers, the way to it, and what came on it.
LOG_ERRORS = (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, ValueError)

_POSITION = """
SELECT pg_current_snapshot()::text,
    (SELECT t.xid::text FROM feedback.log_transactions_v1 AS t ORDER BY t.xid DESC LIMIT 1)
"""
_ROWS = f"SELECT {WITHOUT_EVENT_KEY.columns} FROM feedback.training_events_v1 WHERE "  # noqa: S608


@dataclass(frozen=True, slots=True, eq=False)
class KeyedEvents:
    """The log as columns, and who the people are.

    Attributes:
        events: people numbered by their keys' order, items by their ids' (both by bytes).
        user_key_U: the key of each number, dtype V16.
    """

    events: EventColumns
    user_key_U: npt.NDArray[np.void]


def read_keyed_events(
    conninfo: str,
    *,
    start_time: datetime | None = None,
    end_time: datetime | None = None,
    kinds: Sequence[int] = INTEREST_KINDS,
    as_of: str = "",
) -> KeyedEvents:
    """Returns the training events of the log, in one snapshot, with the watermark of it.

    Args:
        conninfo: of libpq.
        start_time, end_time: of `occurred_at`; the start belongs to it, the end does not.
        kinds: of the events to read.
        as_of: a `pg_snapshot`: only what it saw is read, less what was erased or withdrawn since; empty for now.

    Raises:
        LOG_ERRORS: the log cannot be read.
    """
    return asyncio.run(_read(conninfo, start_time, end_time, kinds, as_of))


def read_events(conninfo: str, **window: Any) -> EventColumns:
    """Returns what `read_keyed_events` does, without the keys."""
    return read_keyed_events(conninfo, **window).events


def asyncpg_dsn(conninfo: str) -> str:
    """Returns the same connection in the words of asyncpg, which takes libpq's but for a few."""
    known = {k: v for k, v in conninfo_to_dict(conninfo).items() if k not in _ONLY_LIBPQ and v is not None}
    return "postgresql://?" + urlencode(known)


@asynccontextmanager
async def one_snapshot(conninfo: str) -> AsyncIterator[asyncpg.Connection[Any]]:
    """Lends a connection whose statements all see the same snapshot, and may take long."""
    connection = await asyncpg.connect(
        asyncpg_dsn(conninfo), timeout=_CONNECT_SECONDS, statement_cache_size=0
    )
    try:
        async with connection.transaction(isolation="repeatable_read", readonly=True):
            await connection.execute("SET LOCAL statement_timeout = 0")
            yield connection
    finally:
        await connection.close(timeout=_CONNECT_SECONDS)


async def position(connection: asyncpg.Connection[Any]) -> tuple[Watermark, Watermark]:
    """Returns the watermark of who reads everything that the connection's snapshot shows, and the snapshot."""
    row = await connection.fetchrow(_POSITION)
    snapshot = Watermark.parse_pg(row[0])
    return snapshot.durable(int(row[1] or 0)), snapshot


async def _read(
    conninfo: str,
    start_time: datetime | None,
    end_time: datetime | None,
    kinds: Sequence[int],
    as_of: str,
) -> KeyedEvents:
    async with one_snapshot(conninfo) as connection:
        watermark = Watermark.parse_pg(as_of) if as_of else (await position(connection))[0]
        # A bound that bounds nothing would still be compared with every row.
        conditions: list[tuple[str, Any]] = [("kind = ANY(${})", list(kinds))]
        if start_time is not None:
            conditions.append(("occurred_at >= ${}", start_time))
        if end_time is not None:
            conditions.append(("occurred_at < ${}", end_time))
        if as_of:
            conditions.append(("pg_visible_in_snapshot(xid, ${}::text::pg_snapshot)", as_of))
        numbered = [condition.format(place) for place, (condition, _) in enumerate(conditions, 1)]
        events = _Columns()
        await copy_out(
            connection,
            _ROWS + " AND ".join(numbered),
            *[argument for _, argument in conditions],
            keep=events.add,
        )
    return events.finish(watermark.encode())


async def copy_out(
    connection: asyncpg.Connection[Any],
    statement: str,
    *arguments: Any,
    layout: RowLayout = WITHOUT_EVENT_KEY,
    keep: Callable[[RowBlock], None],
) -> None:
    """Hands over the rows of a query over the columns of a layout, block by block, in their order."""
    decoder = CopyDecoder(layout)
    loop = asyncio.get_running_loop()
    pieces: list[bytes] = []
    under_way: asyncio.Future[None] | None = None

    def decode(pieces: list[bytes]) -> None:
        decoder.feed(*pieces)
        for block in decoder.take():
            keep(block)

    with ThreadPoolExecutor(1, "decode") as thread:
        size = 0

        async def take(content: bytes) -> None:
            nonlocal pieces, size, under_way
            pieces.append(content)
            size += len(content)
            if size >= _PIECE_BYTES:
                if under_way is not None:
                    await under_way
                under_way = loop.run_in_executor(thread, decode, pieces)
                pieces, size = [], 0

        await connection.copy_from_query(statement, *arguments, output=take, format="binary")
        if under_way is not None:
            await under_way
        decode(pieces)
    for block in decoder.finish():
        keep(block)


class _Columns:
    """Puts blocks together; what can be done for each is done while the server makes the next."""

    def __init__(self) -> None:
        self._users = KeyNumbers()
        self._items: list[pa.DictionaryArray] = []
        self._numbers: list[tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]] = []

    def add(self, block: RowBlock) -> None:
        """Takes the next block."""
        self._users.add(block.user_key_E)
        self._items.append(block.item)
        self._numbers.append((block.kind_E, block.time_E, block.line_E))

    def finish(self, watermark: bytes) -> KeyedEvents:
        """Returns the blocks as columns; no event is held twice for long."""
        user_E, user_key_U = self._users.finish()
        item_E, item_ids = unified(self._items, pa.string())
        kinds, times, lines = zip(*self._numbers, strict=True) if self._numbers else ((), (), ())
        nothing: list[npt.NDArray[Any]] = [np.zeros(0, np.int64)]
        found = KeyedEvents(
            EventColumns(
                user_E=user_E,
                item_E=item_E,
                kind_E=np.concatenate(kinds or nothing).astype(np.int32),
                time_E=np.concatenate(times or nothing).astype(np.int64),
                order_E=np.concatenate(lines or nothing).astype(np.int64),
                item_ids=item_ids.to_pylist(),
                watermark=watermark,
            ),
            user_key_U,
        )
        del item_ids
        # Arrow keeps what it freed, for the next of its own; training is not that.
        pa.default_memory_pool().release_unused()
        return found
