"""SIMULATION: pages in the order of some recommender, what shoppers do with them, and the truth behind it. Pure.

The position is a bias of known size: position k is looked at with probability k**-position_decay, whatever stands
there. What would be clicked if it were looked at is known too: sigmoid(U) of the package's formula.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shared.event_kinds import EventKind
from shared.simulation.history import MAX_PAGES, PAGE_SIZE, SECONDS_A_PAGE, World
from shared.simulation.shop import Floats, Ints
from shared.simulation.shoppers import begin_visits, check_out, look_at_page, utilities

Scorer = Callable[[int, Ints, Ints, Floats], NDArray[np.floating]]
"""Scores every item, (I,), for a shopper: row, items, EventKinds and days of what they did so far, oldest first."""


@dataclass(frozen=True, slots=True, eq=False)
class ImpressionLog:
    """P pages of K items, in the order of time, and the E events that came of them.

    Attributes:
        who_P, day_P: shopper and day.
        items_PK: what stood at positions 1 to K.
        appeal_PK: the probability that it is clicked where it is looked at: the truth.
        clicked_PK, carted_PK, bought_PK: what was done.
        event_who_E, event_kind_E, event_item_E, event_day_E: the events, past ones included, by shopper and time.
    """

    who_P: Ints
    day_P: Floats
    items_PK: Ints
    appeal_PK: Floats
    clicked_PK: NDArray[np.bool_]
    carted_PK: NDArray[np.bool_]
    bought_PK: NDArray[np.bool_]
    event_who_E: Ints
    event_kind_E: Ints
    event_item_E: Ints
    event_day_E: Floats


def make_impressions(
    world: World,
    past: tuple[Ints, Ints, Ints, Floats],
    score: Scorer,
    visits: int,
    *,
    position_decay: float,
    noise: float,
    days: float = 20.0,
    wave: int = 64,
) -> ImpressionLog:
    """Goes on from a world's history with visits to a shop that shows what a recommender ranks highest.

    Args:
        past: who, EventKind, item and day of what happened so far.
        score: the recommender.
        position_decay: how steeply attention falls.
        noise: deviation of what is added to each score, beside the scores' own: without any, merit and position are
            one, and nobody could tell them apart.
        days: over which the visits spread; they follow the world's last day.
    """
    rng, shop, crowd = world.rng, world.shop, world.crowd
    people = np.flatnonzero(~crowd.is_bot)
    events: dict[int, list[tuple[float, int, int]]] = {int(row): [] for row in people}
    for who, kind, item, day in zip(*(column.tolist() for column in past), strict=True):
        if who in events:
            events[who].append((day, kind, item))
    for own in events.values():
        own.sort()
    pages: list[tuple[int, float, Ints, Floats, int, bool]] = []
    bought_pages: list[tuple[int, int]] = []
    rate = crowd.visits_per_day[people]
    for start in range(0, visits, wave):
        rows = np.sort(rng.choice(people, min(wave, people.size), replace=False, p=rate / rate.sum()))
        day = np.full(rows.size, world.scale.days + days * start / visits)
        begin_visits(rng, shop, crowd, rows, day)
        active = np.arange(rows.size)
        carts: list[tuple[int, int, int]] = []
        for number in range(MAX_PAGES):
            if active.size == 0:
                break
            who = rows[active]
            now = day[active] + number * 3 * SECONDS_A_PAGE / 86_400
            page = np.stack([_page(rng, score, row, events[row], noise, len(shop)) for row in who.tolist()])
            appeal = 1 / (1 + np.exp(-utilities(shop, crowd, who, page)))
            choices = look_at_page(rng, shop, crowd, who, page, position_decay)
            for n, row in enumerate(who.tolist()):
                position = int(choices.clicked_position[n])
                carted = bool(choices.to_cart[n])
                if position >= 0:
                    item = int(page[n, position])
                    at = float(now[n]) + SECONDS_A_PAGE / 86_400
                    events[row].append((at, int(EventKind.RECOMMENDATION_CLICK), item))
                    if carted:
                        events[row].append((at + 10 / 86_400, int(EventKind.ADD_TO_CART), item))
                        carts.append((int(active[n]), item, len(pages)))
                pages.append((row, float(now[n]), page[n], appeal[n], position, carted))
            active = active[choices.stays]
        if carts:
            at_rows, items = np.array([c[0] for c in carts]), np.array([c[1] for c in carts])
            bought, _ = check_out(rng, shop, crowd, rows[at_rows], items, day[at_rows])
            for (i, item, number), yes in zip(carts, bought.tolist(), strict=True):
                if yes:
                    bought_pages.append((number, item))
                    at = float(day[i]) + MAX_PAGES * 3 * SECONDS_A_PAGE / 86_400
                    events[int(rows[i])].append((at, int(EventKind.PURCHASE), item))
    return _log(pages, bought_pages, events)


def _page(
    rng: np.random.Generator, score: Scorer, row: int, own: list[tuple[float, int, int]], noise: float, items: int
) -> Ints:  # fmt: skip
    day, kind, item = (np.array(column) for column in zip(*own, strict=True)) if own else (np.empty(0),) * 3
    found = np.asarray(score(row, item.astype(np.int64), kind.astype(np.int64), day), np.float64)
    spread = float(found[np.isfinite(found)].std()) or 1.0
    found = found + noise * spread * rng.normal(size=items)
    top = np.argpartition(-found, PAGE_SIZE)[:PAGE_SIZE]
    return np.asarray(top[np.argsort(-found[top], kind="stable")])


def _log(
    pages: list[tuple[int, float, Ints, Floats, int, bool]],
    bought_pages: list[tuple[int, int]],
    events: dict[int, list[tuple[float, int, int]]],
) -> ImpressionLog:
    order = sorted(range(len(pages)), key=lambda n: (pages[n][1], n))
    new_of = {old: new for new, old in enumerate(order)}
    items_PK = np.stack([pages[n][2] for n in order])
    clicked_PK = np.zeros(items_PK.shape, bool)
    carted_PK, bought_PK = clicked_PK.copy(), clicked_PK.copy()
    for new, old in enumerate(order):
        position, carted = pages[old][4:]
        if position >= 0:
            clicked_PK[new, position] = True
            carted_PK[new, position] = carted
    for old, item in bought_pages:
        bought_PK[new_of[old]] |= items_PK[new_of[old]] == item
    flat = [(who, day, kind, item) for who, own in sorted(events.items()) for day, kind, item in sorted(own)]
    return ImpressionLog(
        np.array([pages[n][0] for n in order]),
        np.array([pages[n][1] for n in order]),
        items_PK,
        np.stack([pages[n][3] for n in order]),
        clicked_PK,
        carted_PK,
        bought_PK,
        np.array([e[0] for e in flat]),
        np.array([e[2] for e in flat]),
        np.array([e[3] for e in flat]),
        np.array([e[1] for e in flat], np.float64),
    )
