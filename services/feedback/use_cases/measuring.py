"""What came of recommendations, and what would have come of others."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from typing import Any

from services.feedback.domain.metrics import Measurement, Metric, MetricsQuery
from services.feedback.domain.off_policy import PolicyEstimate, TargetPolicy, estimate_policy_value
from services.feedback.ports import Clock, ImpressionStore, MetricsStore


class MeasureMetrics:
    """Counts what came of recommendations."""

    def __init__(self, store: MetricsStore, clock: Clock) -> None:
        self._store = store
        self._clock = clock

    def measure(self, query: MetricsQuery) -> Measurement:
        """Returns the counts by group."""
        return self._store.measure(query)

    def watch(
        self,
        window: timedelta,
        interval_seconds: float,
        query_of: Callable[[Any, Any], MetricsQuery],
        stopped: threading.Event,
        is_active: Callable[[], bool],
    ) -> Iterator[tuple[MetricsQuery, Measurement]]:
        """Yields the counts of the last `window` every `interval_seconds`, until nobody listens."""
        while is_active() and not stopped.is_set():
            end = self._clock.now()
            query = query_of(end - window, end)
            yield query, self._store.measure(query)
            wake_at = time.monotonic() + interval_seconds
            # A short wait at a time: a caller that left must not hold its thread for an hour.
            while is_active() and not stopped.is_set() and (left := wake_at - time.monotonic()) > 0:
                stopped.wait(min(left, 0.25))


class ValuePolicies:
    """Says what another policy would have earned."""

    def __init__(self, store: ImpressionStore) -> None:
        self._store = store

    def estimate(
        self,
        placement: str,
        start: datetime,
        end: datetime,
        reward: Metric,
        policy: TargetPolicy,
        weight_clip: float,
        confidence_level: float,
    ) -> tuple[PolicyEstimate, str]:
        """Returns the estimates and the currency of money; raises FailedPrecondition rather than guess."""
        impressions = self._store.read(placement, start, end, reward)
        estimate = estimate_policy_value(impressions, policy, weight_clip, confidence_level)
        return estimate, impressions.currency_code
