"""The second stage learns what shoppers like, and not where it stood. SIMULATION throughout: the truth is known."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from services.trainer.ranker.build import JudgedRanker, build_ranker, utility
from services.trainer.ranker.card import draw_reliability, section, with_section
from services.trainer.ranker.examples import Examples
from services.trainer.ranker.items import item_table
from services.trainer.ranker.measuring import (
    MAX_RATIO,
    auc,
    examination,
    expected_calibration_error,
    lead_over,
    log_loss,
    ndcg_of_order,
    platt,
    values_of_order,
)
from services.trainer.ranker.network import NetworkSize, _Network, train_network
from shared.bundle.ranker import TASKS, calibrated, ranker_logits
from shared.bundle.ranker_features import FEATURES, STATIC_FEATURES
from shared.event_kinds import EventKind
from shared.simulation.history import Scale
from tests.trainer.conftest import columns_of
from tests.trainer.simulated_impressions import SimulatedShop, simulated_shop

DECAY = 1.0


@pytest.fixture(scope="module")
def shop() -> SimulatedShop:
    scale = Scale(seed=3, shoppers=700, items=120, days=60, visits_per_shopper=8)
    return simulated_shop(scale, 5_000, position_decay=DECAY, noise=0.5)


@pytest.fixture(scope="module")
def corrected(shop: SimulatedShop) -> JudgedRanker:
    return build_ranker(shop.examples, 0, resamples=300)


@pytest.fixture(scope="module")
def naive(shop: SimulatedShop) -> JudgedRanker:
    return build_ranker(shop.examples, 0, corrects_position=False, resamples=300)


def judged_part(shop: SimulatedShop) -> tuple[Examples, np.ndarray]:
    judged = shop.examples.split()[2]
    return judged, shop.appeal_N[np.isin(shop.examples.page_N, judged.page_N)]


def truth_of_order(shop: SimulatedShop, ranker: JudgedRanker) -> float:
    """Returns NDCG@10 of a ranker's order against what would be clicked if it were looked at."""
    judged, truth_N = judged_part(shop)
    assert ranker.weights is not None
    logits_NT = ranker_logits(ranker.weights, judged.features_NF)
    click_N = calibrated(ranker.weights, logits_NT, np.ones(len(judged), np.int64))[:, 0]
    return ndcg_of_order(click_N, truth_N, judged.page_N)


def test_the_simulated_position_is_a_bias_and_no_merit(shop: SimulatedShop) -> None:
    examples = shop.examples
    first, tenth = (examples.position_N == place for place in (1, 10))
    clicks = examples.labels_NT[first, 0].mean() / examples.labels_NT[tenth, 0].mean()
    merit = shop.appeal_N[first].mean() / shop.appeal_N[tenth].mean()
    assert clicks > 5
    assert merit < 2


def test_the_ranker_undoes_the_position_bias_and_one_without_the_correction_does_not(
    shop: SimulatedShop, corrected: JudgedRanker, naive: JudgedRanker
) -> None:
    judged, truth_N = judged_part(shop)
    score_N = judged.features_NF[:, FEATURES.index("score")]
    first_stage = ndcg_of_order(score_N, truth_N, judged.page_N)
    right, wrong = truth_of_order(shop, corrected), truth_of_order(shop, naive)
    assert right > first_stage + 0.03
    assert right > wrong + 0.02
    # What the log alone would say: where items stood, both foretell clicks better than chance.
    assert corrected.measures["click_auc"] > 0.65


def test_the_tower_learns_how_attention_falls(corrected: JudgedRanker, naive: JudgedRanker) -> None:
    assert corrected.weights is not None
    assert naive.weights is not None
    theta_K = examination(corrected.weights.position_logits_K)
    truth_K = np.arange(1, 11) ** -DECAY
    # From 2,000 clicks, and the cascade hides what stands below a click too; without a tower it is off by ten.
    assert np.abs(np.log(theta_K[:10] / truth_K)).max() < math.log(2)
    assert (examination(naive.weights.position_logits_K) == 1).all()


@pytest.fixture(scope="module")
def over_the_worst(shop: SimulatedShop) -> JudgedRanker:
    """A ranker beside a first stage that has everything the wrong way round."""
    features_NF = shop.examples.features_NF.copy()
    features_NF[:, FEATURES.index("score")] = -np.log(shop.appeal_N)
    return build_ranker(replace(shop.examples, features_NF=features_NF), 0, resamples=300)


