"""What the service tells Prometheus."""

from __future__ import annotations

from typing import Any

from prometheus_client import Counter, Gauge, Histogram

STAGE_SECONDS = Histogram(
    "shopkeeper_recommend_seconds",
    "Seconds that a stage of a recommendation took.",
    ["stage"],
    buckets=(0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0),
)
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
BUNDLE_REFUSED = Counter(
    "shopkeeper_recommend_bundle_refused_total",
    "Versions that were not put into service, by why.",
    ["reason"],
)
MODEL_SWAPS = Counter("shopkeeper_recommend_model_swaps_total", "Versions that were put into service.")


class PrometheusObserver:
    """Implements `ports.Observer`; looks each label up once."""

    def __init__(self) -> None:
        self._stages: dict[str, Any] = {}
        self._causes: dict[str, Any] = {}

    def stage(self, name: str, seconds: float) -> None:
        child = self._stages.get(name)
        if child is None:
            child = self._stages[name] = STAGE_SECONDS.labels(name)
        child.observe(seconds)

    def degraded(self, cause: str) -> None:
        child = self._causes.get(cause)
        if child is None:
            child = self._causes[cause] = DEGRADED.labels(cause.lower())
        child.inc()
