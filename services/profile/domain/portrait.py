"""The portrait of a shopper: a pure function of a window of events, the catalogue and the time.

The events come in the window's order, which is theirs whatever the order of arrival, and sums run in
the order of item ids, so equal sets give equal floating-point numbers.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from services.profile.domain.events import HAS_PRICE, NO_ITEM, Events, EventWindow, Vocabulary
from shared.event_kinds import EventKind

SHORT_TERM_HALF_LIFE_DAYS = 7.0
LONG_TERM_HALF_LIFE_DAYS = 90.0
MAX_INTERESTS = 20
PRIOR_EVENTS = 5.0
PATH_SEPARATOR = " > "
DAY_US = 86_400_000_000
_INT64_MAX = 2**63 - 1

# How strongly an event of a kind speaks for interest in its item; other kinds do not.
INTEREST_OF_KIND = {
    EventKind.ITEM_VIEW: 1.0,
    EventKind.ADD_TO_CART: 3.0,
    EventKind.PURCHASE: 5.0,
    EventKind.RATING: 1.0,
    EventKind.REVIEW: 2.0,
    EventKind.WISH_LIST: 3.0,
    EventKind.SHARE: 2.0,
    EventKind.RECOMMENDATION_CLICK: 1.0,
    EventKind.AD_CLICK: 1.0,
}
_INTEREST_BY_KIND = np.zeros(256)
for _kind, _interest in INTEREST_OF_KIND.items():
    _INTEREST_BY_KIND[int(_kind)] = _interest


class LifeCycleStage(enum.IntEnum):
    """The numbers are the contract's."""

    UNSPECIFIED = 0
    PROSPECT = 1
    NEW = 2
    ACTIVE = 3
    LOYAL = 4
    LAPSING = 5
    LOST = 6


class Facet(enum.IntEnum):
    """The numbers are the contract's `InterestFacet`."""

    CATEGORY = 1
    BRAND = 2
    PRICE_BAND = 3
    ATTRIBUTE = 4


class Horizon(enum.IntEnum):
    """The numbers are the contract's `InterestHorizon`."""

    SHORT_TERM = 1
    LONG_TERM = 2


HALF_LIFE_DAYS = {
    Horizon.SHORT_TERM: SHORT_TERM_HALF_LIFE_DAYS,
    Horizon.LONG_TERM: LONG_TERM_HALF_LIFE_DAYS,
}


@dataclass(frozen=True, slots=True)
class ItemFacts:
    """What the catalogue tells a portrait about an item.

    Attributes:
        category_path: top first; empty when unknown.
        price_level: position among the prices of the top category, in [0, 1], or None.
    """

    category_path: tuple[str, ...] = ()
    brand: str = ""
    price_level: float | None = None


