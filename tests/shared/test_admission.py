"""Which calls are let in: by simulation with a clock of its own, and over a real socket."""

from __future__ import annotations

import heapq
import random
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
from google.protobuf.wrappers_pb2 import StringValue
from prometheus_client import REGISTRY

from shared import errors, grpc_status
from shared.admission import Admission, Priority
from shared.load_shedding import LOW_PRIORITY
from shared.server import GrpcServer
from shared.settings import ServiceSettings
from shared.telemetry import Telemetry
from tests.feedback.conftest import eventually
from tests.shared.test_server import servicer


@dataclass(slots=True)
class Outcome:
    """What became of the calls of a simulation."""

    served: Counter[Priority] = field(default_factory=Counter)
    refused: Counter[Priority] = field(default_factory=Counter)
    waits: list[float] = field(default_factory=list)
    causes: set[str] = field(default_factory=set)


class Simulation:
    """Workers that take `service_seconds` a call, behind an Admission, on a clock that is counted up."""

    def __init__(self, workers: int, service_seconds: float, max_wait_seconds: float, **options: Any) -> None:
        self.now = 0.0
        self.service_seconds = service_seconds
        self.workers = workers
        self.admission = Admission(workers, max_wait_seconds, clock=lambda: self.now, **options)
        self.queue: deque[tuple[float, Priority]] = deque()
        self.ends: list[float] = []

    def run(self, arrivals: Iterator[tuple[float, Priority]], until: float) -> Outcome:
        """Lets calls arrive, (time, priority), until a time."""
        outcome = Outcome()
        coming = next(arrivals)
        while True:
            end = self.ends[0] if self.ends else float("inf")
            if min(end, coming[0]) > until:
                self.now = until
                return outcome
            if end <= coming[0]:
                self.now = heapq.heappop(self.ends)
                self.admission.end()
            else:
                self.now, priority = coming
                coming = next(arrivals)
                refusal = self.admission.refusal(priority)
                if refusal is not None:
                    outcome.refused[priority] += 1
                    outcome.causes.add(refusal.cause)
                    continue
                self.queue.append((self.admission.enter(), priority))
            while self.queue and len(self.ends) < self.workers:
                entered_at, priority = self.queue.popleft()
                outcome.waits.append(self.admission.begin(entered_at))
                outcome.served[priority] += 1
                heapq.heappush(self.ends, self.now + self.service_seconds)


def poisson(
    rate: float, seed: int = 1, shares: dict[Priority, float] | None = None, start: float = 0.0
) -> Iterator[tuple[float, Priority]]:
    rng, now = random.Random(seed), start
    shares = shares or {Priority.NORMAL: 1.0}
    while True:
        now += rng.expovariate(rate)
        yield now, rng.choices(list(shares), list(shares.values()))[0]


@pytest.mark.parametrize(("workers", "service_seconds"), [(8, 0.01), (32, 0.05), (4, 0.001), (8, 0.5)])
@pytest.mark.parametrize("overload", [1.5, 2.0, 10.0])
def test_under_overload_as_many_are_served_as_can_be_and_none_waits_long(
    workers: int, service_seconds: float, overload: float
) -> None:
    # Nothing tells the admission what the capacity is; four of them differ by a factor of 250.
    capacity = workers / service_seconds
    simulation = Simulation(workers, service_seconds, max_wait_seconds=0.25)
    outcome = simulation.run(poisson(overload * capacity), until=10.0)
    assert sum(outcome.served.values()) >= 0.97 * capacity * 10.0
    # A queue of a handful is always allowed: it keeps the workers busy.
    assert max(outcome.waits) <= 1.05 * max(0.25, service_seconds) + 2 * service_seconds
    assert outcome.refused


def test_nothing_is_refused_below_capacity() -> None:
    outcome = Simulation(32, 0.01, max_wait_seconds=0.25).run(poisson(0.9 * 3_200), until=10.0)
    assert not outcome.refused


def test_a_burst_that_is_over_within_the_limit_is_served() -> None:
    simulation = Simulation(32, 0.01, max_wait_seconds=0.25)
    simulation.run(poisson(3_100), until=1.0)
    burst = iter([*((simulation.now, Priority.NORMAL) for _ in range(500)), (float("inf"), Priority.NORMAL)])
    outcome = simulation.run(burst, until=2.0)
    assert not outcome.refused
    assert max(outcome.waits) < 0.25


