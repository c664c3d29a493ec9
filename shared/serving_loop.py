"""One thread that takes calls in and computes their answers, in turns.

Where answers are computed one at a time, a second thread for them only passes the interpreter lock to and fro: NumPy
gives it away at every operation, and the thread that takes calls in picks it up, on another core, with cold caches. So
that thread computes too: it looks what has come, refuses what has to be refused, computes one answer, and looks again, as
an event loop does. (An answer takes a millisecond; so long the next call waits to be taken in.) A computation that has
to wait for the outside leaves the loop to another thread meanwhile.

Where more than one answer is to be computed at once, and where this grpcio does not let its loop be run from
outside, calls go to the threads of `shared.compute_pool`.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from shared.admission import Admission
from shared.compute_pool import ComputePool
from shared.deferred_calls import ServerEvents

_MOST_TAKEN_IN = 32
"""Events between two answers: a flood of calls, each refused, must not keep the loop from answering."""
_IDLE_SECONDS = 0.05
"""How soon a stand-in with nothing to do sees that it is not needed any more."""


class ServingLoop:
    """Computes calls on the thread that takes them in.

    Args:
        pool: computes instead, where more than one answer is computed at once.
        admission: told of every call that comes, begins and ends.
        most_threads: the most threads, those that wait included; beyond, a call that waits holds the loop up.
    """

    def __init__(self, pool: ComputePool, admission: Admission, most_threads: int) -> None:
        self._pool = pool
        self._admission = admission
        self._most_threads = most_threads
        self._events: ServerEvents | None = None
        self._calls: deque[tuple[Callable[[], None], float]] = deque()
        self._this_thread = threading.local()
        self._lock = threading.Lock()
        self._threads = 1
        # Of the threads, those that do not wait, and of these those that are in `_compute`. The last of them leaves
        # that only when nothing is left to compute: nobody else might look.
        self._turning = 1
        self._computing = 0

    def attach(self, server: grpc.Server) -> None:
        """Says whose calls these are; until then the pool computes."""
        self._events = ServerEvents.of(server)

    def submit(self, compute: Callable[[], None]) -> None:
        """Computes, now or in its turn. On the thread that takes calls in."""
        if self._events is None or self._pool.places > 1:
            self._pool.submit(self._pool.in_turn(compute))
            return
        self._calls.append((compute, self._admission.enter()))
        if not getattr(self._this_thread, "computes", False):
            self._compute()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """While a computation is in here, it waits, and another thread takes calls in and computes."""
        if not getattr(self._this_thread, "computes", False):
            with self._pool.waiting():
                yield
            return
        with self._lock:
            replaced = self._threads < self._most_threads
            if replaced:
                self._turning -= 1
                self._computing -= 1
                if not self._computing:
                    self._turning += 1
                    self._threads += 1
                    threading.Thread(target=self._stand_in, name="serving", daemon=True).start()
        self._admission.end()
        try:
            yield
        finally:
            self._admission.resume()
            if replaced:
                with self._lock:
                    self._turning += 1
                    self._computing += 1

    def _compute(self) -> None:
        this_thread, admission, calls = self._this_thread, self._admission, self._calls
        stands_in = getattr(this_thread, "stands_in", False)
        with self._lock:
            self._computing += 1
        this_thread.computes = True
        while True:
            self._take_in()
            try:
                compute, entered_at = calls.popleft()
            except IndexError:
                if self._may_stop_computing():
                    break
                continue
            admission.begin(entered_at)
            try:
                compute()
            finally:
                admission.end()
            if (not calls or stands_in) and self._may_stop_computing():
                break
        this_thread.computes = False

    def _may_stop_computing(self) -> bool:
        with self._lock:
            if self._calls and self._computing == 1:
                return False
            self._computing -= 1
            return True

    def _take_in(self) -> None:
        assert self._events is not None
        # Whoever is refused now is refused by the thread that serves: no pause, however long it was, goes on.
        self._admission.moving()
        for _ in range(_MOST_TAKEN_IN):
            if not self._events.take(0.0):
                return

    def _stand_in(self) -> None:
        assert self._events is not None
        self._this_thread.stands_in = True
        # What the one that waits had taken in.
        self._compute()
        while not self._may_leave() and not self._events.ended:
            self._events.take(time.time() + _IDLE_SECONDS)

    def _may_leave(self) -> bool:
        with self._lock:
            if self._turning == 1:
                return False
            self._turning -= 1
            self._threads -= 1
            return True


def computed(loop: ServingLoop, behavior: Any, handler: Any) -> Callable[[Any], None]:
    """Returns what computes the answers of a method of grpc's, given each call with its message."""
    deserialize = handler.request_deserializer or bytes
    serialize = handler.response_serializer or bytes

    def begin(call: Any) -> None:
        loop.submit(lambda: call.serve(behavior, deserialize, serialize))

    return begin
