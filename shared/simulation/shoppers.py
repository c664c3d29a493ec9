"""SIMULATION: shoppers and how they choose, many at once. Pure; see the package for the model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shared.simulation.shop import TASTE_DIMENSIONS, Floats, Ints, Shop, unit

Flags = NDArray[np.bool_]

NO_ITEM = -1
BASE_APPEAL = -5.2
TASTE_WEIGHT = 1.0
NEED_WEIGHT = 2.6
CATEGORY_BONUS = 0.8
COMPANION_BONUS = 2.2
BRAND_BONUS = 0.6
QUALITY_WEIGHT = 0.5
POSITION_DECAY = 0.35
DRIFT_PER_DAY = 0.02
FAVOURITES = 3


@dataclass(slots=True)
class Crowd:
    """N shoppers: who they are (constant) and what is on their mind (changes).

    Attributes:
        taste: (N, TASTE_DIMENSIONS) unit vectors; drifts.
        favourites: (N, FAVOURITES) categories, the dearest first.
        brand: (N,) favourite brand.
        price_sensitivity: (N,) at least 0.
        boredom: (N,) at least 0: appeal lost each time an item was seen.
        patience: (N,) probability of turning to another page.
        visits_per_day: (N,).
        is_bot: (N,).
        need: (N, TASTE_DIMENSIONS) unit vectors.
        need_category: (N,) category.
        target: (N,) the very item that is wanted, or NO_ITEM.
        seen: (N, I) float32, how often each item was seen; fades.
        due_item, due_day: (N,) the consumable to be bought again, or NO_ITEM, and when.
        last_day: (N,) day of the last visit.
    """

    taste: Floats
    favourites: Ints
    brand: Ints
    price_sensitivity: Floats
    boredom: Floats
    patience: Floats
    visits_per_day: Floats
    is_bot: Flags
    need: Floats
    need_category: Ints
    target: Ints
    seen: NDArray[np.float32]
    due_item: Ints
    due_day: Floats
    last_day: Floats

    def __len__(self) -> int:
        return int(self.brand.size)


@dataclass(frozen=True, slots=True)
class Choices:
    """What M shoppers did with one page each.

    Attributes:
        clicked_position: (M,) from 0, or -1.
        clicked: (M,) item, or NO_ITEM.
        to_cart: (M,) whether the clicked item went into the cart.
        stays: (M,) whether they turn to another page.
    """

    clicked_position: Ints
    clicked: Ints
    to_cart: Flags
    stays: Flags


def make_crowd(
    rng: np.random.Generator, shop: Shop, shoppers: int, visits_per_day: float, bot_share: float
) -> Crowd:
    """Returns `shoppers` shoppers, of whom a share are bots; `visits_per_day` is the mean of people's rates."""
    categories = len(shop.category_names)
    liking = rng.gumbel(size=(shoppers, categories))
    favourites = np.argsort(-liking, axis=1, kind="stable")[:, :FAVOURITES]
    pull = shop.category_direction[favourites].mean(axis=1)
    taste = unit(pull + 0.5 * unit(rng.normal(size=(shoppers, TASTE_DIMENSIONS))))
    return Crowd(
        taste=taste,
        favourites=favourites,
        brand=rng.integers(0, len(shop.brand_names), shoppers),
        price_sensitivity=rng.gamma(2.0, 0.4, shoppers),
        boredom=rng.gamma(2.0, 0.15, shoppers),
        patience=rng.beta(8, 2, shoppers),
        visits_per_day=visits_per_day * rng.gamma(1.5, 1 / 1.5, shoppers),
        is_bot=rng.random(shoppers) < bot_share,
        need=shop.category_direction[favourites[:, 0]].copy(),
        need_category=favourites[:, 0].copy(),
        target=np.full(shoppers, NO_ITEM),
        seen=np.zeros((shoppers, len(shop)), np.float32),
        due_item=np.full(shoppers, NO_ITEM),
        due_day=np.zeros(shoppers),
        last_day=np.full(shoppers, -1e9),
    )


def begin_visits(rng: np.random.Generator, shop: Shop, crowd: Crowd, rows: Ints, day: Floats) -> None:
    """Gives the shoppers of `rows` (M, distinct) the need that brings them on `day` (M,)."""
    away = np.clip(day - crowd.last_day[rows], 0, 60)
    drift = DRIFT_PER_DAY * np.sqrt(away)[:, None] * rng.normal(size=(rows.size, TASTE_DIMENSIONS))
    crowd.taste[rows] = unit(crowd.taste[rows] + drift)
    crowd.seen[rows] *= np.float32(0.7)
    due = (crowd.due_item[rows] != NO_ITEM) & (crowd.due_day[rows] <= day)
    goes_on = ~due & (rng.random(rows.size) < 0.55 * np.exp(-away / 10))
    fresh = ~due & ~goes_on
    rank = np.minimum(rng.geometric(0.55, rows.size) - 1, FAVOURITES - 1)
    category = crowd.favourites[rows, rank]
    wander = rng.random(rows.size) < 0.1
    category = np.where(wander, rng.integers(0, len(shop.category_names), rows.size), category)
    fresh_rows = rows[fresh]
    crowd.need_category[fresh_rows] = category[fresh]
    crowd.need[fresh_rows] = unit(shop.category_direction[category[fresh]] + 0.4 * crowd.taste[fresh_rows])
    crowd.target[fresh_rows] = NO_ITEM
    due_rows = rows[due]
    crowd.target[due_rows] = crowd.due_item[due_rows]
    crowd.need[due_rows] = shop.taste[crowd.due_item[due_rows]]
    crowd.need_category[due_rows] = shop.category[crowd.due_item[due_rows]]
    # Who needs it again does not find it boring.
    crowd.seen[due_rows, crowd.due_item[due_rows]] = 0
    crowd.due_item[due_rows] = NO_ITEM
    crowd.last_day[rows] = day


