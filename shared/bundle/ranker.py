"""The second stage: how likely a shown candidate is clicked, put into the cart, bought.

    x    = clip((features - mean) / scale, -4, 4)
    x_0  = x;   x_{l+1} = x_0 * (x_l W_l + b_l) + x_l              (cross network, DCN v2: Wang et al., 2021)
    d    = relu(relu(x V_1 + c_1) V_2 + c_2)
    z    = [x_L, d] H + h                                           one logit a task
    p(click)    = sigmoid(a_1 (z_1 + g_k) + b_1)                    g_k: how much position k is looked at
    p(cart)     = p(click) sigmoid(a_2 z_2 + b_2)                   (entire space: Ma et al., 2018)
    p(purchase) = p(click) sigmoid(a_3 z_3 + b_3)

a and b calibrate (Platt, 1999). Serving ranks by the weighted sum of the three, all at position 1: what a
shopper would do if they looked. In plain NumPy, and optional in a bundle: ranker.safetensors, whose arrays are
the fields of `Ranker`, beside `ranker` in the manifest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from shared.bundle.ranker_features import FEATURES, MAX_GROUPS, STATIC_FEATURES, ItemTable

Float32 = npt.NDArray[np.float32]

RANKER = "ranker.safetensors"
RANKER_FORMAT = 1
TASKS = ("click", "cart", "purchase")
MAX_POSITION = 50
"""Positions beyond it are looked at like it."""

_CLIP = np.float32(4.0)
_MAX_LAYERS = 4
_MAX_WIDTH = 256
_MAX_WEIGHT = 1e3


@dataclass(frozen=True, slots=True, eq=False)
class RankerWeights:
    """The learned arrays, all float32; L = cross layers, F = features, D1 and D2 = widths, T = tasks."""

    mean_F: Float32
    scale_F: Float32
    cross_kernels_LFF: Float32
    cross_biases_LF: Float32
    deep_kernel_1: Float32
    deep_bias_1: Float32
    deep_kernel_2: Float32
    deep_bias_2: Float32
    head_kernel: Float32
    head_bias_T: Float32
    position_logits_K: Float32
    calibration_T2: Float32

    def __post_init__(self) -> None:
        """Raises ValueError unless the arrays fit each other and are sane."""
        features, tasks = len(FEATURES), len(TASKS)
        layers = self.cross_kernels_LFF.shape[0] if self.cross_kernels_LFF.ndim == 3 else -1
        first = self.deep_bias_1.shape[0] if self.deep_bias_1.ndim == 1 else -1
        second = self.deep_bias_2.shape[0] if self.deep_bias_2.ndim == 1 else -1
        if not (0 <= layers <= _MAX_LAYERS and 1 <= first <= _MAX_WIDTH and 1 <= second <= _MAX_WIDTH):
            raise ValueError("the ranker's layers have no sane size")
        shapes = {
            "mean_F": (features,),
            "scale_F": (features,),
            "cross_kernels_LFF": (layers, features, features),
            "cross_biases_LF": (layers, features),
            "deep_kernel_1": (features, first),
            "deep_bias_1": (first,),
            "deep_kernel_2": (first, second),
            "deep_bias_2": (second,),
            "head_kernel": (features + second, tasks),
            "head_bias_T": (tasks,),
            "position_logits_K": (MAX_POSITION,),
            "calibration_T2": (tasks, 2),
        }
        for name, shape in shapes.items():
            array = getattr(self, name)
            if array.shape != shape or array.dtype != np.float32:
                raise ValueError(f"array {name} is {array.shape} {array.dtype}, not {shape} float32")
            if not np.isfinite(array).all() or np.abs(array).max(initial=0) > 1e9:
                raise ValueError(f"array {name} holds a value that is not finite, or out of range")
            if name not in ("mean_F", "scale_F") and np.abs(array).max(initial=0) > _MAX_WEIGHT:
                raise ValueError(f"array {name} holds a weight above {_MAX_WEIGHT:g}")
        if (self.scale_F < 1e-6).any():
            raise ValueError("a feature's scale is not above 0")
        # A slope of 0 or less would turn the order round.
        if (self.calibration_T2[:, 0] <= 0).any():
            raise ValueError("a calibration does not rise")


@dataclass(frozen=True, slots=True, eq=False)
class Ranker:
    """A ranker in memory. Immutable; any number of threads may use it.

    Attributes:
        weights: the learned arrays.
        items: the table of items.
    """

    weights: RankerWeights
    items: ItemTable

    def logits(self, features_CF: Float32) -> Float32:
        """Returns the logit of each task before position and calibration, (C, T), float32."""
        return ranker_logits(self.weights, features_CF)

    def probabilities(self, features_CF: Float32, position: int = 1) -> Float32:
        """Returns the calibrated probability of each of TASKS were all shown at a position, (C, T), float32."""
        positions_C = np.full(len(features_CF), position, np.int64)
        return calibrated(self.weights, self.logits(features_CF), positions_C)

    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Returns the arrays of ranker.safetensors."""
        found = {field.name: getattr(self.weights, field.name) for field in fields(RankerWeights)}
        found["item_features"] = self.items.features_IS
        found["item_category"] = self.items.category_I
        found["item_brand"] = self.items.brand_I
        found["item_first_seen"] = self.items.first_seen_I
        return found

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Any], item_count: int) -> Ranker:
        """Returns the ranker of the arrays of a file.

        Raises:
            ValueError: they are none: an array is missing, has another shape or dtype, or holds nonsense.
        """
        names = [field.name for field in fields(RankerWeights)]
        expected = {*names, "item_features", "item_category", "item_brand", "item_first_seen"}
        if set(arrays) != expected:
            raise ValueError(f"its arrays are not those of a ranker: {sorted(expected ^ set(arrays))}")
        weights = RankerWeights(**{name: np.ascontiguousarray(arrays[name]) for name in names})
        table = {
            name: np.ascontiguousarray(arrays[f"item_{name}"]) for name in ("features", "category", "brand")
        }
        first_seen_I = np.ascontiguousarray(arrays["item_first_seen"])
        static_IS = table["features"]
        if static_IS.shape != (item_count, len(STATIC_FEATURES)) or static_IS.dtype != np.float32:
            raise ValueError("array item_features does not fit the items")
        if not np.isfinite(static_IS).all() or np.abs(static_IS).max(initial=0) > _MAX_WEIGHT:
            raise ValueError("array item_features holds a value that is not finite, or out of range")
        for name in ("category", "brand"):
            if table[name].shape != (item_count,) or table[name].dtype != np.int32:
                raise ValueError(f"array item_{name} does not fit the items")
            if table[name].min(initial=-1) < -1 or table[name].max(initial=-1) >= MAX_GROUPS:
                raise ValueError(f"array item_{name} holds a number out of range")
        if first_seen_I.shape != (item_count,) or first_seen_I.dtype != np.int64:
            raise ValueError("array item_first_seen does not fit the items")
        return cls(weights, ItemTable.of(static_IS, table["category"], table["brand"], first_seen_I))


