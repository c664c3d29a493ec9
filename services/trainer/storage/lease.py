"""Who may publish a version of a model."""

from __future__ import annotations

import hashlib
from typing import Any

from psycopg.types.json import Jsonb

from services.trainer.domain.runs import RunState
from services.trainer.storage.runs import append_progress_entry
from shared.database import Database


class PublishingLease:
    """A model's lease: who holds it may publish. Ends with its connection, whatever happens to the process.

    The lease is an advisory lock of a session of its own. It keeps two trainers apart. What keeps a stale one from
    publishing, which has lost its session and does not know it yet, is the number that came with the lease: the
    registry refuses a smaller one than it has seen. The run's row is locked and checked besides, in the transaction
    that publishes.

    Attributes:
        fence: greater than that of every holder before; 0 until the lease is taken.
    """

    def __init__(self, database: Database, model: str) -> None:
        self._connection = database.dedicated_connection(autocommit=True)
        self._key = int.from_bytes(
            hashlib.sha256(f"trainer:{model}".encode()).digest()[:8], "big", signed=True
        )
        self.fence = 0

    def try_acquire(self) -> bool:
        """Takes the lease; returns False where another session holds it."""
        row = self._connection.execute("SELECT pg_try_advisory_lock(%s)", (self._key,)).fetchone()
        if not (row and row[0]):
            return False
        row = self._connection.execute("SELECT nextval('publishing_fence')").fetchone()
        self.fence = int(row[0]) if row else 0
        return True

    def publish(self, run_id: str, attempt: int, write: Any) -> str | None:
        """Publishes while the run is known to be running, and marks it as succeeded in the same breath.

        Args:
            write: called with no arguments while the run's row is locked; makes the version visible and
                returns (version, gate as in the manifest, why it was not promoted or None).

        Returns:
            The version, or None where the run is no longer this process's: nothing was written.
        """
        with self._connection.transaction():
            row = self._connection.execute(
                "SELECT state FROM training_runs WHERE run_id = %s AND attempt = %s FOR UPDATE",
                (run_id, attempt),
            ).fetchone()
            if row is None or row[0] != RunState.RUNNING:
                return None
            version, gate, why_not = write()
            promoted = why_not is None
            # In the same transaction: whoever sees the run ended sees its last entry.
            message = f"Version {version} is published, and {'serves' if promoted else f'does not serve: {why_not}'}."
            append_progress_entry(self._connection, run_id, "PUBLISHING", message, {"remaining_seconds": 0.0})
            self._connection.execute(
                "UPDATE training_runs SET state = 'SUCCEEDED', version = %s, gate = %s, promoted = %s, "
                "ended_at = clock_timestamp() WHERE run_id = %s",
                (version, Jsonb(gate), promoted, run_id),
            )
        return str(version)

    def close(self) -> None:
        """Gives the lease up."""
        self._connection.close()
