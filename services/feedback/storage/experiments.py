"""Experiments and what was seen of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from psycopg.errors import UniqueViolation
from psycopg.rows import dict_row

from services.feedback.domain.clustered import ClusteredSums
from services.feedback.domain.experiments import (
    Experiment,
    GuardRail,
    Observation,
    State,
    StopCause,
    VariantObservation,
)
from services.feedback.domain.metrics import RETENTION_FROM, RETENTION_WINDOWS, Metric
from services.feedback.storage.metrics import begin_analysis
from services.feedback.storage.tables import experiments
from shared.database import Database, trusted_sql
from shared.errors import Aborted, AlreadyExists, FailedPrecondition, NotFound
from shared.event_kinds import EventKind
from shared.experiments import VariantShare

# Of each metric, what one person earned and the chances that they had. A person counts from their first
# recommendation of the experiment on, whatever they saw later: whom a variant drove away must not vanish with it.
_EARNED_AND_CHANCES: Mapping[Metric, tuple[str, str]] = {
    Metric.CLICK_THROUGH_RATE: ("clicks", "impressions"),
    Metric.ADD_TO_CART_RATE: ("add_to_carts", "impressions"),
    Metric.CONVERSION_RATE: ("purchases", "impressions"),
    Metric.REVENUE_PER_MILLE: ("revenue", "impressions"),
    Metric.RETENTION_7_DAYS: ("returned_0", "observed_0"),
    Metric.RETENTION_28_DAYS: ("returned_1", "observed_1"),
    Metric.CSAT: ("csat", "csat_answers"),
    Metric.NPS: ("nps", "nps_answers"),
}
_PEOPLE = """
WITH attributed AS NOT MATERIALIZED (
    SELECT e.* FROM feedback.events AS e
    WHERE e.variant = ANY(%(labels)s) AND e.recommendation_id IS NOT NULL
        AND e.occurred_at >= %(start)s AND e.occurred_at < %(end)s
        AND NOT e.is_bot AND e.quarantine_reason IS NULL
),
exposed AS (
    SELECT variant, user_key, min(occurred_at) AS first_at FROM attributed GROUP BY variant, user_key
),
touched AS (
    SELECT e.variant, e.user_key, e.recommendation_id, e.kind, i.item_id, NULL::text AS currency_code,
        NULL::double precision AS revenue
    FROM attributed AS e
    CROSS JOIN LATERAL unnest(e.impression_items, e.impression_propensities) AS i (item_id, propensity)
    WHERE e.kind = {page_view} AND i.propensity IS NOT NULL
    UNION ALL
    SELECT e.variant, e.user_key, e.recommendation_id, e.kind, e.item_id, NULL, NULL
    FROM attributed AS e
    WHERE e.kind IN ({click}, {add_to_cart}) AND e.position IS NOT NULL
    UNION ALL
    SELECT e.variant, e.user_key, e.recommendation_id, e.kind, l.item_id, e.currency_code,
        l.quantity::double precision * l.price_micros / 1e6
    FROM attributed AS e
    CROSS JOIN LATERAL unnest(e.line_items, e.line_quantities, e.line_prices, e.line_positions)
        AS l (item_id, quantity, price_micros, position)
    WHERE e.kind = {purchase} AND l.position IS NOT NULL
),
pairs AS (
    SELECT variant, user_key, recommendation_id, kind, item_id, currency_code, sum(revenue) AS revenue
    FROM touched
    GROUP BY variant, user_key, recommendation_id, kind, item_id, currency_code
),
-- Sums of different currencies are no sum: the one with most orders is compared.
currency AS (
    SELECT currency_code FROM pairs WHERE revenue IS NOT NULL
    GROUP BY currency_code ORDER BY count(*) DESC, currency_code LIMIT 1
),
acted AS (
    SELECT variant, user_key,
        count(*) FILTER (WHERE kind = {page_view}) AS impressions,
        count(*) FILTER (WHERE kind = {click}) AS clicks,
        count(*) FILTER (WHERE kind = {add_to_cart}) AS add_to_carts,
        count(DISTINCT (recommendation_id, item_id)) FILTER (WHERE kind = {purchase}) AS purchases,
        sum(revenue) FILTER (WHERE currency_code = (SELECT currency_code FROM currency)) AS revenue
    FROM pairs
    GROUP BY variant, user_key
),
"""
_RETURNS = """
returned AS (
    SELECT p.variant, p.user_key, p.first_at, min(e.occurred_at) - p.first_at AS after
    FROM exposed AS p
    LEFT JOIN feedback.events AS e
        ON e.user_key = p.user_key
        AND e.occurred_at >= p.first_at + %(from)s AND e.occurred_at < p.first_at + %(window_1)s
        AND e.occurred_at >= %(start)s + %(from)s AND e.occurred_at < %(observed_until)s
        AND NOT e.is_bot AND e.quarantine_reason IS NULL
    WHERE p.first_at + %(window_0)s <= %(observed_until)s
    GROUP BY p.variant, p.user_key, p.first_at
),
"""
# Nobody's first week can be over: the question is dear, and its answer known.
_NO_RETURNS = """
returned AS (
    SELECT p.variant, p.user_key, p.first_at, NULL::interval AS after FROM exposed AS p WHERE false
),
"""
_SUMS = """
surveyed AS (
    SELECT p.variant, p.user_key,
        (array_agg(s.value ORDER BY s.occurred_at DESC, s.event_key DESC)
            FILTER (WHERE s.value IS NOT NULL))[1] AS csat,
        (array_agg((s.attributes ->> 'nps')::integer ORDER BY s.occurred_at DESC, s.event_key DESC)
            FILTER (WHERE s.attributes ? 'nps'))[1] AS nps
    FROM exposed AS p
    JOIN feedback.events AS s
        ON s.user_key = p.user_key AND s.kind = {survey}
        AND s.occurred_at >= p.first_at AND s.occurred_at >= %(start)s AND s.occurred_at < %(end)s
        AND NOT s.is_bot AND s.quarantine_reason IS NULL
    GROUP BY p.variant, p.user_key
),
people AS (
    SELECT p.variant,
        COALESCE(a.impressions, 0)::double precision AS impressions,
        COALESCE(a.clicks, 0)::double precision AS clicks,
        COALESCE(a.add_to_carts, 0)::double precision AS add_to_carts,
        COALESCE(a.purchases, 0)::double precision AS purchases,
        COALESCE(a.revenue, 0)::double precision AS revenue,
        (r.user_key IS NOT NULL)::integer::double precision AS observed_0,
        COALESCE(r.after < %(window_0)s, false)::integer::double precision AS returned_0,
        COALESCE(r.first_at + %(window_1)s <= %(observed_until)s, false)::integer::double precision AS observed_1,
        (COALESCE(r.first_at + %(window_1)s <= %(observed_until)s, false) AND r.after IS NOT NULL)
            ::integer::double precision AS returned_1,
        COALESCE(s.csat, 0)::double precision AS csat,
        (s.csat IS NOT NULL)::integer::double precision AS csat_answers,
        CASE WHEN s.nps >= 9 THEN 100.0 WHEN s.nps <= 6 THEN -100.0 ELSE 0.0 END::double precision AS nps,
        (s.nps IS NOT NULL)::integer::double precision AS nps_answers
    FROM exposed AS p
    LEFT JOIN acted AS a ON a.variant = p.variant AND a.user_key = p.user_key
    LEFT JOIN returned AS r ON r.variant = p.variant AND r.user_key = p.user_key
    LEFT JOIN surveyed AS s ON s.variant = p.variant AND s.user_key = p.user_key
)
SELECT variant, count(*) AS people, (SELECT currency_code FROM currency) AS currency_code, {sums}
FROM people
GROUP BY variant
"""


class PostgresExperiments:
    """The ExperimentStore."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(self, experiment: Experiment) -> Experiment:
        """Stores an experiment; returns the stored one when it is the same."""
        try:
            with self._database.begin() as connection:
                connection.execute(sa.insert(experiments).values(_row_of(experiment)))
            return experiment
        except sa.exc.IntegrityError as error:
            if not isinstance(error.orig, UniqueViolation):
                raise
        stored = self._find(experiment.experiment_id)
        if stored is not None:
            if stored.same_definition(experiment):
                return stored
            raise AlreadyExists(
                "EXPERIMENT_ALREADY_EXISTS",
                f"Another experiment is called {experiment.experiment_id!r}; choose another id.",
                {"experimentId": experiment.experiment_id},
            )
        running = self.list_running(experiment.placement)
        raise FailedPrecondition(
            "PLACEMENT_TAKEN",
            f"Another experiment runs on the shelf {experiment.placement!r}; stop it first.",
            {
                "placement": experiment.placement,
                "experimentId": running[0].experiment_id if running else "",
            },
        )

    def get(self, experiment_id: str) -> Experiment:
        """Returns an experiment; raises NotFound."""
        experiment = self._find(experiment_id)
        if experiment is None:
            raise NotFound(
                "EXPERIMENT_NOT_FOUND",
                f"No experiment is called {experiment_id!r}.",
                {"experimentId": experiment_id},
            )
        return experiment

    def list_newest(
        self,
        placement: str,
        state: State | None,
        after: tuple[datetime, str] | None,
        limit: int,
    ) -> list[Experiment]:
        """Returns experiments, newest first, that come after a key (created_at, experiment_id)."""
        c = experiments.c
        query = sa.select(experiments).order_by(c.created_at.desc(), c.experiment_id.desc()).limit(limit)
        if placement:
            query = query.where(c.placement == placement)
        if state is not None:
            query = query.where(c.state == int(state))
        if after is not None:
            query = query.where(sa.tuple_(c.created_at, c.experiment_id) < sa.tuple_(*after))
        with self._database.begin() as connection:
            return [_experiment_of(row) for row in connection.execute(query).mappings()]

    def list_running(self, placement: str = "") -> list[Experiment]:
        """Returns the experiments that run, of one shelf or of all."""
        return self.list_newest(placement, State.RUNNING, None, 10_000)

    def stop(
        self, experiment_id: str, expected_version: int | None, cause: StopCause, now: datetime
    ) -> Experiment:
        """Stops an experiment and returns it; one that has stopped stays as it is."""
        c = experiments.c
        statement = (
            sa.update(experiments)
            .where(c.experiment_id == experiment_id, c.state == int(State.RUNNING))
            .values(state=int(State.STOPPED), stopped_at=now, stop_cause=int(cause), version=c.version + 1)
            .returning(experiments)
        )
        if expected_version is not None:
            statement = statement.where(c.version == expected_version)
        with self._database.begin() as connection:
            row = connection.execute(statement).mappings().first()
        if row is not None:
            return _experiment_of(row)
        experiment = self.get(experiment_id)
        if experiment.state is State.RUNNING:
            raise Aborted(
                "STALE_ETAG",
                "The experiment was changed since it was read; read it again.",
                {"experimentId": experiment_id},
            )
        return experiment

    def observe(self, experiment: Experiment, observed_until: datetime) -> Observation:
        """Returns what was seen of an experiment while it ran, and of its people's return until a moment."""
        end = experiment.stopped_at or observed_until
        over = experiment.created_at <= observed_until - RETENTION_WINDOWS[0]
        question = (_PEOPLE + (_RETURNS if over else _NO_RETURNS) + _SUMS).format(
            sums=", ".join(_sums_of(metric) for metric in _EARNED_AND_CHANCES),
            page_view=int(EventKind.PAGE_VIEW),
            click=int(EventKind.RECOMMENDATION_CLICK),
            add_to_cart=int(EventKind.ADD_TO_CART),
            purchase=int(EventKind.PURCHASE),
            survey=int(EventKind.SURVEY),
        )
        parameters = {
            "labels": experiment.labels,
            "start": experiment.created_at,
            "end": end,
            "observed_until": observed_until,
            "from": RETENTION_FROM,
            "window_0": RETENTION_WINDOWS[0],
            "window_1": RETENTION_WINDOWS[1],
        }
        with self._database.connect() as connection:
            begin_analysis(connection)
            cursor = connection.cursor(row_factory=dict_row)
            rows = {
                row["variant"]: row for row in cursor.execute(trusted_sql(question), parameters).fetchall()
            }
        currency = next((row["currency_code"] for row in rows.values()), None)
        return Observation([_observation_of(rows.get(label)) for label in experiment.labels], currency or "")

    def _find(self, experiment_id: str) -> Experiment | None:
        with self._database.begin() as connection:
            row = (
                connection.execute(sa.select(experiments).where(experiments.c.experiment_id == experiment_id))
                .mappings()
                .first()
            )
        return _experiment_of(row) if row is not None else None


