"""Imports of items in the database."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from typing import Any

from psycopg.rows import dict_row

from services.profile.domain.item_imports import ItemImport, ItemImportProgress, RejectedRow
from shared.database import Database, trusted_sql
from shared.errors import NotFound
from shared.operations import OperationState

_ENDED = int(OperationState.SUCCEEDED)


class PostgresItemImports:
    """Implements `ports.ItemImportStore`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(self, source: bytes, request_id: str, write_time_us: int, now_us: int) -> ItemImport:
        """See `ItemImportStore.create`."""
        import_id = uuid.uuid4()
        with self._database.connect() as connection:
            connection.execute(
                "INSERT INTO profile.item_imports (import_id, request_id, state, source, write_time_us, created_us) "
                "VALUES (%s, %s, %s, %s, %s, %s) ON CONFLICT (request_id) DO NOTHING",
                (import_id, request_id or None, int(OperationState.PENDING), source, write_time_us, now_us),
            )
        return self._select("WHERE import_id = %s OR request_id = %s", (import_id, request_id or None))[0]

    def get(self, import_id: str) -> ItemImport:
        """See `ItemImportStore.get`."""
        found = self._select("WHERE import_id = %s", (_uuid(import_id),))
        if not found:
            raise _not_found(import_id)
        return found[0]

    def page(self, after: tuple[int, str] | None, limit: int) -> list[ItemImport]:
        """See `ItemImportStore.page`."""
        order = "ORDER BY created_us DESC, import_id DESC LIMIT %s"
        if after is None:
            return self._select(order, (limit,))
        return self._select(
            f"WHERE (created_us, import_id) < (%s, %s) {order}", (after[0], _uuid(after[1]), limit)
        )

    def oldest_unfinished(self) -> ItemImport | None:
        """See `ItemImportStore.oldest_unfinished`."""
        found = self._select("WHERE state < %s ORDER BY created_us, import_id LIMIT 1", (_ENDED,))
        return found[0] if found else None

    def checkpoint(self, import_id: str, progress: ItemImportProgress) -> bool:
        """See `ItemImportStore.checkpoint`."""
        rejected = [[row.row_number, row.violations] for row in progress.rejected]
        with self._database.connect() as connection:
            row = connection.execute(
                "UPDATE profile.item_imports SET state = %s, read_rows = %s, stored_rows = %s, superseded_rows = %s, "
                "rejected_rows = %s, rejected = %s::jsonb, progress = %s "
                "WHERE import_id = %s AND state < %s RETURNING NOT cancel_requested",
                (
                    int(OperationState.RUNNING),
                    progress.read_rows,
                    progress.stored_rows,
                    progress.superseded_rows,
                    progress.rejected_rows,
                    json.dumps(rejected),
                    progress.done,
                    _uuid(import_id),
                    _ENDED,
                ),
            ).fetchone()
        return bool(row and row[0])

    def finish(self, import_id: str, state: OperationState, reason: str, message: str, now_us: int) -> None:
        """See `ItemImportStore.finish`."""
        with self._database.connect() as connection:
            connection.execute(
                "UPDATE profile.item_imports SET state = %s, failure_reason = %s, failure_message = %s, ended_us = %s, "
                "progress = CASE WHEN %s THEN 1 ELSE progress END WHERE import_id = %s AND state < %s",
                (
                    int(state),
                    reason,
                    message,
                    now_us,
                    state == OperationState.SUCCEEDED,
                    _uuid(import_id),
                    _ENDED,
                ),
            )

    def request_cancel(self, import_id: str, now_us: int) -> ItemImport:
        """See `ItemImportStore.request_cancel`."""
        with self._database.connect() as connection:
            connection.execute(
                "UPDATE profile.item_imports SET cancel_requested = true, "
                "ended_us = CASE WHEN state = %(pending)s THEN %(now)s END, "
                "state = CASE WHEN state = %(pending)s THEN %(cancelled)s ELSE state END "
                "WHERE import_id = %(import_id)s AND state < %(ended)s",
                {
                    "pending": int(OperationState.PENDING),
                    "cancelled": int(OperationState.CANCELLED),
                    "now": now_us,
                    "import_id": _uuid(import_id),
                    "ended": _ENDED,
                },
            )
        return self.get(import_id)

    def _select(self, condition: str, parameters: Sequence[Any]) -> list[ItemImport]:
        with self._database.connect() as connection:
            rows = connection.cursor(row_factory=dict_row).execute(
                trusted_sql(f"SELECT * FROM profile.item_imports {condition}"),  # noqa: S608 - of this module alone
                parameters,
            )
            return [_import(row) for row in rows.fetchall()]


def _import(row: dict[str, Any]) -> ItemImport:
    return ItemImport(
        import_id=str(row["import_id"]),
        source=bytes(row["source"]),
        state=OperationState(row["state"]),
        write_time_us=row["write_time_us"],
        created_us=row["created_us"],
        progress=ItemImportProgress(
            read_rows=row["read_rows"],
            stored_rows=row["stored_rows"],
            superseded_rows=row["superseded_rows"],
            rejected_rows=row["rejected_rows"],
            rejected=tuple(
                RejectedRow(number, tuple((field, problem) for field, problem in violations))
                for number, violations in row["rejected"]
            ),
            done=row["progress"],
        ),
        failure_reason=row["failure_reason"],
        failure_message=row["failure_message"],
        cancel_requested=row["cancel_requested"],
        ended_us=row["ended_us"],
    )


def _uuid(import_id: str) -> uuid.UUID:
    try:
        return uuid.UUID(import_id)
    except ValueError:
        raise _not_found(import_id) from None


def _not_found(import_id: str) -> NotFound:
    return NotFound(
        "IMPORT_NOT_FOUND",
        "There is no such import; ListItemImports names those that there are.",
        {"importId": import_id[:64]},
    )
