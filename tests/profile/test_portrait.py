"""The portrait: a pure function of the set of events."""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.profile.converters.profiles import user_portrait
from services.profile.domain.events import (
    EMPTY_WINDOW,
    EVENT,
    HAS_PRICE,
    MAX_WINDOW_EVENTS,
    NO_ITEM,
    PERSONALISATION,
    EventWindow,
    Vocabulary,
    group_by_user,
)
from services.profile.domain.items import PriceLevels
from services.profile.domain.packing import pack, unpack
from services.profile.domain.population import Population
from services.profile.domain.portrait import (
    DAY_US,
    UNKNOWN_ITEM,
    Facet,
    Horizon,
    ItemFacts,
    LifeCycleStage,
    Summary,
)
from services.profile.domain.portrait_fold import fold_portrait, fold_summary
from shared.event_kinds import EventKind

NOW_US = 1_770_000_000_000_000
FACTS = {
    "boot": ItemFacts(
        ("Women", "Shoes"), "Acme", 0.9, (("colour", "red"), ("season", "winter")), 60_000_000, "EUR", 0.25
    ),
    "sock": ItemFacts(("Women",), "Acme", 0.1, (("colour", "blue"),), 3_000_000, "EUR", 0.25),
    "tea": ItemFacts(("Food", "Drinks"), "Leaf", None),
}
ITEMS = ["boot", "sock", "tea", "mystery"]


def event(
    key: int,
    kind: EventKind = EventKind.ITEM_VIEW,
    item: str | None = None,
    *,
    days_ago: float = 0.0,
    line: int = 0,
    quantity: float = math.nan,
    price: int | None = None,
    currency: str = "EUR",
    value: float = math.nan,
    device: int = 0,
    channel: int = 0,
    items: Vocabulary,
    currencies: Vocabulary,
) -> Any:
    row = np.zeros(1, EVENT)
    row["key_high"], row["key_low"], row["line"] = key >> 64, key & (2**64 - 1), line
    row["occurred_at_us"] = NOW_US - round(days_ago * DAY_US)
    row["kind"] = int(kind)
    row["item"] = NO_ITEM if item is None else items.encode([item])[0]
    row["quantity"], row["value"] = quantity, value
    row["device"], row["channel"] = device, channel
    row["price_micros"] = price or 0
    row["currency"] = -1 if price is None else currencies.encode([currency])[0]
    row["flags"] = PERSONALISATION | (HAS_PRICE if price is not None else 0)
    return row


def portrait_bytes(window: EventWindow, items: Vocabulary, currencies: Vocabulary) -> bytes:
    portrait = fold_portrait(window, items, currencies, lambda i: FACTS.get(i, UNKNOWN_ITEM), NOW_US)
    return user_portrait(portrait).SerializeToString(deterministic=True)


EVENTS = st.lists(
    st.fixed_dictionaries(
        {
            "key": st.integers(0, 2**128 - 1),
            "line": st.integers(0, 3),
            "kind": st.sampled_from(list(EventKind)),
            "item": st.sampled_from([*ITEMS, None]),
            "days_ago": st.floats(-1, 20_000),
            "quantity": st.one_of(st.just(math.nan), st.floats(0.0009765625, 1e6, width=32)),
            "price": st.one_of(st.none(), st.integers(0, 2**62)),
            "currency": st.sampled_from(["EUR", "CNY", "USD"]),
            "value": st.one_of(st.just(math.nan), st.floats(width=32)),
            "device": st.integers(0, 5),
            "channel": st.integers(0, 255),
        }
    ),
    max_size=30,
    unique_by=lambda e: (e["key"], e["line"]),
)


@settings(max_examples=300, deadline=None)
@given(events=EVENTS, data=st.data())
def test_permuted_and_duplicated_events_give_identical_bytes(events: list[Any], data: st.DataObject) -> None:
    shuffled = data.draw(st.permutations(events + data.draw(st.lists(st.sampled_from(events or [None])))))
    shuffled = [entry for entry in shuffled if entry is not None]
    results = set()
    for order, vocabulary in ((events, ITEMS), (shuffled, ITEMS[::-1])):
        # Codes differ between processes: the portrait must not.
        items, currencies = Vocabulary(), Vocabulary()
        items.encode(vocabulary)
        window = EMPTY_WINDOW
        while order:
            chunk, order = order[:7], order[7:]
            window = window.merge(*(event(**e, items=items, currencies=currencies) for e in chunk))
        results.add(portrait_bytes(window, items, currencies))
        history = [(items[h["item"]], int(h["occurred_at_us"])) for h in window.history()]
        results.add(repr(history).encode())
    assert len(results) == 2


