"""Online metrics of people: who comes back, how content they are, how much of the catalogue they see."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from shopkeeper.feedback.v1 import event_pb2, feedback_service_pb2, metrics_pb2

from services.feedback.domain.metrics import SurveySums, coverage, csat_interval, mean_interval, nps_interval
from shared.tokens import AttributionToken, TokenSigner, item_digests
from tests.feedback.conftest import STORED, Shop, event, now_ms, uuid7

DAY = timedelta(days=1)
DIMENSIONS = {
    "placement": metrics_pb2.METRIC_DIMENSION_PLACEMENT,
    "serving_config": metrics_pb2.METRIC_DIMENSION_SERVING_CONFIG,
    "model_version": metrics_pb2.METRIC_DIMENSION_MODEL_VERSION,
    "variant": metrics_pb2.METRIC_DIMENSION_VARIANT,
}
_recommendations = itertools.count(1)


def token(shop: Shop, *items: str, **group: str) -> str:
    """Returns the attribution token of a fresh recommendation."""
    return AttributionToken(
        next(_recommendations).to_bytes(8, "big"),
        now_ms(),
        group.get("placement", "home"),
        group.get("serving_config", "default"),
        group.get("model_version", "v1"),
        group.get("variant", ""),
        item_digests(items),
        np.full(len(items), 0.5, np.float32),
    ).sign(TokenSigner.from_directory(shop.keys))


def stamp(moment: datetime) -> Timestamp:
    timestamp = Timestamp()
    timestamp.FromDatetime(moment)
    return timestamp


def at(moment: datetime, user_id: str, **fields: object) -> event_pb2.Event:
    return event(user_id, event_id=uuid7(int(moment.timestamp() * 1000)), occurred_at=stamp(moment), **fields)


def visit(moment: datetime, user_id: str) -> event_pb2.Event:
    return at(moment, user_id, item_view=event_pb2.ItemView(item_id="lamp"))


def shown(moment: datetime, user_id: str, attribution_token: str, *items: str) -> event_pb2.Event:
    impressions = [event_pb2.Impression(item_id=item) for item in items]
    return at(
        moment,
        user_id,
        attribution_token=attribution_token,
        page_view=event_pb2.PageView(impressions=impressions),
    )


def record(shop: Shop, events: Sequence[event_pb2.Event]) -> None:
    for first in range(0, len(events), 500):
        batch = events[first : first + 500]
        assert shop.statuses(*batch) == [STORED] * len(batch)


def measure(shop: Shop, start: datetime, end: datetime, *group_by: str, **fields: object):  # type: ignore[no-untyped-def]
    request = feedback_service_pb2.GetMetricsRequest(
        start_time=stamp(start),
        end_time=stamp(end),
        group_by=[DIMENSIONS[name] for name in group_by],
        **fields,  # type: ignore[arg-type]
    )
    return shop.stub.GetMetrics(request, timeout=20)


# Retention


def test_who_comes_back_within_seven_days_is_retained(shop: Shop) -> None:
    begin = datetime.now(UTC) - 40 * DAY
    events = [
        shown(begin, user, token(shop, "a"), "a") for user in ("same day", "next day", "day 8", "never")
    ]
    events += [
        visit(begin + timedelta(hours=23), "same day"),
        visit(begin + timedelta(hours=25), "next day"),
        visit(begin + 8 * DAY, "day 8"),
    ]
    record(shop, events)
    (row,) = measure(shop, begin - DAY, begin + DAY).rows
    assert (row.retention_7_days_user_count, row.retention_28_days_user_count) == (4, 4)
    assert row.retention_7_days.value == pytest.approx(1 / 4)
    assert row.retention_28_days.value == pytest.approx(2 / 4)
    assert 0 < row.retention_7_days.lower < 0.25 < row.retention_7_days.upper < 1


def test_people_whose_time_is_not_over_count_neither_way(shop: Shop) -> None:
    now = datetime.now(UTC)
    # The second is back already, but its week is not over: counting it would count the quick before the slow.
    record(
        shop,
        [
            shown(now - 10 * DAY, "long ago", token(shop, "a"), "a"),
            shown(now - 3 * DAY, "lately", token(shop, "a"), "a"),
            visit(now - DAY, "lately"),
        ],
    )
    (row,) = measure(shop, now - 30 * DAY, now).rows
    assert (row.retention_7_days_user_count, row.retention_7_days.value) == (1, 0)
    assert row.retention_28_days_user_count == 0
    assert not row.HasField("retention_28_days")


def test_a_range_too_young_for_any_return_says_nothing_of_it(shop: Shop) -> None:
    now = datetime.now(UTC)
    record(shop, [shown(now - DAY, "ada", token(shop, "a"), "a")])
    (row,) = measure(shop, now - 2 * DAY, now).rows
    assert row.impression_count == 1
    assert not row.HasField("retention_7_days")


def test_return_after_the_range_counts_though_the_range_is_over(shop: Shop) -> None:
    now = datetime.now(UTC)
    record(shop, [shown(now - 20 * DAY, "ada", token(shop, "a"), "a"), visit(now - 15 * DAY, "ada")])
    (row,) = measure(shop, now - 21 * DAY, now - 19 * DAY).rows
    assert row.retention_7_days.value == 1


@dataclass(frozen=True)
class Touch:
    moment: datetime
    user: str
    group: tuple[str, str] | None


def naive_retention(
    touches: list[Touch],
    group: tuple[str, str] | None,
    start: datetime,
    end: datetime,
    now: datetime,
    days: int,
) -> tuple[int, int]:
    people = returned = 0
    for user in {touch.user for touch in touches}:
        firsts = [
            touch.moment
            for touch in touches
            if touch.user == user
            and touch.group is not None
            and (group is None or touch.group == group)
            and start <= touch.moment < end
        ]
        if not firsts or min(firsts) + days * DAY > now:
            continue
        people += 1
        back = [
            touch
            for touch in touches
            if touch.user == user and DAY <= touch.moment - min(firsts) < days * DAY
        ]
        returned += bool(back)
    return people, returned


def test_retention_by_group_agrees_with_a_naive_count(shop: Shop) -> None:
    rng = random.Random(4)
    now = datetime.now(UTC)
    groups = [("default", "v1"), ("default", "v2"), ("popular", "")]
    tokens = {group: token(shop, "a", serving_config=group[0], model_version=group[1]) for group in groups}
    touches, events = [], []
    for number in range(60):
        for _ in range(rng.randint(1, 4)):
            moment = now - rng.random() * 60 * DAY
            group = rng.choice([*groups, None])
            touches.append(Touch(moment, f"user {number}", group))
            events.append(
                visit(moment, f"user {number}")
                if group is None
                else shown(moment, f"user {number}", tokens[group], "a")
            )
    record(shop, events)
    start, end = now - 50 * DAY, now - 2 * DAY
    (whole,) = measure(shop, start, end).rows
    rows = measure(shop, start, end, "serving_config", "model_version").rows
    assert len(rows) == 3
    for row, group in [(whole, None), *((row, (row.serving_config, row.model_version)) for row in rows)]:
        for days, count, estimate in (
            (7, row.retention_7_days_user_count, row.retention_7_days),
            (28, row.retention_28_days_user_count, row.retention_28_days),
        ):
            people, returned = naive_retention(touches, group, start, end, now, days)
            assert count == people
            assert estimate.value == pytest.approx(returned / people)


# Surveys


def survey(moment: datetime, user_id: str, attribution_token: str = "", **scores: int) -> event_pb2.Event:
    return at(moment, user_id, attribution_token=attribution_token, survey=event_pb2.Survey(**scores))


def test_a_survey_is_credited_to_its_token_or_to_the_last_recommendation_before_it(shop: Shop) -> None:
    now = datetime.now(UTC)
    a, b = token(shop, "a", variant="x/a"), token(shop, "a", variant="x/b")
    record(
        shop,
        [
            survey(now - DAY, "token", a, csat=5),
            shown(now - 4 * DAY, "last", a, "a"),
            shown(now - 3 * DAY, "last", b, "a"),
            survey(now - 2 * DAY, "last", csat=1),
            shown(now - DAY, "last", a, "a"),  # After the survey: not what it was about.
            shown(now - 20 * DAY, "old", a, "a"),
            survey(now - 10 * DAY, "old", csat=1),  # Seven days are over.
            survey(now - DAY, "nobody", nps=0),  # Never was recommended anything.
        ],
    )
    rows = {row.variant: row for row in measure(shop, now - 12 * DAY, now, "variant").rows}
    assert (rows["x/a"].csat_user_count, rows["x/a"].csat.value) == (1, 5)
    assert (rows["x/b"].csat_user_count, rows["x/b"].csat.value) == (1, 1)
    assert rows["x/a"].nps_user_count == 0
    assert not rows["x/a"].HasField("nps")
    (whole,) = measure(shop, now - 12 * DAY, now).rows
    assert (whole.csat_user_count, whole.csat.value) == (2, 3)
    only_b = feedback_service_pb2.MetricsFilter(variant="x/b")
    (filtered,) = measure(shop, now - 12 * DAY, now, filter=only_b).rows
    assert filtered.csat.value == 1


def test_the_last_answer_of_each_person_counts(shop: Shop) -> None:
    now = datetime.now(UTC)
    shelf = token(shop, "a")
    record(
        shop,
        [
            survey(now - 3 * DAY, "ada", shelf, csat=1, nps=3),
            survey(now - 2 * DAY, "ada", shelf, nps=10),  # Says nothing of satisfaction: that answer stays.
            survey(now - 2 * DAY, "bea", shelf, csat=2, nps=7),
            survey(now - DAY, "bea", shelf, csat=4),
            survey(now - DAY, "eve", shelf, csat=4, nps=2),
        ],
    )
    (row,) = measure(shop, now - 5 * DAY, now).rows
    assert row.csat_user_count == 3
    assert row.csat.value == pytest.approx(3)
    assert row.csat.upper - row.csat.value == pytest.approx(1.959964 * math.sqrt(3 / 3), abs=1e-4)
    assert row.nps_user_count == 3
    assert row.nps.value == pytest.approx(0)


def test_csat_agrees_with_a_naive_sample_and_stays_possible() -> None:
    answers = [5, 5, 4, 2, 5, 3, 1, 4]
    sums = SurveySums(
        csat_people=len(answers), csat_total=sum(answers), csat_squares=sum(x * x for x in answers)
    )
    interval = csat_interval(sums)
    assert interval is not None
    half = 1.959964 * np.std(answers, ddof=1) / math.sqrt(len(answers))
    assert (interval.value, interval.lower, interval.upper) == pytest.approx(
        (np.mean(answers), np.mean(answers) - half, np.mean(answers) + half)
    )
    assert mean_interval(0, 0, 0) is None
    one = csat_interval(SurveySums(csat_people=1, csat_total=4, csat_squares=16))
    assert one is not None
    assert (one.value, one.lower, one.upper) == (4, 1, 5)


def test_nps_by_hand() -> None:
    # 50 promoters, 30 passives, 20 detractors: 30 points; p = 50.75 / 103, d = 20.75 / 103.
    interval = nps_interval(SurveySums(nps_people=100, promoters=50, detractors=20))
    assert interval is not None
    p, d = 50.75 / 103, 20.75 / 103
    half = 1.959964 * math.sqrt((p + d - (p - d) ** 2) / 103)
    assert interval.value == pytest.approx(30)
    assert interval.lower == pytest.approx(100 * (p - d - half))
    assert interval.upper == pytest.approx(100 * (p - d + half))
    assert nps_interval(SurveySums()) is None


@pytest.mark.parametrize(("promoters", "detractors"), [(12, 0), (0, 12), (0, 0), (12, 12)])
def test_nps_of_people_who_agree_has_an_interval_within_the_scale(promoters: int, detractors: int) -> None:
    interval = nps_interval(
        SurveySums(nps_people=max(12, promoters + detractors), promoters=promoters, detractors=detractors)
    )
    assert interval is not None
    assert -100 <= interval.lower <= interval.value <= interval.upper <= 100
    assert interval.upper - interval.lower > 20


@pytest.mark.parametrize("p", [(0.5, 0.3, 0.2), (0.9, 0.08, 0.02), (0.2, 0.2, 0.6)])
def test_nps_intervals_hold_the_truth_as_often_as_they_say(p: tuple[float, float, float]) -> None:
    # Exact: every outcome of 40 answers with its probability.
    n, truth, held = 40, 100 * (p[0] - p[2]), 0.0
    for promoters in range(n + 1):
        for detractors in range(n + 1 - promoters):
            interval = nps_interval(SurveySums(nps_people=n, promoters=promoters, detractors=detractors))
            assert interval is not None
            if interval.lower <= truth <= interval.upper:
                passives = n - promoters - detractors
                ways = math.comb(n, promoters) * math.comb(n - promoters, detractors)
                held += ways * p[0] ** promoters * p[1] ** passives * p[2] ** detractors
    assert 0.93 <= held <= 0.99


# Coverage


def test_coverage_is_the_share_of_known_items_that_was_shown(shop: Shop) -> None:
    now = datetime.now(UTC)
    record(
        shop,
        [
            shown(now - DAY, "ada", token(shop, "a", "b"), "a", "b", "not recommended"),
            shown(now - DAY, "bea", token(shop, "a", serving_config="popular"), "a"),
            visit(now - DAY, "ada"),
            at(
                now - DAY,
                "ada",
                purchase=event_pb2.Purchase(
                    lines=[event_pb2.OrderLine(item_id="c"), event_pb2.OrderLine(item_id="d")]
                ),
            ),
            visit(now - 9 * DAY, "outside of the range"),
        ],
    )
    answer = measure(shop, now - 2 * DAY, now)
    assert answer.catalogue_item_count == 6  # a, b, not recommended, lamp, c, d
    assert answer.rows[0].catalogue_coverage == pytest.approx(2 / 6)
    by_config = measure(shop, now - 2 * DAY, now, "serving_config", catalogue_item_count=50)
    coverage_of = {row.serving_config: row.catalogue_coverage for row in by_config.rows}
    assert coverage_of == {"default": pytest.approx(2 / 50), "popular": pytest.approx(1 / 50)}
    assert by_config.catalogue_item_count == 50


def test_coverage_never_exceeds_the_catalogue() -> None:
    assert coverage(3, 0) is None
    assert coverage(3, 2) == 1
