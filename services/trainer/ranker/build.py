"""A ranker from examples, calibrated and judged on what came later; or the reason why there is none."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from services.trainer.ranker.examples import Examples
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
from shared.bundle.ranker import (
    MAX_POSITION,
    RANKER_FORMAT,
    TASKS,
    RankerWeights,
    calibrated,
    ranker_logits,
)
from shared.bundle.ranker_features import FEATURES
from shared.ranking_metrics import Interval

MIN_IMPRESSIONS = 5_000
MIN_CLICKS = 300
# Below so many, what comes after the click is the shop's mean rate, whatever the item.
MIN_LATER = 50
MIN_JUDGED_PEOPLE = 50

DEFAULT_WEIGHTS = {"click": 1.0, "cart": 3.0, "purchase": 10.0}
"""What an outcome is worth beside a click, where a serving config names nothing else."""


_NO_LEAD = Interval(0.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True, eq=False)
class JudgedRanker:
    """What came of it.

    Attributes:
        weights: None where there is too little to learn from.
        served: whether it beats the first stage and may go out.
        why_not: in a sentence, empty where it is served.
        measures: AUC, log-loss and ECE by task, NDCG@10 by order, on the pages that judged.
        lead: of a page's worth over the first stage's order, and the worth of that order.
        facts: counts, for the manifest and the card.
        judged: the examples that judged, and the calibrated probabilities of them.
    """

    weights: RankerWeights | None
    served: bool
    why_not: str
    measures: Mapping[str, float] = field(default_factory=dict)
    lead: Interval = _NO_LEAD
    baseline: float = 0.0
    facts: Mapping[str, int | float] = field(default_factory=dict)
    judged: Examples | None = None
    probabilities_NT: npt.NDArray[np.float32] | None = None

    def describe(self) -> dict[str, Any]:
        """Returns `ranker` of the manifest."""
        described: dict[str, Any] = {
            "served": self.served,
            "why_not": self.why_not,
            "measures": dict(self.measures),
            "facts": dict(self.facts),
        }
        if self.weights is not None:
            described["lead"] = {"value": self.lead.value, "low": self.lead.low, "high": self.lead.high}
            described["first_stage_value"] = self.baseline
        if self.served:
            described |= {
                "format": RANKER_FORMAT,
                "features": list(FEATURES),
                "tasks": list(TASKS),
                "weights": dict(DEFAULT_WEIGHTS),
            }
        return described


def build_ranker(
    examples: Examples,
    seed: int,
    *,
    corrects_position: bool = True,
    resamples: int = 1000,
    confidence: float = 0.95,
    min_impressions: int = MIN_IMPRESSIONS,
    min_clicks: int = MIN_CLICKS,
    check: Callable[[], None] = lambda: None,
) -> JudgedRanker:
    """Trains on the first six tenths of the pages, calibrates on the next two, judges on the last two.

    Args:
        corrects_position: see `train_network`; without it nothing should be served.
        check: raises to stop.
    """
    clicks = int(examples.labels_NT[:, 0].sum())
    facts: dict[str, int | float] = {
        "impressions": len(examples),
        "pages": len(np.unique(examples.page_N)),
        "people": len(np.unique(examples.user_N)),
        **{task: int(examples.labels_NT[:, t].sum()) for t, task in enumerate(TASKS)},
    }
    if len(examples) < min_impressions or clicks < min_clicks:
        return JudgedRanker(
            None,
            False,
            f"{len(examples):,} impressions with {clicks:,} clicks are too few; "
            f"{min_impressions:,} and {min_clicks:,} are needed",
            facts=facts,
        )
    training, validation, judged = examples.split()
    people = len(np.unique(judged.user_N))
    fewest = min(int(part.labels_NT[:, 0].sum()) for part in (training, validation, judged))
    if people < MIN_JUDGED_PEOPLE or fewest < min_clicks // 10:
        return JudgedRanker(
            None,
            False,
            f"the newest fifth of the pages comes from {people:,} people, and a part has {fewest:,} clicks; "
            f"{MIN_JUDGED_PEOPLE:,} and {min_clicks // 10:,} are needed",
            facts=facts,
        )
    # Imported here: too little data is found out without TensorFlow's seconds and memory.
    network = importlib.import_module("services.trainer.ranker.network")
    began = time.process_time()
    weights: RankerWeights = network.train_network(
        training,
        validation,
        network.NetworkSize(),
        seed,
        corrects_position=corrects_position,
        check=check,
    )
    weights = without_rare_tasks(weights, training)
    weights = calibrate(weights, validation)
    facts["train_cpu_seconds"] = time.process_time() - began
    return judge_ranker(weights, judged, facts, seed, resamples, confidence)


def without_rare_tasks(weights: RankerWeights, training: Examples) -> RankerWeights:
    """Returns the weights with the shop's mean rate in place of tasks with next to no positives."""
    kernel, bias = weights.head_kernel.copy(), weights.head_bias_T.copy()
    clicks = training.labels_NT[:, 0].sum()
    for t in range(1, len(TASKS)):
        positives = training.labels_NT[:, t].sum()
        if positives < MIN_LATER:
            rate = (positives + 0.5) / (clicks + 1)
            kernel[:, t], bias[t] = 0, np.log(rate / (1 - rate))
    return replace(weights, head_kernel=kernel, head_bias_T=bias)


