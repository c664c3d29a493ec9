"""Events read by columns from the wire are those that are read message by message, whatever was sent."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shopkeeper.feedback.v1 import event_pb2, feedback_service_pb2

from services.feedback.converters import wire_events
from services.feedback.converters.events import LEAST_FOR_COLUMNS, EventReader
from services.feedback.converters.identities import Door
from services.feedback.domain.events import ReadBatch
from shared.errors import InvalidInput
from shared.tokens import TokenSigner
from tests.feedback.conftest import item_view, now_ms, uuid7
from tests.feedback.test_rows_are_judged_alone import HOSTILE

NOW_US = now_ms() * 1_000
PADDING = [item_view(f"shopper-{number}") for number in range(LEAST_FOR_COLUMNS)]


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> EventReader:
    from shared.keys import ensure_development_keys

    keys = tmp_path_factory.mktemp("keys")
    ensure_development_keys(keys)
    return EventReader(Door.from_directory(keys), TokenSigner.from_directory(keys))


def contents(batch: ReadBatch) -> Any:
    # Plain events come first, so rows are put in order. repr: a NaN would differ from itself, and 1 would equal 1.0.
    order = sorted(range(len(batch.row_numbers)), key=batch.row_numbers.__getitem__)
    columns = batch.columns.taken(np.array(order, dtype=np.int64))
    dense = [(column.dtype, column.tolist()) for column in columns.dense]
    sparse = [(name, sorted(values.items())) for name, values in sorted(columns.sparse.items())]
    numbers = [batch.row_numbers[row] for row in order]
    return repr((dense, sparse, numbers, batch.size)), (batch.problems, batch.remarks)


def assert_read_alike(reader: EventReader, request: bytes) -> None:
    """Holds the columns to those of the naive twin, or both to a refusal."""
    try:
        events = feedback_service_pb2.RecordEventsRequest.FromString(request).events
        expected = reader.read(events, NOW_US)
    except (DecodeError, InvalidInput):
        with pytest.raises(InvalidInput):
            reader.read_request(request, NOW_US)
        return
    assert contents(reader.read_request(request, NOW_US)) == contents(expected)


def request_of(*events: event_pb2.Event) -> bytes:
    return feedback_service_pb2.RecordEventsRequest(events=[*PADDING, *events]).SerializeToString()


texts = st.sampled_from(
    ["", "a", "lamp", "x" * 127, "x" * 128, "x" * 257, "é", "a\x00", "a\n", " ", "~", "\x7f"]
)
numbers = st.sampled_from([0.0, -0.0, 1.0, 3.5, 5.0, 5.5, 1e6, 1.1e6, 86_400.0, 9e4, 1e-45, -1.0, *map(float, ("nan", "inf"))])  # fmt: skip
prices = st.sampled_from([None, 0, 1, 127, 128, 9_990_000, 10**15, 10**15 + 1, -1, 2**62])
currencies = st.sampled_from(["", "EUR", "eur", "EURO", "E", "É"])
times = st.sampled_from(
    [None, *(Timestamp(seconds=seconds, nanos=nanos)
             for seconds in (0, 1, 946_684_800, NOW_US // 10**6, NOW_US // 10**6 + 301, 2**35, -1, 253_402_300_800)
             for nanos in (0, 1, 999, 123_456_789, 10**9, -1))]
)  # fmt: skip
event_ids = st.one_of(
    st.sampled_from(["", "42", "x" * 129, uuid7().upper(), uuid7(2**48 - 1), uuid7(0), uuid7()[:-1] + "g"]),
    st.builds(uuid7, st.sampled_from([None, NOW_US // 1_000 + 400_000])),
)
bits = st.sampled_from([None, False, True])
consents = st.one_of(
    st.none(), st.builds(event_pb2.EventConsent, personalisation=bits, training=bits, marketing=bits)
)
priced = {"item_id": texts, "price_micros": prices, "currency_code": currencies}
details = st.one_of(
    st.builds(dict, item_view=st.builds(event_pb2.ItemView, dwell_seconds=numbers, **priced)),
    st.builds(dict, add_to_cart=st.builds(event_pb2.AddToCart, quantity=numbers, **priced)),
    st.builds(dict, remove_from_cart=st.builds(event_pb2.RemoveFromCart, item_id=texts, quantity=numbers)),
    st.builds(dict, rating=st.builds(event_pb2.Rating, item_id=texts, stars=numbers)),
    st.builds(dict, wish_list=st.builds(event_pb2.WishList, item_id=texts)),
    st.builds(dict, review=st.builds(event_pb2.Review, item_id=texts, text=texts)),
    st.builds(dict, search=st.builds(event_pb2.Search, query=texts)),
    st.just({}),
)
events = st.builds(
    lambda detail, **fields: event_pb2.Event(**fields, **detail),
    details,
    event_id=event_ids,
    user_id=texts,
    occurred_at=times,
    session_id=texts,
    device=st.sampled_from([0, 2, 6, 7, 200, -1]),
    channel=st.sampled_from([0, 1, 8, 9, -1]),
    attribution_token=st.sampled_from(["", "", "", "forged"]),
    consent=consents,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(events, min_size=1, max_size=12))
def test_any_events_are_read_as_the_naive_twin_reads_them(
    reader: EventReader, sent: list[event_pb2.Event]
) -> None:
    assert_read_alike(reader, request_of(*sent))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_bytes_that_were_tampered_with_are_read_as_the_naive_twin_reads_them(
    reader: EventReader, data: st.DataObject
) -> None:
    kinds = st.builds(
        lambda detail: event_pb2.Event(
            event_id=uuid7(), user_id="ada", session_id="visit", device=2, channel=1, **detail
        ),
        details,
    )
    event = bytearray(data.draw(kinds).SerializeToString())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(event)))
        event[place : place + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
    length = bytes([len(event) & 0x7F | 0x80, len(event) >> 7]) if len(event) > 127 else bytes([len(event)])
    # In the midst of others: what spills over must not reach its neighbours.
    assert_read_alike(reader, request_of() + b"\x0a" + length + bytes(event) + request_of())


def message(tag: bytes, *parts: bytes) -> bytes:
    content = b"".join(parts)
    return tag + bytes([len(content)]) + content


# Of each field what our encoder writes, and then what others might, or should not.
WIRE = {
    "seconds": (b"\x08\x80\xe2\xcf\xaa\x06", b"", b"\x08\x00", b"\x08\x81\x00", b"\x08" + b"\xff" * 9 + b"\x01"),
    "nanos": (b"\x10\x01", b"", b"\x10\x00", b"\x10\x81\x00", b"\x10\x80\x94\xeb\xdc\x03", b"\x10\x01\x1a\x01x", b"\x10\x01\x22\x01s"),
    "session": (b"\x22\x01s", b"", b"\x22\x00", b"\x22\x81\x00s", b"\x22\x01\xff"),
    "device": (b"\x28\x02", b"", b"\x28\x00", b"\x28\x82\x00", b"\x28\x07"),
    "channel": (b"\x30\x01", b"", b"\x30\x00", b"\x30\x81\x00", b"\x30\x09"),
    "flags": (b"\x08\x01\x10\x00", b"", b"\x08\x02", b"\x08\x80\x00", b"\x18\x01", b"\x20\x01", b"\x10\x01\x08\x01"),
    "tag": (b"\x62", b"\x6a", b"\x72", b"\x8a\x01", b"\x9a\x01", b"\x7a", b"\xfa\x01"),
    "item": (b"\x0a\x01a", b"", b"\x0a\x00", b"\x0a\x81\x00a", b"\x0a\x01\xff", b"\x0a\x7f", b"\x0a\x02\xc3\xa9"),
    "number": (b"\x15\x00\x00\x80\x3f", b"", b"\x15" + bytes(4), b"\x15\x00\x00\x80", b"\x10\x01", b"\x15\x00\x00\xc0\x7f"),
    "price": (b"\x18\x01", b"", b"\x18\x00", b"\x18\x81\x00", b"\x18" + b"\xff" * 9 + b"\x01"),
    "code": (b"\x22\x03EUR", b"", b"\x22\x00", b"\x22\x83\x00EUR", b"\x22\x02EU", b"\x22\x03eur"),
    "rest of the detail": (b"", b"\x2a\x01x", b"\x0a\x01b", b"\xf8\x07\x01"),
    "rest": (b"", b"\xf8\x07\x01", b"\x28\x03", b"\x72\x03\x0a\x01b", b"\x0a"),
}  # fmt: skip


def encoded(forms: dict[str, int]) -> bytes:
    """Returns the bytes of an event, each field in its form of this number, or the first."""
    field = {name: options[forms.get(name, 0) % len(options)] for name, options in WIRE.items()}
    time = message(b"\x1a", field["seconds"], field["nanos"])
    detail = [field[name] for name in ("item", "number", "price", "code", "rest of the detail")]
    return b"".join(
        (event_pb2.Event(event_id=uuid7(), user_id="ada").SerializeToString(), time, field["session"], field["device"],
         field["channel"], message(b"\x42", field["flags"]), message(field["tag"], *detail), field["rest"])
    )  # fmt: skip


def assert_encoding_is_read_alike(reader: EventReader, event: bytes) -> None:
    length = bytes([len(event)]) if len(event) < 128 else bytes([len(event) & 0x7F | 0x80, 1])
    assert_read_alike(reader, request_of() + b"\x0a" + length + event + request_of())


@pytest.mark.parametrize(
    ("name", "form"), [(name, form) for name, forms in WIRE.items() for form in range(len(forms))]
)
def test_each_encoding_of_a_field_is_read_as_the_naive_twin_reads_it(
    reader: EventReader, name: str, form: int
) -> None:
    for tag in range(len(WIRE["tag"])):
        assert_encoding_is_read_alike(reader, encoded({"tag": tag, name: form}))


def test_what_a_time_holds_besides_is_not_taken_for_the_field_that_follows(reader: EventReader) -> None:
    assert_encoding_is_read_alike(reader, encoded({"nanos": 6, "session": 1}))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(list(WIRE)), st.integers(0, 6), max_size=4))
def test_encodings_of_others_are_read_as_the_naive_twin_reads_them(
    reader: EventReader, forms: dict[str, int]
) -> None:
    assert_encoding_is_read_alike(reader, encoded(forms))


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_rows_among_plain_ones_are_judged_as_ever(reader: EventReader, name: str) -> None:
    assert_read_alike(reader, request_of(HOSTILE[name][0], item_view()))


def test_fields_in_another_order_make_the_same_digest(reader: EventReader) -> None:
    event = item_view(session_id="visit")
    swapped = event_pb2.Event(session_id="visit").SerializeToString()
    event.ClearField("session_id")
    shuffled = swapped + event.SerializeToString()
    assert_read_alike(reader, request_of() + b"\x0a" + bytes([len(shuffled)]) + shuffled)


PLAIN = {
    "view": item_view(session_id="visit", device=2, channel=1),
    "priced view": item_view(item_view=event_pb2.ItemView(item_id="a", dwell_seconds=3, price_micros=0, currency_code="EUR")),
    "cart": event_pb2.Event(event_id=uuid7(), user_id="a", add_to_cart=event_pb2.AddToCart(item_id="a", price_micros=1, currency_code="EUR")),
    "less in the cart": event_pb2.Event(event_id=uuid7(), user_id="a", remove_from_cart=event_pb2.RemoveFromCart(item_id="a", quantity=2)),
    "rating": event_pb2.Event(event_id=uuid7(), user_id="a", rating=event_pb2.Rating(item_id="a", stars=5)),
    "wish": event_pb2.Event(event_id=uuid7(), user_id="a", wish_list=event_pb2.WishList(item_id="a")),
    "time": item_view(occurred_at=Timestamp(seconds=NOW_US // 10**6, nanos=5)),
    "consent": item_view(consent=event_pb2.EventConsent(personalisation=False, marketing=True)),
}  # fmt: skip


@pytest.mark.parametrize("name", PLAIN)
def test_what_shops_send_most_is_plain(name: str) -> None:
    request = feedback_service_pb2.RecordEventsRequest(events=[PLAIN[name]] * 3).SerializeToString()
    spans = wire_events.event_spans(request)
    assert spans is not None
    assert wire_events.read_plain(request, np.array(spans[0]), np.array(spans[1])).is_plain.all()


@pytest.mark.parametrize("events_each", [1, 3, 30])
def test_requests_that_are_read_together_get_their_own_rows(reader: EventReader, events_each: int) -> None:
    bad = event_pb2.Event(event_id=uuid7(), user_id="")
    sent, requests = [], []
    for number in range(60):
        own = [item_view(f"shopper-{number}-{row}", f"item-{number}") for row in range(events_each)]
        if number % 5 == 0:
            own.insert(number % events_each, bad)
        sent.append(own)
        requests.append(feedback_service_pb2.RecordEventsRequest(events=own).SerializeToString())
    ruined = {7: b"\x0a\x02\x12\x05", 20: b"\x0a\x7f", 21: b"\x0a"}
    for number, tail in ruined.items():
        requests[number] += tail
    requests[30] = b""
    batch, refusals = reader.read_requests(requests, NOW_US)
    assert set(refusals) == {*ruined, 30}
    ends = [*batch.starts[1:], batch.size]
    for number, (start, end) in enumerate(zip(batch.starts, ends, strict=True)):
        if number in refusals:
            continue
        rows = [row for row, index in enumerate(batch.row_numbers) if start <= index < end]
        alone = ReadBatch(
            batch.columns.taken(np.array(rows, dtype=np.int64)),
            [batch.row_numbers[row] - start for row in rows],
            end - start,
            {index - start: problem for index, problem in batch.problems.items() if start <= index < end},
            {index - start: remark for index, remark in batch.remarks.items() if start <= index < end},
        )
        assert contents(alone) == contents(reader.read(sent[number], NOW_US))
        assert set(alone.problems) == ({number % events_each} if number % 5 == 0 else set())


def test_nothing_of_a_refused_request_is_stored(reader: EventReader) -> None:
    whole = feedback_service_pb2.RecordEventsRequest(events=PADDING).SerializeToString()
    batch, refusals = reader.read_requests([whole + b"\x0a\x02\x12\x05", whole], NOW_US)
    assert set(refusals) == {0}
    stored = [index for index in batch.row_numbers if index < batch.starts[1]]
    assert not stored
    assert len(batch.columns) == len(PADDING)


@pytest.mark.parametrize(("count", "reason"), [(0, "INVALID_ARGUMENT"), (1_001, "BATCH_TOO_LARGE")])
def test_a_request_has_a_size(reader: EventReader, count: int, reason: str) -> None:
    request = feedback_service_pb2.RecordEventsRequest(events=[PADDING[0]] * count).SerializeToString()
    with pytest.raises(InvalidInput) as failure:
        reader.read_request(request)
    assert failure.value.reason == reason