def long_history(count: int, random: np.random.Generator) -> Any:
    events = np.zeros(count, EVENT)
    # Two lines an event.
    events["key_high"], events["line"] = np.arange(count) // 2, np.arange(count) % 2
    events["occurred_at_us"] = random.integers(0, NOW_US, count)
    events["item"] = random.integers(0, 50, count)
    events["flags"] = PERSONALISATION
    return events


@pytest.mark.parametrize(("count", "rounds"), [(60, 10_000), (MAX_WINDOW_EVENTS + 300, 200)])
def test_ten_thousand_permuted_and_duplicated_histories_give_identical_windows(
    count: int, rounds: int
) -> None:
    random = np.random.default_rng(7)
    events = long_history(count, random)
    want = EMPTY_WINDOW.merge(events).events_W.tobytes()
    assert len(want) == min(count, MAX_WINDOW_EVENTS) * EVENT.itemsize
    for _ in range(rounds):
        shuffled = events[random.permutation(count)]
        cuts = np.sort(random.integers(0, count, 2))
        window = EMPTY_WINDOW.merge(shuffled[: cuts[0]], shuffled[: cuts[1]]).merge(shuffled[cuts[0] :])
        assert window.truncated == (count > MAX_WINDOW_EVENTS)
        assert window.events_W.tobytes() == want


def any_history(random: np.random.Generator, items: Vocabulary, currencies: Vocabulary) -> Any:
    """Returns 1 to 60 lines of every kind that a portrait reads."""
    count = int(random.integers(1, 61))
    events = np.zeros(count, EVENT)
    events["key_high"] = random.integers(0, 2**63, count)
    events["line"] = random.integers(0, 3, count)
    events["occurred_at_us"] = NOW_US - random.integers(0, 400 * DAY_US, count)
    kinds = [EventKind.ITEM_VIEW, EventKind.PURCHASE, EventKind.RETURN, EventKind.RATING, EventKind.SEARCH]
    events["kind"] = random.choice([int(kind) for kind in kinds], count)
    events["item"] = random.choice(items.encode(ITEMS), count)
    events["quantity"] = np.where(
        events["kind"] == int(EventKind.PURCHASE), random.integers(1, 4, count), np.nan
    )
    events["value"] = np.where(events["kind"] == int(EventKind.RATING), random.integers(1, 6, count), np.nan)
    events["device"], events["channel"] = random.integers(0, 4, count), random.integers(0, 4, count)
    priced = events["kind"] == int(EventKind.PURCHASE)
    events["price_micros"] = np.where(priced, random.integers(1, 90, count) * 1_000_000, 0)
    codes = currencies.encode(["EUR", "CHF"])
    events["currency"] = np.where(priced, random.choice(codes, count), -1)
    events["flags"] = PERSONALISATION + priced * HAS_PRICE
    return events


def recoded(events: Any, old: Vocabulary, new: Vocabulary, currencies: Vocabulary, other: Vocabulary) -> Any:
    """Returns the same events with the codes of another process."""
    events = events.copy()
    events["item"] = [new.encode([old[item]])[0] for item in events["item"].tolist()]
    events["currency"] = [
        -1 if currency < 0 else other.encode([currencies[currency]])[0]
        for currency in events["currency"].tolist()
    ]
    return events


def test_permuted_and_duplicated_histories_fold_to_identical_portraits() -> None:
    # 10,000 by `make verify-portraits`.
    histories = int(os.environ.get("SHOPKEEPER_PERMUTED_HISTORIES", "400"))
    random = np.random.default_rng(11)
    items, currencies = Vocabulary(), Vocabulary()
    other_items, other_currencies = Vocabulary(), Vocabulary()
    other_items.encode(ITEMS[::-1])
    other_currencies.encode(["JPY", "CHF", "EUR"])
    distinct: set[bytes] = set()
    for _ in range(histories):
        events = any_history(random, items, currencies)
        want = portrait_bytes(EMPTY_WINDOW.merge(events), items, currencies)
        distinct.add(want)
        count = len(events)
        again = recoded(events, items, other_items, currencies, other_currencies)[random.permutation(count)]
        twice = again[random.integers(0, count, int(random.integers(0, count + 1)))]
        cut = int(random.integers(0, count + 1))
        window = EMPTY_WINDOW.merge(again[:cut], twice).merge(again[cut:]).merge(twice[::-1])
        assert portrait_bytes(window, other_items, other_currencies) == want
    assert len(distinct) == histories, "each history has a portrait of its own"


