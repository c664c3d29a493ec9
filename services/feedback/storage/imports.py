"""Imports in the database."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from psycopg.rows import dict_row

from services.feedback.domain.events import RowReason, RowStatus
from services.feedback.domain.imports import Import, ImportProgress, RowSample
from shared.database import Database, trusted_sql
from shared.errors import NotFound
from shared.operations import OperationState

_ENDED = int(OperationState.SUCCEEDED)


class PostgresImports:
    """The ImportStore."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(self, source: str, request_id: str, now: datetime) -> Import:
        """Stores a new import, or returns the one of the same request id."""
        with self._database.connect() as connection:
            connection.execute(
                "INSERT INTO feedback.imports (import_id, request_id, state, source, created_at) "
                "VALUES (%s, %s, %s, %s, %s) ON CONFLICT (request_id) DO NOTHING",
                (import_id := uuid.uuid4(), request_id or None, int(OperationState.PENDING), source, now),
            )
            rows = connection.cursor(row_factory=dict_row).execute(
                "SELECT * FROM feedback.imports WHERE import_id = %s OR request_id = %s",
                (import_id, request_id or None),
            )
            return _import(rows.fetchall()[0])

    def get(self, import_id: str) -> Import:
        """Returns an import; raises NotFound."""
        found = self._select("WHERE import_id = %s", (_uuid(import_id),))
        if not found:
            raise _not_found(import_id)
        return found[0]

    def page(self, after: tuple[datetime, str] | None, limit: int) -> list[Import]:
        """Returns imports, newest first."""
        if after is None:
            return self._select("ORDER BY created_at DESC, import_id DESC LIMIT %s", (limit,))
        return self._select(
            "WHERE (created_at, import_id) < (%s, %s) ORDER BY created_at DESC, import_id DESC LIMIT %s",
            (after[0], _uuid(after[1]), limit),
        )

    def oldest_unfinished(self) -> Import | None:
        """Returns the import whose turn it is."""
        found = self._select("WHERE state < %s ORDER BY created_at, import_id LIMIT 1", (_ENDED,))
        return found[0] if found else None

    def begin(self, import_id: str, file_digest: bytes, total_rows: int) -> None:
        """Marks an import as running."""
        with self._database.connect() as connection:
            connection.execute(
                "UPDATE feedback.imports SET state = %s, file_digest = %s, total_rows = %s "
                "WHERE import_id = %s AND state < %s",
                (int(OperationState.RUNNING), file_digest, total_rows, _uuid(import_id), _ENDED),
            )

    def checkpoint(self, import_id: str, progress: ImportProgress) -> bool:
        """Stores how far an import has come; returns whether it is to go on."""
        samples = [
            [sample.row_number, int(sample.status), int(sample.reason), sample.column, sample.message]
            for sample in progress.samples
        ]
        with self._database.connect() as connection:
            row = connection.execute(
                "UPDATE feedback.imports SET settled_events = %s, read_rows = %s, total_rows = %s, stored_rows = %s, "
                "duplicate_rows = %s, quarantined_rows = %s, refused_rows = %s, unreadable_rows = %s, "
                "error_samples = %s::jsonb WHERE import_id = %s AND state < %s RETURNING NOT cancel_requested",
                (
                    progress.settled_events,
                    progress.read_rows,
                    progress.total_rows,
                    progress.stored_rows,
                    progress.duplicate_rows,
                    progress.quarantined_rows,
                    progress.refused_rows,
                    progress.unreadable_rows,
                    json.dumps(samples),
                    _uuid(import_id),
                    _ENDED,
                ),
            ).fetchone()
        return bool(row and row[0])

    def finish(self, import_id: str, state: OperationState, failure: str, now: datetime) -> None:
        """Ends an import; does nothing to one that has ended."""
        with self._database.connect() as connection:
            connection.execute(
                "UPDATE feedback.imports SET state = %s, failure = %s, ended_at = %s "
                "WHERE import_id = %s AND state < %s",
                (int(state), failure, now, _uuid(import_id), _ENDED),
            )

    def request_cancel(self, import_id: str, now: datetime) -> Import:
        """Asks an import to stop; raises NotFound."""
        with self._database.connect() as connection:
            connection.execute(
                "UPDATE feedback.imports SET cancel_requested = true, "
                "state = CASE WHEN state = %(pending)s THEN %(cancelled)s ELSE state END, "
                "ended_at = CASE WHEN state = %(pending)s THEN %(now)s END "
                "WHERE import_id = %(import_id)s AND state < %(ended)s",
                {
                    "pending": int(OperationState.PENDING),
                    "cancelled": int(OperationState.CANCELLED),
                    "now": now,
                    "import_id": _uuid(import_id),
                    "ended": _ENDED,
                },
            )
        return self.get(import_id)

    def _select(self, condition: str, parameters: Sequence[Any]) -> list[Import]:
        with self._database.connect() as connection:
            rows = connection.cursor(row_factory=dict_row).execute(
                trusted_sql(f"SELECT * FROM feedback.imports {condition}"),  # noqa: S608 - of this module alone
                parameters,
            )
            return [_import(row) for row in rows.fetchall()]


def _import(row: dict[str, Any]) -> Import:
    return Import(
        import_id=str(row["import_id"]),
        source=row["source"],
        state=OperationState(row["state"]),
        created_at=row["created_at"],
        progress=ImportProgress(
            settled_events=row["settled_events"],
            read_rows=row["read_rows"],
            total_rows=row["total_rows"],
            stored_rows=row["stored_rows"],
            duplicate_rows=row["duplicate_rows"],
            quarantined_rows=row["quarantined_rows"],
            refused_rows=row["refused_rows"],
            unreadable_rows=row["unreadable_rows"],
            samples=tuple(
                RowSample(number, RowStatus(status), RowReason(reason), column, message)
                for number, status, reason, column, message in row["error_samples"]
            ),
        ),
        file_digest=row["file_digest"],
        failure=row["failure"],
        cancel_requested=row["cancel_requested"],
        ended_at=row["ended_at"],
    )


def _uuid(import_id: str) -> uuid.UUID:
    try:
        return uuid.UUID(import_id)
    except ValueError:
        raise _not_found(import_id) from None


def _not_found(import_id: str) -> NotFound:
    return NotFound(
        "IMPORT_NOT_FOUND",
        "There is no such import. `ListImports` names those that there are.",
        {"importId": import_id[:64]},
    )
