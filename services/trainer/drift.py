"""Measures drift: the log since a version's watermark against the log as of it. Counted by PostgreSQL."""

from __future__ import annotations

from typing import Any

import numpy as np
import psycopg

from services.trainer.domain.drift import drift_of_items, population_stability_index
from services.trainer.domain.schedules import Schedule
from shared.bundle import Registry
from shared.bundle.history import INTEREST_KINDS
from shared.database import Database, trusted_sql
from shared.errors import DataLoss, NotFound
from shared.tokens import Watermark

# Scores by their logarithm, e^-12 to 1, in so many bins; fewer shown items than this tell nothing.
_SCORE_BINS, _LOWEST_LOG, _FEWEST_SHOWN = 24, -12.0, 500
# The longest that one count of the log may take.
_COUNTING_SECONDS = 600


class DriftMeter:
    """Compares, for a schedule, what its model in service was trained on with what came since."""

    def __init__(self, database: Database, registry: Registry, logger: Any) -> None:
        self._database, self._registry, self._logger = database, registry, logger
        self._latest: dict[tuple[str, str], float] = {}

    def latest(self) -> dict[tuple[str, str], float]:
        """Returns the newest index of each (model, what it is of): items, kinds, scores."""
        return dict(self._latest)

    def why_to_train(self, schedule: Schedule) -> str | None:
        """Returns what has drifted, in words, or None.

        Raises:
            Unavailable: the log cannot be read.
        """
        if schedule.drift is None or (in_service := self._in_service(schedule)) is None:
            return None
        version, watermark = in_service
        with self._database.connect() as connection:
            connection.execute(trusted_sql(f"SET LOCAL statement_timeout = '{_COUNTING_SECONDS}s'"))
            kinds = self._counts(connection, "kind", watermark)
            if kinds[:, 1].sum() < schedule.drift.min_new_events:
                return None
            items = self._counts(connection, "item_id", watermark)
            scores = self._scores(connection, version)
        found = {
            "items": drift_of_items(items[:, 0], items[:, 1]),
            "kinds of events": population_stability_index(kinds[:, 0], kinds[:, 1]),
        }
        if scores.size and scores.sum(axis=0).min() >= _FEWEST_SHOWN:
            found["scores"] = population_stability_index(scores[:, 0], scores[:, 1])
        self._latest |= {(schedule.model, name.split()[0]): value for name, value in found.items()}
        limit = schedule.drift.max_population_stability_index
        self._logger.info(
            "drift measured", schedule=schedule.schedule_id, **{k.split()[0]: v for k, v in found.items()}
        )
        return next(
            (
                f"{name} drifted by {value:.3f}, above {limit:g}"
                for name, value in found.items()
                if value > limit
            ),
            None,
        )

    def _in_service(self, schedule: Schedule) -> tuple[str, Watermark] | None:
        alias = self._registry.alias(schedule.model, schedule.config.promote_alias)
        if alias is None:
            return None
        try:
            data = self._registry.read_manifest(schedule.model, alias.version).get("data", {})
            if not data.get("watermark"):
                return None
            return alias.version, Watermark.decode(bytes.fromhex(data["watermark"]))
        except (DataLoss, NotFound, ValueError):
            return None

    @staticmethod
    def _counts(connection: psycopg.Connection[Any], column: str, watermark: Watermark) -> np.ndarray:
        """Returns events as of the watermark and since, by value of a column, (values, 2)."""
        rows = connection.execute(
            trusted_sql(
                "SELECT count(*) FILTER (WHERE seen), count(*) FILTER (WHERE NOT seen) FROM ("  # noqa: S608
                f"SELECT {column} AS value, pg_visible_in_snapshot(xid, %s::pg_snapshot) AS seen "
                "FROM feedback.training_events_v1 WHERE kind = ANY(%s)) AS events GROUP BY value ORDER BY value"
            ),
            (watermark.to_pg(), list(INTEREST_KINDS)),
        ).fetchall()
        return np.array(rows, np.int64).reshape(-1, 2)

    @staticmethod
    def _scores(connection: psycopg.Connection[Any], version: str) -> np.ndarray:
        """Returns items that the version showed in its first day and in its latest, by propensity, (bins, 2).

        Of one version alone: another one scores otherwise, and that is no drift.
        """
        rows = connection.execute(
            "WITH shown AS (SELECT occurred_at, width_bucket(ln(greatest(propensity, 1e-30)), %s, 0, %s) AS bin "
            "FROM feedback.training_responses_v1 WHERE kind = 2 AND model_version = %s AND propensity IS NOT NULL), "
            "times AS (SELECT min(occurred_at) + interval '1 day' AS first, max(occurred_at) - interval '1 day' AS last FROM shown) "
            "SELECT count(*) FILTER (WHERE occurred_at < first), count(*) FILTER (WHERE occurred_at >= greatest(first, last)) "
            "FROM shown, times GROUP BY bin ORDER BY bin",
            (_LOWEST_LOG, _SCORE_BINS, version),
        ).fetchall()
        return np.array(rows, np.int64).reshape(-1, 2)
