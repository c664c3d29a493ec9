"""Counts of the whole log by item, made where the log lies: one row an item comes out."""

from __future__ import annotations

import numpy as np

from services.profile.domain.item_figures import POPULARITY_HALF_LIFE_DAYS, Baskets, ItemCounts
from services.profile.domain.portrait_fold import INTEREST_OF_KIND
from services.profile.storage.snapshots import snapshot_of
from shared.database import Database, trusted_sql
from shared.event_kinds import EventKind

MAX_LINES = 2_000_000
CHUNK_ROWS = 50_000
_WEIGHT = (
    "CASE kind " + " ".join(f"WHEN {int(k)} THEN {w}" for k, w in INTEREST_OF_KIND.items()) + " ELSE 0 END"
)
_KINDS = ", ".join(str(int(kind)) for kind in INTEREST_OF_KIND)
_COUNTS = trusted_sql(f"""
    SELECT item_id,
        count(*) FILTER (WHERE kind IN ({_KINDS})),
        coalesce(sum({_WEIGHT} * power(2.0, greatest(-1000, least(0,
            -extract(epoch FROM (to_timestamp(%(now)s) - occurred_at)) / 86400 / {POPULARITY_HALF_LIFE_DAYS})))), 0)::float8,
        count(*) FILTER (WHERE kind = {int(EventKind.ITEM_VIEW)}),
        count(*) FILTER (WHERE kind = {int(EventKind.PURCHASE)}),
        count(*) FILTER (WHERE kind = {int(EventKind.RETURN)}),
        count(value) FILTER (WHERE kind = {int(EventKind.RATING)} AND value BETWEEN 1 AND 5),
        coalesce(sum(value) FILTER (WHERE kind = {int(EventKind.RATING)} AND value BETWEEN 1 AND 5), 0)::float8
    FROM feedback.events_v1 WHERE item_id IS NOT NULL AND NOT is_bot AND personalisation GROUP BY item_id
""")  # noqa: S608
_LINES = trusted_sql(f"""
    SELECT string_agg(uuid_send(event_key), ''::bytea), array_agg(item_id) FROM (
        SELECT event_key, item_id, (row_number() OVER () - 1) / {CHUNK_ROWS} AS chunk FROM (
            SELECT event_key, item_id FROM feedback.events_v1
            WHERE kind = {int(EventKind.PURCHASE)} AND item_id IS NOT NULL AND NOT is_bot AND personalisation
            ORDER BY event_key DESC LIMIT {MAX_LINES}
        ) AS newest
    ) AS numbered GROUP BY chunk
""")  # noqa: S608


class PostgresItemFigures:
    """Implements `ports.ItemFigures`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def read(self, now_us: int) -> tuple[dict[str, ItemCounts], Baskets]:
        """See `ItemFigures.read`."""
        with snapshot_of(self._database) as (connection, _):
            rows = connection.execute(_COUNTS, {"now": now_us / 1e6}).fetchall()
            chunks = connection.execute(_LINES, binary=True).fetchall()
        counts = {row[0]: ItemCounts(*row[1:]) for row in rows}
        item_ids: dict[str, int] = {}
        items = np.fromiter(
            (item_ids.setdefault(item_id, len(item_ids)) for _, texts in chunks for item_id in texts),
            np.int64,
        )
        keys = np.frombuffer(b"".join(bytes(packed) for packed, _ in chunks), "V16")
        _, orders = np.unique(keys, return_inverse=True) if len(keys) else (keys, np.empty(0, np.int64))
        return counts, Baskets.of(orders.astype(np.int64), items, list(item_ids))
