"""More than the log can take: what is refused says so, what is acknowledged is there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
import psycopg
import pytest
from shopkeeper.feedback.v1 import feedback_service_pb2, feedback_service_pb2_grpc

from services.feedback.__main__ import wire
from services.feedback.servicer import PRIORITIES, SERVICE_NAME
from services.feedback.settings import FeedbackSettings
from shared import errors, grpc_status
from shared.channel import open_channel
from shared.server import GrpcServer
from shared.telemetry import Telemetry
from tests.feedback.conftest import STORED, eventually, item_view


@pytest.fixture
def small(database_url: str, keys_dir: Any, tmp_path: Any) -> Iterator[Any]:
    """Stub of a service with four threads."""
    settings = FeedbackSettings(
        listen="127.0.0.1:0",
        log_level="error",
        keys=keys_dir,
        registry=tmp_path,
        workers=4,
        max_queue_seconds=0.5,
    )
    feedback = wire(settings, database_url)
    server = GrpcServer(
        "feedback", settings, Telemetry("feedback", settings), register=[feedback.register],
        service_names=[SERVICE_NAME], priorities=PRIORITIES,
    )  # fmt: skip
    channel = open_channel(f"127.0.0.1:{server.start()}")
    yield feedback_service_pb2_grpc.FeedbackServiceStub(channel)
    channel.close()
    server.stop(0)
    feedback.close()


def test_a_log_that_cannot_keep_up_refuses_in_time_and_keeps_what_it_acknowledged(
    small: Any, database_url: str
) -> None:
    assert small.RecordEvents(request("warm"), timeout=20).results[0].status == STORED
    with psycopg.connect(database_url) as blocker:
        # Inserts wait behind this lock: the capacity is 0, and arrivals go on.
        blocker.execute("LOCK TABLE feedback.events IN EXCLUSIVE MODE")
        first = [(name := f"item {number}", send(small, name)) for number in range(8)]

        def standing_still() -> bool:
            # Reports are refused before events are; the others' turn comes when the queue has stood for longer.
            probe = send(small, f"probe {len(probes)}")
            probes.append((f"probe {len(probes)}", probe))
            return any(call.done() for _, call in probes)

        probes: list[tuple[str, Any]] = []
        eventually(standing_still)
        with pytest.raises(grpc.RpcError) as report:
            small.GetMetrics(feedback_service_pb2.GetMetricsRequest(), timeout=20)
        assert report.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        late = [(name := f"late {number}", send(small, name)) for number in range(20)]
        eventually(lambda: all(call.done() for _, call in late))
    outcomes = {name: outcome(call) for name, call in [*first, *probes, *late]}
    assert {outcomes[name] for name, _ in late} == {"refused"}
    assert {outcomes[name] for name, _ in first} == {"stored"}
    stored = {item for (item,) in rows(database_url)} - {"warm"}
    assert stored == {name for name, what in outcomes.items() if what == "stored"}
    # The overload is over, and so is its refusal.
    eventually(lambda: outcome(send(small, "after")) == "stored")
    small.GetMetrics(feedback_service_pb2.GetMetricsRequest(), timeout=20)


def request(item_id: str) -> feedback_service_pb2.RecordEventsRequest:
    return feedback_service_pb2.RecordEventsRequest(events=[item_view(item_id=item_id)])


def send(stub: Any, item_id: str) -> Any:
    return stub.RecordEvents.future(request(item_id), timeout=60)


def outcome(call: Any) -> str:
    try:
        answer = call.result()
    except grpc.RpcError as failure:
        error = grpc_status.from_rpc_error(failure)
        assert isinstance(error, errors.ResourceExhausted), error
        assert error.reason == "OVERLOADED"
        assert error.retry_after_seconds > 0
        return "refused"
    assert answer.results[0].status == STORED
    return "stored"


def rows(url: str) -> list[tuple[str]]:
    with psycopg.connect(url) as connection:
        return connection.execute("SELECT item_id FROM feedback.events").fetchall()
