"""SIMULATION: a past in which the shop had no recommender, only best-sellers, categories and search. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from shared.event_kinds import EventKind
from shared.importing.batches import UNKNOWN_PRICE, EventBatch
from shared.simulation.shop import CURRENCY, Floats, Ints, Shop, make_shop
from shared.simulation.shoppers import Crowd, begin_visits, check_out, look_at_page, make_crowd

PAGE_SIZE = 10
MAX_PAGES = 12
DAY_US = 86_400 * 1_000_000
BOT_VIEWS = 250
SECONDS_A_PAGE = 25.0
# How a shopper without recommendations finds things.
BEST_SELLERS, CATEGORY, SEARCH = 0.15, 0.5, 0.35


@dataclass(frozen=True, slots=True)
class Scale:
    """How big the simulation is. `days` of history end at `end_us` (microseconds since 1970 UTC)."""

    seed: int = 1
    shoppers: int = 2_000
    items: int = 500
    days: int = 90
    visits_per_shopper: float = 6.0
    bot_share: float = 0.005
    end_us: int = 1_767_225_600_000_000

    def __post_init__(self) -> None:
        if self.shoppers < 1 or self.days < 1 or self.visits_per_shopper <= 0:
            raise ValueError("shoppers, days and visits must be above 0")


@dataclass(slots=True)
class World:
    """A shop, its shoppers and the generator that goes on from here."""

    scale: Scale
    shop: Shop
    crowd: Crowd
    rng: np.random.Generator

    def user_id(self, row: int) -> str:
        """Returns the raw id of a shopper."""
        return f"shopper-{row:05d}"


@dataclass(slots=True)
class _Log:
    """Columns of events as they happen; a group number of -1 is an event of one line."""

    who: list[Ints] = field(default_factory=list)
    kind: list[Ints] = field(default_factory=list)
    day: list[Floats] = field(default_factory=list)
    item: list[Ints] = field(default_factory=list)
    visit: list[Ints] = field(default_factory=list)
    group: list[Ints] = field(default_factory=list)
    groups: int = 0

    def add(
        self, kind: EventKind, who: Ints, day: Floats, item: Ints, visit: int, group: Ints | None = None
    ) -> None:
        if who.size:
            self.who.append(who)
            self.kind.append(np.full(who.size, int(kind)))
            self.day.append(day)
            self.item.append(item)
            self.visit.append(np.full(who.size, visit))
            self.group.append(np.full(who.size, -1) if group is None else group)


def make_history(scale: Scale) -> tuple[World, EventBatch]:
    """Returns the world after its history, and the history's events by time. The same scale: the same bytes."""
    rng = np.random.default_rng(scale.seed)
    shop = make_shop(rng, scale.items, scale.seed)
    crowd = make_crowd(rng, shop, scale.shoppers, scale.visits_per_shopper / scale.days, scale.bot_share)
    log = _Log()
    people = np.flatnonzero(~crowd.is_bot)
    order = browse_days(rng, crowd, people, scale.days)
    _browse(rng, shop, crowd, people, order, scale.days, shop.appeal.copy(), log)
    _bots(rng, shop, np.flatnonzero(crowd.is_bot), scale.days, log)
    return World(scale, shop, crowd, rng), _batch(shop, scale, log)


def browse_days(rng: np.random.Generator, crowd: Crowd, people: Ints, days: int) -> list[Floats]:
    """Returns the days of the visits of each of `people`, ascending, at least one each."""
    visits = np.maximum(rng.poisson(crowd.visits_per_day[people] * days), 1)
    return [np.sort(_visit_days(rng, n, days)) for n in visits.tolist()]


def browse_people(
    rng: np.random.Generator, shop: Shop, crowd: Crowd, people: Ints, order: list[Floats], days: int, sales: Floats
) -> tuple[Ints, Ints, Floats, Ints]:  # fmt: skip
    """Returns who, EventKind, day and item of every line of the visits on the days of `order`; changes `sales`."""
    log = _Log()
    _browse(rng, shop, crowd, people, order, days, sales, log)
    return (
        np.concatenate(log.who),
        np.concatenate(log.kind),
        np.concatenate(log.day),
        np.concatenate(log.item),
    )


