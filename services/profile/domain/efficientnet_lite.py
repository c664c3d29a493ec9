"""EfficientNet-Lite0 in NumPy: what a picture shows, as the 1,280 numbers before its classifier.

    M. Tan & Q. Le, 2019, EfficientNet; R. Liu, 2020, EfficientNet-Lite: no squeeze-and-excitation, ReLU6
    instead of swish, and a stem and head that do not scale.

Shapes: H height, W width, C channels. Pictures are (H, W, C), float32. Normalisation by batch is folded into the
convolution before it when weights are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Float = npt.NDArray[np.float32]

SIDE = 224
DIMENSION = 1280
# repeats, kernel, stride, expansion, channels that come out (Tan & Le, table 1)
STAGES = (
    (1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)  # fmt: skip
_STEM_CHANNELS = 32
_EPSILON = 1e-3


@dataclass(frozen=True, slots=True)
class _Convolution:
    """A convolution with its normalisation folded in.

    Attributes:
        weight: (C in, C out) where it is pointwise, (k, k, C) where depthwise, (k, k, C in, C out) else.
        bias: (C out,).
    """

    weight: Float
    bias: Float


@dataclass(frozen=True, slots=True)
class _Block:
    """An inverted residual block (M. Sandler et al., 2018, MobileNetV2)."""

    expand: _Convolution | None
    depthwise: _Convolution
    project: _Convolution
    stride: int
    residual: bool


class EfficientNetLite0:
    """A network with its weights. Pure, and so safe to share between threads."""

    def __init__(self, weights: Mapping[str, Float]) -> None:
        """Folds the weights of the published checkpoint, whose convolutions are (C out, C in, k, k).

        Raises:
            KeyError, ValueError: an array is missing, or has another shape.
        """
        self._stem = _folded(weights, "_conv_stem", "_bn0", (_STEM_CHANNELS, 3, 3, 3), (2, 3, 1, 0))
        self._blocks: list[_Block] = []
        inner = _STEM_CHANNELS
        for repeats, kernel, first_stride, expansion, outer in STAGES:
            for repeat in range(repeats):
                name = f"_blocks.{len(self._blocks)}"
                stride = first_stride if repeat == 0 else 1
                wide = inner * expansion
                expand = None
                if expansion != 1:
                    expand = _pointwise(weights, f"{name}._expand_conv", f"{name}._bn0", inner, wide)
                shape = (wide, 1, kernel, kernel)
                depthwise = _folded(weights, f"{name}._depthwise_conv", f"{name}._bn1", shape, (2, 3, 0, 1))
                depthwise = _Convolution(np.ascontiguousarray(depthwise.weight[..., 0]), depthwise.bias)
                project = _pointwise(weights, f"{name}._project_conv", f"{name}._bn2", wide, outer)
                self._blocks.append(
                    _Block(expand, depthwise, project, stride, stride == 1 and inner == outer)
                )
                inner = outer
        self._head = _pointwise(weights, "_conv_head", "_bn1", inner, DIMENSION)

    def features(self, picture_HWC: Float) -> Float:
        """Returns the mean of the last layer over the picture, (1280,), float32, each 0 to 6.

        Args:
            picture_HWC: red, green and blue, 0 to 255.
        """
        x = (picture_HWC.astype(np.float32) - 127.0) / 128.0
        x = relu6(convolve(x, self._stem.weight, 2) + self._stem.bias)
        for block in self._blocks:
            y = x
            if block.expand is not None:
                y = relu6(y @ block.expand.weight + block.expand.bias)
            y = relu6(convolve_depthwise(y, block.depthwise.weight, block.stride) + block.depthwise.bias)
            y = y @ block.project.weight + block.project.bias
            x = x + y if block.residual else y
        x = relu6(x @ self._head.weight + self._head.bias)
        return np.asarray(x.mean(axis=(0, 1)), np.float32)


def relu6(x: npt.NDArray[np.floating[Any]]) -> Float:
    """Returns x cut to [0, 6]."""
    return np.clip(x, 0.0, 6.0).astype(np.float32, copy=False)


def convolve(x_HWC: Float, weight_kkIO: Float, stride: int) -> Float:
    """Returns a convolution whose result is ceil(H / stride) high, (H', W', C out): padding as TensorFlow's SAME."""
    padded, high, wide = _padded(x_HWC, len(weight_kkIO), stride)
    total = np.zeros((high, wide, weight_kkIO.shape[3]), np.float32)
    for row in range(len(weight_kkIO)):
        for column in range(len(weight_kkIO)):
            total += _window(padded, row, column, high, wide, stride) @ weight_kkIO[row, column]
    return total


def convolve_depthwise(x_HWC: Float, weight_kkC: Float, stride: int) -> Float:
    """Returns a convolution of each channel with its own kernel, (H', W', C); padding as `convolve`'s."""
    padded, high, wide = _padded(x_HWC, len(weight_kkC), stride)
    total = np.zeros((high, wide, x_HWC.shape[2]), np.float32)
    product = np.empty_like(total)
    for row in range(len(weight_kkC)):
        for column in range(len(weight_kkC)):
            window = _window(padded, row, column, high, wide, stride)
            total += np.multiply(window, weight_kkC[row, column], out=product)
    return total


def _padded(x_HWC: Float, kernel: int, stride: int) -> tuple[Float, int, int]:
    sizes = [-(-side // stride) for side in x_HWC.shape[:2]]
    pads = []
    for side, out in zip(x_HWC.shape[:2], sizes, strict=True):
        missing = max(0, (out - 1) * stride + kernel - side)
        pads.append((missing // 2, missing - missing // 2))
    return np.pad(x_HWC, (*pads, (0, 0))), sizes[0], sizes[1]


def _window(padded: Float, row: int, column: int, high: int, wide: int, stride: int) -> Float:
    return padded[
        row : row + (high - 1) * stride + 1 : stride, column : column + (wide - 1) * stride + 1 : stride
    ]


def _folded(
    weights: Mapping[str, Float],
    convolution: str,
    normalisation: str,
    shape: tuple[int, ...],
    axes: tuple[int, ...],
) -> _Convolution:
    weight = weights[f"{convolution}.weight"]
    if weight.shape != shape:
        raise ValueError(f"{convolution} has the shape {weight.shape}, not {shape}")
    gain = weights[f"{normalisation}.weight"] / np.sqrt(
        weights[f"{normalisation}.running_var"] + np.float32(_EPSILON)
    )
    bias = weights[f"{normalisation}.bias"] - weights[f"{normalisation}.running_mean"] * gain
    scaled = weight * gain[:, None, None, None]
    return _Convolution(
        np.ascontiguousarray(scaled.transpose(axes), np.float32), np.asarray(bias, np.float32)
    )


def _pointwise(
    weights: Mapping[str, Float], convolution: str, normalisation: str, inner: int, outer: int
) -> _Convolution:
    folded = _folded(weights, convolution, normalisation, (outer, inner, 1, 1), (2, 3, 1, 0))
    return _Convolution(np.ascontiguousarray(folded.weight[0, 0]), folded.bias)
