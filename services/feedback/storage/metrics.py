"""Counts over attributed events."""

from __future__ import annotations

import uuid
from datetime import datetime
from typing import Any

import psycopg
from psycopg.rows import dict_row

from services.feedback.domain.metrics import (
    RETENTION_FROM,
    RETENTION_WINDOWS,
    SURVEY_CREDIT_WINDOW,
    Counts,
    Measurement,
    MetricsQuery,
    ReturnCounts,
    RevenueSums,
    SurveySums,
)
from shared.database import Database, trusted_sql
from shared.event_kinds import EventKind

# Read by several branches, each of which wants other columns of other rows: one wide copy would go through the disk.
_ATTRIBUTED = """
WITH attributed AS NOT MATERIALIZED (
    SELECT e.* FROM feedback.events AS e
    WHERE e.recommendation_id IS NOT NULL
        AND e.occurred_at >= %(start)s AND e.occurred_at < %(end)s
        AND NOT e.is_bot AND e.quarantine_reason IS NULL
        {filters}
),
"""
# One row for each (recommendation, item, kind): a repeated click is one click, a repeated page view one impression.
# Lines that did not stand in the recommendation earn it nothing.
_PAIRS = """
touched AS (
    SELECT {dimensions} e.recommendation_id, e.kind, i.item_id
    FROM attributed AS e
    CROSS JOIN LATERAL unnest(e.impression_items, e.impression_propensities) AS i (item_id, propensity)
    WHERE e.kind = {page_view} AND i.propensity IS NOT NULL
    UNION ALL
    SELECT {dimensions} e.recommendation_id, e.kind, e.item_id
    FROM attributed AS e
    WHERE e.kind IN ({click}, {add_to_cart}) AND e.position IS NOT NULL
    UNION ALL
    SELECT {dimensions} e.recommendation_id, e.kind, l.item_id
    FROM attributed AS e
    CROSS JOIN LATERAL unnest(e.line_items, e.line_positions) AS l (item_id, position)
    WHERE e.kind = {purchase} AND l.position IS NOT NULL
),
pairs AS (
    SELECT {names} recommendation_id, kind, item_id
    FROM touched
    GROUP BY {names} recommendation_id, kind, item_id
)
"""
_COUNTS = """
SELECT {names}
    count(DISTINCT recommendation_id) AS recommendations,
    count(*) FILTER (WHERE kind = {page_view}) AS impressions,
    count(*) FILTER (WHERE kind = {click}) AS clicks,
    count(*) FILTER (WHERE kind = {add_to_cart}) AS add_to_carts,
    count(*) FILTER (WHERE kind = {purchase}) AS purchases,
    count(DISTINCT item_id) FILTER (WHERE kind = {page_view}) AS distinct_items
FROM pairs
{group_by}
ORDER BY impressions DESC, {names} recommendations DESC
"""
_REVENUES = """
revenues AS (
    SELECT {dimensions} e.recommendation_id, l.item_id, e.currency_code,
        sum(l.quantity::double precision * l.price_micros) AS revenue
    FROM attributed AS e
    CROSS JOIN LATERAL unnest(e.line_items, e.line_quantities, e.line_prices, e.line_positions)
        AS l (item_id, quantity, price_micros, position)
    WHERE e.kind = {purchase} AND l.position IS NOT NULL AND l.price_micros IS NOT NULL
    GROUP BY {positions} e.recommendation_id, l.item_id, e.currency_code
)
SELECT {names} currency_code, LEAST(sum(revenue), 9.2e18)::bigint AS total_micros, sum((revenue / 1e6) ^ 2) AS total_squares
FROM revenues
GROUP BY {names} currency_code
ORDER BY total_micros DESC
"""
# The person's first event of the group begins their window; only windows that are over are counted, whether they
# came back or not, or the quick ones would count before the slow.
_RETURNS = """
WITH people AS (
    SELECT {dimensions} e.user_key, min(e.occurred_at) AS first_at
    FROM feedback.events AS e
    WHERE e.recommendation_id IS NOT NULL
        AND e.occurred_at >= %(start)s AND e.occurred_at < %(end)s
        AND NOT e.is_bot AND e.quarantine_reason IS NULL
        {filters}
    GROUP BY {positions} e.user_key
),
returns AS (
    SELECT {names_of_p} p.user_key, p.first_at, min(e.occurred_at) - p.first_at AS returned_after
    FROM people AS p
    LEFT JOIN feedback.events AS e
        ON e.user_key = p.user_key
        AND e.occurred_at >= p.first_at + %(from)s AND e.occurred_at < p.first_at + %(window_1)s
        AND e.occurred_at >= %(start)s + %(from)s AND e.occurred_at < %(observed_until)s
        AND NOT e.is_bot AND e.quarantine_reason IS NULL
    WHERE p.first_at + %(window_0)s <= %(observed_until)s
    GROUP BY {names_of_p} p.user_key, p.first_at
)
SELECT {names}
    count(*) AS people_0,
    count(*) FILTER (WHERE returned_after < %(window_0)s) AS returned_0,
    count(*) FILTER (WHERE first_at + %(window_1)s <= %(observed_until)s) AS people_1,
    count(returned_after) FILTER (WHERE first_at + %(window_1)s <= %(observed_until)s) AS returned_1
FROM returns
{group_by}
"""
_SURVEYS = """
WITH credited AS (
    SELECT s.user_key, s.occurred_at, s.event_key, s.value AS csat, (s.attributes ->> 'nps')::integer AS nps, r.*
    FROM feedback.events AS s
    CROSS JOIN LATERAL (
        SELECT s.placement, s.serving_config, s.model_version, s.variant
        WHERE s.recommendation_id IS NOT NULL
        UNION ALL
        (
            SELECT a.placement, a.serving_config, a.model_version, a.variant
            FROM feedback.events AS a
            WHERE s.recommendation_id IS NULL
                AND a.user_key = s.user_key AND a.recommendation_id IS NOT NULL
                AND a.occurred_at <= s.occurred_at AND a.occurred_at > s.occurred_at - %(credit)s
                AND NOT a.is_bot AND a.quarantine_reason IS NULL
            ORDER BY a.occurred_at DESC, a.event_key DESC
            LIMIT 1
        )
    ) AS r
    WHERE s.kind = {survey}
        AND s.occurred_at >= %(start)s AND s.occurred_at < %(end)s
        AND NOT s.is_bot AND s.quarantine_reason IS NULL
),
answers AS (
    SELECT {dimensions}
        (array_agg(e.csat ORDER BY e.occurred_at DESC, e.event_key DESC) FILTER (WHERE e.csat IS NOT NULL))[1] AS csat,
        (array_agg(e.nps ORDER BY e.occurred_at DESC, e.event_key DESC) FILTER (WHERE e.nps IS NOT NULL))[1] AS nps
    FROM credited AS e
    WHERE true {filters}
    GROUP BY {positions} e.user_key
)
SELECT {names}
    count(csat) AS csat_people,
    COALESCE(sum(csat), 0)::double precision AS csat_total,
    COALESCE(sum(csat::double precision ^ 2), 0) AS csat_squares,
    count(nps) AS nps_people,
    count(*) FILTER (WHERE nps >= 9) AS promoters,
    count(*) FILTER (WHERE nps <= 6) AS detractors
FROM answers
{group_by}
"""
# The key begins with the time, and bounds what must be read; a day's grace for clients that name events early.
_KNOWN_ITEMS = """
SELECT count(*) AS known_items FROM (
    SELECT DISTINCT i.item_id
    FROM feedback.events AS e
    CROSS JOIN LATERAL unnest(COALESCE(e.line_items, e.impression_items, ARRAY[e.item_id])) AS i (item_id)
    WHERE e.event_key >= %(first_key)s AND e.occurred_at >= %(start)s AND e.occurred_at < %(end)s
        AND e.quarantine_reason IS NULL AND i.item_id IS NOT NULL
) AS items
"""
_KEY_GRACE_MS = 86_400_000
_COUNT_NAMES = ("recommendations", "impressions", "clicks", "add_to_carts", "purchases", "distinct_items")
_SURVEY_NAMES = ("csat_people", "csat_total", "csat_squares", "nps_people", "promoters", "detractors")


