"""What is counted, for Prometheus."""

from __future__ import annotations

import time
from collections.abc import Callable

from prometheus_client import Counter, Gauge, Histogram

_LAG = Gauge(
    "shopkeeper_profile_tail_lag_seconds",
    "Seconds since the log was read last: the most by which shoppers in memory are behind it.",
)
_POLL_SECONDS = Histogram(
    "shopkeeper_profile_poll_seconds",
    "Seconds to read and apply what is new in the log.",
    buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
)
_FOLDED = Counter("shopkeeper_profile_folded_events_total", "Lines of events read from the tail of the log.")
_HOT = Gauge("shopkeeper_profile_hot_users", "Shoppers in memory.")
_MISSES = Counter("shopkeeper_profile_misses_total", "Shoppers that had to be loaded from the log.")
_WATCHERS = Gauge("shopkeeper_profile_watchers", "Open streams.", ["stream"])
_ALERTS = Counter("shopkeeper_profile_churn_alerts_total", "Shoppers found more likely to leave than before.")


class PrometheusMetrics:
    """Implements the port `Metrics`."""

    def __init__(self, clock_seconds: Callable[[], float] = time.monotonic) -> None:
        self._clock_seconds = clock_seconds
        self._polled_at = clock_seconds()
        _LAG.set_function(lambda: self._clock_seconds() - self._polled_at)

    def polled(self, event_count: int, seconds: float) -> None:
        """See `Metrics.polled`."""
        self._polled_at = self._clock_seconds()
        _POLL_SECONDS.observe(seconds)
        _FOLDED.inc(event_count)

    def hot(self, user_count: int) -> None:
        """See `Metrics.hot`."""
        _HOT.set(user_count)

    def missed(self, user_count: int) -> None:
        """See `Metrics.missed`."""
        _MISSES.inc(user_count)

    def watchers(self, stream: str, count: int) -> None:
        """See `Metrics.watchers`."""
        _WATCHERS.labels(stream).set(count)

    def alerted(self, user_count: int) -> None:
        """See `Metrics.alerted`."""
        _ALERTS.inc(user_count)
