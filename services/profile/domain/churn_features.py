"""What a history of purchases says about whether it goes on: one row of numbers a shopper.

Everything is computed from what had happened before the moment that is asked about, so that the row of a
day long past equals the row that would have been computed on that day.
Shapes: K shoppers who had bought before, U all shoppers, O orders, N lines, F features.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from services.profile.domain.purchase_counts import BgNbd, PurchaseCounts
from services.profile.domain.purchase_log import Bool, Float, Int, Orders, PurchaseLog

DAY_US = 86_400_000_000
YEAR_DAYS = 365.25

FEATURES = (
    # Recency and rhythm, days.
    "recency_days",
    "tenure_days",
    "active_days",
    "mean_gap_days",
    "gap_deviation_days",
    "last_gap_days",
    "longest_gap_days",
    "overdue_ratio",
    "overdue_deviations",
    "gap_trend",
    # Frequency.
    "orders",
    "days_with_orders",
    "orders_30",
    "orders_60",
    "orders_90",
    "orders_180",
    "orders_trend",
    "decayed_orders_14",
    "decayed_orders_45",
    "decayed_orders_120",
    "same_season_orders",
    # Money.
    "amount",
    "mean_amount",
    "last_amount_ratio",
    "decayed_amount_60",
    "unit_price",
    "pieces_per_line",
    # Breadth.
    "distinct_items",
    "lines_per_order",
    "last_lines_ratio",
    "repeated_item_share",
    "items_trend",
    # Returns.
    "returned_share",
    "days_since_return",
    # What was bought.
    "item_return_rate",
    "item_freshness",
    "item_popularity",
    # The statistical reference.
    "reference_log_odds",
    "reference_alive",
    "reference_orders",
)
"""Names of the columns, F of them."""

COLUMN = {name: column for column, name in enumerate(FEATURES)}
LONG_AGO_DAYS = 1000.0


@dataclass(frozen=True, slots=True)
class ChurnExamples:
    """Shoppers at one moment.

    Attributes:
        user_K: who, ascending.
        feature_KF: float64, finite.
        counts: their x, t_x, T in days, for BG/NBD.
    """

    user_K: Int
    feature_KF: Float
    counts: PurchaseCounts

    def __len__(self) -> int:
        return len(self.user_K)


def purchase_counts(orders: Orders, now_us: int) -> tuple[Int, PurchaseCounts]:
    """Returns who had bought, (K,), and their x, t_x, T in days.

    Orders of one day count as one purchase, as in the paper's data.
    """
    if not len(orders):
        empty = np.empty(0)
        return np.empty(0, np.int64), PurchaseCounts(empty, empty.copy(), empty.copy())
    starts = _starts(orders.user_O)
    ends = np.r_[starts[1:], len(orders)] - 1
    first, last = orders.time_us_O[starts], orders.time_us_O[ends]
    day_O = orders.time_us_O // DAY_US
    new_day_O = np.r_[True, (day_O[1:] != day_O[:-1]) | (orders.user_O[1:] != orders.user_O[:-1])]
    x = np.add.reduceat(new_day_O.astype(np.float64), starts) - 1
    t_x = np.where(x > 0, (last - first) / DAY_US, 0.0)
    return orders.user_O[starts], PurchaseCounts(x, t_x, np.maximum((now_us - first) / DAY_US, t_x))


def churn_examples(log: PurchaseLog, now_us: int, horizon_days: float, reference: BgNbd) -> ChurnExamples:
    """Returns the features of everybody who had bought before `now_us`.

    Args:
        reference: fitted to what had happened before `now_us`, or earlier.
    """
    log = log.before(now_us)
    orders = log.orders
    user_K, counts = purchase_counts(orders, now_us)
    feature_KF = np.zeros((len(user_K), len(FEATURES)))
    if not len(user_K):
        return ChurnExamples(user_K, feature_KF, counts)
    row_of_user = np.full(log.user_count, -1, np.int64)
    row_of_user[user_K] = np.arange(len(user_K))
    columns = (
        _rhythm(orders, now_us)
        | _frequency(orders, now_us, horizon_days)
        | _money(orders, now_us)
        | _breadth(log, orders, row_of_user, len(user_K))
        | _returns(log, now_us, row_of_user, len(user_K))
        | _items(log, orders, now_us, horizon_days, row_of_user, len(user_K))
        | _reference(counts, reference, horizon_days)
    )
    for name, column in COLUMN.items():
        feature_KF[:, column] = columns[name]
    return ChurnExamples(user_K, np.nan_to_num(feature_KF, nan=0.0, posinf=1e12, neginf=-1e12), counts)


def _starts(user_O: Int) -> Int:
    return np.flatnonzero(np.r_[True, user_O[1:] != user_O[:-1]]).astype(np.int64)


def _rhythm(orders: Orders, now_us: int) -> dict[str, Float]:
    starts = _starts(orders.user_O)
    ends = np.r_[starts[1:], len(orders)] - 1
    days_O = (now_us - orders.time_us_O) / DAY_US
    recency, tenure = days_O[ends], days_O[starts]
    gap_O = np.zeros(len(orders))
    gap_O[1:] = days_O[:-1] - days_O[1:]
    gap_O[starts] = 0.0
    # Orders of one day are one visit: they say nothing about the time between visits.
    counted_O = gap_O >= 0.5
    gap_O = np.where(counted_O, gap_O, 0.0)
    gaps = np.add.reduceat(counted_O.astype(np.float64), starts)
    total = np.add.reduceat(gap_O, starts)
    # A few gaps of the whole population steady the means of who has few of their own.
    usual = float(gap_O.sum() / max(1.0, counted_O.sum())) if counted_O.any() else 60.0
    mean = (total + 2 * usual) / (gaps + 2)
    squares = np.add.reduceat(gap_O**2, starts)
    deviation = np.sqrt((squares + 2 * usual**2) / (gaps + 2) - 0.5 * mean**2 + 1.0)
    longest = np.maximum.reduceat(gap_O, starts)
    at = np.where(counted_O, np.arange(len(orders)), -1)
    last_at = np.maximum.reduceat(at, starts)
    last_gap = np.where(last_at >= 0, gap_O[np.maximum(last_at, 0)], tenure)
    return {
        "recency_days": recency,
        "tenure_days": tenure,
        "active_days": tenure - recency,
        "mean_gap_days": mean,
        "gap_deviation_days": deviation,
        "last_gap_days": last_gap,
        "longest_gap_days": longest,
        "overdue_ratio": recency / mean,
        "overdue_deviations": (recency - mean) / deviation,
        "gap_trend": np.where(gaps > 1, last_gap / mean, 1.0),
    }


def _frequency(orders: Orders, now_us: int, horizon_days: float) -> dict[str, Float]:
    starts = _starts(orders.user_O)
    age_O = (now_us - orders.time_us_O) / DAY_US
    day_O = orders.time_us_O // DAY_US
    new_day_O = np.r_[True, (day_O[1:] != day_O[:-1]) | (orders.user_O[1:] != orders.user_O[:-1])]

    def total(values_O: npt.NDArray[np.generic]) -> Float:
        return np.add.reduceat(values_O.astype(np.float64), starts)

    columns = {"orders": total(np.ones(len(orders))), "days_with_orders": total(new_day_O)}
    for days in (30, 60, 90, 180):
        columns[f"orders_{days}"] = total(new_day_O & (age_O <= days))
    columns["orders_trend"] = columns["orders_90"] - total(new_day_O & (age_O > 90) & (age_O <= 180))
    for half_life in (14, 45, 120):
        columns[f"decayed_orders_{half_life}"] = total(new_day_O * np.exp2(-age_O / half_life))
    # The days ahead, a year ago.
    year_ago_O = (age_O <= YEAR_DAYS) & (age_O > YEAR_DAYS - horizon_days)
    columns["same_season_orders"] = total(new_day_O & year_ago_O)
    return columns


def _money(orders: Orders, now_us: int) -> dict[str, Float]:
    starts = _starts(orders.user_O)
    ends = np.r_[starts[1:], len(orders)] - 1
    age_O = (now_us - orders.time_us_O) / DAY_US
    count = np.diff(np.r_[starts, len(orders)]).astype(np.float64)
    amount = np.add.reduceat(orders.amount_O, starts)
    pieces = np.add.reduceat(orders.quantity_O, starts)
    lines = np.add.reduceat(orders.lines_O, starts)
    mean = amount / count
    return {
        "amount": amount,
        "mean_amount": mean,
        "last_amount_ratio": _ratio(orders.amount_O[ends], mean),
        "decayed_amount_60": np.add.reduceat(orders.amount_O * np.exp2(-age_O / 60.0), starts),
        "unit_price": _ratio(amount, pieces),
        "pieces_per_line": _ratio(pieces, lines),
        "lines_per_order": lines / count,
        "last_lines_ratio": _ratio(orders.lines_O[ends], lines / count),
    }


def _breadth(log: PurchaseLog, orders: Orders, row_of_user: Int, rows: int) -> dict[str, Float]:
    bought = log.where(~log.returned_N)
    row_N = row_of_user[bought.user_N]
    pair_N = row_N * (int(bought.item_N.max(initial=0)) + 1) + bought.item_N
    order = np.lexsort((bought.time_us_N, pair_N))
    first_N = np.zeros(len(bought), np.bool_)
    first_N[order] = np.r_[True, np.diff(pair_N[order]) != 0]
    distinct = np.bincount(row_N[first_N], minlength=rows).astype(np.float64)
    lines = np.bincount(row_N, minlength=rows).astype(np.float64)
    # Distinct items that were new in the second half of the shopper's orders, beside the first.
    starts = _starts(orders.user_O)
    middle = orders.time_us_O[(starts + np.r_[starts[1:], len(orders)]) // 2]
    late_N = bought.time_us_N >= middle[row_N]
    late = np.bincount(row_N[first_N & late_N], minlength=rows)
    return {
        "distinct_items": distinct,
        "repeated_item_share": 1.0 - (distinct + 1.0) / (lines + 1.0),
        "items_trend": late / np.maximum(distinct, 1.0),
    }


def _returns(log: PurchaseLog, now_us: int, row_of_user: Int, rows: int) -> dict[str, Float]:
    row_N = row_of_user[log.user_N]
    back_N = log.returned_N & (row_N >= 0)
    returned = np.bincount(row_N[back_N], minlength=rows)
    lines = np.bincount(row_N[row_N >= 0], minlength=rows)
    since = np.full(rows, LONG_AGO_DAYS)
    np.minimum.at(since, row_N[back_N], (now_us - log.time_us_N[back_N]) / DAY_US)
    return {"returned_share": returned / (lines + 5.0), "days_since_return": since}


def _items(
    log: PurchaseLog, orders: Orders, now_us: int, horizon_days: float, row_of_user: Int, rows: int
) -> dict[str, Float]:
    """What became of others who bought the same: a shopper's mean over the items of their last orders.

    Rates come from purchases that are a horizon old, so that their outcome was known at `now_us`; the
    shopper's own outcome is left out of them.
    """
    bought = log.where(~log.returned_N)
    row_N = row_of_user[bought.user_N]
    items = int(bought.item_N.max(initial=0)) + 1
    age_N = (now_us - bought.time_us_N) / DAY_US
    last = orders.time_us_O[np.r_[_starts(orders.user_O)[1:], len(orders)] - 1]
    # Known outcome of a line: whether the shopper bought again within the horizon, on another day.
    known_N = age_N >= horizon_days
    next_us = _next_order_us(orders, bought)
    again_N = (next_us - bought.time_us_N) <= horizon_days * DAY_US
    base = float(again_N[known_N].mean()) if known_N.any() else 0.5
    came, seen = (
        np.bincount(bought.item_N[chosen], minlength=items).astype(np.float64)
        for chosen in (known_N & again_N, known_N)
    )
    own_N = row_N * items + bought.item_N
    pairs, inverse = np.unique(own_N, return_inverse=True)
    own_came = np.bincount(inverse, known_N & again_N, len(pairs))[inverse]
    own_seen = np.bincount(inverse, known_N, len(pairs))[inverse]
    prior = 20.0
    rate_N = (came[bought.item_N] - own_came + prior * base) / (seen[bought.item_N] - own_seen + prior)
    recent = np.bincount(bought.item_N[age_N <= 30], minlength=items)
    total = np.bincount(bought.item_N, minlength=items)
    span_days = max(30.0, float(age_N.max(initial=30.0)))
    fresh_N = np.log((recent[bought.item_N] + 1.0) / (total[bought.item_N] * 30.0 / span_days + 1.0))
    newest_N = bought.time_us_N >= last[row_N] - 30 * DAY_US

    def mean(values_N: Float) -> Float:
        count = np.bincount(row_N[newest_N], minlength=rows)
        return np.bincount(row_N[newest_N], values_N[newest_N], rows) / np.maximum(count, 1)

    return {
        "item_return_rate": mean(rate_N) - base,
        "item_freshness": mean(fresh_N),
        "item_popularity": mean(np.log1p(total[bought.item_N].astype(np.float64))),
    }


def _next_order_us(orders: Orders, bought: PurchaseLog) -> Int:
    """Returns when the shopper of each line bought next on a later day, (N,); far ahead where never."""
    never = np.iinfo(np.int64).max // 4
    # One number orders (shopper, day): the next larger one of the same shopper is the next visit.
    day_O = orders.time_us_O // DAY_US
    base = int(day_O.max(initial=0)) + 2
    key_O = orders.user_O * base + day_O
    key_N = bought.user_N * base + bought.time_us_N // DAY_US
    at = np.searchsorted(key_O, key_N, "right")
    inside = at < len(key_O)
    at = np.minimum(at, len(key_O) - 1)
    same = inside & (orders.user_O[at] == bought.user_N)
    return np.where(same, orders.time_us_O[at], never)


def _reference(counts: PurchaseCounts, reference: BgNbd, horizon_days: float) -> dict[str, Float]:
    silent = np.clip(reference.no_purchase_probabilities(counts, horizon_days), 1e-6, 1 - 1e-6)
    return {
        "reference_log_odds": np.log(silent) - np.log1p(-silent),
        "reference_alive": reference.alive_probabilities(counts),
        "reference_orders": reference.expected_purchases(counts, horizon_days),
    }


def _ratio(part: Float, whole: Float) -> Float:
    return np.where(whole > 0, part / np.where(whole > 0, whole, 1.0), 1.0)


def no_purchase(orders: Orders, user_K: Int, now_us: int, horizon_days: float) -> Bool:
    """Returns whether each shopper bought nothing within the horizon, (K,): the label."""
    return ~orders.bought_between(now_us, now_us + int(horizon_days * DAY_US))[user_K]