def begin_analysis(connection: psycopg.Connection[Any]) -> None:
    """Makes all questions of the transaction see one moment, and gives them memory for large groupings."""
    connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
    connection.execute("SET LOCAL work_mem = '64MB'")


class PostgresMetrics:
    """The MetricsStore."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def measure(self, query: MetricsQuery) -> Measurement:
        """Returns one entry for each group that has events, most impressions first."""
        names = [dimension.value for dimension in query.group_by]
        parts = _parts(query, names)
        observed_until = query.observed_until or query.end
        parameters: dict[str, Any] = {
            "start": query.start,
            "end": query.end,
            "observed_until": observed_until,
            "from": RETENTION_FROM,
            "window_0": RETENTION_WINDOWS[0],
            "window_1": RETENTION_WINDOWS[1],
            "credit": SURVEY_CREDIT_WINDOW,
            "first_key": _first_key(query.start),
            "variants": list(query.variants),
        }
        parameters |= {dimension.value: value for dimension, value in query.equal}
        with self._database.connect() as connection:
            begin_analysis(connection)
            cursor = connection.cursor(row_factory=dict_row)

            def ask(question: str) -> list[dict[str, Any]]:
                return cursor.execute(trusted_sql(question.format(**parts)), parameters).fetchall()

            counts, revenues = ask(_ATTRIBUTED + _PAIRS + _COUNTS), ask(_ATTRIBUTED + _REVENUES)
            surveys = ask(_SURVEYS)
            # Nobody's first week can be over: the question is dear, and its answer known.
            over = query.start <= observed_until - RETENTION_WINDOWS[0]
            returns = ask(_RETURNS) if over else []
            known_items = query.catalogue_items or ask(_KNOWN_ITEMS)[0]["known_items"]
        groups = _groups(query, counts, surveys, returns)
        for row in revenues:
            groups[tuple(row[name] for name in names)].revenues.append(
                RevenueSums(row["currency_code"], int(row["total_micros"]), float(row["total_squares"]))
            )
        # Without a dimension SQL answers with one row of zeros; nothing happened, so nothing is reported.
        return Measurement(
            [
                group
                for group in groups.values()
                if group.recommendations or group.surveys.csat_people or group.surveys.nps_people
            ],
            known_items,
        )


def _parts(query: MetricsQuery, names: list[str]) -> dict[str, Any]:
    # Only names of the enumeration enter the text; values are parameters.
    return {
        "dimensions": "".join(f"COALESCE(e.{name}, '') AS {name}, " for name in names),
        "names": "".join(f"{name}, " for name in names),
        "names_of_p": "".join(f"p.{name}, " for name in names),
        "positions": "".join(f"{number + 1}, " for number in range(len(names))),
        "group_by": f"GROUP BY {', '.join(names)}" if names else "",
        "filters": "".join(f"AND e.{d.value} = %({d.value})s " for d, _ in query.equal)
        + ("AND e.variant = ANY(%(variants)s) " if query.variants else ""),
        "page_view": int(EventKind.PAGE_VIEW),
        "click": int(EventKind.RECOMMENDATION_CLICK),
        "add_to_cart": int(EventKind.ADD_TO_CART),
        "purchase": int(EventKind.PURCHASE),
        "survey": int(EventKind.SURVEY),
    }


def _groups(
    query: MetricsQuery,
    counts: list[dict[str, Any]],
    surveys: list[dict[str, Any]],
    returns: list[dict[str, Any]],
) -> dict[tuple[str, ...], Counts]:
    def key_of(row: dict[str, Any]) -> tuple[str, ...]:
        return tuple(row[dimension.value] for dimension in query.group_by)

    count_of, survey_of, return_of = (
        {key_of(row): row for row in rows} for rows in (counts, surveys, returns)
    )
    # Counts come in their order; a group may have surveys alone, its recommendations being older than the range.
    groups = {}
    for key in dict.fromkeys((*count_of, *survey_of)):
        count, survey, back = count_of.get(key), survey_of.get(key), return_of.get(key)
        group = dict(zip(query.group_by, key, strict=True))
        groups[key] = Counts(
            group,
            **({name: count[name] for name in _COUNT_NAMES} if count else {}),
            returns=_return_counts(back),
            surveys=SurveySums(**{name: survey[name] for name in _SURVEY_NAMES}) if survey else SurveySums(),
        )
    return groups


def _return_counts(row: dict[str, Any] | None) -> list[ReturnCounts]:
    if row is None:
        return [ReturnCounts()] * len(RETENTION_WINDOWS)
    return [ReturnCounts(row[f"people_{w}"], row[f"returned_{w}"]) for w in range(len(RETENTION_WINDOWS))]


def _first_key(start: datetime) -> uuid.UUID:
    return uuid.UUID(int=max(0, int(start.timestamp() * 1000) - _KEY_GRACE_MS) << 80)