def ranker_of(description: Any, arrays: Mapping[str, Any], item_count: int) -> Ranker | None:
    """Returns the ranker of a bundle; None where it is of a later format, or of features not known here.

    Args:
        description: `ranker` of the manifest.
        arrays: of ranker.safetensors.

    Raises:
        ValueError: it is described as one that can be read, and is none.
    """
    if not isinstance(description, dict):
        raise ValueError("the manifest does not describe the ranker")
    if description.get("format") != RANKER_FORMAT:
        return None
    if description.get("features") != list(FEATURES) or description.get("tasks") != list(TASKS):
        raise ValueError("its features or tasks are not those of its format")
    return Ranker.from_arrays(arrays, item_count)


def ranker_logits(weights: RankerWeights, features_CF: Float32) -> Float32:
    """Returns the logit of each task before position and calibration, (C, T), float32."""
    x_CF: Float32 = features_CF - weights.mean_F
    x_CF /= weights.scale_F
    # Both bounds apart: `np.clip` takes longer.
    np.maximum(x_CF, -_CLIP, out=x_CF)
    np.minimum(x_CF, _CLIP, out=x_CF)
    crossed_CF: Float32 = x_CF
    for kernel_FF, bias_F in zip(weights.cross_kernels_LFF, weights.cross_biases_LF, strict=True):
        product_CF: Float32 = crossed_CF @ kernel_FF
        product_CF += bias_F
        product_CF *= x_CF
        product_CF += crossed_CF
        crossed_CF = product_CF
    deep: Float32 = x_CF @ weights.deep_kernel_1
    deep += weights.deep_bias_1
    np.maximum(deep, 0, out=deep)
    deep = deep @ weights.deep_kernel_2
    deep += weights.deep_bias_2
    np.maximum(deep, 0, out=deep)
    features = crossed_CF.shape[1]
    z_CT: Float32 = crossed_CF @ weights.head_kernel[:features]
    z_CT += deep @ weights.head_kernel[features:]
    z_CT += weights.head_bias_T
    return z_CT


def calibrated(weights: RankerWeights, logits_CT: Float32, positions_C: npt.NDArray[np.integer]) -> Float32:
    """Returns the calibrated probability of each of TASKS at the positions, from 1, (C, T), float32."""
    z_CT = logits_CT.copy()
    z_CT[:, 0] += weights.position_logits_K[np.clip(positions_C, 1, MAX_POSITION) - 1]
    z_CT *= weights.calibration_T2[:, 0]
    z_CT += weights.calibration_T2[:, 1]
    np.maximum(z_CT, np.float32(-30), out=z_CT)
    np.minimum(z_CT, np.float32(30), out=z_CT)
    p_CT: Float32 = np.reciprocal(1 + np.exp(-z_CT))
    p_CT[:, 1:] *= p_CT[:, :1]
    return p_CT
