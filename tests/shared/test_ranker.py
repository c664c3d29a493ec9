"""The second stage in a bundle: its arithmetic, its features, and what of it is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared.bundle import Registry, load_bundle
from shared.bundle.arrays import encode_arrays
from shared.bundle.ranker import (
    MAX_POSITION,
    RANKER,
    RANKER_FORMAT,
    TASKS,
    Ranker,
    RankerWeights,
    calibrated,
)
from shared.bundle.ranker_features import FEATURES, STATIC_FEATURES, ItemTable, feature_matrix, taste_of
from shared.errors import DataLoss
from shared.event_kinds import EventKind
from tests.shared.test_bundle import KEY, I, publish

F, T = len(FEATURES), len(TASKS)
DESCRIPTION = {"format": RANKER_FORMAT, "features": list(FEATURES), "tasks": list(TASKS)}


def made_ranker(seed: int = 0, item_count: int = I) -> Ranker:
    generator = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return generator.normal(0, 0.3, shape).astype(np.float32)

    weights = RankerWeights(
        mean_F=normal(F),
        scale_F=np.exp(normal(F)),
        cross_kernels_LFF=normal(2, F, F),
        cross_biases_LF=normal(2, F),
        deep_kernel_1=normal(F, 8),
        deep_bias_1=normal(8),
        deep_kernel_2=normal(8, 4),
        deep_bias_2=normal(4),
        head_kernel=normal(F + 4, T),
        head_bias_T=normal(T),
        position_logits_K=-np.log(np.arange(1, MAX_POSITION + 1)).astype(np.float32),
        calibration_T2=np.array([[0.9, 0.1], [1.1, -0.2], [1.0, 0.0]], np.float32),
    )
    table = ItemTable.of(
        normal(item_count, len(STATIC_FEATURES)),
        generator.integers(-1, 3, item_count).astype(np.int32),
        generator.integers(-1, 2, item_count).astype(np.int32),
        generator.integers(0, 10**9, item_count),
    )
    return Ranker(weights, table)


def with_ranker(
    registry: Registry, ranker: Ranker, description: Any = DESCRIPTION, **arrays: np.ndarray
) -> str:
    content = encode_arrays({**ranker.to_arrays(), **arrays})
    fields = {
        "encoder": {"max_history": 5, "dimension": 4},
        "scoring": {"lambda": 0.5, "scale": 30.0, "query_decay": 0.6065, "window": 50},
        "ranker": description,
    }
    return publish(registry, manifest_fields=fields, attachments={"card.md": b"# card", RANKER: content})


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry")


def test_a_ranker_comes_back_from_a_bundle_as_it_went_in(registry: Registry) -> None:
    ranker = made_ranker()
    bundle = load_bundle(registry.version_path("main", with_ranker(registry, ranker)), KEY.public_key())
    assert bundle.ranker is not None
    features_CF = np.random.default_rng(1).normal(size=(9, F)).astype(np.float32)
    np.testing.assert_array_equal(bundle.ranker.probabilities(features_CF), ranker.probabilities(features_CF))


def test_a_bundle_without_a_ranker_loads_as_before(registry: Registry) -> None:
    assert load_bundle(registry.version_path("main", publish(registry)), KEY.public_key()).ranker is None


def test_a_ranker_of_a_later_format_is_left_aside_and_the_bundle_serves(registry: Registry) -> None:
    later = {"format": RANKER_FORMAT + 1, "features": ["new"], "tasks": ["new"]}
    version = with_ranker(registry, made_ranker(), later)
    assert load_bundle(registry.version_path("main", version), KEY.public_key()).ranker is None


HOSTILE = {
    "not finite": ("cross_kernels_LFF", lambda a: np.where(a == a.max(), np.nan, a).astype(np.float32)),
    "infinite": ("mean_F", lambda a: np.full_like(a, np.inf)),
    "huge": ("head_kernel", lambda a: a * np.float32(1e6)),
    "another shape": ("head_bias_T", lambda a: a[:-1]),
    "another dtype": ("deep_bias_1", lambda a: a.astype(np.int32)),
    "a scale of 0": ("scale_F", lambda a: a * 0),
    "a calibration that turns the order round": ("calibration_T2", lambda a: -a),
    "too few positions": ("position_logits_K", lambda a: a[:3]),
    "items of another catalogue": ("item_features", lambda a: a[:-1]),
    "items with nonsense": ("item_features", lambda a: a + np.float32(np.nan)),
    "a category below -1": ("item_category", lambda a: a - 5),
    "a category that would fill the memory": ("item_category", lambda a: a + np.int32(2**30)),
    "a brand that would fill the memory": ("item_brand", lambda a: a + np.int32(2**30)),
    "first events of others": ("item_first_seen", lambda a: a[:2]),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_signed_ranker_with_hostile_values_is_refused(registry: Registry, what: str) -> None:
    name, spoil = HOSTILE[what]
    ranker = made_ranker()
    spoiled = spoil(ranker.to_arrays()[name])
    with pytest.raises((DataLoss, ValueError), match=r"ranker\.safetensors"):
        with_ranker(registry, ranker, **{name: spoiled})


def test_a_ranker_with_an_array_more_or_less_or_no_description_is_refused(registry: Registry) -> None:
    ranker = made_ranker()
    with pytest.raises(DataLoss):
        with_ranker(registry, ranker, further=np.zeros(3, np.float32))
    arrays = ranker.to_arrays()
    del arrays["head_bias_T"]
    with pytest.raises(ValueError, match="head_bias_T"):
        Ranker.from_arrays(arrays, I)
    for description in (
        None,
        [],
        {**DESCRIPTION, "features": list(FEATURES[::-1])},
        {**DESCRIPTION, "tasks": []},
    ):
        with pytest.raises(DataLoss):
            with_ranker(registry, ranker, description)


def test_a_changed_byte_of_the_ranker_is_refused(registry: Registry) -> None:
    path = registry.version_path("main", with_ranker(registry, made_ranker())) / RANKER
    content = path.read_bytes()
    for place in np.linspace(0, len(content) - 1, 25).astype(int):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x20]) + content[place + 1 :])
        with pytest.raises(DataLoss):
            load_bundle(path.parent, KEY.public_key())


def test_the_network_is_the_formula_cell_by_cell() -> None:
    ranker = made_ranker()
    w = ranker.weights
    features_CF = np.random.default_rng(3).normal(size=(4, F)).astype(np.float32)
    positions_C = np.array([1, 3, 50, 400])
    logits_CT = ranker.logits(features_CF)
    p_CT = calibrated(w, logits_CT, positions_C)
    for c in range(4):
        x = [
            min(max((float(features_CF[c, f]) - float(w.mean_F[f])) / float(w.scale_F[f]), -4.0), 4.0)
            for f in range(F)
        ]
        crossed = list(x)
        for layer in range(2):
            crossed = [
                x[f]
                * (
                    sum(crossed[g] * float(w.cross_kernels_LFF[layer, g, f]) for g in range(F))
                    + float(w.cross_biases_LF[layer, f])
                )
                + crossed[f]
                for f in range(F)
            ]
        first = [
            max(sum(x[f] * float(w.deep_kernel_1[f, h]) for f in range(F)) + float(w.deep_bias_1[h]), 0)
            for h in range(8)
        ]
        second = [
            max(sum(first[g] * float(w.deep_kernel_2[g, h]) for g in range(8)) + float(w.deep_bias_2[h]), 0)
            for h in range(4)
        ]
        both = crossed + second
        z = [
            sum(both[n] * float(w.head_kernel[n, t]) for n in range(F + 4)) + float(w.head_bias_T[t])
            for t in range(T)
        ]
        np.testing.assert_allclose(logits_CT[c], z, rtol=1e-4, atol=1e-4)
        z[0] += float(w.position_logits_K[min(int(positions_C[c]), MAX_POSITION) - 1])
        sigmoid = [
            1 / (1 + math.exp(-(float(w.calibration_T2[t, 0]) * z[t] + float(w.calibration_T2[t, 1]))))
            for t in range(T)
        ]
        expected = [sigmoid[0], sigmoid[0] * sigmoid[1], sigmoid[0] * sigmoid[2]]
        np.testing.assert_allclose(p_CT[c], expected, rtol=1e-3, atol=1e-5)


def test_features_say_what_their_names_say() -> None:
    hour, day = 3600.0, 86_400.0
    now = 1_000 * day
    table = ItemTable.of(
        np.array([[0, 0, 0, 0, 0.2], [1, 2, 3, 4, 0.6], [0, 0, 0, 0, 0.9], [5, 6, 7, 8, 0.5]], np.float32),
        np.array([0, 1, 1, -1], np.int32),
        np.array([0, 0, 1, -1], np.int32),
        np.array([0, int(now - 2 * hour), 0, 0], np.int64),
    )
    kinds = np.array([EventKind.ITEM_VIEW, EventKind.ADD_TO_CART], np.int32)
    taste = taste_of(table, np.array([0, 2]), kinds, np.array([now - day, now - hour]))
    found_CF = feature_matrix(
        table,
        taste,
        now,
        np.array([1, 2, 3]),
        np.array([-1.0, -2.0, -3.0], np.float32),
        0.5,
        np.array([2, 3, 7]),
        np.array([0.1, 0.2, 0.3], np.float32),
        np.array([0.9, 1.0, 0.0], np.float32),
    )
    named = dict(zip(FEATURES, found_CF.T, strict=True))
    # Weights: .9 of a view, 2 of a cart addition.
    share = 2 / 2.9
    price = (0.9 * 0.2 + 2 * 0.9) / 2.9
    never = math.log1p(180 * day)
    expected = {
        "score": [-1, -2, -3],
        "gap_to_best": [1.5, 2.5, 3.5],
        "log_rank": np.log([2, 3, 7]),
        "log_cooccurrence": [0.1, 0.2, 0.3],
        "cosine_to_newest": [0.9, 1, 0],
        "log_popularity": [1, 0, 5],
        "cart_rate": [2, 0, 6],
        "purchase_rate": [3, 0, 7],
        "trend": [4, 0, 8],
        "price_percentile": [0.6, 0.9, 0.5],
        "log_age": [math.log1p(2), math.log1p(180 * 24), math.log1p(180 * 24)],
        "price_above_own": [0.6 - price, 0.9 - price, 0.5 - price],
        "price_distance": [abs(0.6 - price), abs(0.9 - price), abs(0.5 - price)],
        "category_affinity": [share, share, 0],
        "brand_affinity": [1 - share, share, 0],
        "log_item_events": [0, math.log(2), 0],
        "log_since_item": [never, math.log1p(hour), never],
        "log_since_category": [math.log1p(hour), math.log1p(hour), never],
        "log_history_length": [math.log(3)] * 3,
        "log_since_newest": [math.log1p(hour)] * 3,
        "newest_is_cart": [1] * 3,
        "newest_is_purchase": [0] * 3,
    }
    assert set(expected) == set(FEATURES)
    for name, values in expected.items():
        np.testing.assert_allclose(named[name], values, rtol=1e-5, atol=1e-6, err_msg=name)


def test_a_shopper_without_events_has_features_too() -> None:
    table = made_ranker().items
    taste = taste_of(table, np.empty(0, np.int64), np.empty(0, np.int32), np.empty(0))
    ones = np.ones(2, np.float32)
    found_CF = feature_matrix(table, taste, 1e9, np.array([0, 1]), ones, 1.0, np.array([1, 2]), ones, ones)
    assert np.isfinite(found_CF).all()