def utilities(shop: Shop, crowd: Crowd, rows: Ints, items: Ints) -> Floats:
    """Returns U of the package's formula for each shopper of `rows` (M,) and item of `items` (M, K), shape (M, K).

    Items NO_ITEM have utility -inf.
    """
    taste = shop.taste[items]
    value = (
        BASE_APPEAL
        + TASTE_WEIGHT * np.einsum("md,mkd->mk", crowd.taste[rows], taste)
        + NEED_WEIGHT * np.einsum("md,mkd->mk", crowd.need[rows], taste)
        + CATEGORY_BONUS * (shop.category[items] == crowd.need_category[rows][:, None])
        + COMPANION_BONUS * (items == crowd.target[rows][:, None])
        + BRAND_BONUS * (shop.brand[items] == crowd.brand[rows][:, None])
        + QUALITY_WEIGHT * shop.quality[items]
        - crowd.price_sensitivity[rows][:, None] * shop.relative_log_price[items]
        - crowd.boredom[rows][:, None] * crowd.seen[rows[:, None], items]
    )
    return np.where(items == NO_ITEM, -np.inf, value)


def look_at_page(
    rng: np.random.Generator,
    shop: Shop,
    crowd: Crowd,
    rows: Ints,
    page: Ints,
    position_decay: float = POSITION_DECAY,
) -> Choices:
    """Shows each shopper of `rows` (M, distinct) their row of `page` (M, K) and returns what they do.

    Changes what they have seen, and what they need next. Position k is looked at with probability
    k**-position_decay.
    """
    count, width = page.shape
    looked = rng.random((count, width)) < (np.arange(width) + 1.0) ** -position_decay
    with np.errstate(over="ignore"):
        appeals = rng.random((count, width)) < 1 / (1 + np.exp(-utilities(shop, crowd, rows, page)))
    wanted = looked & appeals & (page != NO_ITEM)
    any_click = wanted.any(axis=1)
    position = np.where(any_click, wanted.argmax(axis=1), -1)
    clicked = np.where(any_click, page[np.arange(count), position], NO_ITEM)
    # The cascade stops at the click: what stands below it was not looked at.
    until = np.where(any_click, position, width)
    visible = looked & (np.arange(width)[None, :] <= until[:, None]) & (page != NO_ITEM)
    at_row, at_column = np.nonzero(visible)
    np.add.at(crowd.seen, (rows[at_row], page[at_row, at_column]), np.float32(0.5))

    hit = np.flatnonzero(any_click)
    items, who = clicked[hit], rows[hit]
    crowd.seen[who, items] += np.float32(1.5)
    desire = 0.6 + 1.2 * shop.quality[items] - crowd.price_sensitivity[who] * shop.relative_log_price[items]
    desire += 1.0 * (items == crowd.target[who])
    to_cart = np.zeros(count, bool)
    to_cart[hit] = rng.random(hit.size) < 0.4 / (1 + np.exp(-desire))
    _follow_need(rng, shop, crowd, who, items, to_cart[hit])
    stays = rng.random(count) < np.where(any_click, crowd.patience[rows], crowd.patience[rows] * 0.8)
    return Choices(position, clicked, to_cart, stays)


def _follow_need(
    rng: np.random.Generator, shop: Shop, crowd: Crowd, who: Ints, items: Ints, in_cart: Flags
) -> None:
    moves = rng.random(who.size) < np.where(in_cart, 0.85, 0.5)
    which = np.minimum(rng.geometric(0.6, who.size) - 1, shop.companions.shape[1] - 1)
    companion = shop.companions[items, which]
    similar = unit(0.5 * crowd.need[who] + 0.5 * shop.taste[items])
    crowd.need[who] = np.where(moves[:, None], shop.taste[companion], similar)
    crowd.need_category[who] = np.where(moves, shop.category[companion], shop.category[items])
    crowd.target[who] = np.where(moves, companion, NO_ITEM)


def check_out(
    rng: np.random.Generator, shop: Shop, crowd: Crowd, rows: Ints, items: Ints, day: Floats
) -> tuple[Flags, Flags]:
    """Decides on cart lines (L shoppers, L items, days L): bought, and (bought and) sent back later, both (L,).

    A cart line that is not bought is taken out, or left standing. Buying a consumable starts its cycle.
    """
    desire = 0.9 + shop.quality[items] - crowd.price_sensitivity[rows] * shop.relative_log_price[items]
    bought = rng.random(rows.size) < 1 / (1 + np.exp(-desire))
    returned = bought & (rng.random(rows.size) < 0.12 * (1 - shop.quality[items]) / 2 * 2)
    cycle = rng.uniform(12, 35, rows.size)
    again = bought & shop.consumable[items]
    crowd.due_item[rows[again]] = items[again]
    crowd.due_day[rows[again]] = day[again] + cycle[again]
    # Nobody wants a second teapot at once.
    crowd.seen[rows[bought], items[bought]] += np.float32(4)
    return bought, returned
