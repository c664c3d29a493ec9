"""What the service tells Prometheus."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

from prometheus_client import REGISTRY, Counter, Gauge, Histogram
from prometheus_client.core import HistogramMetricFamily

from services.recommend.ports import DocumentKind

DEGRADED = Counter(
    "shopkeeper_recommend_degraded_total", "Answers that went without something, by what.", ["cause"]
)
EVENT_LAG_SECONDS = Histogram(
    "shopkeeper_recommend_event_to_recommendation_seconds",
    "Seconds from an event's occurrence until recommendations take it into account.",
    buckets=(0.01, 0.025, 0.05, 0.1, 0.15, 0.2, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0),
)
MODEL_INFO = Gauge(
    "shopkeeper_recommend_model_info", "1 for the model version in service.", ["model", "version"]
)
MODEL_CREATED = Gauge(
    "shopkeeper_recommend_model_created_timestamp_seconds",
    "When the model version in service was trained, seconds since 1970.",
    ["model"],
)
BUNDLE_REFUSED = Counter(
    "shopkeeper_recommend_bundle_refused_total",
    "Versions that were not put into service, by why.",
    ["reason"],
)
CONFIGURATION_REFUSED = Counter(
    "shopkeeper_recommend_configuration_refused_total",
    "Documents of serving configs and rules that were left out, by kind.",
    ["kind"],
)
# Zeros before the first: a counter that is born with a one has not increased.
for _reason in ("BUNDLE_DAMAGED", "MODEL_VERSION_NOT_FOUND"):
    BUNDLE_REFUSED.labels(_reason)
for _kind in DocumentKind:
    CONFIGURATION_REFUSED.labels(_kind.value)
SHADOW_OVERLAP = Histogram(
    "shopkeeper_recommend_shadow_overlap",
    "Share of a page that a shadow model has too, by serving config.",
    ["serving_config"],
    buckets=(0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
)
SHADOW_SKIPPED = Counter(
    "shopkeeper_recommend_shadow_skipped_total", "Comparisons that were not made, by why.", ["cause"]
)
MODEL_SWAPS = Counter("shopkeeper_recommend_model_swaps_total", "Versions that were put into service.")


class StageSeconds:
    """A histogram by stage that costs a microsecond where `Histogram.observe` costs ten, once a request."""

    _BOUNDS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0)

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[str, list[int]] = {}
        self._sums: dict[str, float] = {}

    def observe(self, stages: Sequence[tuple[str, float]]) -> None:
        """Counts the stages of one request."""
        with self._lock:
            for stage, seconds in stages:
                counts = self._counts.get(stage)
                if counts is None:
                    counts = self._counts[stage] = [0] * (len(self._BOUNDS) + 1)
                    self._sums[stage] = 0.0
                counts[bisect_left(self._BOUNDS, seconds)] += 1
                self._sums[stage] += seconds

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """Yields the metric, as Prometheus' registry asks for it."""
        family = HistogramMetricFamily(
            "shopkeeper_recommend_seconds", "Seconds that a stage of a recommendation took.", labels=["stage"]
        )
        with self._lock:
            for stage, counts in self._counts.items():
                bounds = [*map(str, self._BOUNDS), "+Inf"]
                buckets = list(zip(bounds, accumulate(counts), strict=True))
                family.add_metric([stage], buckets, self._sums[stage])
        yield family


STAGE_SECONDS = StageSeconds()
REGISTRY.register(STAGE_SECONDS)


class PrometheusObserver:
    """Implements `ports.Observer`; looks each label up once."""

    def __init__(self) -> None:
        self._causes: dict[str, Any] = {}

    def stages(self, seconds: Sequence[tuple[str, float]]) -> None:
        STAGE_SECONDS.observe(seconds)

    def degraded(self, cause: str) -> None:
        child = self._causes.get(cause)
        if child is None:
            child = self._causes[cause] = DEGRADED.labels(cause.lower())
        child.inc()