def _sums_of(metric: Metric) -> str:
    x, n = _EARNED_AND_CHANCES[metric]
    m = metric.name.lower()
    return (
        f"count(*) FILTER (WHERE {x} <> 0 OR {n} <> 0) AS {m}_people, "
        f"count(*) FILTER (WHERE {x} <> 0) AS {m}_earners, "
        f"sum({x}) AS {m}_x, sum({n}) AS {m}_n, "
        f"sum({x} * {x}) AS {m}_xx, sum({x} * {n}) AS {m}_xn, sum({n} * {n}) AS {m}_nn"
    )


def _observation_of(row: Mapping[str, Any] | None) -> VariantObservation:
    if row is None:
        return VariantObservation()
    sums = {
        metric: ClusteredSums(
            *(
                row[f"{metric.name.lower()}_{part}"]
                for part in ("people", "earners", "x", "n", "xx", "xn", "nn")
            )
        )
        for metric in _EARNED_AND_CHANCES
    }
    return VariantObservation(row["people"], sums)


def _row_of(experiment: Experiment) -> dict[str, Any]:
    return {
        "experiment_id": experiment.experiment_id,
        "display_name": experiment.display_name,
        "placement": experiment.placement,
        "salt": experiment.salt,
        "traffic_fraction": experiment.traffic_fraction,
        "variants": [
            {
                "variant_id": variant.variant_id,
                "weight": variant.weight,
                "serving_config": variant.serving_config,
            }
            for variant in experiment.variants
        ],
        "primary_metric": int(experiment.primary_metric),
        "guard_rails": [
            {"metric": int(guard_rail.metric), "tolerated_loss": guard_rail.tolerated_loss}
            for guard_rail in experiment.guard_rails
        ],
        "expected_people": experiment.expected_people,
        "report_only": experiment.report_only,
        "state": int(experiment.state),
        "created_at": experiment.created_at,
        "version": experiment.version,
    }


def _experiment_of(row: Mapping[Any, Any]) -> Experiment:
    variants: Sequence[dict[str, Any]] = row["variants"]
    guard_rails: Sequence[dict[str, Any]] = row["guard_rails"]
    return Experiment(
        experiment_id=row["experiment_id"],
        placement=row["placement"],
        variants=[
            VariantShare(variant["variant_id"], float(variant["weight"]), variant["serving_config"])
            for variant in variants
        ],
        salt=row["salt"],
        created_at=row["created_at"],
        display_name=row["display_name"],
        traffic_fraction=row["traffic_fraction"],
        primary_metric=Metric(row["primary_metric"]),
        guard_rails=[
            GuardRail(Metric(guard_rail["metric"]), float(guard_rail["tolerated_loss"]))
            for guard_rail in guard_rails
        ],
        expected_people=row["expected_people"],
        report_only=row["report_only"],
        state=State(row["state"]),
        stopped_at=row["stopped_at"],
        stop_cause=StopCause(row["stop_cause"]) if row["stop_cause"] is not None else None,
        version=row["version"],
    )
