"""What shoppers did to items: counts of the whole log, and what follows from them for one item."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from scipy import sparse

from services.profile.domain.portrait import Estimate

POPULARITY_HALF_LIFE_DAYS = 30.0
CONVERSION_PRIOR_VIEWS = 50.0
RETURN_PRIOR_UNITS = 20.0
RATING_PRIOR_COUNT = 10.0
DEFAULT_RATING = 3.0
MAX_NEIGHBOURS = 50
# One who buys a hundred lines at once says little about any pair of them.
MAX_ORDER_LINES = 100

Int = npt.NDArray[np.int64]
Float = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class ItemCounts:
    """Counts of one item.

    Attributes:
        events: events of interest in the item.
        decayed_interest: the same, weighted by kind and halved every 30 days.
        views, bought, returned: events; bought and returned are lines of orders.
        rating_count, rating_sum: stars, 1 to 5.
    """

    events: int = 0
    decayed_interest: float = 0.0
    views: int = 0
    bought: int = 0
    returned: int = 0
    rating_count: int = 0
    rating_sum: float = 0.0


NO_COUNTS = ItemCounts()


@dataclass(frozen=True, slots=True)
class Neighbour:
    """An item next to another: how near in [0, 1], and how many orders say so."""

    item_id: str
    score: float
    evidence_count: int


@dataclass(frozen=True, slots=True)
class Baskets:
    """Which items were bought in which orders.

    Attributes:
        item_ids: by column.
        order_item: (orders, items), 1 where an item is in an order.
    """

    item_ids: Sequence[str] = ()
    order_item: sparse.csr_matrix = field(default_factory=lambda: sparse.csr_matrix((0, 0), dtype=np.int32))
    column_of: dict[str, int] = field(init=False, repr=False)
    item_order: sparse.csc_matrix = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "column_of", {item_id: at for at, item_id in enumerate(self.item_ids)})
        object.__setattr__(self, "item_order", self.order_item.tocsc())

    @classmethod
    def of(cls, order_L: Int, item_L: Int, item_ids: Sequence[str]) -> Baskets:
        """Returns the baskets of L lines: the number of the order, and the item's place in `item_ids`."""
        orders = int(order_L.max(initial=-1)) + 1
        matrix = sparse.csr_matrix(
            (np.ones(len(order_L), np.int32), (order_L, item_L)), shape=(orders, len(item_ids))
        )
        matrix.data[:] = 1
        small = np.diff(matrix.indptr) <= MAX_ORDER_LINES
        return cls(item_ids, matrix[small])

    def neighbours(self, item_id: str) -> list[Neighbour]:
        """Returns what is bought together with an item, by falling cosine of the orders; at most 50."""
        column = self.column_of.get(item_id)
        if column is None:
            return []
        orders = self.item_order[:, column].indices
        if not len(orders):
            return []
        together = np.asarray(self.order_item[orders].sum(axis=0)).ravel()
        together[column] = 0
        found = np.flatnonzero(together)
        totals = np.diff(self.item_order.indptr)
        cosine = together[found] / np.sqrt(float(len(orders)) * totals[found])
        ranked = sorted(
            zip((-cosine).tolist(), found.tolist(), strict=True),
            key=lambda pair: (pair[0], self.item_ids[pair[1]]),
        )
        return [
            Neighbour(self.item_ids[at], min(1.0, -score), int(together[at]))
            for score, at in ranked[:MAX_NEIGHBOURS]
        ]


@dataclass(frozen=True, slots=True)
class ShopMeans:
    """What is usual in a shop: the priors of an item of which little is known.

    Attributes:
        conversion_of_category: purchases a view by top category; "" for the whole shop.
        return_rate: of lines bought.
        rating: mean stars.
    """

    conversion_of_category: dict[str, float] = field(default_factory=dict)
    return_rate: float = 0.0
    rating: float = DEFAULT_RATING

    @classmethod
    def of(cls, counted: Sequence[tuple[str, ItemCounts]], ratings: Sequence[tuple[int, float]]) -> ShopMeans:
        """Returns the means of items as (top category, counts) and of ratings as (count, mean)."""
        views: dict[str, int] = {}
        bought: dict[str, int] = {}
        for category, counts in counted:
            for shelf in {category, ""}:
                views[shelf] = views.get(shelf, 0) + counts.views
                bought[shelf] = bought.get(shelf, 0) + counts.bought
        sold = sum(counts.bought for _, counts in counted)
        returned = sum(counts.returned for _, counts in counted)
        raters = sum(count for count, _ in ratings)
        return cls(
            {shelf: min(1.0, bought[shelf] / seen) for shelf, seen in views.items() if seen},
            min(1.0, returned / sold) if sold else 0.0,
            sum(count * mean for count, mean in ratings) / raters if raters else DEFAULT_RATING,
        )


def conversion_rate(counts: ItemCounts, category: str, means: ShopMeans) -> Estimate:
    """Returns purchases a view, shrunk towards the category by 50 views' worth."""
    usual = means.conversion_of_category.get(category, means.conversion_of_category.get("", 0.0))
    prior = CONVERSION_PRIOR_VIEWS
    rate = (counts.bought + prior * usual) / (max(counts.views, counts.bought) + prior)
    return Estimate(rate, counts.views, prior)


def return_rate(counts: ItemCounts, means: ShopMeans) -> Estimate:
    """Returns the share of lines bought that came back, shrunk towards the shop by 20 lines' worth."""
    prior = RETURN_PRIOR_UNITS
    returned = min(counts.returned, counts.bought)
    return Estimate((returned + prior * means.return_rate) / (counts.bought + prior), counts.bought, prior)


def rating(told: tuple[int, float] | None, counts: ItemCounts, means: ShopMeans) -> Estimate:
    """Returns the Bayesian mean of the ratings, in [0, 5]: those that the shop tells, else those of the log."""
    count, total = counts.rating_count, counts.rating_sum
    if told is not None and told[0] > 0:
        count, total = told[0], told[0] * told[1]
    prior = RATING_PRIOR_COUNT
    return Estimate((total + prior * means.rating) / (count + prior), count, prior)
