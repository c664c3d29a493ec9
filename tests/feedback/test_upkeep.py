"""What an operator does to the log: purge, retention, rotation of the user key."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import psycopg
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from shopkeeper.feedback.v1 import consent_pb2, event_kind_pb2, event_pb2, feedback_service_pb2

from services.feedback.__main__ import Feedback, wire
from services.feedback.converters.identities import Door
from services.feedback.settings import FeedbackSettings
from services.feedback.storage.retention import Retention
from services.feedback.storage.unknown_items import PostgresUnknownItems
from services.feedback.use_cases import PendingBatch
from tests.feedback.conftest import DUPLICATE, STORED, Shop, event, eventually, item_view, uuid7


def at(day: datetime) -> Timestamp:
    timestamp = Timestamp()
    timestamp.FromDatetime(day)
    return timestamp


def view_on(day: datetime, **fields: Any) -> event_pb2.Event:
    return item_view(event_id=uuid7(int(day.timestamp() * 1000)), **fields)


NEW_YEAR = datetime(2024, 1, 1, tzinfo=UTC)


# Purge


def purge(shop: Shop, *, force: bool = False, **fields: Any) -> feedback_service_pb2.PurgeEventsResponse:
    request = feedback_service_pb2.PurgeEventsRequest(force=force, **fields)
    return shop.stub.PurgeEvents(request, timeout=20)


def test_a_purge_counts_first_and_erases_only_by_force(shop: Shop) -> None:
    days = [NEW_YEAR + timedelta(days=day) for day in range(10)]
    shop.record(*[view_on(day) for day in days])
    bounds = {"start_time": at(days[2]), "end_time": at(days[5])}
    dry = purge(shop, **bounds)
    assert (dry.event_count, dry.dry_run, shop.count()) == (3, True, 10)
    done = purge(shop, force=True, **bounds)
    assert (done.event_count, done.dry_run, shop.count()) == (3, False, 7)
    kept = {occurred_at for (occurred_at,) in shop.sql("SELECT occurred_at FROM feedback.events")}
    assert kept == set(days[:2] + days[5:])
    assert purge(shop, force=True, end_time=at(days[9])).event_count == 6


def test_a_purge_goes_by_the_time_of_the_event_and_by_its_kind(shop: Shop) -> None:
    # The id tells another time than the event itself, which counts.
    shop.record(
        item_view(occurred_at=at(NEW_YEAR)),
        event(wish_list=event_pb2.WishList(item_id="lamp"), occurred_at=at(NEW_YEAR)),
        item_view(),
    )
    done = purge(
        shop,
        force=True,
        end_time=at(NEW_YEAR + timedelta(days=1)),
        kinds=[event_kind_pb2.EVENT_KIND_WISH_LIST],
    )
    assert done.event_count == 1
    assert shop.sql("SELECT DISTINCT kind FROM feedback.events") == [(event_kind_pb2.EVENT_KIND_ITEM_VIEW,)]


def test_a_purged_event_leaves_no_tombstone(shop: Shop) -> None:
    one = view_on(NEW_YEAR)
    shop.record(one)
    purge(shop, force=True, end_time=at(NEW_YEAR + timedelta(days=1)))
    assert shop.statuses(one) == [STORED]


@pytest.mark.parametrize(
    "fields", [{}, {"start_time": at(NEW_YEAR), "end_time": at(NEW_YEAR)}, {"kinds": [99]}]
)
def test_a_purge_without_an_end_erases_nothing(shop: Shop, fields: dict[str, Any]) -> None:
    shop.record(item_view())
    with pytest.raises(grpc.RpcError) as failure:
        purge(shop, force=True, **fields)
    assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert shop.count() == 1


# Retention


def partitions(shop: Shop) -> set[str]:
    rows = shop.sql(
        "SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = 'feedback.events'::regclass"
    )
    return {name.rpartition(".")[2] for (name,) in rows}


def test_a_month_that_lies_wholly_before_the_retention_is_dropped(shop: Shop) -> None:
    days = [datetime(2024, month, 15, tzinfo=UTC) for month in (1, 2, 3)]
    shop.record(*[view_on(day) for day in days])
    before = partitions(shop)
    assert {"events_y2024m01", "events_y2024m02", "events_y2024m03"} <= before
    # The retention reaches back to the 10th of February: February is not wholly before it.
    now = datetime(2024, 4, 10, tzinfo=UTC)
    Retention(shop.feedback.database, 60, lambda: now).run()
    assert partitions(shop) == before - {"events_y2024m01"}
    assert shop.count() == 2
    assert shop.sql("SELECT to_regclass('feedback.events_y2024m01')") == [(None,)]
    # The writer still believes in the month; what comes for it is not lost, and goes with the next round.
    assert shop.statuses(view_on(days[0])) == [STORED]
    assert shop.count() == 3
    Retention(shop.feedback.database, 60, lambda: now).run()
    assert shop.count() == 2


def test_without_a_retention_nothing_is_dropped(shop: Shop) -> None:
    shop.record(view_on(NEW_YEAR))
    Retention(shop.feedback.database, 0, lambda: datetime.now(UTC)).run()
    assert shop.count() == 1


def test_a_long_reader_puts_the_retention_off_and_is_not_disturbed(shop: Shop) -> None:
    shop.record(view_on(NEW_YEAR))
    retention = Retention(shop.feedback.database, 30, lambda: datetime.now(UTC))
    with psycopg.connect(shop.url) as reader:
        assert reader.execute("SELECT count(*) FROM feedback.events").fetchone() == (1,)
        retention.run()
        assert reader.execute("SELECT count(*) FROM feedback.events").fetchone() == (1,)
        # Nor do writers wait for it.
        assert shop.statuses(item_view()) == [STORED]
    retention.run()
    assert shop.count() == 1


# Rotation of the user key


@pytest.fixture
def rotatable(shop: Shop, tmp_path: Path) -> Iterator[Callable[[], Feedback]]:
    """Returns a function that restarts the service with one more version of the user key."""
    keys = tmp_path / "keys"
    shutil.copytree(shop.keys, keys)
    wired: list[Feedback] = []

    def restart() -> Feedback:
        version = len(list(keys.glob("user_key.*.hex"))) + 1
        (keys / f"user_key.{version}.hex").write_text(f"{version:02x}" * 32)
        wired.append(wire(FeedbackSettings(listen="127.0.0.1:0", log_level="warning", keys=keys), shop.url))
        return wired[-1]

    yield restart
    for feedback in wired:
        feedback.close()


def record(feedback: Feedback, *events: event_pb2.Event) -> None:
    use_cases, reader = feedback.servicer._use_cases, feedback.servicer._reader
    pending: PendingBatch = use_cases.record_events.submit(reader.read(events))
    assert not pending.wait(20).exceptions


def door(feedback: Feedback) -> Door:
    return feedback.servicer._door


def rotated(feedback: Feedback) -> Any:
    rotation = feedback.servicer._use_cases.rotation
    begun = rotation.begin(1_000_000)
    feedback.start()
    return eventually(lambda: (one := rotation.get(begun.rotation_id)).ended_at and one, 30)


def texts(feedback: Feedback, user_id: str) -> list[str]:
    person = door(feedback).person(user_id)
    exported = feedback.servicer._use_cases.export_user.export(person.user_keys, person.tombstone_key)
    return [line for lines in exported for line in lines if '"text"' in line]


def test_a_rotation_brings_every_row_to_the_new_key_without_any_raw_id(
    shop: Shop, rotatable: Callable[[], Feedback]
) -> None:
    users = [f"user {number}" for number in range(40)]
    shop.record(*[item_view(user_id=user) for user in users for _ in range(5)])
    shop.record(event(user_id="user 1", review=event_pb2.Review(item_id="lamp", text="old words")))
    shop.stub.ForgetUser(feedback_service_pb2.ForgetUserRequest(user_id="user 39"), timeout=20)
    feedback = rotatable()
    # They come back before the rotation is asked for, one of them with a text under a second data key.
    record(feedback, item_view(user_id="user 0"))
    record(feedback, event(user_id="user 1", review=event_pb2.Review(item_id="lamp", text="new words")))

    rotation = rotated(feedback)

    # 39 people are left with 5 views each, one with a review; what came under the new key needs nothing.
    assert (rotation.state, rotation.target_version, rotation.rewritten_rows) == (2, 2, 39 * 5 + 1)
    assert rotation.remaining_rows == 0
    counts = dict(shop.sql("SELECT user_key, count(*) FROM feedback.events GROUP BY user_key"))
    expected = {door(feedback).keys_of(user)[0]: 5 for user in users[:39]}
    expected[door(feedback).keys_of("user 0")[0]] += 1
    expected[door(feedback).keys_of("user 1")[0]] += 2
    assert counts == expected
    assert shop.sql("SELECT DISTINCT key_version FROM feedback.events") == [(2,)]
    assert len(shop.sql("SELECT 1 FROM feedback.data_keys")) == 1
    assert [("old words" in line, "new words" in line) for line in texts(feedback, "user 1")] == [
        (True, False),
        (False, True),
    ]
    # The forgotten are known under the new key as well.
    graves = shop.sql("SELECT user_keys FROM feedback.tombstones")
    assert graves == [(list(door(feedback).person("user 39").user_keys),)]


@pytest.mark.parametrize("counted", [0, 1, 3, 4])
def test_a_row_that_is_stored_anew_is_counted_once_whether_it_had_been_counted_or_not(
    shop: Shop, rotatable: Callable[[], Feedback], counted: int
) -> None:
    for number in range(3):
        shop.record(*[item_view(user_id=f"user {user}", item_id=f"item {number}") for user in range(4)])
    feedback = rotatable()
    catalogue = frozenset({"sofa"})
    unknown = PostgresUnknownItems(feedback.database, lambda: catalogue, page_rows=1)
    for _ in range(counted):
        unknown.step()
    rotated(feedback)
    for worker in feedback.workers:
        worker.stop()
    # Stored anew a second time before anything is counted.
    rotated(rotatable())
    while unknown.step():
        pass
    expected = [(f"item {number}", 4) for number in range(3)]
    assert shop.sql("SELECT item_id, event_count FROM feedback.unknown_items ORDER BY item_id") == expected
    for notes in ("rewriting_transactions", "rewritten_uncounted"):
        assert shop.sql(f"SELECT count(*) FROM feedback.{notes}") == [(0,)]


def test_a_second_rotation_starts_from_any_version(shop: Shop, rotatable: Callable[[], Feedback]) -> None:
    shop.record(item_view(user_id="ada"), item_view(user_id="bob"))
    second = rotatable()
    record(
        second,
        item_view(user_id="ada"),
        event(user_id="ada", review=event_pb2.Review(item_id="a", text="two")),
    )
    shop.record(event(user_id="ada", review=event_pb2.Review(item_id="a", text="one")))
    third = rotatable()
    rotated(third)
    assert dict(shop.sql("SELECT user_key, count(*) FROM feedback.events GROUP BY user_key")) == {
        door(third).keys_of("ada")[0]: 4,
        door(third).keys_of("bob")[0]: 1,
    }
    assert len(texts(third, "ada")) == 2


def test_readers_of_the_log_see_a_person_move_in_one_step(
    shop: Shop, rotatable: Callable[[], Feedback]
) -> None:
    shop.record(*[item_view(user_id="ada") for _ in range(3)])
    old_key = Door.from_directory(shop.keys).keys_of("ada")[0]
    (before,) = shop.sql("SELECT max(xid)::text::bigint FROM feedback.events_v1")
    feedback = rotatable()
    rotated(feedback)
    moved = shop.sql(
        "SELECT DISTINCT user_key, xid::text::bigint FROM feedback.events_v1", role="shopkeeper_profile"
    )
    gone = shop.sql(
        "SELECT user_key, xid::text::bigint FROM feedback.tombstones_v1", role="shopkeeper_profile"
    )
    assert [key for key, _ in moved] == [door(feedback).keys_of("ada")[0]]
    assert gone == [(old_key, moved[0][1])]
    assert moved[0][1] > before[0]


def test_a_no_is_a_no_under_the_new_key_from_the_first_event_on(
    shop: Shop, rotatable: Callable[[], Feedback]
) -> None:
    shop.stub.SetConsent(
        feedback_service_pb2.SetConsentRequest(user_id="ada", consent=consent_pb2.Consent(training=False)),
        timeout=10,
    )
    shop.record(item_view(user_id="ada"))
    feedback = rotatable()
    record(feedback, item_view(user_id="ada"))
    seen = "SELECT count(*) FROM feedback.training_events_v1"
    assert shop.sql(seen) == [(0,)]
    rotated(feedback)
    assert shop.sql(seen) == [(0,)]
    assert shop.sql("SELECT user_key, key_version FROM feedback.consents") == [
        (door(feedback).keys_of("ada")[0], 2)
    ]


def test_an_interrupted_rotation_goes_on_and_rewrites_no_row_twice(
    shop: Shop, rotatable: Callable[[], Feedback]
) -> None:
    users = [f"user {number}" for number in range(30)]
    shop.record(*[item_view(user_id=user) for user in users])
    feedback = rotatable()
    store = feedback.servicer._use_cases.rotation._store
    begun = store.begin(1_000_000, datetime.now(UTC))
    # As a crash leaves it: half of the people are rewritten, and the cursor is behind them.
    old = shop.sql("SELECT user_key, key_version FROM feedback.events ORDER BY user_key LIMIT 15")
    store._rewrite(shop.sql("SELECT rotation_id FROM feedback.key_rotations")[0][0], old, None)
    again = rotated(feedback)
    assert again.rotation_id == begun.rotation_id
    keys = {key for (key,) in shop.sql("SELECT user_key FROM feedback.events")}
    assert keys == {door(feedback).keys_of(user)[0] for user in users}


def test_a_retry_of_an_event_from_before_the_rotation_is_a_duplicate(
    shop: Shop, rotatable: Callable[[], Feedback]
) -> None:
    before = item_view(user_id="ada")
    shop.record(before)
    feedback = rotatable()
    rotated(feedback)
    use_cases, reader = feedback.servicer._use_cases, feedback.servicer._reader
    recorded = use_cases.record_events.submit(reader.read([before])).wait(20)
    assert recorded.exceptions[0][0] == DUPLICATE


def test_what_is_no_rotation_is_not_found(shop: Shop) -> None:
    for name in ("nothing", "6f2b2c1e-0000-4000-8000-000000000000"):
        with pytest.raises(grpc.RpcError) as failure:
            shop.stub.GetKeyRotation(
                feedback_service_pb2.GetKeyRotationRequest(key_rotation_id=name), timeout=10
            )
        assert failure.value.code() is grpc.StatusCode.NOT_FOUND
    begun = shop.stub.RotateUserKeys(feedback_service_pb2.RotateUserKeysRequest(), timeout=10)
    again = shop.stub.RotateUserKeys(feedback_service_pb2.RotateUserKeysRequest(), timeout=10)
    assert begun.key_rotation_id == again.key_rotation_id
    assert begun.target_key_version == 1
