"""SIMULATION: the item views of very many shoppers, as columns. Pure.

The shoppers of `history` in crowds that share a shop and its best-sellers: what one of them has seen takes a row as
long as the catalogue, which a million at once could not have.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from shared.event_kinds import EventKind
from shared.simulation.history import DAY_US, Scale, browse_days, browse_people
from shared.simulation.shop import Ints, Shop, make_shop
from shared.simulation.shoppers import make_crowd

_CROWD = 20_000


@dataclass(frozen=True, slots=True, eq=False)
class Views:
    """Item views, by shopper in blocks of crowds, in no order within.

    Attributes:
        shop: whose items they are of.
        user_E, item_E, time_us_E: int64, index into the shop, microseconds since 1970.
    """

    shop: Shop
    user_E: Ints
    item_E: Ints
    time_us_E: Ints


def make_views(scale: Scale) -> Views:
    """Returns the views of `scale.shoppers` people without bots. The same scale: the same views."""
    rng = np.random.default_rng(scale.seed)
    shop = make_shop(rng, scale.items, scale.seed)
    sales = shop.appeal.copy()
    users, items, times = [], [], []
    for first in range(0, scale.shoppers, _CROWD):
        part = replace(scale, shoppers=min(_CROWD, scale.shoppers - first), bot_share=0.0)
        crowd = make_crowd(rng, shop, part.shoppers, part.visits_per_shopper / part.days, 0.0)
        people = np.arange(part.shoppers)
        who, kind, day, item = browse_people(
            rng, shop, crowd, people, browse_days(rng, crowd, people, part.days), part.days, sales
        )
        views = kind == int(EventKind.ITEM_VIEW)
        users.append(first + who[views])
        items.append(item[views])
        times.append(scale.end_us - scale.days * DAY_US + np.rint(day[views] * DAY_US).astype(np.int64))
    return Views(shop, np.concatenate(users), np.concatenate(items), np.concatenate(times))
