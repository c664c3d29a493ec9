"""Files of events: begun, followed, brought into the log."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from services.feedback.domain.imports import Import, ImportPart, ImportProgress, advanced, merged_samples
from services.feedback.ports import Clock, ImportFiles, ImportStore
from services.feedback.use_cases.recording import PendingBatch, RecordEvents
from shared.errors import DeadlineExceeded, ResourceExhausted, ShopkeeperError, Unavailable
from shared.operations import OperationState, follow

IMPORT_COMMIT_TIMEOUT_SECONDS = 60.0
# Parts of an import that may wait for their commit at once: enough to keep it busy, and no more.
IMPORT_READ_AHEAD = 2


class ManageImports:
    """Begins, follows and cancels imports."""

    def __init__(
        self, store: ImportStore, files: ImportFiles, clock: Clock, wake: Callable[[], None] = lambda: None
    ) -> None:
        self._store = store
        self._files = files
        self._clock = clock
        self._wake = wake

    def begin(self, source: str, request_id: str) -> Import:
        """Returns a new import, or the earlier one of the same request id.

        Raises:
            ShopkeeperError: the file or its mapping cannot be read; told at once rather than later.
        """
        now = self._clock.now()
        self._files.open(source, now)
        created = self._store.create(source, request_id, now)
        self._wake()
        return created

    def get(self, import_id: str) -> Import:
        """Returns an import; raises NotFound."""
        return self._store.get(import_id)

    def page(self, after: tuple[Any, str] | None, limit: int) -> list[Import]:
        """Returns imports, newest first."""
        return self._store.page(after, limit)

    def cancel(self, import_id: str) -> Import:
        """Stops an import; raises NotFound."""
        return self._store.request_cancel(import_id, self._clock.now())

    def watch(
        self, import_id: str, stopped: threading.Event, is_active: Callable[[], bool]
    ) -> Iterator[Import]:
        """Yields an import now, after each change, and for the last time when it has ended."""
        return follow(lambda: self._store.get(import_id), stopped, is_active)


class RunImports:
    """Brings files into the log, one after another, through the same door as every event."""

    def __init__(
        self,
        store: ImportStore,
        files: ImportFiles,
        record_events: RecordEvents,
        clock: Clock,
        stopped: threading.Event,
    ) -> None:
        self._store = store
        self._files = files
        self._record_events = record_events
        self._clock = clock
        self._stopped = stopped

    def run_next(self) -> bool:
        """Runs the oldest unfinished import to its end; returns whether there was one.

        A stopped service leaves it as it is; whoever runs it next goes on behind the last checkpoint.
        The parts since then are sent again, and their events come back as duplicates.

        Raises:
            Unavailable: the store is away; nothing is lost.
        """
        job = self._store.oldest_unfinished()
        if job is None:
            return False
        try:
            file = self._files.open(job.source, job.created_at)
            if job.file_digest not in (None, file.digest):
                self._finish(
                    job,
                    OperationState.FAILED,
                    "The file is not the one that the import began with. Import it again: rows that are in the "
                    "log already come back as duplicates.",
                )
                return True
            self._store.begin(job.import_id, file.digest, file.total_rows)
            progress = replace(job.progress, total_rows=file.total_rows)
            under_way: deque[tuple[ImportPart, PendingBatch]] = deque()
            passed = 0
            for part in file.parts():
                passed += part.batch.size
                # Settled before the restart. A part is never settled by half.
                if passed <= job.progress.settled_events:
                    continue
                under_way.append((part, self._submitted(part)))
                if len(under_way) == IMPORT_READ_AHEAD:
                    progress = self._settled(progress, under_way.popleft())
                    if not self._store.checkpoint(job.import_id, progress):
                        self._finish(job, OperationState.CANCELLED)
                        return True
            while under_way:
                progress = self._settled(progress, under_way.popleft())
            read, unreadable, samples, damage = file.remainder()
            progress = replace(
                progress,
                read_rows=read,
                total_rows=progress.total_rows if damage else read,
                unreadable_rows=unreadable,
                samples=tuple(merged_samples(progress.samples, samples)),
            )
            goes_on = self._store.checkpoint(job.import_id, progress)
            if damage:
                self._finish(job, OperationState.FAILED, damage)
            else:
                self._finish(job, OperationState.SUCCEEDED if goes_on else OperationState.CANCELLED)
        except _ServiceStops:
            pass
        except Unavailable:
            raise
        except ShopkeeperError as error:
            self._finish(job, OperationState.FAILED, error.message)
        return True

    def _finish(self, job: Import, state: OperationState, failure: str = "") -> None:
        self._store.finish(job.import_id, state, failure, self._clock.now())

    def _submitted(self, part: ImportPart) -> PendingBatch:
        while not self._stopped.is_set():
            try:
                return self._record_events.submit(part.batch)
            except ResourceExhausted:
                # Shoppers go first.
                self._stopped.wait(0.25)
        raise _ServiceStops

    def _settled(self, progress: ImportProgress, sent: tuple[ImportPart, PendingBatch]) -> ImportProgress:
        part, pending = sent
        while not self._stopped.is_set():
            try:
                return advanced(progress, part, pending.wait(IMPORT_COMMIT_TIMEOUT_SECONDS))
            except (Unavailable, DeadlineExceeded):
                self._stopped.wait(0.5)
                pending = self._submitted(part)
        raise _ServiceStops


class _ServiceStops(Exception):
    """The service ends; what is not settled is for its successor."""
