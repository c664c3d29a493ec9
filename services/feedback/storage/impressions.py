"""Impressions with their propensities, read from the log as arrays."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import numpy as np

from services.feedback.domain.metrics import Metric
from services.feedback.domain.off_policy import LoggedImpressions
from services.feedback.storage.metrics import begin_analysis
from shared.database import Database, trusted_sql
from shared.errors import FailedPrecondition
from shared.event_kinds import EventKind

MAX_IMPRESSIONS = 1_000_000
_ROWS_AT_ONCE = 20_000
_PER_MILLE = 1_000.0
# Seen again is shown once. What an impression earned may come after the range.
_IMPRESSIONS = """
WITH shown AS (
    SELECT DISTINCT ON (e.recommendation_id, i.item_id)
        e.recommendation_id, i.item_id, e.user_key, i.position, i.propensity
    FROM feedback.events AS e
    CROSS JOIN LATERAL unnest(e.impression_items, e.impression_positions, e.impression_propensities)
        AS i (item_id, position, propensity)
    WHERE e.kind = {page_view} AND e.recommendation_id IS NOT NULL AND e.placement = %(placement)s
        AND e.occurred_at >= %(start)s AND e.occurred_at < %(end)s
        AND NOT e.is_bot AND e.quarantine_reason IS NULL
        AND i.propensity > 0 AND i.propensity <= 1
    ORDER BY e.recommendation_id, i.item_id, e.occurred_at, e.event_key
    LIMIT {limit}
),
earned AS (
{earned}
)
SELECT s.user_key, s.item_id, s.position, s.propensity, COALESCE(r.reward, 0)::double precision, s.recommendation_id
FROM shown AS s
LEFT JOIN earned AS r ON r.recommendation_id = s.recommendation_id AND r.item_id = s.item_id
"""
_ACTED = """
    SELECT DISTINCT e.recommendation_id, e.item_id, 1.0::double precision AS reward
    FROM feedback.events AS e
    WHERE e.kind = {kind} AND e.position IS NOT NULL AND {attributed}
"""
_LINES = """
    SELECT e.recommendation_id, l.item_id, {reward} AS reward
    FROM feedback.events AS e
    CROSS JOIN LATERAL unnest(e.line_items, e.line_quantities, e.line_prices, e.line_positions)
        AS l (item_id, quantity, price_micros, position)
    WHERE e.kind = {kind} AND l.position IS NOT NULL AND {attributed} {currency}
    GROUP BY e.recommendation_id, l.item_id
"""
_ATTRIBUTED = (
    "e.recommendation_id IS NOT NULL AND e.placement = %(placement)s AND e.occurred_at >= %(start)s "
    "AND NOT e.is_bot AND e.quarantine_reason IS NULL"
)
_CURRENCY = """
SELECT e.currency_code FROM feedback.events AS e
WHERE e.kind = {kind} AND e.currency_code IS NOT NULL AND {attributed}
GROUP BY e.currency_code ORDER BY count(*) DESC, e.currency_code LIMIT 1
"""


class PostgresImpressions:
    """The ImpressionStore."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def read(self, placement: str, start: datetime, end: datetime, reward: Metric) -> LoggedImpressions:
        """Returns the impressions of a shelf, each with what it earned; raises FailedPrecondition."""
        parameters: dict[str, Any] = {"placement": placement, "start": start, "end": end, "currency": None}
        with self._database.connect() as connection:
            begin_analysis(connection)
            if reward is Metric.REVENUE_PER_MILLE:
                question = _CURRENCY.format(kind=int(EventKind.PURCHASE), attributed=_ATTRIBUTED)
                found = connection.execute(trusted_sql(question), parameters).fetchone()
                parameters["currency"] = found[0] if found else None
            question = _IMPRESSIONS.format(
                page_view=int(EventKind.PAGE_VIEW), earned=_earned(reward), limit=MAX_IMPRESSIONS + 1
            )
            reader = _ImpressionReader()
            # A cursor of the server's: a million rows are never held as objects.
            with connection.cursor("impressions") as cursor:
                cursor.execute(trusted_sql(question), parameters)
                while rows := cursor.fetchmany(_ROWS_AT_ONCE):
                    reader.add(rows)
        if reader.count > MAX_IMPRESSIONS:
            raise FailedPrecondition(
                "TOO_MANY_IMPRESSIONS",
                f"The range holds more than {MAX_IMPRESSIONS} impressions; narrow it.",
                {"limit": str(MAX_IMPRESSIONS)},
            )
        return reader.impressions(parameters["currency"] or "")


class _ImpressionReader:
    """Gathers rows into arrays, and numbers people and items in the order of their appearance."""

    def __init__(self) -> None:
        self.count = 0
        self._person_of: dict[bytes, int] = {}
        self._item_of: dict[str, int] = {}
        self._numbers: list[np.ndarray[Any, Any]] = []
        self._amounts: list[np.ndarray[Any, Any]] = []

    def add(self, rows: list[Any]) -> None:
        person_of, item_of = self._person_of, self._item_of
        users, items, positions, propensities, rewards, recommendations = zip(*rows, strict=True)
        self._numbers.append(
            np.array(
                [
                    [person_of.setdefault(user, len(person_of)) for user in users],
                    [item_of.setdefault(item, len(item_of)) for item in items],
                    positions,
                    np.frombuffer(b"".join(recommendations), ">i8"),
                ],
                np.int64,
            )
        )
        self._amounts.append(np.array([propensities, rewards], np.float64))
        self.count += len(rows)

    def impressions(self, currency_code: str) -> LoggedImpressions:
        numbers = np.concatenate(self._numbers, axis=1) if self._numbers else np.zeros((4, 0), np.int64)
        amounts = np.concatenate(self._amounts, axis=1) if self._amounts else np.zeros((2, 0))
        person_N, item_N, position_N, recommendation_N = numbers
        propensity_N, reward_N = amounts
        return LoggedImpressions(
            items=list(self._item_of),
            item_N=item_N,
            position_N=position_N,
            propensity_N=propensity_N,
            reward_N=reward_N,
            person_N=person_N,
            recommendation_N=recommendation_N,
            currency_code=currency_code,
        )


def _earned(reward: Metric) -> str:
    purchase = int(EventKind.PURCHASE)
    if reward is Metric.CLICK_THROUGH_RATE:
        return _ACTED.format(kind=int(EventKind.RECOMMENDATION_CLICK), attributed=_ATTRIBUTED)
    if reward is Metric.ADD_TO_CART_RATE:
        return _ACTED.format(kind=int(EventKind.ADD_TO_CART), attributed=_ATTRIBUTED)
    if reward is Metric.CONVERSION_RATE:
        return _LINES.format(
            kind=purchase, attributed=_ATTRIBUTED, reward="1.0::double precision", currency=""
        )
    money = f"{_PER_MILLE} * sum(l.quantity::double precision * l.price_micros / 1e6)"
    return _LINES.format(
        kind=purchase,
        attributed=_ATTRIBUTED,
        reward=money,
        currency="AND e.currency_code = %(currency)s::text AND l.price_micros IS NOT NULL",
    )
