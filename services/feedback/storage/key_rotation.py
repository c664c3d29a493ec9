"""Brings every stored user key to the newest version, without a single raw id.

Whole persons at a time: a transaction rewrites all rows of some, gives the rows a
new `xid` so that readers of the log see them again under the new key, and retires
the old keys, so that readers drop what they hold under those. To a reader a person
is never there twice, and never gone.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, Protocol

import psycopg
from psycopg.rows import dict_row

from services.feedback.domain.key_rotation import KeyRotation, KeyRotationState
from services.feedback.storage.partitions import WRITERS_LOCK
from services.feedback.storage.text_cipher import TextCipher, decrypt, encrypt
from services.feedback.storage.unknown_items import note_rewriting
from shared.database import Database
from shared.errors import NotFound
from shared.telemetry import get_logger

_PAGE_ROWS = 1_000
_RUNNING = int(KeyRotationState.RUNNING)

_OLD_KEYS = """
SELECT DISTINCT user_key, key_version FROM (
    SELECT user_key, key_version FROM feedback.events WHERE user_key > %s AND key_version < %s
    ORDER BY user_key LIMIT %s
) AS page
"""
_OLD_KEYS_WITHOUT_EVENTS = """
SELECT user_key, key_version FROM feedback.consents WHERE key_version < %s
UNION SELECT user_key, key_version FROM feedback.data_keys WHERE key_version < %s
UNION SELECT user_key, key_version FROM feedback.purged_people WHERE key_version < %s
LIMIT %s
"""
_REWRITE_EVENTS = """
UPDATE feedback.events AS e
SET user_key = u.new_key, key_version = %(target)s, xid = pg_current_xact_id()
FROM unnest(%(old)s::bytea[], %(new)s::bytea[], %(versions)s::smallint[]) AS u (old_key, new_key, version)
WHERE e.user_key = u.old_key AND e.key_version = u.version
"""
# The newest word counts. Before the rotation it may stand under either key.
_COPY_CONSENTS = """
INSERT INTO feedback.consents AS present (user_key, personalisation, training, marketing, updated_at, key_version)
SELECT DISTINCT ON (u.new_key) u.new_key, c.personalisation, c.training, c.marketing, c.updated_at, %(target)s
FROM unnest(%(old)s::bytea[], %(new)s::bytea[]) AS u (old_key, new_key)
JOIN feedback.consents AS c ON c.user_key = u.old_key
ORDER BY u.new_key, c.updated_at DESC
ON CONFLICT (user_key) DO UPDATE SET
    personalisation = excluded.personalisation, training = excluded.training, marketing = excluded.marketing,
    updated_at = excluded.updated_at, xid = pg_current_xact_id()
