"""Everybody's purchases and returns as columns, read through feedback's views.

Postgres packs a line into 61 bytes; items and orders travel as numbers, and no object a row is made.
"""

from __future__ import annotations

import numpy as np

from services.profile.domain.purchase_log import PurchaseLog
from services.profile.ports import PurchaseHistory
from services.profile.storage.snapshots import snapshot_of
from shared.database import Database, trusted_sql
from shared.event_kinds import EventKind

CHUNK_ROWS = 50_000
_POSTGRES_EPOCH_US = 946_684_800_000_000
_NO_PRICE = -(2**63)

_ROW = np.dtype(
    [
        ("user", "V16"),
        ("order", "V16"),
        ("kind", ">i2"),
        ("occurred_at", ">i8"),
        ("item", ">i8"),
        ("quantity", ">f4"),
        ("price_micros", ">i8"),
    ]
)
_KINDS = f"kind IN ({int(EventKind.PURCHASE)}, {int(EventKind.RETURN)})"
# Who may be learnt from, and who may be spoken of, are two questions with two answers.
_SOURCE = {
    True: f"feedback.training_events_v1 WHERE {_KINDS}",
    False: f"feedback.events_v1 AS e WHERE {_KINDS} AND personalisation AND NOT is_bot AND NOT EXISTS "
    "(SELECT FROM feedback.tombstones_v1 AS t WHERE t.user_key = e.user_key)",
}


class PostgresPurchases:
    """Reads the log of purchases; implements `ports.Purchases`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def read(self, *, for_training: bool, before_us: int) -> PurchaseHistory:
        """See `Purchases.read`."""
        source = f"{_SOURCE[for_training]} AND occurred_at < to_timestamp(%(before)s)"
        with snapshot_of(self._database) as (connection, _):
            main = connection.execute(
                trusted_sql(
                    f"SELECT currency_code FROM {source} AND currency_code IS NOT NULL "  # noqa: S608
                    "GROUP BY 1 ORDER BY count(*) DESC, 1 LIMIT 1"
                ),
                {"before": before_us / 1e6},
            ).fetchone()
            currency = str(main[0]) if main else ""
            chunks = connection.execute(
                trusted_sql(f"""
                    SELECT string_agg(user_key || uuid_send(event_key) || int2send(kind)
                        || timestamptz_send(occurred_at) || int8send(hashtextextended(coalesce(item_id, ''), 0))
                        || float4send(coalesce(quantity, 1::real))
                        || int8send(CASE WHEN currency_code = %(currency)s THEN coalesce(price_micros, {_NO_PRICE})
                                    ELSE {_NO_PRICE} END), ''::bytea)
                    FROM (SELECT *, (row_number() OVER () - 1) / {CHUNK_ROWS} AS chunk FROM (
                        SELECT coalesce(m.user_key, bought.user_key) AS user_key, event_key, kind, occurred_at,
                            item_id, quantity, price_micros, currency_code
                        FROM (SELECT * FROM {source}) AS bought
                        LEFT JOIN profile.merged_users AS m ON m.anonymous_key = bought.user_key
                        WHERE m.anonymous_key IS NULL OR m.user_key IS NOT NULL
                        ORDER BY occurred_at, event_key, line) AS lines) AS numbered
                    GROUP BY chunk ORDER BY chunk
                """),  # noqa: S608
                {"before": before_us / 1e6, "currency": currency},
                binary=True,
            ).fetchall()
        rows = np.frombuffer(b"".join(bytes(packed) for (packed,) in chunks), _ROW)
        keys, user = _numbered(rows["user"])
        _, order = _numbered(rows["order"])
        _, item = np.unique(rows["item"], return_inverse=True)
        quantity = rows["quantity"].astype(np.float64)
        quantity = np.clip(np.where(np.isfinite(quantity), quantity, 1.0), 0.0, 1e9)
        priced = rows["price_micros"] != _NO_PRICE
        price = np.where(priced, rows["price_micros"], 0).astype(np.float64) / 1e6
        log = PurchaseLog(
            user,
            rows["occurred_at"].astype(np.int64) + _POSTGRES_EPOCH_US,
            order,
            item.astype(np.int64),
            np.maximum(price * quantity, 0.0),
            quantity,
            rows["kind"] == int(EventKind.RETURN),
            len(keys),
        )
        return PurchaseHistory(log, keys, currency)


def _numbered(ids_N: np.ndarray) -> tuple[list[bytes], np.ndarray]:
    """Returns the distinct ids, ascending, and the number of each row's."""
    if not len(ids_N):
        return [], np.empty(0, np.int64)
    halves = np.ascontiguousarray(ids_N).view(">u8").reshape(-1, 2).astype(np.uint64)
    order = np.lexsort((halves[:, 1], halves[:, 0]))
    ranked = halves[order]
    new = np.r_[True, (ranked[1:] != ranked[:-1]).any(axis=1)]
    number = np.empty(len(ids_N), np.int64)
    number[order] = np.cumsum(new) - 1
    packed = ranked[new].astype(">u8").tobytes()
    return [packed[at : at + 16] for at in range(0, len(packed), 16)], number
