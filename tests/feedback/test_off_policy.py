"""Off-policy estimates: right where the truth is known, refused where the log cannot know."""

from __future__ import annotations

import itertools
import math
import random
from collections import defaultdict
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from shopkeeper.feedback.v1 import event_pb2, experiment_pb2, feedback_service_pb2, metrics_pb2

from services.feedback.converters.off_policy import from_estimate
from services.feedback.domain.metrics import Interval
from services.feedback.domain.off_policy import (
    GivenPolicy,
    LoggedImpressions,
    PolicyEstimate,
    SoftmaxPolicy,
    effective_sample_size,
    estimate_policy_value,
    reward_model,
)
from shared.errors import FailedPrecondition, InvalidInput
from shared.tokens import AttributionToken, TokenSigner, item_digests
from tests.feedback.conftest import Shop, event, now_ms
from tests.feedback.test_experiments import refusal
from tests.feedback.test_metrics_of_people import record

ITEMS = "abcde"
POSITIONS = 2
RATES = {"a": 0.30, "b": 0.20, "c": 0.15, "d": 0.10, "e": 0.05}
POSITION_FACTOR = {1: 1.0, 2: 0.5}


@dataclass(frozen=True)
class Ranker:
    """A policy that draws two of five items without putting one back, by their weights (Plackett and Luce)."""

    weights: dict[str, float]

    def rankings(self) -> dict[tuple[str, ...], float]:
        probabilities = {}
        for ranking in itertools.permutations(ITEMS, POSITIONS):
            left, probability = sum(self.weights.values()), 1.0
            for item in ranking:
                probability *= self.weights[item] / left
                left -= self.weights[item]
            probabilities[ranking] = probability
        return probabilities

    def marginals(self) -> dict[tuple[str, int], float]:
        """Returns the probability of each item at each position."""
        marginals: dict[tuple[str, int], float] = defaultdict(float)
        for ranking, probability in self.rankings().items():
            for position, item in enumerate(ranking, start=1):
                marginals[item, position] += probability
        return marginals


LOGGING = Ranker({"a": 1.0, "b": 2.0, "c": 3.0, "d": 2.0, "e": 2.0})


def true_value(probability_of: dict[str, float]) -> float:
    """Returns what an impression of a policy earns that shows items so at every position."""
    return sum(
        probability * RATES[item] * POSITION_FACTOR[position] / POSITIONS
        for item, probability in probability_of.items()
        for position in POSITION_FACTOR
    )


