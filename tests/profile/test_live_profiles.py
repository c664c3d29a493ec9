"""Live histories: what a shopper did is known as soon as it is committed, and only that."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import grpc
import psycopg
import pytest
from shopkeeper.profile.v1 import profile_service_pb2 as pb

from services.profile.domain.events import EMPTY_WINDOW, EventWindow
from services.profile.ports import ChangedUsers, LogChanges
from services.profile.use_cases.live_histories import LiveHistories
from shared import grpc_status
from shared.errors import DeadlineExceeded, FailedPrecondition, InvalidInput, Unavailable
from shared.event_kinds import EventKind
from shared.identity import UserKey
from shared.tokens import Watermark
from tests.profile.conftest import NOON, Log, Shop, eventually


def get(shop: Shop, user_id: str, token: str = "", timeout: float = 20.0, **fields: Any) -> pb.Profile:
    request = pb.GetProfileRequest(user_id=user_id, consistency_token=token, **fields)
    return shop.profiles.GetProfile(request, timeout=timeout)


def item_ids(profile: pb.Profile) -> list[str]:
    return [event.item_id for event in profile.live.history]


def test_a_shopper_without_events_has_an_empty_history_and_a_portrait_of_defaults(shop: Shop) -> None:
    profile = get(shop, "nobody")

    assert list(profile.live.history) == []
    assert profile.live.personalisation
    assert profile.live.summary.price_level == 0.5
    assert profile.portrait.event_count == 0
    assert profile.portrait.satisfaction.value == 0.5
    assert profile.portrait.satisfaction.evidence_count == 0
    assert not profile.portrait.HasField("first_event_time")


def test_history_is_loaded_from_the_log_newest_first(shop: Shop) -> None:
    shop.log.record("ann", item_id="second", at=NOON + timedelta(hours=1))
    shop.log.record("ann", item_id="third", at=NOON + timedelta(hours=2))
    token = shop.log.record("ann", item_id="first", at=NOON)

    assert item_ids(get(shop, "ann", token)) == ["third", "second", "first"]


def test_a_consistency_token_is_honoured_while_the_shopper_is_in_memory(shop: Shop) -> None:
    get(shop, "ann")
    for number in range(30):
        token = shop.log.record("ann", item_id=f"item-{number}")
        assert item_ids(get(shop, "ann", token))[0] == f"item-{number}"


def test_an_event_reaches_memory_without_a_token(shop: Shop) -> None:
    get(shop, "ann")
    shop.log.record("ann", item_id="umbrella")

    eventually(lambda: item_ids(get(shop, "ann")) == ["umbrella"])


def test_lines_of_an_order_are_events_of_their_own(shop: Shop) -> None:
    token = shop.log.record("ann", EventKind.PURCHASE, lines=[("tea", 2, 3_500_000), ("cup", 1, 9_000_000)])
    history = get(shop, "ann", token).live.history

    assert [(e.item_id, e.line, e.quantity, e.price_micros, e.currency_code) for e in history] == [
        ("cup", 1, 1.0, 9_000_000, "EUR"),
        ("tea", 0, 2.0, 3_500_000, "EUR"),
    ]
    assert len({event.event_key for event in history}) == 1


def test_history_holds_the_newest_two_hundred_events_that_name_an_item(shop: Shop) -> None:
    for number in range(230):
        shop.log.record("ann", item_id=f"item-{number}")
    token = shop.log.record("ann", EventKind.SEARCH, item_id=None)

    assert item_ids(get(shop, "ann", token)) == [f"item-{number}" for number in range(229, 29, -1)]
    # Once more, now by the tail of the log.
    token = shop.log.record("ann", item_id="item-230")
    assert item_ids(get(shop, "ann", token)) == [f"item-{number}" for number in range(230, 30, -1)]


def test_a_shopper_with_very_many_events_costs_no_more_than_a_window(shop: Shop) -> None:
    shop.log.connection.execute(
        """
        INSERT INTO feedback.events
            (event_key, payload_digest, occurred_at, kind, device, channel, consent, user_key, item_id)
        SELECT (lpad(to_hex(1750000000000 + n), 12, '0') || '70008000000000000000')::uuid, 0,
            to_timestamp((1750000000000 + n) / 1000.0), 3, 0, 0, 0, %s, 'item-' || n
        FROM generate_series(1, 5000) AS n
        """,
        (shop.log.key("robot"),),
    )
    token = shop.log.record("other")
    profile = get(shop, "robot", token)

    assert item_ids(profile) == [f"item-{number}" for number in range(5000, 4800, -1)]
    assert profile.portrait.event_count == 1000
    assert profile.portrait.truncated


def test_an_event_committed_late_by_a_long_transaction_is_not_lost(shop: Shop, database_url: str) -> None:
    get(shop, "late")
    with psycopg.connect(database_url) as slow:
        late = shop.log.record("late", item_id="late", connection=slow)
        # Later transactions commit, and are seen, while the earlier one is still open.
        token = shop.log.record("other", item_id="soon")
        assert item_ids(get(shop, "other", token)) == ["soon"]
        assert item_ids(get(shop, "late")) == []
        slow.commit()

    assert item_ids(get(shop, "late", late)) == ["late"]


def test_a_long_transaction_elsewhere_does_not_stall_the_log(shop: Shop, database_url: str) -> None:
    get(shop, "ann")
    with psycopg.connect(database_url) as elsewhere:
        elsewhere.execute("SELECT pg_current_xact_id()")
        for number in range(5):
            token = shop.log.record("ann", item_id=f"item-{number}")
            assert len(item_ids(get(shop, "ann", token))) == number + 1


def test_a_token_of_a_commit_without_a_row_is_answered(shop: Shop) -> None:
    shop.log.record("ann", item_id="before")
    # As where each event of a batch was there already.
    row = shop.log.connection.execute("SELECT pg_current_xact_id()::text").fetchone()
    assert row is not None
    assert item_ids(get(shop, "ann", shop.log.token(int(row[0])))) == ["before"]


def test_a_token_ahead_of_the_log_is_refused_without_waiting_for_the_deadline(shop: Shop) -> None:
    with pytest.raises(grpc.RpcError) as failure:
        get(shop, "ann", shop.log.token(2**40))

    error = grpc_status.from_rpc_error(failure.value)
    assert isinstance(error, FailedPrecondition)
    assert error.reason == "CONSISTENCY_TOKEN_AHEAD"


def test_a_token_of_a_transaction_that_is_still_open_waits_until_the_deadline(
    shop: Shop, database_url: str
) -> None:
    with psycopg.connect(database_url) as slow:
        token = shop.log.record("ann", connection=slow)
        shop.log.record("bob")
        with pytest.raises(grpc.RpcError) as failure:
            get(shop, "ann", token, timeout=0.5)

    assert isinstance(grpc_status.from_rpc_error(failure.value), DeadlineExceeded)


MALFORMED: list[tuple[pb.GetProfileRequest, str]] = [
    (pb.GetProfileRequest(), "user"),
    (pb.GetProfileRequest(user_id=""), "user_id"),
    (pb.GetProfileRequest(user_id="a\x00b"), "user_id"),
    (pb.GetProfileRequest(user_id="x" * 257), "user_id"),
    (pb.GetProfileRequest(user_key=b"short"), "user_key"),
    (pb.GetProfileRequest(user_id="ann", consistency_token="forged"), "consistency_token"),
]


def test_a_malformed_request_names_the_field(shop: Shop, subtests: pytest.Subtests) -> None:
    for request, field in MALFORMED:
        with subtests.test(field, request=str(request)):
            with pytest.raises(grpc.RpcError) as failure:
                shop.profiles.GetProfile(request)
            error = grpc_status.from_rpc_error(failure.value)
            assert isinstance(error, InvalidInput)
            assert [violation.field for violation in error.violations] == [field]


def test_a_batch_answers_in_the_order_asked_and_names_every_bad_row(shop: Shop) -> None:
    shop.log.record("ann", item_id="a")
    token = shop.log.record("bob", item_id="b")
    users = [pb.UserReference(user_id=user) for user in ("bob", "nobody", "ann", "bob")]
    batch = shop.profiles.BatchGetProfiles(
        pb.BatchGetProfilesRequest(users=users, consistency_token=token, view="PROFILE_VIEW_LIVE")
    )

    assert [item_ids(profile) for profile in batch.profiles] == [["b"], [], ["a"], ["b"]]
    assert not batch.profiles[0].HasField("portrait")

    users = [pb.UserReference(user_id="ann"), pb.UserReference(), pb.UserReference(user_key=b"1")]
    with pytest.raises(grpc.RpcError) as failure:
        shop.profiles.BatchGetProfiles(pb.BatchGetProfilesRequest(users=users))
    error = grpc_status.from_rpc_error(failure.value)
    assert isinstance(error, InvalidInput)
    assert [violation.field for violation in error.violations] == ["users[1].user", "users[2].user_key"]


def test_who_withdraws_consent_has_an_empty_history_and_no_portrait(shop: Shop) -> None:
    token = shop.log.record("ann")
    assert item_ids(get(shop, "ann", token)) == ["item"]

    shop.log.consent("ann", False)
    profile = eventually(lambda: (p := get(shop, "ann")) and not p.live.personalisation and p)
    assert item_ids(profile) == []
    assert not profile.HasField("portrait")
    assert not profile.live.HasField("summary")

    shop.log.consent("ann", True)
    eventually(lambda: item_ids(get(shop, "ann")) == ["item"])


def test_who_never_consented_is_known_to_a_cold_read_too(shop: Shop) -> None:
    shop.log.consent("ann", False)

    assert eventually(lambda: not get(shop, "ann").live.personalisation)


def test_an_event_sent_without_consent_empties_the_history(shop: Shop) -> None:
    shop.log.record("ann", item_id="before")
    token = shop.log.record("ann", item_id="secret", consent=1)

    profile = get(shop, "ann", token)
    assert not profile.live.personalisation
    assert item_ids(profile) == []


def test_who_is_forgotten_leaves_memory_even_while_rows_remain_in_the_log(shop: Shop) -> None:
    token = shop.log.record("ann")
    assert item_ids(get(shop, "ann", token)) == ["item"]

    shop.log.forget("ann", delete_rows=False)

    eventually(lambda: item_ids(get(shop, "ann")) == [])
    shop.service.histories.clear()
    assert item_ids(get(shop, "ann")) == []


def test_memory_is_bounded_and_who_was_dropped_is_loaded_again(
    log: Log, start_profile: Callable[..., Any]
) -> None:
    service, channel = start_profile(hot_users=10)
    shop = Shop(service, channel, log)
    eventually(lambda: service.readiness()[0])
    for number in range(25):
        token = log.record(f"user-{number}", item_id=f"item-{number}")
    for number in range(25):
        assert item_ids(get(shop, f"user-{number}", token)) == [f"item-{number}"]
        assert len(service.histories) <= 10
    assert item_ids(get(shop, "user-0")) == ["item-0"]


def test_the_service_waits_for_the_views_of_feedback_and_says_so(
    migrate_services: Callable[..., str], start_profile: Callable[..., Any]
) -> None:
    migrate_services("profile")
    service, channel = start_profile()
    eventually(lambda: "feedback" in service.readiness()[1])
    with pytest.raises(grpc.RpcError) as failure:
        Shop(service, channel, None).profiles.GetProfile(  # type: ignore[arg-type]
            pb.GetProfileRequest(user_id="ann"), timeout=0.2
        )
    assert failure.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)

    migrate_services("feedback")
    eventually(lambda: service.readiness()[0], "readiness after feedback's migration")


def test_the_service_survives_the_loss_of_every_database_connection(shop: Shop, postgres_server: str) -> None:
    token = shop.log.record("ann", item_id="before")
    assert item_ids(get(shop, "ann", token)) == ["before"]
    database = shop.log.connection.info.dbname
    own = shop.log.connection.info.backend_pid
    for _ in range(3):
        with psycopg.connect(postgres_server, autocommit=True) as administrator:
            administrator.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s AND pid <> %s",
                (database, own),
            )
        # In memory, so still served.
        assert "before" in item_ids(get(shop, "ann"))

    shop.log.record("ann", item_id="after")
    eventually(lambda: item_ids(get(shop, "ann")) == ["after", "before"])


class SlowLog:
    """A log whose loads wait until they are let go."""

    def __init__(self) -> None:
        self.loads: list[list[UserKey]] = []
        self.go = threading.Event()
        self.fail = False

    def poll(self, since: Watermark | None, max_events: int) -> LogChanges:
        raise NotImplementedError

    def changed_since(self, since: Watermark, max_users: int) -> ChangedUsers:
        raise NotImplementedError

    def load(self, user_keys: list[UserKey]) -> dict[UserKey, EventWindow]:
        self.loads.append(list(user_keys))
        assert self.go.wait(20)
        if self.fail:
            raise Unavailable("LOG_UNAVAILABLE", "away")
        return dict.fromkeys(user_keys, EMPTY_WINDOW)


class NoMetrics:
    def polled(self, event_count: int, seconds: float) -> None: ...
    def hot(self, user_count: int) -> None: ...
    def missed(self, user_count: int) -> None: ...
    def watchers(self, stream: str, count: int) -> None: ...

    def alerted(self, user_count: int) -> None: ...


@pytest.mark.parametrize("fail", [False, True])
def test_two_hundred_concurrent_misses_of_one_shopper_make_one_query(fail: bool) -> None:
    log = SlowLog()
    log.fail = fail
    histories = LiveHistories(log, 10, NoMetrics())
    key = UserKey(b"k" * 16)
    waiting = threading.Semaphore(0)

    def read() -> bool:
        waiting.release()
        try:
            return key in histories.read([key], 20)
        except Unavailable:
            return False

    with ThreadPoolExecutor(200) as pool:
        reads = [pool.submit(read) for _ in range(200)]
        for _ in range(200):
            assert waiting.acquire(timeout=20)
        eventually(lambda: log.loads)
        # All have begun; whoever has not asked yet finds the flight, or the shopper, in memory.
        if fail:
            eventually(lambda: histories._flights)
        log.go.set()
        answers = [future.result() for future in reads]

    assert set(answers) == {not fail}
    if not fail:
        assert log.loads == [[key]]


def test_shoppers_erased_while_they_are_loaded_come_out_empty(shop: Shop) -> None:
    log = SlowLog()
    histories = LiveHistories(log, 10, NoMetrics())
    key = UserKey(b"k" * 16)
    with ThreadPoolExecutor(1) as pool:
        read = pool.submit(histories.read, [key], 20)
        eventually(lambda: log.loads)
        histories.erase([key])
        log.go.set()
        assert len(read.result()[key].window.events_W) == 0
    assert log.loads == [[key], [key]]
