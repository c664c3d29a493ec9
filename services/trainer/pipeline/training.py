"""The training loop: softmax over the catalogue, sparse Adam on the tables, early stopping.

U = distinct items of a step, N = negatives, M = tokens with a target. See `transformer` for the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from services.trainer.domain.hyper_parameters import HyperParameters
from services.trainer.pipeline.budget import Budget
from services.trainer.pipeline.dataset import HeldOut, Histories, ItemAttributes
from services.trainer.pipeline.packing import PackedRows, pack_for_encoding, pack_for_training
from services.trainer.pipeline.transformer import Encoder, allowed_within_segments
from shared.errors import FailedPrecondition

Float32 = npt.NDArray[np.float32]

_BETA_1, _BETA_2, _EPSILON = 0.9, 0.999, 1e-8
_INITIAL_STDDEV = 0.02
# A small shop's pass is a few steps: patience in passes alone would give up during the warm-up.
_PATIENCE_STEPS = 250
# Less than this is noise, and no reason to go on.
_PROGRESS = 1.002


@dataclass(frozen=True, slots=True)
class EpochReport:
    """How a pass over the data went.

    Attributes:
        epoch: passes so far.
        step: optimiser steps so far.
        loss: mean over the tokens with a target, nats.
        validation_ndcg: NDCG@10 on the validation events; not a number where none was measured.
        elapsed_seconds: since training began.
        steps_per_epoch: of the next pass, about.
    """

    epoch: int
    step: int
    loss: float
    validation_ndcg: float
    elapsed_seconds: float
    steps_per_epoch: int


class SequenceModel:
    """The tables, the encoder and their optimiser.

    item vector = id embedding + mean of the item's attribute embeddings; input and output of the encoder.
    """

    def __init__(self, item_count: int, attributes: ItemAttributes, size: HyperParameters, seed: int) -> None:
        self.size, self.item_count, self.seed = size, item_count, seed
        tf.keras.utils.set_random_seed(seed)
        generator = np.random.default_rng(seed)
        width = size.dimension

        def table(rows: int) -> tf.Variable:
            values = generator.normal(0, _INITIAL_STDDEV, (rows, width)).astype(np.float32)
            return tf.Variable(values)

        self.id_table = table(item_count)
        # Row 0 is the empty place; it stays zero because its weight is zero.
        self.attribute_table = table(attributes.attribute_count + 1)
        places = attributes.attribute_IP
        self.attribute_IP = tf.constant(places, tf.int32)
        count_I = np.maximum((places > 0).sum(axis=1, keepdims=True), 1)
        self.attribute_weight_IP = tf.constant((places > 0) / count_I, tf.float32)
        self.has_attributes = attributes.attribute_count > 0
        self.encoder = Encoder(size)
        self.encoder.build()
        self.dense = [variable.value for variable in self.encoder.trainable_variables]
        self._tables = [self.id_table, self.attribute_table]
        self._moments = [
            (tf.Variable(tf.zeros_like(v)), tf.Variable(tf.zeros_like(v)))
            for v in [*self._tables, *self.dense]
        ]
        self.step_count = tf.Variable(0, dtype=tf.int32)
        self.learning_rate = tf.Variable(size.learning_rate, dtype=tf.float32)
        self.full_softmax = item_count <= 2 * size.negatives
        rows, length = size.rows_per_step, size.max_history
        # Fixed shapes: another shape would trace the graph anew.
        token = tf.TensorSpec((rows, length), tf.int32)
        self._train_step = tf.function(
            self._train_step_eagerly,
            input_signature=[token, token, token, token, tf.TensorSpec((None,), tf.int32)],
            autograph=False,
        )
        self._encode_rows = tf.function(
            self._encode_rows_eagerly, input_signature=[token, token, token], autograph=False
        )

    # ---- the step

    def _train_step_eagerly(
        self,
        item_BT: tf.Tensor,
        kind_BT: tf.Tensor,
        segment_BT: tf.Tensor,
        target_BT: tf.Tensor,
        negative_N: tf.Tensor,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Makes one step; returns the summed loss and the number of targets."""
        place_M = tf.where(tf.reshape(target_BT, [-1]) >= 0)[:, 0]
        target_M = tf.gather(tf.reshape(target_BT, [-1]), place_M)
        if self.full_softmax:
            item_U = tf.range(self.item_count)
            input_BT, answer_M, other_N = item_BT, target_M, item_U
        else:
            everything = tf.concat([tf.reshape(item_BT, [-1]), target_M, negative_N], 0)
            item_U, place = tf.unique(everything)
            tokens, targets = tf.size(item_BT), tf.size(target_M)
            input_BT = tf.reshape(place[:tokens], tf.shape(item_BT))
            answer_M, other_N = place[tokens : tokens + targets], place[tokens + targets :]
        id_rows_UD = tf.gather(self.id_table, item_U)
        attribute_U = tf.zeros([0], tf.int32)
        attribute_place_UP = attribute_weight_UP = None
        if self.has_attributes:
            attribute_UP = tf.gather(self.attribute_IP, item_U)
            attribute_U, flat = tf.unique(tf.reshape(attribute_UP, [-1]))
            attribute_place_UP = tf.reshape(flat, tf.shape(attribute_UP))
            attribute_weight_UP = tf.gather(self.attribute_weight_IP, item_U)
        attribute_rows = tf.gather(self.attribute_table, attribute_U)
        seed_2 = tf.stack([tf.constant(self.seed & 0x7FFFFFFF, tf.int32), self.step_count * 10_000])

        with tf.GradientTape() as tape:
            tape.watch([id_rows_UD, attribute_rows])
            vector_UD = id_rows_UD
            if self.has_attributes:
                vector_UD += tf.einsum(
                    "up,upd->ud", attribute_weight_UP, tf.gather(attribute_rows, attribute_place_UP)
                )
            query_BTD = self.encoder(
                tf.gather(vector_UD, input_BT), kind_BT, allowed_within_segments(segment_BT), seed_2
            )
            query_MD = tf.gather(tf.reshape(query_BTD, [-1, self.size.dimension]), place_M)
            losses_M = (
                self._full_losses(query_MD, vector_UD, answer_M)
                if self.full_softmax
                else self._sampled_losses(query_MD, vector_UD, answer_M, other_N)
            )
            loss = tf.reduce_mean(losses_M)
        # Of what was gathered twice, the sum: the rows are distinct, so their gradients are small and dense.
        gradients = [
            None if gradient is None else tf.convert_to_tensor(gradient)
            for gradient in tape.gradient(loss, [id_rows_UD, attribute_rows, *self.dense])
        ]
        self._apply(item_U, attribute_U, gradients)
        return tf.reduce_sum(losses_M), tf.size(target_M)

    def _full_losses(self, query_MD: tf.Tensor, vector_ID: tf.Tensor, answer_M: tf.Tensor) -> tf.Tensor:
        logits_MI = tf.matmul(query_MD, vector_ID, transpose_b=True)
        return tf.nn.sparse_softmax_cross_entropy_with_logits(answer_M, logits_MI)

    def _sampled_losses(
        self, query_MD: tf.Tensor, vector_UD: tf.Tensor, answer_M: tf.Tensor, other_N: tf.Tensor
    ) -> tf.Tensor:
        positive_M = tf.reduce_sum(query_MD * tf.gather(vector_UD, answer_M), axis=1)
        logits_MN = tf.matmul(query_MD, tf.gather(vector_UD, other_N), transpose_b=True)
        # log-Q: each of N uniform draws stands for I / N items (Jean et al., 2015).
        logits_MN += float(np.log((self.item_count - 1) / self.size.negatives))
        logits_MN = tf.where(answer_M[:, None] == other_N[None, :], -1e9, logits_MN)
        largest_M = tf.stop_gradient(tf.maximum(tf.reduce_max(logits_MN, axis=1), positive_M))
        partition_M = tf.exp(positive_M - largest_M) + tf.reduce_sum(
            tf.exp(logits_MN - largest_M[:, None]), axis=1
        )
        return tf.math.log(partition_M) + largest_M - positive_M

    def _apply(self, item_U: tf.Tensor, attribute_U: tf.Tensor, gradients: list[tf.Tensor]) -> None:
        """Adam (Kingma & Ba, 2015); of the tables only the rows that the step read (as in LazyAdam)."""
        self.step_count.assign_add(1)
        step = tf.cast(self.step_count, tf.float32)
        warm = tf.minimum(1.0, step / float(max(self.size.warmup_steps, 1)))
        rate = self.learning_rate * warm * tf.sqrt(1 - _BETA_2**step) / (1 - _BETA_1**step)
        for table, (first, second), rows_U, gradient_UD in zip(
            self._tables, self._moments[:2], [item_U, attribute_U], gradients[:2], strict=True
        ):
            if gradient_UD is None:
                continue
            first_UD = _BETA_1 * tf.gather(first, rows_U) + (1 - _BETA_1) * gradient_UD
            second_UD = _BETA_2 * tf.gather(second, rows_U) + (1 - _BETA_2) * tf.square(gradient_UD)
            first.scatter_update(tf.IndexedSlices(first_UD, rows_U))
            second.scatter_update(tf.IndexedSlices(second_UD, rows_U))
            step_UD = rate * first_UD / (tf.sqrt(second_UD) + _EPSILON)
            table.scatter_sub(tf.IndexedSlices(step_UD, rows_U))
        for variable, (first, second), gradient in zip(
            self.dense, self._moments[2:], gradients[2:], strict=True
        ):
            if gradient is None:
                continue
            first.assign(_BETA_1 * first + (1 - _BETA_1) * gradient)
            second.assign(_BETA_2 * second + (1 - _BETA_2) * tf.square(gradient))
            variable.assign_sub(rate * first / (tf.sqrt(second) + _EPSILON))

    # ---- reading it

    def item_vectors(self) -> Float32:
        """Returns the vectors of every item, (I, D)."""
        vectors_ID = self.id_table.numpy().copy()
        if self.has_attributes:
            table, places = self.attribute_table.numpy(), self.attribute_IP.numpy()
            weights = self.attribute_weight_IP.numpy()
            for place in range(places.shape[1]):
                vectors_ID += weights[:, place, None] * table[places[:, place]]
        return vectors_ID

    def _encode_rows_eagerly(
        self, item_BT: tf.Tensor, kind_BT: tf.Tensor, segment_BT: tf.Tensor
    ) -> tf.Tensor:
        vectors_BTD = tf.gather(self._vectors_ID, item_BT)
        return self.encoder(vectors_BTD, kind_BT, allowed_within_segments(segment_BT))

    def encode(self, histories: Histories, held_out: HeldOut) -> Float32:
        """Returns the query vector before each held-out event, (B, D)."""
        packed = pack_for_encoding(histories, held_out, self.size.max_history)
        self._refresh_vectors()
        rows = self.size.rows_per_step
        parts = [
            self._encode_rows(*(_fixed(part, rows) for part in batch[:3])).numpy()[: len(batch[0])]
            for batch in _batches(packed, rows)
        ]
        if not parts:
            return np.zeros((0, self.size.dimension), np.float32)
        query_RTD = np.concatenate(parts)
        return query_RTD.reshape(-1, self.size.dimension)[packed.last_S]

    def _refresh_vectors(self) -> None:
        if not hasattr(self, "_vectors_ID"):
            self._vectors_ID = tf.Variable(self.item_vectors(), trainable=False)
        else:
            self._vectors_ID.assign(self.item_vectors())

    def weights(self) -> list[Float32]:
        """Returns a copy of everything that is learned."""
        return [variable.numpy().copy() for variable in [*self._tables, *self.dense]]

    def set_weights(self, weights: list[Float32]) -> None:
        """Restores what `weights` returned."""
        for variable, value in zip([*self._tables, *self.dense], weights, strict=True):
            variable.assign(value)

    # ---- a pass

    def train_epoch(
        self,
        histories: Histories,
        generator: np.random.Generator,
        should_stop: Callable[[], bool] = lambda: False,
        on_step: Callable[[int, int], None] = lambda _done, _all: None,
    ) -> float:
        """Makes one pass and returns the mean loss.

        Raises:
            FailedPrecondition: DIVERGED: the loss is no longer a number.
        """
        rows = self.size.rows_per_step
        packed = pack_for_training(histories, self.size.max_history, generator)
        order = generator.permutation(len(packed.item_RT))
        steps = -(-len(order) // rows)
        total, count = 0.0, 0
        losses: list[tuple[tf.Tensor, tf.Tensor]] = []
        for step in range(steps):
            taken = order[step * rows : (step + 1) * rows]
            negatives = 0 if self.full_softmax else self.size.negatives
            negative_N = generator.integers(0, self.item_count, negatives, dtype=np.int32)
            losses.append(
                self._train_step(
                    _fixed(packed.item_RT[taken], rows),
                    _fixed(packed.kind_RT[taken], rows),
                    _fixed(packed.segment_RT[taken], rows),
                    _fixed(packed.target_RT[taken], rows, -1),
                    tf.constant(negative_N),
                )
            )
            on_step(step + 1, steps)
            if should_stop():
                break
        for loss, tokens in losses:
            total, count = total + float(loss), count + int(tokens)
        mean = total / max(count, 1)
        if not np.isfinite(mean):
            raise FailedPrecondition(
                "DIVERGED", "The loss is no longer a number; lower the learning rate.", {}
            )
        return mean


def _fixed(values_RT: npt.NDArray[np.int32], rows: int, empty: int = 0) -> tf.Tensor:
    """Returns a batch filled up with empty rows to the one shape that the graph knows."""
    missing = rows - len(values_RT)
    if missing:
        values_RT = np.pad(values_RT, ((0, missing), (0, 0)), constant_values=empty)
    return tf.constant(values_RT)


def _batches(packed: PackedRows, rows: int) -> list[tuple[npt.NDArray[np.int32], ...]]:
    return [
        (
            packed.item_RT[first : first + rows],
            packed.kind_RT[first : first + rows],
            packed.segment_RT[first : first + rows],
        )
        for first in range(0, len(packed.item_RT), rows)
    ]


def train(
    model: SequenceModel,
    histories: Histories,
    validate: Callable[[], float],
    on_epoch: Callable[[EpochReport], None],
    budget: Budget,
    should_stop: Callable[[], bool] = lambda: False,
    on_step: Callable[[int, int], None] = lambda _done, _all: None,
) -> tuple[int, list[EpochReport]]:
    """Trains until validation stops improving, the passes are made or the time is up; keeps the best weights.

    Args:
        model: is trained in place.
        histories: of training events alone.
        validate: returns NDCG@10 of the model as it is.
        on_epoch: is told of each pass.
        budget: of the time; keeps some for refitting.
        should_stop: ends training early, for a caller who gave up.
        on_step: is told (steps made, steps in all) of the pass.

    Returns:
        The best pass, 1-based, and the reports of all.
    """
    size = model.size
    generator = np.random.default_rng(model.seed + 1)
    best, best_epoch, best_weights = -1.0, 0, model.weights()
    hoped, hoped_epoch, hoped_step = -1.0, 0, 0
    reports: list[EpochReport] = []
    for epoch in range(1, size.max_epochs + 1):
        began = budget.spent
        loss = model.train_epoch(
            histories, generator, lambda: should_stop() or budget.pass_must_end(), on_step
        )
        budget.pass_ended(budget.spent - began)
        score = validate()
        step = int(model.step_count.numpy())
        reports.append(EpochReport(epoch, step, loss, score, budget.spent, step // epoch))
        on_epoch(reports[-1])
        if score > best:
            best, best_epoch, best_weights = score, epoch, model.weights()
        if score > hoped * _PROGRESS:
            hoped, hoped_epoch, hoped_step = score, epoch, step
        if (
            should_stop()
            or (epoch - hoped_epoch >= size.patience and step - hoped_step >= _PATIENCE_STEPS)
            or not budget.allows_pass(epoch)
        ):
            break
    model.set_weights(best_weights)
    return best_epoch, reports
