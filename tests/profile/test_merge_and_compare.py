"""Two ids, one shopper; and two shoppers, compared."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from shopkeeper.profile.v1 import catalog_service_pb2, profile_service_pb2, user_portrait_pb2
from shopkeeper.profile.v1 import profile_service_pb2 as pb

from services.profile.domain.events import EMPTY_WINDOW, EVENT, EventBatch
from services.profile.storage.merges import PostgresMerges
from services.profile.use_cases.merged_users import MergedUsers
from shared import grpc_status
from shared.database import Database
from shared.errors import FailedPrecondition
from shared.event_kinds import EventKind
from shared.identity import UserKey
from shared.privacy import Pseudonymizer
from tests.profile.conftest import NOON, Log, Shop, eventually, item


def get(shop: Shop, user_id: str, token: str = "") -> pb.Profile:
    return shop.profiles.GetProfile(
        pb.GetProfileRequest(user_id=user_id, consistency_token=token), timeout=20.0
    )


def item_ids(profile: pb.Profile) -> list[str]:
    return [event.item_id for event in profile.live.history]


def merge(shop: Shop, anonymous: str, known: str) -> pb.MergeUsersResponse:
    return shop.profiles.MergeUsers(
        pb.MergeUsersRequest(
            anonymous=pb.UserReference(user_id=anonymous), known=pb.UserReference(user_id=known)
        ),
        timeout=20.0,
    )


def refusal(shop: Shop, anonymous: str, known: str) -> str:
    with pytest.raises(grpc.RpcError) as failure:
        merge(shop, anonymous, known)
    error = grpc_status.from_rpc_error(failure.value)
    assert isinstance(error, FailedPrecondition)
    return error.reason


def without_names(profile: pb.Profile) -> bytes:
    profile.live.user_key = b""
    profile.live.watermark = b""
    profile.portrait.rfm.recency_days.value = 0.0
    return profile.SerializeToString(deterministic=True)


def test_from_a_merge_on_both_ids_stand_for_one_shopper(shop: Shop) -> None:
    shop.log.record("cookie", item_id="tea")
    token = shop.log.record("ann", item_id="cup")
    assert item_ids(get(shop, "ann", token)) == ["cup"]
    assert item_ids(get(shop, "cookie", token)) == ["tea"]

    answer = merge(shop, "cookie", "ann")

    assert answer.user_key == shop.log.key("ann")
    assert answer.merged_event_count == 1
    for user_id in ("ann", "cookie"):
        profile = get(shop, user_id)
        assert item_ids(profile) == ["cup", "tea"]
        assert profile.user_key == shop.log.key("ann")
        assert profile.live.user_key == shop.log.key(user_id)
    # What either does from now on is the one shopper's.
    shop.log.record("cookie", item_id="spoon")
    token = shop.log.record("ann", item_id="bowl")
    assert item_ids(get(shop, "ann", token)) == item_ids(get(shop, "cookie", token)) == [
        "bowl", "spoon", "cup", "tea",
    ]  # fmt: skip


def test_repeating_a_merge_changes_nothing_and_a_second_owner_is_refused(shop: Shop) -> None:
    shop.log.record("cookie")
    assert merge(shop, "cookie", "ann") == merge(shop, "cookie", "ann")
    assert merge(shop, "ann", "cookie").user_key == shop.log.key("ann")
    assert refusal(shop, "cookie", "bob") == "USER_ALREADY_MERGED"
    # A known shopper may turn out to be another one in turn, with everything that they had been.
    merge(shop, "ann", "anna")
    token = shop.log.record("cookie", item_id="tea")
    assert item_ids(get(shop, "anna", token))[0] == "tea"


def test_a_merged_shopper_is_folded_as_if_one_id_had_done_everything(shop: Shop) -> None:
    kinds = itertools.cycle([EventKind.ITEM_VIEW, EventKind.PURCHASE, EventKind.RATING])
    for number in range(60):
        kind, at = next(kinds), NOON + timedelta(minutes=7 * number)
        for user_id in ("whole", "first half" if number % 2 else "second half"):
            lines = [(f"item-{number % 9}", 1.0, 5_000_000)] if kind == EventKind.PURCHASE else None
            value = 4.0 if kind == EventKind.RATING else None
            shop.log.record(user_id, kind, f"item-{number % 9}", at=at, lines=lines, value=value)
    merge(shop, "first half", "second half")

    whole, halves = get(shop, "whole"), get(shop, "second half")
    whole.user_key = halves.user_key
    # Event keys are the client's: the two copies of an event have two.
    for profile in (whole, halves):
        for event in profile.live.history:
            event.event_key = b""
    assert without_names(whole) == without_names(halves)


def test_replicas_learn_of_a_merge_and_watchers_hear_of_every_name(
    shop: Shop, start_profile: Callable[..., Any]
) -> None:
    other, channel = start_profile()
    eventually(lambda: other.readiness()[0], "readiness")
    replica = Shop(other, channel, shop.log)
    shop.log.record("cookie", item_id="tea")
    assert eventually(lambda: item_ids(get(replica, "cookie"))) == ["tea"]
    stream = replica.profiles.WatchProfiles(pb.WatchProfilesRequest())
    assert next(stream).reset

    merge(shop, "cookie", "ann")

    told: dict[bytes, list[str]] = {}
    for message in stream:
        told |= {live.user_key: [e.item_id for e in live.history] for live in message.changed}
        if len(told) == 2:
            break
    assert told == {shop.log.key("cookie"): ["tea"], shop.log.key("ann"): ["tea"]}
    assert item_ids(get(replica, "ann")) == ["tea"]
    # One that starts afterwards knows it too.
    late, channel = start_profile()
    eventually(lambda: late.readiness()[0], "readiness")
    assert item_ids(get(Shop(late, channel, shop.log), "ann")) == ["tea"]


def test_erasing_the_shopper_takes_the_visitor_along(shop: Shop, start_profile: Callable[..., Any]) -> None:
    shop.log.record("cookie", item_id="tea")
    shop.log.record("ann", item_id="cup")
    merge(shop, "cookie", "ann")
    assert item_ids(get(shop, "cookie")) == ["cup", "tea"]

    shop.log.forget("ann", delete_rows=False)

    for user_id in ("ann", "cookie"):
        eventually(lambda user_id=user_id: not item_ids(get(shop, user_id)), "erasure")
    # No table says whose the visitor was, and a replica that starts later shows nothing either.
    shop.service.churn.tick()
    rows = shop.log.connection.execute("SELECT user_key FROM profile.merged_users").fetchall()
    assert rows == [(None,)]
    late, channel = start_profile()
    eventually(lambda: late.readiness()[0], "readiness")
    assert item_ids(get(Shop(late, channel, shop.log), "cookie")) == []
    assert refusal(shop, "cookie", "bob") == refusal(shop, "bob", "ann") == "USER_FORGOTTEN"


def test_erasing_the_visitor_leaves_the_shopper_their_own_events(shop: Shop) -> None:
    shop.log.record("cookie", item_id="tea")
    shop.log.record("ann", item_id="cup")
    merge(shop, "cookie", "ann")
    assert item_ids(get(shop, "ann")) == ["cup", "tea"]

    shop.log.forget("cookie", delete_rows=False)

    eventually(lambda: item_ids(get(shop, "ann")) == ["cup"], "the visitor's erasure")
    assert item_ids(get(shop, "cookie")) == []


def test_a_merge_outlives_a_rotation_of_the_user_keys(
    log: Log, database_url: str, start_profile: Callable[..., Any]
) -> None:
    old = Pseudonymizer({1: b"1" * 32})
    new = Pseudonymizer({1: b"1" * 32, 2: b"2" * 32})
    database = Database(database_url, schema="profile", pool_size=2)
    try:
        PostgresMerges(database, old.current_version).merge(old.user_key("cookie"), old.user_key("ann"))
        merges = PostgresMerges(database, new.current_version)
        assert merges.bring_forward(new.rotated) == 1
        assert merges.bring_forward(new.rotated) == 1
    finally:
        database.close()
    rows = log.connection.execute(
        "SELECT anonymous_key, user_key FROM profile.merged_users WHERE key_version = 2"
    ).fetchall()
    assert rows == [(new.user_key("cookie"), new.user_key("ann"))]


def test_names_in_memory_follow_a_naive_model() -> None:
    rng = np.random.default_rng(5)
    keys = [UserKey(bytes([n]) * 16) for n in range(12)]
    for _ in range(200):
        merged, root_of, dead = MergedUsers(), {key: key for key in keys}, set[UserKey]()
        for _ in range(15):
            one, other = rng.choice(12, 2, replace=False)
            one, other = keys[one], keys[other]
            if rng.random() < 0.2:
                dead |= {one} | {key for key in keys if root_of[key] == one}
                merged.erase([one])
                for key in dead:
                    root_of[key] = key
            elif root_of[one] == one and one not in dead and other not in dead and root_of[other] != one:
                root = root_of[other]
                moved = [key for key in keys if root_of[key] == one]
                root_of |= dict.fromkeys(moved, root)
                merged.apply([(key, root) for key in moved])
            assert [merged.of(key) for key in keys] == [root_of[key] for key in keys]
            for key in keys:
                expected = {k for k in keys if root_of[k] == root_of[key]}
                assert set(merged.names([key])) == expected


def test_a_batch_is_told_under_the_name_that_stands_for_the_shopper() -> None:
    merged = MergedUsers()
    one, other = UserKey(b"1" * 16), UserKey(b"2" * 16)
    batch = EventBatch([one, other], [0, 1, 2], np.zeros(2, EVENT))
    assert merged.join(batch) is batch
    merged.apply([(one, other)])
    assert merged.join(batch).user_keys == [other, other]
    assert not len(EMPTY_WINDOW.events_W)


def compare(shop: Shop, first: str, second: str) -> pb.CompareProfilesResponse:
    return shop.profiles.CompareProfiles(
        pb.CompareProfilesRequest(
            first=pb.UserReference(user_id=first), second=pb.UserReference(user_id=second)
        ),
        timeout=20.0,
    )


def test_two_shoppers_are_as_alike_as_worked_by_hand(shop: Shop) -> None:
    shop.catalog.UpsertItems(
        catalog_service_pb2.UpsertItemsRequest(
            items=[
                item("tea", category_path=["Drinks"], brand="Leaf"),
                item("cup", category_path=["Kitchen"], brand="Clay"),
            ]
        )
    )
    at = NOON
    shop.log.record("ann", item_id="tea", at=at)
    shop.log.record("bob", item_id="tea", at=at)
    shop.log.record("bob", item_id="cup", at=at)
    token = shop.log.record("cid", item_id="spoon", at=at)
    eventually(lambda: len(get(shop, "ann", token).portrait.interests) == 4, "the catalogue")

    alike = compare(shop, "ann", "bob")

    # ann: Drinks 1, Leaf 1; bob: Drinks and Kitchen, Leaf and Clay, one half each.
    assert alike.interest_similarity.value == pytest.approx(1.0 / (math.sqrt(2) * 1.0))
    assert alike.item_overlap.value == 0.5
    assert alike.interest_similarity.evidence_count == alike.item_overlap.evidence_count == 1
    assert (alike.embedding_similarity.value, alike.embedding_similarity.evidence_count) == (0.0, 0)
    assert {(s.first.value, s.first.weight, s.second.weight) for s in alike.shared_interests} == {
        ("Drinks", 1.0, 0.5), ("Leaf", 1.0, 0.5),
    }  # fmt: skip
    mirrored = compare(shop, "bob", "ann")
    assert mirrored.interest_similarity == alike.interest_similarity
    assert [(s.second, s.first) for s in mirrored.shared_interests] == [
        (s.first, s.second) for s in alike.shared_interests
    ]
    assert compare(shop, "ann", "ann").interest_similarity.value == 1.0
    assert compare(shop, "ann", "cid").item_overlap.value == 0.0


def test_nobody_is_alike_to_who_is_not_known_or_does_not_consent(shop: Shop) -> None:
    shop.log.record("ann", item_id="tea")
    shop.log.record("bob", item_id="tea")
    shop.log.consent("bob", False)
    eventually(lambda: not get(shop, "bob").live.personalisation, "consent")

    for other in ("nobody", "bob"):
        compared = compare(shop, "ann", other)
        assert compared == profile_service_pb2.CompareProfilesResponse(
            embedding_similarity=user_portrait_pb2.Estimate(),
            interest_similarity=user_portrait_pb2.Estimate(),
            item_overlap=user_portrait_pb2.Estimate(),
        )


def test_both_ids_of_a_pair_are_judged(shop: Shop, tmp_path: Path) -> None:
    with pytest.raises(grpc.RpcError) as failure:
        shop.profiles.MergeUsers(
            pb.MergeUsersRequest(anonymous=pb.UserReference(), known=pb.UserReference(user_key=b"short"))
        )
    error = grpc_status.from_rpc_error(failure.value)
    assert [v.field for v in error.violations] == ["anonymous.user", "known.user_key"]
    with pytest.raises(grpc.RpcError) as failure:
        merge(shop, "ann", "ann")
    assert failure.value.code() == grpc.StatusCode.INVALID_ARGUMENT
