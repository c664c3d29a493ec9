"""The gRPC side of admission: the pool that is watched, and refusals that cost next to nothing.

A refusal is answered on the thread that accepted the call, before its message is read, with
RESOURCE_EXHAUSTED and a time to come back (https://google.aip.dev/193).
"""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Callable, Collection, Mapping
from concurrent import futures
from typing import Any

import grpc
from grpc_status import rpc_status
from prometheus_client import Counter, Gauge, Histogram

from shared import deferred_calls, errors, grpc_status
from shared.admission import Admission, Priority, Refusal

# A caller may say that a call can wait. It cannot say that its call is more urgent than another's.
PRIORITY_METADATA_KEY = "shopkeeper-priority"
LOW_PRIORITY = (PRIORITY_METADATA_KEY, "low")

_REFUSED = Counter(
    "shopkeeper_admission_refused_total",
    "Calls refused before any work was done for them.",
    ["grpc_service", "cause", "priority"],
)
_WAIT_SECONDS = Histogram(
    "shopkeeper_admission_wait_seconds",
    "Seconds that calls waited for a thread.",
    buckets=(0.0001, 0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5),
)
_WAITING = Gauge("shopkeeper_admission_waiting", "Calls that wait for a thread.")
_RUNNING = Gauge("shopkeeper_admission_running", "Calls that have a thread, streams among them.")

RETRY_STEP_SECONDS = 0.05
LONGEST_RETRY_SECONDS = 5.0


class AdmittedPool(futures.ThreadPoolExecutor):
    """Threads that answer calls, and tell an Admission how long the calls waited for them."""

    def __init__(self, workers: int, admission: Admission) -> None:
        super().__init__(max_workers=workers, thread_name_prefix="rpc")
        self._admission = admission
        _WAITING.set_function(lambda: admission.waiting)
        _RUNNING.set_function(lambda: admission.running)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> futures.Future[Any]:
        """Queues a call."""
        entered_at = self._admission.enter()
        try:
            return super().submit(self._serve, entered_at, fn, args, kwargs)
        except BaseException:
            self._admission.withdraw()
            raise

    def _serve(self, entered_at: float, fn: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        _WAIT_SECONDS.observe(self._admission.begin(entered_at))
        try:
            return fn(*args, **kwargs)
        finally:
            self._admission.end()


class _Done:
    """As much of a future that is done as grpc uses."""

    def add_done_callback(self, callback: Callable[[Any], object]) -> None:
        callback(self)


class _Here(futures.ThreadPoolExecutor):
    """Runs what it is given at once, on the thread that gives it."""

    _done = _Done()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Runs a call; returns what is done. A call that fails ends itself, and not the thread that accepts calls."""
        with contextlib.suppress(Exception):
            fn(*args, **kwargs)
        return self._done


class LoadShedding:
    """Decides at the arrival of a call, from its method and metadata alone.

    Args:
        admission: watches the pool.
        priorities: by the method's name without its service; others are NORMAL.
        computing: watches the pool of the methods that compute, named beside it; None: there is no such pool.
            LOW priority is refused where any pool has no room: it would take from the other's processor.
    """

    def __init__(
        self,
        admission: Admission,
        priorities: Mapping[str, Priority],
        computing: tuple[Admission, frozenset[str]] | None = None,
    ) -> None:
        self._admission = admission
        self._apart: dict[str, Admission] = {}
        self._all = [admission]
        if computing is not None:
            self.watch(*computing)
        self._priorities = dict(priorities)
        self._here = _Here(max_workers=1)
        self._refusing: dict[int, Any] = {}
        self._counters: dict[tuple[str, str, Priority], Any] = {}
        self._lock = threading.Lock()
        self._refused_since_told = 0

    def watch(self, admission: Admission, methods: Collection[str]) -> None:
        """Methods, by their name, have an admission of their own."""
        self._apart.update(dict.fromkeys(methods, admission))
        self._all = [self._admission, *dict.fromkeys(self._apart.values())]

    def refusing_handler(self, service: str, method: str, metadata: Any) -> Any | None:
        """Returns a handler that refuses the call, or None where it is taken in."""
        priority = self._priorities.get(method, Priority.NORMAL)
        if priority is not Priority.LOW and metadata and LOW_PRIORITY in metadata:
            priority = Priority.LOW
        own = self._apart.get(method, self._admission)
        refusal = own.refusal(priority)
        if refusal is None and priority is Priority.LOW:
            refusal = next((found for other in self._all if (found := other.refusal(priority))), None)
        if refusal is None:
            return None
        key = (service, refusal.cause, priority)
        counter = self._counters.get(key)
        if counter is None:
            counter = self._counters[key] = _REFUSED.labels(service, refusal.cause, priority.name.lower())
        counter.inc()
        with self._lock:
            self._refused_since_told += 1
        return self._handler(refusal)

    def take_refused(self) -> int:
        """Returns how many calls were refused since it was last asked."""
        with self._lock:
            count, self._refused_since_told = self._refused_since_told, 0
        return count

    def _handler(self, refusal: Refusal) -> Any:
        # Spread over as long again as the wait, so that those who were refused together do not return together.
        seconds = refusal.wait_seconds * random.uniform(1.0, 2.0)  # noqa: S311 - no secret depends on it
        steps = max(
            1, min(round(seconds / RETRY_STEP_SECONDS), int(LONGEST_RETRY_SECONDS / RETRY_STEP_SECONDS))
        )
        handler = self._refusing.get(steps)
        if handler is None:
            handler = self._refusing[steps] = self._refuse_for(steps * RETRY_STEP_SECONDS)
        return handler

    def _refuse_for(self, seconds: float) -> Any:
        status = rpc_status.to_status(
            grpc_status.to_status(
                errors.ResourceExhausted(
                    "OVERLOADED",
                    "This replica has more to do than it can; wait a little, and try again or try another.",
                    retry_after_seconds=seconds,
                )
            )
        )

        def refuse(_requests: Any, context: grpc.ServicerContext) -> None:
            context.abort_with_status(status)

        if deferred_calls.AVAILABLE:
            refuse.experimental_thread_pool = deferred_calls.EndedCalls(status)  # type: ignore[attr-defined]
            return grpc.unary_unary_rpc_method_handler(refuse)
        refuse.experimental_thread_pool = self._here  # type: ignore[attr-defined]
        # As if the requests were a stream, whatever the method: then nobody waits for the message.
        return grpc.stream_unary_rpc_method_handler(refuse)
