"""Traces, metrics and logs as an operator would see them, from a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import urllib.request

import grpc
import pytest
from google.protobuf.wrappers_pb2 import StringValue

from tests.collector import collecting

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"

PROGRAM = textwrap.dedent(
    """
    import sys
    from shared import errors
    from shared.channel import open_channel
    from shared.server import GrpcServer
    from shared.settings import ServiceSettings
    from shared.telemetry import Telemetry
    from tests.shared.test_server import call, servicer

    settings = ServiceSettings()
    telemetry = Telemetry("front", settings)  # The first to configure a process is the one that exports.

    def back(text):
        if text == "wrong":
            raise errors.NotFound("NOTHING_HERE", "nothing of that name")
        return text

    quiet = settings.model_copy(update={"metrics_port": 0})
    inner = GrpcServer("back", quiet, Telemetry("back", quiet), register=[servicer(back)], service_names=[])
    channel = open_channel(f"127.0.0.1:{inner.start()}")
    outer = GrpcServer("front", settings, telemetry,
                       register=[servicer(lambda text: call(channel, text))], service_names=[])
    print(outer.start(), flush=True)
    sys.stdin.readline()
    outer.stop(1)
    """
)


def test_a_call_is_traced_through_both_services_counted_and_logged() -> None:
    metrics_port = _free_port()
    with collecting() as (collector, endpoint):
        metrics, log = _metrics_and_log(endpoint, metrics_port)
    assert 'grpc_server_handled_total{grpc_code="OK",grpc_method="Unary",grpc_service="test.Echo"' in metrics
    assert "grpc_server_handling_seconds_bucket" in metrics
    own = [span for span in collector.spans if span.trace_id.hex() == TRACE_ID]
    assert len(own) == 4, "front and back, twice"
    parents = {span.parent_span_id.hex() for span in own}
    assert "b7ad6b7169203331" in parents, "the caller's span is a parent"
    assert parents & {span.span_id.hex() for span in own}, "the front's span is the back's parent"
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    failed = [line for line in lines if line["event"] == "call failed"]
    assert {line["trace_id"] for line in failed} == {TRACE_ID}
    assert "NOTHING_HERE" in {line["reason"] for line in failed}


def _metrics_and_log(endpoint: str, metrics_port: int) -> tuple[str, str]:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={
            "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint,
            "SHOPKEEPER_METRICS_PORT": str(metrics_port),
            "SHOPKEEPER_LISTEN": "127.0.0.1:0",
            "PATH": "/usr/bin:/bin",
        },
    )
    try:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        metadata = (("traceparent", f"00-{TRACE_ID}-b7ad6b7169203331-01"),)
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            method = channel.unary_unary(
                "/test.Echo/Unary", StringValue.SerializeToString, StringValue.FromString
            )
            assert method(StringValue(value="right"), metadata=metadata, timeout=10).value == "right"
            with pytest.raises(grpc.RpcError):
                method(StringValue(value="wrong"), metadata=metadata, timeout=10)
        metrics = (
            urllib.request.urlopen(f"http://127.0.0.1:{metrics_port}/metrics", timeout=5).read().decode()
        )
        _, log = process.communicate("end\n", timeout=30)
    finally:
        if process.poll() is None:
            process.kill()
    return metrics, log


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