def test_a_million_events_leave_the_newest_and_nothing_else() -> None:
    random = np.random.default_rng(13)
    window, newest = EMPTY_WINDOW, np.zeros(0, EVENT["key_high"])
    for _ in range(1_000):
        events = np.zeros(1_000, EVENT)
        events["key_high"] = random.integers(0, 2**63, len(events))
        window = window.merge(events)
        newest = np.sort(np.concatenate([newest, events["key_high"]]))[-MAX_WINDOW_EVENTS:]
    assert window.truncated
    assert window.events_W.nbytes == MAX_WINDOW_EVENTS * EVENT.itemsize
    assert np.array_equal(window.events_W["key_high"][::-1], newest)


def test_a_window_is_truncated_only_when_events_are_left_out() -> None:
    events = np.zeros(MAX_WINDOW_EVENTS, EVENT)
    events["key_low"] = np.arange(len(events))
    window = EMPTY_WINDOW.merge(events, events[:5])
    assert not window.truncated
    older_or_newer = np.zeros(1, EVENT)
    older_or_newer["key_high"] = 1
    assert window.merge(older_or_newer).truncated
    assert window.merge(older_or_newer).merge(events).truncated


@settings(max_examples=100, deadline=None)
@given(events=EVENTS)
def test_a_packed_window_comes_back_to_the_bit(events: list[Any]) -> None:
    items, currencies = Vocabulary(), Vocabulary()
    window = EMPTY_WINDOW.merge(*(event(**e, items=items, currencies=currencies) for e in events))
    assert unpack(pack(window.events_W)).tobytes() == window.events_W.tobytes()


@settings(max_examples=200, deadline=None)
@given(events=EVENTS)
def test_every_number_is_finite_and_in_its_range(events: list[Any]) -> None:
    items, currencies = Vocabulary(), Vocabulary()
    window = EMPTY_WINDOW.merge(*(event(**e, items=items, currencies=currencies) for e in events))
    portrait = fold_portrait(window, items, currencies, lambda i: FACTS.get(i, UNKNOWN_ITEM), NOW_US)

    estimates = [
        portrait.rfm.recency_days,
        portrait.satisfaction,
        portrait.purchase_interval_days,
        portrait.purchasing_power.price_level,
    ]
    assert all(math.isfinite(e.value) and e.value >= 0 and 0 <= e.confidence < 1 for e in estimates)
    assert 0 <= portrait.satisfaction.value <= 1
    assert -1 <= portrait.discount_sensitivity.value <= 1
    assert 0 <= portrait.purchasing_power.price_level.value <= 1
    assert abs(portrait.rfm.monetary_micros) < 2**63
    for interest in portrait.interests:
        assert 0 <= interest.weight <= 1
        assert math.isfinite(interest.decayed_evidence)
        assert interest.decayed_evidence >= 0
        assert interest.evidence_count >= 1
    assert sum(hour.evidence_count for hour in portrait.preferred_hours) == len(events)
    assert len(user_portrait(portrait).SerializeToString()) > 0
    summary = fold_summary(window, items, lambda i: FACTS.get(i, UNKNOWN_ITEM), NOW_US)
    assert summary == Summary.of(portrait)
    assert summary.order_count == portrait.rfm.order_count
    assert summary.price_level == portrait.purchasing_power.price_level


