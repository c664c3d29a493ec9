"""Which calls a server takes in, by the wait that they would have: pure, for any queue.

Nothing here knows how much a server can do. It watches how fast its queue moves, and predicts the wait of a
newcomer by Little's law: places before it times seconds a place. A call whose wait would be beyond the limit of
its priority is refused at once, while it is still cheap; low priority has the lowest limit, and so goes first. The
queue never runs dry meanwhile, so that what is refused costs those who are served nothing but the refusal
(Zhou et al., Overload control for scaling WeChat microservices, 2018; Nichols and Jacobson, Controlling queue
delay, 2012).
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

# How long the speed of the queue is remembered.
MEMORY_SECONDS = 0.5
# Calls taken up lately, for each worker, from which on the speed is known.
_SURE_MOVES = 4


class Priority(IntEnum):
    """Who goes last when not all can be served."""

    LOW = 0
    NORMAL = 1
    HIGH = 2


# Share of the longest wait that each priority may have ahead of it.
SHARE_OF_WAIT = {Priority.LOW: 0.25, Priority.NORMAL: 1.0, Priority.HIGH: 2.0}


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a call is not taken in.

    Attributes:
        cause: `queue_wait`, the wait would be too long; `queue_length`, too many wait whatever the speed.
        wait_seconds: the wait that the call would have had.
    """

    cause: str
    wait_seconds: float


class Admission:
    """Watches one queue in front of a number of workers. Safe for threads.

    Args:
        workers: calls that are served at once.
        max_wait_seconds: the longest wait of a call of normal priority.
        max_waiting: the most calls that wait, whatever the speed: they hold memory.
        always: so few are no queue: they keep the workers busy while the speed is being measured.
        together: the calls that wait are served many at once, as by a shared commit: while it is under way, a
            newcomer's wait does not grow with their number.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        workers: int,
        max_wait_seconds: float,
        *,
        max_waiting: int = 1_024,
        always: int | None = None,
        together: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.workers = workers
        self._max_wait_seconds = max_wait_seconds
        self._max_waiting = max_waiting
        if always is not None:
            self._always = always
        self._together = together
        self._clock = clock
        self._lock = threading.Lock()
        self._waiting = 0
        self._running = 0
        self._moved_at = -math.inf
        self._waiting_since = math.inf
        self._seen_moving_at = -math.inf
        self._moves = 0.0
        self._moving_seconds = 0.0

    @property
    def workers(self) -> int:
        """Calls that are served at once."""
        return self._workers

    @workers.setter
    def workers(self, workers: int) -> None:
        self._workers = workers
        # So few are no queue: they keep the workers busy while the speed is being measured.
        self._always = max(1, workers // 8)

    @property
    def waiting(self) -> int:
        """Calls that wait."""
        return self._waiting

    @property
    def running(self) -> int:
        """Calls that are being served."""
        return self._running

    def refusal(self, priority: Priority = Priority.NORMAL) -> Refusal | None:
        """Returns why a call may not enter now, or None when it may."""
        with self._lock:
            waiting = self._waiting
            if waiting < (self._always if priority is not Priority.LOW else 1):
                return None
            wait_seconds = self._wait_behind(waiting)
        if waiting >= self._max_waiting:
            return Refusal("queue_length", wait_seconds)
        if wait_seconds > SHARE_OF_WAIT[priority] * self._max_wait_seconds:
            return Refusal("queue_wait", wait_seconds)
        return None

    def enter(self) -> float:
        """A call joins the queue; returns the time, for `begin`."""
        now = self._clock()
        with self._lock:
            if not self._waiting:
                self._waiting_since = now
            self._waiting += 1
        return now

    def begin(self, entered_at: float) -> float:
        """A worker takes a call up; returns the seconds that it waited."""
        now = self._clock()
        with self._lock:
            # Only a queue that was there all the time, before workers that were all busy, tells their speed.
            if self._running + 1 >= self._workers and self._waiting_since <= self._moved_at:
                seconds = now - self._moved_at
                memory = math.exp(-seconds / MEMORY_SECONDS)
                self._moves = self._moves * memory + 1.0
                # A standstill that is over must not look like slowness for long.
                self._moving_seconds = self._moving_seconds * memory + min(seconds, self._max_wait_seconds)
            self._moved_at = now
            self._running += 1
            self._waiting -= 1
            if not self._waiting:
                self._waiting_since = math.inf
        return now - entered_at

    def moving(self) -> None:
        """Says that the queue does not stand still: a worker is about to take from it."""
        self._seen_moving_at = self._clock()

    def end(self) -> None:
        """A call is done."""
        with self._lock:
            self._running -= 1

    def resume(self) -> None:
        """A call that had stepped aside with `end` is being served again; it was not in the queue."""
        with self._lock:
            self._running += 1

    def withdraw(self) -> None:
        """A call leaves the queue unserved."""
        with self._lock:
            self._waiting -= 1
            if not self._waiting:
                self._waiting_since = math.inf

    def _wait_behind(self, waiting: int) -> float:
        standing = self._clock() - max(self._moved_at, self._waiting_since, self._seen_moving_at)
        measured = self._moving_seconds / self._moves if self._moves else 0.0
        if self._together:
            return max((waiting + 1) * measured, standing)
        if self._moves < _SURE_MOVES * self._workers:
            # A queue that stands still is slower than the little that was measured.
            return (waiting + 1) * max(measured, standing)
        # What has stood still so long may do so as long again, and then goes on as before: a pause of a tenth of
        # a second, of which every queue has some, is no speed at which each place will be served.
        return standing + (waiting + 1) * measured
