"""A call that holds no thread keeps every promise of one that does."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
from prometheus_client import REGISTRY

from shared import deferred_calls, errors, grpc_status
from shared.deferred_calls import Deferral, DeferredCall
from shared.server import GrpcServer
from shared.settings import ServiceSettings
from shared.telemetry import Telemetry
from tests.feedback.conftest import eventually

LONGEST_SECONDS = 1.0


@dataclass
class Echo:
    """A server whose method `test.Later/Echo` answers when it is told to, and its caller."""

    taken: list[DeferredCall] = field(default_factory=list)
    threads: set[str] = field(default_factory=set)
    server: GrpcServer | None = None
    channel: grpc.Channel | None = None

    def begin(self, call: DeferredCall) -> None:
        self.threads.add(threading.current_thread().name)
        self.taken.append(call)

    def register(self, server: grpc.Server) -> None:
        def blocking(_request: bytes, _context: Any) -> bytes:
            raise AssertionError("answered by a thread")

        blocking.deferral = Deferral(  # type: ignore[attr-defined]
            self.begin, LONGEST_SECONDS, lambda: errors.DeadlineExceeded("TOO_SLOW", "Nothing came.")
        )
        handlers = {"Echo": grpc.unary_unary_rpc_method_handler(blocking)}
        server.add_registered_method_handlers("test.Later", handlers)

    def call(self, request: bytes = b"x", timeout: float | None = 20) -> Any:
        assert self.channel is not None
        future = self.channel.unary_unary("/test.Later/Echo").future(request, timeout=timeout)
        return future

    def stream(self, requests: list[bytes]) -> Any:
        assert self.channel is not None
        return self.channel.stream_unary("/test.Later/Echo").future(iter(requests), timeout=20)

    def all_taken(self, count: int) -> list[DeferredCall]:
        eventually(lambda: len(self.taken) == count)
        return self.taken


@pytest.fixture
def echo() -> Iterator[Echo]:
    echo = Echo()
    settings = ServiceSettings(listen="127.0.0.1:0", log_level="error", workers=2, max_queue_seconds=5.0)
    echo.server = GrpcServer(
        "test", settings, Telemetry("test", settings), register=[echo.register], service_names=["test.Later"]
    )
    echo.channel = grpc.insecure_channel(f"127.0.0.1:{echo.server.start()}")
    yield echo
    echo.channel.close()
    echo.server.stop(0)


def handled(code: str) -> float:
    labels = {
        "grpc_service": "test.Later",
        "grpc_method": "Echo",
        "grpc_type": "unary",
        "grpc_code": code,
    }
    return REGISTRY.get_sample_value("grpc_server_handled_total", labels) or 0.0


def failure(call: Any) -> errors.ShopkeeperError:
    with pytest.raises(grpc.RpcError) as caught:
        call.result(10)
    return grpc_status.from_rpc_error(caught.value)


def test_this_release_of_grpcio_can_do_it() -> None:
    assert deferred_calls.AVAILABLE
    assert deferred_calls.LOOP_AVAILABLE


def test_more_calls_wait_than_there_are_threads_and_each_gets_its_own_answer(echo: Echo) -> None:
    before = handled("OK")
    calls = [echo.call(b"%d" % number) for number in range(100)]
    for taken in reversed(echo.all_taken(100)):
        taken.answer(b"answer to " + (taken.request or b""))
    assert [call.result(10) for call in calls] == [b"answer to %d" % number for number in range(100)]
    assert len(echo.threads) == 1
    assert handled("OK") == before + 100


def test_an_empty_message_is_a_message(echo: Echo) -> None:
    call = echo.call(b"")
    echo.all_taken(1)[0].answer(b"")
    assert call.result(10) == b""


def test_a_failure_reaches_the_caller_with_reason_and_time_to_retry(echo: Echo) -> None:
    call = echo.call()
    echo.all_taken(1)[0].fail(errors.Unavailable("AWAY", "Later.", {"cause": "x"}, retry_after_seconds=2.0))
    error = failure(call)
    assert isinstance(error, errors.Unavailable)
    assert (error.reason, error.metadata["cause"], error.retry_after_seconds) == ("AWAY", "x", 2.0)


def test_an_unknown_failure_tells_nothing_of_its_insides(echo: Echo) -> None:
    call = echo.call()
    echo.all_taken(1)[0].fail(RuntimeError("a secret"))
    with pytest.raises(grpc.RpcError) as caught:
        call.result(10)
    assert caught.value.code() is grpc.StatusCode.INTERNAL  # type: ignore[attr-defined]
    assert "secret" not in str(caught.value)


def test_a_call_is_answered_once(echo: Echo) -> None:
    before = handled("OK"), handled("INTERNAL")
    call = echo.call()
    taken = echo.all_taken(1)[0]
    taken.answer(b"first")
    taken.answer(b"second")
    taken.fail(RuntimeError("third"))
    assert call.result(10) == b"first"
    assert (handled("OK"), handled("INTERNAL")) == (before[0] + 1, before[1])


def test_a_call_without_a_deadline_does_not_wait_for_ever(echo: Echo) -> None:
    call = echo.call(timeout=None)
    echo.all_taken(1)
    assert failure(call).reason == "TOO_SLOW"
    echo.taken[0].answer(b"late")


def test_a_call_whose_deadline_passed_is_no_work(echo: Echo) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        echo.call(timeout=0.2).result(10)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED  # type: ignore[attr-defined]
    taken = echo.all_taken(1)[0]
    time.sleep(0.1)
    assert not taken.admit()


def test_an_answer_to_a_caller_that_left_harms_nobody(echo: Echo) -> None:
    first = echo.call()
    echo.all_taken(1)
    first.cancel()
    time.sleep(0.1)
    echo.taken[0].answer(b"to nobody")
    second = echo.call()
    echo.all_taken(2)[1].answer(b"to the second")
    assert second.result(10) == b"to the second"


def test_nothing_is_computed_for_a_caller_that_left_before_its_turn(echo: Echo) -> None:
    before, computed = handled("CANCELLED"), list[bytes]()
    calls = [echo.call(b"left"), echo.call(b"waits")]
    taken = {call.request: call for call in echo.all_taken(2)}
    calls[0].cancel()
    eventually(lambda: not taken[b"left"]._context.is_active())

    def compute(request: bytes, _context: Any) -> bytes:
        computed.append(request)
        return request.upper()

    for call in taken.values():
        call.serve(compute, bytes, bytes)
    assert calls[1].result(10) == b"WAITS"
    assert computed == [b"waits"]
    assert handled("CANCELLED") == before + 1


@pytest.mark.parametrize("requests", [[], [b"one", b"two"]])
def test_a_wrong_number_of_messages_ends_in_an_answer(echo: Echo, requests: list[bytes]) -> None:
    call = echo.stream(requests)
    if not requests:
        with pytest.raises(grpc.RpcError) as caught:
            call.result(10)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED  # type: ignore[attr-defined]
    else:
        echo.all_taken(1)[0].answer(b"to the first")
        assert call.result(10) == b"to the first"


def test_a_server_that_stops_waits_for_what_is_under_way(echo: Echo) -> None:
    call = echo.call()
    taken = echo.all_taken(1)[0]
    assert echo.server is not None
    stopping = threading.Thread(target=echo.server.stop, args=(10,))
    stopping.start()
    time.sleep(0.2)
    assert stopping.is_alive()
    taken.answer(b"the last")
    assert call.result(10) == b"the last"
    stopping.join(5)
    assert not stopping.is_alive()
