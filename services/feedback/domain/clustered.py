"""Ratios of sums whose unit is the person.

A person's impressions are not independent of each other, so an interval that counts impressions is too narrow.
Everything here is computed from one pair of numbers a person: what they earned, and the chances that they had.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from services.feedback.domain.metrics import Interval, z_of


@dataclass(frozen=True, slots=True)
class ClusteredSums:
    """Sums over people of what they earned, x, and of the chances that they had, n.

    Attributes:
        people: those with any x or n.
        earners: those of them with an x other than 0.
        x, n: the sums.
        xx, xn, nn: the sums of squares and of products.
    """

    people: int = 0
    earners: int = 0
    x: float = 0.0
    n: float = 0.0
    xx: float = 0.0
    xn: float = 0.0
    nn: float = 0.0

    @classmethod
    def of(cls, x_P: npt.NDArray[np.float64], n_P: npt.NDArray[np.float64]) -> ClusteredSums:
        """Returns the sums over P people, from arrays of shape (P,)."""
        counted_P = (x_P != 0) | (n_P != 0)
        return cls(
            int(np.count_nonzero(counted_P)),
            int(np.count_nonzero(x_P)),
            float(x_P.sum()),
            float(n_P.sum()),
            float(x_P @ x_P),
            float(x_P @ n_P),
            float(n_P @ n_P),
        )

    @property
    def ratio(self) -> float | None:
        """Returns x over n, or None without chances."""
        return self.x / self.n if self.n > 0 else None

    @property
    def variance(self) -> float | None:
        """Returns the variance of the ratio, or None with fewer than two people.

        The delta method, as in Deng, Knoblich and Lu ("Applying the delta method in metric analytics",
        KDD 2018): the ratio R varies as the mean over people of (x - R n) / mean(n).
        """
        ratio = self.ratio
        if ratio is None or self.people < 2:
            return None
        residual_squares = max(0.0, self.xx - 2 * ratio * self.xn + ratio * ratio * self.nn)
        return self.people / (self.people - 1) * residual_squares / (self.n * self.n)

    def interval(self, confidence_level: float) -> Interval | None:
        """Returns the ratio with a normal interval for one look, or None with fewer than two people."""
        ratio, variance = self.ratio, self.variance
        if ratio is None or variance is None:
            return None
        half = z_of(confidence_level) * math.sqrt(variance)
        return Interval(ratio, ratio - half, ratio + half)
