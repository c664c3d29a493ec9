"""The heartbeat of a run's process, and its memory limit."""

from __future__ import annotations

import os
import threading

import psycopg

from services.trainer.domain.runs import RunFailure, RunState
from services.trainer.pipeline.describing import peak_resident_bytes
from services.trainer.storage import PostgresRunStore
from shared.errors import Unavailable

_HEARTBEAT_SECONDS = 1.0


class Heart:
    """Renews the run's heartbeat, and learns from it when to stop."""

    def __init__(self, store: PostgresRunStore, run_id: str, attempt: int, max_memory_bytes: int) -> None:
        self._store, self._run_id, self._attempt = store, run_id, attempt
        self._max_memory_bytes = max_memory_bytes
        self.cancelled = threading.Event()
        self.interrupted = threading.Event()
        self._ended = threading.Event()
        threading.Thread(target=self._beat, name="heart", daemon=True).start()

    def should_stop(self) -> bool:
        """Whether the work is no longer wanted."""
        return self.cancelled.is_set() or self.interrupted.is_set()

    def end(self) -> None:
        """Stops beating."""
        self._ended.set()

    def _beat(self) -> None:
        while not self._ended.wait(_HEARTBEAT_SECONDS):
            if 0 < self._max_memory_bytes < peak_resident_bytes():
                self._give_up_for_memory()
            try:
                state = self._store.beat(self._run_id, self._attempt)
            except (Unavailable, psycopg.Error):
                continue
            if state == RunState.CANCELLING:
                self.cancelled.set()
            elif state is None and not self._ended.is_set():
                # Somebody else decided what became of this attempt: nothing it does counts any more.
                self.interrupted.set()

    def _give_up_for_memory(self) -> None:
        message = (
            f"The run's process used more than its limit of {self._max_memory_bytes / 1e6:.0f} MB. Raise the limit, "
            "narrow the window, or choose a smaller size."
        )
        self._store.end(self._run_id, self._attempt, RunState.FAILED, RunFailure("OUT_OF_MEMORY", message))
        os._exit(1)