def test_a_ranker_that_earns_more_than_the_first_stage_is_served(
    corrected: JudgedRanker, over_the_worst: JudgedRanker
) -> None:
    assert over_the_worst.lead.low > 0
    assert over_the_worst.served
    described = over_the_worst.describe()
    assert described["format"] == 1
    assert described["features"] == list(FEATURES)
    # Over one that knows something it leads by less, and is served or not by the same rule.
    assert corrected.lead.value < over_the_worst.lead.value
    assert corrected.served == (corrected.lead.low > 0)


def test_one_that_takes_clicks_at_their_word_finds_no_lead(naive: JudgedRanker) -> None:
    assert not naive.served
    assert "must be above 0" in naive.why_not
    assert "format" not in naive.describe()


def test_a_ranker_of_outcomes_that_follow_from_nothing_is_not_served(shop: SimulatedShop) -> None:
    generator = np.random.default_rng(1)
    examples = shop.examples
    # Shuffled among the impressions of a position: attention stays, merit goes.
    labels_NT = examples.labels_NT.copy()
    for position in range(1, 11):
        rows = np.flatnonzero(examples.position_N == position)
        labels_NT[rows] = labels_NT[generator.permutation(rows)]
    found = build_ranker(replace(examples, labels_NT=labels_NT), 0, resamples=300)
    assert found.weights is not None
    assert not found.served


def test_too_little_was_logged_and_it_says_so(shop: SimulatedShop) -> None:
    few = shop.examples.where(shop.examples.page_N < 100)
    found = build_ranker(few, 0)
    assert found.weights is None
    assert not found.served
    assert found.why_not.startswith(f"{len(few):,} impressions with ")
    assert "5,000 and 300 are needed" in found.why_not
    rare = replace(shop.examples, labels_NT=np.zeros_like(shop.examples.labels_NT))
    assert "0 clicks are too few" in build_ranker(rare, 0).why_not
    assert "**None: " in section(found)


def test_probabilities_are_calibrated_where_the_items_stood(corrected: JudgedRanker) -> None:
    base = corrected.facts["click"] / corrected.facts["impressions"]
    assert corrected.measures["click_ece"] < 0.25 * base
    assert corrected.judged is not None
    assert corrected.probabilities_NT is not None
    p_NT = corrected.probabilities_NT
    # Nothing is bought that is not clicked.
    assert (p_NT[:, 1:] <= p_NT[:, :1]).all()


def test_serving_computes_what_was_trained_to_1e_5(shop: SimulatedShop) -> None:
    training, validation, judged = shop.examples.split()
    some = training.where(np.arange(len(training)) < 5_000)
    mean_F, scale_F = some.features_NF.mean(axis=0), some.features_NF.std(axis=0) + np.float32(1e-2)
    network = _Network(mean_F, scale_F, NetworkSize(), 0, np.zeros(50, np.float32), [])
    network.fit(some, validation, NetworkSize(max_epochs=2), 0, lambda: None)
    served_NT = ranker_logits(network.weights(), judged.features_NF)
    trained_NT = network.logits(judged)
    assert np.abs(trained_NT).max() > 1
    assert np.abs(served_NT - trained_NT).max() < 1e-5 * max(1.0, float(np.abs(trained_NT).max()))


def test_the_same_examples_and_seed_give_the_same_ranker(shop: SimulatedShop) -> None:
    training, validation, _ = shop.examples.split()
    some = training.where(np.arange(len(training)) < 3_000)
    one, other = (train_network(some, validation, NetworkSize(max_epochs=1), 7) for _ in range(2))
    np.testing.assert_array_equal(one.head_kernel, other.head_kernel)


def test_the_card_tells_of_the_second_stage(over_the_worst: JudgedRanker) -> None:
    card = with_section(b"# Model card\n\n## Training\n\nrest", over_the_worst).decode()
    assert card.index("## Second stage") < card.index("## Training")
    assert "**Served.**" in card
    assert draw_reliability(over_the_worst, "SIMULATION")[:8] == b"\x89PNG\r\n\x1a\n"


