"""Rotation of the user key through feedback and profile, killed half way: nobody is lost, shown twice, or heard less."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psycopg
import pytest
from shopkeeper.feedback.v1 import consent_pb2, event_pb2, feedback_service_pb2
from shopkeeper.profile.v1 import live_profile_pb2, profile_service_pb2, rebuild_pb2

from shared.privacy import Pseudonymizer
from tests.integration.suite import Suite, eventually, view

pytestmark = pytest.mark.slow

SHOPPERS, VIEWS_EACH = 60, 40
# Rows come in pages of a thousand: of the 2,400 a kill in the second page's wait leaves some under either key.
ROWS_PER_SECOND = 300


@pytest.fixture
def keys(keys_dir: Path, tmp_path: Path) -> Path:
    """Keys of this test's own: it adds one."""
    return Path(shutil.copytree(keys_dir, tmp_path / "rotated-keys"))


@pytest.fixture
def shop(database_url: str, keys: Path, tmp_path: Path) -> Iterator[Suite]:
    suite = Suite(tmp_path, database_url, keys)
    try:
        suite.start("feedback", "profile")
        yield suite
    finally:
        suite.stop()


def profile_of(shop: Suite, user_id: str, token: str = "") -> profile_service_pb2.Profile:
    request = profile_service_pb2.GetProfileRequest(user_id=user_id, consistency_token=token)
    return shop.profile.GetProfile(request, timeout=20)


def seen(profile: profile_service_pb2.Profile) -> tuple[list[live_profile_pb2.HistoryEvent], int, bytes]:
    """Returns what must outlive a rotation: the history, the count of events, the satisfaction."""
    portrait = profile.portrait
    return list(profile.live.history), portrait.event_count, portrait.satisfaction.SerializeToString()


def allow_personalisation(shop: Suite, user_id: str, allowed: bool) -> None:
    request = feedback_service_pb2.SetConsentRequest(
        user_id=user_id, consent=consent_pb2.Consent(personalisation=allowed)
    )
    shop.feedback.SetConsent(request, timeout=20)


def count(shop: Suite, query: str, *parameters: object) -> int:
    with psycopg.connect(shop.database_url) as connection:
        row = connection.execute(query, parameters or None).fetchone()
    assert row is not None
    return int(row[0])


def tables_that_hold(shop: Suite, user_keys: list[bytes]) -> set[str]:
    """Returns the tables in which one of the keys occurs, apart from those that say that a key, or a person, is gone."""
    found = set()
    with psycopg.connect(shop.database_url) as connection:
        tables = connection.execute(
            "SELECT table_schema, table_name FROM information_schema.tables WHERE table_type = 'BASE TABLE' "
            "AND table_schema IN ('feedback', 'profile') AND table_name NOT IN ('tombstones', 'erasure_receipts', 'retired_keys')"
        ).fetchall()
        for schema, table in tables:
            rows = connection.execute(f"SELECT t::text FROM {schema}.{table} AS t").fetchall()
            text = "\n".join(row for (row,) in rows)
            if any(key.hex() in text for key in user_keys):
                found.add(f"{schema}.{table}")
    return found


