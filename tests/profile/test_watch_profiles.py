"""The stream of live profiles: state, not differences, to any number of watchers, resumable."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from shopkeeper.profile.v1 import profile_service_pb2 as pb

from services.profile.use_cases.subscriptions import Subscription
from shared import grpc_status
from shared.errors import InvalidInput
from shared.tokens import Watermark
from tests.profile.conftest import Shop, eventually


class Watcher:
    """Reads a stream in a thread of its own and applies it, as recommend does."""

    def __init__(self, shop: Shop, **request: Any) -> None:
        self.profiles: dict[bytes, Any] = {}
        self.erased: set[bytes] = set()
        self.watermark = b""
        self.resets = 0
        self.messages = 0
        self.error: grpc.RpcError | None = None
        self.call = shop.profiles.WatchProfiles(pb.WatchProfilesRequest(**request))
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            for message in self.call:
                if message.reset:
                    self.profiles.clear()
                    self.resets += 1
                for user_key in message.erased_user_keys:
                    self.profiles.pop(user_key, None)
                    self.erased.add(user_key)
                for live in message.changed:
                    self.profiles[live.user_key] = live
                if message.watermark:
                    self.watermark = message.watermark
                self.messages += 1
        except grpc.RpcError as error:
            self.error = error

    def history(self, user_key: bytes) -> list[str]:
        live = self.profiles.get(user_key)
        return [event.item_id for event in live.history] if live else []

    def stop(self) -> None:
        self.call.cancel()
        self._thread.join(10)


@pytest.fixture
def watch() -> Iterator[Callable[..., Watcher]]:
    with contextlib.ExitStack() as stack:

        def start(shop: Shop, **request: Any) -> Watcher:
            watcher = Watcher(shop, **request)
            stack.callback(watcher.stop)
            eventually(lambda: watcher.messages or watcher.error, "the first message")
            return watcher

        yield start


def covers(watcher: Watcher, shop: Shop) -> bool:
    xids = shop.log.connection.execute("SELECT xid::text FROM feedback.log_transactions_v1").fetchall()
    return all(Watermark.decode(watcher.watermark).covers(int(xid)) for (xid,) in xids)


def test_two_watchers_are_told_the_same_full_histories(shop: Shop, watch: Callable[..., Watcher]) -> None:
    shop.log.record("ann", item_id="before")
    watchers = [watch(shop), watch(shop)]
    shop.log.record("ann", item_id="after")
    shop.log.record("bob", item_id="umbrella")

    for watcher in watchers:
        eventually(lambda w=watcher: w.history(shop.log.key("ann")) == ["after", "before"])  # type: ignore[misc]
        eventually(lambda w=watcher: w.history(shop.log.key("bob")) == ["umbrella"])  # type: ignore[misc]
    for watcher in watchers:
        watcher.stop()
    first, second = (
        {key: [e.SerializeToString() for e in live.history] for key, live in watcher.profiles.items()}
        for watcher in watchers
    )
    assert first == second


def test_a_stream_begins_with_reset_and_its_watermark_moves_on_without_changes(
    shop: Shop, watch: Callable[..., Watcher]
) -> None:
    watcher = watch(shop)
    assert watcher.resets == 1
    # What is in quarantine moves the log on, though nobody's history changes.
    with shop.log.connection.transaction():
        shop.log.record("ann")
        shop.log.connection.execute("UPDATE feedback.events SET quarantine_reason = 1")
    eventually(lambda: watcher.watermark and covers(watcher, shop), "the watermark to move on")
    assert watcher.profiles == {}


def test_a_watcher_resumes_where_it_was_and_hears_of_what_it_missed_alone(
    shop: Shop, watch: Callable[..., Watcher]
) -> None:
    first = watch(shop)
    shop.log.record("told", item_id="told")
    eventually(lambda: first.history(shop.log.key("told")) and first.watermark and covers(first, shop))
    first.stop()
    shop.log.record("missed", item_id="missed")
    shop.log.record("forgotten", item_id="x")
    shop.log.forget("forgotten")

    second = watch(shop, resume_watermark=first.watermark)
    eventually(lambda: second.history(shop.log.key("missed")) == ["missed"])
    eventually(lambda: second.watermark and covers(second, shop))
    assert second.resets == 0
    assert set(second.profiles) == {shop.log.key("missed")}
    assert second.erased == {shop.log.key("forgotten")}


def test_a_watcher_resumes_at_another_replica(
    shop: Shop, start_profile: Callable[..., Any], watch: Callable[..., Watcher]
) -> None:
    first = watch(shop)
    shop.log.record("ann", item_id="one")
    eventually(lambda: first.history(shop.log.key("ann")) and covers(first, shop))
    first.stop()
    shop.log.record("ann", item_id="two")

    service, channel = start_profile()
    eventually(lambda: service.readiness()[0])
    second = watch(Shop(service, channel, shop.log), resume_watermark=first.watermark)
    eventually(lambda: second.history(shop.log.key("ann")) == ["two", "one"])
    assert second.resets == 0


def test_a_watermark_of_another_database_resets(shop: Shop, watch: Callable[..., Watcher]) -> None:
    watcher = watch(shop, resume_watermark=Watermark(2**40, 2**40).encode())

    assert watcher.resets == 1


def test_partitions_divide_shoppers_by_the_first_bytes_of_their_keys(
    shop: Shop, watch: Callable[..., Watcher]
) -> None:
    watchers = [watch(shop, partition_index=index, partition_count=3) for index in range(3)]
    users = [f"user-{number}" for number in range(20)]
    for user in users:
        shop.log.record(user)

    eventually(lambda: sum(len(watcher.profiles) for watcher in watchers) == len(users))
    for index, watcher in enumerate(watchers):
        assert watcher.profiles
        assert all(int.from_bytes(key[:4], "big") % 3 == index for key in watcher.profiles)


def test_erasure_reaches_the_stream(shop: Shop, watch: Callable[..., Watcher]) -> None:
    watcher = watch(shop)
    shop.log.record("ann")
    eventually(lambda: watcher.history(shop.log.key("ann")))

    shop.log.forget("ann")

    eventually(lambda: shop.log.key("ann") in watcher.erased)
    assert shop.log.key("ann") not in watcher.profiles


def test_withdrawn_consent_reaches_the_stream(shop: Shop, watch: Callable[..., Watcher]) -> None:
    watcher = watch(shop)
    shop.log.record("ann")
    eventually(lambda: watcher.history(shop.log.key("ann")))

    shop.log.consent("ann", False)

    eventually(lambda: not watcher.profiles[shop.log.key("ann")].personalisation)
    assert watcher.history(shop.log.key("ann")) == []


def test_a_watcher_that_does_not_read_holds_up_nobody(shop: Shop, watch: Callable[..., Watcher]) -> None:
    stuck = shop.profiles.WatchProfiles(pb.WatchProfilesRequest())
    next(stuck)
    watcher = watch(shop)
    text = "x" * 200
    for number in range(300):
        shop.log.record(f"user-{number % 50}", item_id=f"{text}{number}")
    eventually(lambda: len(watcher.profiles) == 50 and covers(watcher, shop))
    stuck.cancel()


MALFORMED: list[tuple[dict[str, Any], str]] = [
    ({"partition_index": 1, "partition_count": 1}, "partition_index"),
    ({"partition_index": -1}, "partition_index"),
    ({"partition_count": 5000}, "partition_count"),
    ({"partition_count": -1}, "partition_count"),
    ({"resume_watermark": b"nonsense"}, "resume_watermark"),
    ({"resume_watermark": b"9:3:"}, "resume_watermark"),
    ({"resume_watermark": b"-1:3:"}, "resume_watermark"),
    ({"resume_watermark": b"1:99999999999999999999999:"}, "resume_watermark"),
]


def test_a_malformed_watch_names_the_field(
    shop: Shop, watch: Callable[..., Watcher], subtests: pytest.Subtests
) -> None:
    for request, field in MALFORMED:
        with subtests.test(field, request=request):
            watcher = watch(shop, **request)
            error = grpc_status.from_rpc_error(eventually(lambda w=watcher: w.error))  # type: ignore[misc]
            assert isinstance(error, InvalidInput)
            assert [violation.field for violation in error.violations] == [field]


def test_names_coalesce_so_that_a_slow_watcher_costs_one_entry_a_name() -> None:
    subscription: Subscription[str] = Subscription(None, max_pending=10)
    subscription.release()
    for xid in range(1, 1000):
        subscription.offer(["ann", "bob"], [], Watermark(xid, xid), xid)

    delivery = subscription.take(1, 1.0)
    assert (delivery.changed, delivery.watermark) == (["ann"], None)
    delivery = subscription.take(1, 1.0)
    assert (delivery.changed, delivery.watermark) == (["bob"], Watermark(999, 999))


def test_a_watcher_too_far_behind_is_reset() -> None:
    subscription: Subscription[str] = Subscription(None, max_pending=2)
    subscription.release()
    subscription.offer(["a", "b", "c"], [], Watermark(1, 1), 1)

    delivery = subscription.take(10, 1.0)
    assert delivery.reset
    assert delivery.changed == []
    assert delivery.watermark == Watermark(1, 1)


def test_removal_is_told_instead_of_an_earlier_change_and_before_a_later_one() -> None:
    subscription: Subscription[str] = Subscription(None, max_pending=10)
    subscription.release()
    subscription.offer(["ann"], [], Watermark(1, 1), 1)
    subscription.offer([], ["ann"], Watermark(2, 2), 2)
    assert (delivery := subscription.take(10, 1.0)).removed == ["ann"]
    assert delivery.changed == []

    subscription.offer(["ann"], ["ann"], Watermark(3, 3), 3)
    delivery = subscription.take(10, 1.0)
    assert (delivery.removed, delivery.changed) == (["ann"], ["ann"])


def test_watermarks_are_held_back_until_older_names_have_been_offered() -> None:
    subscription: Subscription[str] = Subscription(None, max_pending=10)
    subscription.offer([], [], Watermark(9, 9), 9)
    assert subscription.take(10, 0.0).watermark is None
    subscription.offer(["old"], [], None, 0)
    subscription.release()
    delivery = subscription.take(10, 1.0)
    assert (delivery.changed, delivery.watermark) == (["old"], Watermark(9, 9))