def _browse(
    rng: np.random.Generator, shop: Shop, crowd: Crowd, people: Ints, order: list[Floats], days: int,
    sales: Floats, log: _Log,
) -> None:  # fmt: skip
    visits = np.array([len(own) for own in order])
    for number in range(int(visits.max(initial=0))):
        rows = people[visits > number]
        at = np.array([order[i][number] for i in np.flatnonzero(visits > number)])
        _visit(rng, shop, crowd, rows, at, number, days, sales, log)


def _visit_days(rng: np.random.Generator, count: int, days: int) -> Floats:
    hour = np.clip(rng.normal(19, 3.5, count) % 24, 0, 23.99)
    # The last quarter of an hour stays free, so that a visit ends before history does.
    return np.minimum(np.floor(rng.uniform(0, days, count)) + hour / 24, days - 0.02)


def _visit(
    rng: np.random.Generator, shop: Shop, crowd: Crowd, rows: Ints, day: Floats, number: int, days: int,
    sales: Floats, log: _Log,
) -> None:  # fmt: skip
    begin_visits(rng, shop, crowd, rows, day)
    clock = day.copy()
    at_launch = days - shop.launch_day
    cart_rows: list[Ints] = []
    cart_items: list[Ints] = []
    active = np.arange(rows.size)
    for _ in range(MAX_PAGES):
        if active.size == 0:
            break
        who = rows[active]
        page, searched = browse(rng, shop, crowd, who, sales, at_launch[None, :] <= day[active][:, None])
        log.add(
            EventKind.SEARCH,
            who[searched],
            clock[active][searched],
            crowd.need_category[who][searched],
            number,
        )
        clock[active] += rng.exponential(SECONDS_A_PAGE, active.size) / 86_400
        choices = look_at_page(rng, shop, crowd, who, page)
        hit = choices.clicked >= 0
        log.add(EventKind.ITEM_VIEW, who[hit], clock[active][hit], choices.clicked[hit], number)
        np.add.at(sales, choices.clicked[hit], 0.05)
        clock[active] += rng.exponential(SECONDS_A_PAGE, active.size) / 86_400
        into = choices.to_cart
        log.add(EventKind.ADD_TO_CART, who[into], clock[active][into], choices.clicked[into], number)
        cart_rows.append(active[into])
        cart_items.append(choices.clicked[into])
        active = active[choices.stays]
    at = np.concatenate(cart_rows) if cart_rows else np.empty(0, np.int64)
    items = np.concatenate(cart_items) if cart_items else np.empty(0, np.int64)
    pairs, first = np.unique(at * len(shop) + items, return_index=True)
    del pairs
    at, items = at[first], items[first]
    bought, returned = check_out(rng, shop, crowd, rows[at], items, clock[at])
    left = ~bought & (rng.random(at.size) < 0.5)
    log.add(EventKind.REMOVE_FROM_CART, rows[at][left], clock[at][left] + 20 / 86_400, items[left], number)
    log.add(
        EventKind.PURCHASE, rows[at][bought], clock[at][bought] + 60 / 86_400, items[bought], number,
        log.groups + at[bought],
    )  # fmt: skip
    np.add.at(sales, items[bought], 0.5)
    back = clock[at] + rng.uniform(3, 10, at.size)
    # A return after the end of history has not happened yet.
    returned &= back < days
    log.add(
        EventKind.RETURN, rows[at][returned], back[returned], items[returned], number,
        log.groups + rows.size + np.arange(int(returned.sum())),
    )  # fmt: skip
    log.groups += 2 * rows.size + at.size


