"""The cross network of `shared.bundle.ranker` in TensorFlow, with a tower for the position.

The position says how likely a place is looked at, which is no merit of the item in it. Its tower is a sum beside
the network's logit (Zhao et al., 2019), on a curve -beta log k that single places may leave a little, and is learned
first, by a network that does not know the first stage's rank: where the first stage put the items, rank and position
are one, and a network that knows both would take for merit what is position (Zhang et al., 2023). Then it is kept,
and the whole network learns what is left. At serving every candidate stands at position 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from services.trainer.ranker.examples import Examples
from shared.bundle.ranker import MAX_POSITION, TASKS, RankerWeights
from shared.bundle.ranker_features import FEATURES

Float32 = npt.NDArray[np.float32]

# What says where the first stage put an item: unknown to the network that learns the position's tower.
_PLACED = [FEATURES.index("log_rank"), FEATURES.index("gap_to_best")]
_CLIP = 4.0


@dataclass(frozen=True, slots=True)
class NetworkSize:
    """How large the network is, and how it learns.

    Attributes:
        cross_layers, first_width, second_width: of the network.
        batch_size, learning_rate, weight_decay: of AdamW.
        max_epochs, patience: passes at most, and passes without a better validation loss.
        bend: penalty on single positions that leave the curve.
    """

    cross_layers: int = 2
    first_width: int = 32
    second_width: int = 16
    batch_size: int = 1024
    learning_rate: float = 2e-3
    weight_decay: float = 1e-3
    max_epochs: int = 20
    patience: int = 3
    bend: float = 0.1


def train_network(
    training: Examples,
    validation: Examples,
    size: NetworkSize,
    seed: int,
    *,
    corrects_position: bool = True,
    check: Callable[[], None] = lambda: None,
) -> RankerWeights:
    """Returns the weights of the pass with the least validation loss, not yet calibrated.

    Args:
        corrects_position: without it the tower is 0: what a ranker would be that takes clicks at their word.
        check: called after every pass; raises to stop.
    """
    mean_F, scale_F = _scaling(training.features_NF)
    tower_K = np.zeros(MAX_POSITION, np.float32)
    if corrects_position:
        blind = _Network(mean_F, scale_F, size, seed, None, _PLACED)
        blind.fit(training, validation, size, seed, check)
        tower_K = blind.tower().numpy()
    network = _Network(mean_F, scale_F, size, seed + 1, tower_K, [])
    network.fit(training, validation, size, seed + 1, check)
    return network.weights()


def _scaling(features_NF: Float32) -> tuple[Float32, Float32]:
    mean_F = features_NF.mean(axis=0, dtype=np.float64).astype(np.float32)
    deviation_F = features_NF.std(axis=0, dtype=np.float64).astype(np.float32)
    # A feature that never varied would be anything times a large number as soon as it does.
    return mean_F, np.where(deviation_F > 1e-3, deviation_F, np.float32(1.0))


class _Network:
    """Variables and the loop. `kept_tower_K` None: the tower is learned too."""

    def __init__(
        self, mean_F: Float32, scale_F: Float32, size: NetworkSize, seed: int, kept_tower_K: Float32 | None,
        hidden: list[int],
    ) -> None:  # fmt: skip
        generator = np.random.default_rng(seed)
        features, tasks = len(FEATURES), len(TASKS)

        def drawn(*shape: int) -> tf.Variable:
            deviation = np.sqrt(2.0 / (shape[-2] + shape[-1]))
            return tf.Variable(generator.normal(0, deviation, shape).astype(np.float32))

        self._mean_F, self._scale_F = mean_F, scale_F
        self._shown_F = tf.constant(np.isin(np.arange(features), hidden, invert=True).astype(np.float32))
        self._cross_kernels = drawn(size.cross_layers, features, features)
        self._cross_biases = tf.Variable(np.zeros((size.cross_layers, features), np.float32))
        self._deep_1, self._deep_2 = (
            drawn(features, size.first_width),
            drawn(size.first_width, size.second_width),
        )
        self._bias_1 = tf.Variable(np.zeros(size.first_width, np.float32))
        self._bias_2 = tf.Variable(np.zeros(size.second_width, np.float32))
        self._head = tf.Variable(np.zeros((features + size.second_width, tasks), np.float32))
        self._head_bias = tf.Variable(np.zeros(tasks, np.float32))
        self._learned = [
            self._cross_kernels, self._cross_biases, self._deep_1, self._deep_2, self._bias_1, self._bias_2,
            self._head, self._head_bias,
        ]  # fmt: skip
        self._kept_tower_K = kept_tower_K
        self._slope = tf.Variable(np.float32(0.0))
        self._bends_K = tf.Variable(np.zeros(MAX_POSITION, np.float32))
        self._log_k = tf.constant(np.log(np.arange(1, MAX_POSITION + 1)).astype(np.float32))
        self._bend = size.bend

    def tower(self) -> tf.Tensor:
        """Returns the position's logits, (K,), 0 at position 1."""
        if self._kept_tower_K is not None:
            return tf.constant(self._kept_tower_K)
        tower_K = -self._slope * self._log_k + self._bends_K
        return tower_K - tower_K[0]

    def _losses(self, x_NF: tf.Tensor, labels_NT: tf.Tensor, position_N: tf.Tensor) -> tf.Tensor:
        """Returns the log-loss of each impression over the entire space, the tasks summed, (N,)."""
        x_NF = x_NF * self._shown_F
        crossed_NF = x_NF
        for layer in range(self._cross_kernels.shape[0]):
            product_NF = crossed_NF @ self._cross_kernels[layer] + self._cross_biases[layer]
            crossed_NF = x_NF * product_NF + crossed_NF
        deep = tf.nn.relu(x_NF @ self._deep_1 + self._bias_1)
        deep = tf.nn.relu(deep @ self._deep_2 + self._bias_2)
        z_NT = tf.concat([crossed_NF, deep], axis=1) @ self._head + self._head_bias
        z_N1 = z_NT[:, :1] + tf.gather(self.tower(), position_N)[:, None]
        log_click_N1 = tf.math.log_sigmoid(z_N1)
        click = tf.nn.sigmoid_cross_entropy_with_logits(labels=labels_NT[:, :1], logits=z_N1)
        # log p of the product, and log(1 - p) by way of p: both are far below 1.
        log_p_N2 = log_click_N1 + tf.math.log_sigmoid(z_NT[:, 1:])
        log_not_N2 = tf.math.log1p(-tf.minimum(tf.exp(log_p_N2), 1 - 1e-6))
        later_N2 = -(labels_NT[:, 1:] * log_p_N2 + (1 - labels_NT[:, 1:]) * log_not_N2)
        return click[:, 0] + tf.reduce_sum(later_N2, axis=1)

    def fit(
        self,
        training: Examples,
        validation: Examples,
        size: NetworkSize,
        seed: int,
        check: Callable[[], None],
    ) -> None:
        """Learns until validation no longer improves, and keeps the best."""
        optimizer = tf.keras.optimizers.AdamW(size.learning_rate, weight_decay=size.weight_decay)
        optimizer.exclude_from_weight_decay(
            var_list=[
                self._slope,
                self._bends_K,
                self._head_bias,
                self._bias_1,
                self._bias_2,
                self._cross_biases,
            ]
        )
        optimizer.build(self._learned)
        # Few numbers with a long way to go, from whatever impression there is.
        tower = [] if self._kept_tower_K is not None else [self._slope, self._bends_K]
        tower_optimizer = tf.keras.optimizers.Adam(10 * size.learning_rate)
        tower_optimizer.build(tower)
        batch = min(size.batch_size, len(training))
        base_T = np.clip(np.average(training.labels_NT, axis=0, weights=training.weight_N), 1e-5, 0.5)
        conditional_T = np.concatenate([base_T[:1], np.clip(base_T[1:] / base_T[0], 1e-4, 0.99)])
        self._head_bias.assign(np.log(conditional_T / (1 - conditional_T)).astype(np.float32))
        arrays = self._prepared(training)
        held_out = [tf.constant(array) for array in self._prepared(validation)]

        @tf.function(autograph=False, reduce_retracing=True)
        def step(x: tf.Tensor, labels: tf.Tensor, position: tf.Tensor, weight: tf.Tensor) -> None:
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(weight * self._losses(x, labels, position)) / tf.reduce_sum(weight)
                loss += self._bend * tf.reduce_sum(tf.square(self._bends_K)) / MAX_POSITION
            gradients = tape.gradient(loss, [*self._learned, *tower])
            optimizer.apply_gradients(zip(gradients, self._learned, strict=False))
            if tower:
                tower_optimizer.apply_gradients(zip(gradients[len(self._learned) :], tower, strict=True))

        @tf.function(autograph=False)
        def measure(x: tf.Tensor, labels: tf.Tensor, position: tf.Tensor, weight: tf.Tensor) -> tf.Tensor:
            return tf.reduce_sum(weight * self._losses(x, labels, position)) / tf.reduce_sum(weight)

        generator = np.random.default_rng(seed)
        everything = [*self._learned, *tower]
        best, best_weights, since = np.inf, [v.numpy() for v in everything], 0
        for _ in range(size.max_epochs):
            order = generator.permutation(len(training))
            # Batches are of one size: the rest of a pass comes first in another.
            for start in range(0, len(order) - batch + 1, batch):
                rows = order[start : start + batch]
                step(*(tf.constant(array[rows]) for array in arrays))
            check()
            loss = float(measure(*held_out))
            if loss < best - 1e-5:
                best, best_weights, since = loss, [v.numpy() for v in everything], 0
            else:
                since += 1
                if since >= size.patience:
                    break
        for variable, value in zip(everything, best_weights, strict=True):
            variable.assign(value)

    def _prepared(self, examples: Examples) -> list[npt.NDArray[Any]]:
        x_NF = np.clip((examples.features_NF - self._mean_F) / self._scale_F, -_CLIP, _CLIP)
        place_N = np.clip(examples.position_N, 1, MAX_POSITION).astype(np.int32) - 1
        return [x_NF.astype(np.float32), examples.labels_NT, place_N, examples.weight_N]

    def logits(self, examples: Examples) -> Float32:
        """Returns the logits of the tasks by TensorFlow, without the position: what serving is compared with."""
        x_NF = tf.constant(self._prepared(examples)[0]) * self._shown_F
        crossed_NF = x_NF
        for layer in range(self._cross_kernels.shape[0]):
            crossed_NF = (
                x_NF * (crossed_NF @ self._cross_kernels[layer] + self._cross_biases[layer]) + crossed_NF
            )
        deep = tf.nn.relu(tf.nn.relu(x_NF @ self._deep_1 + self._bias_1) @ self._deep_2 + self._bias_2)
        z_NT = tf.concat([crossed_NF, deep], axis=1) @ self._head + self._head_bias
        return np.asarray(z_NT.numpy(), np.float32)

    def weights(self) -> RankerWeights:
        """Returns the arrays, with a calibration that changes nothing."""
        return RankerWeights(
            mean_F=self._mean_F,
            scale_F=self._scale_F,
            cross_kernels_LFF=self._cross_kernels.numpy(),
            cross_biases_LF=self._cross_biases.numpy(),
            deep_kernel_1=self._deep_1.numpy(),
            deep_bias_1=self._bias_1.numpy(),
            deep_kernel_2=self._deep_2.numpy(),
            deep_bias_2=self._bias_2.numpy(),
            head_kernel=self._head.numpy(),
            head_bias_T=self._head_bias.numpy(),
            position_logits_K=np.asarray(self.tower().numpy(), np.float32),
            calibration_T2=np.array([[1, 0]] * len(TASKS), np.float32),
        )
