"""The log from Postgres into arrays: binary COPY, decoded by NumPy, no Python object an event.

A row of COPY's binary format is a count of fields and then, for each, its length and its bytes
(https://www.postgresql.org/docs/current/sql-copy.html). People and items are numbered by the server, so
that every field has a fixed width and a whole block is one structured array.
"""

from __future__ import annotations

from datetime import datetime

import numpy as np
import psycopg
from psycopg import sql

from services.trainer.pipeline.dataset import EventColumns
from shared.bundle.history import INTEREST_KINDS
from shared.tokens import Watermark

# Bytes of a row as COPY sends it: int16 count, then int32 length and value of each field.
_ROW = np.dtype(
    [
        ("fields", ">i2"),
        ("user_length", ">i4"),
        ("user", ">i4"),
        ("item_length", ">i4"),
        ("item", ">i4"),
        ("kind_length", ">i4"),
        ("kind", ">i2"),
        ("time_length", ">i4"),
        ("time", ">i8"),
        ("order_length", ">i4"),
        ("order", ">i2"),
    ]
)
_SIGNATURE = b"PGCOPY\n\xff\r\n\x00"
_TRAILER = b"\xff\xff"
# Postgres counts microseconds from 2000.
_EPOCH_MICROSECONDS = 946_684_800_000_000


def read_events(
    connection: psycopg.Connection,
    *,
    start_time: datetime | None = None,
    end_time: datetime | None = None,
    kinds: tuple[int, ...] = INTEREST_KINDS,
    as_of: str = "",
) -> EventColumns:
    """Returns the training events of the log, in one snapshot, with the watermark of it.

    Args:
        connection: not in a transaction; one is made and ended.
        start_time, end_time: of `occurred_at`; the start belongs to it, the end does not.
        kinds: of the events to read.
        as_of: a `pg_snapshot`: only what it saw is read, less what was erased or withdrawn since; empty for now.

    Raises:
        psycopg.Error: the log cannot be read.
    """
    with connection.transaction():
        connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        # Numbering a long log takes longer than a call may.
        connection.execute("SET LOCAL statement_timeout = 0")
        row = connection.execute("SELECT pg_current_snapshot()::text").fetchone()
        if row is None:
            raise AssertionError("a SELECT without FROM has one row")
        watermark = Watermark.parse_pg(as_of or row[0])
        # One pass over the log. The user key itself stays in the database: a number is all that training needs.
        connection.execute(
            "CREATE TEMP TABLE IF NOT EXISTS training_rows "
            "(user_key bytea, item_id text, kind smallint, occurred_at timestamptz, line smallint) ON COMMIT DROP"
        )
        connection.execute(
            "INSERT INTO training_rows SELECT user_key, item_id, kind, occurred_at, line "
            "FROM feedback.training_events_v1 WHERE kind = ANY(%s) "
            "AND occurred_at >= coalesce(%s, '-infinity'::timestamptz) "
            "AND occurred_at < coalesce(%s, 'infinity'::timestamptz) "
            "AND (%s = '' OR pg_visible_in_snapshot(xid, nullif(%s, '')::pg_snapshot))",
            (list(kinds), start_time, end_time, as_of, as_of),
        )
        connection.execute(
            "CREATE TEMP TABLE training_items ON COMMIT DROP AS SELECT item_id, "
            '(row_number() OVER (ORDER BY item_id COLLATE "C") - 1)::integer AS number '
            "FROM (SELECT DISTINCT item_id FROM training_rows) AS items"
        )
        connection.execute(
            "CREATE TEMP TABLE training_users ON COMMIT DROP AS SELECT user_key, "
            "(row_number() OVER (ORDER BY user_key) - 1)::integer AS number "
            "FROM (SELECT DISTINCT user_key FROM training_rows) AS users"
        )
        connection.execute("ANALYZE training_items; ANALYZE training_users")
        item_ids = [
            name for (name,) in connection.execute("SELECT item_id FROM training_items ORDER BY number")
        ]
        rows_E = _copy_rows(
            connection,
            sql.SQL(
                "COPY (SELECT u.number, i.number, r.kind, r.occurred_at, coalesce(r.line, 0::smallint) "
                "FROM training_rows AS r JOIN training_items AS i USING (item_id) "
                "JOIN training_users AS u USING (user_key)) TO STDOUT (FORMAT binary)"
            ),
        )
    return EventColumns(
        user_E=rows_E["user"].astype(np.int64),
        item_E=rows_E["item"].astype(np.int32),
        kind_E=rows_E["kind"].astype(np.int32),
        time_E=rows_E["time"].astype(np.int64) + _EPOCH_MICROSECONDS,
        order_E=rows_E["order"].astype(np.int64),
        item_ids=item_ids,
        watermark=watermark.encode(),
    )


def _copy_rows(connection: psycopg.Connection, statement: sql.SQL) -> np.ndarray:
    with connection.cursor() as cursor, cursor.copy(statement) as copy:
        content = bytearray().join(copy)
    return decode_rows(content)


def decode_rows(content: bytes | bytearray) -> np.ndarray:
    """Returns the rows of a binary COPY as a structured array.

    Raises:
        ValueError: it is not such a COPY: its header, a null, or a field of another width.
    """
    header = len(_SIGNATURE) + 8
    if bytes(content[: len(_SIGNATURE)]) != _SIGNATURE or bytes(content[-2:]) != _TRAILER:
        raise ValueError("not a complete binary COPY")
    header += int.from_bytes(content[len(_SIGNATURE) + 4 : header], "big")
    length = len(content) - header - len(_TRAILER)
    if length % _ROW.itemsize:
        raise ValueError("a row of the COPY has another width: a null, or a field of another type")
    rows_E = np.frombuffer(content, _ROW, length // _ROW.itemsize, offset=header)
    widths = {"user": 4, "item": 4, "kind": 2, "time": 8, "order": 2}
    if len(rows_E) and any((rows_E[f"{name}_length"] != width).any() for name, width in widths.items()):
        raise ValueError("a field of the COPY has another width")
    return rows_E
