"""A conditional logit with a prior: which of a person's candidates was taken. NumPy.

    p(k | person) = exp(w · f_k) / sum_j exp(w · f_j)

w maximises sum_n log p(taken) - precision / 2 |w - prior|^2, by Newton's method (McFadden, 1974).

n = people, K = candidates, F = features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shared.bundle.scoring import log_partition

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]

# Precisions of the prior: of a person's event, about a unit of information is learned on each weight.
PRECISIONS = (20.0, 80.0, 320.0)


@dataclass(frozen=True, slots=True)
class Prior:
    """What is believed before anybody was asked.

    Attributes:
        weights: the mean, by name; 0 of what is not named.
        never_negative: weights that are left out where they would be.
    """

    weights: Mapping[str, float]
    never_negative: tuple[str, ...] = ()


def fit_by_halves(
    feature_nKF: Float32, place_n: Int64, half_n: Int64, names: Sequence[str], prior: Prior
) -> tuple[float, list[dict[str, float]]]:
    """Returns the precision of the prior under which halves foretell each other best, and what each half's other taught.

    Args:
        half_n: 0 or 1 of each person.
    """

    def foretold(taught: list[dict[str, float]]) -> float:
        return sum(
            log_likelihood(feature_nKF[half_n == half], place_n[half_n == half], names, taught[half])
            for half in (0, 1)
        )

    taught_by = {
        precision: [
            fit_conditional_logit(
                feature_nKF[half_n != half], place_n[half_n != half], names, prior, precision
            )
            for half in (0, 1)
        ]
        for precision in PRECISIONS
    }
    precision = max(PRECISIONS, key=lambda each: foretold(taught_by[each]))
    return precision, taught_by[precision]


def fit_conditional_logit(
    feature_nKF: Float32,
    place_n: Int64,
    names: Sequence[str],
    prior: Prior,
    precision: float = PRECISIONS[0],
) -> dict[str, float]:
    """Returns the weights of greatest posterior probability, by name.

    Args:
        feature_nKF: of each candidate of each person; not a number, in every feature, where there is none.
        place_n: which candidate was taken.
        precision: of the prior.
    """
    free = list(names)
    while True:
        columns = [names.index(name) for name in free]
        prior_F = np.array([prior.weights.get(name, 0.0) for name in free])
        weight_F = _newton(feature_nKF[:, :, columns], place_n, prior_F, precision)
        negative = [
            name
            for name, weight in zip(free, weight_F, strict=True)
            if weight < 0 and name in prior.never_negative
        ]
        if not negative:
            return dict(zip(free, weight_F.tolist(), strict=True))
        free = [name for name in free if name not in negative]


def log_likelihood(
    feature_nKF: Float32, place_n: Int64, names: Sequence[str], weights: Mapping[str, float]
) -> float:
    """Returns the sum of log p(taken), nats, over people; see `fit_conditional_logit`."""
    weight_F = np.array([weights.get(name, 0.0) for name in names], np.float32)
    score_nK = np.where(np.isnan(feature_nKF[:, :, 0]), -np.inf, np.nan_to_num(feature_nKF) @ weight_F)
    taken_n = score_nK[np.arange(len(place_n)), place_n]
    return float((taken_n - log_partition(score_nK)).sum(dtype=np.float64))


def _newton(
    feature_nKF: Float32, place_n: Int64, prior_F: Float64, precision: float, iterations: int = 40
) -> Float64:
    """Maximises sum_n log p(taken) - precision / 2 |w - prior|^2; every step is at most 1 long."""
    weight_F = prior_F.copy()
    absent_nK = np.isnan(feature_nKF[:, :, 0])
    known_nKF = np.nan_to_num(feature_nKF)
    taken_nF = known_nKF[np.arange(len(place_n)), place_n]
    for _ in range(iterations):
        score_nK = np.where(absent_nK, -np.inf, known_nKF @ weight_F.astype(np.float32))
        score_nK -= score_nK.max(axis=1, keepdims=True)
        p_nK = np.exp(score_nK, dtype=np.float64)
        p_nK /= p_nK.sum(axis=1, keepdims=True)
        mean_nF = np.einsum("nk,nkf->nf", p_nK, known_nKF)
        gradient_F = (taken_nF - mean_nF).sum(axis=0) - precision * (weight_F - prior_F)
        flat_NF = known_nKF.reshape(-1, len(prior_F)).astype(np.float64)
        hessian_FF = flat_NF.T @ (flat_NF * p_nK.reshape(-1, 1)) - mean_nF.T @ mean_nF
        step_F = np.linalg.solve(hessian_FF + precision * np.eye(len(prior_F)), gradient_F)
        longest = float(np.abs(step_F).max())
        weight_F += step_F / max(longest, 1.0)
        if longest < 1e-4:
            break
    return weight_F
