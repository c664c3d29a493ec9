"""Calls that are read, stored and answered together owe each other nothing."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from prometheus_client import REGISTRY
from shopkeeper.feedback.v1 import event_pb2

from services.feedback.servicer import SERVICE_NAME
from shared.deferred_calls import DeferredCall
from tests.feedback.conftest import DUPLICATE, REJECTED, STORED, Shop, eventually, item_view

CALLS = 12
LABELS = {"grpc_method": "RecordEvents"}


def recorded_together(
    shop: Shop, calls: Sequence[Sequence[event_pb2.Event]]
) -> list[list[int] | grpc.RpcError]:
    """Returns what each call was told, or how it failed, all of them read at once."""

    def record(events: Sequence[event_pb2.Event]) -> list[int] | grpc.RpcError:
        try:
            return shop.statuses(*events)
        except grpc.RpcError as error:
            return error

    servicer = shop.feedback.servicer
    with ThreadPoolExecutor(len(calls) + 1) as callers:
        # One call holds the thread that reads, until the others stand behind it.
        with servicer._reader._one_at_a_time:
            first = callers.submit(record, [item_view()])
            eventually(lambda: REGISTRY.get_sample_value("shopkeeper_deferred_calls", LABELS) == 1)
            eventually(servicer._recorder._calls.empty)
            told = callers.map(record, calls)
            eventually(lambda: servicer._recorder._calls.qsize() == len(calls))
        assert first.result() == [STORED]
        return list(told)


def unavailable() -> float:
    """Returns how many calls failed so far; the client of these tests tries such a call a few times more."""
    labels = {"grpc_service": SERVICE_NAME, "grpc_method": "RecordEvents", "grpc_type": "unary"}
    return (
        REGISTRY.get_sample_value("grpc_server_handled_total", {**labels, "grpc_code": "UNAVAILABLE"}) or 0.0
    )


def test_rows_that_the_database_refuses_cost_their_own_call_alone(shop: Shop) -> None:
    # What the reader lets pass and PostgreSQL does not: there is no such row, as far as anybody knows.
    shop.sql("ALTER TABLE feedback.events ADD CHECK (item_id <> 'poison')")
    before = unavailable()
    calls = [[item_view(item_id=f"item-{number}")] for number in range(CALLS)]
    calls[5] = [item_view(item_id="lamp"), item_view(item_id="poison")]
    told = recorded_together(shop, calls)
    failed = told.pop(5)
    assert isinstance(failed, grpc.RpcError)
    assert failed.code() is grpc.StatusCode.UNAVAILABLE
    assert told == [[STORED]] * (CALLS - 1)
    assert 1 <= unavailable() - before < CALLS
    assert shop.count() == 1 + CALLS - 1


def test_a_refused_row_among_calls_that_are_stored_together_is_told_to_its_own_caller(shop: Shop) -> None:
    twice, nameless = item_view(), item_view(user_id="")
    calls = [[item_view(), item_view()], [twice], [item_view(), nameless], [twice, item_view()]]
    told = recorded_together(shop, calls)
    assert told[0] == [STORED, STORED]
    assert told[2] == [STORED, REJECTED]
    assert sorted([told[1][:1], told[3][:1]]) == [[STORED], [DUPLICATE]]  # type: ignore[index]
    assert shop.count() == 1 + 5


@pytest.mark.parametrize("events_each", [1, 30])
def test_an_answered_call_leaves_nothing_to_the_garbage_collector(shop: Shop, events_each: int) -> None:
    def record() -> None:
        assert set(shop.statuses(*(item_view() for _ in range(events_each)))) == {STORED}

    record()
    gc.collect()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        for _ in range(20):
            record()
        gc.collect()
        left = [type(thing) for thing in gc.garbage]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
    assert DeferredCall not in left
