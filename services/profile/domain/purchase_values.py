"""What a purchase is worth: the gamma-gamma model, and the value of a customer with BG/NBD.

    P. S. Fader, B. G. S. Hardie & K. L. Lee (2005), RFM and CLV: using iso-value curves for customer base
    analysis, Journal of Marketing Research 42(4), 415-430; P. S. Fader & B. G. S. Hardie (2013), The
    gamma-gamma model of monetary value.

A purchase is worth z ~ Gamma(p, nu), nu ~ Gamma(q, gamma) differs between customers. N = customers, x =
purchases observed, m = their mean value, both (N,), float64; m > 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize
from scipy.special import gammaln

from services.profile.domain.purchase_counts import BgNbd, PurchaseCounts

Float = npt.NDArray[np.float64]

_LOG_BOUNDS = (-8.0, 8.0)
# Below q = 1 the population has no mean.
_LEAST_Q = 1.01
DAYS_IN_MONTH = 365.0 / 12


@dataclass(frozen=True, slots=True)
class GammaGamma:
    """The parameters: p > 0, q > 1, gamma > 0 in the unit of money."""

    p: float
    q: float
    gamma: float

    def __post_init__(self) -> None:
        if not all(np.isfinite(value) and value > 0 for value in (self.p, self.q, self.gamma)) or self.q <= 1:
            raise ValueError(f"{self} must be finite and positive, and q above 1")

    @classmethod
    def fit(cls, x_N: Float, m_N: Float) -> GammaGamma:
        """Returns the maximum-likelihood estimate over the customers with x >= 1 and m > 0.

        Raises:
            ValueError: there are none.
        """
        chosen = (x_N >= 1) & (m_N > 0)
        x, m = x_N[chosen], m_N[chosen]
        if not len(x):
            raise ValueError("no customer has a purchase of a value")
        # The likelihood is the same in any unit of money; near 1 the minimiser is at its best.
        scale = float(np.exp(np.log(m).mean()))

        def unpack(logs: Float) -> GammaGamma:
            p, q, gamma = np.exp(logs).tolist()
            return cls(p, _LEAST_Q + q, gamma)

        def loss(logs: Float) -> float:
            return -float(unpack(logs).log_likelihoods(x, m / scale).mean())

        result = minimize(
            loss,
            np.array([1.0, 1.0, 1.0]),
            method="L-BFGS-B",
            bounds=[_LOG_BOUNDS] * 3,
            options={"ftol": 1e-14, "gtol": 1e-8},
        )
        fitted = unpack(result.x)
        return cls(fitted.p, fitted.q, fitted.gamma * scale)

    def log_likelihoods(self, x_N: Float, m_N: Float) -> Float:
        """Returns the log-likelihood of each customer's mean, (N,), eq. (1a) of the note of 2013.

        Gamma(px+q) / (Gamma(px) Gamma(q)) * gamma^q m^(px-1) x^(px) / (gamma+mx)^(px+q)
        """
        p, q, gamma = self.p, self.q, self.gamma
        px = p * x_N
        return (
            gammaln(px + q)
            - gammaln(px)
            - gammaln(q)
            + q * np.log(gamma)
            + (px - 1) * np.log(m_N)
            + px * np.log(x_N)
            - (px + q) * np.log(gamma + m_N * x_N)
        )

    def expected_values(self, x_N: Float, m_N: Float) -> Float:
        """Returns E[value of a purchase | x, m], (N,), eq. (5): p (gamma + m x) / (p x + q - 1).

        A customer without purchases of a value (x = 0) gets the population's mean, p gamma / (q - 1).
        """
        return self.p * (self.gamma + m_N * x_N) / (self.p * x_N + self.q - 1)

    def to_json(self) -> dict[str, float]:
        """Returns the parameters by name."""
        return {"p": self.p, "q": self.q, "gamma": self.gamma}

    @classmethod
    def from_json(cls, fields: Mapping[str, float]) -> GammaGamma:
        """Reads `to_json`; raises KeyError, TypeError or ValueError where it is not that."""
        return cls(*(float(fields[name]) for name in ("p", "q", "gamma")))


def lifetime_values(
    counts: PurchaseCounts,
    purchases: BgNbd,
    expected_values_N: Float,
    horizon_days: float = 365.0,
    yearly_discount: float = 0.1,
) -> Float:
    """Returns the present value of the purchases of the next days, (N,), >= 0, in the unit of money.

    Purchases of each month are worth what a purchase of the customer is worth, discounted from the
    month's middle (Fader, Hardie & Lee 2005, eq. 3, in discrete time).

    Args:
        counts: with days as the unit of time.
        yearly_discount: what money is worth less a year later, above -1.
    """
    months = max(1, round(horizon_days / DAYS_IN_MONTH))
    ends = np.linspace(0.0, horizon_days, months + 1)
    worth = np.zeros(len(counts))
    before = np.zeros(len(counts))
    for begin, end in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        until = purchases.expected_purchases(counts, end)
        discount = (1.0 + yearly_discount) ** (-(begin + end) / 2 / 365.0)
        worth += discount * np.maximum(until - before, 0.0)
        before = until
    return worth * expected_values_N