UNKNOWN_ITEM = ItemFacts()
ItemLookup = Callable[[str], ItemFacts]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number and its evidence; at 0 events the value is a default."""

    value: float
    evidence_count: int = 0
    prior_events: float = PRIOR_EVENTS

    @property
    def confidence(self) -> float:
        """n / (n + k), in [0, 1)."""
        return self.evidence_count / (self.evidence_count + self.prior_events)


@dataclass(frozen=True, slots=True)
class KindActivity:
    """Distinct events of one kind, and when they happened (microseconds since 1970)."""

    kind: int
    count: int
    first_us: int
    last_us: int


@dataclass(frozen=True, slots=True)
class Spend:
    """Purchases less returns in one currency."""

    currency_code: str
    amount_micros: int
    order_count: int


@dataclass(frozen=True, slots=True)
class Rfm:
    """Recency, frequency, monetary value (Hughes, 1994). `spend` is by ascending currency."""

    recency_days: Estimate
    order_count: int
    monetary_micros: int
    currency_code: str
    spend: tuple[Spend, ...]


@dataclass(frozen=True, slots=True)
class Interest:
    """A value of a facet, its share of the facet's decayed evidence in [0, 1], and that evidence.

    Attributes:
        attribute_key: empty unless the facet is ATTRIBUTE; shares are then among the values of one key.
    """

    horizon: Horizon
    facet: Facet
    value: str
    weight: float
    decayed_evidence: float
    evidence_count: int
    attribute_key: str = ""


@dataclass(frozen=True, slots=True)
class PurchasingPower:
    """Price levels overall and by top category; the median price paid in the main currency."""

    price_level: Estimate
    category_price_levels: tuple[tuple[str, Estimate], ...]
    typical_price_micros: int
    currency_code: str


@dataclass(frozen=True, slots=True)
class HourPreference:
    """The share of events in one hour (UTC) of the day."""

    hour: int
    share: float
    evidence_count: int


@dataclass(frozen=True, slots=True)
class Portrait:
    """All that is understood about a shopper. Every number is finite.

    Attributes:
        event_count: lines that the portrait rests on.
        first_us, last_us: microseconds since 1970; None without events.
    """

    event_count: int
    truncated: bool
    first_us: int | None
    last_us: int | None
    activity: tuple[KindActivity, ...]
    rfm: Rfm
    life_cycle_stage: LifeCycleStage
    interests: tuple[Interest, ...]
    purchasing_power: PurchasingPower
    preferred_hours: tuple[HourPreference, ...]
    satisfaction: Estimate
    purchase_interval_days: Estimate


@dataclass(frozen=True, slots=True)
class Summary:
    """The few numbers that travel with every live profile."""

    event_count: int
    order_count: int
    first_us: int | None
    last_us: int | None
    price_level: Estimate


def fold_portrait(
    window: EventWindow, items: Vocabulary, currencies: Vocabulary, lookup: ItemLookup, now_us: int
) -> Portrait:
    """Returns the portrait of the shopper whose events are in the window.

    Args:
        items, currencies: what the codes of the events stand for.
        lookup: what the catalogue knows of an item id.
        now_us: the time of the request; only recency and life-cycle stage depend on it.
    """
    events = window.personal_events
    touched = _touched_items(events, items, lookup)
    orders = _orders(events)
    rfm = _rfm(events, orders, currencies, now_us)
    return Portrait(
        event_count=len(events),
        truncated=window.truncated,
        first_us=_first_us(events),
        last_us=_last_us(events),
        activity=_activity(events),
        rfm=rfm,
        life_cycle_stage=_life_cycle_stage(len(events), rfm),
        interests=_interests(touched),
        purchasing_power=_purchasing_power(events, touched, currencies, rfm.currency_code),
        preferred_hours=_preferred_hours(events),
        satisfaction=_satisfaction(events),
        purchase_interval_days=_purchase_interval_days(orders),
    )


def fold_summary(window: EventWindow, items: Vocabulary, lookup: ItemLookup) -> Summary:
    """Returns the summary of the same events, at a fraction of the cost of the portrait."""
    events = window.personal_events
    return Summary(
        event_count=len(events),
        order_count=len(_orders(events)),
        first_us=_first_us(events),
        last_us=_last_us(events),
        price_level=_price_level(_touched_items(events, items, lookup)),
    )


@dataclass(frozen=True, slots=True)
class _TouchedItem:
    """One item of a window: evidence for it, plain and decayed, and what the catalogue says."""

    facts: ItemFacts
    count: int
    interest: float
    decayed: dict[Horizon, float]


def _touched_items(events: Events, items: Vocabulary, lookup: ItemLookup) -> list[_TouchedItem]:
    interest = _INTEREST_BY_KIND[events["kind"]]
    chosen = (events["item"] != NO_ITEM) & (interest > 0)
    if not chosen.any():
        return []
    interest = interest[chosen]
    codes, inverse = np.unique(events["item"][chosen], return_inverse=True)
    # As of the newest event of all, so that the portrait does not change while nothing happens.
    age_days = (events["occurred_at_us"].max() - events["occurred_at_us"][chosen]) / DAY_US
    counts = np.bincount(inverse)
    totals = np.bincount(inverse, interest)
    decayed = {
        horizon: np.bincount(inverse, interest * np.exp2(-age_days / half_life))
        for horizon, half_life in HALF_LIFE_DAYS.items()
    }
    # Codes differ between processes; ids do not.
    by_id = sorted((items[code], position) for position, code in enumerate(codes.tolist()))
    return [
        _TouchedItem(
            lookup(item_id),
            int(counts[at]),
            float(totals[at]),
            {horizon: float(weights[at]) for horizon, weights in decayed.items()},
        )
        for item_id, at in by_id
    ]


def _interests(touched: list[_TouchedItem]) -> tuple[Interest, ...]:
    horizons = tuple(Horizon)
    # By facet and value: the decayed evidence of each horizon, then the count.
    evidence: dict[Facet, dict[str, list[float]]] = {facet: {} for facet in Facet}
    totals = {facet: [0.0] * len(horizons) for facet in Facet}
    for item in touched:
        decayed = [item.decayed[horizon] for horizon in horizons]
        for facet, values in _facet_values(item.facts):
            total = totals[facet]
            for h, weight in enumerate(decayed):
                total[h] += weight
            of_facet = evidence[facet]
            for value in values:
                sums = of_facet.get(value)
                if sums is None:
                    sums = of_facet[value] = [0.0] * (len(horizons) + 1)
                for h, weight in enumerate(decayed):
                    sums[h] += weight
                sums[-1] += item.count
    interests: list[Interest] = []
    for h, horizon in enumerate(horizons):
        for facet in Facet:
            total_weight = totals[facet][h]
            ranked = sorted((-sums[h], value) for value, sums in evidence[facet].items())
            for negative_weight, value in ranked[:MAX_INTERESTS]:
                weight = -negative_weight + 0.0
                # Evidence decades older than the newest event decays to exactly nothing.
                share = min(1.0, weight / total_weight) if total_weight > 0 else 0.0
                count = int(evidence[facet][value][-1])
                interests.append(Interest(horizon, facet, value, share, weight, count))
    return tuple(interests)


@lru_cache(maxsize=65_536)
def _ancestors(category_path: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the category and everything above it, top first, as values of interests."""
    return tuple(PATH_SEPARATOR.join(category_path[:depth]) for depth in range(1, len(category_path) + 1))