def test_the_portrait_of_a_shopper_worked_by_hand() -> None:
    items, currencies = Vocabulary(), Vocabulary()

    def make(*arguments: Any, **fields: Any) -> Any:
        return event(*arguments, **fields, items=items, currencies=currencies)

    window = EMPTY_WINDOW.merge(
        make(1, EventKind.ITEM_VIEW, "boot", days_ago=14, device=2, channel=1),
        make(2, EventKind.PURCHASE, "boot", days_ago=7, line=0, quantity=2, price=50_000_000),
        make(2, EventKind.PURCHASE, "sock", days_ago=7, line=1, quantity=1, price=3_000_000),
        make(3, EventKind.PURCHASE, "tea", days_ago=0, quantity=1, price=9_000_000, currency="CNY", device=2),
        make(4, EventKind.RETURN, "sock", days_ago=0, quantity=1, price=3_000_000),
        make(5, EventKind.RATING, "boot", days_ago=0, value=5.0),
        make(6, EventKind.SEARCH, days_ago=0, device=1, channel=6),
    )
    others = Population.of(
        np.array([NOW_US - days * DAY_US for days in (1, 2, 3, 4, 5)]),
        np.array([1, 1, 2, 3, 9]),
        np.array([1, 2, 9, 10, 11]) * 1_000_000,
        np.array(["CNY"] * 5, object),
    )
    portrait = fold_portrait(
        window, items, currencies, lambda i: FACTS.get(i, UNKNOWN_ITEM), NOW_US + 2 * DAY_US, others
    )

    assert portrait.event_count == 7
    # More recent than all others; two orders as the third of five; 9 CNY as the third of five.
    assert (
        portrait.rfm.recency_quintile,
        portrait.rfm.frequency_quintile,
        portrait.rfm.monetary_quintile,
    ) == (5, 3, 3)
    assert [(p.code, p.share, p.evidence_count) for p in portrait.preferred_devices] == [
        (2, 2 / 7, 2), (1, 1 / 7, 1),
    ]  # fmt: skip
    assert [(p.code, p.evidence_count) for p in portrait.preferred_channels] == [(1, 1), (6, 1)]
    # Boots at 50 of 60 while a quarter of that shelf is reduced, socks at their list price; tea has none.
    assert portrait.discount_sensitivity.value == pytest.approx((0.75 - 0.25) / (2 + 5))
    assert portrait.discount_sensitivity.evidence_count == 2
    assert [(a.kind, a.count) for a in portrait.activity] == [(1, 1), (3, 1), (6, 2), (7, 1), (8, 1)]
    assert portrait.rfm.order_count == 2
    assert portrait.rfm.recency_days.value == pytest.approx(2.0)
    # One order each: the currency that sorts first.
    assert (portrait.rfm.currency_code, portrait.rfm.monetary_micros) == ("CNY", 9_000_000)
    assert [(s.currency_code, s.amount_micros) for s in portrait.rfm.spend] == [
        ("CNY", 9_000_000),
        ("EUR", 100_000_000),
    ]
    assert portrait.life_cycle_stage == LifeCycleStage.ACTIVE
    assert portrait.purchase_interval_days.value == pytest.approx(7.0)
    # One rating of five stars and one line sent back, beside two answers' worth of 0.5.
    assert portrait.satisfaction.value == pytest.approx((1 + 1 + 0.25) / 4)
    assert portrait.satisfaction.evidence_count == 2

    # Short term, half-life 7 days: boot 1/4 (view) + 5/2 (bought) + 1 (rated); sock 5/2; tea 5.
    boot, sock, tea = 0.25 + 2.5 + 1.0, 2.5, 5.0
    short = {
        (i.facet, i.value) if not i.attribute_key else (i.attribute_key, i.value): i
        for i in portrait.interests
        if i.horizon == Horizon.SHORT_TERM
    }
    total = boot + sock + tea
    assert short[Facet.CATEGORY, "Women"].decayed_evidence == pytest.approx(boot + sock)
    assert short[Facet.CATEGORY, "Women"].weight == pytest.approx((boot + sock) / total)
    assert short[Facet.CATEGORY, "Women > Shoes"].weight == pytest.approx(boot / total)
    assert short[Facet.CATEGORY, "Women"].evidence_count == 4
    assert short[Facet.BRAND, "Leaf"].weight == pytest.approx(tea / total)
    assert short[Facet.PRICE_BAND, "5"].weight == pytest.approx(boot / (boot + sock))
    assert short["colour", "red"].weight == pytest.approx(boot / (boot + sock))
    assert short["colour", "red"].facet == Facet.ATTRIBUTE
    # Among the values of its own key.
    assert short["season", "winter"].weight == 1.0
    long = {(i.facet, i.value): i for i in portrait.interests if i.horizon == Horizon.LONG_TERM}
    assert long[Facet.BRAND, "Acme"].decayed_evidence == pytest.approx(
        1 * 2 ** (-14 / 90) + 10 * 2 ** (-7 / 90) + 1
    )
    # Undecayed weights: boot 1 + 5 + 1 at level .9, sock 5 at level .1.
    assert portrait.purchasing_power.price_level.value == pytest.approx((7 * 0.9 + 5 * 0.1) / 12)


