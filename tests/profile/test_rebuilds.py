"""The whole log folded anew: the same portraits, in force at once or not at all."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest
from shopkeeper.profile.v1 import profile_service_pb2 as pb
from shopkeeper.profile.v1 import rebuild_pb2

from services.profile.domain.events import EMPTY_WINDOW, EVENT, NO_ITEM, EventWindow, Vocabulary
from services.profile.domain.rebuilds import FoldedShopper
from shared import grpc_status
from shared.errors import NotFound
from shared.event_kinds import EventKind
from shared.identity import UserKey
from tests.profile.conftest import Log, Shop, eventually

State = rebuild_pb2.RebuildState
USERS = [f"user-{number}" for number in range(12)]


def rebuild(shop: Shop) -> rebuild_pb2.Rebuild:
    """Runs a rebuild and returns its last state."""
    started = shop.profiles.RebuildProfiles(pb.RebuildProfilesRequest(), timeout=20)
    assert not started.watermark
    request = pb.WatchRebuildRequest(rebuild_id=started.rebuild_id)
    return list(shop.profiles.WatchRebuild(request, timeout=20))[-1]


def fill(log: Log) -> str:
    """Gives every user a few events; returns the token of the last."""
    token = ""
    for number, user in enumerate(USERS):
        for visit in range(3 + number % 3):
            log.record(user, item_id=f"item-{number + visit}")
        token = log.record(user, EventKind.PURCHASE, lines=[(f"item-{number}", 1, 5_000_000), ("tea", 2, 1)])
    return token


def profile(shop: Shop, user_id: str, token: str = "") -> pb.Profile:
    # Replicas look at all shoppers at times of their own.
    shop.service.population.look()
    found = shop.profiles.GetProfile(
        pb.GetProfileRequest(user_id=user_id, consistency_token=token), timeout=20
    )
    found.live.watermark = b""
    found.portrait.rfm.recency_days.value = 0.0
    return found


def another(log: Log, start_profile: Callable[..., Any]) -> Shop:
    service, channel = start_profile()
    eventually(lambda: service.readiness()[0], "readiness")
    return Shop(service, channel, log)


def hot(shop: Shop) -> int:
    return len(shop.service.histories)


def test_a_replica_starts_from_the_rebuild_and_equals_one_that_read_the_log(
    shop: Shop, start_profile: Callable[..., Any]
) -> None:
    token = fill(shop.log)
    expected = {user: profile(shop, user, token) for user in USERS}

    ended = rebuild(shop)

    lines = sum(len(expected[user].live.history) for user in USERS)
    assert ended.state == State.REBUILD_STATE_SUCCEEDED, ended
    assert (ended.folded_event_count, ended.total_event_count) == (lines, lines)
    assert ended.portrait_count == len(USERS)
    assert ended.watermark
    # What comes after it is read from the log.
    shop.log.record("user-3", item_id="afterwards")
    token = shop.log.record("newcomer", item_id="first")
    fresh = another(shop.log, start_profile)
    assert hot(fresh) == len(USERS)
    for user in USERS:
        assert profile(fresh, user, token) == profile(shop, user, token)
    assert profile(fresh, "user-3").live.history[0].item_id == "afterwards"
    assert hot(fresh) == len(USERS)
    assert profile(fresh, "newcomer") == profile(shop, "newcomer")


def test_a_rebuild_that_is_killed_leaves_the_earlier_one_in_force(
    shop: Shop, database_url: str, start_profile: Callable[..., Any]
) -> None:
    fill(shop.log)
    first = rebuild(shop)
    for user in USERS:
        shop.log.record(user, item_id="later")
    shop.service.drain()
    shop.service.close()
    # A process of its own, which the kernel ends in the middle of its third write.
    code = f"""
import os, signal, threading
from services.profile.domain.events import Vocabulary
from services.profile.storage.log import PostgresEventLog
from services.profile.storage.rebuilds import PostgresRebuilds
from services.profile.storage.segments import PostgresSegments
from services.profile.use_cases import rebuilds
from services.profile.use_cases.merged_users import MergedUsers
from shared.database import Database
rebuilds.SHOPPERS_AT_ONCE = 2
database = Database({database_url!r}, schema="profile", pool_size=3)
class Dying(PostgresRebuilds):
    writes = 0
    def write(self, *arguments):
        self.writes += 1
        if self.writes == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().write(*arguments)
