"""The statement that stores a batch of events, and its parameters: a binary array a column."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from services.feedback.domain.events import AppendVerdict, EventColumns
from services.feedback.storage import pg_arrays
from services.feedback.storage.pg_arrays import BinaryArray

# Column of the table, element type of the parameter, what is inserted of it.
_PARAMETERS: tuple[tuple[str, str, str], ...] = (
    ("event_key", "uuid", "u.event_key"),
    ("payload_digest", "bigint", "u.payload_digest"),
    ("user_key", "bytea", "u.user_key"),
    ("tombstone_key", "bytea", ""),
    ("kind", "smallint", "u.kind"),
    ("occurred_at", "timestamptz", "u.occurred_at"),
    ("session_key", "bytea", "u.session_key"),
    ("item_id", "text", "u.item_id"),
    ("quantity", "real", "u.quantity"),
    ("price_micros", "bigint", "u.price_micros"),
    ("currency_code", "text", "u.currency_code"),
    ("value", "real", "u.value"),
    ("device", "smallint", "u.device"),
    ("channel", "smallint", "u.channel"),
    ("consent", "smallint", "u.consent"),
    ("is_bot", "boolean", "COALESCE(u.is_bot, false)"),
    ("line_items", "text", "u.line_items::text[]"),
    ("line_quantities", "text", "u.line_quantities::real[]"),
    ("line_prices", "text", "u.line_prices::bigint[]"),
    ("line_positions", "text", "u.line_positions::integer[]"),
    ("impression_items", "text", "u.impression_items::text[]"),
    ("impression_positions", "text", "u.impression_positions::integer[]"),
    ("impression_propensities", "text", "u.impression_propensities::real[]"),
    ("recommendation_id", "bytea", "u.recommendation_id"),
    ("placement", "text", "u.placement"),
    ("serving_config", "text", "u.serving_config"),
    ("model_version", "text", "u.model_version"),
    ("variant", "text", "u.variant"),
    ("position", "integer", "u.position"),
    ("propensity", "real", "u.propensity"),
    ("quarantine_reason", "smallint", "u.quarantine_reason"),
    ("text", "bytea", "u.text"),
    ("attributes", "text", "u.attributes::jsonb"),
)
_ELEMENT = {name: element for name, element, _ in _PARAMETERS}

# Verdicts of rows that were not stored; of those that the statement cannot see the other row of.
UNSEEN = 0

# The rows must come by ascending key: two transactions that store the same keys wait for each other in one direction,
# never in a circle. Nothing here changes their order: `unnest` keeps it, and what it returns is filtered, not joined.
# Arrays that are empty or shorter are filled up with nulls by `unnest`: a column that no row uses costs nothing.
# `missing` is not even begun where all rows were stored. It sees the log as it was when the statement began: of a row
# that another transaction has stored since then there is nothing to be seen yet.
_INSERT = """
WITH forgotten AS MATERIALIZED (
    SELECT t.tombstone_key FROM feedback.tombstones AS t WHERE t.tombstone_key = ANY (%(tombstone_key)s::bytea[])
), stored AS (
    INSERT INTO feedback.events ({columns}, key_version)
    SELECT {values}, {{key_version}}
    FROM unnest({arrays}) AS u ({names})
    WHERE u.tombstone_key <> ALL (ARRAY(SELECT f.tombstone_key FROM forgotten AS f))
    ON CONFLICT (event_key) DO NOTHING
    RETURNING event_key
), missing AS MATERIALIZED (
    SELECT (m.number - 1)::integer AS number, m.payload_digest,
        m.tombstone_key = ANY (ARRAY(SELECT f.tombstone_key FROM forgotten AS f)) AS is_forgotten,
        (SELECT e.payload_digest FROM feedback.events AS e WHERE e.event_key = m.event_key) AS stored_digest
    FROM unnest(%(event_key)s::uuid[], %(payload_digest)s::bigint[], %(tombstone_key)s::bytea[])
        WITH ORDINALITY AS m (event_key, payload_digest, tombstone_key, number)
    WHERE (SELECT count(*) FROM stored) < %(rows)s AND m.event_key NOT IN (SELECT s.event_key FROM stored AS s)
)
SELECT
    pg_current_xact_id()::text,
    array_agg(m.number),
    array_agg(CASE
        WHEN m.is_forgotten THEN {forgotten} WHEN m.stored_digest IS NULL THEN {unseen}
        WHEN m.stored_digest = m.payload_digest THEN {duplicate} ELSE {conflict} END)
