"""Group commit: concurrent calls share a commit, and so the wait for the disk.

A thread a connection commits what waits. Nothing waits for a timer: an idle
service commits a lone event at once, a busy one makes its batches as large as the
disk is slow. While one commit is under way, the next is begun once half as many rows
wait as that one holds, and not a few: the statement of one is prepared, and executed, while
PostgreSQL waits for the disk on behalf of the other, and commits do not crumble.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol, cast

import psycopg
from opentelemetry import trace
from prometheus_client import Counter, Histogram

from services.feedback.domain.events import Appended, AppendVerdict, EventColumns
from services.feedback.ports import Unstorable
from services.feedback.storage.log_writer import unavailable
from shared.errors import ResourceExhausted, ShopkeeperError, Unavailable
from shared.telemetry import get_logger

_COMMIT_SECONDS = Histogram(
    "shopkeeper_feedback_commit_seconds",
    "Seconds of one commit of the log.",
    buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0),
)
_COMMIT_ROWS = Histogram(
    "shopkeeper_feedback_commit_rows",
    "Events in one commit of the log.",
    buckets=(1, 10, 100, 200, 500, 1_000, 2_000, 5_000, 10_000),
)
_COMMIT_CALLS = Histogram(
    "shopkeeper_feedback_commit_calls",
    "Calls that shared one commit of the log.",
    buckets=(1, 2, 4, 8, 16, 32, 64, 128),
)
_tracer = trace.get_tracer("shopkeeper.feedback")
_FAILURES = Counter("shopkeeper_feedback_commit_failures_total", "Commits that failed.", ["cause"])
# A commit is begun beside another once so many rows wait, of those under way: smaller ones would cost more a row.
SHARE_OF_ROWS_UNDER_WAY = 0.5
# Calls of one event each fared a tenth worse where their small commits were divided further.
LEAST_ROWS_BESIDE = 100


class Writer(Protocol):
    """Stores rows and returns once they are durable."""

    def append(self, columns: EventColumns) -> Appended:
        """Stores rows; raises Unavailable, or a data error of the driver."""
        ...

    def close(self) -> None:
        """Lets go of the database."""
        ...


@dataclass(frozen=True, slots=True)
class _Waiting:
    columns: EventColumns
    future: Future[Appended]
    callers: Sequence[trace.SpanContext]


def _span_of(batch: list[_Waiting]) -> AbstractContextManager[object]:
    """A commit is a span in the trace of the first of its calls that is traced, and linked to those of the others."""
    callers = [caller for waiting in batch for caller in waiting.callers if caller.is_valid]
    if not callers:
        return nullcontext()
    return _tracer.start_as_current_span(
        "group commit",
        context=trace.set_span_in_context(trace.NonRecordingSpan(callers[0])),
        kind=trace.SpanKind.CLIENT,
        links=[trace.Link(caller) for caller in callers[1:]],
        attributes={
            "db.system.name": "postgresql",
            "shopkeeper.calls": sum(len(waiting.callers) for waiting in batch),
            "shopkeeper.events": sum(len(waiting.columns) for waiting in batch),
        },
        # The details of an error can hold values.
        record_exception=False,
        set_status_on_exception=False,
    )


class GroupCommitLog:
    """An EventLog whose callers share commits.

    Args:
        writers: each is used by one thread of this log alone; so many commits are under way at once.
        max_rows: the most rows of one commit; a larger single batch is committed alone.
        queue_rows: rows that may wait; beyond it `append` refuses.
        on_commit: called after each commit that stored something; must return at once.
    """

    def __init__(
        self,
        *writers: Writer,
        max_rows: int,
        queue_rows: int,
        on_commit: Callable[[], None] = lambda: None,
    ) -> None:
        self._max_rows = max_rows
        self._queue_rows = queue_rows
        self._on_commit = on_commit
        self._waiting: deque[_Waiting] = deque()
        self._waiting_rows = 0
        self._rows_under_way = 0
        self._stopping = False
        self._changed = threading.Condition()
        self._logger = get_logger("feedback")
        self._threads = [
            threading.Thread(target=self._run, args=(writer,), name="group-commit", daemon=True)
            for writer in writers
        ]
        for thread in self._threads:
            thread.start()

    def append(self, columns: EventColumns, callers: Sequence[object] | None = None) -> Future[Appended]:
        """Queues rows for the next commit; see the port. The callers are contexts of spans."""
        future: Future[Appended] = Future()
        spans = cast(Sequence[trace.SpanContext] | None, callers)
        if spans is None:
            spans = (trace.get_current_span().get_span_context(),)
        with self._changed:
            if self._stopping:
                raise Unavailable(
                    "LOG_UNAVAILABLE", "The service is stopping; send the events to another replica."
                )
            if self._waiting_rows and self._waiting_rows + len(columns) > self._queue_rows:
                raise ResourceExhausted(
                    "OVERLOADED",
                    f"{self._waiting_rows} events wait for their commit; wait a little, and send less at once.",
                    {"limit": str(self._queue_rows)},
                    retry_after_seconds=0.25,
                )
            self._waiting.append(_Waiting(columns, future, spans))
            self._waiting_rows += len(columns)
            self._changed.notify()
        return future

    def close(self, timeout_seconds: float = 10.0) -> None:
        """Commits what waits, then stops."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        end = time.monotonic() + timeout_seconds
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))

    def _run(self, writer: Writer) -> None:
        while batch := self._next():
            try:
                self._commit(batch, writer)
            except BaseException as error:
                # Whatever it was: the callers hear of it, and the thread lives on.
                self._logger.exception("group commit failed")
                for waiting in batch:
                    if not waiting.future.done():
                        waiting.future.set_exception(unavailable(error))
            finally:
                self._returned(batch)
        writer.close()

    def _is_due(self) -> bool:
        if not self._waiting:
            return False
        if self._stopping or not self._rows_under_way:
            return True
        return self._waiting_rows >= max(LEAST_ROWS_BESIDE, SHARE_OF_ROWS_UNDER_WAY * self._rows_under_way)

    def _returned(self, batch: list[_Waiting]) -> None:
        with self._changed:
            self._rows_under_way -= sum(len(waiting.columns) for waiting in batch)
            self._changed.notify()

    def _next(self) -> list[_Waiting]:
        with self._changed:
            while not self._is_due() and not (self._stopping and not self._waiting):
                self._changed.wait()
            batch: list[_Waiting] = []
            rows = 0
            while self._waiting and (not batch or rows + len(self._waiting[0].columns) <= self._max_rows):
                waiting = self._waiting.popleft()
                rows += len(waiting.columns)
                batch.append(waiting)
            self._waiting_rows -= rows
            self._rows_under_way += rows
            return batch

    def _commit(self, batch: list[_Waiting], writer: Writer) -> None:
        start = time.perf_counter()
        try:
            with _span_of(batch):
                appended = writer.append(EventColumns.concatenated([waiting.columns for waiting in batch]))
        except ShopkeeperError as error:
            _FAILURES.labels(error.metadata.get("cause", error.reason)).inc()
            for waiting in batch:
                waiting.future.set_exception(error)
            return
        except (psycopg.DataError, psycopg.IntegrityError) as error:
            _FAILURES.labels(type(error).__name__).inc()
            if len(batch) == 1:
                self._logger.error("a batch cannot be stored", cause=type(error).__name__)
                refusal = unavailable(error)
                batch[0].future.set_exception(Unstorable(refusal.reason, refusal.message, refusal.metadata))
                return
            # One caller's rows must not cost the others theirs.
            for waiting in batch:
                self._commit([waiting], writer)
            return
        _COMMIT_SECONDS.observe(time.perf_counter() - start)
        _COMMIT_CALLS.observe(sum(len(waiting.callers) for waiting in batch))
        _COMMIT_ROWS.observe(sum(len(waiting.columns) for waiting in batch))
        self._on_commit()
        self._answer(batch, appended)

    @staticmethod
    def _answer(batch: list[_Waiting], appended: Appended) -> None:
        if not appended.exceptions:
            for waiting in batch:
                waiting.future.set_result(appended)
            return
        starts = list(accumulate((len(waiting.columns) for waiting in batch), initial=0))
        own: list[dict[int, AppendVerdict]] = [{} for _ in batch]
        for row, verdict in appended.exceptions.items():
            index = bisect_right(starts, row) - 1
            own[index][row - starts[index]] = verdict
        for waiting, exceptions in zip(batch, own, strict=True):
            waiting.future.set_result(Appended(appended.xid, exceptions))
