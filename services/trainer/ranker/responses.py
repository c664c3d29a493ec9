"""What was shown and what came of it, from the log into arrays: binary COPY, no Python object a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

import numpy as np
import numpy.typing as npt
import psycopg
from psycopg import sql

from shared.bundle.history import INTEREST_KINDS
from shared.event_kinds import EventKind

Int64 = npt.NDArray[np.int64]

_EPOCH_MICROSECONDS = 946_684_800_000_000
_SIGNATURE = b"PGCOPY\n\xff\r\n\x00"
_TRAILER = b"\xff\xff"
_INTEGERS = {"int2": ">i2", "int4": ">i4", "int8": ">i8", "float4": ">f4"}


@dataclass(frozen=True, slots=True, eq=False)
class Responses:
    """Impressions, what they led to, and the histories of the people who saw them.

    Attributes:
        page_N, user_N, item_N: numbers of recommendation, person and item of each impression, int64.
        position_N: from 1, int64.
        propensity_N: of the item at its place, in (0, 1], float64.
        time_N: when the page was shown, microseconds since 1970, int64.
        labels_NT: clicked, put into the cart, bought; bool, and each of the latter is a click too.
        event_user_E, event_item_E, event_kind_E, event_time_E: events of interest of those people, int64.
        item_ids: raw ids in the order of the numbers.
        price_of: median price in millionths by item id, of the commonest currency.
    """

    page_N: Int64
    user_N: Int64
    item_N: Int64
    position_N: Int64
    propensity_N: npt.NDArray[np.float64]
    time_N: Int64
    labels_NT: npt.NDArray[np.bool_]
    event_user_E: Int64
    event_item_E: Int64
    event_kind_E: Int64
    event_time_E: Int64
    item_ids: Sequence[str]
    price_of: Mapping[str, int]

    def __len__(self) -> int:
        return len(self.page_N)

    def later_than(self, time: int) -> Responses:
        """Returns the impressions after a moment, microseconds; histories stay whole."""
        return self.where(self.time_N > time)

    def where(self, keep_N: npt.NDArray[np.bool_]) -> Responses:
        """Returns some of the impressions; histories stay whole."""
        return Responses(
            self.page_N[keep_N], self.user_N[keep_N], self.item_N[keep_N], self.position_N[keep_N],
            self.propensity_N[keep_N], self.time_N[keep_N], self.labels_NT[keep_N], self.event_user_E,
            self.event_item_E, self.event_kind_E, self.event_time_E, self.item_ids, self.price_of,
        )  # fmt: skip


def join_outcomes(
    impressions: Mapping[str, npt.NDArray[np.generic]], outcomes: Mapping[str, npt.NDArray[np.generic]]
) -> npt.NDArray[np.bool_]:
    """Returns labels_NT of impressions with `page` and `item`, given outcomes with `page`, `item` and `kind`."""
    span = 1 + int(max(impressions["item"].max(initial=0), outcomes["item"].max(initial=0)))
    key_N = impressions["page"].astype(np.int64) * span + impressions["item"].astype(np.int64)
    key_O = outcomes["page"].astype(np.int64) * span + outcomes["item"].astype(np.int64)
    kinds = (EventKind.RECOMMENDATION_CLICK, EventKind.ADD_TO_CART, EventKind.PURCHASE)
    labels_NT = np.stack([np.isin(key_N, key_O[outcomes["kind"] == int(kind)]) for kind in kinds], axis=1)
    # Who puts something into the cart has looked at it, whether or not the shop reports the click.
    labels_NT[:, 0] |= labels_NT[:, 1:].any(axis=1)
    return labels_NT


def read_responses(
    connection: psycopg.Connection, since: datetime | None, as_of: str, most: int
) -> Responses:
    """Returns the newest `most` impressions, with their people's histories, in one snapshot.

    Args:
        connection: not in a transaction; one is made and ended.
        since: of the pages; what is older is not read.
        as_of: a `pg_snapshot`: only what it saw is read; empty for now.

    Raises:
        psycopg.Error: the log cannot be read.
    """
    given = {"as_of": as_of, "since": since, "most": most, "kinds": list(INTEREST_KINDS)}
    with connection.transaction():
        connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        connection.execute("SET LOCAL statement_timeout = 0")
        # A page that was reported twice was shown once.
        connection.execute(
            "CREATE TEMP TABLE shown ON COMMIT DROP AS SELECT * FROM ("
            "SELECT DISTINCT ON (recommendation_id, item_id) recommendation_id, item_id, user_key, position, "
            "propensity, occurred_at FROM feedback.training_responses_v1 "
            "WHERE kind = 2 AND position > 0 AND propensity > 0 "
            "AND occurred_at > coalesce(%(since)s, '-infinity'::timestamptz) "
            "AND (%(as_of)s = '' OR pg_visible_in_snapshot(xid, nullif(%(as_of)s, '')::pg_snapshot)) "
            "ORDER BY recommendation_id, item_id, occurred_at) AS pages "
            "ORDER BY occurred_at DESC, recommendation_id LIMIT %(most)s",
            given,
        )
        connection.execute(
            "CREATE TEMP TABLE outcomes ON COMMIT DROP AS SELECT recommendation_id, item_id, kind "
            "FROM feedback.training_responses_v1 WHERE kind <> 2 "
            "AND occurred_at > coalesce(%(since)s, '-infinity'::timestamptz) "
            "AND (%(as_of)s = '' OR pg_visible_in_snapshot(xid, nullif(%(as_of)s, '')::pg_snapshot))",
            given,
        )
        connection.execute(
            "CREATE TEMP TABLE people ON COMMIT DROP AS SELECT user_key, "
            "(row_number() OVER (ORDER BY user_key) - 1)::integer AS number "
            "FROM (SELECT DISTINCT user_key FROM shown) AS seen"
        )
        connection.execute("ANALYZE people; ANALYZE shown")
        connection.execute(
            "CREATE TEMP TABLE past ON COMMIT DROP AS SELECT p.number AS person, e.item_id, e.kind, e.occurred_at "
            "FROM feedback.training_events_v1 AS e JOIN people AS p USING (user_key) "
            "WHERE e.kind = ANY(%(kinds)s) "
            "AND (%(as_of)s = '' OR pg_visible_in_snapshot(xid, nullif(%(as_of)s, '')::pg_snapshot))",
            given,
        )
        connection.execute(
            "CREATE TEMP TABLE things ON COMMIT DROP AS SELECT item_id, "
            '(row_number() OVER (ORDER BY item_id COLLATE "C") - 1)::integer AS number FROM ('
            "SELECT item_id FROM shown UNION SELECT item_id FROM outcomes UNION SELECT item_id FROM past) AS known"
        )
        connection.execute(
            "CREATE TEMP TABLE pages ON COMMIT DROP AS SELECT recommendation_id, "
            "(row_number() OVER (ORDER BY min(occurred_at), recommendation_id) - 1)::integer AS number, "
            "min(occurred_at) AS shown_at FROM shown GROUP BY recommendation_id"
        )
        item_ids = [name for (name,) in connection.execute("SELECT item_id FROM things ORDER BY number")]
        impressions = _columns(
            connection,
            "SELECT p.number, u.number, i.number, s.position, s.propensity, p.shown_at "
            "FROM shown AS s JOIN pages AS p USING (recommendation_id) JOIN people AS u USING (user_key) "
            "JOIN things AS i USING (item_id) ORDER BY p.number, s.position, i.number",
            page="int4", user="int4", item="int4", position="int4", propensity="float4", time="int8",
        )  # fmt: skip
        outcomes = _columns(
            connection,
            "SELECT p.number, i.number, o.kind FROM outcomes AS o JOIN pages AS p USING (recommendation_id) "
            "JOIN things AS i USING (item_id)",
            page="int4", item="int4", kind="int2",
        )  # fmt: skip
        past = _columns(
            connection,
            "SELECT e.person, i.number, e.kind, e.occurred_at FROM past AS e JOIN things AS i USING (item_id) "
            "ORDER BY e.person, e.occurred_at",
            user="int4", item="int4", kind="int2", time="int8",
        )  # fmt: skip
        prices = connection.execute(
            "SELECT item_id, (percentile_disc(0.5) WITHIN GROUP (ORDER BY price_micros))::bigint "
            "FROM feedback.training_events_v1 WHERE price_micros IS NOT NULL AND currency_code = ("
            "SELECT currency_code FROM feedback.training_events_v1 WHERE price_micros IS NOT NULL "
            "AND currency_code IS NOT NULL GROUP BY currency_code ORDER BY count(*) DESC, currency_code LIMIT 1) "
            "GROUP BY item_id"
        ).fetchall()
    return Responses(
        page_N=impressions["page"].astype(np.int64),
        user_N=impressions["user"].astype(np.int64),
        item_N=impressions["item"].astype(np.int64),
        position_N=impressions["position"].astype(np.int64),
        propensity_N=impressions["propensity"].astype(np.float64),
        time_N=impressions["time"].astype(np.int64) + _EPOCH_MICROSECONDS,
        labels_NT=join_outcomes(impressions, outcomes),
        event_user_E=past["user"].astype(np.int64),
        event_item_E=past["item"].astype(np.int64),
        event_kind_E=past["kind"].astype(np.int64),
        event_time_E=past["time"].astype(np.int64) + _EPOCH_MICROSECONDS,
        item_ids=item_ids,
        price_of=dict(prices),
    )


def _columns(connection: psycopg.Connection, query: str, **widths: str) -> dict[str, npt.NDArray[np.generic]]:
    """Returns the columns of a query without nulls, whose types are named in order."""
    fields = [("fields", ">i2")]
    for name, kind in widths.items():
        fields += [(f"{name}_length", ">i4"), (name, _INTEGERS[kind])]
    row = np.dtype(fields)
    statement = sql.SQL(f"COPY ({query}) TO STDOUT (FORMAT binary)")
    with connection.cursor() as cursor, cursor.copy(statement) as copy:
        content = bytearray().join(copy)
    header = len(_SIGNATURE) + 8
    length = len(content) - header - len(_TRAILER)
    if bytes(content[: len(_SIGNATURE)]) != _SIGNATURE or length % row.itemsize:
        raise ValueError("a row of the COPY has another width: a null, or a field of another type")
    rows = np.frombuffer(content, row, length // row.itemsize, offset=header)
    for name in widths:
        if len(rows) and (rows[f"{name}_length"] != row[name].itemsize).any():
            raise ValueError(f"field {name} of the COPY has another width")
    return {name: rows[name] for name in widths}
