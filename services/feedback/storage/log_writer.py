"""Stores batches of events: one statement a commit, columns as arrays, no row ever alone."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import psycopg
from psycopg import sql

from services.feedback.domain.events import Appended, AppendVerdict, EventColumns
from services.feedback.storage import pg_arrays
from services.feedback.storage.partitions import (
    FIRST_MONTH,
    WRITERS_LOCK,
    ensure_month,
    existing_months,
    month_of,
    months_of,
    partition_name,
)
from services.feedback.storage.text_cipher import TextCipher, encrypt
from shared.database import Database
from shared.errors import FailedPrecondition, ShopkeeperError, Unavailable
from shared.telemetry import get_logger

# Column of the table, element type of the parameter, what is inserted of it.
_PARAMETERS: tuple[tuple[str, str, str], ...] = (
    ("event_key", "uuid", "u.event_key"),
    ("payload_digest", "bigint", "u.payload_digest"),
    ("user_key", "bytea", "u.user_key"),
    ("tombstone_key", "bytea", ""),
    ("kind", "smallint", "u.kind"),
    ("occurred_at", "timestamptz", "u.occurred_at"),
    ("session_key", "bytea", "u.session_key"),
    ("item_id", "text", "u.item_id"),
    ("quantity", "real", "u.quantity"),
    ("price_micros", "bigint", "u.price_micros"),
    ("currency_code", "text", "u.currency_code"),
    ("value", "real", "u.value"),
    ("device", "smallint", "u.device"),
    ("channel", "smallint", "u.channel"),
    ("consent", "smallint", "u.consent"),
    ("is_bot", "boolean", "COALESCE(u.is_bot, false)"),
    ("line_items", "text", "u.line_items::text[]"),
    ("line_quantities", "text", "u.line_quantities::real[]"),
    ("line_prices", "text", "u.line_prices::bigint[]"),
    ("line_positions", "text", "u.line_positions::integer[]"),
    ("impression_items", "text", "u.impression_items::text[]"),
    ("impression_positions", "text", "u.impression_positions::integer[]"),
    ("impression_propensities", "text", "u.impression_propensities::real[]"),
    ("recommendation_id", "bytea", "u.recommendation_id"),
    ("placement", "text", "u.placement"),
    ("serving_config", "text", "u.serving_config"),
    ("model_version", "text", "u.model_version"),
    ("variant", "text", "u.variant"),
    ("position", "integer", "u.position"),
    ("propensity", "real", "u.propensity"),
    ("quarantine_reason", "smallint", "u.quarantine_reason"),
    ("text", "bytea", "u.text"),
    ("attributes", "text", "u.attributes::jsonb"),
)

# Arrays that are empty or shorter are filled up with nulls by `unnest`: a column that no row uses costs nothing.
# Sorted: two transactions that store the same keys wait for each other in one direction, never in a circle.
_INSERT = """
WITH stored AS (
    INSERT INTO feedback.events ({columns}, key_version)
    SELECT {values}, {{key_version}}
    FROM unnest({arrays}) AS u ({names})
    WHERE NOT EXISTS (SELECT FROM feedback.tombstones AS t WHERE t.tombstone_key = u.tombstone_key)
    ORDER BY u.event_key
    ON CONFLICT (event_key) DO NOTHING
    RETURNING event_key
)
SELECT
    count(*),
    pg_current_xact_id()::text,
    CASE WHEN count(*) < %s THEN string_agg(uuid_send(event_key), ''::bytea) END
