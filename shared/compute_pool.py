"""Few threads for calls that compute, and a stand-in for each that waits.

Threads that compute in Python take turns at the interpreter lock: with dozens of them, every array operation
gives the lock away and queues for it anew, and the slowest call of a second takes a hundred times the usual.
So few compute at once. A call that has to wait for the outside (`ComputePool.waiting`) leaves its place to another
meanwhile, as a blocking call does in Go's scheduler or in Java's ForkJoinPool.ManagedBlocker.

Calls come here with their message (`shared.deferred_calls`). Where grpcio does not allow that, a thread has to wait for
each message, so one more has grpc fetch it and send the answer meanwhile: to wait with the interpreter idle would take a
fifth of what a process can answer.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from typing import Any

from shared import deferred_calls
from shared.admission import Admission

WITH_GRPC = 0 if deferred_calls.AVAILABLE else 1
"""Threads beyond those that compute: one whose call grpc is still fetching, or already sending."""


class ComputePool(futures.ThreadPoolExecutor):
    """An executor for grpc's handlers. It is one of the standard library's only because grpc asks for that.

    Args:
        places: calls that compute at once.
        admission: told of every call that comes, begins and ends.
        most_threads: the most threads, those that wait included; beyond, a call that waits keeps its place.
        patience_seconds: how long the queue may stand still until another thread serves it: a caller that sends its
            headers and not its message blocks a thread inside grpc, and must not block the others' calls.
        with_grpc: threads beyond `places`, for calls that come without their message.
    """

    def __init__(
        self,
        places: int,
        admission: Admission,
        most_threads: int,
        *,
        patience_seconds: float = 0.1,
        with_grpc: int = WITH_GRPC,
    ) -> None:
        super().__init__(max_workers=most_threads, thread_name_prefix="compute")
        self._admission = admission
        self._places = places
        self._with_grpc = with_grpc
        admission.workers = places + with_grpc
        self._most_threads = max(places + with_grpc, most_threads)
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._thread_count = 0
        self._surplus = 0
        self._begun = 0
        self._running: set[_Task] = set()
        self._patience_seconds = patience_seconds
        self._ended = threading.Event()
        # A queue of nothings, not a semaphore: that one is written in Python.
        self._turns: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._turns_too_many = 0
        self._this_thread = threading.local()
        for _ in range(places):
            self._turns.put(None)
        if with_grpc:
            threading.Thread(target=self._relieve, name="compute-relief", daemon=True).start()
        for _ in range(places + with_grpc):
            self._add_thread()

    @property
    def places(self) -> int:
        """Calls that compute at once."""
        return self._places

    def resize(self, places: int) -> None:
        """Changes how many calls compute at once; those under way are not disturbed."""
        with self._lock:
            more, self._places = places - self._places, places
            self._most_threads = max(self._most_threads, places + self._with_grpc)
            self._admission.workers = places + self._with_grpc
            kept = min(max(more, 0), self._turns_too_many)
            self._turns_too_many += max(-more, 0) - kept
            for _ in range(max(more, 0) - kept):
                self._turns.put(None)
            stay = min(max(more, 0), self._surplus)
            self._surplus += max(-more, 0) - stay
            for _ in range(max(more, 0) - stay):
                self._add_thread()

    def in_turn(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        """Returns a function that does what `compute` does when its turn has come."""
        take, give, this_thread = self._turns.get, self._give_turn, self._this_thread

        def wait_and_compute(*args: Any) -> Any:
            take()
            this_thread.computes = True
            try:
                return compute(*args)
            finally:
                this_thread.computes = False
                give()

        return wait_and_compute

    def _give_turn(self) -> None:
        if self._turns_too_many:
            with self._lock:
                if self._turns_too_many:
                    self._turns_too_many -= 1
                    return
        self._turns.put(None)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Queues a call; returns what calls back when it is done."""
        task = _Task(fn, args, kwargs, self._admission.enter())
        self._tasks.put(task)
        return task

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """While the calling thread is in here, another may compute in its place, where it has one."""
        if not getattr(self._this_thread, "computes", False):
            yield
            return
        with self._lock:
            replaced = self._thread_count < self._most_threads
            if replaced:
                if self._surplus:
                    # The one that was about to leave stays.
                    self._surplus -= 1
                else:
                    self._add_thread()
        self._admission.end()
        self._give_turn()
        try:
            yield
        finally:
            self._turns.get()
            self._admission.resume()
            if replaced:
                with self._lock:
                    self._surplus += 1

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Ends the threads once they are through with what is queued."""
        self._ended.set()
        with self._lock:
            for _ in range(self._thread_count):
                self._tasks.put(None)

    def _add_thread(self) -> None:
        self._thread_count += 1
        threading.Thread(target=self._work, name="compute", daemon=True).start()

    def _relieve(self) -> None:
        """Puts a thread in the place of one that is stuck, whenever calls wait and none has begun for a while."""
        seen = -1
        while not self._ended.wait(self._patience_seconds):
            if self._begun == seen and not self._tasks.empty():
                with self._lock:
                    stuck = next((task for task in list(self._running) if not task.relieved), None)
                    if stuck is not None and self._thread_count < self._most_threads:
                        stuck.relieved = True
                        self._add_thread()
            seen = self._begun

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            self._begun += 1
            self._running.add(task)
            self._admission.begin(task.entered_at)
            try:
                task.run()
            finally:
                self._admission.end()
            with self._lock:
                self._running.discard(task)
                if task.relieved:
                    self._thread_count -= 1
                    return
            del task
            if self._surplus:
                with self._lock:
                    if self._surplus:
                        self._surplus -= 1
                        self._thread_count -= 1
                        return


class _Task:
    """A call in the queue: as much of a future as grpc uses, at a tenth of what one costs."""

    __slots__ = ("_args", "_callbacks", "_done", "_fn", "_kwargs", "entered_at", "relieved")

    def __init__(
        self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], entered_at: float
    ) -> None:
        self._fn, self._args, self._kwargs = fn, args, kwargs
        self.entered_at = entered_at
        self.relieved = False
        self._callbacks: list[Callable[[Any], object]] = []
        self._done = False

    def run(self) -> None:
        try:
            self._fn(*self._args, **self._kwargs)
        finally:
            self._done = True
            self._call_back()

    def add_done_callback(self, callback: Callable[[Any], object]) -> None:
        self._callbacks.append(callback)
        if self._done:
            self._call_back()

    def _call_back(self) -> None:
        # Both sides may come here at once; `pop` gives each callback to one of them.
        while self._callbacks:
            try:
                callback = self._callbacks.pop()
            except IndexError:
                return
            callback(self)
