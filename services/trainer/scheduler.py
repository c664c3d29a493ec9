"""Starts runs by the clock and on drift: a thread of the server."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import datetime
from typing import Any

from services.trainer.clock import next_run_at
from services.trainer.domain.runs import Task
from services.trainer.domain.schedules import Schedule
from services.trainer.ports import RunStarter
from services.trainer.storage import PostgresRunStore, PostgresScheduleStore
from shared.errors import ResourceExhausted, ShopkeeperError, Unavailable

_TICK_SECONDS = 1.0


class Scheduler:
    """Several trainers may run one each: a moment starts one run, whoever sees it first.

    Args:
        measure_drift: returns why the schedule's model should be trained anew, or None.
        drift_interval_seconds: between two measurements of one schedule.
        max_queued: runs that may wait.
    """

    def __init__(
        self,
        schedules: PostgresScheduleStore,
        runs: PostgresRunStore,
        starter: RunStarter,
        measure_drift: Callable[[Schedule], str | None],
        logger: Any,
        *,
        drift_interval_seconds: float,
        max_queued: int,
    ) -> None:
        self._schedules, self._runs, self._starter = schedules, runs, starter
        self._measure_drift, self._logger = measure_drift, logger
        self._drift_interval_seconds, self._max_queued = drift_interval_seconds, max_queued
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="scheduler", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout=10)

    def tick(self) -> None:
        """Starts what is due now."""
        started = self._schedules.start_due(next_run_at, self._start_by_clock)
        for run_id in started:
            self._logger.info("schedule started a run", run_id=run_id)
        if started:
            self._starter.wake()
        for schedule in self._schedules.watching_drift():
            if not self._stopping.is_set():
                self._watch_drift(schedule)

    def _loop(self) -> None:
        while not self._stopping.wait(_TICK_SECONDS):
            try:
                self.tick()
            except Unavailable as error:
                self._logger.warning("scheduler waits for the database", reason=error.reason)
            except Exception as error:
                # The thread must live: without it no schedule would ever start again.
                self._logger.error("scheduler failed", exc_info=error)

    def _start_by_clock(self, schedule: Schedule, moment: datetime) -> str:
        return self._start(schedule, f"schedule {schedule.schedule_id} {moment.isoformat()}")

    def _start(self, schedule: Schedule, request_id: str) -> str:
        try:
            # The request id makes it one run, whatever dies in between.
            return self._runs.create(
                schedule.model, schedule.config, Task(), request_id=request_id, max_queued=self._max_queued,
                schedule_id=schedule.schedule_id,
            ).run_id  # fmt: skip
        except ResourceExhausted as error:
            # The next moment comes; what is due now is given up rather than every schedule behind it.
            self._logger.warning(
                "schedule skipped a run", schedule=schedule.schedule_id, reason=error.message
            )
            return schedule.last_run_id

    def _watch_drift(self, schedule: Schedule) -> None:
        if not self._schedules.claim_drift_check(schedule, self._drift_interval_seconds):
            return
        try:
            why = self._measure_drift(schedule)
        except ShopkeeperError as error:
            self._logger.warning("drift not measured", schedule=schedule.schedule_id, reason=error.message)
            return
        if why is None:
            return
        # One run a state of affairs: the same drift is no reason to train while that run waits.
        run_id = self._start(
            schedule, f"drift {schedule.schedule_id} after {schedule.last_run_id or 'nothing'}"
        )
        self._schedules.drifted(schedule.schedule_id, run_id)
        self._logger.info("drift started a run", run_id=run_id, schedule=schedule.schedule_id, reason=why)
        self._starter.wake()
