"""What the trainer tells Prometheus: read from the database when it is asked, since runs are processes of their own."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping

from prometheus_client import REGISTRY
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from services.trainer.ports import PrivacyLedger, RunOverview
from shared.errors import Unavailable

REMEMBERED_SECONDS = 10.0
ENDED = ("SUCCEEDED", "FAILED", "CANCELLED")
VERDICTS = ("PASSED", "FAILED")


class RunMetrics:
    """A collector; several scrapers cost one look at the database in ten seconds.

    Args:
        overview: of the runs.
        ledger: of the privacy budget.
        drift: returns the newest population stability index of each (model, what it is of).
    """

    def __init__(
        self,
        overview: RunOverview,
        ledger: PrivacyLedger,
        drift: Callable[[], Mapping[tuple[str, str], float]] = dict,
    ) -> None:
        self._drift = drift
        self._overview, self._ledger = overview, ledger
        self._lock = threading.Lock()
        self._read_at = -REMEMBERED_SECONDS
        self._families: list[Metric] = []

    def register(self) -> None:
        """Adds itself to what is exposed."""
        REGISTRY.register(self)

    def unregister(self) -> None:
        """Takes itself away again."""
        REGISTRY.unregister(self)

    def describe(self) -> list[Metric]:
        """Returns nothing: registering must not need the database."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yields the metrics; none while the database is away, so that they are seen to be missing."""
        with self._lock:
            if time.monotonic() >= self._read_at + REMEMBERED_SECONDS:
                try:
                    self._families = self._read()
                except Unavailable:
                    self._families = []
                self._read_at = time.monotonic()
            families = self._families
        yield from families

    def _read(self) -> list[Metric]:
        under_way = GaugeMetricFamily(
            "shopkeeper_trainer_runs", "Runs that wait or work.", labels=["model", "state"]
        )
        ended = CounterMetricFamily(
            "shopkeeper_trainer_runs_ended", "Runs that ended, by how.", labels=["model", "state"]
        )
        verdicts = CounterMetricFamily(
            "shopkeeper_trainer_gate_verdicts",
            "Runs that were judged, by verdict.",
            labels=["model", "verdict"],
        )
        drift = CounterMetricFamily(
            "shopkeeper_trainer_drift_runs", "Runs started because behaviour had drifted.", labels=["model"]
        )
        newest = GaugeMetricFamily(
            "shopkeeper_trainer_last_success_timestamp_seconds", "End of the latest run that succeeded.", labels=["model"]
        )  # fmt: skip
        states: dict[tuple[str, str], int] = defaultdict(int)
        judged: dict[tuple[str, str], int] = defaultdict(int)
        drifted: dict[str, int] = defaultdict(int)
        succeeded: dict[str, float] = {}
        for row in self._overview.counts():
            states[row.model, row.state] += row.count
            drifted[row.model] += row.count if row.by_drift else 0
            if row.verdict:
                judged[row.model, row.verdict] += row.count
            if row.state == "SUCCEEDED":
                succeeded[row.model] = max(succeeded.get(row.model, 0.0), row.last_end_seconds)
        # Zeros before the first: a counter that is born with a one has not increased, and no alert would see it.
        for model in drifted:
            for state in ENDED:
                states[model, state] += 0
            for verdict in VERDICTS:
                judged[model, verdict] += 0
        for (model, state), count in states.items():
            (ended if state in ENDED else under_way).add_metric([model, state.lower()], count)
        for (model, verdict), count in judged.items():
            verdicts.add_metric([model, verdict.lower()], count)
        for model, count in drifted.items():
            drift.add_metric([model], count)
        for model, moment in succeeded.items():
            newest.add_metric([model], moment)
        budget = self._ledger.budget("")
        limit = GaugeMetricFamily(
            "shopkeeper_trainer_privacy_epsilon_limit",
            "The most epsilon that private runs may spend in 365 days.",
            value=budget.epsilon_limit,
        )
        spent = GaugeMetricFamily(
            "shopkeeper_trainer_privacy_epsilon_spent",
            "Epsilon that private runs have spent in the last 365 days.",
            value=budget.epsilon_spent,
        )
        index = GaugeMetricFamily(
            "shopkeeper_trainer_drift",
            "Population stability index of what came since the version in service was trained, as last measured.",
            labels=["model", "of"],
        )
        for (model, of), value in self._drift().items():
            index.add_metric([model, of], value)
        return [index, under_way, ended, verdicts, drift, newest, limit, spent]
