"""Stores batches of events: one statement a commit, columns as arrays, no row ever alone."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import numpy.typing as npt
import psycopg
from psycopg import sql

from services.feedback.domain.events import Appended, AppendVerdict, Column, EventColumns
from services.feedback.storage import pg_arrays
from services.feedback.storage.insert_events import UNSEEN, insert_statement, parameters_of
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
        self._statement = insert_statement(key_version)
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
        rows, again, first = _by_key(columns.column("event_key"))
        xid, verdicts = self._insert(connection, columns if rows is None else columns.taken(rows))
        exceptions = (
            verdicts if rows is None else {int(rows[row]): verdict for row, verdict in verdicts.items()}
        )
        if not len(again):
            return Appended(xid, exceptions)
        digests, tombstone_keys = columns.column("payload_digest"), columns.column("tombstone_key")
        freed: list[int] = []
        for row, earlier in zip(again.tolist(), first.tolist(), strict=True):
            verdict = exceptions.get(earlier)
            if verdict is AppendVerdict.USER_FORGOTTEN:
                freed.append(row)
            elif digests[row] == digests[earlier]:
                exceptions[row] = verdict or AppendVerdict.DUPLICATE
            else:
                exceptions[row] = AppendVerdict.PAYLOAD_CONFLICT
        if freed:
            # Whose event came first has been forgotten, and took no id: it is left to the next who lives.
            forgotten = self._forgotten(connection, tombstone_keys[freed].tolist())
            exceptions |= {
                row: AppendVerdict.USER_FORGOTTEN
                for row in freed
                if tombstone_keys[row].tobytes() in forgotten
            }
            if living := [row for row in freed if tombstone_keys[row].tobytes() not in forgotten]:
                after = self._append(connection, columns.taken(np.array(living)))
                exceptions |= {living[row]: verdict for row, verdict in after.exceptions.items()}
                xid = after.xid
        return Appended(xid, exceptions)

    @staticmethod
    def _forgotten(connection: psycopg.Connection[Any], tombstone_keys: Sequence[bytes]) -> set[bytes]:
        graves = connection.execute(_FORGOTTEN, [pg_arrays.key_array(tombstone_keys)], binary=True)
        return {key for (key,) in graves.fetchall()}

    def _insert(
        self, connection: psycopg.Connection[Any], columns: EventColumns
    ) -> tuple[int, dict[int, AppendVerdict]]:
        """Stores rows whose keys ascend, each once; returns the transaction and what was not stored."""
        if "text" not in columns.sparse:
            parameters = parameters_of(columns, {}, self._texts)
            with connection.pipeline():
                connection.execute("BEGIN")
                # The lock is taken by a statement of its own, so that the snapshot of the next one is younger.
                connection.execute(_SHARE_WRITERS)
                cursor = connection.execute(self._statement, parameters, prepare=True, binary=True)
                connection.execute("COMMIT")
        else:
            with connection.transaction():
                connection.execute(_SHARE_WRITERS)
                parameters = parameters_of(columns, self._encrypted(connection, columns), self._texts)
                cursor = connection.execute(self._statement, parameters, prepare=True, binary=True)
        row = cursor.fetchone()
        assert row is not None
        xid, missing, told = row
        if missing is None:
            return int(xid), {}
        unseen = [number for number, verdict in zip(missing, told, strict=True) if verdict == UNSEEN]
        verdicts = {
            number: AppendVerdict(verdict)
            for number, verdict in zip(missing, told, strict=True)
            if verdict != UNSEEN
        }
        if unseen:
            verdicts |= self._verdicts_of_unseen(connection, columns, unseen)
        return int(xid), verdicts

    def _verdicts_of_unseen(
        self, connection: psycopg.Connection[Any], columns: EventColumns, rows: Sequence[int]
    ) -> dict[int, AppendVerdict]:
        """Returns the verdicts on rows that another transaction stored while this one was about to."""
        keys = columns.column("event_key")[rows].tolist()
        found = connection.execute(_STORED_DIGESTS, [pg_arrays.uuid_array(keys)], binary=True)
        digest_of = dict(found.fetchall())
        verdicts = {}
        for row, key, digest in zip(rows, keys, columns.column("payload_digest")[rows].tolist(), strict=True):
            if key not in digest_of:
                # Erased between the two statements; a retry stores it or says why not.
                raise Unavailable("LOG_UNAVAILABLE", "Rows were erased while they were being stored; retry.")
            verdicts[row] = (
                AppendVerdict.DUPLICATE if digest_of[key] == digest else AppendVerdict.PAYLOAD_CONFLICT
            )
        return verdicts

    def _encrypted(
        self, connection: psycopg.Connection[Any], columns: EventColumns
    ) -> dict[int, bytes | None]:
        texts = columns.sparse["text"]
        user_keys, event_keys = columns.column("user_key").tolist(), columns.column("event_key").tolist()
        tombstone_keys = columns.column("tombstone_key").tolist()
        tombstone_of = {user_keys[row]: tombstone_keys[row] for row in texts}
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

    def _ensure_partitions(self, connection: psycopg.Connection[Any], event_keys: Column) -> None:
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


def _by_key(
    keys: Column,
) -> tuple[npt.NDArray[np.int64] | None, npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Returns in which order keys ascend, each once, the first row of it; None for the order they are in.

    And the rows whose key comes again, in their order, with the first row of that key.
    """
    halves = keys.view(">u8").reshape(-1, 2).astype(np.uint64)
    order = np.lexsort((halves[:, 1], halves[:, 0]))
    ordered = halves[order]
    is_first = np.ones(len(order), dtype=bool)
    np.any(ordered[1:] != ordered[:-1], axis=1, out=is_first[1:])
    rows = order[is_first]
    if len(rows) == len(order):
        nothing = np.empty(0, dtype=np.int64)
        return None if (order[1:] > order[:-1]).all() else order, nothing, nothing
    again, first = order[~is_first], rows[np.cumsum(is_first) - 1][~is_first]
    in_turn = np.argsort(again)
    return rows, again[in_turn], first[in_turn]


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
