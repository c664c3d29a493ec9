"""Online metrics: what came of recommendations."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta

import grpc
import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from shopkeeper.feedback.v1 import event_pb2, feedback_service_pb2, metrics_pb2

from services.feedback.domain.metrics import RevenueSums, revenue_per_mille, wilson_interval
from shared.tokens import AttributionToken, TokenSigner, item_digests
from tests.feedback.conftest import STORED, Shop, event, now_ms

PLACEMENT = metrics_pb2.METRIC_DIMENSION_PLACEMENT
SERVING_CONFIG = metrics_pb2.METRIC_DIMENSION_SERVING_CONFIG


def test_wilson_by_hand() -> None:
    # Newcombe (1998), table I: 81 of 263.
    interval = wilson_interval(81, 263)
    assert interval is not None
    assert interval.value == pytest.approx(81 / 263)
    assert interval.lower == pytest.approx(0.2553, abs=1e-4)
    assert interval.upper == pytest.approx(0.3662, abs=1e-4)
    none = wilson_interval(0, 20)
    assert none is not None
    assert (none.value, none.lower) == (0, 0)
    assert none.upper == pytest.approx(0.1611, abs=1e-4)


def test_no_trials_no_rate_and_never_more_than_one() -> None:
    assert wilson_interval(0, 0) is None
    too_many = wilson_interval(5, 3)
    assert too_many is not None
    assert (too_many.value, too_many.upper) == (1, 1)


def test_revenue_per_mille_agrees_with_a_naive_sample() -> None:
    earned = [0.0] * 97 + [10.0, 20.0, 5.0]
    interval = revenue_per_mille(
        RevenueSums("EUR", round(sum(earned) * 1e6), sum(x * x for x in earned)), len(earned)
    )
    assert interval is not None
    half = 1.959964 * np.std(earned) / math.sqrt(len(earned))
    assert interval.value == pytest.approx(350)
    assert interval.lower == pytest.approx(1000 * (0.35 - half))
    assert interval.upper == pytest.approx(1000 * (0.35 + half))


def token(
    shop: Shop, number: int, *items: str, serving_config: str = "default", placement: str = "home"
) -> str:
    return AttributionToken(
        number.to_bytes(8, "big"),
        now_ms(),
        placement,
        serving_config,
        "v1",
        "",
        item_digests(items),
        np.full(len(items), 0.5, np.float32),
    ).sign(TokenSigner.from_directory(shop.keys))


def shown(attribution_token: str, *items: str) -> event_pb2.Event:
    impressions = [event_pb2.Impression(item_id=item) for item in items]
    return event(attribution_token=attribution_token, page_view=event_pb2.PageView(impressions=impressions))


def bought(attribution_token: str, *lines: event_pb2.OrderLine) -> event_pb2.Event:
    return event(
        attribution_token=attribution_token, purchase=event_pb2.Purchase(lines=lines, currency_code="EUR")
    )


def metrics(shop: Shop, **fields) -> metrics_pb2.Metrics:  # type: ignore[no-untyped-def]
    return shop.stub.GetMetrics(feedback_service_pb2.GetMetricsRequest(**fields), timeout=20)


def populate(shop: Shop) -> None:
    first, second = token(shop, 1, "a", "b", "c"), token(shop, 2, "a", "b", serving_config="popular")
    click = event_pb2.RecommendationClick(item_id="a")
    answer = shop.statuses(
        shown(first, "a", "b", "c", "not recommended"),
        shown(first, "a", "b"),  # Seen again: no new impressions.
        event(attribution_token=first, recommendation_click=click),
        event(attribution_token=first, recommendation_click=click),  # Clicked again: one click.
        event(attribution_token=first, recommendation_click=event_pb2.RecommendationClick(item_id="z")),
        event(attribution_token=first, add_to_cart=event_pb2.AddToCart(item_id="a")),
        bought(
            first,
            event_pb2.OrderLine(item_id="a", quantity=2, price_micros=3_000_000),
            event_pb2.OrderLine(item_id="not recommended", quantity=1, price_micros=500_000_000),
        ),
        shown(second, "a", "b"),
        event(recommendation_click=click),  # Without a token it is nobody's.
    )
    assert answer == [STORED] * 9


def test_metrics_credit_only_what_stood_in_the_recommendation(shop: Shop) -> None:
    populate(shop)
    rows = {row.serving_config: row for row in metrics(shop, group_by=[SERVING_CONFIG]).rows}
    default, popular = rows["default"], rows["popular"]
    assert (default.impression_count, default.click_count) == (3, 1)
    assert (default.add_to_cart_count, default.purchase_count) == (1, 1)
    assert default.click_through_rate.value == pytest.approx(1 / 3)
    assert 0 < default.click_through_rate.lower < 1 / 3 < default.click_through_rate.upper < 1
    (revenue,) = default.revenues
    assert (revenue.currency_code, revenue.revenue_micros) == ("EUR", 6_000_000)
    assert revenue.revenue_per_mille.value == pytest.approx(2000)
    assert (popular.impression_count, popular.click_count, len(popular.revenues)) == (2, 0, 0)
    assert default.placement == ""


def test_metrics_add_up_without_a_dimension_and_split_by_several(shop: Shop) -> None:
    populate(shop)
    (row,) = metrics(shop).rows
    assert (row.recommendation_count, row.impression_count, row.click_count) == (2, 5, 1)
    assert row.distinct_item_count == 3
    split = metrics(shop, group_by=[PLACEMENT, SERVING_CONFIG]).rows
    assert [(r.placement, r.serving_config, r.impression_count) for r in split] == [
        ("home", "default", 3),
        ("home", "popular", 2),
    ]


def test_metrics_obey_filter_and_range(shop: Shop) -> None:
    populate(shop)
    only = feedback_service_pb2.MetricsFilter(serving_config="popular")
    assert [row.impression_count for row in metrics(shop, filter=only).rows] == [2]
    past = Timestamp()
    past.FromDatetime(datetime.now(UTC) - timedelta(hours=1))
    assert len(metrics(shop, end_time=past).rows) == 0


def test_an_absurd_revenue_is_counted_and_not_a_failure(shop: Shop) -> None:
    recommendation = token(shop, 1, "a")
    line = event_pb2.OrderLine(item_id="a", quantity=1e6, price_micros=10**15)
    shop.record(shown(recommendation, "a"), bought(recommendation, line))
    (row,) = metrics(shop).rows
    assert row.revenues[0].revenue_micros >= 9 * 10**18


def test_nothing_recommended_means_no_rows(shop: Shop) -> None:
    assert len(metrics(shop).rows) == 0


@pytest.mark.parametrize(
    "fields",
    [
        {"group_by": [99]},
        {"group_by": [PLACEMENT, PLACEMENT]},
        {"confidence_level": 2.0},
        {"confidence_level": math.nan},
        {"start_time": Timestamp(seconds=2_000_000_000), "end_time": Timestamp(seconds=1)},
        {"end_time": Timestamp(seconds=2**62)},
        {"filter": feedback_service_pb2.MetricsFilter(placement="\x00")},
    ],
)
def test_a_wrong_question_is_named(shop: Shop, fields: dict) -> None:
    with pytest.raises(grpc.RpcError) as failure:
        metrics(shop, **fields)
    assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_watching_answers_again_and_again(shop: Shop) -> None:
    request = feedback_service_pb2.WatchMetricsRequest(interval=Duration(seconds=1))
    stream = shop.stub.WatchMetrics(request, timeout=30)
    assert len(next(stream).rows) == 0
    populate(shop)
    for answer in stream:
        if answer.rows:
            assert answer.rows[0].impression_count == 5
            break
    stream.cancel()