@pytest.mark.parametrize(
    ("orders", "days_ago", "stage"),
    [
        (0, 0, LifeCycleStage.PROSPECT),
        (1, 5, LifeCycleStage.NEW),
        (2, 5, LifeCycleStage.ACTIVE),
        (5, 5, LifeCycleStage.LOYAL),
        (5, 100, LifeCycleStage.LAPSING),
        (5, 400, LifeCycleStage.LOST),
    ],
)
def test_life_cycle_stages(orders: int, days_ago: float, stage: LifeCycleStage) -> None:
    items, currencies = Vocabulary(), Vocabulary()
    events = [
        event(n, EventKind.PURCHASE, "tea", days_ago=days_ago, items=items, currencies=currencies)
        for n in range(orders)
    ]
    events.append(event(99, EventKind.SEARCH, days_ago=days_ago, items=items, currencies=currencies))
    window = EMPTY_WINDOW.merge(*events)
    assert fold_portrait(window, items, currencies, lambda _: UNKNOWN_ITEM, NOW_US).life_cycle_stage == stage


def test_events_sent_without_consent_are_in_no_portrait() -> None:
    items, currencies = Vocabulary(), Vocabulary()
    secret = event(1, EventKind.PURCHASE, "tea", items=items, currencies=currencies)
    secret["flags"] = 0
    window = EMPTY_WINDOW.merge(
        secret, event(2, EventKind.ITEM_VIEW, "boot", items=items, currencies=currencies)
    )
    portrait = fold_portrait(window, items, currencies, lambda _: UNKNOWN_ITEM, NOW_US)

    assert window.personalisation
    assert portrait.rfm.order_count == 0
    assert [items[h["item"]] for h in window.history()] == ["boot"]


def test_a_price_level_is_the_mid_rank_within_category_and_currency() -> None:
    levels = PriceLevels.of(
        [
            *(("Shoes", "EUR", price) for price in (10, 20, 20, 40)),
            ("Shoes", "USD", 10),
            ("Food", "EUR", 1),
        ]
    )
    assert levels.level("Shoes", "EUR", 20) == pytest.approx((1 + 3) / 2 / 4)
    assert levels.level("Shoes", "EUR", 5) == 0.0
    assert levels.level("Shoes", "EUR", 99) == 1.0
    # One price is no scale.
    assert levels.level("Shoes", "USD", 10) is None
    assert levels.level("Toys", "EUR", 10) is None


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2**64 - 1))))
def test_grouping_by_user_keeps_every_event_with_its_user(rows: list[tuple[int, int]]) -> None:
    events = np.zeros(len(rows), EVENT)
    events["key_low"] = [key for _, key in rows]
    high = np.array([user for user, _ in rows], np.uint64)
    batch = group_by_user(high, np.zeros_like(high), events)
    got = sorted(
        (int.from_bytes(user_key[:8], "big"), int(row["key_low"])) for user_key, part in batch for row in part
    )
    assert got == sorted(rows)
    assert len(set(batch.user_keys)) == len(batch.user_keys)


def test_fifths_of_the_population_are_those_of_a_sorted_list() -> None:
    rng = np.random.default_rng(3)
    for count in (5, 17, 1000):
        last, orders = rng.integers(0, 50, count), rng.integers(1, 6, count)
        spent = rng.integers(-5, 100, count)
        codes = np.array(rng.choice(["EUR", "USD"], count), object)
        population = Population.of(last, orders, spent, codes)
        for at in range(0, count, 7):
            quintiles = population.quintiles(last[at], orders[at], spent[at], codes[at])
            alike = spent[codes == codes[at]]
            for quintile, value, values in zip(
                quintiles, (last[at], orders[at], spent[at]), (last, orders, alike), strict=True
            ):
                if len(values) < 5:
                    assert quintile == 0
                    continue
                ranked = sorted(values)
                # The bound of a fifth is the value at which that share of all is reached.
                bounds = [ranked[math.ceil(share * len(ranked)) - 1] for share in (0.2, 0.4, 0.6, 0.8)]
                assert quintile == 1 + sum(bound < value for bound in bounds)
    few = Population.of(last[:4], orders[:4], spent[:4], codes[:4])
    assert few.quintiles(1, 1, 1, "EUR") == (0, 0, 0)