def calibrate(weights: RankerWeights, held_out: Examples) -> RankerWeights:
    """Returns the weights with a calibration learned from impressions that did not teach them."""
    logits_NT = ranker_logits(weights, held_out.features_NF).astype(np.float64)
    tower_N = weights.position_logits_K[np.minimum(held_out.position_N, MAX_POSITION) - 1]
    clicked_N = held_out.labels_NT[:, 0] > 0
    calibration_T2 = weights.calibration_T2.copy()
    calibration_T2[0] = platt(logits_NT[:, 0] + tower_N, clicked_N)
    for t in range(1, len(TASKS)):
        # What follows a click is asked of those who clicked.
        later_N = held_out.labels_NT[clicked_N, t] > 0
        if later_N.sum() >= 10:
            calibration_T2[t] = platt(logits_NT[clicked_N, t], later_N)
    return replace(weights, calibration_T2=calibration_T2.astype(np.float32))


def utility(p_NT: npt.NDArray[np.float32], weights: Mapping[str, float] = DEFAULT_WEIGHTS) -> Any:
    """Returns what an impression is expected to be worth, (N,)."""
    return p_NT @ np.array([weights[task] for task in TASKS], np.float32)


def judge_ranker(
    weights: RankerWeights,
    judged: Examples,
    facts: Mapping[str, int | float],
    seed: int,
    resamples: int,
    confidence: float,
) -> JudgedRanker:
    """Measures on impressions later than all that taught it, and decides whether it is served."""
    logits_NT = ranker_logits(weights, judged.features_NF)
    p_NT = calibrated(weights, logits_NT, judged.position_N)
    raw_NT = calibrated(
        replace(weights, calibration_T2=np.array([[1, 0]] * len(TASKS), np.float32)),
        logits_NT,
        judged.position_N,
    )
    labels_NT = judged.labels_NT > 0
    measures: dict[str, float] = {}
    for t, task in enumerate(TASKS):
        measures[f"{task}_auc"] = auc(p_NT[:, t], labels_NT[:, t])
        measures[f"{task}_log_loss"] = log_loss(p_NT[:, t], labels_NT[:, t])
        measures[f"{task}_ece"] = expected_calibration_error(p_NT[:, t], labels_NT[:, t])
        measures[f"{task}_ece_uncalibrated"] = expected_calibration_error(raw_NT[:, t], labels_NT[:, t])
    score_N = judged.features_NF[:, FEATURES.index("score")]
    # As served: everybody at position 1.
    order_N = utility(calibrated(weights, logits_NT, np.ones(len(judged), np.int64)))
    theta_K = examination(weights.position_logits_K)
    reward_N = judged.labels_NT.astype(np.float64) @ np.array([DEFAULT_WEIGHTS[task] for task in TASKS])
    looked_N = theta_K[np.minimum(judged.position_N, MAX_POSITION) - 1]
    gain_N = reward_N * np.minimum(1 / looked_N, MAX_RATIO)
    measures["ndcg@10_ranker"] = ndcg_of_order(order_N, gain_N, judged.page_N)
    measures["ndcg@10_first_stage"] = ndcg_of_order(score_N, gain_N, judged.page_N)
    measures["ndcg@10_as_shown"] = ndcg_of_order(-judged.position_N.astype(np.float64), gain_N, judged.page_N)
    mine_P = values_of_order(order_N, reward_N, judged, theta_K)
    theirs_P = values_of_order(score_N, reward_N, judged, theta_K)
    lead = lead_over(mine_P, theirs_P, judged, seed, resamples, confidence)
    served = lead.low > 0
    why_not = (
        ""
        if served
        else (
            f"its order would have earned {lead.value:+.4f} a page over the first stage's {theirs_P.mean():.4f}, "
            f"interval [{lead.low:+.4f}, {lead.high:+.4f}]; the lower end must be above 0"
        )
    )
    return JudgedRanker(
        weights, served, why_not, measures, lead, float(theirs_P.mean()),
        {**facts, "judged_pages": len(mine_P), "examination_at_10": float(theta_K[9])}, judged, p_NT,
    )  # fmt: skip
