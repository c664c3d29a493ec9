"""Schedules in the schema `trainer`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any

from psycopg.rows import dict_row
from psycopg.types.json import Jsonb

from services.trainer.domain.runs import TrainingConfig
from services.trainer.domain.schedules import DriftTrigger, Schedule
from shared.database import Database, trusted_sql
from shared.errors import AlreadyExists

_SELECT = "SELECT * FROM schedules "


class PostgresScheduleStore:
    """Implements `ports.ScheduleStore` and what the scheduler needs."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, schedule: Schedule) -> Schedule:
        """See `ports.ScheduleStore.add`."""
        with self._database.connect() as connection:
            added = connection.execute(
                "INSERT INTO schedules (schedule_id, model, config, cron, drift, paused, next_run_at) "
                "VALUES (%s, %s, %s, %s, %s, %s, %s) ON CONFLICT (schedule_id) DO NOTHING",
                (
                    schedule.schedule_id,
                    schedule.model,
                    Jsonb(schedule.config.to_json()),
                    schedule.cron,
                    Jsonb(asdict(schedule.drift)) if schedule.drift else None,
                    schedule.paused,
                    schedule.next_run_at,
                ),
            )
        if added.rowcount == 0:
            raise AlreadyExists(
                "SCHEDULE_EXISTS",
                f"There is a schedule {schedule.schedule_id} already; delete it first, or choose another id.",
                {"scheduleId": schedule.schedule_id},
            )
        return schedule

    def list(self, *, limit: int, after: str) -> Sequence[Schedule]:
        """See `ports.ScheduleStore.list`."""
        return self._query("WHERE schedule_id > %s ORDER BY schedule_id LIMIT %s", (after, limit))

    def delete(self, schedule_id: str) -> bool:
        """See `ports.ScheduleStore.delete`."""
        with self._database.connect() as connection:
            deleted = connection.execute("DELETE FROM schedules WHERE schedule_id = %s", (schedule_id,))
            return deleted.rowcount == 1

    def watching_drift(self) -> Sequence[Schedule]:
        """Returns the schedules that start runs on drift and are not paused."""
        return self._query("WHERE drift IS NOT NULL AND NOT paused ORDER BY schedule_id", ())

    def start_due(
        self, next_run_at: Callable[[str, datetime], datetime], start: Callable[[Schedule, datetime], str]
    ) -> Sequence[str]:
        """Starts a run for each schedule whose time has come, and sets its next time; returns the runs.

        Several trainers may ask at once: a row is locked while its run is started, and `start` must be
        idempotent by (schedule, moment), because it may have been done before this process was killed. Of moments
        missed while no trainer ran, one is made up for.
        """
        with self._database.connect() as connection, connection.cursor(row_factory=dict_row) as cursor:
            due = cursor.execute(
                "SELECT *, clock_timestamp() AS now FROM schedules WHERE NOT paused AND next_run_at <= clock_timestamp() "
                "ORDER BY schedule_id FOR UPDATE SKIP LOCKED"
            ).fetchall()
            started = []
            for row in due:
                schedule = _schedule(row)
                run_id = start(schedule, row["next_run_at"])
                cursor.execute(
                    "UPDATE schedules SET next_run_at = %s, last_run_id = %s, last_run_at = clock_timestamp() "
                    "WHERE schedule_id = %s",
                    (next_run_at(schedule.cron, row["now"]), run_id, schedule.schedule_id),
                )
                started.append(run_id)
        return started

    def claim_drift_check(self, schedule: Schedule, interval_seconds: float) -> bool:
        """Returns whether this process may measure drift now: nobody has for so long, nor started a run too lately."""
        if schedule.drift is None:
            return False
        with self._database.connect() as connection:
            claimed = connection.execute(
                "UPDATE schedules SET checked_at = clock_timestamp() WHERE schedule_id = %s AND NOT paused "
                "AND (checked_at IS NULL OR checked_at < clock_timestamp() - make_interval(secs => %s)) "
                "AND (last_run_at IS NULL OR last_run_at < clock_timestamp() - make_interval(secs => %s))",
                (schedule.schedule_id, interval_seconds, schedule.drift.min_interval_seconds),
            )
            return claimed.rowcount == 1

    def drifted(self, schedule_id: str, run_id: str) -> None:
        """Notes the run that drift started."""
        with self._database.connect() as connection:
            connection.execute(
                "UPDATE schedules SET last_run_id = %s, last_run_at = clock_timestamp() WHERE schedule_id = %s",
                (run_id, schedule_id),
            )

    def _query(self, text: str, arguments: Sequence[Any]) -> Sequence[Schedule]:
        with self._database.connect() as connection, connection.cursor(row_factory=dict_row) as cursor:
            rows = cursor.execute(trusted_sql(_SELECT + text), arguments).fetchall()
        return [_schedule(row) for row in rows]


def _schedule(row: Mapping[str, Any]) -> Schedule:
    return Schedule(
        schedule_id=row["schedule_id"],
        model=row["model"],
        config=TrainingConfig.from_json(row["config"]),
        cron=row["cron"],
        drift=DriftTrigger(**row["drift"]) if row["drift"] else None,
        paused=row["paused"],
        next_run_at=None if row["paused"] else row["next_run_at"],
        last_run_id=row["last_run_id"],
        checked_at=row["checked_at"],
        last_run_at=row["last_run_at"],
    )