def browse(
    rng: np.random.Generator, shop: Shop, crowd: Crowd, rows: Ints, sales: Floats, on_sale: np.ndarray
) -> tuple[Ints, np.ndarray]:
    """Returns pages (M, PAGE_SIZE) of a shop without recommendations, and which of them came from a search.

    Best-sellers rank by sales; a category page by sales within the category needed; search by likeness to the
    need, as words would find it, imprecisely.
    """
    way = rng.choice(3, rows.size, p=[BEST_SELLERS, CATEGORY, SEARCH])
    pages = np.empty((rows.size, PAGE_SIZE), np.int64)
    log_sales = np.log(sales)[None, :]
    for number in range(3):
        at = np.flatnonzero(way == number)
        if at.size == 0:
            continue
        who = rows[at]
        # What a best-seller list is to one shopper is not quite what it is to the next: rankings are noisy.
        noise = rng.standard_normal((at.size, len(shop)), np.float32)
        in_category = shop.category[None, :] == crowd.need_category[who][:, None]
        if number == 0:
            score = log_sales + 0.4 * noise
        elif number == 1:
            score = 0.7 * log_sales + 0.5 * noise + 100.0 * in_category
        else:
            wanted = np.arange(len(shop))[None, :] == crowd.target[who][:, None]
            score = 6 * (crowd.need[who] @ shop.taste.T) + 2.0 * in_category + 1.5 * wanted
            score += 0.8 * noise + 0.2 * log_sales
        score = np.where(on_sale[at], score, -np.inf)
        top = np.argpartition(-score, PAGE_SIZE, axis=1)[:, :PAGE_SIZE]
        ranked = np.argsort(-np.take_along_axis(score, top, axis=1), axis=1, kind="stable")
        pages[at] = np.take_along_axis(top, ranked, axis=1)
    return pages, way == 2


def _bots(rng: np.random.Generator, shop: Shop, rows: Ints, days: int, log: _Log) -> None:
    for row in rows.tolist():
        start = rng.uniform(0, days - 0.1)
        first = int(rng.integers(len(shop)))
        items = (first + np.arange(BOT_VIEWS)) % len(shop)
        gaps = rng.uniform(0.3, 1.2, BOT_VIEWS) / 86_400
        log.add(EventKind.ITEM_VIEW, np.full(BOT_VIEWS, row), start + np.cumsum(gaps), items, 0)


def _batch(shop: Shop, scale: Scale, log: _Log) -> EventBatch:
    who, kind, day, item, visit, group = (
        np.concatenate(c) for c in (log.who, log.kind, log.day, log.item, log.visit, log.group)
    )
    time = scale.end_us - scale.days * DAY_US + np.rint(day * DAY_US).astype(np.int64)
    # Milliseconds are what the log keeps of an event's identity.
    time = time // 1_000 * 1_000
    own = np.where(group < 0, log.groups + np.arange(group.size), group)
    earliest = np.full(int(own.max()) + 1, np.iinfo(np.int64).max)
    np.minimum.at(earliest, own, time)
    order = np.lexsort((np.arange(own.size), own, earliest[own]))
    who, kind, item, visit, own = who[order], kind[order], item[order], visit[order], own[order]
    heads = np.flatnonzero(np.concatenate(([True], own[1:] != own[:-1])))
    is_search = kind == int(EventKind.SEARCH)
    lines = ~is_search
    line_count = np.add.reduceat(lines.astype(np.int64), heads)
    prices = np.where(
        np.isin(kind, [int(EventKind.REMOVE_FROM_CART)]), UNKNOWN_PRICE, shop.price_micros[item]
    )
    head_kind, head_who, head_visit = kind[heads], who[heads], visit[heads]
    users = [f"shopper-{row:05d}" for row in head_who.tolist()]
    sessions = [f"{user}-{number}" for user, number in zip(users, head_visit.tolist(), strict=True)]
    ordered = np.isin(head_kind, [int(EventKind.PURCHASE), int(EventKind.RETURN)])
    prefix = f"simulation:{scale.seed}:{scale.end_us // 1_000_000}"
    return EventBatch(
        event_ids=[f"{prefix}:{n}" for n in range(heads.size)],
        user_ids=users,
        kinds=head_kind.astype(np.uint8),
        occurred_at_us=earliest[own[heads]],
        offsets=np.concatenate(([0], np.cumsum(line_count))).astype(np.int64),
        item_ids=[shop.item_ids[i] for i in item[lines].tolist()],
        quantities=np.ones(int(lines.sum())),
        price_micros=prices[lines].astype(np.int64),
        currency_codes=[CURRENCY] * int(lines.sum()),
        values=np.full(heads.size, np.nan),
        session_ids=sessions,
        order_ids=[f"o-{s}" if o else "" for s, o in zip(sessions, ordered.tolist(), strict=True)],
        queries=[
            shop.category_names[c].lower() if s else ""
            for c, s in zip(item[heads].tolist(), is_search[heads].tolist(), strict=True)
        ],
        attribution_tokens=[""] * heads.size,
    )
