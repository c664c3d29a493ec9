"""Rebuilds in PostgreSQL."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from psycopg.rows import dict_row

from services.profile.domain.events import MAX_WINDOW_EVENTS
from services.profile.domain.rebuilds import FoldedShopper, Rebuild
from services.profile.storage.log import FOLLOWED
from services.profile.storage.snapshots import snapshot_of, watermark_of
from shared.database import Database, trusted_sql
from shared.errors import NotFound
from shared.identity import UserKey
from shared.operations import OperationState
from shared.tokens import Watermark

_ENDED = int(OperationState.SUCCEEDED)
_FETCH = 2000


class PostgresRebuilds:
    """Implements `ports.RebuildStore`.

    Args:
        users_after: the walk over every shopper of the log.
    """

    def __init__(
        self,
        database: Database,
        users_after: Callable[[bytes, int], tuple[list[UserKey], bytes | None]],
    ) -> None:
        self._database = database
        self.users_after = users_after

    def create(self, request_id: str, now_us: int) -> Rebuild:
        """See `RebuildStore.create`."""
        rebuild_id = uuid.uuid4()
        with self._database.connect() as connection:
            connection.execute(
                "INSERT INTO profile.rebuilds (rebuild_id, request_id, state, created_us) VALUES (%s, %s, %s, %s) "
                "ON CONFLICT (request_id) DO NOTHING",
                (rebuild_id, request_id or None, int(OperationState.PENDING), now_us),
            )
        return self._select("WHERE rebuild_id = %s OR request_id = %s", (rebuild_id, request_id or None))[0]

    def get(self, rebuild_id: str) -> Rebuild:
        """See `RebuildStore.get`."""
        found = self._select("WHERE rebuild_id = %s", (_uuid(rebuild_id),))
        if not found:
            raise _not_found(rebuild_id)
        return found[0]

    def oldest_unfinished(self) -> Rebuild | None:
        """See `RebuildStore.oldest_unfinished`."""
        found = self._select("WHERE state < %s ORDER BY created_us, rebuild_id LIMIT 1", (_ENDED,))
        return found[0] if found else None

    def begin(self, rebuild_id: str) -> Watermark:
        """See `RebuildStore.begin`."""
        with snapshot_of(self._database) as (connection, snapshot):
            watermark = watermark_of(connection, snapshot, FOLLOWED)
            row = connection.execute(
                "SELECT coalesce(sum(least(n, %s)), 0) FROM "
                "(SELECT count(*) AS n FROM feedback.events_v1 GROUP BY user_key) AS shoppers",
                (MAX_WINDOW_EVENTS,),
            ).fetchone()
        assert row is not None
        with self._database.connect() as connection:
            connection.execute("DELETE FROM profile.portraits WHERE rebuild_id = %s", (_uuid(rebuild_id),))
            connection.execute(
                "UPDATE profile.rebuilds SET state = %s, total_events = %s, folded_events = 0, portraits = 0 "
                "WHERE rebuild_id = %s AND state < %s",
                (int(OperationState.RUNNING), int(row[0]), _uuid(rebuild_id), _ENDED),
            )
        return watermark

    def write(self, rebuild_id: str, shoppers: Sequence[FoldedShopper], folded_events: int) -> bool:
        """See `RebuildStore.write`."""
        key = _uuid(rebuild_id)
        with self._database.connect() as connection:
            with (
                connection.cursor() as cursor,
                cursor.copy(
                    "COPY profile.portraits (user_key, rebuild_id, last_us, truncated, consented, texts, events) "
                    "FROM STDIN (FORMAT binary)"
                ) as copy,
            ):
                copy.set_types(("bytea", "uuid", "int8", "bool", "bool", "text[]", "bytea"))
                for shopper in shoppers:
                    copy.write_row(
                        (
                            shopper.user_key,
                            key,
                            shopper.last_us,
                            shopper.truncated,
                            shopper.consented,
                            list(shopper.texts),
                            shopper.events,
                        )
                    )
            row = connection.execute(
                "UPDATE profile.rebuilds SET folded_events = folded_events + %s, portraits = portraits + %s "
                "WHERE rebuild_id = %s AND state < %s RETURNING NOT cancel_requested",
                (folded_events, len(shoppers), key, _ENDED),
            ).fetchone()
        return bool(row and row[0])

    def succeed(self, rebuild_id: str, watermark: Watermark, now_us: int) -> None:
        """See `RebuildStore.succeed`."""
        with self._database.connect() as connection:
            connection.execute(
                "UPDATE profile.rebuilds SET state = %s, watermark = %s, ended_us = %s "
                "WHERE rebuild_id = %s AND state < %s",
                (_ENDED, watermark.encode(), now_us, _uuid(rebuild_id), _ENDED),
            )
            connection.execute("DELETE FROM profile.portraits WHERE rebuild_id <> %s", (_uuid(rebuild_id),))

    def finish(self, rebuild_id: str, state: OperationState, reason: str, message: str, now_us: int) -> None:
        """See `RebuildStore.finish`."""
        key = _uuid(rebuild_id)
        with self._database.connect() as connection:
            connection.execute(
                "UPDATE profile.rebuilds SET state = %s, failure_reason = %s, failure_message = %s, ended_us = %s "
                "WHERE rebuild_id = %s AND state < %s",
                (int(state), reason, message, now_us, key, _ENDED),
            )
            connection.execute(
                "DELETE FROM profile.portraits WHERE rebuild_id = %s AND rebuild_id IN "
                "(SELECT rebuild_id FROM profile.rebuilds WHERE state <> %s)",
                (key, _ENDED),
            )

    def request_cancel(self, rebuild_id: str, now_us: int) -> Rebuild:
        """See `RebuildStore.request_cancel`."""
        with self._database.connect() as connection:
            connection.execute(
                "UPDATE profile.rebuilds SET cancel_requested = true, "
                "ended_us = CASE WHEN state = %(pending)s THEN %(now)s END, "
                "state = CASE WHEN state = %(pending)s THEN %(cancelled)s ELSE state END "
                "WHERE rebuild_id = %(rebuild_id)s AND state < %(ended)s",
                {
                    "pending": int(OperationState.PENDING),
                    "cancelled": int(OperationState.CANCELLED),
                    "now": now_us,
                    "rebuild_id": _uuid(rebuild_id),
                    "ended": _ENDED,
                },
            )
        return self.get(rebuild_id)

    def in_force(self, limit: int) -> tuple[Watermark, Iterator[FoldedShopper]] | None:
        """See `RebuildStore.in_force`."""
        found = self._select("WHERE state = %s ORDER BY ended_us DESC LIMIT 1", (_ENDED,))
        if not found:
            return None
        watermark = Watermark.decode(found[0].watermark, "watermark")
        return watermark, self._shoppers(found[0].rebuild_id, limit)

    def _shoppers(self, rebuild_id: str, limit: int) -> Iterator[FoldedShopper]:
        with snapshot_of(self._database) as (connection, _):
            with connection.cursor(name="portraits", binary=True) as cursor:
                cursor.execute(
                    "SELECT user_key, last_us, truncated, consented, texts, events FROM profile.portraits "
                    "WHERE rebuild_id = %s ORDER BY last_us DESC LIMIT %s",
                    (_uuid(rebuild_id), limit),
                )
                while rows := cursor.fetchmany(_FETCH):
                    for user_key, last_us, truncated, consented, texts, events in rows:
                        yield FoldedShopper(
                            UserKey(bytes(user_key)), last_us, truncated, consented, texts, bytes(events)
                        )

    def _select(self, condition: str, parameters: Sequence[Any]) -> list[Rebuild]:
        with self._database.connect() as connection:
            rows = connection.cursor(row_factory=dict_row).execute(
                trusted_sql(f"SELECT * FROM profile.rebuilds {condition}"),  # noqa: S608 - of this module alone
                parameters,
            )
            return [
                Rebuild(
                    str(row["rebuild_id"]),
                    OperationState(row["state"]),
                    row["created_us"],
                    row["folded_events"],
                    row["total_events"],
                    row["portraits"],
                    bytes(row["watermark"]),
                    row["failure_reason"],
                    row["failure_message"],
                    row["cancel_requested"],
                    row["ended_us"],
                )
                for row in rows.fetchall()
            ]


def _uuid(rebuild_id: str) -> uuid.UUID:
    try:
        return uuid.UUID(rebuild_id)
    except ValueError:
        raise _not_found(rebuild_id) from None


def _not_found(rebuild_id: str) -> NotFound:
    return NotFound("REBUILD_NOT_FOUND", "There is no such rebuild.", {"rebuildId": rebuild_id[:64]})
