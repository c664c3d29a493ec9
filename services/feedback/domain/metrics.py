"""Online metrics of recommendations, with confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import Enum, IntEnum
from statistics import NormalDist

RETENTION_FROM = timedelta(hours=24)
"""Who comes back sooner has not yet come back: midnight is no night's sleep."""
RETENTION_WINDOWS = (timedelta(days=7), timedelta(days=28))
SURVEY_CREDIT_WINDOW = timedelta(days=7)
"""A survey without a token is credited to the person's last recommendation, unless that is older."""
# What Rocks' adjustment adds: three answers in all, twice as many in the middle as at either end.
_NPS_PSEUDO_END = 0.75
_NPS_PSEUDO_TOTAL = 3.0


class Metric(IntEnum):
    """The metrics; the numbers of `Metric` in the contract."""

    CLICK_THROUGH_RATE = 1
    ADD_TO_CART_RATE = 2
    CONVERSION_RATE = 3
    REVENUE_PER_MILLE = 4
    RETENTION_7_DAYS = 5
    RETENTION_28_DAYS = 6
    CSAT = 7
    NPS = 8
    CATALOGUE_COVERAGE = 9


class Dimension(Enum):
    """What metrics are split by; the value is the log's column."""

    PLACEMENT = "placement"
    SERVING_CONFIG = "serving_config"
    MODEL_VERSION = "model_version"
    VARIANT = "variant"


@dataclass(frozen=True, slots=True)
class MetricsQuery:
    """Which events to count: `occurred_at` in [start, end), UTC.

    Attributes:
        group_by: dimensions to split by, without repetition.
        equal: dimensions that must have a value.
        confidence_level: of the intervals, in (0, 1).
        variants: labels of which one must fit; empty: any.
        observed_until: the moment up to which people's return is known; the end of the range unless given.
        catalogue_items: how many items the catalogue has; 0: as many as events of the range name.
    """

    start: datetime
    end: datetime
    group_by: Sequence[Dimension] = ()
    equal: Sequence[tuple[Dimension, str]] = ()
    confidence_level: float = 0.95
    variants: Sequence[str] = ()
    observed_until: datetime | None = None
    catalogue_items: int = 0


@dataclass(frozen=True, slots=True)
class Interval:
    """A point estimate and the ends of its confidence interval."""

    value: float
    lower: float
    upper: float


@dataclass(frozen=True, slots=True)
class RevenueSums:
    """What recommended items brought in, in one currency.

    Attributes:
        currency_code: ISO 4217.
        total_micros: sum over (recommendation, item) of their revenue, in millionths.
        total_squares: sum over (recommendation, item) of the square of their revenue, in units.
    """

    currency_code: str
    total_micros: int
    total_squares: float


@dataclass(frozen=True, slots=True)
class ReturnCounts:
    """Who came back within one of RETENTION_WINDOWS.

    Attributes:
        people: those whose whole window has been observed.
        returned: those of them who did anything from RETENTION_FROM on, before the window's end.
    """

    people: int = 0
    returned: int = 0


@dataclass(frozen=True, slots=True)
class SurveySums:
    """The last answer of each person.

    Attributes:
        csat_people, csat_total, csat_squares: answers in [1, 5], their sum and the sum of their squares.
        nps_people, promoters, detractors: answers in [0, 10], those of 9 and more, those of 6 and less.
    """

    csat_people: int = 0
    csat_total: float = 0.0
    csat_squares: float = 0.0
    nps_people: int = 0
    promoters: int = 0
    detractors: int = 0


@dataclass(frozen=True, slots=True)
class Counts:
    """What was counted in one group; pairs are distinct (recommendation, item)."""

    group: dict[Dimension, str]
    recommendations: int = 0
    impressions: int = 0
    clicks: int = 0
    add_to_carts: int = 0
    purchases: int = 0
    distinct_items: int = 0
    revenues: list[RevenueSums] = field(default_factory=list)
    returns: Sequence[ReturnCounts] = (ReturnCounts(),) * len(RETENTION_WINDOWS)
    surveys: SurveySums = field(default_factory=SurveySums)