def test_low_priority_is_refused_first_and_high_priority_last() -> None:
    simulation = Simulation(8, 0.01, max_wait_seconds=0.25)
    shares = {Priority.LOW: 0.5, Priority.NORMAL: 0.45, Priority.HIGH: 0.05}
    # Normal and high alone fill 100 % of the capacity: there is no room for what can wait.
    outcome = simulation.run(poisson(1_600, shares=shares), until=10.0)
    refused_share = {
        priority: outcome.refused[priority] / (outcome.refused[priority] + outcome.served[priority])
        for priority in Priority
    }
    assert refused_share[Priority.LOW] > 0.8
    assert refused_share[Priority.NORMAL] < 0.15
    assert refused_share[Priority.HIGH] == 0


def test_long_calls_on_some_workers_are_no_overload() -> None:
    simulation = Simulation(32, 100.0, max_wait_seconds=0.25)
    outcome = simulation.run(
        iter([*((float(i), Priority.LOW) for i in range(31)), (1e9, Priority.LOW)]), 50.0
    )
    assert not outcome.refused


def test_a_pause_of_a_busy_queue_refuses_nobody_who_could_be_served_in_time() -> None:
    # One worker, always busy, with three callers behind: then it pauses for 150 ms, as a process does that is short of
    # processor or loads a model beside.
    simulation = Simulation(1, 0.001, max_wait_seconds=0.25)
    served = simulation.run(poisson(980), until=1.0)
    simulation.service_seconds = 0.15
    simulation.run(iter([(1.0, Priority.NORMAL), (9.0, Priority.NORMAL)]), until=1.001)
    simulation.service_seconds = 0.001
    few = iter([*((1.03 + 0.03 * n, Priority.NORMAL) for n in range(3)), (9.0, Priority.NORMAL)])
    outcome = simulation.run(few, until=2.0)
    assert sum(served.served.values()) > 900
    assert not outcome.refused
    assert max(outcome.waits) < 0.25


def test_a_pause_that_the_worker_itself_says_is_over_refuses_nobody() -> None:
    now = 0.0
    admission = Admission(1, 0.25, clock=lambda: now)
    waiting = deque([admission.enter()])
    for _ in range(500):
        now += 0.001
        waiting.append(admission.enter())
        admission.begin(waiting.popleft())
        admission.end()
    # For half a second nothing moves; two came before, one comes after.
    now += 0.5
    waiting.append(admission.enter())
    assert admission.refusal() is not None
    admission.moving()
    assert admission.refusal() is None


def test_a_standstill_refuses_while_it_lasts_and_is_forgotten_soon_after() -> None:
    simulation = Simulation(8, 5.0, max_wait_seconds=0.25)
    standstill = simulation.run(poisson(400), until=5.0)
    assert sum(standstill.refused.values()) > 1_900
    simulation.service_seconds = 0.01
    # Eight tenths of a second later the calls of before are gone and the speed is known again.
    simulation.run(poisson(400, start=5.0), until=6.0)
    outcome = simulation.run(poisson(400, start=6.0), until=10.0)
    assert not outcome.refused


def test_what_waits_is_bounded_whatever_the_speed() -> None:
    outcome = Simulation(2, 0.001, max_wait_seconds=50.0, max_waiting=40).run(poisson(20_000), until=1.0)
    assert outcome.causes == {"queue_length"}
    assert max(outcome.waits) <= 0.04


# Over a socket


@dataclass(frozen=True, slots=True)
class Overloaded:
    """A server whose two threads are held, and what has been asked of it."""

    channel: grpc.Channel
    port: int
    release: threading.Event
    served: list[str]
    # A call that nobody holds is cancelled.
    calls: list[Any] = field(default_factory=list)

    def call(self, text: str, metadata: tuple[tuple[str, str], ...] = (), timeout: float = 20) -> Any:
        method = self.channel.unary_unary(
            "/test.Echo/Unary", StringValue.SerializeToString, StringValue.FromString
        )
        self.calls.append(method.future(StringValue(value=text), metadata=metadata, timeout=timeout))
        return self.calls[-1]


