"""Slots of a page that are spent on learning, with the probability of what they show.

The last `slots` places that no rule has taken may explore. Each does so with `probability`, independently; then
it shows an item drawn uniformly from the E candidates behind the page, without repeats. Over the draws, an
explored item stands at its place with probability p / E, and the item that it replaces with 1 - p: these are
the propensities of the answer. (The m-th element of a random order of E items is each of them with 1 / E, so
what other slots draw changes nothing.)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Explored:
    """A page after exploration.

    Attributes:
        rows_K: the page, int32.
        propensities_K: the probability of each item at its place, float32, in (0, 1].
        places: the places that explored, from 0.
    """

    rows_K: Rows
    propensities_K: npt.NDArray[np.float32]
    places: tuple[int, ...]


def explore(
    rows_K: Rows,
    open_places: list[int],
    candidates_E: Rows,
    slots: int,
    probability: float,
    random: np.random.Generator,
) -> Explored:
    """Returns the page with some of its places explored.

    Args:
        rows_K: the page as it is without exploration.
        open_places: places from 0 that may explore, ascending.
        candidates_E: what may be shown, none of it on the page.
    """
    slots = min(slots, len(candidates_E), len(open_places))
    rows, propensities = rows_K.copy(), np.ones(len(rows_K), np.float32)
    if slots <= 0 or probability <= 0:
        return Explored(rows, propensities, ())
    places = open_places[len(open_places) - slots :]
    # Drawn whatever happens, so that a seed means the same for every probability.
    coins = random.random(slots)
    drawn = iter(random.permutation(candidates_E)[:slots].tolist())
    explored = []
    for place, coin in zip(places, coins.tolist(), strict=True):
        if coin < probability:
            rows[place] = next(drawn)
            propensities[place] = probability / len(candidates_E)
            explored.append(place)
        else:
            propensities[place] = 1 - probability
    return Explored(rows, propensities, tuple(explored))
