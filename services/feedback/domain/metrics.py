"""Online metrics of recommendations, with confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum
from statistics import NormalDist


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
    """

    start: datetime
    end: datetime
    group_by: Sequence[Dimension] = ()
    equal: Sequence[tuple[Dimension, str]] = ()
    confidence_level: float = 0.95


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
