"""What everybody bought and sent back, as columns: what a churn model is trained on and applied to.

Shapes: N lines of events, O orders (distinct purchases), U shoppers. Times are microseconds since 1970.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

Float = npt.NDArray[np.float64]
Int = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class PurchaseLog:
    """Lines of purchases and returns.

    Attributes:
        user_N: the shopper, in [0, user_count), int64.
        time_us_N: when it happened, int64.
        order_N: a number that the lines of one event share, int64.
        item_N: the item, >= 0, int64; any small numbers.
        amount_N: what the line is worth in the unit of money, >= 0, float64; 0 where no price is known.
        quantity_N: pieces, >= 0, float64.
        returned_N: whether the line was sent back, not bought.
        user_count: U; shoppers without a line count.

    Raises:
        ValueError: columns of different lengths, or a number that is not finite.
    """

    user_N: Int
    time_us_N: Int
    order_N: Int
    item_N: Int
    amount_N: Float
    quantity_N: Float
    returned_N: Bool
    user_count: int

    def __post_init__(self) -> None:
        lengths = {len(column) for column in self._columns()}
        if len(lengths) != 1:
            raise ValueError(f"columns differ in length: {sorted(lengths)}")
        if not (np.isfinite(self.amount_N).all() and np.isfinite(self.quantity_N).all()):
            raise ValueError("amounts and quantities must be finite")

    def __len__(self) -> int:
        return len(self.user_N)

    def _columns(self) -> tuple[npt.NDArray[np.generic], ...]:
        return (
            self.user_N,
            self.time_us_N,
            self.order_N,
            self.item_N,
            self.amount_N,
            self.quantity_N,
            self.returned_N,
        )

    def where(self, chosen_N: Bool) -> PurchaseLog:
        """Returns the chosen lines, of the same shoppers."""
        user, time, order, item, amount, quantity, returned = (column[chosen_N] for column in self._columns())
        return PurchaseLog(user, time, order, item, amount, quantity, returned, self.user_count)  # type: ignore[arg-type]

    def before(self, time_us: int) -> PurchaseLog:
        """Returns what had happened before a time: all that a model may know then."""
        return self.where(self.time_us_N < time_us)

    @cached_property
    def orders(self) -> Orders:
        """The distinct purchases, by shopper, then by time."""
        bought = self.where(~self.returned_N)
        _, first, inverse = np.unique(bought.order_N, return_index=True, return_inverse=True)
        user, time = bought.user_N[first], bought.time_us_N[first]
        order = np.lexsort((first, time, user))
        return Orders(
            user[order],
            time[order],
            np.bincount(inverse, bought.amount_N, len(first))[order].astype(np.float64),
            np.bincount(inverse, minlength=len(first))[order].astype(np.float64),
            np.bincount(inverse, bought.quantity_N, len(first))[order].astype(np.float64),
            self.user_count,
        )


@dataclass(frozen=True, slots=True)
class Orders:
    """Distinct purchases, sorted by shopper, then by time: what each was worth, its lines and pieces."""

    user_O: Int
    time_us_O: Int
    amount_O: Float
    lines_O: Float
    quantity_O: Float
    user_count: int

    def __len__(self) -> int:
        return len(self.user_O)

    def counts(self) -> Int:
        """Returns the orders of each shopper, (U,)."""
        return np.bincount(self.user_O, minlength=self.user_count).astype(np.int64)

    def bought_between(self, begin_us: int, end_us: int) -> Bool:
        """Returns whether each shopper bought in [begin, end), (U,)."""
        inside = (self.time_us_O >= begin_us) & (self.time_us_O < end_us)
        return np.bincount(self.user_O[inside], minlength=self.user_count) > 0
