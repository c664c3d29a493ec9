"""SIMULATION: the second stage's cross network beside LightGBM, on the same features and the same split.

    python -m tests.benchmarks.bench_ranker [--visits 10000] [--decay 1.0]

LightGBM is no dependency of ours; install it to have it measured: pip install lightgbm
Both see the same impressions of the simulated shop, whose position bias is known: position k is looked at with
probability k**-decay. The network has its tower, the trees have the position as a feature; both are asked at position 1.
"truth" is NDCG@10 against the probability that an item would be clicked if it were looked at, which no log holds.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.optimize import isotonic_regression

from services.trainer.ranker.build import calibrate
from services.trainer.ranker.examples import Examples
from services.trainer.ranker.measuring import (
    auc,
    expected_calibration_error,
    log_loss,
    ndcg_of_order,
    platt,
)
from services.trainer.ranker.network import NetworkSize, train_network
from shared.bundle.ranker import MAX_POSITION, TASKS, calibrated, ranker_logits
from shared.bundle.ranker_features import FEATURES, feature_matrix, taste_of
from shared.simulation.history import Scale
from tests.trainer.simulated_impressions import simulated_shop

CANDIDATES = 500


def milliseconds(call: Callable[[], Any], times: int = 200) -> float:
    """Returns the median time of a call."""
    call()
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return float(np.median(taken) * 1e3)


def measures(
    p_NT: np.ndarray, first_N: np.ndarray, judged: Examples, truth_N: np.ndarray
) -> dict[str, float]:
    """Returns AUC, log-loss and ECE where the items stood, and NDCG against the truth at position 1."""
    found: dict[str, float] = {}
    for t, task in enumerate(TASKS):
        label_N = judged.labels_NT[:, t] > 0
        found[f"{task}_auc"] = auc(p_NT[:, t], label_N)
        found[f"{task}_log_loss"] = log_loss(p_NT[:, t], label_N)
        found[f"{task}_ece"] = expected_calibration_error(p_NT[:, t], label_N)
    found["truth_ndcg@10"] = ndcg_of_order(first_N, truth_N, judged.page_N)
    return found


def with_network(
    parts: tuple[Examples, Examples, Examples], truth_N: np.ndarray, corrects: bool
) -> dict[str, float]:
    training, validation, judged = parts
    began = time.process_time()
    weights = calibrate(
        train_network(training, validation, NetworkSize(), 0, corrects_position=corrects), validation
    )
    seconds = time.process_time() - began
    logits_NT = ranker_logits(weights, judged.features_NF)
    p_NT = calibrated(weights, logits_NT, judged.position_N)
    first_N = calibrated(weights, logits_NT, np.ones(len(judged), np.int64))[:, 0]
    sample = judged.features_NF[:CANDIDATES]
    ones = np.ones(len(sample), np.int64)
    cost = milliseconds(lambda: calibrated(weights, ranker_logits(weights, sample), ones))
    size = sum(getattr(weights, name).nbytes for name in weights.__slots__)
    return measures(p_NT, first_N, judged, truth_N) | {
        "train_cpu_seconds": seconds, "milliseconds_per_500": cost, "kilobytes": size / 1e3,
    }  # fmt: skip


def calibrations(parts: tuple[Examples, Examples, Examples]) -> dict[str, dict[str, float]]:
    """Returns ECE and log-loss of the network's three tasks on the newest pages, by how it was calibrated.

    Learned on the pages between; of cart and purchase among those who clicked. Isotonic regression (Zadrozny & Elkan,
    2002) holds any rising curve, Platt's two numbers one sigmoid.
    """
    training, validation, judged = parts
    weights = train_network(training, validation, NetworkSize(), 0, corrects_position=True)

    def task_of(of: Examples, t: int) -> tuple[np.ndarray, np.ndarray]:
        logit_N = ranker_logits(weights, of.features_NF).astype(np.float64)[:, t]
        label_N = of.labels_NT[:, t] > 0
        if t == 0:
            place_N = np.minimum(of.position_N, MAX_POSITION) - 1
            return logit_N + weights.position_logits_K[place_N], label_N
        clicked_N = of.labels_NT[:, 0] > 0
        return logit_N[clicked_N], label_N[clicked_N]

    def sigmoid(z_N: np.ndarray) -> np.ndarray:
        return np.asarray(1 / (1 + np.exp(-z_N)))

    found: dict[str, dict[str, float]] = {"none": {}, "platt": {}, "isotonic": {}}
    for t, task in enumerate(TASKS):
        known, known_labels = task_of(validation, t)
        asked, asked_labels = task_of(judged, t)
        slope, intercept = platt(known, known_labels)
        order = np.argsort(known)
        rising = isotonic_regression(known_labels[order].astype(np.float64)).x
        for name, p_N in (
            ("none", sigmoid(asked)),
            ("platt", sigmoid(slope * asked + intercept)),
            ("isotonic", np.interp(asked, known[order], rising)),
        ):
            found[name][f"{task}_ece"] = expected_calibration_error(p_N, asked_labels)
            found[name][f"{task}_log_loss"] = log_loss(p_N, asked_labels)
    return found


def with_trees(parts: tuple[Examples, Examples, Examples], truth_N: np.ndarray) -> dict[str, float]:
    import lightgbm

    training, validation, judged = parts

    def inputs(examples: Examples, position_N: np.ndarray | None = None) -> np.ndarray:
        position_N = examples.position_N if position_N is None else position_N
        return np.column_stack([examples.features_NF, position_N.astype(np.float32)])

    parameters = {
        "objective": "binary", "num_leaves": 31, "learning_rate": 0.05, "min_data_in_leaf": 100,
        "feature_fraction": 0.8, "num_threads": 1, "seed": 0, "verbose": -1, "deterministic": True,
    }  # fmt: skip
    began = time.process_time()
    boosters, columns, first_columns = [], [], []
    ones = np.ones(len(judged))
    for t in range(len(TASKS)):
        fresh = lightgbm.Dataset(inputs(training), training.labels_NT[:, t], weight=training.weight_N)
        held_out = lightgbm.Dataset(inputs(validation), validation.labels_NT[:, t], reference=fresh)
        booster = lightgbm.train(
            parameters, fresh, 300, valid_sets=[held_out],
            callbacks=[lightgbm.early_stopping(20, verbose=False)],
        )  # fmt: skip
        raw = booster.predict(inputs(validation), raw_score=True)
        slope, intercept = platt(raw, validation.labels_NT[:, t] > 0)
        boosters.append(booster)

        def calibrated_at(
            rows: np.ndarray, booster: Any = booster, a: float = slope, b: float = intercept
        ) -> Any:
            return 1 / (1 + np.exp(-(a * booster.predict(rows, raw_score=True) + b)))

        columns.append(calibrated_at(inputs(judged)))
        first_columns.append(calibrated_at(inputs(judged, ones)))
    seconds = time.process_time() - began
    sample = inputs(judged)[:CANDIDATES]
    cost = milliseconds(lambda: [booster.predict(sample, num_threads=1) for booster in boosters], 50)
    return measures(np.stack(columns, axis=1), first_columns[0], judged, truth_N) | {
        "train_cpu_seconds": seconds,
        "milliseconds_per_500": cost,
        "kilobytes": sum(len(booster.model_to_string()) for booster in boosters) / 1e3,
        "trees": sum(booster.best_iteration for booster in boosters),
    }


def main() -> None:
    """Measures, and prints a table and a line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--visits", type=int, default=10_000)
    parser.add_argument("--shoppers", type=int, default=1_500)
    parser.add_argument("--decay", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--calibrations", action="store_true", help="measure those alone")
    arguments = parser.parse_args()
    scale = Scale(seed=arguments.seed, shoppers=arguments.shoppers, items=200, days=60, visits_per_shopper=10)
    shop = simulated_shop(scale, arguments.visits, position_decay=arguments.decay, noise=0.5)
    examples = shop.examples
    parts = examples.split()
    if arguments.calibrations:
        print(json.dumps({"impressions": len(examples), "calibrations": calibrations(parts)}))
        return
    judged = parts[2]
    truth_N = shop.appeal_N[np.isin(examples.page_N, judged.page_N)]
    score_N = judged.features_NF[:, FEATURES.index("score")]
    found: dict[str, dict[str, float]] = {
        "first stage": {"truth_ndcg@10": ndcg_of_order(score_N, truth_N, judged.page_N)},
        "cross network": with_network(parts, truth_N, True),
        "cross network, position not corrected": with_network(parts, truth_N, False),
    }
    if importlib.util.find_spec("lightgbm") is not None:
        found["LightGBM"] = with_trees(parts, truth_N)
    items = shop.bundle.item_count
    table_rows = np.arange(CANDIDATES) % items
    history = np.arange(50, dtype=np.int64) % items
    from services.trainer.ranker.items import item_table

    table = item_table(shop.events, shop.attributes_of, shop.price_of, list(shop.bundle.item_ids))
    kinds, times = np.full(50, 3, np.int32), np.sort(np.random.default_rng(0).uniform(1e9, 2e9, 50))
    taste = taste_of(table, history, kinds, times)
    ones = np.ones(CANDIDATES, np.float32)
    cost = milliseconds(
        lambda: feature_matrix(
            table, taste, 2e9, table_rows, ones, 1.0, np.arange(1, CANDIDATES + 1), ones, ones
        )
    )
    print(f"SIMULATION: {len(examples):,} impressions, clicks {examples.labels_NT[:, 0].mean():.2%}")
    for name, values in found.items():
        print(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in values.items()))
    print(f"features of {CANDIDATES} candidates: {cost:.3f} ms")
    by_calibration = calibrations(parts)
    for name, values in by_calibration.items():
        print(f"calibrated by {name}: " + ", ".join(f"{key} {value:.4g}" for key, value in values.items()))
    print(
        json.dumps(
            {
                "impressions": len(examples),
                "features_milliseconds_per_500": cost,
                "rankers": found,
                "calibrations": by_calibration,
            }
        )
    )


if __name__ == "__main__":
    main()