@pytest.fixture
def overloaded() -> Iterator[Callable[..., Overloaded]]:
    servers: list[tuple[GrpcServer, grpc.Channel, threading.Event]] = []

    def start(priorities: dict[str, Priority] | None = None) -> Overloaded:
        release, served, begun = threading.Event(), [], threading.Semaphore(0)

        def waiting(text: str) -> str:
            begun.release()
            release.wait(30)
            served.append(text)
            return text

        settings = ServiceSettings(listen="127.0.0.1:0", log_level="error", workers=2, max_queue_seconds=0.2)
        server = GrpcServer(
            "test", settings, Telemetry("test", settings), register=[servicer(waiting)],
            service_names=["test.Echo"], priorities=priorities,
        )  # fmt: skip
        port = server.start()
        channel = grpc.insecure_channel(f"127.0.0.1:{port}")
        servers.append((server, channel, release))
        one = Overloaded(channel, port, release, served)
        for text in ("first", "second"):
            one.call(text)
        assert begun.acquire(timeout=10)
        assert begun.acquire(timeout=10)
        return one

    yield start
    for server, channel, release in servers:
        release.set()
        channel.close()
        server.stop(0)


def refusal_of(future: Any) -> errors.ResourceExhausted:
    with pytest.raises(grpc.RpcError) as failure:
        future.result()
    assert failure.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    error = grpc_status.from_rpc_error(failure.value)
    assert isinstance(error, errors.ResourceExhausted)
    return error


def refused_count(cause: str, priority: str) -> float:
    labels = {"grpc_service": "test.Echo", "cause": cause, "priority": priority}
    return REGISTRY.get_sample_value("shopkeeper_admission_refused_total", labels) or 0.0


def until_refused(server: Overloaded, metadata: tuple[tuple[str, str], ...] = ()) -> tuple[Any, int]:
    """Calls until a call is refused at once; returns it, and how many wait."""
    for count in range(200):
        future = server.call(f"waiting {count}", metadata)
        try:
            future.exception(timeout=0.05)
        except grpc.FutureTimeoutError:
            continue
        return future, count
    raise AssertionError("nothing was refused")


def test_a_full_server_refuses_at_once_with_a_reason_and_a_time_to_retry(
    overloaded: Callable[..., Overloaded],
) -> None:
    before = refused_count("queue_wait", "normal")
    server = overloaded()
    refused, waiting = until_refused(server)
    error = refusal_of(refused)
    assert error.reason == "OVERLOADED"
    assert 0.05 <= error.retry_after_seconds <= 5.0
    assert waiting > 0
    assert refused_count("queue_wait", "normal") == before + 1
    # Those that were let in are all answered, and afterwards the server takes calls as before.
    server.release.set()
    eventually(lambda: server.call("later").exception() is None)
    assert {f"waiting {number}" for number in range(waiting)} <= set(server.served)


def test_a_call_that_can_wait_is_refused_while_others_are_let_in(
    overloaded: Callable[..., Overloaded],
) -> None:
    server = overloaded()
    # One waits. Half a second later nothing has moved.
    with pytest.raises(grpc.FutureTimeoutError):
        server.call("normal").exception(timeout=0.3)
    assert refusal_of(server.call("low", (LOW_PRIORITY,))).reason == "OVERLOADED"
    urgent = overloaded({"Unary": Priority.HIGH})
    # A method of high priority is not low because its caller says something else.
    assert refused_count("queue_wait", "high") == 0
    urgent.release.set()


def test_a_refused_stream_and_a_large_message_end_in_the_same_way(
    overloaded: Callable[..., Overloaded],
) -> None:
    server = overloaded()
    until_refused(server)
    stream = server.channel.unary_stream(
        "/test.Echo/Stream", StringValue.SerializeToString, StringValue.FromString
    )
    with pytest.raises(grpc.RpcError) as failure:
        next(stream(StringValue(value="x"), timeout=5))
    assert failure.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert refusal_of(server.call("x" * 20_000_000)).reason == "OVERLOADED"


def test_health_is_answered_by_a_full_server(overloaded: Callable[..., Overloaded]) -> None:
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    server = overloaded()
    until_refused(server)
    stub = health_pb2_grpc.HealthStub(server.channel)
    assert stub.Check(health_pb2.HealthCheckRequest(service="liveness"), timeout=5).status == 1


def test_callers_that_left_the_queue_do_not_fill_it(overloaded: Callable[..., Overloaded]) -> None:
    server = overloaded()
    refused, _ = until_refused(server)
    refusal_of(refused)
    server.channel.close()
    server.release.set()
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        again = Overloaded(channel, server.port, server.release, server.served)
        for number in range(20):
            assert again.call(f"again {number}").result().value == f"again {number}"