def test_a_rotation_that_is_killed_half_way_changes_nothing_that_a_shopper_sees(
    shop: Suite, keys: Path
) -> None:
    shoppers = [f"shopper {number}" for number in range(SHOPPERS)]
    ann, bob, dan, cookie = shoppers[0], shoppers[1], "dan", "cookie"
    events = [
        view(shopper, f"item-{(number * 7 + step) % 50}", seconds_ago=60.0 * (VIEWS_EACH - step))
        for number, shopper in enumerate(shoppers)
        for step in range(VIEWS_EACH)
    ]
    review = view(ann, "", seconds_ago=30)
    review.review.item_id, review.review.text = "item-1", "old words"
    events += [review, view(cookie, "item-of-cookie", seconds_ago=20), view(dan, "item-of-dan")]
    for begin in range(0, len(events), 500):
        answer = shop.record(events[begin : begin + 500])
        assert {result.status for result in answer.results} == {event_pb2.EVENT_STATUS_STORED}
    shop.profile.MergeUsers(
        profile_service_pb2.MergeUsersRequest(
            anonymous=profile_service_pb2.UserReference(user_id=cookie),
            known=profile_service_pb2.UserReference(user_id=ann),
        ),
        timeout=20,
    )
    shop.feedback.ForgetUser(feedback_service_pb2.ForgetUserRequest(user_id=dan), timeout=20)
    begun = shop.profile.RebuildProfiles(profile_service_pb2.RebuildProfilesRequest(), timeout=20)
    watched = profile_service_pb2.WatchRebuildRequest(rebuild_id=begun.rebuild_id)
    *_, last = shop.profile.WatchRebuild(watched, timeout=60)
    assert last.state == rebuild_pb2.REBUILD_STATE_SUCCEEDED
    allow_personalisation(shop, bob, False)
    eventually("bob is heard", lambda: not profile_of(shop, bob).live.personalisation)
    before = {shopper: seen(profile_of(shop, shopper)) for shopper in shoppers}
    assert before[ann][1] == VIEWS_EACH + 2
    pseudonymizer = Pseudonymizer.from_directory(keys)
    old_keys = [bytes(pseudonymizer.user_key(user)) for user in (*shoppers, dan, cookie)]
    assert tables_that_hold(shop, old_keys) >= {"profile.portraits", "profile.merged_users"}

    # As the runbook says: the key beside the others, the services restarted together, then the call.
    (keys / "user_key.2.hex").write_text("2b" * 32)
    for name in ("feedback", "profile"):
        shop.kill(name)
    shop.start("feedback", "profile")
    assert not profile_of(shop, bob).live.personalisation
    rotation = shop.feedback.RotateUserKeys(
        feedback_service_pb2.RotateUserKeysRequest(max_rows_per_second=ROWS_PER_SECOND), timeout=20
    )
    at = feedback_service_pb2.GetKeyRotationRequest(key_rotation_id=rotation.key_rotation_id)
    eventually("a page", lambda: shop.feedback.GetKeyRotation(at, timeout=5).rewritten_row_count, 60)
    shop.kill("feedback")
    under = "SELECT count(*) FROM feedback.events WHERE key_version = %s"
    assert count(shop, under, 1)
    assert count(shop, under, 2)
    # In memory from now on, some as strangers.
    for shopper in shoppers:
        profile_of(shop, shopper)
    shop.start("feedback")
    eventually(
        "the rotation ends", lambda: shop.feedback.GetKeyRotation(at, timeout=5).HasField("end_time"), 90
    )
    ended = shop.feedback.GetKeyRotation(at, timeout=5)
    assert (ended.target_key_version, ended.remaining_row_count) == (2, 0)
    assert ended.state == consent_pb2.KEY_ROTATION_STATE_SUCCEEDED
    assert count(shop, under, 1) == 0

    def is_as_before(shopper: str) -> bool:
        return seen(profile_of(shop, shopper)) == before[shopper]

    # Everybody is who they were, and nowhere under the old key.
    for shopper in shoppers:
        eventually(f"{shopper} is back", partial(is_as_before, shopper))
    eventually("the old keys are gone", lambda: not tables_that_hold(shop, old_keys), 60)
    assert shop.record([events[0]]).results[0].status == event_pb2.EVENT_STATUS_DUPLICATE
    dead = shop.record([view(dan, "item-of-dan")]).results[0]
    assert dead.reason == event_pb2.EVENT_REASON_USER_FORGOTTEN
    token = shop.record([view(ann, "item-new")]).consistency_token
    after = profile_of(shop, ann, token)
    assert after.live.history[0].item_id == "item-new"
    assert after.portrait.event_count == VIEWS_EACH + 3

    # Consent, to and fro.
    assert not profile_of(shop, bob).live.personalisation
    allow_personalisation(shop, bob, True)
    eventually("bob is heard", lambda: len(profile_of(shop, bob).live.history) == VIEWS_EACH)
    allow_personalisation(shop, ann, False)
    eventually("ann is heard", lambda: not profile_of(shop, ann).live.history)

    # The end of ann, whose texts were written under the old key.
    export = shop.feedback.ExportUser(feedback_service_pb2.ExportUserRequest(user_id=ann), timeout=20)
    assert "old words" in "".join(line for part in export for line in part.json_lines)
    receipt = shop.feedback.ForgetUser(feedback_service_pb2.ForgetUserRequest(user_id=ann), timeout=20)
    erased = {row.table: row.row_count for row in receipt.erased_rows}
    assert (erased["events"], erased["consents"], erased["data_keys"]) == (VIEWS_EACH + 2, 1, 1)
    new_key = bytes(Pseudonymizer.from_directory(keys).user_key(ann))
    eventually("profile forgets", lambda: not profile_of(shop, ann).portrait.event_count)
    eventually("ann is nowhere", lambda: not tables_that_hold(shop, [new_key]), 60)
    refused = shop.record([view(ann, "item-1")]).results[0]
    assert refused.reason == event_pb2.EVENT_REASON_USER_FORGOTTEN
