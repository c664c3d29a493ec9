"""How good probabilities of a yes are: who is above whom, and whether they come true.

K = examples; labels are bool (K,), probabilities float64 (K,) in [0, 1].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Float = npt.NDArray[np.float64]
Bool = npt.NDArray[np.bool_]

RELIABILITY_BINS = 10
_LEAST_PROBABILITY = 1e-6


@dataclass(frozen=True, slots=True)
class ReliabilityBin:
    """Examples of like probability: what was predicted, and the share that came true."""

    mean_predicted: float
    observed_share: float
    count: int


@dataclass(frozen=True, slots=True)
class Quality:
    """AUC in [0, 1], logarithmic loss >= 0, expected calibration error in [0, 1], reliability diagram."""

    auc: float
    log_loss: float
    expected_calibration_error: float
    reliability: tuple[ReliabilityBin, ...]

    @classmethod
    def of(cls, label_K: Bool, probability_K: Float) -> Quality:
        """Measures probabilities; raises ValueError unless both outcomes occur."""
        bins = reliability(label_K, probability_K)
        error = sum(b.count * abs(b.mean_predicted - b.observed_share) for b in bins) / len(label_K)
        return cls(auc(label_K, probability_K), log_loss(label_K, probability_K), error, bins)

    def to_json(self) -> dict[str, Any]:
        """Returns the fields by name."""
        return {
            "auc": self.auc,
            "log_loss": self.log_loss,
            "expected_calibration_error": self.expected_calibration_error,
            "reliability": [[b.mean_predicted, b.observed_share, b.count] for b in self.reliability],
        }

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Quality:
        """Reads `to_json`; raises KeyError, TypeError or ValueError where it is not that."""
        return cls(
            float(fields["auc"]),
            float(fields["log_loss"]),
            float(fields["expected_calibration_error"]),
            tuple(ReliabilityBin(float(p), float(o), int(n)) for p, o, n in fields["reliability"]),
        )


def auc(label_K: Bool, score_K: Float) -> float:
    """Returns the area under the ROC curve: P(a yes is above a no), ties count half (Mann & Whitney, 1947)."""
    yes, no = int(label_K.sum()), int((~label_K).sum())
    if not yes or not no:
        raise ValueError("both outcomes must occur")
    _, inverse, counts = np.unique(score_K, return_inverse=True, return_counts=True)
    rank_K = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return float((rank_K[label_K].sum() - yes * (yes + 1) / 2) / (yes * no))


def log_loss(label_K: Bool, probability_K: Float) -> float:
    """Returns the mean of -ln of the probability of what happened, with probabilities kept off 0 and 1."""
    happened = np.where(label_K, probability_K, 1.0 - probability_K)
    return float(-np.log(np.maximum(happened, _LEAST_PROBABILITY)).mean())


def reliability(label_K: Bool, probability_K: Float) -> tuple[ReliabilityBin, ...]:
    """Returns the reliability diagram over ten bins of equal count, by ascending probability."""
    order = np.argsort(probability_K, kind="stable")
    return tuple(
        ReliabilityBin(float(probability_K[chosen].mean()), float(label_K[chosen].mean()), len(chosen))
        for chosen in np.array_split(order, RELIABILITY_BINS)
        if len(chosen)
    )
