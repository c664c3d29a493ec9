"""Schedules: create, list, delete."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import datetime

from services.trainer.domain.hyper_parameters import resolve
from services.trainer.domain.schedules import Schedule
from services.trainer.ports import ScheduleStore
from services.trainer.use_cases.pages import Page
from shared.errors import FieldViolation, InvalidInput, NotFound


class Schedules:
    """When runs start by themselves.

    Args:
        next_run_at: returns the first moment of a cron expression after another; raises ValueError for a malformed one.
        now: the clock, UTC.
    """

    def __init__(
        self,
        store: ScheduleStore,
        *,
        next_run_at: Callable[[str, datetime], datetime],
        now: Callable[[], datetime],
    ) -> None:
        self._store, self._next_run_at, self._now = store, next_run_at, now

    def create(self, schedule: Schedule) -> Schedule:
        """Adds a schedule.

        Raises:
            InvalidInput: its cron expression is malformed or never comes, it has no trigger at all, or its
                hyper-parameters are out of range.
            AlreadyExists: SCHEDULE_EXISTS.
        """
        resolve(schedule.config.size, schedule.config.overrides)
        if not schedule.cron and schedule.drift is None:
            raise _wrong("schedule.cron", "or schedule.drift must be set; nothing else starts a run.")
        if schedule.cron:
            try:
                moment = self._next_run_at(schedule.cron, self._now())
            except ValueError as error:
                raise _wrong(
                    "schedule.cron",
                    f"must be five cron fields in UTC, such as '30 2 * * *' for every night: {error}.",
                ) from error
            schedule = replace(schedule, next_run_at=None if schedule.paused else moment)
        return self._store.add(schedule)

    def list(self, page_size: int, after: str) -> Page[Schedule]:
        """Returns a page of schedules by id."""
        found = self._store.list(limit=page_size + 1, after=after)
        return Page(found[:page_size], len(found) > page_size)

    def delete(self, schedule_id: str) -> None:
        """Deletes a schedule; raises NotFound."""
        if not self._store.delete(schedule_id):
            raise NotFound(
                "SCHEDULE_NOT_FOUND",
                f"There is no schedule {schedule_id}; ListSchedules names those there are.",
                {"scheduleId": schedule_id},
            )


def _wrong(field: str, problem: str) -> InvalidInput:
    return InvalidInput("INVALID_REQUEST", f"{field} {problem}", {}, [FieldViolation(field, problem)])