FROM missing AS m
""".format(  # noqa: S608 - constants of this module alone
    columns=", ".join(name for name, _, value in _PARAMETERS if value),
    values=", ".join(value for _, _, value in _PARAMETERS if value),
    arrays=", ".join(f"%({name})s::{element}[]" for name, element, _ in _PARAMETERS),
    names=", ".join(name for name, _, _ in _PARAMETERS),
    forgotten=int(AppendVerdict.USER_FORGOTTEN),
    unseen=UNSEEN,
    duplicate=int(AppendVerdict.DUPLICATE),
    conflict=int(AppendVerdict.PAYLOAD_CONFLICT),
)

_LITERALS = frozenset(
    {
        "line_items", "line_quantities", "line_prices", "line_positions", "impression_items", "impression_positions",
        "impression_propensities",
    }
)  # fmt: skip
_FIXED = {"boolean": "i1", "integer": ">i4", "real": ">f4", "smallint": ">i2"}


def insert_statement(key_version: int) -> str:
    """Returns the statement; it is given `parameters_of` a batch.

    It answers with one row: the transaction, and of the rows that it did not store, or null for none, the places in
    the batch and the verdicts, UNSEEN where another transaction stored the row meanwhile.

    Args:
        key_version: the version of the user key that the user keys of the rows are under.
    """
    return _INSERT.format(key_version=int(key_version))


def parameters_of(
    columns: EventColumns, texts: Mapping[int, bytes | None], encoded: pg_arrays.TextArrays
) -> dict[str, Any]:
    """Returns the parameters of the statement.

    Args:
        columns: rows whose keys ascend, each once.
        texts: by row what a person wrote, encrypted.
        encoded: makes arrays of short texts that come again and again.
    """
    column = columns.column
    session_keys, price_micros = column("session_key"), column("price_micros")
    halves = session_keys.view("i8").reshape(-1, 2)
    quantities, values = column("quantity"), column("value")
    parameters: dict[str, Any] = {
        "event_key": pg_arrays.fixed_array(pg_arrays.UUID, column("event_key")),
        "payload_digest": pg_arrays.fixed_array(pg_arrays.INT8, column("payload_digest").astype(">i8")),
        "user_key": pg_arrays.fixed_array(pg_arrays.BYTEA, column("user_key")),
        "tombstone_key": pg_arrays.fixed_array(pg_arrays.BYTEA, column("tombstone_key")),
        "kind": pg_arrays.fixed_array(pg_arrays.INT2, column("kind").astype(">i2")),
        "occurred_at": pg_arrays.timestamp_array(column("occurred_at_us")),
        "session_key": pg_arrays.nullable_array(
            pg_arrays.BYTEA, session_keys, (halves[:, 0] | halves[:, 1]) == 0
        ),
        "item_id": encoded.array(column("item_id").tolist()),
        "quantity": pg_arrays.nullable_array(
            pg_arrays.FLOAT4, quantities.astype(">f4"), np.isnan(quantities)
        ),
        "price_micros": pg_arrays.nullable_array(
            pg_arrays.INT8, price_micros.astype(">i8"), price_micros < 0
        ),
        "currency_code": pg_arrays.nullable_array(
            pg_arrays.TEXT, column("currency_code").view("V3"), column("currency_code") == b""
        ),
        "value": pg_arrays.nullable_array(pg_arrays.FLOAT4, values.astype(">f4"), np.isnan(values)),
        "device": pg_arrays.fixed_array(pg_arrays.INT2, column("device").astype(">i2")),
        "channel": pg_arrays.fixed_array(pg_arrays.INT2, column("channel").astype(">i2")),
        "consent": pg_arrays.fixed_array(pg_arrays.INT2, column("consent").astype(">i2")),
        "rows": len(columns),
    }
    for name in _ELEMENT:
        if name not in parameters:
            parameters[name] = _sparse(
                name, texts if name == "text" else columns.sparse.get(name), len(columns), encoded
            )
    return parameters


def _sparse(
    name: str, values: Mapping[int, Any] | None, n: int, encoded: pg_arrays.TextArrays
) -> BinaryArray:
    element = _ELEMENT[name]
    if not values:
        return pg_arrays.EMPTY[element]
    if (dtype := _FIXED.get(element)) is not None:
        absent = np.ones(n, dtype=bool)
        numbers = np.zeros(n, dtype=dtype)
        rows = list(values)
        absent[rows] = False
        numbers[rows] = list(values.values())
        return pg_arrays.nullable_array(pg_arrays.OID[element], numbers, absent)
    filled: list[Any] = [None] * n
    for row, value in values.items():
        filled[row] = value
    if element == "bytea":
        return pg_arrays.bytes_array(filled)
    if name in _LITERALS:
        return pg_arrays.text_array(
            [None if value is None else pg_arrays.array_literal(value) for value in filled]
        )
    if name == "attributes":
        return pg_arrays.text_array([None if value is None else json.dumps(value) for value in filled])
    return encoded.array(filled)
