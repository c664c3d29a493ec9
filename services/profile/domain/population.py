"""All shoppers together: where one of them stands among the others."""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

_FIFTHS = (0.2, 0.4, 0.6, 0.8)


@dataclass(frozen=True, slots=True)
class Population:
    """The bounds between the fifths of those who have bought.

    Attributes:
        shopper_count: how many they are; below five there are no fifths.
        last_us: of the time of the newest purchase, microseconds since 1970, four bounds ascending.
        orders: of the number of orders.
        monetary_micros: of what was spent, by currency.
    """

    shopper_count: int = 0
    last_us: tuple[float, ...] = ()
    orders: tuple[float, ...] = ()
    monetary_micros: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        last_us_K: npt.NDArray[np.int64],
        orders_K: npt.NDArray[np.int64],
        monetary_K: npt.NDArray[np.int64],
        currency_K: npt.NDArray[np.object_],
    ) -> Population:
        """Returns the bounds of K shoppers who have bought, each in the currency of most of their orders."""
        if len(last_us_K) < 5:
            return cls(len(last_us_K))
        monetary = {}
        for code in sorted(set(currency_K.tolist())):
            amounts = monetary_K[currency_K == code]
            if len(amounts) >= 5:
                monetary[code] = _bounds(amounts)
        return cls(len(last_us_K), _bounds(last_us_K), _bounds(orders_K), monetary)

    def quintiles(
        self, last_us: int, orders: int, monetary_micros: int, currency_code: str
    ) -> tuple[int, int, int]:
        """Returns the fifths (recency, frequency, monetary), 5 the best; 0 where not known."""
        if not self.last_us:
            return 0, 0, 0
        bounds = self.monetary_micros.get(currency_code)
        return (
            1 + bisect.bisect_left(self.last_us, last_us),
            1 + bisect.bisect_left(self.orders, orders),
            1 + bisect.bisect_left(bounds, monetary_micros) if bounds else 0,
        )


NOBODY = Population()


def _bounds(values_K: npt.NDArray[np.int64]) -> tuple[float, ...]:
    """Returns the values at the bounds: a shopper at a bound is in the lower fifth, as ties are."""
    return tuple(np.quantile(values_K, _FIFTHS, method="inverted_cdf").astype(np.float64).tolist())
