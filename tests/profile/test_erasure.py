"""Who is erased is gone: from memory, from every table of this service, and from every stream, within a minute."""

from __future__ import annotations

import threading
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
from shopkeeper.profile.v1 import profile_service_pb2 as pb
from shopkeeper.profile.v1 import rebuild_pb2, segment_pb2

from shared.event_kinds import EventKind
from tests.profile.conftest import Shop, eventually

ASKED_SECONDS = 60.0


def tables_that_hold(shop: Shop, key: bytes) -> list[str]:
    """Returns the tables of the service's schema in whose rows the key occurs, in whatever column."""
    names = shop.log.connection.execute(
        "SELECT table_name FROM information_schema.tables WHERE table_schema = 'profile' AND table_type = 'BASE TABLE'"
    ).fetchall()
    found = []
    for (name,) in names:
        count = shop.log.connection.execute(
            f"SELECT count(*) FROM profile.{name} AS t WHERE t::text LIKE %s", (f"%{key.hex()}%",)
        ).fetchone()
        if count and count[0]:
            found.append(name)
    return sorted(found)


def test_erasure_reaches_memory_every_table_and_every_stream_within_a_minute(shop: Shop) -> None:
    now = datetime.now(UTC)
    for user in ("ann", "bob", "cookie"):
        for day in range(1, 9):
            lines = [(f"item-{day}", 1.0, 5_000_000)]
            shop.log.record(user, EventKind.PURCHASE, at=now - timedelta(days=day), lines=lines)
    shop.profiles.MergeUsers(
        pb.MergeUsersRequest(
            anonymous=pb.UserReference(user_id="cookie"), known=pb.UserReference(user_id="ann")
        ),
        timeout=20,
    )
    segment = segment_pb2.Segment(segment_id="buyers", filter="rfm.order_count > 3")
    shop.profiles.CreateSegment(pb.CreateSegmentRequest(segment=segment), timeout=20)
    started = shop.profiles.RebuildProfiles(pb.RebuildProfilesRequest(), timeout=20)
    *_, last = shop.profiles.WatchRebuild(pb.WatchRebuildRequest(rebuild_id=started.rebuild_id), timeout=60)
    assert last.state == rebuild_pb2.REBUILD_STATE_SUCCEEDED
    alerts = shop.service.churn._alerts
    ann = shop.log.key("ann")
    alerts.record([ann, shop.log.key("bob")], [0.2, 0.2], 60, "v1")
    assert alerts.record([ann, shop.log.key("bob")], [0.8, 0.8], 60, "v1") == 2
    assert tables_that_hold(shop, ann) == ["churn_alerts", "churn_scores", "merged_users", "portraits"]

    told: list[tuple[float, bytes]] = []
    ready = threading.Event()
    stream: Any = shop.profiles.WatchProfiles(pb.WatchProfilesRequest())

    def listen() -> None:
        try:
            for message in stream:
                ready.set()
                told.extend((time.monotonic(), bytes(key)) for key in message.erased_user_keys)
        except grpc.RpcError:
            return

    threading.Thread(target=listen, daemon=True).start()
    assert ready.wait(20)
    assert shop.profiles.GetProfile(pb.GetProfileRequest(user_key=ann), timeout=20).live.history

    # The rows of the log may stay for a while.
    shop.log.forget("ann", delete_rows=False)
    begun = time.monotonic()
    deadline = begun + ASKED_SECONDS

    def gone() -> bool:
        answer = shop.profiles.GetProfile(pb.GetProfileRequest(user_key=ann), timeout=20)
        return (
            not answer.live.history
            and not answer.portrait.event_count
            and not tables_that_hold(shop, ann)
            and ann in {key for _, key in told}
        )

    while not gone():
        assert time.monotonic() < deadline, (tables_that_hold(shop, ann), told)
        time.sleep(0.1)
    assert not alerts.after(0, 60, 0.5, 10)[1][1:], "bob's alert alone is left"
    page = shop.profiles.ListUsersInSegment(pb.ListUsersInSegmentRequest(segment_id="buyers"), timeout=20)
    assert ann not in page.user_keys
    assert shop.log.key("bob") in page.user_keys
    eventually(lambda: not tables_that_hold(shop, ann))
    stream.cancel()
