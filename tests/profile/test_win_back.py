"""What usually wins people back: counts of who came back to what, worked by hand."""

from __future__ import annotations

import numpy as np
import pytest

from services.profile.domain.win_back import (
    MIN_SIMILAR,
    UNKNOWN,
    Successes,
    WinBackRates,
    band_of,
    first_orders,
    moments,
)
from tests.profile.test_churn import DAY_US, purchases


def test_who_came_back_and_whether_to_what_they_knew() -> None:
    # user, day, item, amount, returned
    log = purchases(
        [
            (0, 1, 7, 10.0, False), (0, 20, 7, 10.0, False),
            (1, 1, 7, 10.0, False), (1, 20, 8, 10.0, False),
            # Half of the first order's lines were known; the second order counts no more.
            (2, 1, 7, 10.0, False), (2, 12, 7, 10.0, False), (2, 12, 9, 10.0, False), (2, 15, 9, 10.0, False),
            # A return is no purchase, and neither is what comes after the horizon.
            (3, 1, 7, 10.0, False), (3, 15, 7, 10.0, True), (3, 31, 7, 10.0, False),
        ],
        5,
    )  # fmt: skip
    came_back, repeated = first_orders(log, int(10 * DAY_US), int(30 * DAY_US))
    assert came_back.tolist() == [True, True, True, False, False]
    assert (came_back & repeated).tolist() == [True, False, True, False, False]


def test_rates_are_of_those_at_the_same_risk_for_the_same_reason() -> None:
    users = 2 * MIN_SIMILAR
    rows = [(user, 1.0, 1, 10.0, False) for user in range(users)]
    rows += [(user, 12.0, 1 if user % 2 else 2, 10.0, False) for user in range(0, users, 3)]
    log = purchases(rows, users)
    rates = WinBackRates()
    signal = np.where(np.arange(users) < MIN_SIMILAR, 1, 3)
    probability = np.full(users, 0.6)
    probability[-1] = 0.9
    rates.add(log, int(10 * DAY_US), int(30 * DAY_US), np.arange(users), probability, signal)

    back = [user for user in range(MIN_SIMILAR) if user % 3 == 0]
    assert rates.of_repeated(1, 0.65) == Successes(MIN_SIMILAR, sum(user % 2 for user in back))
    assert rates.of_discovered(1, 0.65) == Successes(MIN_SIMILAR, sum(1 - user % 2 for user in back))
    assert rates.of_discovered(1, 0.8) is UNKNOWN, "nobody was at that risk"
    assert rates.of_discovered(3, 0.65) is UNKNOWN, "one too few"
    assert rates.of_discovered(1, 0.4) is UNKNOWN, "not at risk"


def test_the_interval_is_wilsons() -> None:
    # Newcombe, 1998, table I: 81 of 263, Wilson without continuity correction.
    low, high = Successes(263, 81).interval()
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    # And 0 of 20.
    low, high = Successes(20, 0).interval()
    assert (round(low, 4), round(high, 4)) == (0.0, 0.1611)
    assert UNKNOWN.interval() == (0.0, 1.0)


def test_only_moments_whose_horizon_has_gone_by_and_that_have_a_past_are_looked_at() -> None:
    assert list(moments(100, 20, 0)) == [80, 60, 40, 20]
    assert list(moments(100, 20, 30)) == [80, 60]
    assert list(moments(100, 60, 0)) == []


@pytest.mark.parametrize(("probability", "band"), [(0.49, None), (0.5, 0), (0.7, 1), (0.85, 2), (1.0, 2)])
def test_bands_of_risk(probability: float, band: int | None) -> None:
    assert band_of(probability) == band