class TestMeasures:
    def test_auc_counts_pairs(self) -> None:
        generator = np.random.default_rng(0)
        score_N, label_N = generator.integers(0, 5, 60).astype(float), generator.random(60) < 0.3
        pairs = [
            1.0 if score_N[i] > score_N[j] else 0.5 if score_N[i] == score_N[j] else 0.0
            for i in np.flatnonzero(label_N)
            for j in np.flatnonzero(~label_N)
        ]
        assert auc(score_N, label_N) == pytest.approx(np.mean(pairs))

    def test_log_loss_and_calibration_error_by_hand(self) -> None:
        p_N, label_N = np.array([0.5, 0.25]), np.array([True, False])
        assert log_loss(p_N, label_N) == pytest.approx((math.log(2) - math.log(0.75)) / 2)
        many_N = np.repeat([0.2, 0.6], 1_500)
        wanted_N = np.concatenate([np.arange(1_500) % 5 == 0, np.arange(1_500) % 2 == 0])
        assert expected_calibration_error(many_N, wanted_N) == pytest.approx(0.05, abs=0.01)

    def test_platt_finds_what_was_done_to_the_logits(self) -> None:
        generator = np.random.default_rng(0)
        logit_N = generator.normal(-1, 1.5, 60_000)
        label_N = generator.random(60_000) < 1 / (1 + np.exp(-(0.6 * logit_N - 0.4)))
        assert platt(logit_N, label_N) == pytest.approx((0.6, -0.4), abs=0.05)
        # However wrong the ranker is, its order is not turned round.
        assert platt(logit_N, ~label_N)[0] > 0

    def test_an_order_earns_what_the_click_model_says(self) -> None:
        generator = np.random.default_rng(2)
        pages, width = 30, 4
        count = pages * width
        examples = Examples(
            np.zeros((count, len(FEATURES)), np.float32),
            np.zeros((count, len(TASKS)), np.float32),
            np.concatenate([np.sort(generator.permutation(9)[:width]) + 1 for _ in range(pages)]),
            generator.uniform(1, 5, count).astype(np.float32),
            np.repeat(np.arange(pages) * 3, width),
            np.repeat(generator.integers(0, 8, pages), width),
            np.zeros(count, np.int64),
            np.zeros(count, np.int64),
        )
        score_N, reward_N = generator.normal(size=count), (generator.random(count) < 0.4) * 2.0
        theta_K = 1 / np.arange(1, 51) ** 1.5
        expected = []
        for page in range(pages):
            rows = range(page * width, (page + 1) * width)
            places = sorted(int(examples.position_N[row]) for row in rows)
            total = 0.0
            for place, row in zip(places, sorted(rows, key=lambda row: -score_N[row]), strict=True):
                ratio = theta_K[place - 1] / theta_K[examples.position_N[row] - 1]
                total += reward_N[row] * float(examples.weight_N[row]) * min(ratio, MAX_RATIO)
            expected.append(total)
        value_P = values_of_order(score_N, reward_N, examples, theta_K)
        np.testing.assert_allclose(value_P, expected, rtol=1e-6)
        shown_P = values_of_order(-examples.position_N.astype(float), reward_N, examples, theta_K)
        np.testing.assert_allclose(shown_P.sum(), (reward_N * examples.weight_N).sum(), rtol=1e-6)
        lead = lead_over(value_P, shown_P, examples, 0, 200, 0.95)
        assert lead.value == pytest.approx((value_P - shown_P).mean())

    def test_ndcg_by_hand(self) -> None:
        gain_N, page_N = np.array([1.0, 0.0, 2.0, 0.0]), np.array([0, 0, 1, 1])
        worst = ndcg_of_order(-gain_N, gain_N, page_N)
        assert worst == pytest.approx(1 / math.log2(3))
        assert ndcg_of_order(gain_N, gain_N, page_N) == 1

    def test_outcomes_are_weighed(self) -> None:
        p_NT = np.array([[0.5, 0.1, 0.01]], np.float32)
        assert utility(p_NT, {"click": 1.0, "cart": 2.0, "purchase": 10.0})[0] == pytest.approx(0.8)


def test_the_table_of_items_says_what_happened_until_then() -> None:
    events = columns_of([[0, 1, 0], [0, 0, 2]])
    kinds = np.array([3, 3, EventKind.PURCHASE, 3, EventKind.ADD_TO_CART, 3], np.int32)
    events = replace(events, kind_E=kinds)
    attributes = {
        "item-0": ["category:a", "category:a > b", "brand:x"],
        "item-1": ["category:a"],
        "item-2": ["brand:x"],
    }
    prices = {"item-0": 5, "item-1": 5, "item-2": 9}
    table = item_table(events, attributes, prices, ["item-2", "item-1", "item-0", "item-9"])
    named = dict(zip(STATIC_FEATURES, table.features_IS.T, strict=True))
    assert table.category_I.tolist() == [-1, 0, 1, -1]
    assert table.brand_I.tolist() == [0, -1, 0, -1]
    assert named["price_percentile"].tolist() == [1.0, 0.25, 0.25, 0.5]
    assert named["log_popularity"].argmax() == 2
    assert named["cart_rate"].argmax() == named["purchase_rate"].argmax() == 2
    # Third events are at two minutes: before them nothing was bought.
    before = item_table(events, attributes, prices, ["item-0", "item-1"], before=60_000_000)
    assert before.features_IS[0, 2] < table.features_IS[2, 2]
    assert before.first_seen_I.tolist() == [0, 60]