WHERE present.updated_at < excluded.updated_at
"""
_MOVE_PURGED = """
WITH gone AS (
    DELETE FROM feedback.purged_people AS p USING unnest(%(old)s::bytea[], %(new)s::bytea[]) AS u (old_key, new_key)
    WHERE p.user_key = u.old_key RETURNING u.new_key, p.first_received_at
)
INSERT INTO feedback.purged_people AS present (user_key, key_version, first_received_at)
SELECT new_key, %(target)s, min(first_received_at) FROM gone GROUP BY new_key ORDER BY new_key
ON CONFLICT (user_key) DO UPDATE SET first_received_at = LEAST(present.first_received_at, excluded.first_received_at)
"""
_DROP_CONSENTS = "DELETE FROM feedback.consents WHERE user_key = ANY (%(old)s)"
_RETIRE = """
INSERT INTO feedback.retired_keys (user_key) SELECT unnest(%(old)s::bytea[]) ON CONFLICT (user_key) DO NOTHING
"""


class KeyChain(Protocol):
    """The versions of the user key."""

    current_version: int

    def rotated(self, user_key: bytes, version: int, target: int | None = None) -> bytes:
        """Returns the key under `target` (None: the current version) of whose key under `version` is given."""
        ...


class PostgresKeyRotation:
    """Rotations, and the work on them.

    Args:
        on_commit: called after rows were rewritten, to wake readers.
    """

    def __init__(
        self,
        database: Database,
        cipher: TextCipher,
        chain: KeyChain,
        *,
        on_commit: Callable[[], None] = lambda: None,
        wait: Callable[[float], object] = lambda seconds: None,
    ) -> None:
        self._database = database
        self._cipher = cipher
        self._chain = chain
        self._on_commit = on_commit
        self._wait = wait
        self._logger = get_logger("feedback")

    # What is asked

    def begin(self, rows_per_second: int, now: datetime) -> KeyRotation:
        """Returns the rotation to the current version that is under way, or a new one."""
        target = self._chain.current_version
        with self._database.connect() as connection:
            connection.execute("LOCK TABLE feedback.key_rotations IN SHARE ROW EXCLUSIVE MODE")
            found = connection.execute(
                "UPDATE feedback.key_rotations SET state = %s, rows_per_second = %s, ended_at = NULL "
                "WHERE target_version = %s AND state <> %s RETURNING rotation_id",
                (_RUNNING, rows_per_second, target, int(KeyRotationState.SUCCEEDED)),
            ).fetchone()
            rotation_id = found[0] if found else uuid.uuid4()
            if not found:
                connection.execute(
                    "INSERT INTO feedback.key_rotations (rotation_id, state, target_version, rows_per_second, "
                    "created_at) VALUES (%s, %s, %s, %s, %s)",
                    (rotation_id, _RUNNING, target, rows_per_second, now),
                )
        return self.get(str(rotation_id))

    def get(self, rotation_id: str) -> KeyRotation:
        """Returns a rotation; raises NotFound (KEY_ROTATION_NOT_FOUND)."""
        try:
            wanted = uuid.UUID(rotation_id)
        except ValueError:
            raise _not_found(rotation_id) from None
        with self._database.connect() as connection:
            row = (
                connection.cursor(row_factory=dict_row)
                .execute("SELECT * FROM feedback.key_rotations WHERE rotation_id = %s", (wanted,))
                .fetchone()
            )
        if row is None:
            raise _not_found(rotation_id)
        state = KeyRotationState(row["state"])
        remaining = 0 if state is KeyRotationState.SUCCEEDED else row["total_rows"] - row["rewritten_rows"]
        return KeyRotation(
            rotation_id=str(row["rotation_id"]),
            state=state,
            target_version=row["target_version"],
            rewritten_rows=row["rewritten_rows"],
            remaining_rows=max(0, remaining),
            created_at=row["created_at"],
            ended_at=row["ended_at"],
        )

    # What is done

    def adopt_consents(self) -> int:
        """Copies consent to the current keys, before the first event under one; returns the number of copies.

        Without it somebody who said no would count as somebody who never spoke, until rewritten.
        """
        target = self._chain.current_version
        if target == 1:
            return 0
        with self._database.connect() as connection:
            old = connection.execute(
                "SELECT user_key, key_version FROM feedback.consents WHERE key_version < %s", (target,)
            ).fetchall()
            if not old:
                return 0
            return connection.execute(_COPY_CONSENTS, self._parameters(old)).rowcount

    def step(self) -> bool:
        """Rewrites some persons of the rotation under way; returns whether there is more to do."""
        with self._database.connect() as connection:
            row = (
                connection.cursor(row_factory=dict_row)
                .execute(
                    "SELECT * FROM feedback.key_rotations WHERE state = %s AND target_version = %s LIMIT 1",
                    (_RUNNING, self._chain.current_version),
                )
                .fetchone()
            )
        if row is None:
            return False
        rotation_id, last = row["rotation_id"], row["last_user_key"]
        if not last and not row["rewritten_rows"]:
            self._count(rotation_id)
        with self._database.connect() as connection:
            old = connection.execute(
                _OLD_KEYS, (last, self._chain.current_version, _PAGE_ROWS), binary=True
            ).fetchall()
        if old:
            rewritten = self._rewrite(rotation_id, old, max(key for key, _ in old))
            self._on_commit()
            self._wait(rewritten / row["rows_per_second"])
        elif last:
            # A lagging replica may have written behind the cursor: once more from the start.
            with self._database.connect() as connection:
                connection.execute(
                    "UPDATE feedback.key_rotations SET last_user_key = '' WHERE rotation_id = %s",
                    (rotation_id,),
                )
        else:
            return self._complete(rotation_id)
        return True

    def _count(self, rotation_id: uuid.UUID) -> None:
        with self._database.connect() as connection:
            connection.execute("SET LOCAL statement_timeout = 0")
            connection.execute(
                "UPDATE feedback.key_rotations SET total_rows = "
                "(SELECT count(*) FROM feedback.events WHERE key_version < %s) WHERE rotation_id = %s",
                (self._chain.current_version, rotation_id),
            )

    def _rewrite(self, rotation_id: uuid.UUID, old: Sequence[tuple[bytes, int]], last: bytes | None) -> int:
        parameters = self._parameters(old)
        with self._database.connect() as connection:
            # As a writer of the log does: an erasure waits for this, or this sees its result.
            connection.execute("SELECT pg_advisory_xact_lock_shared(%s)", (WRITERS_LOCK,))
            self._move_data_keys(connection, parameters)
            note_rewriting(connection, parameters)
            rewritten = connection.execute(_REWRITE_EVENTS, parameters).rowcount
            connection.execute(_COPY_CONSENTS, parameters)
            connection.execute(_DROP_CONSENTS, parameters)
            connection.execute(_MOVE_PURGED, parameters)
            connection.execute(_RETIRE, parameters)
            connection.execute(
                "UPDATE feedback.key_rotations SET rewritten_rows = rewritten_rows + %s, "
                "last_user_key = COALESCE(%s, last_user_key) WHERE rotation_id = %s",
                (rewritten, last, rotation_id),
            )
        return rewritten

    def _move_data_keys(self, connection: psycopg.Connection[Any], parameters: dict[str, Any]) -> None:
        target_of = dict(zip(parameters["old"], parameters["new"], strict=True))
        rows = connection.execute(
            "SELECT user_key, key_id, wrapped_key FROM feedback.data_keys WHERE user_key = ANY (%s) FOR UPDATE",
            ([*target_of, *target_of.values()],),
        ).fetchall()
        held = {user_key: (key_id, wrapped) for user_key, key_id, wrapped in rows}
        for old_key, new_key in target_of.items():
            if old_key not in held:
                continue
            if new_key in held:
                # Who wrote under both versions has two data keys: the older texts go over to the newer one.
                self._encrypt_anew(connection, old_key, held[old_key], held[new_key])
                connection.execute("DELETE FROM feedback.data_keys WHERE user_key = %s", (old_key,))
            else:
                connection.execute(
                    "UPDATE feedback.data_keys SET user_key = %s, key_version = %s WHERE user_key = %s",
                    (new_key, parameters["target"], old_key),
                )
                held[new_key] = held[old_key]

    def _encrypt_anew(
        self,
        connection: psycopg.Connection[Any],
        user_key: bytes,
        old: tuple[uuid.UUID, bytes],
        new: tuple[uuid.UUID, bytes],
    ) -> None:
        old_id, new_id = old[0].bytes, new[0].bytes
        opener, sealer = self._cipher.unwrap(old[1], old_id), self._cipher.unwrap(new[1], new_id)
        texts = connection.execute(
            "SELECT event_key, text FROM feedback.events WHERE user_key = %s AND text IS NOT NULL",
            (user_key,),
        ).fetchall()
        for event_key, sealed in texts:
            text = decrypt(opener, sealed, event_key.bytes, old_id)
            connection.execute(
                "UPDATE feedback.events SET text = %s WHERE event_key = %s",
                (encrypt(sealer, text, event_key.bytes, new_id), event_key),
            )

    def _complete(self, rotation_id: uuid.UUID) -> bool:
        target = self._chain.current_version
        with self._database.connect() as connection:
            old = connection.execute(
                _OLD_KEYS_WITHOUT_EVENTS, (target, target, target, _PAGE_ROWS), binary=True
            ).fetchall()
        if old:
            self._rewrite(rotation_id, old, None)
            return True
        with self._database.connect() as connection:
            # The forgotten stay forgotten under the new key too.
            graves = connection.execute(
                "SELECT tombstone_key, user_keys FROM feedback.tombstones WHERE cardinality(user_keys) < %s "
                "LIMIT %s FOR UPDATE",
                (target, _PAGE_ROWS),
            ).fetchall()
            for tombstone_key, user_keys in graves:
                keys = list(user_keys)
                for version in range(len(keys), target):
                    keys.insert(0, self._chain.rotated(keys[0], version, version + 1))
                connection.execute(
                    "UPDATE feedback.tombstones SET user_keys = %s, xid = pg_current_xact_id() "
                    "WHERE tombstone_key = %s",
                    (keys, tombstone_key),
                )
            if graves:
                return True
            # What was counted under older keys has come again under the new one.
            connection.execute("DELETE FROM feedback.bot_windows WHERE key_version < %s", (target,))
            connection.execute(
                "UPDATE feedback.key_rotations SET state = %s, ended_at = now() WHERE rotation_id = %s",
                (int(KeyRotationState.SUCCEEDED), rotation_id),
            )
        self._on_commit()
        self._logger.info("user keys rotated", target_version=target)
        return False

    def _parameters(self, old: Sequence[tuple[bytes, int]]) -> dict[str, Any]:
        # In the order of the new keys: transactions that meet wait for each other in one direction.
        keyed = sorted((self._chain.rotated(key, version), bytes(key), version) for key, version in old)
        return {
            "new": [new for new, _, _ in keyed],
            "old": [key for _, key, _ in keyed],
            "versions": [version for _, _, version in keyed],
            "target": self._chain.current_version,
        }


def _not_found(rotation_id: str) -> NotFound:
    return NotFound(
        "KEY_ROTATION_NOT_FOUND",
        "There is no such key rotation. `RotateUserKeys` begins one, or names the one under way.",
        {"keyRotationId": rotation_id[:64]},
    )