items, currencies = Vocabulary(), Vocabulary()
store = Dying(database, PostgresSegments(database).users_after)
store.create("second", 1)
log = PostgresEventLog(database, items, currencies)
rebuilds.RunRebuilds(store, log, MergedUsers(), items, currencies, lambda: 1, threading.Event()).run_next()
"""
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, timeout=60)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    query = "SELECT state, folded_events, watermark FROM profile.rebuilds WHERE request_id = 'second'"
    row = shop.log.connection.execute(query).fetchone()
    assert row is not None
    assert row[0] == State.REBUILD_STATE_RUNNING
    assert 0 < row[1] < first.total_event_count
    assert row[2] == b""

    # Whoever starts now starts from the first; and as the leader it takes the second up again.
    fresh = another(shop.log, start_profile)
    assert hot(fresh) == len(USERS)
    before = [profile(fresh, user) for user in USERS]
    assert all(one.live.history[0].item_id == "later" for one in before)
    row = eventually(
        lambda: found if (found := shop.log.connection.execute(query).fetchone()) and found[0] == 3 else None,
        "the second rebuild",
    )
    assert row[1] == first.total_event_count + len(USERS)
    assert row[2] not in (b"", first.watermark)
    stored = "SELECT count(*), count(DISTINCT rebuild_id) FROM profile.portraits"
    assert shop.log.connection.execute(stored).fetchone() == (len(USERS), 1)
    latest = another(shop.log, start_profile)
    assert [profile(latest, user) for user in USERS] == before


def test_the_same_request_id_starts_one_rebuild_and_an_ended_one_cannot_be_cancelled(shop: Shop) -> None:
    fill(shop.log)
    request = pb.RebuildProfilesRequest(request_id="nightly")
    rebuild_id = shop.profiles.RebuildProfiles(request).rebuild_id
    assert shop.profiles.RebuildProfiles(request).rebuild_id == rebuild_id

    def state() -> int:
        return shop.profiles.GetRebuild(pb.GetRebuildRequest(rebuild_id=rebuild_id)).state

    eventually(lambda: state() == State.REBUILD_STATE_SUCCEEDED, "the rebuild")
    cancelled = shop.profiles.CancelRebuild(pb.CancelRebuildRequest(rebuild_id=rebuild_id))
    assert cancelled.state == State.REBUILD_STATE_SUCCEEDED


def test_a_cancelled_rebuild_has_no_effect(shop: Shop, start_profile: Callable[..., Any]) -> None:
    fill(shop.log)
    shop.service.drain()
    shop.service.close()
    # Nobody runs it: it is waiting when it is cancelled, in the name of the next replica.
    shop.log.connection.execute(
        "INSERT INTO profile.rebuilds (rebuild_id, state, created_us, cancel_requested) "
        "VALUES ('00000000-0000-0000-0000-000000000001', 2, 1, true)"
    )
    fresh = another(shop.log, start_profile)
    query = "SELECT state, watermark FROM profile.rebuilds"
    row = eventually(
        lambda: found if (found := shop.log.connection.execute(query).fetchone()) and found[0] > 2 else None
    )
    assert row == (State.REBUILD_STATE_CANCELLED, b"")
    assert shop.log.connection.execute("SELECT count(*) FROM profile.portraits").fetchone() == (0,)
    assert hot(fresh) == 0


def test_an_unknown_rebuild_is_not_found(shop: Shop) -> None:
    for rebuild_id in ("", "nonsense", "00000000-0000-0000-0000-000000000000"):
        with pytest.raises(grpc.RpcError) as failure:
            shop.profiles.GetRebuild(pb.GetRebuildRequest(rebuild_id=rebuild_id))
        assert isinstance(grpc_status.from_rpc_error(failure.value), NotFound)


def test_erasure_reaches_memory_and_tables_and_who_starts_later(
    shop: Shop, start_profile: Callable[..., Any]
) -> None:
    token = fill(shop.log)
    shop.log.consent("user-5", False)
    shop.profiles.MergeUsers(
        pb.MergeUsersRequest(
            anonymous=pb.UserReference(user_id="user-1"), known=pb.UserReference(user_id="user-2")
        ),
        timeout=20,
    )
    rebuild(shop)
    kept = profile(shop, "user-3", token)

    # Rows of the log may stay a while: what is stored here must not bring anybody back.
    for user in ("user-0", "user-1"):
        shop.log.forget(user, delete_rows=False)
    shop.service.churn.tick()

    keys = "SELECT user_key FROM profile.portraits"
    stored = {bytes(key) for (key,) in shop.log.connection.execute(keys).fetchall()}
    gone = [shop.log.key(user) for user in ("user-0", "user-1", "user-2")]
    assert not stored & set(gone)
    assert shop.log.key("user-3") in stored
    for place in (shop, another(shop.log, start_profile)):
        eventually(lambda place=place: not profile(place, "user-0").live.history, "erasure")
        eventually(lambda place=place: not profile(place, "user-1").live.history, "erasure")
        # The visitor's events have left the shopper that they became.
        assert {e.item_id for e in profile(place, "user-2").live.history} == {
            "tea", "item-2", "item-3", "item-4", "item-5", "item-6",
        }  # fmt: skip
        assert not profile(place, "user-5").live.personalisation
        assert profile(place, "user-3").live == kept.live


def test_a_stored_window_is_the_same_in_a_process_with_other_codes() -> None:
    rng = np.random.default_rng(2)
    for count in (0, 1, 7, 300):
        items, currencies = Vocabulary(), Vocabulary()
        items.encode([f"item-{n}" for n in range(50)])
        currencies.encode(["EUR", "CNY"])
        events = np.zeros(count, EVENT)
        events["key_high"] = rng.integers(0, 2**63, count)
        events["item"] = rng.integers(NO_ITEM, 50, count)
        events["currency"] = rng.integers(-1, 2, count)
        events["occurred_at_us"] = rng.integers(0, 2**50, count)
        window = EMPTY_WINDOW.merge(events) if count else EventWindow(events, consented=False)
        stored = FoldedShopper.of(UserKey(bytes(16)), window, items, currencies)
        others, coins = Vocabulary(), Vocabulary()
        others.encode([f"item-{n}" for n in range(70, -1, -3)])
        coins.encode(["USD", "CNY"])

        there = stored.window(others, coins)

        def named(one: EventWindow, items: Vocabulary, coins: Vocabulary) -> list[Any]:
            rows = zip(one.events_W["item"].tolist(), one.events_W["currency"].tolist(), strict=True)
            return [(items[i] if i >= 0 else None, coins[c] if c >= 0 else None) for i, c in rows]

        assert named(there, others, coins) == named(window, items, currencies)
        for column in ("key_high", "occurred_at_us"):
            assert np.array_equal(there.events_W[column], window.events_W[column])
        assert (there.truncated, there.consented) == (window.truncated, window.consented)
        assert stored.last_us == (int(events["occurred_at_us"].max()) if count else 0)


def test_fifths_are_those_of_everybody_who_has_bought(shop: Shop) -> None:
    for number in range(10):
        for _ in range(1 + number // 5):
            token = shop.log.record(
                f"buyer-{number}", EventKind.PURCHASE, lines=[("tea", 1, 1_000_000 * (number + 1))]
            )
    shop.log.record("buyer-9", EventKind.RETURN, lines=[("tea", 1, 19_000_000)])

    first, last = (profile(shop, f"buyer-{number}", token).portrait.rfm for number in (0, 9))

    assert (first.recency_quintile, first.frequency_quintile, first.monetary_quintile) == (1, 1, 1)
    # Ten spent 20 and sent 19 of it back: the least of all but one.
    assert (last.recency_quintile, last.frequency_quintile, last.monetary_quintile) == (5, 3, 1)
    assert profile(shop, "nobody").portrait.rfm.recency_quintile == 0
