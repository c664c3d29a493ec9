"""Where the fifths of all shoppers lie, looked at again and again."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from services.profile.domain.population import NOBODY, Population
from services.profile.ports import PurchaseHistory, Purchases
from services.profile.use_cases.looks import Looks


class PopulationWatch(Looks):
    """Keeps the bounds in memory; anybody reads `current`.

    Args:
        seconds: how often all shoppers are looked at.
    """

    def __init__(self, purchases: Purchases, clock_us: Callable[[], int], seconds: float) -> None:
        super().__init__(seconds)
        self._purchases = purchases
        self._clock_us = clock_us
        self.current = NOBODY

    def look(self) -> None:
        """Computes the bounds anew; raises Unavailable when the log cannot be read."""
        self.current = population(self._purchases.read(for_training=False, before_us=self._clock_us()))


def population(history: PurchaseHistory) -> Population:
    """Returns the bounds of everybody who has bought, money in the currency of most purchases."""
    log = history.log
    bought = ~log.returned_N
    if not bought.any():
        return NOBODY
    count = log.user_count
    last_us = np.zeros(count, np.int64)
    np.maximum.at(last_us, log.user_N[bought], log.time_us_N[bought])
    pairs = np.unique(np.stack((log.user_N[bought], log.order_N[bought])), axis=1)
    orders = np.bincount(pairs[0], minlength=count)
    sign = np.where(log.returned_N, -1.0, 1.0)
    spent = np.bincount(log.user_N, log.amount_N * sign, count)
    priced = np.bincount(log.user_N, log.amount_N, count) > 0
    # Who paid in another currency is among the buyers, and not among those who spent this one.
    currency = np.where(priced, history.currency_code, "").astype(object)
    buyers = orders > 0
    return Population.of(
        last_us[buyers], orders[buyers], np.round(spent[buyers] * 1e6).astype(np.int64), currency[buyers]
    )
