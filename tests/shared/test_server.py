"""The server's promises, over a real socket, with hand-made servicers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from google.protobuf.wrappers_pb2 import StringValue
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from shared import errors, grpc_status
from shared.server import GrpcServer
from shared.settings import ServiceSettings
from shared.telemetry import Telemetry


def servicer(
    unary: Callable[[str], str] | None = None, stream: Callable[[str], Iterator[str]] | None = None
) -> Callable[[grpc.Server], None]:
    """Returns a registration of `test.Echo/Unary` and `test.Echo/Stream`, which carry a StringValue."""

    def answer(request: StringValue, _context: Any) -> StringValue:
        assert unary is not None
        return StringValue(value=unary(request.value))

    def answers(request: StringValue, _context: Any) -> Iterator[StringValue]:
        assert stream is not None
        for value in stream(request.value):
            yield StringValue(value=value)

    codec: dict[str, Any] = {
        "request_deserializer": StringValue.FromString,
        "response_serializer": StringValue.SerializeToString,
    }
    handlers = {
        "Unary": grpc.unary_unary_rpc_method_handler(answer, **codec),
        "Stream": grpc.unary_stream_rpc_method_handler(answers, **codec),
    }
    generic = grpc.method_handlers_generic_handler("test.Echo", handlers)
    return lambda server: server.add_generic_rpc_handlers((generic,))


def call(channel: grpc.Channel, text: str = "", timeout: float = 5) -> str:
    method = channel.unary_unary("/test.Echo/Unary", StringValue.SerializeToString, StringValue.FromString)
    return str(method(StringValue(value=text), timeout=timeout).value)


def stream(channel: grpc.Channel, text: str = "", timeout: float = 5) -> Any:
    method = channel.unary_stream("/test.Echo/Stream", StringValue.SerializeToString, StringValue.FromString)
    return method(StringValue(value=text), timeout=timeout)


def fail(error: Exception) -> Callable[[str], str]:
    def raising(_text: str) -> str:
        raise error

    return raising


def test_an_invalid_field_reaches_the_caller_with_path_reason_and_remedy(serve: Any) -> None:
    violation = errors.FieldViolation(
        "events[3].item_id", "is empty; send 1 to 256 characters.", "INVALID_ID"
    )
    channel = serve(servicer(fail(errors.InvalidInput("INVALID_ID", "no", {"row": "3"}, [violation]))))
    with pytest.raises(grpc.RpcError) as failure:
        call(channel)
    back = grpc_status.from_rpc_error(failure.value)
    assert isinstance(back, errors.InvalidInput)
    assert back.violations == (violation,)
    assert (back.reason, back.metadata) == ("INVALID_ID", {"row": "3"})
    assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_every_error_keeps_its_code_and_reason_on_the_way(serve: Any) -> None:
    current: list[Exception] = []

    def raising(_text: str) -> str:
        raise current[-1]

    channel = serve(servicer(raising))
    for error_type, code in grpc_status.CODE_OF_ERROR.items():
        if error_type is errors.Unavailable:
            continue  # Retried by the channel; its own test follows.
        current.append(error_type("SOME_REASON", "text"))
        with pytest.raises(grpc.RpcError) as failure:
            call(channel)
        assert failure.value.code() is code
        back = grpc_status.from_rpc_error(failure.value)
        assert type(back) is error_type
        assert back.reason == "SOME_REASON"


def test_an_unavailable_dependency_is_retried_until_it_is_back(serve: Any) -> None:
    attempts: list[str] = []

    def recovering(text: str) -> str:
        attempts.append(text)
        if len(attempts) < 3:
            raise errors.Unavailable("DATABASE_UNAVAILABLE", "away", retry_after_seconds=0.01)
        return "back"

    assert call(serve(servicer(recovering))) == "back"
    assert len(attempts) == 3


def test_an_exhausted_resource_says_when_to_come_back(serve: Any) -> None:
    channel = serve(servicer(fail(errors.ResourceExhausted("OVERLOADED", "full", retry_after_seconds=2.5))))
    with pytest.raises(grpc.RpcError) as failure:
        call(channel)
    status = rpc_status.from_call(failure.value)
    kinds = [detail.TypeName() for detail in status.details]
    assert error_details_pb2.RetryInfo.DESCRIPTOR.full_name in kinds
    back = grpc_status.from_rpc_error(failure.value)
    assert isinstance(back, errors.ResourceExhausted)
    assert back.retry_after_seconds == 2.5


def test_an_unknown_exception_tells_nothing_but_a_trace_id(serve: Any) -> None:
    channel = serve(servicer(fail(ZeroDivisionError("a secret value"))))
    with pytest.raises(grpc.RpcError) as failure:
        call(channel)
    assert failure.value.code() is grpc.StatusCode.INTERNAL
    assert "internal error, trace id " in failure.value.details()
    # Not a number: ids and times of the answer are full of digits.
    assert "secret" not in str(failure.value)


def test_an_error_in_mid_stream_keeps_its_code(serve: Any) -> None:
    def broken(_text: str) -> Iterator[str]:
        yield "first"
        raise errors.NotFound("GONE", "It was here a moment ago.")

    responses = stream(serve(servicer(stream=broken)))
    assert next(responses).value == "first"
    with pytest.raises(grpc.RpcError) as failure:
        next(responses)
    assert failure.value.code() is grpc.StatusCode.NOT_FOUND
    assert grpc_status.from_rpc_error(failure.value).reason == "GONE"


def test_an_endless_stream_is_ended_at_its_age_limit(serve: Any) -> None:
    def endless(_text: str) -> Iterator[str]:
        while True:
            yield "tick"
            threading.Event().wait(0.01)

    settings = ServiceSettings(listen="127.0.0.1:0", log_level="error", max_stream_age_seconds=0.2)
    ticks = list(stream(serve(servicer(stream=endless), settings=settings)))
    assert ticks


def test_streams_never_take_the_last_threads(serve: Any) -> None:
    release = threading.Event()

    def waiting(_text: str) -> Iterator[str]:
        yield "open"
        release.wait(10)

    settings = ServiceSettings(listen="127.0.0.1:0", log_level="error", workers=4)
    channel = serve(servicer(lambda text: text, waiting), settings=settings)
    try:
        held = [stream(channel) for _ in range(3)]
        assert [next(responses).value for responses in held] == ["open"] * 3
        with pytest.raises(grpc.RpcError) as failure:
            next(stream(channel))
        assert grpc_status.from_rpc_error(failure.value).reason == "TOO_MANY_STREAMS"
        assert call(channel, "still answered") == "still answered"
    finally:
        release.set()


def test_a_call_to_nowhere_is_unimplemented(serve: Any) -> None:
    channel = serve(servicer(str))
    with pytest.raises(grpc.RpcError) as failure:
        channel.unary_unary("/test.Echo/Nothing")(b"")
    assert failure.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_health_says_serving_only_when_ready_and_liveness_always() -> None:
    settings = ServiceSettings(listen="127.0.0.1:0", log_level="error")
    server = GrpcServer(
        "test", settings, Telemetry("test", settings), register=[servicer(str)], service_names=["test.Echo"]
    )
    port = server.start()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)

        def status(name: str) -> str:
            response = stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=5)
            return health_pb2.HealthCheckResponse.ServingStatus.Name(response.status)

        assert (status(""), status("test.Echo"), status("liveness")) == (
            "NOT_SERVING",
            "NOT_SERVING",
            "SERVING",
        )
        server.set_ready(True)
        assert (status(""), status("test.Echo"), status("liveness")) == ("SERVING", "SERVING", "SERVING")
    server.stop()


def test_callers_who_never_send_their_message_hold_nobody_up() -> None:
    settings = ServiceSettings(listen="127.0.0.1:0", log_level="error")
    server = GrpcServer(
        "test",
        settings,
        Telemetry("test", settings),
        register=[servicer(str)],
        service_names=["test.Echo"],
        computing_methods=["Unary"],
    )
    port = server.start()
    ended = threading.Event()

    def nothing() -> Iterator[StringValue]:
        ended.wait(30)
        yield from ()

    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        half = channel.stream_unary("/test.Echo/Unary", StringValue.SerializeToString, StringValue.FromString)
        silent = [half.future(nothing(), timeout=30) for _ in range(3)]
        for n in range(20):
            assert call(channel, str(n)) == str(n)
        assert not any(one.done() for one in silent)
        ended.set()
        for one in silent:
            one.cancel()
    server.stop()


def test_a_taken_port_is_one_clear_error(serve: Any) -> None:
    first = ServiceSettings(listen="127.0.0.1:0", log_level="error")
    server = GrpcServer("test", first, Telemetry("test", first), register=[], service_names=[])
    port = server.start()
    second = ServiceSettings(listen=f"127.0.0.1:{port}", log_level="error")
    try:
        with pytest.raises(errors.FailedPrecondition) as failure:
            GrpcServer("test", second, Telemetry("test", second), register=[], service_names=[]).start()
        assert "SHOPKEEPER_LISTEN" in failure.value.message
    finally:
        server.stop()


def test_a_call_under_way_is_finished_after_sigterm() -> None:
    program = textwrap.dedent(
        """
        import time
        from shared.server import GrpcServer, run_service
        from shared.settings import ServiceSettings
        from shared.telemetry import Telemetry
        from tests.shared.test_server import servicer

        def slow(text):
            print("working", flush=True)
            time.sleep(1.0)
            return "done " + text

        settings = ServiceSettings(listen="127.0.0.1:0", log_level="error")
        server = GrpcServer("t", settings, Telemetry("t", settings), register=[servicer(slow)], service_names=[])
        print(server.start(), flush=True)
        server.serve_until_signal()
        """
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            method = channel.unary_unary(
                "/test.Echo/Unary", StringValue.SerializeToString, StringValue.FromString
            )
            future = method.future(StringValue(value="work"), timeout=20)
            assert process.stdout.readline() == "working\n"
            os.kill(process.pid, signal.SIGTERM)
            assert future.result().value == "done work"
        assert process.wait(20) == 0
    finally:
        if process.poll() is None:
            process.kill()