@dataclass(frozen=True, slots=True)
class Measurement:
    """What a query found.

    Attributes:
        groups: those that have events, most impressions first.
        known_items: the items that coverage is a share of.
    """

    groups: Sequence[Counts]
    known_items: int


def z_of(confidence_level: float) -> float:
    """Returns the two-sided normal quantile of a confidence level in (0, 1): 1.96 for 0.95."""
    return NormalDist().inv_cdf(0.5 + confidence_level / 2)


def wilson_interval(successes: int, trials: int, confidence_level: float = 0.95) -> Interval | None:
    """Returns the rate with Wilson's score interval (Wilson, 1927), or None without trials.

    An action can be reported without its impression; successes beyond the trials count as trials,
    so that a rate never leaves [0, 1].
    """
    if trials <= 0:
        return None
    k, n, z = min(successes, trials), trials, z_of(confidence_level)
    p = k / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    # The ends are exact there; rounding would leave 1e-17.
    return Interval(p, 0.0 if k == 0 else max(0.0, centre - half), 1.0 if k == n else min(1.0, centre + half))


def revenue_per_mille(
    revenue: RevenueSums, impressions: int, confidence_level: float = 0.95
) -> Interval | None:
    """Returns the revenue for a thousand impressions in currency units, with a normal interval.

    Every impression is a trial that earned something, mostly nothing; None without impressions.
    """
    if impressions <= 0:
        return None
    mean = revenue.total_micros / 1e6 / impressions
    variance = max(0.0, revenue.total_squares / impressions - mean * mean)
    half = z_of(confidence_level) * math.sqrt(variance / impressions)
    return Interval(1000 * mean, 1000 * (mean - half), 1000 * (mean + half))


def mean_interval(
    n: int,
    total: float,
    squares: float,
    confidence_level: float = 0.95,
    *,
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> Interval | None:
    """Returns the mean of n independent numbers with a normal interval, cut at what is possible.

    Args:
        n: how many.
        total: their sum.
        squares: the sum of their squares.
        confidence_level: in (0, 1).
        bounds: between which each number lies.

    None without numbers; a single one says nothing about the spread, so its interval is all that is possible.
    """
    if n <= 0:
        return None
    mean = total / n
    if n == 1:
        return Interval(mean, *bounds)
    variance = max(0.0, squares - n * mean * mean) / (n - 1)
    half = z_of(confidence_level) * math.sqrt(variance / n)
    return Interval(mean, max(bounds[0], mean - half), min(bounds[1], mean + half))


def csat_interval(surveys: SurveySums, confidence_level: float = 0.95) -> Interval | None:
    """Returns the mean satisfaction in [1, 5], or None without answers."""
    return mean_interval(
        surveys.csat_people,
        surveys.csat_total,
        surveys.csat_squares,
        confidence_level,
        bounds=(1.0, 5.0),
    )


def nps_interval(surveys: SurveySums, confidence_level: float = 0.95) -> Interval | None:
    """Returns the net promoter score in [-100, 100], or None without answers.

    An answer is +1 (promoter), 0 or -1 (detractor), a trinomial whose variance is p + d - (p - d)^2. The
    interval is the adjusted Wald of Rocks ("Interval estimation for the net promoter score", The American
    Statistician, 2016): as if three more people had answered, 3/4 promoters, 3/2 passives, 3/4 detractors, so
    that it does not collapse where all people agree. The value itself is not adjusted.
    """
    n = surveys.nps_people
    if n <= 0:
        return None
    value = (surveys.promoters - surveys.detractors) / n
    m = n + _NPS_PSEUDO_TOTAL
    p, d = (surveys.promoters + _NPS_PSEUDO_END) / m, (surveys.detractors + _NPS_PSEUDO_END) / m
    half = z_of(confidence_level) * math.sqrt((p + d - (p - d) ** 2) / m)
    # The adjusted centre lies nearer to 0; with few people and a low level the value could fall outside.
    lower, upper = min(value, p - d - half), max(value, p - d + half)
    return Interval(100 * value, 100 * max(-1.0, lower), 100 * min(1.0, upper))


def coverage(distinct_items: int, known_items: int) -> float | None:
    """Returns the share of the known items that was shown, in [0, 1], or None when none is known."""
    return min(1.0, distinct_items / known_items) if known_items > 0 else None
