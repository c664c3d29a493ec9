"""Batches are cut without cutting an event, and carried to messages of the contract unchanged."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from shopkeeper.feedback.v1 import event_pb2

from shared.event_kinds import EventKind
from shared.importing.batches import UNKNOWN_PRICE, EventBatch, ItemRecord
from shared.importing.events import IdenticalRows
from shared.importing.upload import event_messages, item_message


def batch_of(line_counts: list[int], kind: EventKind = EventKind.PURCHASE) -> EventBatch:
    events, lines = len(line_counts), sum(line_counts)
    return EventBatch(
        [f"e{n}" for n in range(events)], [f"u{n}" for n in range(events)], np.full(events, int(kind), np.uint8),
        np.arange(events) * 1_000 + 1_700_000_000_000_000, np.concatenate(([0], np.cumsum(line_counts))).astype(np.int64),
        [f"i{n}" for n in range(lines)], np.ones(lines), np.arange(lines) - 1, ["EUR"] * lines, np.full(events, 4.0),
        [""] * events, [f"o{n}" for n in range(events)], ["tea"] * events,
    )  # fmt: skip


@given(st.lists(st.integers(0, 30), min_size=1, max_size=60), st.integers(1, 10), st.integers(1, 40))
def test_parts_are_bounded_and_together_are_the_whole(counts: list[int], events: int, lines: int) -> None:
    batch = batch_of(counts)
    parts = list(batch.parts(events, lines))
    assert [e for part in parts for e in part.event_ids] == list(batch.event_ids)
    assert [i for part in parts for i in part.item_ids] == list(batch.item_ids)
    for part in parts:
        assert 1 <= len(part) <= events
        assert len(part.item_ids) <= lines or len(part) == 1


def test_a_purchase_message_has_every_line_and_leaves_unknown_prices_out() -> None:
    (message,) = event_messages(batch_of([3]))
    assert [line.item_id for line in message.purchase.lines] == ["i0", "i1", "i2"]
    assert not message.purchase.lines[0].HasField("price_micros"), "-1 is unknown"
    assert message.purchase.lines[1].price_micros == 0, "0 is a price"
    assert message.purchase.currency_code == "EUR"
    assert message.purchase.order_id == "o0"


def test_every_importable_kind_becomes_its_own_detail() -> None:
    for kind in (EventKind.ITEM_VIEW, EventKind.ADD_TO_CART, EventKind.REMOVE_FROM_CART, EventKind.RATING,
                 EventKind.WISH_LIST, EventKind.SHARE, EventKind.RECOMMENDATION_CLICK, EventKind.SEARCH):  # fmt: skip
        (message,) = event_messages(batch_of([1], kind))
        detail = event_pb2.Event.DESCRIPTOR.fields_by_name[message.WhichOneof("detail")]
        assert detail.number == int(kind) + 9


def test_an_item_message_types_its_attributes() -> None:
    item = item_message(ItemRecord("a", title="A", attributes={"colour": "red", "watts": 9.5, "led": True}))
    values = {a.key: a.WhichOneof("value") for a in item.attributes}
    assert values == {"colour": "text", "watts": "number", "led": "flag"}
    assert not item.HasField("price_micros")
    assert ItemRecord("a").price_micros == UNKNOWN_PRICE


@given(st.lists(st.lists(st.integers(0, 6), max_size=12), max_size=6))
def test_occurrences_are_those_that_a_plain_count_gives(chunks: list[list[int]]) -> None:
    seen = IdenticalRows()
    counts: dict[int, int] = {}
    for chunk in chunks:
        expected = []
        for digest in chunk:
            expected.append(counts.get(digest, 0))
            counts[digest] = counts.get(digest, 0) + 1
        if chunk:
            assert seen.occurrence(np.array(chunk, np.uint64)).tolist() == expected
