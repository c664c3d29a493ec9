"""Off-policy estimates, to the domain and back."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import datetime

from shopkeeper.feedback.v1 import experiment_pb2, feedback_service_pb2, metrics_pb2

from services.feedback.converters.metrics import confidence_level, invalid, moment, to_estimate
from services.feedback.domain.metrics import Metric
from services.feedback.domain.off_policy import GivenPolicy, PolicyEstimate, SoftmaxPolicy, TargetPolicy
from shared.errors import FieldViolation, InvalidInput
from shared.identity import normalise_item_id

DEFAULT_WEIGHT_CLIP = 100.0
MAX_ENTRIES = 100_000
_REWARDS = (
    Metric.CLICK_THROUGH_RATE,
    Metric.ADD_TO_CART_RATE,
    Metric.CONVERSION_RATE,
    Metric.REVENUE_PER_MILLE,
)


@dataclass(frozen=True, slots=True)
class PolicyQuestion:
    """What is asked."""

    placement: str
    start: datetime
    end: datetime
    reward: Metric
    policy: TargetPolicy
    weight_clip: float
    confidence_level: float


def from_estimate(request: feedback_service_pb2.EstimatePolicyValueRequest, now: datetime) -> PolicyQuestion:
    """Returns the question of a request.

    Raises:
        InvalidInput: a field is wrong.
    """
    if not 1 <= len(request.placement) <= 64 or "\x00" in request.placement:
        raise invalid("placement", "must be 1 to 64 characters without NUL.")
    start, end = moment(request, "start_time"), moment(request, "end_time") or now
    if start is None:
        raise invalid("start_time", "is required.")
    if start >= end:
        raise invalid("start_time", "lies not before end_time.")
    reward = int(request.reward or metrics_pb2.METRIC_CLICK_THROUGH_RATE)
    if reward not in _REWARDS:
        raise invalid(
            "reward", "must be something that an impression earns: a rate, or the revenue per mille."
        )
    weight_clip = request.weight_clip or DEFAULT_WEIGHT_CLIP
    if not (math.isfinite(weight_clip) and weight_clip > 1):
        raise invalid("weight_clip", "must be above 1.")
    level = confidence_level(request)
    return PolicyQuestion(request.placement, start, end, Metric(reward), _policy(request), weight_clip, level)


def to_policy_value(estimate: PolicyEstimate, currency_code: str) -> experiment_pb2.PolicyValue:
    """Returns an estimate as the contract has it."""
    return experiment_pb2.PolicyValue(
        inverse_propensity=to_estimate(estimate.inverse_propensity),
        self_normalised=to_estimate(estimate.self_normalised),
        doubly_robust=to_estimate(estimate.doubly_robust),
        logged=to_estimate(estimate.logged),
        effective_sample_size=estimate.effective_sample_size,
        impression_count=estimate.impression_count,
        clipped_fraction=estimate.clipped_fraction,
        supported_fraction=estimate.supported_fraction,
        currency_code=currency_code,
    )


def _policy(request: feedback_service_pb2.EstimatePolicyValueRequest) -> TargetPolicy:
    which = request.WhichOneof("target_policy")
    if which == "uniform":
        return SoftmaxPolicy({})
    if which == "item_scores":
        return _softmax_policy(request.item_scores)
    if which == "propensities":
        return _given_policy(request.propensities)
    raise invalid("target_policy", "is required: uniform, item_scores or propensities.")


def _softmax_policy(asked: feedback_service_pb2.ItemScorePolicy) -> SoftmaxPolicy:
    if not 1 <= len(asked.scores) <= MAX_ENTRIES:
        raise invalid("item_scores.scores", f"must be 1 to {MAX_ENTRIES}.")
    temperature = asked.temperature or 1.0
    if not (math.isfinite(temperature) and temperature > 0):
        raise invalid("item_scores.temperature", "must be above 0.")
    score_of: dict[str, float] = {}
    for index, score in enumerate(asked.scores):
        path = f"item_scores.scores[{index}]"
        item_id = _item_id(score.item_id, f"{path}.item_id")
        if item_id in score_of:
            raise invalid(f"{path}.item_id", "was named before.")
        if not math.isfinite(score.score):
            raise invalid(f"{path}.score", "must be finite.")
        score_of[item_id] = score.score
    return SoftmaxPolicy(score_of, temperature)


def _given_policy(asked: feedback_service_pb2.TargetPropensities) -> GivenPolicy:
    if not 1 <= len(asked.propensities) <= MAX_ENTRIES:
        raise invalid("propensities.propensities", f"must be 1 to {MAX_ENTRIES}.")
    probability_of: dict[tuple[int, str], float] = {}
    for index, entry in enumerate(asked.propensities):
        path = f"propensities.propensities[{index}]"
        if len(entry.recommendation_id) != 8:
            raise invalid(f"{path}.recommendation_id", "must have 8 bytes.")
        if not 0 <= entry.probability <= 1:
            raise invalid(f"{path}.probability", "must be in [0, 1].")
        recommendation = int.from_bytes(entry.recommendation_id, "big", signed=True)
        pair = recommendation, _item_id(entry.item_id, f"{path}.item_id")
        if pair in probability_of:
            raise invalid(path, "names an impression that was named before.")
        probability_of[pair] = entry.probability
    return GivenPolicy(probability_of)


def _item_id(value: str, path: str) -> str:
    try:
        return normalise_item_id(value, path)
    except InvalidInput as error:
        raise InvalidInput(
            "INVALID_ARGUMENT", error.message, violations=[FieldViolation(path, error.message)]
        ) from None
