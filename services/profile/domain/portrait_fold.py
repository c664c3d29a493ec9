"""Folds events into a portrait: a pure function of a window of events, the catalogue and the time.

The events come in the window's order, which is theirs whatever the order of arrival, and every sum runs in
that order, so equal sets give equal floating-point numbers. A window is small (most have some thirty events,
none more than a thousand), so one pass over lists beats a hundred calls of NumPy on short arrays.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from services.profile.domain.events import HAS_PRICE, Events, EventWindow, Vocabulary
from services.profile.domain.population import NOBODY, Population
from services.profile.domain.portrait import (
    DAY_US,
    HALF_LIFE_DAYS,
    LONG_TERM_HALF_LIFE_DAYS,
    MAX_INTERESTS,
    SHORT_TERM_HALF_LIFE_DAYS,
    Estimate,
    Facet,
    HourPreference,
    Interest,
    ItemFacts,
    ItemLookup,
    KindActivity,
    LifeCycleStage,
    Portrait,
    Preference,
    PurchasingPower,
    Rfm,
    Spend,
    Summary,
)
from shared.event_kinds import EventKind

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
_INTEREST = [0.0] * 256
for _kind, _interest in INTEREST_OF_KIND.items():
    _INTEREST[int(_kind)] = _interest
_PURCHASE, _RETURN = int(EventKind.PURCHASE), int(EventKind.RETURN)
_OPINIONS = {int(EventKind.RATING), int(EventKind.SURVEY)}
# What a line sent back says of satisfaction, beside answers in [0, 1].
RETURN_SATISFACTION = 0.25
SATISFACTION_PRIOR_EVENTS = 2.0
DISCOUNT_PRIOR_EVENTS = 5.0
# Below its list price by less is the same price, rounded.
LEAST_DISCOUNT = 0.005
_HOUR_US = 3_600_000_000
_INT64_MAX = 2**63 - 1
_HORIZONS = tuple(HALF_LIFE_DAYS)

# An item's evidence: events, weighted, and weighted and decayed for each horizon.
_Evidence = list[Any]


class _Purchases:
    """Money and orders, gathered line by line."""

    __slots__ = (
        "amounts",
        "discounts",
        "keys",
        "last_key",
        "lines_on_offer",
        "order_keys",
        "prices",
        "times",
    )

    def __init__(self) -> None:
        self.times: list[int] = []
        self.last_key: tuple[int, int] | None = None
        # By code of the currency: exact integers, for a sum of floats would depend on its order.
        self.amounts: dict[int, int] = {}
        self.order_keys: dict[int, set[tuple[int, int]]] = {}
        self.prices: dict[int, list[int]] = {}
        self.discounts = 0.0
        self.lines_on_offer = 0

    def order(self, key: tuple[int, int], time_us: int) -> None:
        # Lines of one order share the event key, and are neighbours.
        if key != self.last_key:
            self.times.append(time_us)
            self.last_key = key

    def money(self, currency: int, price: int, quantity: float, sign: int) -> None:
        pieces = quantity if quantity - quantity == 0.0 else 1.0
        amount = price * round(pieces * 1000) // 1000
        self.amounts[currency] = self.amounts.get(currency, 0) + sign * amount

    def bought(self, currency: int, code: str, price: int, key: tuple[int, int], facts: ItemFacts) -> None:
        self.order_keys.setdefault(currency, set()).add(key)
        self.prices.setdefault(currency, []).append(price)
        listed = facts.list_price_micros
        if listed and facts.currency_code == code:
            self.lines_on_offer += 1
            self.discounts += (price < listed * (1.0 - LEAST_DISCOUNT)) - facts.discount_share


def fold_portrait(
    window: EventWindow,
    items: Vocabulary,
    currencies: Vocabulary,
    lookup: ItemLookup,
    now_us: int,
    population: Population = NOBODY,
) -> Portrait:
    """Returns the portrait of the shopper whose events are in the window.

    Args:
        items, currencies: what the codes of the events stand for.
        lookup: what the catalogue knows of an item id.
        now_us: the time of the request; only recency and life-cycle stage depend on it.
        population: the other shoppers, for quintiles.
    """
    events = window.personal_events
    count = len(events)
    times: list[int] = events["occurred_at_us"].tolist()
    short, long = _decays(events)
    touched: dict[int, _Evidence] = {}
    facts_of: dict[int, ItemFacts] = {}
    activity: dict[int, list[Any]] = {}
    hours: dict[int, int] = {}
    devices: dict[int, int] = {}
    channels: dict[int, int] = {}
    purchases = _Purchases()
    opinions, opinion_count = 0.0, 0
    rows = zip(
        events["kind"].tolist(),
        events["item"].tolist(),
        times,
        events["key_high"].tolist(),
        events["key_low"].tolist(),
        events["flags"].tolist(),
        events["price_micros"].tolist(),
        events["currency"].tolist(),
        events["quantity"].tolist(),
        events["value"].tolist(),
        events["device"].tolist(),
        events["channel"].tolist(),
        short,
        long,
        strict=True,
    )
    for (
        kind,
        item,
        time_us,
        high,
        low,
        flags,
        price,
        currency,
        quantity,
        value,
        device,
        channel,
        *left,
    ) in rows:
        key = (high, low)
        entry = activity.get(kind)
        if entry is None:
            activity[kind] = [1, time_us, time_us, key]
        else:
            if key != entry[3]:
                entry[0] += 1
                entry[3] = key
            if time_us < entry[1]:
                entry[1] = time_us
            elif time_us > entry[2]:
                entry[2] = time_us
        hour = time_us // _HOUR_US % 24
        hours[hour] = hours.get(hour, 0) + 1
        devices[device] = devices.get(device, 0) + 1
        channels[channel] = channels.get(channel, 0) + 1
        interest = _INTEREST[kind]
        if interest and item >= 0:
            evidence = touched.get(item)
            if evidence is None:
                touched[item] = [1, interest, interest * left[0], interest * left[1]]
                facts_of[item] = lookup(items[item])
            else:
                evidence[0] += 1
                evidence[1] += interest
                evidence[2] += interest * left[0]
                evidence[3] += interest * left[1]
        if kind == _PURCHASE:
            purchases.order(key, time_us)
            if flags & HAS_PRICE:
                purchases.money(currency, price, quantity, 1)
                code = currencies[currency] if currency >= 0 else ""
                facts = facts_of[item] if item >= 0 else _NO_FACTS
                purchases.bought(currency, code, price, key, facts)
        elif kind == _RETURN:
            opinions += RETURN_SATISFACTION
            opinion_count += 1
            if flags & HAS_PRICE:
                purchases.money(currency, price, quantity, -1)
        elif kind in _OPINIONS and value - value == 0.0:
            opinions += (min(5.0, max(1.0, value)) - 1.0) / 4.0
            opinion_count += 1
    evidence_of = [(facts_of[item], evidence) for item, evidence in touched.items()]
    rfm = _rfm(purchases, currencies, now_us, population)
    prior = SATISFACTION_PRIOR_EVENTS
    return Portrait(
        event_count=count,
        truncated=window.truncated,
        first_us=min(times) if times else None,
        last_us=max(times) if times else None,
        activity=tuple(KindActivity(kind, *entry[:3]) for kind, entry in sorted(activity.items())),
        rfm=rfm,
        life_cycle_stage=_life_cycle_stage(count, rfm.order_count, rfm.recency_days.value),
        interests=_interests(evidence_of),
        purchasing_power=_purchasing_power(evidence_of, purchases, currencies, rfm.currency_code),
        preferred_hours=tuple(
            HourPreference(hour, share, events_of) for hour, share, events_of in _shares(hours, count)
        ),
        satisfaction=Estimate((0.5 * prior + opinions) / (prior + opinion_count), opinion_count, prior),
        purchase_interval_days=_purchase_interval_days(purchases.times),
        # What is not known is no preference.
        preferred_devices=tuple(Preference(*entry) for entry in _shares(devices, count) if entry[0]),
        preferred_channels=tuple(Preference(*entry) for entry in _shares(channels, count) if entry[0]),
        discount_sensitivity=Estimate(
            purchases.discounts / (purchases.lines_on_offer + DISCOUNT_PRIOR_EVENTS),
            purchases.lines_on_offer,
            DISCOUNT_PRIOR_EVENTS,
        ),
    )


def fold_summary(window: EventWindow, items: Vocabulary, lookup: ItemLookup, now_us: int) -> Summary:
    """Returns the summary of the same events, at a fraction of the cost of the portrait; see `fold_portrait`."""
    events = window.personal_events
    touched: dict[int, _Evidence] = {}
    orders = set()
    rows = zip(
        events["kind"].tolist(),
        events["item"].tolist(),
        events["key_high"].tolist(),
        events["key_low"].tolist(),
        strict=True,
    )
    for kind, item, high, low in rows:
        if kind == _PURCHASE:
            orders.add((high, low))
        interest = _INTEREST[kind]
        if interest and item >= 0:
            evidence = touched.setdefault(item, [0, 0.0])
            evidence[0] += 1
            evidence[1] += interest
    times = events["occurred_at_us"]
    recency_days = 0.0
    if orders:
        last_us = int(times[events["kind"] == _PURCHASE].max())
        recency_days = max(0.0, (now_us - last_us) / DAY_US)
    return Summary(
        event_count=len(events),
        order_count=len(orders),
        first_us=int(times.min()) if len(times) else None,
        last_us=int(times.max()) if len(times) else None,
        price_level=_price_level([(lookup(items[item]), evidence) for item, evidence in touched.items()]),
        life_cycle_stage=_life_cycle_stage(len(events), len(orders), recency_days),
    )


_NO_FACTS = ItemFacts()


def _decays(events: Events) -> tuple[list[float], list[float]]:
    """Returns how much of each event is left, short and long term.

    As of the newest event with interest in an item, so that the portrait does not change while nothing happens.
    """
    if not len(events):
        return [], []
    chosen = (events["item"] >= 0) & _INTERESTING[events["kind"]]
    times = events["occurred_at_us"]
    if not chosen.any():
        zeros = [0.0] * len(events)
        return zeros, zeros
    age_days = np.maximum(times[chosen].max() - times, 0) / DAY_US
    return (
        np.exp2(age_days / -SHORT_TERM_HALF_LIFE_DAYS).tolist(),
        np.exp2(age_days / -LONG_TERM_HALF_LIFE_DAYS).tolist(),
    )


_INTERESTING = np.array([interest > 0 for interest in _INTEREST])


def _interests(evidence_of: list[tuple[ItemFacts, _Evidence]]) -> tuple[Interest, ...]:
    # By facet and attribute key: the decayed evidence of all its values. By value as well: that, and the count.
    totals: dict[tuple[Facet, str], list[float]] = {}
    sums: dict[Facet, dict[tuple[str, str], list[Any]]] = {facet: {} for facet in Facet}
    for facts, (count, _, short, long) in evidence_of:
        for facet, key, values in facts.facets:
            total = totals.get((facet, key))
            if total is None:
                totals[facet, key] = [short, long]
            else:
                total[0] += short
                total[1] += long
            of_facet = sums[facet]
            for value in values:
                entry = of_facet.get((key, value))
                if entry is None:
                    of_facet[key, value] = [short, long, count]
                else:
                    entry[0] += short
                    entry[1] += long
                    entry[2] += count
    interests: list[Interest] = []
    for h, horizon in enumerate(_HORIZONS):
        for facet in Facet:
            of_facet = sums[facet]
            ranked = sorted([(-entry[h], name) for name, entry in of_facet.items()])
            for negative, name in ranked[:MAX_INTERESTS]:
                key, value = name
                total_weight = totals[facet, key][h]
                # Evidence decades older than the newest event decays to exactly nothing.
                share = min(1.0, -negative / total_weight) if total_weight > 0 else 0.0
                interests.append(
                    Interest(horizon, facet, value, share, -negative + 0.0, of_facet[name][2], key)
                )
    return tuple(interests)


def _rfm(purchases: _Purchases, currencies: Vocabulary, now_us: int, population: Population) -> Rfm:
    spend = tuple(
        sorted(
            (
                Spend(
                    currencies[currency] if currency >= 0 else "",
                    max(-_INT64_MAX, min(_INT64_MAX, amount)),
                    len(purchases.order_keys.get(currency, ())),
                )
                for currency, amount in purchases.amounts.items()
            ),
            key=lambda one: one.currency_code,
        )
    )
    main = max(spend, key=lambda s: s.order_count, default=Spend("", 0, 0))
    if not purchases.times:
        return Rfm(Estimate(0.0), 0, main.amount_micros, main.currency_code, spend)
    orders, last_us = len(purchases.times), max(purchases.times)
    return Rfm(
        Estimate(max(0.0, (now_us - last_us) / DAY_US), orders),
        orders,
        main.amount_micros,
        main.currency_code,
        spend,
        *population.quintiles(last_us, orders, main.amount_micros, main.currency_code),
    )


def _life_cycle_stage(event_count: int, order_count: int, recency_days: float) -> LifeCycleStage:
    if not event_count:
        return LifeCycleStage.UNSPECIFIED
    if not order_count:
        return LifeCycleStage.PROSPECT
    if recency_days > 365:
        return LifeCycleStage.LOST
    if recency_days > 90:
        return LifeCycleStage.LAPSING
    if order_count >= 5:
        return LifeCycleStage.LOYAL
    return LifeCycleStage.ACTIVE if order_count >= 2 else LifeCycleStage.NEW


def _price_level(evidence_of: list[tuple[ItemFacts, _Evidence]]) -> Estimate:
    weight = level = 0.0
    count = 0
    for facts, evidence in evidence_of:
        if facts.price_level is not None:
            weight += evidence[1]
            level += evidence[1] * facts.price_level
            count += evidence[0]
    return Estimate(level / weight if weight else 0.5, count)


def _purchasing_power(
    evidence_of: list[tuple[ItemFacts, _Evidence]],
    purchases: _Purchases,
    currencies: Vocabulary,
    main_currency: str,
) -> PurchasingPower:
    by_category: dict[str, list[tuple[ItemFacts, _Evidence]]] = {}
    for pair in evidence_of:
        if pair[0].price_level is not None and pair[0].category_path:
            by_category.setdefault(pair[0].category_path[0], []).append(pair)
    levels = [(category, _price_level(members)) for category, members in by_category.items()]
    levels.sort(key=lambda pair: (-pair[1].evidence_count, pair[0]))
    prices = sorted(
        price
        for currency, paid in purchases.prices.items()
        if (currencies[currency] if currency >= 0 else "") == main_currency
        for price in paid
    )
    return PurchasingPower(
        _price_level(evidence_of),
        tuple(levels[:MAX_INTERESTS]),
        prices[(len(prices) - 1) // 2] if prices else 0,
        main_currency if prices else "",
    )


def _shares(counts: dict[int, int], total: int) -> list[tuple[int, float, int]]:
    """Returns (code, share, count) of what occurred, by falling share."""
    found = sorted((-count, code) for code, count in counts.items())
    return [(code, -negative / total, -negative) for negative, code in found]


def _purchase_interval_days(times: list[int]) -> Estimate:
    if len(times) < 2:
        return Estimate(0.0)
    return Estimate((max(times) - min(times)) / DAY_US / (len(times) - 1), len(times) - 1)
