"""Logistic regression with a ridge, on signed logarithms of the features.

Counts, days and amounts spread over orders of magnitude; their logarithms do not.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize
from scipy.special import expit

Float = npt.NDArray[np.float64]

_MOST_DEVIATIONS = 5.0


@dataclass(frozen=True, slots=True)
class LogisticRegression:
    """log-odds = bias + coefficient_F · clip((s(feature_F) - mean_F) / scale_F), s(v) = sign(v) ln(1 + |v|)."""

    bias: float
    coefficient_F: Float
    mean_F: Float
    scale_F: Float

    @classmethod
    def fit(cls, feature_KF: Float, label_K: Float, weight_K: Float, ridge: float) -> LogisticRegression:
        """Returns the minimum of the weighted logarithmic loss plus ridge / 2 |coefficient|^2."""
        signed_KF = _signed_log(feature_KF)
        mean_F = np.average(signed_KF, axis=0, weights=weight_K)
        scale_F = np.sqrt(np.average((signed_KF - mean_F) ** 2, axis=0, weights=weight_K))
        # A feature that is the same for everybody says nothing, now or later.
        scale_F = np.where(scale_F > 1e-9, scale_F, np.inf)
        z_KF = _standardised(signed_KF, mean_F, scale_F)

        def loss(parameters: Float) -> tuple[float, Float]:
            bias, coefficient_F = parameters[0], parameters[1:]
            score_K = bias + z_KF @ coefficient_F
            value = float(weight_K @ (np.logaddexp(0.0, score_K) - label_K * score_K))
            slope_K = weight_K * (expit(score_K) - label_K)
            gradient = np.concatenate(([slope_K.sum()], slope_K @ z_KF + ridge * coefficient_F))
            return value + 0.5 * ridge * float(coefficient_F @ coefficient_F), gradient

        start = np.zeros(feature_KF.shape[1] + 1)
        result = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 500})
        return cls(float(result.x[0]), result.x[1:], mean_F, np.where(np.isinf(scale_F), 0.0, scale_F))

    def contributions(self, feature_KF: Float) -> Float:
        """Returns how much each feature moves the log-odds from those of the mean shopper, (K, F)."""
        scale_F = np.where(self.scale_F > 0, self.scale_F, np.inf)
        return _standardised(_signed_log(feature_KF), self.mean_F, scale_F) * self.coefficient_F

    def log_odds(self, feature_KF: Float) -> Float:
        """Returns the log-odds of a yes, (K,)."""
        return self.bias + self.contributions(feature_KF).sum(axis=1)


def _signed_log(value_KF: Float) -> Float:
    return np.sign(value_KF) * np.log1p(np.abs(value_KF))


def _standardised(signed_KF: Float, mean_F: Float, scale_F: Float) -> Float:
    return np.clip((signed_KF - mean_F) / scale_F, -_MOST_DEVIATIONS, _MOST_DEVIATIONS)
