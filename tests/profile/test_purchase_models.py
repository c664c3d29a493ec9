"""BG/NBD and gamma-gamma beside published estimates, simulated shoppers and slow twins."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from scipy.integrate import dblquad, quad

from services.profile.domain.purchase_counts import BgNbd, PurchaseCounts
from services.profile.domain.purchase_values import GammaGamma, lifetime_values

PUBLISHED = BgNbd(0.243, 4.414, 0.793, 2.426)


def counts(*rows: tuple[float, float, float]) -> PurchaseCounts:
    return PurchaseCounts(*np.array(rows, np.float64).T)


def simulate(model: BgNbd, users: int, weeks: float, rng: np.random.Generator) -> PurchaseCounts:
    """Returns histories drawn from the story that the model tells, one shopper at a time."""
    rows = []
    for _ in range(users):
        rate, leaves = rng.gamma(model.r, 1 / model.alpha), rng.beta(model.a, model.b)
        x, t_x, time = 0, 0.0, 0.0
        while (time := time + rng.exponential(1 / rate)) <= weeks:
            x, t_x = x + 1, time
            if rng.random() < leaves:
                break
        rows.append((x, t_x, weeks))
    return counts(*rows)


@pytest.fixture(scope="module")
def cdnow(test_data: Path) -> Path:
    directory = test_data / "cdnow"
    if not directory.is_dir():
        pytest.skip(f"{directory} is not here")
    return directory


def test_the_fit_on_cdnow_is_the_published_one(cdnow: Path) -> None:
    table = np.loadtxt(cdnow / "cdnow_customers_summary.csv", delimiter=",", skiprows=1)
    histories = PurchaseCounts(table[:, 1], table[:, 2], table[:, 3])
    model = BgNbd.fit(histories)
    assert (model.r, model.alpha, model.a, model.b) == pytest.approx((0.243, 4.414, 0.793, 2.426), abs=1e-3)
    assert model.log_likelihood(histories) == pytest.approx(-9582.4, abs=0.05)


def test_the_value_of_a_purchase_on_cdnow_is_the_published_one(cdnow: Path) -> None:
    spent: dict[str, dict[str, float]] = {}
    for line in (cdnow / "CDNOW_sample.txt").read_text().splitlines():
        _, customer, day, _, dollars = line.split()
        if day <= "19970930":
            days = spent.setdefault(customer, {})
            days[day] = days.get(day, 0.0) + float(dollars)
    repeats = [[days[day] for day in sorted(days)[1:]] for days in spent.values()]
    x_N = np.array([len(values) for values in repeats], np.float64)
    m_N = np.array([sum(values) / max(1, len(values)) for values in repeats])
    model = GammaGamma.fit(x_N, m_N)
    # Fader & Hardie (2013), The gamma-gamma model of monetary value, section 5.
    assert (model.p, model.q, model.gamma) == pytest.approx((6.25, 3.74, 15.44), abs=0.01)


def test_the_published_shopper_is_expected_to_buy_1_226_times_in_39_weeks() -> None:
    # Fader, Hardie & Lee (2005), A note on implementing the BG/NBD model in Excel, figure 8.
    expected = PUBLISHED.expected_purchases(counts((2, 30.43, 38.86)), 39.0)
    assert float(expected[0]) == pytest.approx(1.226, abs=1e-3)


def test_parameters_are_found_again_in_simulated_shoppers() -> None:
    truth = BgNbd(0.8, 6.0, 0.9, 2.5)
    histories = simulate(truth, 6000, 52.0, np.random.default_rng(7))
    fitted = BgNbd.fit(histories)
    assert fitted.r == pytest.approx(truth.r, rel=0.15)
    assert fitted.alpha == pytest.approx(truth.alpha, rel=0.2)
    # a and b are known by their mean far better than one by one.
    assert fitted.a / (fitted.a + fitted.b) == pytest.approx(truth.a / (truth.a + truth.b), rel=0.12)
    assert fitted.log_likelihood(histories) >= truth.log_likelihood(histories)


def test_a_likelihood_equals_the_integral_over_all_shoppers() -> None:
    """The slow twin: eq. (3) of the paper for one shopper, integrated over the rate and over p."""
    model, x, t_x, T = BgNbd(0.9, 4.0, 1.5, 2.5), 3, 10.0, 16.0

    def density(rate: float, leaves: float) -> float:
        gamma = model.alpha**model.r * rate ** (model.r - 1) * math.exp(-model.alpha * rate)
        beta = leaves ** (model.a - 1) * (1 - leaves) ** (model.b - 1)
        one = (1 - leaves) ** x * rate**x * math.exp(-rate * T)
        one += leaves * (1 - leaves) ** (x - 1) * rate**x * math.exp(-rate * t_x)
        return one * gamma * beta

    norm = math.gamma(model.r) * math.gamma(model.a) * math.gamma(model.b) / math.gamma(model.a + model.b)
    integral = dblquad(density, 0, 1, 0, 20)[0] / norm
    likelihood = math.exp(float(model.log_likelihoods(counts((x, t_x, T)))[0]))
    assert likelihood == pytest.approx(integral, rel=1e-6)


def test_forecasts_agree_with_shoppers_who_are_simulated_on() -> None:
    model, weeks, ahead = BgNbd(0.8, 6.0, 0.9, 2.5), 30.0, 20.0
    rng = np.random.default_rng(11)
    rows, later = [], []
    for _ in range(20_000):
        rate, leaves = rng.gamma(model.r, 1 / model.alpha), rng.beta(model.a, model.b)
        x, t_x, time, bought = 0, 0.0, 0.0, 0
        while (time := time + rng.exponential(1 / rate)) <= weeks + ahead:
            if time <= weeks:
                x, t_x = x + 1, time
            else:
                bought += 1
            if rng.random() < leaves:
                break
        rows.append((x, t_x, weeks))
        later.append(bought)
    histories, bought_N = counts(*rows), np.array(later)
    assert float(model.expected_purchases(histories, ahead).mean()) == pytest.approx(
        float(bought_N.mean()), rel=0.04
    )
    assert float(model.no_purchase_probabilities(histories, ahead).mean()) == pytest.approx(
        float((bought_N == 0).mean()), abs=0.01
    )
    some = histories.x_N >= 3
    few = PurchaseCounts(histories.x_N[some], histories.t_x_N[some], histories.T_N[some])
    assert float(model.no_purchase_probabilities(few, ahead).mean()) == pytest.approx(
        float((bought_N[some] == 0).mean()), abs=0.02
    )


def test_forecasts_hold_at_the_edges() -> None:
    edges = counts((0, 0, 0), (0, 0, 500), (1, 0, 0), (3000, 700, 700), (1, 1e-9, 3000), (400, 10, 3000))
    for model in (
        PUBLISHED,
        BgNbd(0.5, 10.0, 1.0, 2.0),
        BgNbd(2e-5, 1e-4, 5e4, 1e-4),
        BgNbd(50, 900, 1e-5, 9),
    ):
        expected = model.expected_purchases(edges, 90.0)
        silent = model.no_purchase_probabilities(edges, 90.0)
        assert np.isfinite(expected).all()
        assert (expected >= 0).all()
        assert ((silent >= 0) & (silent <= 1)).all()
    near_one = [
        float(BgNbd(0.5, 10.0, a, 2.0).expected_purchases(counts((4, 50, 60)), 90.0)[0])
        for a in (0.99, 1.0, 1.01)
    ]
    assert near_one[1] == pytest.approx((near_one[0] + near_one[2]) / 2, rel=1e-3)


def test_a_fit_survives_shoppers_who_never_return() -> None:
    model = BgNbd.fit(counts(*[(0, 0, 30)] * 50))
    assert float(model.no_purchase_probabilities(counts((0, 0, 30)), 90.0)[0]) > 0.95
    with pytest.raises(ValueError, match="no customers"):
        BgNbd.fit(PurchaseCounts(np.empty(0), np.empty(0), np.empty(0)))


def test_histories_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="t_x <= T"):
        counts((1, 20, 10))


def test_the_mean_of_few_purchases_is_pulled_to_that_of_all() -> None:
    model = GammaGamma(6.25, 3.74, 15.44)
    population = 6.25 * 15.44 / 2.74
    values = model.expected_values(np.array([0.0, 1.0, 100.0]), np.array([0.0, 100.0, 100.0]))
    assert float(values[0]) == pytest.approx(population)
    assert population < float(values[1]) < float(values[2]) < 100
    # The slow twin of the likelihood: nu integrated out by quadrature, m being a mean of three purchases.
    x, m = 3, 40.0

    def density(nu: float) -> float:
        shape, rate = 6.25 * x, nu * x
        mean = rate**shape * m ** (shape - 1) * math.exp(-rate * m) / math.gamma(shape)
        return mean * 15.44**3.74 * nu**2.74 * math.exp(-15.44 * nu) / math.gamma(3.74)

    assert math.exp(float(model.log_likelihoods(np.array([3.0]), np.array([m]))[0])) == pytest.approx(
        quad(density, 0, 5)[0], rel=1e-6
    )


def test_a_lifetime_value_is_the_discounted_sum_of_its_months() -> None:
    histories = counts((2, 200, 300), (0, 0, 300))
    model = BgNbd(0.25, 31.0, 0.79, 2.4)
    value_N = np.array([30.0, 10.0])
    by_hand = np.zeros(2)
    for month in range(12):
        begin, end = month * 365 / 12, (month + 1) * 365 / 12
        bought = model.expected_purchases(histories, end) - model.expected_purchases(histories, begin)
        by_hand += bought * value_N / 1.1 ** ((begin + end) / 2 / 365)
    assert lifetime_values(histories, model, value_N) == pytest.approx(by_hand)
    free = lifetime_values(histories, model, value_N, yearly_discount=0.0)
    assert free == pytest.approx(model.expected_purchases(histories, 365.0) * value_N)
