"""Whether people are split as an experiment says: if not, something is broken and no comparison holds."""

from __future__ import annotations

import math
from collections.abc import Sequence

MISMATCH_P_VALUE = 0.001
"""Below it a split counts as broken (Fabijan et al., "Diagnosing sample ratio mismatch", KDD 2019)."""
# How surely the alternative is thought to lie near the promised shares, in people: enough to notice a few per
# cent after some thousands.
_PRIOR_PEOPLE = 100.0
_PRECISION = 1e-15
_TINY = 1e-300


def sample_ratio_p_value(people: Sequence[int], weights: Sequence[float]) -> float:
    """Returns the p-value of Pearson's chi-squared test that people are split by the weights; 1 without people.

    For one look. See `sequential_sample_ratio_p_value` for many.
    """
    total, total_weight = sum(people), math.fsum(weights)
    if total == 0 or len(people) < 2:
        return 1.0
    chi_squared = 0.0
    for observed, weight in zip(people, weights, strict=True):
        expected = total * weight / total_weight
        chi_squared += (observed - expected) ** 2 / expected
    return chi_squared_survival(chi_squared, len(people) - 1)


def sequential_sample_ratio_p_value(people: Sequence[int], weights: Sequence[float]) -> float:
    """Returns a p-value that may be looked at after every person, in [0, 1].

    Lindon and Malek ("Anytime-valid inference for multinomial count data", NeurIPS 2022): one over the Bayes
    factor of a Dirichlet alternative around the promised shares theta,
    B(alpha + counts) / B(alpha) / prod(theta ^ counts) with alpha = _PRIOR_PEOPLE * theta. It is a martingale
    when the split is right, so it ever exceeds 1 / p with a probability of at most p (Ville's inequality).
    """
    total_weight = math.fsum(weights)
    theta = [weight / total_weight for weight in weights]
    log_bayes_factor = math.lgamma(_PRIOR_PEOPLE) - math.lgamma(_PRIOR_PEOPLE + sum(people))
    for count, share in zip(people, theta, strict=True):
        alpha = _PRIOR_PEOPLE * share
        log_bayes_factor += math.lgamma(alpha + count) - math.lgamma(alpha) - count * math.log(share)
    return min(1.0, math.exp(-max(0.0, log_bayes_factor)))


def chi_squared_survival(x: float, degrees_of_freedom: int) -> float:
    """Returns the probability that a chi-squared variable exceeds x >= 0: Q(k/2, x/2)."""
    return regularised_upper_gamma(degrees_of_freedom / 2, x / 2)


def regularised_upper_gamma(a: float, x: float) -> float:
    """Returns Q(a, x) = Gamma(a, x) / Gamma(a) for a > 0, x >= 0.

    The series of P below a + 1 (DLMF 8.11.4), Lentz's continued fraction of Q above (DLMF 8.9.2), as in Numerical
    Recipes, section 6.2. Relative precision about 1e-13.
    """
    if x <= 0:
        return 1.0
    log_scale = a * math.log(x) - x - math.lgamma(a)
    if x < a + 1:
        term = total = 1 / a
        denominator = a
        while abs(term) > abs(total) * _PRECISION:
            denominator += 1
            term *= x / denominator
            total += term
        return 1 - total * math.exp(log_scale)
    b = x + 1 - a
    c, d = 1 / _TINY, 1 / b
    fraction = d
    for i in range(1, 10_000):
        numerator = -i * (i - a)
        b += 2
        d = _away_from_zero(numerator * d + b)
        c = _away_from_zero(b + numerator / c)
        d = 1 / d
        fraction *= c * d
        if abs(c * d - 1) < _PRECISION:
            break
    return fraction * math.exp(log_scale)


def _away_from_zero(value: float) -> float:
    return value if abs(value) > _TINY else _TINY
