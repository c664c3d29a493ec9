"""Noise to (epsilon, delta) and back, and composition over releases. The arithmetic is dp-accounting's.

One release: tight, by privacy loss distributions (Koskela et al., 2020; Doroshenko et al., 2022). Over releases:
Renyi (Mironov, 2017), whose sum may be compared with a limit fixed beforehand even where each release was
chosen after seeing the ones before (Feldman & Zrnic, 2021), or the plain sum, whichever is smaller.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import dp_accounting
from dp_accounting.pld import pld_privacy_accountant
from dp_accounting.rdp import rdp_privacy_accountant
from scipy.optimize import brentq
from scipy.special import log_ndtr, ndtr

from services.trainer.domain.privacy import GaussianRelease, PrivacyCharge

_ADJACENCY = dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
# More noise than this and nothing is left to publish.
_MOST_NOISE = 1e5


def epsilon_of(releases: Sequence[GaussianRelease], delta: float) -> float:
    """Returns the epsilon at delta of all the releases together, which is never too small."""
    accountant = pld_privacy_accountant.PLDAccountant(_ADJACENCY)
    for release in releases:
        accountant.compose(_event(release))
    return float(accountant.get_epsilon(delta))


@lru_cache(maxsize=128)
def noise_for(epsilon: float, delta: float, sampling_rate: float = 1.0, steps: int = 1) -> GaussianRelease:
    """Returns the release with the least noise, to a thousandth, that is (epsilon, delta) private.

    Raises:
        ValueError: no noise is enough.
    """

    def spent(noise_multiplier: float) -> float:
        return epsilon_of([GaussianRelease(noise_multiplier, sampling_rate, steps)], delta)

    low, high = 0.0, 1.0
    if sampling_rate == 1 and steps == 1:
        # Known exactly; the accountant, which is asked slowly, need only confirm it.
        exact = _analytic_noise(epsilon, delta)
        low, high = 0.9996 * exact, 1.0004 * exact
    while spent(high) > epsilon:
        low, high = high, 2 * high
        if high > _MOST_NOISE:
            raise ValueError(f"no noise makes {steps} steps ({epsilon}, {delta}) private")
    while high - low > 1e-3 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if spent(middle) <= epsilon else (middle, high)
    return GaussianRelease(high, sampling_rate, steps)


def _analytic_noise(epsilon: float, delta: float) -> float:
    """Returns the noise multiplier of one release to everybody (Balle & Wang, 2018, theorem 8)."""

    def excess(log_noise: float) -> float:
        noise = math.exp(log_noise)
        half = 1 / (2 * noise)
        gain = math.exp(epsilon + float(log_ndtr(-half - epsilon * noise)))
        return float(ndtr(half - epsilon * noise)) - gain - delta

    return math.exp(float(brentq(excess, math.log(1e-3), math.log(_MOST_NOISE), xtol=1e-9)))


def epsilon_of_ledger(charges: Sequence[PrivacyCharge], delta: float) -> float:
    """Returns the epsilon at delta of everything that was charged: the smaller of Renyi and basic composition."""
    if not charges:
        return 0.0
    accountant = rdp_privacy_accountant.RdpAccountant(neighboring_relation=_ADJACENCY)
    for charge in charges:
        for release in charge.releases:
            accountant.compose(_event(release))
    composed = float(accountant.get_epsilon(delta))
    if math.fsum(charge.delta for charge in charges) <= delta:
        composed = min(composed, math.fsum(charge.epsilon for charge in charges))
    return composed


def _event(release: GaussianRelease) -> dp_accounting.DpEvent:
    event: dp_accounting.DpEvent = dp_accounting.GaussianDpEvent(release.noise_multiplier)
    if release.sampling_rate < 1:
        event = dp_accounting.PoissonSampledDpEvent(release.sampling_rate, event)
    return dp_accounting.SelfComposedDpEvent(event, release.steps) if release.steps > 1 else event
