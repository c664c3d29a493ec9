"""Segments: saved, versioned filters over portraits."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from shopkeeper.profile.v1 import catalog_service_pb2, segment_pb2, user_portrait_pb2
from shopkeeper.profile.v1 import profile_service_pb2 as pb

from services.profile.__main__ import Profile
from services.profile.converters.segment_language import parse_filter
from services.profile.domain.events import EMPTY_WINDOW, Vocabulary
from services.profile.domain.messages import Reading
from services.profile.domain.portrait import UNKNOWN_ITEM, Portrait
from services.profile.domain.portrait_fold import fold_portrait
from services.profile.domain.segments import Segment
from services.profile.use_cases.memberships import MEMBERSHIP_SECONDS, Memberships
from shared import grpc_status
from shared.errors import InvalidInput
from shared.event_kinds import EventKind
from shared.identity import UserKey
from tests.profile.conftest import Log, Shop, eventually, item


def reason_of(call: Callable[[], Any]) -> str:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return grpc_status.from_rpc_error(caught.value).reason


def create(shop: Shop, segment_id: str, expression: str, **fields: Any) -> segment_pb2.Segment:
    segment = segment_pb2.Segment(segment_id=segment_id, filter=expression, **fields)
    return shop.profiles.CreateSegment(pb.CreateSegmentRequest(segment=segment))


def members(shop: Shop, segment_id: str, page_size: int = 0) -> list[bytes]:
    found: list[bytes] = []
    token = ""
    while True:
        page = shop.profiles.ListUsersInSegment(
            pb.ListUsersInSegmentRequest(segment_id=segment_id, page_size=page_size, page_token=token)
        )
        found += page.user_keys
        token = page.next_page_token
        if not token:
            return found


def test_a_segment_is_created_read_changed_and_deleted_and_old_filters_stay_readable(shop: Shop) -> None:
    stub = shop.profiles
    made = create(shop, "loyal", "rfm.order_count >= 5", display_name="Loyal")
    assert (made.version, made.display_name, made.filter) == (1, "Loyal", "rfm.order_count >= 5")
    assert reason_of(lambda: create(shop, "loyal", "event_count > 0")) == "SEGMENT_ALREADY_EXISTS"

    renamed = stub.UpdateSegment(
        pb.UpdateSegmentRequest(segment=segment_pb2.Segment(segment_id="loyal", display_name="Faithful"))
    )
    assert (renamed.version, renamed.display_name) == (1, "Faithful")
    assert renamed.etag != made.etag
    stale = segment_pb2.Segment(segment_id="loyal", filter="rfm.order_count >= 6", etag=made.etag)
    assert reason_of(lambda: stub.UpdateSegment(pb.UpdateSegmentRequest(segment=stale))) == "ETAG_MISMATCH"
    stale.etag = renamed.etag
    changed = stub.UpdateSegment(
        pb.UpdateSegmentRequest(segment=stale, update_mask=FieldMask(paths=["filter"]))
    )
    assert (changed.version, changed.display_name) == (2, "Faithful")
    first = stub.GetSegment(pb.GetSegmentRequest(segment_id="loyal", version=1))
    assert first.filter == "rfm.order_count >= 5"
    assert stub.GetSegment(pb.GetSegmentRequest(segment_id="loyal")) == changed

    delete = pb.DeleteSegmentRequest(segment_id="loyal", etag=made.etag)
    assert reason_of(lambda: stub.DeleteSegment(delete)) == "ETAG_MISMATCH"
    stub.DeleteSegment(pb.DeleteSegmentRequest(segment_id="loyal"))
    assert reason_of(lambda: stub.GetSegment(pb.GetSegmentRequest(segment_id="loyal"))) == "SEGMENT_NOT_FOUND"


def test_a_repeated_creation_returns_what_the_first_made(shop: Shop) -> None:
    request = pb.CreateSegmentRequest(
        segment=segment_pb2.Segment(segment_id="one", filter="event_count > 1"), request_id="call-1"
    )
    assert shop.profiles.CreateSegment(request) == shop.profiles.CreateSegment(request)


def test_segments_are_listed_by_id_in_pages(shop: Shop) -> None:
    for name in ("c", "a", "b"):
        create(shop, name, "event_count > 0")
    first = shop.profiles.ListSegments(pb.ListSegmentsRequest(page_size=2))
    second = shop.profiles.ListSegments(pb.ListSegmentsRequest(page_size=2, page_token=first.next_page_token))
    assert [segment.segment_id for segment in first.segments] == ["a", "b"]
    assert [segment.segment_id for segment in second.segments] == ["c"]
    assert not second.next_page_token


def test_members_are_those_whose_portrait_fits_now(shop: Shop) -> None:
    result = shop.catalog.UpsertItems(
        catalog_service_pb2.UpsertItemsRequest(
            items=[item("kettle", brand="Acme"), item("cup", brand="Other")]
        )
    )
    assert all(row.status == 1 for row in result.results)
    now = datetime.now(UTC)
    users = [f"user{number}" for number in range(7)]
    for number, user in enumerate(users):
        for order in range(number):
            shop.log.record(
                user,
                EventKind.PURCHASE,
                at=now - timedelta(days=10 + order),
                lines=[("kettle" if number % 2 else "cup", 1.0, 5_000_000)],
            )
    shop.log.record("user0", EventKind.ITEM_VIEW, "cup", at=now - timedelta(days=1))
    keys = {user: shop.log.key(user) for user in users}

    def expected(*chosen: int) -> list[bytes]:
        return sorted(keys[f"user{number}"] for number in chosen)

    create(shop, "often", "rfm.order_count >= 3")
    create(shop, "acme", 'rfm.order_count >= 3 AND interests.brand:"Acme" > 0.2')
    create(
        shop, "looked", "life_cycle_stage = PROSPECT OR (rfm.order_count = 1 AND NOT rfm.recency_days > 20)"
    )
    create(shop, "unknown", "purchase_interval_days > 0 AND satisfaction >= 0")
    assert members(shop, "often") == expected(3, 4, 5, 6)
    assert members(shop, "often", page_size=1) == expected(3, 4, 5, 6)
    eventually(lambda: members(shop, "acme") == expected(3, 5), "the brand of the items")
    assert members(shop, "looked") == expected(0, 1)
    assert members(shop, "unknown") == []

    # Neither who objects to a profile nor who was erased is in any segment.
    shop.log.consent("user5", False)
    shop.log.forget("user6")
    assert members(shop, "often") == expected(3, 4)

    # A page goes on by the filter that it began with.
    page = shop.profiles.ListUsersInSegment(pb.ListUsersInSegmentRequest(segment_id="often", page_size=1))
    shop.profiles.UpdateSegment(
        pb.UpdateSegmentRequest(segment=segment_pb2.Segment(segment_id="often", filter="event_count > 9999"))
    )
    rest = shop.profiles.ListUsersInSegment(
        pb.ListUsersInSegmentRequest(segment_id="often", page_token=page.next_page_token)
    )
    assert [*page.user_keys, *rest.user_keys] == expected(3, 4)
    assert rest.segment_version == 1
    assert members(shop, "often") == []


@pytest.mark.parametrize(
    ("expression", "position", "words"),
    [
        ("", 0, "empty"),
        ("colour = RED", 0, "not a field"),
        ("rfm.order_count = FEW", 0, "cannot be compared with a text"),
        ("life_cycle_stage = GONE", 19, "no stage"),
        ("event_count > 1 AND event_count < 9 OR event_count = 3", 36, "parentheses"),
        ("event_count >", 13, "too early"),
        ("event_count > 1 %", 16, "unexpected"),
        ("event_count > 1e999", 14, "too large"),
        ("NOT " * 80 + "event_count > 1", 0, "deep"),
        ("event_count > 1" + " " * 4_000, 4_000, "longer"),
    ],
)
def test_a_filter_that_cannot_be_read_says_where_and_why(expression: str, position: int, words: str) -> None:
    with pytest.raises(InvalidInput, match=words) as caught:
        parse_filter(expression)
    assert caught.value.reason == "INVALID_FILTER"
    assert caught.value.metadata["position"] == str(position)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"segment_id": "Big Spenders", "filter": "event_count > 0"}, "INVALID_REQUEST"),
        ({"segment_id": "x", "filter": "nonsense"}, "INVALID_FILTER"),
        ({"segment_id": "x", "filter": "event_count > 0", "display_name": "n" * 201}, "INVALID_REQUEST"),
    ],
)
def test_a_malformed_segment_is_refused(shop: Shop, fields: dict[str, str], reason: str) -> None:
    assert reason_of(lambda: create(shop, **_renamed(fields))) == reason


def _renamed(fields: dict[str, str]) -> dict[str, str]:
    return {("expression" if name == "filter" else name): value for name, value in fields.items()}


def test_live_profiles_tell_the_stage_and_the_segments(
    start_profile: Callable[..., tuple[Profile, Any]], log: Log
) -> None:
    service, channel = start_profile(segment_seconds=0.05)
    shop = Shop(service, channel, log)
    create(shop, "buyers", "rfm.order_count >= 1")
    create(shop, "lookers", "rfm.order_count = 0")
    now = datetime.now(UTC)
    shop.log.record("ann", EventKind.ITEM_VIEW, "cup", at=now)

    def summary(user_id: str) -> Any:
        request = pb.GetProfileRequest(user_id=user_id, view=pb.PROFILE_VIEW_LIVE)
        return shop.profiles.GetProfile(request).live.summary

    eventually(lambda: list(summary("ann").segment_ids) == ["lookers"], "the segments to be known")
    assert summary("ann").life_cycle_stage == user_portrait_pb2.LIFE_CYCLE_STAGE_PROSPECT
    stranger = summary("nobody")
    assert (stranger.life_cycle_stage, list(stranger.segment_ids)) == (0, ["lookers"])

    # A segment that is changed holds for whoever is asked for next, though they did nothing.
    shop.profiles.UpdateSegment(
        pb.UpdateSegmentRequest(segment=segment_pb2.Segment(segment_id="buyers", filter="event_count >= 1"))
    )
    eventually(lambda: list(summary("ann").segment_ids) == ["buyers", "lookers"], "the new filter")
    shop.log.consent("ann", False)
    eventually(lambda: not summary("ann").segment_ids, "consent to be heeded")


def test_a_shopper_is_looked_at_once_a_minute_and_whenever_a_segment_changes() -> None:
    looked: list[UserKey] = []
    clock = [0.0]
    store = Stored({"buyers": "rfm.order_count >= 1"})
    items, currencies = Vocabulary(), Vocabulary()

    def portrait(reading: Reading) -> Portrait:
        looked.append(reading.user_key)
        return fold_portrait(reading.window, items, currencies, lambda _: UNKNOWN_ITEM, 0)

    memberships = Memberships(store, parse_filter, portrait, lambda _: None, 1.0, lambda: clock[0])  # type: ignore[arg-type]
    reading = Reading(UserKey(b"k" * 16), EMPTY_WINDOW, 1)
    assert memberships.of(reading) == ()
    assert not looked, "without a segment nobody is folded"
    memberships.look()
    assert [memberships.of(reading) for _ in range(3)] == [()] * 3
    assert len(looked) == 1
    clock[0] = MEMBERSHIP_SECONDS
    memberships.of(reading)
    assert len(looked) == 2
    store.filters["lookers"] = "rfm.order_count = 0"
    store.filters["odd"] = "written by a newer version"
    memberships.look()
    assert memberships.of(reading) == ("lookers",)
    assert len(looked) == 3


class Stored:
    def __init__(self, filters: dict[str, str]) -> None:
        self.filters = filters

    def page(self, after_segment_id: str, limit: int) -> list[Segment]:
        return [Segment(name, "", "", text) for name, text in sorted(self.filters.items())]
