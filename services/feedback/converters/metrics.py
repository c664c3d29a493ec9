"""Metrics requests and answers, to the domain and back."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from shopkeeper.feedback.v1 import feedback_service_pb2, metrics_pb2

from services.feedback.converters.people import to_timestamp
from services.feedback.domain.metrics import (
    Counts,
    Dimension,
    Interval,
    Measurement,
    MetricsQuery,
    coverage,
    csat_interval,
    nps_interval,
    revenue_per_mille,
    wilson_interval,
)
from shared.errors import FieldViolation, InvalidInput

_DIMENSIONS = {
    metrics_pb2.METRIC_DIMENSION_PLACEMENT: Dimension.PLACEMENT,
    metrics_pb2.METRIC_DIMENSION_SERVING_CONFIG: Dimension.SERVING_CONFIG,
    metrics_pb2.METRIC_DIMENSION_MODEL_VERSION: Dimension.MODEL_VERSION,
    metrics_pb2.METRIC_DIMENSION_VARIANT: Dimension.VARIANT,
}
DEFAULT_RANGE = timedelta(days=7)
DEFAULT_WINDOW = timedelta(days=1)
MAX_WINDOW_SECONDS = 366 * 86_400
DEFAULT_INTERVAL_SECONDS = 5.0


def from_get_metrics(request: feedback_service_pb2.GetMetricsRequest, now: datetime) -> MetricsQuery:
    """Returns the query of a request.

    Raises:
        InvalidInput: a time, dimension, filter or confidence level is wrong.
    """
    end = moment(request, "end_time") or now
    start = moment(request, "start_time") or _before(end, DEFAULT_RANGE)
    if start >= end:
        raise invalid("start_time", "lies not before end_time.")
    return _query_of(request, start, end, now)


def from_watch_metrics(
    request: feedback_service_pb2.WatchMetricsRequest,
) -> tuple[timedelta, float, Callable[[datetime, datetime], MetricsQuery]]:
    """Returns the window, the seconds between answers, and the query of a range.

    Raises:
        InvalidInput: a duration, dimension, filter or confidence level is wrong.
    """
    window = DEFAULT_WINDOW
    if request.HasField("window"):
        seconds = request.window.seconds + request.window.nanos / 1e9
        if not 0 < seconds <= MAX_WINDOW_SECONDS:
            raise invalid("window", "must be above 0 and at most 366 days.")
        window = timedelta(seconds=seconds)
    interval = DEFAULT_INTERVAL_SECONDS
    if request.HasField("interval"):
        interval = request.interval.seconds + request.interval.nanos / 1e9
        if not 1 <= interval <= 3600:
            raise invalid("interval", "must be in [1, 3600] seconds.")
    # Refused at once, not at the first answer.
    now = datetime.now(UTC)
    _query_of(request, now, now, now)
    return window, interval, lambda start, end: _query_of(request, start, end, end)


def to_metrics(query: MetricsQuery, measured: Measurement) -> metrics_pb2.Metrics:
    """Returns counts as rates with intervals."""
    return metrics_pb2.Metrics(
        start_time=to_timestamp(query.start),
        end_time=to_timestamp(query.end),
        rows=[to_row(counts, measured.known_items, query.confidence_level) for counts in measured.groups],
        confidence_level=query.confidence_level,
        catalogue_item_count=measured.known_items,
    )


def to_row(counts: Counts, known_items: int, level: float) -> metrics_pb2.MetricsRow:
    """Returns the counts of one group as rates with intervals."""
    n = counts.impressions
    week, month = counts.returns
    row = metrics_pb2.MetricsRow(
        recommendation_count=counts.recommendations,
        impression_count=n,
        click_count=counts.clicks,
        add_to_cart_count=counts.add_to_carts,
        purchase_count=counts.purchases,
        click_through_rate=to_estimate(wilson_interval(counts.clicks, n, level)),
        add_to_cart_rate=to_estimate(wilson_interval(counts.add_to_carts, n, level)),
        conversion_rate=to_estimate(wilson_interval(counts.purchases, n, level)),
        revenues=[
            metrics_pb2.Revenue(
                currency_code=revenue.currency_code,
                revenue_micros=revenue.total_micros,
                revenue_per_mille=to_estimate(revenue_per_mille(revenue, n, level)),
            )
            for revenue in counts.revenues
        ],
        retention_7_days=to_estimate(wilson_interval(week.returned, week.people, level)),
        retention_7_days_user_count=week.people,
        retention_28_days=to_estimate(wilson_interval(month.returned, month.people, level)),
        retention_28_days_user_count=month.people,
        csat=to_estimate(csat_interval(counts.surveys, level)),
        csat_user_count=counts.surveys.csat_people,
        nps=to_estimate(nps_interval(counts.surveys, level)),
        nps_user_count=counts.surveys.nps_people,
        distinct_item_count=counts.distinct_items,
        catalogue_coverage=coverage(counts.distinct_items, known_items),
    )
    for dimension, value in counts.group.items():
        setattr(row, dimension.value, value)
    return row


def to_estimate(interval: Interval | None) -> metrics_pb2.Estimate | None:
    """Returns an interval; None stays absent."""
    if interval is None:
        return None
    return metrics_pb2.Estimate(value=interval.value, lower=interval.lower, upper=interval.upper)


def _query_of(request: Any, start: datetime, end: datetime, now: datetime) -> MetricsQuery:
    group_by: list[Dimension] = []
    for index, number in enumerate(request.group_by):
        dimension = _DIMENSIONS.get(number)
        if dimension is None:
            raise invalid(f"group_by[{index}]", "is no dimension of this contract.")
        if dimension in group_by:
            raise invalid(f"group_by[{index}]", "was named before.")
        group_by.append(dimension)
    equal: list[tuple[Dimension, str]] = []
    for dimension in Dimension:
        value = getattr(request.filter, dimension.value)
        if "\x00" in value or len(value) > 255:
            raise invalid(f"filter.{dimension.value}", "must have at most 255 characters and no NUL.")
        if value:
            equal.append((dimension, value))
    if request.catalogue_item_count < 0:
        raise invalid("catalogue_item_count", "must be at least 0.")
    return MetricsQuery(
        start,
        end,
        group_by,
        equal,
        confidence_level(request),
        observed_until=now,
        catalogue_items=request.catalogue_item_count,
    )


def confidence_level(request: Any) -> float:
    """Returns the confidence level of a request, 0.95 when it names none; raises InvalidInput."""
    level: float = request.confidence_level or 0.95
    if not 0.5 <= level <= 0.999:
        raise invalid("confidence_level", "must be in [0.5, 0.999].")
    return level


def moment(request: Any, name: str) -> datetime | None:
    """Returns a time of a request, or None when it is absent; raises InvalidInput."""
    if not request.HasField(name):
        return None
    try:
        value: datetime = getattr(request, name).ToDatetime(tzinfo=UTC)
    except (ValueError, OverflowError):
        raise invalid(name, "is no time of the years 1 to 9999.") from None
    return value


def _before(end: datetime, span: timedelta) -> datetime:
    try:
        return end - span
    except OverflowError:
        return datetime.min.replace(tzinfo=UTC)


def invalid(field: str, problem: str) -> InvalidInput:
    """Returns the error that names a field and its problem."""
    return InvalidInput("INVALID_ARGUMENT", f"{field} {problem}", violations=[FieldViolation(field, problem)])
