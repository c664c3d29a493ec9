"""What usually wins people back: of those who were at such a risk for such a reason, who came back, and to what.

It looks at moments of the past whose horizon has gone by. Whoever was as likely to leave then, for the same
strongest reason, is similar; their first order within the horizon says what they came back to: at least half of its
lines bought before (a reminder of what runs out), or mostly new to them (something to discover). These are shares of what
happened, not effects of what a shop did: who was reminded is not in the log.

K = shoppers at a moment, N = lines.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from services.profile.domain.purchase_log import Bool, Float, Int, PurchaseLog

# Below so many similar shoppers a share says nothing.
MIN_SIMILAR = 20
BANDS = (0.5, 0.7, 0.85)
MOMENTS = 4
REPEATED_SHARE = 0.5
_NORMAL_95 = 1.959963984540054


@dataclass(frozen=True, slots=True)
class Successes:
    """Similar shoppers, and those of them who came back to this."""

    similar: int = 0
    returned: int = 0

    @property
    def rate(self) -> float:
        """The share, in [0, 1]; 0 of nobody."""
        return self.returned / self.similar if self.similar else 0.0

    def interval(self) -> tuple[float, float]:
        """Returns the 95 % interval of the share (E. Wilson, 1927); all of [0, 1] for nobody."""
        n, z2 = self.similar, _NORMAL_95**2
        if n == 0:
            return 0.0, 1.0
        middle = (self.rate + z2 / (2 * n)) / (1 + z2 / n)
        half = _NORMAL_95 / (1 + z2 / n) * math.sqrt(self.rate * (1 - self.rate) / n + z2 / (4 * n * n))
        return max(0.0, middle - half), min(1.0, middle + half)


UNKNOWN = Successes()


def band_of(probability: float) -> int | None:
    """Returns the band of a risk; None below the least."""
    return max((band for band, least in enumerate(BANDS) if probability >= least), default=None)


@dataclass(slots=True)
class WinBackRates:
    """Counts by strongest reason (0: none) and band of risk.

    Attributes:
        similar: shoppers.
        repeated, discovered: those who came back to what they had bought before, and to what was new to them.
    """

    similar: dict[tuple[int, int], int] = field(default_factory=dict)
    repeated: dict[tuple[int, int], int] = field(default_factory=dict)
    discovered: dict[tuple[int, int], int] = field(default_factory=dict)

    def add(
        self, log: PurchaseLog, begin_us: int, end_us: int, user_K: Int, probability_K: Float, signal_K: Int
    ) -> None:
        """Counts who was at risk at a moment.

        Args:
            begin_us, end_us: the moment, and the end of its horizon.
            signal_K: the strongest reason as it was then.
        """
        came_back_U, repeated_U = first_orders(log, begin_us, end_us)
        for user, probability, signal in zip(
            user_K.tolist(), probability_K.tolist(), signal_K.tolist(), strict=True
        ):
            band = band_of(probability)
            if band is None:
                continue
            key = (signal, band)
            self.similar[key] = self.similar.get(key, 0) + 1
            if came_back_U[user]:
                counts = self.repeated if repeated_U[user] else self.discovered
                counts[key] = counts.get(key, 0) + 1

    def of_repeated(self, signal: int, probability: float) -> Successes:
        """Returns how many came back to what they knew; UNKNOWN where too few were similar."""
        return self._of(self.repeated, signal, probability)

    def of_discovered(self, signal: int, probability: float) -> Successes:
        """Returns how many came back to something new; UNKNOWN where too few were similar."""
        return self._of(self.discovered, signal, probability)

    def _of(self, counts: dict[tuple[int, int], int], signal: int, probability: float) -> Successes:
        band = band_of(probability)
        if band is None:
            return UNKNOWN
        similar = self.similar.get((signal, band), 0)
        return Successes(similar, counts.get((signal, band), 0)) if similar >= MIN_SIMILAR else UNKNOWN


def first_orders(log: PurchaseLog, begin_us: int, end_us: int) -> tuple[Bool, Bool]:
    """Returns who bought in [begin, end), (U,), and whose first order then was mostly bought before, (U,)."""
    bought = log.where(~log.returned_N)
    inside = bought.where((bought.time_us_N >= begin_us) & (bought.time_us_N < end_us))
    came_back_U = np.bincount(inside.user_N, minlength=log.user_count) > 0
    first_U = np.full(log.user_count, np.iinfo(np.int64).max)
    np.minimum.at(first_U, inside.user_N, inside.time_us_N)
    first = inside.where(inside.time_us_N == first_U[inside.user_N])
    past = bought.before(begin_us)
    pairs_of_past = np.unique(_pairs(past.user_N, past.item_N))
    known_N = np.isin(_pairs(first.user_N, first.item_N), pairs_of_past)
    lines_U = np.bincount(first.user_N, minlength=log.user_count)
    known_U = np.bincount(first.user_N, known_N, minlength=log.user_count)
    return came_back_U, known_U >= REPEATED_SHARE * np.maximum(lines_U, 1)


def moments(now_us: int, horizon_us: int, oldest_us: int) -> Sequence[int]:
    """Returns moments whose horizon has gone by, one horizon apart, with as much of history before each."""
    every = (now_us - nth * horizon_us for nth in range(1, MOMENTS + 1))
    return [moment for moment in every if moment - horizon_us >= oldest_us]


def _pairs(user_N: Int, item_N: Int) -> Int:
    return user_N * np.int64(1 << 32) + item_N
