"""Batches travel over a real socket: several at once, retried when the service is away, counted row by row."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent import futures

import grpc
import numpy as np
import pytest
from shopkeeper.feedback.v1 import event_pb2, feedback_service_pb2, feedback_service_pb2_grpc
from shopkeeper.profile.v1 import catalog_service_pb2, catalog_service_pb2_grpc

from shared.errors import InvalidInput, Unavailable
from shared.event_kinds import EventKind
from shared.grpc_status import to_status
from shared.importing import upload
from shared.importing.batches import EventBatch, ItemRecord
from shared.importing.upload import Uploader


class Log(feedback_service_pb2_grpc.FeedbackServiceServicer):
    """A log in memory that may be told to fail."""

    def __init__(self) -> None:
        self.stored: set[str] = set()
        self.failures = 0
        self.refusal: grpc.StatusCode | None = None
        self._lock = threading.Lock()

    def RecordEvents(self, request, context):  # type: ignore[no-untyped-def]
        with self._lock:
            if self.failures > 0:
                self.failures -= 1
                context.abort(grpc.StatusCode.UNAVAILABLE, "restarting")
            if self.refusal is not None:
                from grpc_status import rpc_status

                error = InvalidInput("BATCH_TOO_LARGE", "Send fewer.")
                context.abort_with_status(rpc_status.to_status(to_status(error)))
            answer = feedback_service_pb2.RecordEventsResponse(consistency_token=f"t{len(self.stored)}")
            for event in request.events:
                if event.user_id == "bad":
                    answer.results.add(
                        status=event_pb2.EVENT_STATUS_REJECTED, field="events[0].user_id", message="no good"
                    )
                elif event.event_id in self.stored:
                    answer.results.add(status=event_pb2.EVENT_STATUS_DUPLICATE)
                else:
                    self.stored.add(event.event_id)
                    answer.results.add(status=event_pb2.EVENT_STATUS_STORED)
            return answer


class Catalog(catalog_service_pb2_grpc.CatalogServiceServicer):
    def UpsertItems(self, request, context):  # type: ignore[no-untyped-def]
        answer = catalog_service_pb2.UpsertItemsResponse()
        for item in request.items:
            ok = bool(item.title)
            status = "STORED" if ok else "REJECTED"
            answer.results.add(
                item_id=item.item_id,
                status=catalog_service_pb2.ItemWriteStatus.Value(f"ITEM_WRITE_STATUS_{status}"),
            )
        return answer


@pytest.fixture
def log() -> Log:
    return Log()


@pytest.fixture
def uploader(log: Log) -> Iterator[Uploader]:
    server = grpc.server(futures.ThreadPoolExecutor(4))
    feedback_service_pb2_grpc.add_FeedbackServiceServicer_to_server(log, server)
    catalog_service_pb2_grpc.add_CatalogServiceServicer_to_server(Catalog(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    with grpc.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.enable_retries", 0)]) as channel:
        yield Uploader(channel, channel, clock=lambda: now[0], sleep=sleep)
    server.stop(None)


def batches(count: int, users: str = "u") -> list[EventBatch]:
    return [
        EventBatch(
            [f"e{n}"], [users], np.array([EventKind.ITEM_VIEW], np.uint8), np.array([1_700_000_000_000_000 + n]),
            np.array([0, 1]), ["i"], np.ones(1), np.array([-1]), [""], np.array([np.nan]), [""], [""], [""],
        )
        for n in range(count)
    ]  # fmt: skip


def test_every_batch_is_answered_and_counted(log: Log, uploader: Uploader) -> None:
    assert sum(uploader.send_events(batches(25))) == 25
    assert uploader.report.events == {"stored": 25}
    assert len(log.stored) == 25
    assert uploader.report.consistency_token


def test_sending_again_adds_nothing(log: Log, uploader: Uploader) -> None:
    for _ in range(2):
        list(uploader.send_events(batches(5)))
    assert uploader.report.events == {"stored": 5, "duplicate": 5}
    assert uploader.report.refused == 0


def test_a_service_that_restarts_loses_nothing(log: Log, uploader: Uploader) -> None:
    log.failures = 6
    assert sum(uploader.send_events(batches(10))) == 10
    assert len(log.stored) == 10
    assert uploader.report.retries == 6


def test_a_service_that_stays_away_is_given_up_with_a_clear_error(log: Log, uploader: Uploader) -> None:
    log.failures = 10_000
    with pytest.raises(Unavailable, match="gave up after"):
        list(uploader.send_events(batches(3)))
    assert upload.RETRY_SECONDS > 0


def test_what_no_retry_mends_is_raised_at_once(log: Log, uploader: Uploader) -> None:
    log.refusal = grpc.StatusCode.INVALID_ARGUMENT
    with pytest.raises(InvalidInput) as caught:
        list(uploader.send_events(batches(3)))
    assert caught.value.reason == "BATCH_TOO_LARGE"
    assert uploader.report.retries == 0


def test_a_rejected_event_is_named(uploader: Uploader) -> None:
    list(uploader.send_events(batches(1, users="bad")))
    assert uploader.report.refused == 1
    assert "e0 rejected: events[0].user_id no good" in uploader.report.samples[0]


def test_a_rejected_item_is_counted(uploader: Uploader) -> None:
    list(uploader.send_items([[ItemRecord("a", title="A"), ItemRecord("b")]]))
    assert uploader.report.items == {"stored": 1, "rejected": 1}
    assert uploader.report.refused == 1