def _facet_values(facts: ItemFacts) -> list[tuple[Facet, tuple[str, ...]]]:
    facets: list[tuple[Facet, tuple[str, ...]]] = []
    if facts.category_path:
        facets.append((Facet.CATEGORY, _ancestors(facts.category_path)))
    if facts.brand:
        facets.append((Facet.BRAND, (facts.brand,)))
    if facts.price_level is not None:
        facets.append((Facet.PRICE_BAND, (str(min(5, 1 + int(5 * facts.price_level))),)))
    return facets


def _orders(events: Events) -> Events:
    """Returns one line of each distinct purchase: lines of one order share the event key."""
    return _one_line_each(events[events["kind"] == EventKind.PURCHASE])


def _one_line_each(events: Events) -> Events:
    # The window is in the order of the keys, so equal ones are neighbours.
    if len(events) < 2:
        return events
    high, low = events["key_high"], events["key_low"]
    return events[np.r_[True, (high[1:] != high[:-1]) | (low[1:] != low[:-1])]]


def _rfm(events: Events, orders: Events, currencies: Vocabulary, now_us: int) -> Rfm:
    amounts: dict[str, int] = {}
    order_keys: dict[str, set[tuple[int, int]]] = {}
    priced = events[(events["flags"] & HAS_PRICE) != 0]
    for kind, sign in ((EventKind.PURCHASE, 1), (EventKind.RETURN, -1)):
        lines = priced[priced["kind"] == kind]
        quantities = np.where(np.isfinite(lines["quantity"]), lines["quantity"], 1.0).astype(np.float64)
        columns = zip(
            lines["currency"].tolist(),
            lines["price_micros"].tolist(),
            quantities.tolist(),
            lines["key_high"].tolist(),
            lines["key_low"].tolist(),
            strict=True,
        )
        for currency, price, quantity, high, low in columns:
            code = currencies[currency] if currency >= 0 else ""
            # Exact integers: a sum of floats would depend on its order.
            amounts[code] = amounts.get(code, 0) + sign * (price * round(quantity * 1000) // 1000)
            if kind == EventKind.PURCHASE:
                order_keys.setdefault(code, set()).add((high, low))
    spend = tuple(
        Spend(code, _clamp(amount), len(order_keys.get(code, ()))) for code, amount in sorted(amounts.items())
    )
    main = max(spend, key=lambda s: s.order_count, default=Spend("", 0, 0))
    if not len(orders):
        return Rfm(Estimate(0.0), 0, main.amount_micros, main.currency_code, spend)
    recency_days = max(0.0, (now_us - int(orders["occurred_at_us"].max())) / DAY_US)
    return Rfm(
        Estimate(recency_days, len(orders)), len(orders), main.amount_micros, main.currency_code, spend
    )


def _life_cycle_stage(event_count: int, rfm: Rfm) -> LifeCycleStage:
    if not event_count:
        return LifeCycleStage.UNSPECIFIED
    if not rfm.order_count:
        return LifeCycleStage.PROSPECT
    if rfm.recency_days.value > 365:
        return LifeCycleStage.LOST
    if rfm.recency_days.value > 90:
        return LifeCycleStage.LAPSING
    if rfm.order_count >= 5:
        return LifeCycleStage.LOYAL
    return LifeCycleStage.ACTIVE if rfm.order_count >= 2 else LifeCycleStage.NEW


def _price_level(touched: list[_TouchedItem]) -> Estimate:
    weight = level = 0.0
    count = 0
    for item in touched:
        if item.facts.price_level is not None:
            weight += item.interest
            level += item.interest * item.facts.price_level
            count += item.count
    return Estimate(level / weight if weight else 0.5, count)


def _purchasing_power(
    events: Events, touched: list[_TouchedItem], currencies: Vocabulary, main_currency: str
) -> PurchasingPower:
    by_category: dict[str, list[_TouchedItem]] = {}
    for item in touched:
        if item.facts.price_level is not None and item.facts.category_path:
            by_category.setdefault(item.facts.category_path[0], []).append(item)
    levels = [(category, _price_level(members)) for category, members in by_category.items()]
    levels.sort(key=lambda pair: (-pair[1].evidence_count, pair[0]))
    paid = events[(events["kind"] == EventKind.PURCHASE) & ((events["flags"] & HAS_PRICE) != 0)]
    prices = sorted(
        price
        for price, currency in zip(paid["price_micros"].tolist(), paid["currency"].tolist(), strict=True)
        if (currencies[currency] if currency >= 0 else "") == main_currency
    )
    return PurchasingPower(
        _price_level(touched),
        tuple(levels[:MAX_INTERESTS]),
        prices[(len(prices) - 1) // 2] if prices else 0,
        main_currency if prices else "",
    )


def _activity(events: Events) -> tuple[KindActivity, ...]:
    activity = []
    for kind in np.unique(events["kind"]).tolist():
        of_kind = events[events["kind"] == kind]
        times = of_kind["occurred_at_us"]
        activity.append(KindActivity(kind, len(_one_line_each(of_kind)), int(times.min()), int(times.max())))
    return tuple(activity)


def _preferred_hours(events: Events) -> tuple[HourPreference, ...]:
    if not len(events):
        return ()
    counts = np.bincount((events["occurred_at_us"] // 3_600_000_000) % 24, minlength=24).tolist()
    return tuple(
        HourPreference(hour, count / len(events), count)
        for count, hour in sorted(
            ((c, h) for h, c in enumerate(counts) if c), key=lambda pair: (-pair[0], pair[1])
        )
    )


def _satisfaction(events: Events) -> Estimate:
    """Returns the mean of ratings of 1 to 5 on [0, 1], shrunk towards 0.5 by two ratings' worth."""
    ratings = events["value"][events["kind"] == EventKind.RATING].astype(np.float64)
    ratings = np.clip(ratings[np.isfinite(ratings)], 1.0, 5.0)
    prior_events = 2.0
    # Ratings of whole or half stars add up exactly, whatever the order.
    value = (0.5 * prior_events + float(((ratings - 1.0) / 4.0).sum())) / (prior_events + len(ratings))
    return Estimate(value, len(ratings), prior_events)


def _purchase_interval_days(orders: Events) -> Estimate:
    if len(orders) < 2:
        return Estimate(0.0)
    times = orders["occurred_at_us"]
    return Estimate(float(times.max() - times.min()) / DAY_US / (len(orders) - 1), len(orders) - 1)


def _first_us(events: Events) -> int | None:
    return int(events["occurred_at_us"].min()) if len(events) else None


def _last_us(events: Events) -> int | None:
    return int(events["occurred_at_us"].max()) if len(events) else None


def _clamp(amount: int) -> int:
    return max(-_INT64_MAX, min(_INT64_MAX, amount))
