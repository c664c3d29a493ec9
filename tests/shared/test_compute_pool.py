"""Few compute at once, and who waits is in nobody's way."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from shared.admission import Admission
from shared.compute_pool import ComputePool


class Calls:
    """Calls that run until they are let go, and how many did at once."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.running = 0
        self.most = 0
        self.done = 0
        self.may_end = threading.Event()

    def run(self) -> None:
        with self.changed:
            self.running += 1
            self.most = max(self.most, self.running)
            self.changed.notify_all()
        assert self.may_end.wait(10)
        with self.changed:
            self.running -= 1
            self.done += 1
            self.changed.notify_all()

    def until(self, condition: Callable[[], bool]) -> None:
        with self.changed:
            assert self.changed.wait_for(condition, 10)


def pool_of(
    places: int, most_threads: int = 32, patience_seconds: float = 60.0, with_grpc: int = 1
) -> tuple[ComputePool, Admission]:
    admission = Admission(places, 1.0)
    pool = ComputePool(
        places, admission, most_threads, patience_seconds=patience_seconds, with_grpc=with_grpc
    )
    return pool, admission


def waiting_for(outside: threading.Event, pool: ComputePool, then: Calls) -> Callable[[], None]:
    """Returns a call that waits without computing, and goes on once it may."""

    def call() -> None:
        with pool.waiting():
            assert outside.wait(10)
        then.run()

    return call


def one_computes_and_one_stands_by(pool: ComputePool) -> None:
    """A pool of one place has no more threads than it needs, and lets no more compute."""
    busy = Calls()
    for _ in range(3):
        pool.submit(pool.in_turn(busy.run))
    busy.until(lambda: busy.running == 1)
    assert pool._thread_count == 2
    busy.may_end.set()
    busy.until(lambda: busy.done == 3)
    assert busy.most == 1


def test_no_more_calls_compute_at_once_than_there_are_places() -> None:
    pool, _ = pool_of(2)
    calls = Calls()
    for _ in range(6):
        pool.submit(pool.in_turn(calls.run))
    calls.until(lambda: calls.running == 2)
    calls.may_end.set()
    calls.until(lambda: calls.done == 6)
    assert calls.most == 2
    pool.shutdown()


def test_a_call_that_waits_leaves_its_place_to_another() -> None:
    pool, admission = pool_of(1)
    calls, outside = Calls(), threading.Event()
    calls.may_end.set()

    for _ in range(5):
        pool.submit(pool.in_turn(waiting_for(outside, pool, calls)))
    pool.submit(pool.in_turn(calls.run))
    # All five wait, on one place, and the sixth is through.
    calls.until(lambda: calls.done == 1)
    outside.set()
    calls.until(lambda: calls.done == 6)
    assert admission.waiting == 0
    pool.shutdown()


def test_stand_ins_leave_when_they_are_no_longer_needed() -> None:
    pool, _ = pool_of(1)
    outside, calls = threading.Event(), Calls()
    calls.may_end.set()

    for _ in range(5):
        pool.submit(pool.in_turn(waiting_for(outside, pool, calls)))
    pool.submit(pool.in_turn(calls.run))
    calls.until(lambda: calls.done == 1)
    end = time.monotonic() + 10
    # The fifth may still be on its way to its wait.
    while pool._thread_count < 7 and time.monotonic() < end:
        time.sleep(0.001)
    assert pool._thread_count == 7
    outside.set()
    calls.until(lambda: calls.done == 6)
    for n in range(20):
        pool.submit(pool.in_turn(calls.run))
        calls.until(lambda n=n: calls.done == 7 + n)  # type: ignore[misc]
    one_computes_and_one_stands_by(pool)
    pool.shutdown()


def test_beyond_the_most_threads_a_call_that_waits_keeps_its_thread() -> None:
    pool, _ = pool_of(1, most_threads=1)
    outside, calls = threading.Event(), Calls()
    calls.may_end.set()

    def wait_outside() -> None:
        with pool.waiting():
            assert outside.wait(10)

    for _ in range(2):
        pool.submit(pool.in_turn(wait_outside))
    pool.submit(pool.in_turn(calls.run))
    assert calls.done == 0
    outside.set()
    calls.until(lambda: calls.done == 1)
    pool.shutdown()


def test_who_waits_without_computing_gives_no_turn_away() -> None:
    pool, _ = pool_of(1)
    # As a batch does, which has a thread of its own.
    with pool.waiting():
        calls = Calls()
        for _ in range(3):
            pool.submit(pool.in_turn(calls.run))
        calls.until(lambda: calls.running == 1)
        calls.may_end.set()
        calls.until(lambda: calls.done == 3)
    assert calls.most == 1
    pool.shutdown()


def test_a_call_that_is_stuck_does_not_hold_the_others_up() -> None:
    pool, _ = pool_of(1, patience_seconds=0.01)
    stuck, calls = threading.Event(), Calls()
    calls.may_end.set()
    for _ in range(2):
        # As grpc does for a message that never comes, and without saying so.
        pool.submit(stuck.wait)
    for _ in range(3):
        pool.submit(pool.in_turn(calls.run))
    calls.until(lambda: calls.done == 3)
    stuck.set()
    end = time.monotonic() + 10
    # Those that were stuck leave.
    while pool._thread_count > 2 and time.monotonic() < end:
        time.sleep(0.001)
    one_computes_and_one_stands_by(pool)
    pool.shutdown()


def test_places_can_be_added_and_taken_away_while_calls_are_served() -> None:
    pool, admission = pool_of(1)
    pool.resize(3)
    calls = Calls()
    for _ in range(6):
        pool.submit(pool.in_turn(calls.run))
    calls.until(lambda: calls.running == 3)
    assert (pool.places, admission.workers) == (3, 4)
    calls.may_end.set()
    calls.until(lambda: calls.done == 6)
    pool.resize(1)
    through = Calls()
    through.may_end.set()
    for n in range(8):
        pool.submit(pool.in_turn(through.run))
        through.until(lambda n=n: through.done == n + 1)  # type: ignore[misc]
    one_computes_and_one_stands_by(pool)
    pool.shutdown()


def test_whoever_asks_is_called_back_once_before_or_after_the_end() -> None:
    pool, _ = pool_of(1)
    told = threading.Semaphore(0)
    for _ in range(200):
        pool.submit(lambda: None).add_done_callback(lambda _task: told.release())
    for _ in range(200):
        assert told.acquire(timeout=10)
    assert not told.acquire(blocking=False)
    pool.shutdown()