def simulate(rng: np.random.Generator, recommendations: int, policy: Ranker = LOGGING) -> LoggedImpressions:
    rankings = policy.rankings()
    marginals = policy.marginals()
    drawn = rng.choice(len(rankings), recommendations, p=list(rankings.values()))
    items_RK = np.array([[ITEMS.index(item) for item in ranking] for ranking in rankings])[drawn]
    propensity_AK = np.array([[marginals[item, k] for k in (1, 2)] for item in ITEMS])
    rate_AK = np.array([[RATES[item] * POSITION_FACTOR[k] for k in (1, 2)] for item in ITEMS])
    position_N = np.tile([1, 2], recommendations)
    item_N = items_RK.ravel()
    recommendation_N = np.repeat(np.arange(recommendations), POSITIONS)
    return LoggedImpressions(
        items=list(ITEMS),
        item_N=item_N,
        position_N=position_N,
        propensity_N=propensity_AK[item_N, position_N - 1],
        reward_N=(rng.random(len(item_N)) < rate_AK[item_N, position_N - 1]).astype(np.float64),
        # Everybody comes twice on average.
        person_N=rng.integers(0, recommendations // 2, recommendations)[recommendation_N],
        recommendation_N=recommendation_N,
    )


SCORES = {"a": 1.5, "b": 0.5, "e": -1.0}
TARGETS = {
    "uniform": (SoftmaxPolicy({}), dict.fromkeys(ITEMS, 1 / 5)),
    "scores": (
        SoftmaxPolicy(SCORES, 0.8),
        {
            item: math.exp(SCORES.get(item, 0) / 0.8) / sum(math.exp(SCORES.get(i, 0) / 0.8) for i in ITEMS)
            for item in ITEMS
        },
    ),
}


def estimators(estimate: PolicyEstimate) -> dict[str, Interval]:
    return {
        "inverse propensity": estimate.inverse_propensity,
        "self-normalised": estimate.self_normalised,
        "doubly robust": estimate.doubly_robust,
    }


@pytest.mark.parametrize("name", TARGETS)
def test_estimates_are_unbiased_and_their_intervals_hold_the_truth(name: str) -> None:
    policy, probability_of = TARGETS[name]
    truth = true_value(probability_of)
    rng = np.random.default_rng(11)
    repetitions = 300
    values: dict[str, list[float]] = defaultdict(list)
    held: dict[str, int] = defaultdict(int)
    logged = []
    for _ in range(repetitions):
        estimate = estimate_policy_value(simulate(rng, 600), policy, 100.0, 0.95)
        logged.append(estimate.logged.value)
        for estimator, interval in estimators(estimate).items():
            values[estimator].append(interval.value)
            held[estimator] += interval.lower <= truth <= interval.upper
    for estimator, found in values.items():
        error = np.std(found) / math.sqrt(repetitions)
        assert abs(np.mean(found) - truth) < 4 * error, estimator
        # 0.95, give or take four standard deviations of 300 trials.
        assert 0.90 <= held[estimator] / repetitions <= 1, estimator
    # The model of rewards is what it is for: the doubly robust estimate varies least.
    assert np.std(values["doubly robust"]) < np.std(values["inverse propensity"])
    # What the policy in service earned is something else, or nothing was tested.
    assert abs(np.mean(logged) - truth) > 8 * np.std(logged) / math.sqrt(repetitions)


def test_given_probabilities_are_valued_like_the_policy_they_come_from() -> None:
    impressions = simulate(np.random.default_rng(2), 3_000)
    softmax, _ = TARGETS["scores"]
    target_N = softmax.of_impressions(impressions)
    given = GivenPolicy(
        {
            (recommendation, ITEMS[item]): probability
            for recommendation, item, probability in zip(
                impressions.recommendation_N.tolist(), impressions.item_N.tolist(), target_N, strict=True
            )
        }
    )
    one, other = (estimate_policy_value(impressions, policy, 100.0, 0.95) for policy in (softmax, given))
    assert other.inverse_propensity == one.inverse_propensity
    assert other.self_normalised == one.self_normalised
    truth = true_value(TARGETS["scores"][1])
    assert other.doubly_robust.lower < truth < other.doubly_robust.upper


def test_estimates_agree_with_the_formulas_written_as_loops() -> None:
    impressions = simulate(np.random.default_rng(3), 400)
    policy, probability_of = TARGETS["scores"]
    clip = 2.0
    estimate = estimate_policy_value(impressions, policy, clip, 0.9)
    q_N, q_bar_N = reward_model(impressions, policy.over_items(impressions.items))
    weights, ips, weighted, robust, clipped = [], 0.0, 0.0, 0.0, 0
    n = len(impressions.item_N)
    for i in range(n):
        weight = probability_of[ITEMS[impressions.item_N[i]]] / impressions.propensity_N[i]
        clipped += weight > clip
        w = min(weight, clip)
        weights.append(w)
        ips += w * impressions.reward_N[i] / n
        weighted += w * impressions.reward_N[i]
        robust += (q_bar_N[i] + w * (impressions.reward_N[i] - q_N[i])) / n
    assert estimate.inverse_propensity.value == pytest.approx(ips)
    assert estimate.self_normalised.value == pytest.approx(weighted / sum(weights))
    assert estimate.doubly_robust.value == pytest.approx(robust)
    assert estimate.logged.value == pytest.approx(sum(impressions.reward_N) / n)
    assert estimate.effective_sample_size == pytest.approx(sum(weights) ** 2 / sum(w * w for w in weights))
    assert estimate.clipped_fraction == pytest.approx(clipped / n)
    assert 0 < clipped < n


def test_the_reward_model_never_sees_the_person_it_foretells() -> None:
    impressions = simulate(np.random.default_rng(4), 200)
    target_A = np.full(5, 0.2)
    before, _ = reward_model(impressions, target_A)
    person = int(impressions.person_N[0])
    theirs = impressions.person_N == person
    changed = impressions.reward_N.copy()
    changed[theirs] = 1_000.0
    after, _ = reward_model(replace(impressions, reward_N=changed), target_A)
    assert np.array_equal(before[theirs], after[theirs])
    assert not np.array_equal(before, after)


def test_the_effective_sample_size_by_hand() -> None:
    assert effective_sample_size(np.ones(7)) == pytest.approx(7)
    assert effective_sample_size(np.array([3.0, 1.0])) == pytest.approx(16 / 10)
    assert effective_sample_size(np.zeros(3)) == 0


# Refusals


def thin(impressions: LoggedImpressions, policy: Any) -> dict[str, str]:
    with pytest.raises(FailedPrecondition) as failure:
        estimate_policy_value(impressions, policy, 1e9, 0.95)
    assert failure.value.reason == "OVERLAP_TOO_THIN"
    return dict(failure.value.metadata)


def always_the_same(recommendations: int = 1_000) -> LoggedImpressions:
    """Returns impressions of a policy that always shows a, then b."""
    impressions = simulate(np.random.default_rng(5), recommendations)
    item_N = impressions.position_N - 1
    return replace(impressions, item_N=item_N, propensity_N=np.ones(len(item_N)))


def test_a_policy_that_shows_what_was_never_shown_is_not_valued() -> None:
    never = GivenPolicy({(-1, "e"): 1.0})
    numbers = thin(always_the_same(), never)
    assert (numbers["effectiveSampleSize"], numbers["supportedFraction"]) == ("0", "0")
    assert numbers["requiredEffectiveSampleSize"] == "100"
    assert numbers["impressionCount"] == "2000"


def test_a_log_without_exploration_values_no_other_policy() -> None:
    # All weights are 1/5: as even as can be, and yet four fifths of the target policy were never tried.
    numbers = thin(always_the_same(), SoftmaxPolicy({}))
    assert float(numbers["supportedFraction"]) == pytest.approx(1 / 5)
    assert float(numbers["effectiveSampleSize"]) == pytest.approx(2_000)


def test_a_log_without_exploration_values_the_policy_in_service_itself() -> None:
    impressions = always_the_same()
    same = GivenPolicy(
        {(r, ITEMS[a]): 1.0 for r, a in zip(impressions.recommendation_N, impressions.item_N, strict=True)}
    )
    estimate = estimate_policy_value(impressions, same, 100.0, 0.95)
    assert estimate.inverse_propensity == estimate.logged
    assert estimate.supported_fraction == 1


def test_weights_that_rest_on_a_few_impressions_are_not_enough() -> None:
    rare = Ranker({"a": 0.01, "b": 2.0, "c": 3.0, "d": 2.0, "e": 2.0})
    numbers = thin(simulate(np.random.default_rng(6), 1_500, rare), SoftmaxPolicy({"a": 12.0}))
    assert 0 < float(numbers["effectiveSampleSize"]) < 100


def test_one_person_with_many_impressions_is_not_enough() -> None:
    impressions = always_the_same()
    first = impressions.recommendation_N < 900
    alone = replace(impressions, person_N=np.where(first, 0, 1 + impressions.person_N))
    pairs = zip(alone.recommendation_N[first], alone.item_N[first], strict=True)
    numbers = thin(alone, GivenPolicy({(int(r), ITEMS[a]): 1.0 for r, a in pairs}))
    assert (numbers["userCount"], numbers["requiredUserCount"]) == ("1", "30")
    assert float(numbers["effectiveSampleSize"]) > 100


@pytest.mark.parametrize("recommendations", [0, 20])
def test_a_few_people_are_not_enough(recommendations: int) -> None:
    impressions = always_the_same(100)
    kept = impressions.recommendation_N < recommendations
    few = LoggedImpressions(
        impressions.items,
        *(
            getattr(impressions, name)[kept]
            for name in ("item_N", "position_N", "propensity_N", "reward_N", "person_N", "recommendation_N")
        ),
    )
    assert int(thin(few, SoftmaxPolicy({}))["userCount"]) < 30


# Over gRPC and a real log


class LoggedTraffic:
    """Records recommendations of LOGGING and what they earned, and remembers it."""

    def __init__(self, shop: Shop, recommendations: int) -> None:
        rng, signer = random.Random(9), TokenSigner.from_directory(shop.keys)
        rankings, self.marginals = LOGGING.rankings(), LOGGING.marginals()
        self.rows: list[tuple[bytes, str, int, float, float]] = []
        events: list[event_pb2.Event] = []
        for number in range(recommendations):
            (ranking,) = rng.choices(list(rankings), list(rankings.values()))
            recommendation_id = (number + 1).to_bytes(8, "big")
            propensities: npt.NDArray[np.float32] = np.array(
                [self.marginals[item, k] for k, item in enumerate(ranking, 1)], np.float32
            )
            attribution_token = AttributionToken(
                recommendation_id, now_ms(), "home", "explore", "v1", "", item_digests(ranking), propensities
            ).sign(signer)
            user_id = f"person {number // 2}"
            view = event_pb2.PageView(
                impressions=[event_pb2.Impression(item_id=item) for item in (*ranking, "not recommended")]
            )
            events += [
                event(user_id, attribution_token=attribution_token, page_view=view),
                event(user_id, attribution_token=attribution_token, page_view=view),  # Seen again.
            ]
            for position, item in enumerate(ranking, 1):
                clicked = rng.random() < RATES[item] * POSITION_FACTOR[position]
                revenue = 0.0
                if clicked:
                    click = event_pb2.RecommendationClick(item_id=item)
                    events.append(
                        event(user_id, attribution_token=attribution_token, recommendation_click=click)
                    )
                    line = event_pb2.OrderLine(item_id=item, quantity=2, price_micros=10_000_000)
                    purchase = event_pb2.Purchase(lines=[line], currency_code="EUR")
                    events.append(event(user_id, attribution_token=attribution_token, purchase=purchase))
                    revenue = 20.0
                self.rows.append((recommendation_id, item, position, float(clicked), revenue))
        record(shop, events)

    def value(self, probability_of: dict[str, float], column: int = 3) -> float:
        """Returns the self-normalised estimate, as a loop."""
        weights = [probability_of[row[1]] / self.marginals[row[1], row[2]] for row in self.rows]
        return sum(w * row[column] for w, row in zip(weights, self.rows, strict=True)) / sum(weights)


def estimate(shop: Shop, **fields: Any) -> experiment_pb2.PolicyValue:
    start = Timestamp()
    start.FromDatetime(datetime.now(UTC) - timedelta(hours=1))
    request = feedback_service_pb2.EstimatePolicyValueRequest(
        **{"placement": "home", "start_time": start, **fields}
    )
    return shop.stub.EstimatePolicyValue(request, timeout=20)


def test_policies_are_valued_from_the_log(shop: Shop) -> None:
    traffic = LoggedTraffic(shop, 500)
    uniform = estimate(shop, uniform=feedback_service_pb2.UniformPolicy())
    assert uniform.impression_count == 1_000
    assert uniform.self_normalised.value == pytest.approx(traffic.value(TARGETS["uniform"][1]), rel=1e-5)
    assert uniform.supported_fraction == pytest.approx(1, abs=0.1)
    assert 100 < uniform.effective_sample_size <= 1_000
    assert uniform.logged.value == pytest.approx(np.mean([row[3] for row in traffic.rows]))
    truth = true_value(TARGETS["uniform"][1])
    for interval in (uniform.inverse_propensity, uniform.self_normalised, uniform.doubly_robust):
        assert interval.lower < truth < interval.upper

    scores = feedback_service_pb2.ItemScorePolicy(
        temperature=0.8,
        scores=[feedback_service_pb2.ItemScore(item_id=item, score=score) for item, score in SCORES.items()],
    )
    revenue = estimate(shop, item_scores=scores, reward=metrics_pb2.METRIC_REVENUE_PER_MILLE)
    assert revenue.currency_code == "EUR"
    assert revenue.self_normalised.value == pytest.approx(
        1000 * traffic.value(TARGETS["scores"][1], column=4), rel=1e-5
    )
    bought = estimate(shop, item_scores=scores, reward=metrics_pb2.METRIC_CONVERSION_RATE)
    assert bought.self_normalised.value == pytest.approx(traffic.value(TARGETS["scores"][1]), rel=1e-5)

    given = feedback_service_pb2.TargetPropensities(
        propensities=[
            feedback_service_pb2.TargetPropensity(recommendation_id=row[0], item_id=row[1], probability=0.2)
            for row in traffic.rows
        ]
    )
    same = estimate(shop, propensities=given)
    assert same.self_normalised.value == pytest.approx(uniform.self_normalised.value)


def test_too_thin_an_overlap_is_refused_with_its_numbers(shop: Shop) -> None:
    code, reason, metadata = refusal(estimate, shop, uniform=feedback_service_pb2.UniformPolicy())
    assert (code, reason) == (grpc.StatusCode.FAILED_PRECONDITION, "OVERLAP_TOO_THIN")
    assert metadata["impressionCount"] == "0"
    assert metadata["requiredEffectiveSampleSize"] == "100"


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("target_policy", {}),
        ("placement", {"placement": ""}),
        ("reward", {"reward": metrics_pb2.METRIC_CSAT}),
        ("weight_clip", {"weight_clip": 0.5}),
        ("weight_clip", {"weight_clip": math.inf}),
        ("start_time", {"start_time": Timestamp(seconds=4_000_000_000)}),
        ("confidence_level", {"confidence_level": 2}),
        (
            "item_scores.scores[0].score",
            {
                "item_scores": feedback_service_pb2.ItemScorePolicy(
                    scores=[feedback_service_pb2.ItemScore(item_id="a", score=math.nan)]
                )
            },
        ),
        (
            "propensities.propensities[0].probability",
            {
                "propensities": feedback_service_pb2.TargetPropensities(
                    propensities=[
                        feedback_service_pb2.TargetPropensity(
                            recommendation_id=bytes(8), item_id="a", probability=2
                        )
                    ]
                )
            },
        ),
    ],
)
def test_what_is_wrong_with_the_question_is_named(field: str, fields: dict[str, Any]) -> None:
    asked = {"placement": "home", "start_time": Timestamp(seconds=1_700_000_000), **fields}
    if field not in (
        "target_policy",
        "item_scores.scores[0].score",
        "propensities.propensities[0].probability",
    ):
        asked["uniform"] = feedback_service_pb2.UniformPolicy()
    with pytest.raises(InvalidInput) as failure:
        from_estimate(feedback_service_pb2.EstimatePolicyValueRequest(**asked), datetime.now(UTC))
    assert [violation.field for violation in failure.value.violations] == [field]
