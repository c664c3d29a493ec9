"""What one statement says of every row, whoever stores the same rows meanwhile."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest
from shopkeeper.feedback.v1 import event_pb2, feedback_service_pb2

from tests.feedback.conftest import DUPLICATE, REJECTED, STORED, Shop, eventually, item_view, uuid7

CONFLICT, FORGOTTEN = event_pb2.EVENT_REASON_PAYLOAD_CONFLICT, event_pb2.EVENT_REASON_USER_FORGOTTEN


def test_a_batch_of_all_sorts_is_told_row_by_row(shop: Shop) -> None:
    rng = random.Random(7)
    old = [item_view(f"shopper-{number}") for number in range(80)]
    assert set(shop.statuses(*old)) == {STORED}
    shop.stub.ForgetUser(feedback_service_pb2.ForgetUserRequest(user_id="mallory"))
    sent: list[tuple[event_pb2.Event, tuple[int, int]]] = []
    for number in range(40):
        sent.append((item_view(f"shopper-{number}", "sofa"), (STORED, 0)))
        sent.append((old[number], (DUPLICATE, 0)))
    for number in range(40, 60):
        other = item_view(f"shopper-{number}", "another", event_id=old[number].event_id)
        sent.append((other, (REJECTED, CONFLICT)))
        sent.append((item_view("mallory"), (REJECTED, FORGOTTEN)))
        sent.append((item_view("mallory", event_id=old[number + 20].event_id), (REJECTED, FORGOTTEN)))
    rng.shuffle(sent)
    # Of two alike in one batch the first is stored.
    sent += [(event, (DUPLICATE, 0)) for event, told in sent[:5] if told == (STORED, 0)]
    results = shop.record(*(event for event, _ in sent)).results
    assert [(result.status, result.reason) for result in results] == [told for _, told in sent]
    assert shop.count() == 120


@pytest.mark.parametrize("item_id", ["lamp", "another"])
def test_a_row_that_another_transaction_stores_meanwhile_is_judged_by_what_it_stored(
    shop: Shop, item_id: str
) -> None:
    event_id = uuid7()
    assert shop.statuses(item_view(event_id=event_id)) == [STORED]
    with psycopg.connect(shop.url) as other, ThreadPoolExecutor(1) as caller:
        other.execute("CREATE TEMPORARY TABLE kept AS SELECT * FROM feedback.events")
        other.execute("DELETE FROM feedback.events")
        other.commit()
        other.execute("INSERT INTO feedback.events SELECT * FROM kept")
        answer = caller.submit(shop.record, item_view(), item_view(item_id=item_id, event_id=event_id))
        eventually(
            lambda: shop.sql(
                "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock' "
                "AND query LIKE '%INSERT INTO feedback.events%'"
            )
        )
        other.commit()
        fresh, again = answer.result(20).results
    assert fresh.status == STORED
    if item_id == "lamp":
        assert again.status == DUPLICATE
    else:
        assert (again.status, again.reason) == (REJECTED, CONFLICT)
    assert shop.count() == 2


def test_rows_are_inserted_by_ascending_key_in_whatever_order_they_come(shop: Shop) -> None:
    events = [item_view(f"shopper-{number}") for number in range(60)]
    random.Random(3).shuffle(events)
    assert set(shop.statuses(*events)) == {STORED}
    # In the order of insertion, which is that of the table's pages.
    keys = [key for (key,) in shop.sql("SELECT event_key FROM feedback.events ORDER BY tableoid, ctid")]
    assert keys == sorted(keys)
    assert len(keys) == 60
