"""RecordEvents for many callers at once: read together, stored together, answered together.

A call holds no thread (`shared.deferred_calls`). One thread reads what has come since it last looked, as one batch, and
queues it for its commit; the thread of the commit answers. The more calls come at once, the less each costs, and a
lone one is read at once.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

import numpy as np
from prometheus_client import Counter

from services.feedback.converters.events import EventReader
from services.feedback.converters.results import to_record_events_responses
from services.feedback.domain.events import Appended, ReadBatch, RecordedBatch, RowStatus, settled
from services.feedback.ports import Unstorable
from services.feedback.use_cases import RecordEvents
from shared.deferred_calls import DeferredCall
from shared.errors import Unavailable
from shared.event_kinds import EventKind
from shared.telemetry import get_logger
from shared.tokens import TokenSigner

# Of requests that are read together: some 2,000 events.
MOST_BYTES_AT_ONCE = 256 * 1024

_EVENTS = Counter("shopkeeper_feedback_events_total", "Events by what became of them.", ["status", "kind"])
_counters: dict[tuple[RowStatus, int | None], Any] = {}


class Recorder:
    """Answers calls of RecordEvents.

    Args:
        reader: reads requests.
        record_events: stores them.
        signer: signs consistency tokens.
    """

    def __init__(self, reader: EventReader, record_events: RecordEvents, signer: TokenSigner) -> None:
        self._reader = reader
        self._record_events = record_events
        self._signer = signer
        # A list is of calls that are not to be mixed with others.
        self._calls: queue.SimpleQueue[DeferredCall | list[DeferredCall] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._logger = get_logger("feedback")

    def begin(self, call: DeferredCall) -> None:
        """Takes a call over; returns at once."""
        self._calls.put(call)
        if self._thread is None:
            self._start()

    def close(self, timeout_seconds: float = 10.0) -> None:
        """Queues what has come for its commit, then stops."""
        self._calls.put(None)
        if self._thread is not None:
            self._thread.join(timeout_seconds)

    def _start(self) -> None:
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        while (first := self._calls.get()) is not None:
            if isinstance(first, list):
                self._record(first)
                continue
            group, following = self._joined_by(first)
            self._record(group)
            if following is None:
                return
            if following:
                self._record(following)

    def _joined_by(self, first: DeferredCall) -> tuple[list[DeferredCall], list[DeferredCall] | None]:
        """Returns a call and those that wait behind it, and what stands behind these; None for the end."""
        group, size = [first], len(first.request or b"")
        while size < MOST_BYTES_AT_ONCE:
            try:
                call = self._calls.get_nowait()
            except queue.Empty:
                break
            if call is None or isinstance(call, list):
                return group, call
            group.append(call)
            size += len(call.request or b"")
        return group, []

    def _record(self, calls: Sequence[DeferredCall]) -> None:
        calls = [call for call in calls if call.admit()]
        if not calls:
            return
        try:
            batch, refusals = self._reader.read_requests([call.request or b"" for call in calls])
            for number, error in refusals.items():
                calls[number].fail(error)
            pending = self._record_events.submit(batch, [call.observation.span_context for call in calls])
        except Exception as error:
            _fail(calls, error)
            return
        if pending.appended is None:
            self._answer(calls, batch, None)
        else:
            # Not `pending`, which holds the future: a circle a commit, with all its calls in it, is left to the
            # garbage collector, and that stops everything for a tenth of a second.
            pending.appended.add_done_callback(partial(self._answer, calls, batch))

    def _answer(
        self, calls: Sequence[DeferredCall], batch: ReadBatch, appended: Future[Appended] | None
    ) -> None:
        try:
            if appended is not None and (error := appended.exception()) is not None:
                self._failed(calls, error)
                return
            recorded = settled(batch, None if appended is None else appended.result())
            count(batch, recorded)
            responses = to_record_events_responses(recorded, batch.starts, self._signer)
            for call, response in zip(calls, responses, strict=True):
                call.answer(response)
        except Exception as error:
            self._logger.error("answers failed", cause=type(error).__name__)
            _fail(calls, error)

    def _failed(self, calls: Sequence[DeferredCall], error: BaseException) -> None:
        if isinstance(error, Unstorable) and len(calls) > 1:
            # One caller's rows must not cost the others theirs.
            for call in calls:
                self._calls.put([call])
            return
        _fail(
            calls, error if isinstance(error, Exception) else Unavailable("LOG_UNAVAILABLE", "Send it again.")
        )


def _fail(calls: Sequence[DeferredCall], error: Exception) -> None:
    for call in calls:
        call.fail(error)


def count(batch: ReadBatch, recorded: RecordedBatch) -> None:
    """Counts events by kind and by what became of them."""
    kinds = batch.columns.column("kind")
    stored = np.bincount(kinds)
    if recorded.exceptions:
        row_of = np.full(batch.size, -1)
        row_of[batch.row_numbers] = np.arange(len(kinds))
        for index, (status, _) in recorded.exceptions.items():
            if status is RowStatus.STORED:
                continue
            row = row_of[index]
            of_row = None if row < 0 else int(kinds[row])
            _counter(status, of_row).inc()
            if of_row is not None:
                stored[of_row] -= 1
    for kind in np.flatnonzero(stored).tolist():
        _counter(RowStatus.STORED, kind).inc(int(stored[kind]))


def _counter(status: RowStatus, kind: int | None) -> Any:
    counter = _counters.get((status, kind))
    if counter is None:
        name = "unknown" if kind is None else EventKind(kind).name.lower()
        counter = _counters[status, kind] = _EVENTS.labels(status.name.lower(), name)
    return counter
