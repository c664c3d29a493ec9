"""What became of all runs, in a few rows: for metrics."""

from __future__ import annotations

from services.trainer.domain.runs import RunCount
from shared.database import Database


class PostgresRunOverview:
    """Implements `ports.RunOverview`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def counts(self) -> list[RunCount]:
        """See `ports.RunOverview`."""
        with self._database.connect() as connection:
            rows = connection.execute(
                """
                SELECT model, state, coalesce(gate ->> 'verdict', '') AS verdict, request_id LIKE 'drift %' AS by_drift,
                    count(*), coalesce(extract(epoch FROM max(ended_at)), 0)::float8
                FROM training_runs
                GROUP BY 1, 2, 3, 4
                """
            ).fetchall()
        return [RunCount(*row) for row in rows]
