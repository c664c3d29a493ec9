"""One thread takes calls in and computes, and whoever waits leaves it to another."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
from google.protobuf.message import DecodeError

from shared import errors, grpc_status
from shared.deferred_calls import ServerEvents
from shared.server import GrpcServer
from shared.settings import ServiceSettings
from shared.telemetry import Telemetry
from tests.feedback.conftest import eventually


@dataclass
class Computing:
    """A server whose method `test.Computing/Do` computes, and `Beside` does not; with its caller."""

    server: GrpcServer = field(init=False)
    channel: grpc.Channel = field(init=False)
    threads: list[str] = field(default_factory=list)
    outside: threading.Event = field(default_factory=threading.Event)
    waiting: int = 0
    running: int = 0
    most: int = 0

    def do(self, request: str, context: grpc.ServicerContext) -> str:
        self.threads.append(threading.current_thread().name)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            if request == "bad":
                raise errors.InvalidInput("BAD", "It is bad.")
            if request == "broken":
                raise RuntimeError("a secret")
            if request == "slow":
                time.sleep(0.3)
            if request == "left":
                return str(round(context.time_remaining()))
            if request.startswith("wait"):
                with self.server.waiting():
                    self.running -= 1
                    self.waiting += 1
                    assert self.outside.wait(20)
                    self.waiting -= 1
                    self.running += 1
            return request.upper()
        finally:
            self.running -= 1

    def register(self, server: grpc.Server) -> None:
        def read(message: bytes) -> str:
            if message == b"\xff":
                raise DecodeError("truncated")
            return message.decode()

        handlers = {
            "Do": grpc.unary_unary_rpc_method_handler(self.do, read, str.encode),
            "Beside": grpc.unary_unary_rpc_method_handler(lambda request, _context: request),
        }
        server.add_registered_method_handlers("test.Computing", handlers)

    def call(self, request: bytes, timeout: float = 20, method: str = "Do") -> Any:
        return self.channel.unary_unary(f"/test.Computing/{method}").future(request, timeout=timeout)

    def all_answered(self, count: int) -> None:
        calls = [self.call(b"call %d" % number) for number in range(count)]
        assert [call.result(20) for call in calls] == [b"CALL %d" % number for number in range(count)]


@contextmanager
def served(
    workers: int = 16, computing_threads: int = 1, max_queue_seconds: float = 60.0
) -> Iterator[Computing]:
    computing = Computing()
    settings = ServiceSettings(
        listen="127.0.0.1:0", log_level="error", workers=workers, max_queue_seconds=max_queue_seconds
    )
    computing.server = GrpcServer(
        "test",
        settings,
        Telemetry("test", settings),
        register=[computing.register],
        service_names=["test.Computing"],
        computing_methods=["Do"],
        computing_threads=computing_threads,
    )
    with grpc.insecure_channel(f"127.0.0.1:{computing.server.start()}") as computing.channel:
        yield computing
        computing.outside.set()
    computing.server.stop(0)


def failure(call: Any) -> errors.ShopkeeperError:
    with pytest.raises(grpc.RpcError) as caught:
        call.result(10)
    return grpc_status.from_rpc_error(caught.value)


def test_many_calls_get_each_their_own_answer_from_the_thread_that_takes_them_in() -> None:
    with served() as computing:
        computing.all_answered(200)
        assert len(set(computing.threads)) == 1
        assert "compute" not in computing.threads
        assert computing.most == 1


def test_a_computation_sees_its_deadline_and_fails_as_any_handler_does() -> None:
    with served() as computing:
        assert computing.call(b"left", timeout=7).result(10) == b"7"
        assert failure(computing.call(b"bad")).reason == "BAD"
        assert failure(computing.call(b"\xff")).reason == "INVALID_REQUEST"
        with pytest.raises(grpc.RpcError) as caught:
            computing.call(b"broken").result(10)
        assert caught.value.code() is grpc.StatusCode.INTERNAL  # type: ignore[attr-defined]
        assert "secret" not in str(caught.value)


def test_a_call_whose_deadline_passed_before_its_turn_is_not_computed() -> None:
    with served() as computing:
        slow = computing.call(b"slow")
        eventually(lambda: computing.running == 1)
        late = computing.call(b"late", timeout=0.1)
        with pytest.raises(grpc.RpcError) as caught:
            late.result(10)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED  # type: ignore[attr-defined]
        assert slow.result(10) == b"SLOW"
        assert computing.call(b"next").result(10) == b"NEXT"
        assert len(computing.threads) == 2


def test_calls_that_wait_hold_up_nobody_and_all_are_answered() -> None:
    with served() as computing:
        waiting = [computing.call(b"wait %d" % number) for number in range(8)]
        eventually(lambda: computing.waiting == 8)
        computing.all_answered(50)
        assert computing.call(b"beside", method="Beside").result(10) == b"beside"
        computing.outside.set()
        assert [call.result(10) for call in waiting] == [b"WAIT %d" % number for number in range(8)]
        computing.all_answered(50)


def test_stand_ins_leave_once_nobody_waits() -> None:
    with served() as computing:
        for _ in range(3):
            computing.outside.clear()
            waiting = [computing.call(b"wait") for _ in range(5)]
            eventually(lambda: computing.waiting == 5)
            computing.outside.set()
            for call in waiting:
                call.result(10)
        eventually(lambda: not [t for t in threading.enumerate() if t.name == "serving"])
        del computing.threads[:]
        computing.all_answered(50)
        assert len(set(computing.threads)) == 1


def test_beyond_the_most_threads_a_wait_holds_the_loop_up_and_no_longer() -> None:
    with served(workers=2) as computing:
        waiting = [computing.call(b"wait") for _ in range(3)]
        eventually(lambda: computing.waiting == 2)
        further = computing.call(b"further")
        with pytest.raises(grpc.FutureTimeoutError):
            further.result(0.2)
        computing.outside.set()
        assert further.result(10) == b"FURTHER"
        for call in waiting:
            assert call.result(10) == b"WAIT"


def test_a_server_stops_while_one_waits_and_another_stands_in() -> None:
    with served() as computing:
        call = computing.call(b"wait")
        eventually(lambda: computing.waiting == 1)
        computing.all_answered(5)
        stopping = threading.Thread(target=computing.server.stop, args=(10,))
        stopping.start()
        time.sleep(0.1)
        computing.outside.set()
        assert call.result(10) == b"WAIT"
        stopping.join(10)
        assert not stopping.is_alive()
        eventually(lambda: not [t for t in threading.enumerate() if t.name == "serving"])


def test_random_waits_leave_no_call_unanswered() -> None:
    with served(workers=8) as computing, futures.ThreadPoolExecutor(12) as callers:
        computing.outside.set()

        def calls(caller: int) -> int:
            for number in range(60):
                content = b"wait" if (caller * 7 + number * 5) % 3 == 0 else b"call"
                assert computing.call(content).result(20) == content.upper()
            return caller

        assert sorted(callers.map(calls, range(12))) == list(range(12))


def test_overload_is_refused_while_answers_are_computed() -> None:
    with served(max_queue_seconds=0.4) as computing:
        calls = []
        for _ in range(24):
            calls.append(computing.call(b"slow", timeout=30))
            # A speed has to be seen before a wait can be foretold.
            time.sleep(0.1)
        refused = [failed for call in calls if (failed := call.exception(30)) is not None]
        assert 0 < len(refused) < 24
        for failed in refused:
            assert failed.code() is grpc.StatusCode.RESOURCE_EXHAUSTED  # type: ignore[attr-defined]


def test_more_than_one_at_a_time_compute_on_threads_of_their_own() -> None:
    with served(computing_threads=2) as computing:
        slow = [computing.call(b"slow") for _ in range(4)]
        for call in slow:
            assert call.result(10) == b"SLOW"
        assert set(computing.threads) == {"compute"}
        assert computing.most == 2
        computing.server.set_computing_threads(1)
        del computing.threads[:]
        computing.all_answered(20)
        assert "compute" not in computing.threads


def test_where_grpcio_has_no_loop_to_take_part_in_the_pool_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ServerEvents, "of", classmethod(lambda *_: None))
    with served() as computing:
        waiting = [computing.call(b"wait") for _ in range(3)]
        eventually(lambda: computing.waiting == 3)
        computing.all_answered(50)
        assert set(computing.threads) == {"compute"}
        computing.outside.set()
        for call in waiting:
            assert call.result(10) == b"WAIT"
