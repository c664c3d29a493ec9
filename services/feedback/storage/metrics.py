"""Counts over attributed events."""

from __future__ import annotations

from typing import Any

from psycopg.rows import dict_row

from services.feedback.domain.metrics import Counts, MetricsQuery, RevenueSums
from shared.database import Database, trusted_sql
from shared.event_kinds import EventKind

# One row for each (recommendation, item, kind): a repeated click is one click, a repeated page view one impression.
# Lines that did not stand in the recommendation earn it nothing.
_PAIRS = """
WITH attributed AS (
    SELECT e.* FROM feedback.events AS e
    WHERE e.recommendation_id IS NOT NULL
        AND e.occurred_at >= %(start)s AND e.occurred_at < %(end)s
        AND NOT e.is_bot AND e.quarantine_reason IS NULL
        {filters}
),
touched AS (
    SELECT {dimensions} e.recommendation_id, e.kind, i.item_id, NULL::text AS currency_code,
        NULL::double precision AS revenue
    FROM attributed AS e
    CROSS JOIN LATERAL unnest(e.impression_items, e.impression_propensities) AS i (item_id, propensity)
    WHERE e.kind = {page_view} AND i.propensity IS NOT NULL
    UNION ALL
    SELECT {dimensions} e.recommendation_id, e.kind, e.item_id, NULL, NULL
    FROM attributed AS e
    WHERE e.kind IN ({click}, {add_to_cart}) AND e.position IS NOT NULL
    UNION ALL
    SELECT {dimensions} e.recommendation_id, e.kind, l.item_id, e.currency_code,
        l.quantity::double precision * l.price_micros
    FROM attributed AS e
    CROSS JOIN LATERAL unnest(e.line_items, e.line_quantities, e.line_prices, e.line_positions)
        AS l (item_id, quantity, price_micros, position)
    WHERE e.kind = {purchase} AND l.position IS NOT NULL
),
pairs AS (
    SELECT {names} recommendation_id, kind, item_id, currency_code, sum(revenue) AS revenue
    FROM touched
    GROUP BY {names} recommendation_id, kind, item_id, currency_code
)
"""
_COUNTS = """
SELECT {names}
    count(DISTINCT recommendation_id) AS recommendations,
    count(*) FILTER (WHERE kind = {page_view}) AS impressions,
    count(*) FILTER (WHERE kind = {click}) AS clicks,
    count(*) FILTER (WHERE kind = {add_to_cart}) AS add_to_carts,
    count(DISTINCT (recommendation_id, item_id)) FILTER (WHERE kind = {purchase}) AS purchases,
    count(DISTINCT item_id) FILTER (WHERE kind = {page_view}) AS distinct_items
FROM pairs
{group_by}
ORDER BY impressions DESC, {names} recommendations DESC
"""
_REVENUES = """
SELECT {names} currency_code, LEAST(sum(revenue), 9.2e18)::bigint AS total_micros, sum((revenue / 1e6) ^ 2) AS total_squares
FROM pairs
WHERE revenue IS NOT NULL
GROUP BY {names} currency_code
ORDER BY total_micros DESC
"""


class PostgresMetrics:
    """The MetricsStore."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def count(self, query: MetricsQuery) -> list[Counts]:
        """Returns one entry for each group that has events, most impressions first."""
        names = [dimension.value for dimension in query.group_by]
        parts = {
            # Only names of the enumeration enter the text; values are parameters.
            "dimensions": "".join(f"COALESCE(e.{name}, '') AS {name}, " for name in names),
            "names": "".join(f"{name}, " for name in names),
            "group_by": f"GROUP BY {', '.join(names)}" if names else "",
            "filters": "".join(f"AND e.{d.value} = %({d.value})s " for d, _ in query.equal),
            "page_view": int(EventKind.PAGE_VIEW),
            "click": int(EventKind.RECOMMENDATION_CLICK),
            "add_to_cart": int(EventKind.ADD_TO_CART),
            "purchase": int(EventKind.PURCHASE),
        }
        parameters: dict[str, Any] = {"start": query.start, "end": query.end}
        parameters |= {dimension.value: value for dimension, value in query.equal}
        with self._database.connect() as connection:
            # Both questions of one snapshot, or revenue and impressions would not belong together.
            connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
            cursor = connection.cursor(row_factory=dict_row)
            rows = cursor.execute(trusted_sql((_PAIRS + _COUNTS).format(**parts)), parameters).fetchall()
            money = cursor.execute(trusted_sql((_PAIRS + _REVENUES).format(**parts)), parameters).fetchall()
        counts: dict[tuple[str, ...], Counts] = {}
        for row in rows:
            group = {dimension: row[dimension.value] for dimension in query.group_by}
            counts[tuple(group.values())] = Counts(
                group,
                row["recommendations"],
                row["impressions"],
                row["clicks"],
                row["add_to_carts"],
                row["purchases"],
                row["distinct_items"],
            )
        for row in money:
            counts[tuple(row[name] for name in names)].revenues.append(
                RevenueSums(row["currency_code"], int(row["total_micros"]), float(row["total_squares"]))
            )
        # Without a dimension SQL answers with one row of zeros; nothing happened, so nothing is reported.
        return [entry for entry in counts.values() if entry.recommendations]
