"""Intervals that may be looked at as often as one likes.

An interval of the usual kind is right at one moment chosen beforehand. Whoever looks every day, and stops at the
first good news, is misled far more often than the level says. A confidence sequence holds the truth at all
moments together.
"""

from __future__ import annotations

import math

from services.feedback.domain.clustered import ClusteredSums
from services.feedback.domain.metrics import Interval

MINIMUM_PEOPLE = 100
"""In each variant, before an asymptotic interval means anything."""
MINIMUM_EARNERS = 20
"""In both variants together: a variance estimated from a handful of purchases is none."""


def mixture_precision(alpha: float, expected_people: int) -> float:
    """Returns rho, which makes the sequence about as narrow as it can be after `expected_people`.

    rho^2 = (-2 log alpha + log(-2 log alpha + 1)) / t*, Waudby-Smith et al. (2024), after Howard et al. (2021,
    section 3.5). It must not depend on what was seen.
    """
    spent = -2 * math.log(alpha)
    return math.sqrt((spent + math.log(spent + 1)) / expected_people)


def always_valid_width(people: int, alpha: float, rho: float) -> float:
    """Returns how many standard errors to either side always hold the truth: what 1.96 is to one look.

    The asymptotic confidence sequence of Waudby-Smith, Arbour, Sinha, Kennedy and Ramdas ("Time-uniform central
    limit theory and asymptotic confidence sequences", Annals of Statistics, 2024, theorem 2.2):
    mean +- sigma sqrt(2 (t rho^2 + 1) / (t^2 rho^2) log(sqrt(t rho^2 + 1) / alpha)), the normal-mixture boundary
    of Robbins and of Howard, Ramdas, McAuliffe and Sekhon ("Time-uniform, nonparametric, nonasymptotic
    confidence sequences", Annals of Statistics, 2021). Divided by sigma / sqrt(t).

    Args:
        people: t, how many independent people were seen.
        alpha: the chance that the truth ever lies outside, in (0, 1).
        rho: from `mixture_precision`.
    """
    t_rho2 = people * rho * rho
    return math.sqrt(2 * (t_rho2 + 1) / t_rho2 * math.log(math.sqrt(t_rho2 + 1) / alpha))


def difference_interval(
    treatment: ClusteredSums,
    control: ClusteredSums,
    alpha: float,
    expected_people: int,
    *,
    control_factor: float = 1.0,
    offset: float = 0.0,
) -> Interval | None:
    """Returns treatment - control_factor * control + offset, ratios of sums over people, always valid.

    People come back, so that a person's number grows after they were first counted. Such increments are
    correlated positively, and looks then resemble each other more than looks at a random walk do: by Slepian's
    inequality the chance of ever being wrong only falls.

    None before MINIMUM_PEOPLE are in each variant and MINIMUM_EARNERS in both: starting late costs no validity.
    """
    if min(treatment.people, control.people) < MINIMUM_PEOPLE:
        return None
    if treatment.earners + control.earners < MINIMUM_EARNERS:
        return None
    ratios, variances = (treatment.ratio, control.ratio), (treatment.variance, control.variance)
    if ratios[0] is None or ratios[1] is None or variances[0] is None or variances[1] is None:
        return None
    value = ratios[0] - control_factor * ratios[1] + offset
    standard_error = math.sqrt(variances[0] + control_factor**2 * variances[1])
    people = treatment.people + control.people
    half = standard_error * always_valid_width(people, alpha, mixture_precision(alpha, expected_people))
    return Interval(value, value - half, value + half)
