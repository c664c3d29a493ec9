"""SIMULATION: histories of very many people over a catalogue with a long tail, drawn by columns.

The simulated shop of `shared.simulation` is a world of pages and visits, whose people take a row as long as the catalogue each;
here a million people and 20,000 items fit into memory. The top tenth of the items has 71% of the events; half of the items
together have less than 10%.

    popularity of items, and of categories: Zipf (1 / rank)
    a person     likes 3 categories; takes 2 to 50 items, 9 on average
    next item    with probability .35 one of 6 followers of the newest item (weights 1 / k), of its category for the most
                 part; .45 an item of a category that they like, by popularity; .2 any, by popularity
    attributes   category and brand (an item's own is public)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from services.trainer.pipeline.dataset import Histories

_FOLLOWERS, _LIKED, _SHORTEST, _LONGEST, _MEAN = 6, 3, 2, 50, 9.0
_FOLLOWS, _LIKES = 0.35, 0.45


@dataclass(frozen=True, slots=True, eq=False)
class Population:
    """Histories, and what the catalogue says of items."""

    histories: Histories
    attributes_of: dict[str, list[str]]


def make_population(people: int, items: int, seed: int) -> Population:
    """Returns so many people. The shop is the same for all numbers of people; the same arguments, the same people."""
    shop = np.random.default_rng(7)
    categories, brands = max(items // 100, 2), max(items // 40, 2)
    category_I = _zipf(shop, categories, items, power=0.5)
    brand_I = _zipf(shop, brands, items, power=0.5)
    weight_I = shop.permutation(1.0 / np.arange(1, items + 1))
    by_category = np.lexsort((np.arange(items), category_I))
    start_C1 = np.searchsorted(category_I[by_category], np.arange(categories + 1))
    # Within a category by popularity, drawn by one search in the cumulative weights of all.
    cumulative = np.concatenate([[0.0], np.cumsum(weight_I[by_category])])
    everywhere = np.concatenate([[0.0], np.cumsum(weight_I)])

    def of_category(
        generator: np.random.Generator, category_N: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        low, high = cumulative[start_C1[category_N]], cumulative[start_C1[category_N + 1]]
        drawn = low + generator.random(len(category_N)) * (high - low)
        place = np.searchsorted(cumulative, drawn, "right") - 1
        return by_category[np.clip(place, start_C1[category_N], start_C1[category_N + 1] - 1)]

    follower_IF = np.stack([of_category(shop, category_I) for _ in range(_FOLLOWERS)], axis=1)
    strays = shop.random(follower_IF.shape) < 0.25
    follower_IF[strays] = shop.integers(0, items, int(strays.sum()))

    generator = np.random.default_rng(seed)
    liked_UL = _zipf(generator, categories, people * _LIKED, power=1.0).reshape(people, _LIKED)
    # Empty categories have nothing to like.
    liked_UL = np.where(np.diff(start_C1)[liked_UL] > 0, liked_UL, category_I[0])
    length_U = np.minimum(_SHORTEST + generator.geometric(1 / (_MEAN - _SHORTEST + 1), people) - 1, _LONGEST)
    start_U1 = np.concatenate([[0], np.cumsum(length_U)]).astype(np.int64)
    item_E = np.empty(start_U1[-1], np.int32)
    newest_U = np.zeros(people, np.int64)
    share_F = np.cumsum(1.0 / np.arange(1, _FOLLOWERS + 1))
    for place in range(_LONGEST):
        alive = np.flatnonzero(length_U > place)
        if not len(alive):
            break
        kind = generator.random(len(alive)) + (_FOLLOWS if place == 0 else 0.0)
        liked = liked_UL[alive, generator.integers(0, _LIKED, len(alive))]
        item = of_category(generator, liked)
        anywhere = np.searchsorted(everywhere, generator.random(len(alive)) * everywhere[-1], "right") - 1
        rank = np.searchsorted(share_F, generator.random(len(alive)) * share_F[-1])
        item = np.where(kind >= _FOLLOWS + _LIKES, np.minimum(anywhere, items - 1), item)
        item = np.where(kind < _FOLLOWS, follower_IF[newest_U[alive], rank], item)
        newest_U[alive] = item
        item_E[start_U1[alive] + place] = item
    place_E = np.arange(len(item_E)) - np.repeat(start_U1[:-1], length_U)
    names = [f"item-{index:06d}" for index in range(items)]
    attributes_of = {
        name: [f"category={category}", f"brand={brand}"]
        for name, category, brand in zip(names, category_I.tolist(), brand_I.tolist(), strict=True)
    }
    histories = Histories(
        start_U1,
        item_E,
        np.full(len(item_E), 3, np.int32),
        place_E.astype(np.int64),
        names,
        np.arange(people),
    )
    return Population(histories, attributes_of)


def _zipf(generator: np.random.Generator, values: int, count: int, power: float) -> npt.NDArray[np.int64]:
    weight = np.arange(1, values + 1, dtype=np.float64) ** -power
    return np.searchsorted(np.cumsum(weight), generator.random(count) * weight.sum()).astype(np.int64)
