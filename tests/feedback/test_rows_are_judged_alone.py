"""Hostile and careless input: each row gets its verdict, its path, and a remedy."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from shopkeeper.feedback.v1 import event_pb2

from services.feedback.converters.events import EventReader
from services.feedback.converters.identities import Door
from services.feedback.domain.events import RowReason
from shared.errors import InvalidInput
from shared.event_kinds import EventKind
from shared.tokens import TokenSigner
from tests.feedback.conftest import event, item_view, now_ms, uuid7


@pytest.fixture
def reader(keys_dir: Path) -> EventReader:
    return EventReader(Door.from_directory(keys_dir), TokenSigner.from_directory(keys_dir))


def purchase(**line: Any) -> event_pb2.Event:
    lines = [event_pb2.OrderLine(**{"item_id": "lamp", **line})]
    return event(
        purchase=event_pb2.Purchase(lines=lines, currency_code="EUR" if "price_micros" in line else "")
    )


HOSTILE = {
    "nothing at all": (event_pb2.Event(), "detail", RowReason.UNKNOWN_KIND),
    "no kind": (event_pb2.Event(event_id=uuid7(), user_id="ada"), "detail", RowReason.UNKNOWN_KIND),
    "no user": (item_view(user_id=""), "user_id", RowReason.REQUIRED),
    "a NUL in the user": (item_view(user_id="a\x00"), "user_id", RowReason.NUL_CHARACTER),
    "a line break in the user": (item_view(user_id="a\nb"), "user_id", RowReason.MALFORMED),
    "an endless user": (item_view(user_id="a" * 257), "user_id", RowReason.TOO_LONG),
    "no id": (item_view(event_id=""), "event_id", RowReason.REQUIRED),
    "an id without a time": (item_view(event_id="42"), "occurred_at", RowReason.REQUIRED),
    "an endless id": (
        item_view(event_id="x" * 129, occurred_at=Timestamp(seconds=1_700_000_000)),
        "event_id",
        RowReason.TOO_LONG,
    ),
    "a NUL in the id": (
        item_view(event_id="x\x00", occurred_at=Timestamp(seconds=1_700_000_000)),
        "event_id",
        RowReason.NUL_CHARACTER,
    ),
    "a time beyond all calendars": (
        item_view(occurred_at=Timestamp(seconds=2**62)),
        "occurred_at",
        RowReason.OUT_OF_RANGE,
    ),
    "negative nanoseconds": (
        item_view(occurred_at=Timestamp(seconds=1_700_000_000, nanos=-1)),
        "occurred_at",
        RowReason.OUT_OF_RANGE,
    ),
    "a key beyond the year 9999": (
        item_view(event_id="ffffffff-ffff-7fff-bfff-ffffffffffff"),
        "event_id",
        RowReason.OUT_OF_RANGE,
    ),
    "no item": (item_view(item_id=""), "item_view.item_id", RowReason.REQUIRED),
    "a NUL in the item": (item_view(item_id="\x00"), "item_view.item_id", RowReason.NUL_CHARACTER),
    "an endless item": (item_view(item_id="é" * 257), "item_view.item_id", RowReason.TOO_LONG),
    "a NaN": (purchase(quantity=math.nan), "purchase.lines[0].quantity", RowReason.NOT_FINITE),
    "infinity": (purchase(quantity=math.inf), "purchase.lines[0].quantity", RowReason.NOT_FINITE),
    "a negative quantity": (purchase(quantity=-1), "purchase.lines[0].quantity", RowReason.OUT_OF_RANGE),
    "an absurd quantity": (purchase(quantity=1e7), "purchase.lines[0].quantity", RowReason.OUT_OF_RANGE),
    "a negative price": (purchase(price_micros=-1), "purchase.lines[0].price_micros", RowReason.OUT_OF_RANGE),
    "an absurd price": (
        purchase(price_micros=2**62),
        "purchase.lines[0].price_micros",
        RowReason.OUT_OF_RANGE,
    ),
    "an empty order": (event(purchase=event_pb2.Purchase()), "purchase.lines", RowReason.REQUIRED),
    "an endless order": (
        event(purchase=event_pb2.Purchase(lines=[event_pb2.OrderLine(item_id="a")] * 501)),
        "purchase.lines",
        RowReason.TOO_LONG,
    ),
    "a price without a currency": (
        event(add_to_cart=event_pb2.AddToCart(item_id="a", price_micros=1)),
        "add_to_cart.currency_code",
        RowReason.REQUIRED,
    ),
    "a currency without a price": (
        event(add_to_cart=event_pb2.AddToCart(item_id="a", currency_code="EUR")),
        "add_to_cart.currency_code",
        RowReason.FORBIDDEN,
    ),
    "a currency that is none": (
        event(add_to_cart=event_pb2.AddToCart(item_id="a", price_micros=1, currency_code="€")),
        "add_to_cart.currency_code",
        RowReason.MALFORMED,
    ),
    "too many stars": (
        event(rating=event_pb2.Rating(item_id="a", stars=5.5)),
        "rating.stars",
        RowReason.OUT_OF_RANGE,
    ),
    "no stars": (event(rating=event_pb2.Rating(item_id="a")), "rating.stars", RowReason.REQUIRED),
    "an empty review": (event(review=event_pb2.Review(item_id="a")), "review.text", RowReason.REQUIRED),
    "an endless review": (
        event(review=event_pb2.Review(item_id="a", text="x" * 20_001)),
        "review.text",
        RowReason.TOO_LONG,
    ),
    "an empty search": (event(search=event_pb2.Search()), "search.query", RowReason.REQUIRED),
    "a NaN dwell": (
        item_view(item_view=event_pb2.ItemView(item_id="a", dwell_seconds=math.nan)),
        "item_view.dwell_seconds",
        RowReason.NOT_FINITE,
    ),
    "an item missing among impressions": (
        event(
            page_view=event_pb2.PageView(
                impressions=[event_pb2.Impression(item_id="a"), event_pb2.Impression()]
            )
        ),
        "page_view.impressions[1].item_id",
        RowReason.REQUIRED,
    ),
    "a negative position": (
        event(recommendation_click=event_pb2.RecommendationClick(item_id="a", position=-1)),
        "recommendation_click.position",
        RowReason.OUT_OF_RANGE,
    ),
    "no campaign": (event(ad_click=event_pb2.AdClick()), "ad_click.campaign_id", RowReason.REQUIRED),
    "no verdict": (
        event(support_verdict=event_pb2.SupportVerdict(answer_id="a")),
        "support_verdict.helpful",
        RowReason.REQUIRED,
    ),
    "an empty survey": (event(survey=event_pb2.Survey(comment="x")), "survey.csat", RowReason.REQUIRED),
    "CSAT beyond five": (event(survey=event_pb2.Survey(csat=6)), "survey.csat", RowReason.OUT_OF_RANGE),
    "NPS beyond ten": (event(survey=event_pb2.Survey(nps=11)), "survey.nps", RowReason.OUT_OF_RANGE),
    "an unknown device": (item_view(device=77), "device", RowReason.OUT_OF_RANGE),
    "an unknown channel": (item_view(channel=-1), "channel", RowReason.OUT_OF_RANGE),
    "an endless session": (item_view(session_id="x" * 129), "session_id", RowReason.TOO_LONG),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_bad_row_is_named_and_its_neighbours_go_on(reader: EventReader, name: str) -> None:
    bad, path, reason = HOSTILE[name]
    batch = reader.read([item_view(), bad, item_view()])
    problem = batch.problems[1]
    assert (problem.field, problem.reason) == (f"events[1].{path}", reason)
    assert problem.message
    assert list(batch.row_numbers) == [0, 2]
    assert len(batch.columns) == 2


def test_a_detail_of_a_newer_contract_is_an_unknown_kind(reader: EventReader) -> None:
    newer = event_pb2.Event.FromString(
        event_pb2.Event(event_id=uuid7(), user_id="ada").SerializeToString() + b"\xfa\x02\x02\x08\x01"
    )
    assert reader.read([newer]).problems[0].reason is RowReason.UNKNOWN_KIND


def test_sparse_values_of_a_rejected_row_do_not_leak_into_the_next(reader: EventReader) -> None:
    bad = event(review=event_pb2.Review(item_id="a", text="secret", stars=9))
    batch = reader.read([bad, item_view()])
    assert batch.columns.sparse == {}


def test_two_spellings_of_one_text_are_one_person_and_one_item(reader: EventReader) -> None:
    batch = reader.read(
        [
            item_view(user_id="Zo\u00eb", item_id="caf\u00e9"),
            item_view(user_id="Zoe\u0308", item_id="cafe\u0301"),
        ]
    )
    assert len(set(batch.columns.column("user_key").tolist())) == 1
    assert list(batch.columns.column("item_id")) == ["caf\u00e9", "caf\u00e9"]


@pytest.mark.parametrize(
    ("offset_ms", "reason"),
    [
        (299_000, None),
        (301_000, RowReason.CLOCK_AHEAD),
        (-86_400_000 * 365 * 60, RowReason.CLOCK_BEHIND),
    ],
)
def test_a_clock_that_is_wrong_quarantines_the_event(
    reader: EventReader, offset_ms: int, reason: RowReason | None
) -> None:
    now = now_ms()
    occurred_at = Timestamp()
    occurred_at.FromMilliseconds(now + offset_ms)
    batch = reader.read([item_view(occurred_at=occurred_at)], now_us=now * 1000)
    assert [remark.reason for remark in batch.remarks.values()] == ([reason] if reason else [])
    assert len(batch.columns) == 1


@pytest.mark.parametrize(("count", "reason"), [(0, "INVALID_ARGUMENT"), (1001, "BATCH_TOO_LARGE")])
def test_a_batch_has_a_size(reader: EventReader, count: int, reason: str) -> None:
    with pytest.raises(InvalidInput) as failure:
        reader.read([item_view()] * count)
    assert failure.value.reason == reason


def test_the_raw_id_is_in_no_column(reader: EventReader) -> None:
    columns = reader.read([item_view(user_id="ada.lovelace", session_id="visit-77")]).columns
    assert "ada.lovelace" not in repr(columns)
    assert "visit-77" not in repr(columns)


def test_kinds_as_numbers_are_those_of_the_contract() -> None:
    from shopkeeper.feedback.v1 import event_kind_pb2

    contract = {name.removeprefix("EVENT_KIND_"): number for name, number in event_kind_pb2.EventKind.items()}
    del contract["UNSPECIFIED"]
    assert {kind.name: int(kind) for kind in EventKind} == contract
    fields = event_pb2.Event.DESCRIPTOR.oneofs_by_name["detail"].fields
    assert sorted(field.number - 9 for field in fields) == sorted(contract.values())
