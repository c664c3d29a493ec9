"""Bots are marked by rate and by pattern, per shopper and per session, whatever replica took their events in."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from shopkeeper.feedback.v1 import consent_pb2, event_pb2, feedback_service_pb2, feedback_service_pb2_grpc

from services.feedback.__main__ import wire
from services.feedback.domain.bots import BotRules, is_metronome
from services.feedback.servicer import SERVICE_NAME
from services.feedback.settings import FeedbackSettings
from services.feedback.storage.bot_marks import BotMarks
from tests.feedback.conftest import DUPLICATE, STORED, Shop, event, item_view, now_ms, uuid7

RULES = BotRules(views_per_minute=20, bare_views_per_hour=40, users_per_session=3, metronome_views=12)
MINUTE_MS = 60_000


@pytest.fixture
def other(shop: Shop, serve: Callable[..., grpc.Channel], tmp_path: Path) -> Iterator[Shop]:
    """A second replica over the same database."""
    settings = FeedbackSettings(
        listen="127.0.0.1:0", log_level="warning", keys=shop.keys, registry=shop.registry
    )
    feedback = wire(settings, shop.url)
    channel = serve(feedback.register, service_names=(SERVICE_NAME,), settings=settings)
    stub = feedback_service_pb2_grpc.FeedbackServiceStub(channel)
    yield Shop(stub, feedback, shop.url, shop.keys, shop.registry)
    feedback.close()


def start_of_hour() -> int:
    return now_ms() // (60 * MINUTE_MS) * 60 * MINUTE_MS - 120 * MINUTE_MS


def view(at_ms: int, user: str = "ada", session: str = "", dwell: float = 0.0) -> event_pb2.Event:
    return item_view(
        user_id=user, event_id=uuid7(at_ms), session_id=session,
        item_view=event_pb2.ItemView(item_id="lamp", dwell_seconds=dwell),
    )  # fmt: skip


def mark(shop: Shop, page_rows: int = 100_000) -> None:
    marks = BotMarks(shop.feedback.database, RULES, page_rows=page_rows)
    while marks.step():
        pass


def marked(shop: Shop) -> int:
    return int(shop.sql("SELECT count(*) FROM feedback.events WHERE is_bot")[0][0])


def trained_on(shop: Shop) -> int:
    return int(shop.sql("SELECT count(*) FROM feedback.training_events_v1", role="shopkeeper_trainer")[0][0])


def test_a_minute_with_more_views_than_a_person_can_look_at_is_marked_and_kept_from_training(
    shop: Shop,
) -> None:
    start = start_of_hour()
    shop.record(*[view(start + n, dwell=1) for n in range(21)], view(start + MINUTE_MS, dwell=1))
    shop.record(*[view(start + n, user="bob", dwell=1) for n in range(20)])
    mark(shop)
    assert marked(shop) == 21
    assert trained_on(shop) == 21
    assert shop.sql("SELECT count(*) FROM feedback.events_v1") == [(42,)]


def test_who_lags_behind_a_bot_takes_larger_pages(shop: Shop) -> None:
    start = start_of_hour()
    shop.record(*[view(start + n, dwell=1) for n in range(21)])
    for n in range(21, 61):
        shop.record(view(start + n, dwell=1))
    marks = BotMarks(shop.feedback.database, RULES, page_rows=1)
    pages = 1
    while marks.step():
        pages += 1
    assert marked(shop) == 61
    # The 41 transactions in pages of 1, 2, 4, 8, 16 and the rest.
    assert pages <= 7


def steps_ms(rng: np.random.Generator, jitter: float, count: int = 12, period_ms: int = 90_000) -> list[int]:
    return np.cumsum(period_ms * (1 + jitter * rng.uniform(-1, 1, count))).astype(int).tolist()


@pytest.mark.parametrize("page_rows", [1, 5, 100_000])
def test_views_at_equal_intervals_are_a_machines(shop: Shop, other: Shop, page_rows: int) -> None:
    start, rng = start_of_hour(), np.random.default_rng(3)
    machine = [view(start + n, dwell=5) for n in steps_ms(rng, 0.04)]
    person = [view(start + n, user="bob", dwell=5) for n in steps_ms(rng, 0.9)]
    few = [view(start + n, user="eve", dwell=5) for n in steps_ms(rng, 0.0, 11)]
    # In any order, through either replica: the marks are those of the whole.
    for place in rng.permutation(12):
        (shop, other)[place % 2].record(machine[place], person[place], *few[place : place + 1])
    mark(shop, page_rows)
    assert marked(shop) == 12
    assert trained_on(shop) == 23
    # What follows within the hour is the machine's as well, whatever it is.
    other.record(event(event_id=uuid7(start + 30 * MINUTE_MS), wish_list=event_pb2.WishList(item_id="lamp")))
    mark(other, page_rows)
    assert marked(shop) == 13


def test_a_session_that_beats_time_with_several_shoppers_is_a_machines(shop: Shop) -> None:
    start = start_of_hour()
    shop.record(
        *[view(start + n * 100_000, user=f"user {n % 3}", session="s", dwell=5) for n in range(1, 13)]
    )
    mark(shop)
    assert marked(shop) == 12


def spread_by_loops(moments: list[int]) -> float:
    """The naive twin: the spread of nine of ten intervals over the middle one."""
    gaps = sorted(after - before for before, after in itertools.pairwise(moments))

    def quantile(share: float) -> float:
        place = share * (len(gaps) - 1)
        low = int(place)
        return gaps[low] + (place - low) * (gaps[min(low + 1, len(gaps) - 1)] - gaps[low])

    return (quantile(0.9) - quantile(0.1)) / quantile(0.5)


def test_the_beat_agrees_with_a_naive_twin() -> None:
    rng, verdicts = np.random.default_rng(7), Counter[bool]()
    for _ in range(500):
        moments = sorted(set(steps_ms(rng, float(rng.choice([0.02, 0.06, 0.12])), 40, 70_001)))
        verdict = is_metronome(moments, 30)
        verdicts[verdict] += 1
        assert verdict == (spread_by_loops(moments) <= 0.1)
    assert min(verdicts.values()) > 100


def test_a_pause_does_not_hide_a_machine_and_a_coarse_clock_makes_none() -> None:
    beat = [n * 10_007 for n in range(40)]
    paused = [moment + 500_000 * (moment > 200_000) for moment in beat]
    assert is_metronome(beat, 30)
    assert is_metronome(paused, 30)
    assert not is_metronome(beat[:29], 30)
    # Everything that happens within a minute has the minute's time.
    assert not is_metronome([n * MINUTE_MS for n in range(40)], 30)
    assert not is_metronome([n * 1_000 for n in range(40)], 30)
    assert is_metronome([n * 10_000 for n in range(40)], 30)


def test_people_who_browse_at_random_are_seldom_taken_for_machines() -> None:
    rng = np.random.default_rng(11)
    # Exponential is steadier than people are: their pauses have heavy tails.
    hours = (np.cumsum(rng.exponential(60_000, 40)).astype(int).tolist() for _ in range(2_000))
    assert sum(is_metronome(hour, 30) for hour in hours) == 0


def test_shoppers_of_a_real_shop_are_not_taken_for_machines(test_data: Path) -> None:
    """Views and clicks of 8,000 shoppers over ten weeks; few of their hours hold as many as the rules look at."""
    rules, click = BotRules(), 6
    table = pq.read_table(test_data / "jd_actions" / "actions.parquet", columns=["user_id", "ts", "type"])
    shown = pc.is_in(pc.cast(table["type"], pa.int32()), pa.array([1, click], pa.int32()))
    users = table.filter(shown)["user_id"].to_numpy()
    seconds = pc.cast(table.filter(shown)["ts"], pa.timestamp("s")).to_numpy().astype(np.int64)
    in_minutes = Counter(zip(users.tolist(), (seconds // 60).tolist(), strict=True))
    assert max(in_minutes.values()) <= rules.views_per_minute
    hours: dict[tuple[int, int], set[int]] = {}
    for user, second in zip(users.tolist(), seconds.tolist(), strict=True):
        hours.setdefault((user, second // 3600), set()).add(second % 3600 * 1_000)
    looked_at = [sorted(hour) for hour in hours.values() if len(hour) >= rules.metronome_views]
    assert len(looked_at) >= 10
    assert not any(is_metronome(hour, rules.metronome_views) for hour in looked_at)
    # There is one who looks every thirty seconds, for eight views: too few to be sure.
    assert any(is_metronome(sorted(hour), 8) for hour in hours.values())


@pytest.mark.parametrize("page_rows", [1, 5, 100_000])
def test_two_replicas_that_each_see_half_of_a_bot_mark_all_of_it(
    shop: Shop, other: Shop, page_rows: int
) -> None:
    start = start_of_hour()
    for n in range(0, 22, 2):
        shop.record(view(start + n, dwell=1))
        other.record(view(start + n + 1, dwell=1))
        # Either replica may be the one that marks; who it is changes nothing.
        mark((shop, other)[n // 2 % 2], page_rows)
    assert marked(shop) == 22
    other.record(view(start + 50, dwell=1))
    mark(other)
    assert marked(shop) == 23


def test_retries_do_not_make_a_bot(shop: Shop, other: Shop) -> None:
    views = [view(start_of_hour() + n, dwell=1) for n in range(15)]
    assert shop.statuses(*views) == [STORED] * 15
    assert other.statuses(*views) == [DUPLICATE] * 15
    mark(shop)
    assert marked(shop) == 0


def test_who_does_nothing_but_open_pages_for_an_hour_is_a_crawler(shop: Shop) -> None:
    start = start_of_hour()
    shop.record(*[view(start + n * MINUTE_MS) for n in range(60)])
    shop.record(*[view(start + n * MINUTE_MS, user="bob") for n in range(60)])
    shop.record(event(user_id="bob", event_id=uuid7(start + 5), wish_list=event_pb2.WishList(item_id="lamp")))
    mark(shop)
    assert marked(shop) == 60
    assert trained_on(shop) == 61


def test_a_session_that_changes_its_shopper_is_marked_with_what_came_before(shop: Shop, other: Shop) -> None:
    start = start_of_hour()
    for n, replica in enumerate([shop, other, shop, other, shop, other]):
        replica.record(
            view(start + n, user=f"user {n}", session="s", dwell=1), view(start + n, user=f"user {n}")
        )
        mark(replica)
    # Only what belongs to the session; the shoppers' other events are not its.
    assert marked(shop) == 6


def test_a_session_is_counted_beside_its_shoppers(shop: Shop) -> None:
    start = start_of_hour()
    shop.record(*[view(start + n, user=f"user {n % 3}", session="s", dwell=1) for n in range(21)])
    mark(shop)
    assert marked(shop) == 21


def test_a_step_that_fails_counts_nothing_twice(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    shop.record(*[view(start_of_hour() + n, dwell=1) for n in range(15)])
    with monkeypatch.context() as broken:
        broken.setattr("services.feedback.storage.bot_marks._MARK", "SELECT 1 / 0")
        with pytest.raises(Exception, match="zero"):
            BotMarks(shop.feedback.database, BotRules(1, 1, 1)).step()
    mark(shop)
    assert marked(shop) == 0


def test_the_forgotten_are_in_no_window(shop: Shop) -> None:
    shop.record(view(start_of_hour(), session="s"))
    mark(shop)
    assert shop.sql("SELECT count(*) FROM feedback.bot_windows") == [(4,)]
    shop.stub.ForgetUser(feedback_service_pb2.ForgetUserRequest(user_id="ada"), timeout=20)
    assert shop.sql("SELECT count(*) FROM feedback.bot_windows") == [(0,)]


def test_consent_given_to_one_replica_holds_for_the_next_call_to_another(shop: Shop, other: Shop) -> None:
    def allow(replica: Shop, *, training: bool) -> None:
        consent = consent_pb2.Consent(training=training, personalisation=training)
        replica.stub.SetConsent(
            feedback_service_pb2.SetConsentRequest(user_id="ada", consent=consent), timeout=10
        )

    shop.record(view(now_ms()), view(now_ms(), user="bob"))
    for replica, another in ((shop, other), (other, shop)):
        allow(replica, training=False)
        # No wait: it is in force before the answer, and so within the second that is promised.
        another.record(view(now_ms()))
        assert trained_on(another) == 1
        personalised = (
            "SELECT DISTINCT user_key, personalisation FROM feedback.events_v1 WHERE NOT personalisation"
        )
        assert len(shop.sql(personalised, role="shopkeeper_profile")) == 1
        allow(another, training=True)
        assert trained_on(replica) == shop.count()
