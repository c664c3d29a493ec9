"""What serves where counts drown, and the private choice of how much: beside naive twins."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import kstest, norm

from services.trainer.pipeline.dataset import ItemAttributes, encode_attributes, hold_out
from services.trainer.pipeline.evaluation import rank_by_blend
from services.trainer.privacy import choosing
from services.trainer.privacy.backoff import groups_of, likeness_factors, shrunk
from services.trainer.privacy.choosing import SENSITIVITY, WEIGHTS, choose_weight, numbers_of
from services.trainer.privacy.contributions import sum_shares
from services.trainer.privacy.counts import add_noise, contestants_of, with_likeness
from services.trainer.privacy.measuring import person_numbers
from services.trainer.privacy.randomness import SecureRandom
from tests.trainer.test_privacy_counts import histories_of

KEY = bytes(range(32))


def shop(items: int = 36) -> ItemAttributes:
    names = [f"item-{index}" for index in range(items)]
    values = {
        name: [f"shelf={index % 3}", f"brand={index // 3 % 6}", *(["rare"] if index < 2 else [])]
        for index, name in enumerate(names)
    }
    return encode_attributes(names, values)


def test_a_group_is_the_rarest_attribute_that_is_not_too_rare() -> None:
    # 36 items: at least 6 must share it. Brands have 6, shelves 12, "rare" 2.
    group_I = groups_of(shop())
    assert [int((group_I == group).sum()) for group in range(6)] == [6] * 6
    assert all(group_I[index] == group_I[index + 18] for index in range(18))
    without = ItemAttributes(np.zeros((5, 0), np.int32), 0)
    assert groups_of(without).tolist() == [0] * 5
    assert likeness_factors(without) is None


def test_without_noise_a_popularity_is_the_item_s_own_and_with_nothing_but_noise_it_is_the_group_s() -> None:
    group_I = np.repeat([0, 1], 500)
    true_I = np.where(group_I == 0, 3.0, 30.0) * np.random.default_rng(0).uniform(0.5, 1.5, 1000)
    # But for the rarest, which are not shown to be rarer than a tenth of their group and the shop.
    least_I = 0.1 * (np.array([true_I[:500].mean(), true_I[500:].mean()])[group_I] + true_I.mean())
    np.testing.assert_allclose(shrunk(true_I, 0.0, group_I), np.maximum(true_I, least_I))
    noise = 40.0
    noisy_I = true_I + noise * np.random.default_rng(1).normal(size=1000)
    found_I = shrunk(noisy_I, noise, group_I)
    assert (found_I > 0).all()
    assert np.mean((found_I - true_I) ** 2) < 0.05 * np.mean((noisy_I - true_I) ** 2)
    assert found_I[group_I == 1].mean() > 3 * found_I[group_I == 0].mean()


def test_likeness_is_the_cosine_of_attributes_weighted_by_how_rare_they_are() -> None:
    attributes = shop()
    factors = likeness_factors(attributes)
    assert factors is not None
    found_II = factors[0] @ factors[1].T
    items = len(attributes.attribute_IP)
    sets = [set(row[row > 0].tolist()) for row in attributes.attribute_IP]
    count = {value: sum(value in of_item for of_item in sets) for value in set().union(*sets)}
    weight = {value: math.log(items / number) ** 4 for value, number in count.items()}
    for one, two in [(0, 1), (0, 18), (0, 3), (5, 23), (7, 7)]:
        shared = sum(weight[value] for value in sets[one] & sets[two])
        sizes = [math.sqrt(sum(weight[value] for value in sets[item])) for item in (one, two)]
        assert found_II[one, two] == pytest.approx(shared / (sizes[0] * sizes[1]), abs=1e-5)


def brand_lovers(users: int, items: int = 36) -> list[list[int]]:
    """Histories that stay with a brand, in no order, so that counts of pairs alone say little."""
    generator = np.random.default_rng(4)
    rows = []
    for _ in range(users):
        brand = int(generator.integers(6))
        of_brand = [index for index in range(items) if index // 3 % 6 == brand]
        rows.append(generator.permutation(of_brand)[:4].tolist())
    return rows


def test_what_a_choosing_person_adds_is_what_serving_would_score_under_each_weight_and_is_bounded() -> None:
    people = histories_of(brand_lovers(30), 36)
    counts = add_noise(sum_shares(people, 1.0), 2.0, SecureRandom(KEY))
    unweighted = contestants_of(counts, shop())
    numbers_BW = numbers_of(people, unweighted, exclude_seen=True)
    assert numbers_BW.shape == (30, len(WEIGHTS))
    assert (np.linalg.norm(numbers_BW, axis=1) <= SENSITIVITY).all()
    held = hold_out(people, 1, True)
    queries = np.zeros((len(held), unweighted.item_vectors_ID.shape[1]), np.float32)
    for column, weight in enumerate(WEIGHTS):
        rank_B = rank_by_blend(people, held, queries, with_likeness(unweighted, weight), True)
        np.testing.assert_allclose(numbers_BW[:, column], person_numbers(rank_B, rank_B)[:, 2], atol=1e-6)


def test_likeness_is_chosen_where_people_stay_with_a_brand_and_left_out_where_they_do_not() -> None:
    generator = np.random.default_rng(5)
    popular = 1 / np.arange(1, 37)
    strays = [generator.choice(36, 4, replace=False, p=popular / popular.sum()).tolist() for _ in range(1500)]
    chosen = {}
    for name, rows in {"lovers": brand_lovers(1500), "strays": strays}.items():
        people = histories_of(rows, 36)
        counts = add_noise(sum_shares(people, 1.0), 60.0, SecureRandom(KEY))
        chosen[name] = choose_weight(people, contestants_of(counts, shop()), True, 3.0, SecureRandom(KEY))
    assert chosen["lovers"] >= 3.0
    assert chosen["strays"] <= 1.0


def test_the_choice_carries_noise_of_the_promised_size(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[np.ndarray] = []
    original = np.argmax

    def spy(values: np.ndarray) -> int:
        seen.append(np.asarray(values))
        return int(original(values))

    monkeypatch.setattr(choosing.np, "argmax", spy)
    nobody = histories_of([[1]], 36)
    counts = add_noise(sum_shares(nobody, 1.0), 1.0, SecureRandom(KEY))
    unweighted, random = contestants_of(counts, shop()), SecureRandom(KEY)
    for _ in range(300):
        choose_weight(nobody, unweighted, True, 2.5, random)
    found = np.concatenate([values for values in seen if values.shape == (len(WEIGHTS),)])
    assert kstest(found / (2.5 * SENSITIVITY), norm.cdf).pvalue > 1e-3
