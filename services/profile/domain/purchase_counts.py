"""When people buy again: BG/NBD, the statistical reference of the churn model.

    P. S. Fader, B. G. S. Hardie & K. L. Lee (2005), "Counting your customers" the easy way: an
    alternative to the Pareto/NBD model, Marketing Science 24(2), 275-284.

While alive, a customer buys as a Poisson process of rate lambda ~ Gamma(r, alpha); after each purchase
they leave for good with probability p ~ Beta(a, b). Symbols are the paper's:

    N  customers
    x  repeat purchases, (N,); the first purchase does not count
    t_x  time of the last of them since the first purchase, (N,); 0 where x = 0
    T  time since the first purchase, (N,)

Time has one unit throughout (days, or the paper's weeks), and arrays are float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize
from scipy.special import betaln, expit, gammaln, hyp2f1

Float = npt.NDArray[np.float64]

# Parameters outside are not told apart by any data; they would overflow.
_LOG_BOUNDS = (-12.0, 12.0)
# A little pressure towards 1 keeps parameters finite that the data do not determine (nobody bought twice).
_RIDGE = 1e-9


@dataclass(frozen=True, slots=True)
class PurchaseCounts:
    """Histories of N customers, aligned: x, t_x and T of the paper, each (N,), float64.

    Raises:
        ValueError: shapes differ, or not 0 <= t_x <= T, x >= 0.
    """

    x_N: Float
    t_x_N: Float
    T_N: Float

    def __post_init__(self) -> None:
        if not self.x_N.shape == self.t_x_N.shape == self.T_N.shape:
            raise ValueError("x, t_x and T must have one shape")
        if not ((self.x_N >= 0) & (self.t_x_N >= 0) & (self.t_x_N <= self.T_N)).all():
            raise ValueError("x, t_x and T must satisfy x >= 0 and 0 <= t_x <= T")

    def __len__(self) -> int:
        return len(self.x_N)


@dataclass(frozen=True, slots=True)
class BgNbd:
    """The parameters of the model, each above 0."""

    r: float
    alpha: float
    a: float
    b: float

    def __post_init__(self) -> None:
        if not all(np.isfinite(value) and value > 0 for value in (self.r, self.alpha, self.a, self.b)):
            raise ValueError(f"{self} must be finite and positive")

    @classmethod
    def fit(cls, counts: PurchaseCounts, weights_N: Float | None = None, start: BgNbd | None = None) -> BgNbd:
        """Returns the maximum-likelihood estimate, by L-BFGS-B over the logarithms of the parameters.

        Args:
            weights_N: how many customers each row stands for; one each by default.
            start: where to begin, such as the fit of a day nearby; from two places far apart by default.

        Raises:
            ValueError: there are no customers.
        """
        if not len(counts):
            raise ValueError("there are no customers to fit")
        rows_NC = np.stack((counts.x_N, counts.t_x_N, counts.T_N), axis=1)
        # Equal customers share their term: daily data have few distinct ones.
        distinct, inverse = np.unique(rows_NC, axis=0, return_inverse=True)
        weights = np.bincount(inverse.ravel(), weights_N, minlength=len(distinct)).astype(np.float64)
        distinct_counts = PurchaseCounts(*np.ascontiguousarray(distinct.T))
        scale = max(float(counts.T_N.mean()), 1e-9)

        def loss(logs: Float) -> float:
            model = cls(*np.exp(logs + np.array([0.0, np.log(scale), 0.0, 0.0])))
            mean = float(weights @ model.log_likelihoods(distinct_counts)) / float(weights.sum())
            return -mean + _RIDGE * float(logs @ logs)

        # The likelihood can have a ridge: two starting points, the better one wins.
        firsts: list[tuple[float, ...]] = [(-1.0, -1.0, 0.0, 1.0), (0.5, 0.0, -1.0, 0.0)]
        if start is not None:
            firsts = [tuple(np.log([start.r, start.alpha / scale, start.a, start.b]).tolist())]
        best = min(
            (
                minimize(
                    loss,
                    np.clip(first, *_LOG_BOUNDS),
                    method="L-BFGS-B",
                    bounds=[_LOG_BOUNDS] * 4,
                    options={"ftol": 1e-14, "gtol": 1e-8},
                )
                for first in firsts
            ),
            key=lambda result: float(result.fun),
        )
        r, alpha, a, b = np.exp(best.x + np.array([0.0, np.log(scale), 0.0, 0.0])).tolist()
        return cls(r, alpha, a, b)

    def log_likelihoods(self, counts: PurchaseCounts) -> Float:
        """Returns the log-likelihood of each customer, (N,), eq. (6) of the paper.

        L = B(a, b+x) / B(a, b) * Gamma(r+x) alpha^r / (Gamma(r) (alpha+T)^(r+x))
            + [x > 0] B(a+1, b+x-1) / B(a, b) * Gamma(r+x) alpha^r / (Gamma(r) (alpha+t_x)^(r+x))
        """
        r, alpha, a, b = self.r, self.alpha, self.a, self.b
        x, t_x, T = counts.x_N, counts.t_x_N, counts.T_N
        rate = gammaln(r + x) - gammaln(r) + r * np.log(alpha)
        stayed = betaln(a, b + x) - betaln(a, b) - (r + x) * np.log(alpha + T)
        # Where x = 0 nobody can have left: b + x - 1 may be negative there, and is not used.
        left = betaln(a + 1, b + np.maximum(x, 1) - 1) - betaln(a, b) - (r + x) * np.log(alpha + t_x)
        return rate + np.where(x > 0, np.logaddexp(stayed, left), stayed)

    def log_likelihood(self, counts: PurchaseCounts) -> float:
        """Returns the sum of the log-likelihoods."""
        return float(self.log_likelihoods(counts).sum())

    def alive_probabilities(self, counts: PurchaseCounts) -> Float:
        """Returns P(alive | x, t_x, T), (N,), in [0, 1]; 1 where x = 0, as the model has it.

        1 / (1 + [x > 0] a / (b+x-1) * ((alpha+T) / (alpha+t_x))^(r+x))
        (Fader, Hardie & Lee 2008, Computing P(alive) using the BG/NBD model).
        """
        x, t_x, T = counts.x_N, counts.t_x_N, counts.T_N
        log_odds_left = (
            np.log(self.a)
            - np.log(self.b + np.maximum(x, 1) - 1)
            + (self.r + x) * (np.log(self.alpha + T) - np.log(self.alpha + t_x))
        )
        return np.where(x > 0, expit(-log_odds_left), 1.0)

    def no_purchase_probabilities(self, counts: PurchaseCounts, t: float) -> Float:
        """Returns P(no purchase in (T, T+t] | x, t_x, T), (N,), in [0, 1].

        1 - P(alive) * (1 - ((alpha+T) / (alpha+T+t))^(r+x)): who is alive leaves after a purchase only, and
        their rate is Gamma(r+x, alpha+T) a posteriori.
        """
        waits = np.exp((self.r + counts.x_N) * -np.log1p(t / (self.alpha + counts.T_N)))
        return 1.0 - self.alive_probabilities(counts) * (1.0 - waits)

    def expected_purchases(self, counts: PurchaseCounts, t: float) -> Float:
        """Returns E[purchases in (T, T+t] | x, t_x, T], (N,), >= 0, eq. (10) of the paper."""
        if abs(self.a - 1.0) < 1e-3:
            # The formula is 0 / 0 at a = 1, and smooth around it.
            below, above = BgNbd(self.r, self.alpha, 0.998, self.b), BgNbd(self.r, self.alpha, 1.002, self.b)
            return 0.5 * (below.expected_purchases(counts, t) + above.expected_purchases(counts, t))
        r, alpha, a, b = self.r, self.alpha, self.a, self.b
        x, T = counts.x_N, counts.T_N
        z = t / (alpha + T + t)
        grown = np.exp((r + x) * np.log1p(-z)) * hyp2f1(r + x, b + x, a + b + x - 1, z)
        expected = (a + b + x - 1) / (a - 1) * (1.0 - grown) * self.alive_probabilities(counts)
        # 2F1 overflows for the most faithful of customers: they are alive at their posterior rate.
        steady = self.alive_probabilities(counts) * t * (r + x) / (alpha + T)
        return np.clip(np.where(np.isfinite(expected), expected, steady), 0.0, steady)

    def to_json(self) -> dict[str, float]:
        """Returns the parameters by name."""
        return {"r": self.r, "alpha": self.alpha, "a": self.a, "b": self.b}

    @classmethod
    def from_json(cls, fields: Mapping[str, float]) -> BgNbd:
        """Reads `to_json`; raises KeyError, TypeError or ValueError where it is not that."""
        return cls(*(float(fields[name]) for name in ("r", "alpha", "a", "b")))