FROM stored
""".format(  # noqa: S608 - constants of this module alone
    columns=", ".join(name for name, _, value in _PARAMETERS if value),
    values=", ".join(value for _, _, value in _PARAMETERS if value),
    arrays=", ".join(f"%s::{element}[]" for _, element, _ in _PARAMETERS),
    names=", ".join(name for name, _, _ in _PARAMETERS),
)
PARTITION_RETRY_SECONDS = 5.0
_SHARE_WRITERS = f"SELECT pg_advisory_xact_lock_shared({WRITERS_LOCK})"

_STORED_DIGESTS = (
    "SELECT uuid_send(event_key), payload_digest FROM feedback.events WHERE event_key = ANY (%s::uuid[])"
)
_FORGOTTEN = "SELECT tombstone_key FROM feedback.tombstones WHERE tombstone_key = ANY (%s::bytea[])"

_NEW_DATA_KEYS = """
INSERT INTO feedback.data_keys (key_id, user_key, wrapped_key, key_version)
SELECT u.key_id, u.user_key, u.wrapped_key, %s
FROM unnest(%s::uuid[], %s::bytea[], %s::bytea[], %s::bytea[]) AS u (key_id, user_key, wrapped_key, tombstone_key)
WHERE NOT EXISTS (SELECT FROM feedback.tombstones AS t WHERE t.tombstone_key = u.tombstone_key)
ORDER BY u.user_key
ON CONFLICT (user_key) DO NOTHING
"""
_DATA_KEYS = "SELECT user_key, uuid_send(key_id), wrapped_key FROM feedback.data_keys WHERE user_key = ANY (%s::bytea[])"


class LogWriter:
    """Appends to the log over a connection of its own. Used by one thread.

    Args:
        key_version: the version of the user key that the user keys of the rows are under.
    """

    def __init__(self, database: Database, cipher: TextCipher, key_version: int = 1) -> None:
        self._database = database
        self._cipher = cipher
        self._key_version = key_version
        self._statement = _INSERT.format(key_version=int(key_version))
        self._connection: psycopg.Connection[Any] | None = None
        self._months: set[int] = set()
        self._texts = pg_arrays.TextArrays()
        self._logger = get_logger("feedback")
        self._next_attempt_at = 0.0

    def append(self, columns: EventColumns) -> Appended:
        """Stores rows and returns once they are durable.

        Raises:
            Unavailable: the log cannot be written now, or the outcome is unknown.
            psycopg.DataError, psycopg.IntegrityError: a row cannot be stored as it is; nothing was.
        """
        try:
            connection = self._connected()
            self._ensure_partitions(connection, columns.column("event_key"))
            return self._append(connection, columns)
        except (psycopg.DataError, psycopg.IntegrityError):
            self._reset()
            raise
        except psycopg.Error as error:
            # Whatever happened, the connection's state is not to be trusted. Only the primary message is logged:
            # the details of an error can hold values.
            self._reset()
            self._logger.warning(
                "the log cannot be written",
                cause=type(error).__name__,
                message=error.diag.message_primary or str(error).partition("\n")[0],
            )
            raise unavailable(error) from error
        except BaseException:
            self._reset()
            raise

    def close(self) -> None:
        """Closes the connection."""
        self._reset()

    def _append(self, connection: psycopg.Connection[Any], columns: EventColumns) -> Appended:
        keys, digests = columns.column("event_key"), columns.column("payload_digest")
        rows: Sequence[int] | None = None
        if len(set(keys)) < len(keys):
            first_row: dict[bytes, int] = {}
            for row, key in enumerate(keys):
                first_row.setdefault(key, row)
            rows = list(first_row.values())
            subset = columns.taken(rows)
        else:
            subset = columns
        count, xid, stored_keys = self._insert(connection, subset)
        exceptions: dict[int, AppendVerdict] = {}
        if count < len(subset):
            exceptions = self._verdicts_of_missing(connection, subset, stored_keys or b"")
            if rows is not None:
                exceptions = {rows[row]: verdict for row, verdict in exceptions.items()}
        freed: list[int] = []
        if rows is not None:
            kept = set(rows)
            for row, key in enumerate(keys):
                if row in kept:
                    continue
                first = first_row[key]
                verdict = exceptions.get(first)
                if verdict is AppendVerdict.USER_FORGOTTEN:
                    freed.append(row)
                elif digests[row] == digests[first]:
                    exceptions[row] = verdict or AppendVerdict.DUPLICATE
                else:
                    exceptions[row] = AppendVerdict.PAYLOAD_CONFLICT
        if freed:
            # Whose event came first has been forgotten, and took no id: it is left to the next who lives.
            tombstone_keys = columns.column("tombstone_key")
            forgotten = self._forgotten(connection, [tombstone_keys[row] for row in freed])
            exceptions |= {
                row: AppendVerdict.USER_FORGOTTEN for row in freed if tombstone_keys[row] in forgotten
            }
            if living := [row for row in freed if tombstone_keys[row] not in forgotten]:
                after = self._append(connection, columns.taken(living))
                exceptions |= {living[row]: verdict for row, verdict in after.exceptions.items()}
                xid = str(after.xid)
        return Appended(int(xid), exceptions)

    @staticmethod
    def _forgotten(connection: psycopg.Connection[Any], tombstone_keys: Sequence[bytes]) -> set[bytes]:
        graves = connection.execute(_FORGOTTEN, [pg_arrays.key_array(tombstone_keys)], binary=True)
        return {key for (key,) in graves.fetchall()}

    def _insert(
        self, connection: psycopg.Connection[Any], columns: EventColumns
    ) -> tuple[int, str, bytes | None]:
        if "text" not in columns.sparse:
            parameters = [*self._arrays(columns, None), len(columns)]
            with connection.pipeline():
                connection.execute("BEGIN")
                # The lock is taken by a statement of its own, so that the snapshot of the next one is younger.
                connection.execute(_SHARE_WRITERS)
                cursor = connection.execute(self._statement, parameters, prepare=True, binary=True)
                connection.execute("COMMIT")
        else:
            with connection.transaction():
                connection.execute(_SHARE_WRITERS)
                texts = self._encrypted(connection, columns)
                parameters = [*self._arrays(columns, texts), len(columns)]
                cursor = connection.execute(self._statement, parameters, prepare=True, binary=True)
        row = cursor.fetchone()
        assert row is not None
        return row[0], row[1], row[2]

    def _verdicts_of_missing(
        self, connection: psycopg.Connection[Any], columns: EventColumns, stored_keys: bytes
    ) -> dict[int, AppendVerdict]:
        stored = {stored_keys[start : start + 16] for start in range(0, len(stored_keys), 16)}
        keys, digests = columns.column("event_key"), columns.column("payload_digest")
        tombstone_keys = columns.column("tombstone_key")
        missing = [row for row, key in enumerate(keys) if key not in stored]
        with connection.pipeline():
            found = connection.execute(
                _STORED_DIGESTS, [pg_arrays.uuid_array([keys[row] for row in missing])], binary=True
            )
            graves = connection.execute(
                _FORGOTTEN, [pg_arrays.key_array([tombstone_keys[row] for row in missing])], binary=True
            )
        digest_of = dict(found.fetchall())
        forgotten = {key for (key,) in graves.fetchall()}
        verdicts: dict[int, AppendVerdict] = {}
        for row in missing:
            digest = digest_of.get(keys[row])
            if tombstone_keys[row] in forgotten:
                verdicts[row] = AppendVerdict.USER_FORGOTTEN
            elif digest is None:
                # Erased between the two statements; a retry stores it or says why not.
                raise Unavailable("LOG_UNAVAILABLE", "Rows were erased while they were being stored; retry.")
            elif digest == digests[row]:
                verdicts[row] = AppendVerdict.DUPLICATE
            else:
                verdicts[row] = AppendVerdict.PAYLOAD_CONFLICT
        return verdicts

    def _encrypted(
        self, connection: psycopg.Connection[Any], columns: EventColumns
    ) -> dict[int, bytes | None]:
        texts = columns.sparse["text"]
        user_keys, event_keys = columns.column("user_key"), columns.column("event_key")
        tombstone_of = {user_keys[row]: columns.column("tombstone_key")[row] for row in texts}
        people = list(tombstone_of)
        existing = connection.execute(_DATA_KEYS, [pg_arrays.key_array(people)], binary=True).fetchall()
        known = {user_key for user_key, _, _ in existing}
        new = [user_key for user_key in people if user_key not in known]
        if new:
            key_ids = [uuid.uuid4().bytes for _ in new]
            connection.execute(
                _NEW_DATA_KEYS,
                [
                    self._key_version,
                    pg_arrays.uuid_array(key_ids),
                    pg_arrays.key_array(new),
                    pg_arrays.bytes_array([self._cipher.new_wrapped_key(key_id) for key_id in key_ids]),
                    pg_arrays.key_array([tombstone_of[user_key] for user_key in new]),
                ],
            )
            # Another replica may have been faster; its key counts then.
            existing += connection.execute(_DATA_KEYS, [pg_arrays.key_array(new)], binary=True).fetchall()
        key_of = {
            user_key: (key_id, self._cipher.unwrap(wrapped, key_id)) for user_key, key_id, wrapped in existing
        }
        sealed: dict[int, bytes | None] = {}
        for row, text in texts.items():
            # A forgotten person gets no key; the row is about to be refused.
            if entry := key_of.get(user_keys[row]):
                sealed[row] = encrypt(entry[1], text, event_keys[row], entry[0])
        return sealed

    def _arrays(
        self, columns: EventColumns, texts: dict[int, bytes | None] | None
    ) -> list[pg_arrays.BinaryArray]:
        n = len(columns)
        column = columns.column
        sparse = columns.sparse

        def filled(name: str) -> list[Any]:
            values = [None] * n
            for row, value in sparse[name].items():
                values[row] = value
            return values

        def text(name: str) -> pg_arrays.BinaryArray:
            return (
                self._texts.array(filled(name)) if name in sparse else pg_arrays.empty_array(pg_arrays.TEXT)
            )

        def numbers(name: str, oid: int, dtype: str) -> pg_arrays.BinaryArray:
            return (
                pg_arrays.nullable_array(oid, filled(name), dtype)
                if name in sparse
                else pg_arrays.empty_array(oid)
            )

        def literal(name: str) -> pg_arrays.BinaryArray:
            if name not in sparse:
                return pg_arrays.empty_array(pg_arrays.TEXT)
            return pg_arrays.text_array(
                [None if value is None else pg_arrays.array_literal(value) for value in filled(name)]
            )

        sealed: list[bytes | None] = [None] * n
        for row, value in (texts or {}).items():
            sealed[row] = value
        attributes = (
            pg_arrays.text_array(
                [None if value is None else json.dumps(value) for value in filled("attributes")]
            )
            if "attributes" in sparse
            else pg_arrays.empty_array(pg_arrays.TEXT)
        )
        recommendation_ids = (
            pg_arrays.bytes_array(filled("recommendation_id"))
            if "recommendation_id" in sparse
            else pg_arrays.empty_array(pg_arrays.BYTEA)
        )
        return [
            pg_arrays.uuid_array(column("event_key")),
            pg_arrays.nullable_array(pg_arrays.INT8, column("payload_digest"), ">i8"),
            pg_arrays.key_array(column("user_key")),
            pg_arrays.key_array(column("tombstone_key")),
            pg_arrays.small_array(column("kind")),
            pg_arrays.timestamp_array(column("occurred_at_us")),
            pg_arrays.key_array(column("session_key")),
            self._texts.array(column("item_id")),
            pg_arrays.nullable_array(pg_arrays.FLOAT4, column("quantity"), ">f4"),
            pg_arrays.nullable_array(pg_arrays.INT8, column("price_micros"), ">i8"),
            self._texts.array(column("currency_code")),
            pg_arrays.nullable_array(pg_arrays.FLOAT4, column("value"), ">f4"),
            pg_arrays.small_array(column("device")),
            pg_arrays.small_array(column("channel")),
            pg_arrays.small_array(column("consent")),
            numbers("is_bot", pg_arrays.BOOL, "i1"),
            literal("line_items"),
            literal("line_quantities"),
            literal("line_prices"),
            literal("line_positions"),
            literal("impression_items"),
            literal("impression_positions"),
            literal("impression_propensities"),
            recommendation_ids,
            text("placement"),
            text("serving_config"),
            text("model_version"),
            text("variant"),
            numbers("position", pg_arrays.INT4, ">i4"),
            numbers("propensity", pg_arrays.FLOAT4, ">f4"),
            numbers("quarantine_reason", pg_arrays.INT2, ">i2"),
            pg_arrays.bytes_array(sealed) if texts else pg_arrays.empty_array(pg_arrays.BYTEA),
            attributes,
        ]

    def _ensure_partitions(self, connection: psycopg.Connection[Any], event_keys: Sequence[bytes]) -> None:
        months = months_of(event_keys).tolist()
        if self._months.issuperset(months):
            return
        # A wild clock must not litter the schema: what lies outside stays in the default partition.
        last = month_of(datetime.now(UTC)) + 1
        for month in months:
            if month in self._months or not FIRST_MONTH <= month <= last:
                continue
            if time.monotonic() < self._next_attempt_at:
                return
            try:
                ensure_month(connection, month)
                self._months.add(month)
            except psycopg.errors.LockNotAvailable:
                # A training run reads the log. The default partition takes the rows until the month is made.
                self._next_attempt_at = time.monotonic() + PARTITION_RETRY_SECONDS
                self._logger.info("partition put off", month=partition_name(month))

    def _connected(self) -> psycopg.Connection[Any]:
        if self._connection is None or self._connection.closed:
            connection = self._database.dedicated_connection()
            try:
                verify_durability(connection)
                pg_arrays.register(connection)
                self._months = existing_months(connection)
            except BaseException:
                connection.close()
                raise
            self._connection = connection
        return self._connection

    def _reset(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def verify_durability(connection: psycopg.Connection[Any]) -> None:
    """Checks that a commit of this server survives a power cut.

    Raises:
        FailedPrecondition: it does not, so that an acknowledgement would be a lie.
    """
    expected = {
        "synchronous_commit": ("on", "remote_apply"),
        "fsync": ("on",),
        "full_page_writes": ("on",),
    }
    for name, allowed in expected.items():
        row = connection.execute(sql.SQL("SHOW {}").format(sql.Identifier(name))).fetchone()
        value = row[0] if row else "unknown"
        if value not in allowed:
            raise FailedPrecondition(
                "LOG_NOT_DURABLE",
                f"PostgreSQL runs with {name} = {value}: acknowledged events could be lost. "
                f"Set it to {allowed[0]} for the role shopkeeper_feedback, and restart.",
                {"setting": name, "value": str(value)},
            )


def unavailable(error: BaseException) -> ShopkeeperError:
    """Returns the failure of the log that a caller sees; the cause is named by its class alone."""
    return Unavailable(
        "LOG_UNAVAILABLE",
        "The log cannot be written now. Nothing was acknowledged; send the same events again.",
        {"cause": type(error).__name__},
        retry_after_seconds=0.5,
    )
