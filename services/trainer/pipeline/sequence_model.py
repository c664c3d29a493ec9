"""The model while it is trained: softmax over the catalogue, sparse Adam on the tables, averaged weights.

U = distinct items of a step, N = negatives, M = tokens with a target, K = targets of a token. See `transformer` for
the rest.

    loss = sum_mk w_k (log(exp s_mk + sum_n exp(s_mn + log Q)) - s_mk) / sum_mk w_k

s is the product of query and item vector; target k is the k-th next item, w_k = target_decay^(k - 1); negatives are
drawn alike for all tokens, a token's own targets left out, or are the whole catalogue.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from services.trainer.domain.hyper_parameters import HyperParameters
from services.trainer.pipeline.dataset import HeldOut, Histories, ItemAttributes
from services.trainer.pipeline.memory import end_variables
from services.trainer.pipeline.packing import PackedRows, pack_for_encoding
from services.trainer.pipeline.transformer import Encoder, allowed_within_segments

Float32 = npt.NDArray[np.float32]

_BETA_1, _BETA_2, _EPSILON = 0.9, 0.999, 1e-8
_INITIAL_STDDEV = 0.02
# The weights that are served are a moving average of those that are trained (Polyak & Juditsky, 1992), of a window
# that grows with the passes made: at first there is nothing worth remembering.
AVERAGING_STEPS = 8
_AVERAGING_KEEP = 0.99**AVERAGING_STEPS
_AVERAGING_PASSES = 3


_ROWS_AT_ONCE = 16_384


class SequenceModel:
    """The tables, the encoder and their optimiser.

    item vector = id embedding + mean of the item's attribute embeddings + projected content; input and output of the
    encoder.
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
        self._content_IC = attributes.content_IC
        if self._content_IC is not None:
            self._content = tf.constant(self._content_IC)
            # Drawn last: a model without content is the same whether content could have been.
            self.projection = table(self._content_IC.shape[1])
            self.dense.append(self.projection)
        self._tables = [self.id_table, self.attribute_table]
        self._moments = [
            (tf.Variable(tf.zeros_like(v)), tf.Variable(tf.zeros_like(v)))
            for v in [*self._tables, *self.dense]
        ]
        self._averages = [tf.Variable(v) for v in [*self._tables, *self.dense]]
        # What is read from outside: the trained tables, or for a while their averages.
        self._read_tables = self._tables
        self._average_step = tf.function(
            self._average_eagerly, input_signature=[tf.TensorSpec((), tf.float32)], autograph=False
        )
        self.step_count = tf.Variable(0, dtype=tf.int32)
        self.learning_rate = tf.Variable(size.learning_rate, dtype=tf.float32)
        self._target_weight_K = tf.constant(
            [size.target_decay**number for number in range(size.targets)], tf.float32
        )
        self.full_softmax = item_count <= 2 * size.negatives
        rows, length = size.rows_per_step, size.max_history
        # Fixed shapes: another shape would trace the graph anew.
        token = tf.TensorSpec((rows, length), tf.int32)
        self._steps: dict[int, Callable[..., tuple[tf.Tensor, tf.Tensor]]] = {}
        self._encode_rows = tf.function(
            self._encode_rows_eagerly,
            input_signature=[tf.TensorSpec((rows, length, width), tf.float32), token, token],
            autograph=False,
        )

    # ---- the step

    def _train_step_eagerly(
        self,
        item_BT: tf.Tensor,
        kind_BT: tf.Tensor,
        segment_BT: tf.Tensor,
        target_BTK: tf.Tensor,
        negative_N: tf.Tensor,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Makes one step; returns the summed loss and the sum of the targets' weights."""
        targets = self.size.targets
        place_M = tf.where(tf.reshape(target_BTK[:, :, 0], [-1]) >= 0)[:, 0]
        target_MK = tf.gather(tf.reshape(target_BTK, [-1, targets]), place_M)
        weight_MK = tf.where(target_MK >= 0, self._target_weight_K[None, :], 0.0)
        # A place without a target stands in with the first one, at weight 0.
        target_MK = tf.where(target_MK >= 0, target_MK, target_MK[:, :1])
        if self.full_softmax:
            item_U = tf.range(self.item_count)
            input_BT, answer_MK, other_N = item_BT, target_MK, item_U
        else:
            everything = tf.concat([tf.reshape(item_BT, [-1]), tf.reshape(target_MK, [-1]), negative_N], 0)
            item_U, place = tf.unique(everything)
            tokens, answers = tf.size(item_BT), tf.size(target_MK)
            input_BT = tf.reshape(place[:tokens], tf.shape(item_BT))
            answer_MK = tf.reshape(place[tokens : tokens + answers], tf.shape(target_MK))
            other_N = place[tokens + answers :]
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
            if self._content_IC is not None:
                vector_UD += tf.matmul(tf.gather(self._content, item_U), self.projection)
            query_BTD = self.encoder(
                tf.gather(vector_UD, input_BT), kind_BT, allowed_within_segments(segment_BT), seed_2
            )
            query_MD = tf.gather(tf.reshape(query_BTD, [-1, self.size.dimension]), place_M)
            losses_MK = weight_MK * self._losses(query_MD, vector_UD, answer_MK, other_N)
            loss = tf.reduce_sum(losses_MK) / tf.maximum(tf.reduce_sum(weight_MK), 1e-6)
        # Of what was gathered twice, the sum: the rows are distinct, so their gradients are small and dense.
        gradients = [
            None if gradient is None else tf.convert_to_tensor(gradient)
            for gradient in tape.gradient(loss, [id_rows_UD, attribute_rows, *self.dense])
        ]
        self._apply(item_U, attribute_U, gradients)
        return tf.reduce_sum(losses_MK), tf.reduce_sum(weight_MK)

    def _losses(
        self, query_MD: tf.Tensor, vector_UD: tf.Tensor, answer_MK: tf.Tensor, other_N: tf.Tensor
    ) -> tf.Tensor:
        """Returns -log softmax of each answer against the negatives, (M, K)."""
        positive_MK = tf.einsum("md,mkd->mk", query_MD, tf.gather(vector_UD, answer_MK))
        logits_MN = tf.matmul(query_MD, tf.gather(vector_UD, other_N), transpose_b=True)
        if not self.full_softmax:
            # log-Q: each of N uniform draws stands for I / N items (Jean et al., 2015).
            logits_MN += float(np.log((self.item_count - 1) / self.size.negatives))
        own_MN = tf.reduce_any(answer_MK[:, :, None] == other_N[None, None, :], axis=1)
        # log(e^s + sum e^t) - s, s and t of any size.
        return tf.math.softplus(
            tf.reduce_logsumexp(tf.where(own_MN, -1e9, logits_MN), axis=1, keepdims=True) - positive_MK
        )

    def _apply(self, item_U: tf.Tensor, attribute_U: tf.Tensor, gradients: list[tf.Tensor]) -> None:
        """Adam (Kingma & Ba, 2015); of the tables only the rows that the step read (as in LazyAdam)."""
        self.step_count.assign_add(1)
        step = tf.cast(self.step_count, tf.float32)
        rate = self.learning_rate * tf.sqrt(1 - _BETA_2**step) / (1 - _BETA_1**step)
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

    def _average_eagerly(self, keep: tf.Tensor) -> None:
        for average, variable in zip(self._averages, [*self._tables, *self.dense], strict=True):
            average.assign_add((1 - keep) * (variable - average))

    def average(self, passes: float) -> None:
        """Moves the averaged weights towards the trained ones; they remember more the more passes were made."""
        keep = min(_AVERAGING_KEEP, passes / (passes + _AVERAGING_PASSES))
        self._average_step(tf.constant(keep, tf.float32))

    def start_averages(self) -> None:
        """Lets the averaged weights begin at the trained ones."""
        self._average_step(tf.constant(0.0, tf.float32))

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Whoever reads the model within (`item_vectors`, `encode`, `weights`) reads the averaged weights, after it the trained ones."""
        # The tables are read where they lie: of a large catalogue a copy is a tenth of the memory.
        self._swap_dense()
        self._read_tables = self._averages[: len(self._tables)]
        try:
            yield
        finally:
            self._read_tables = self._tables
            self._swap_dense()

    def _swap_dense(self) -> None:
        for average, variable in zip(self._averages[len(self._tables) :], self.dense, strict=True):
            trained = variable.numpy()
            variable.assign(average)
            average.assign(trained)

    def end_training(self) -> None:
        """Gives back what only training needs: three times the tables. Afterwards the model can be read alone."""
        of_training = [*(moment for pair in self._moments for moment in pair), *self._averages]
        end_variables(of_training, living=[*self._tables, *self.dense])
        self._moments, self._averages = [], []
        self._steps.clear()

    # ---- reading it

    def item_vectors(self) -> Float32:
        """Returns the vectors of every item, (I, D)."""
        identity, attribute = self._read_tables
        vectors_ID = identity.numpy()
        if self.has_attributes:
            table, places = attribute.numpy(), self.attribute_IP.numpy()
            weights = self.attribute_weight_IP.numpy()
            for first in range(0, len(places), _ROWS_AT_ONCE):
                rows = slice(first, first + _ROWS_AT_ONCE)
                for place in range(places.shape[1]):
                    vectors_ID[rows] += weights[rows, place, None] * table[places[rows, place]]
        if self._content_IC is not None:
            vectors_ID += self._content_IC @ self.projection.numpy()
        return vectors_ID

    def _encode_rows_eagerly(
        self, vectors_BTD: tf.Tensor, kind_BT: tf.Tensor, segment_BT: tf.Tensor
    ) -> tf.Tensor:
        return self.encoder(vectors_BTD, kind_BT, allowed_within_segments(segment_BT))

    def encode(self, histories: Histories, held_out: HeldOut) -> Float32:
        """Returns the query vector before each held-out event, (B, D); zeros where there is no event before it."""
        query_BD = np.zeros((len(held_out), self.size.dimension), np.float32)
        with_history = np.flatnonzero(held_out.prefix_B > 0)
        packed = pack_for_encoding(histories, held_out.take(with_history), self.size.max_history)
        vectors_ID = self.item_vectors()
        rows, length = self.size.rows_per_step, self.size.max_history
        # Of each batch only the answers are kept: all tokens of a large log would be gigabytes.
        order_S = np.argsort(packed.last_S, kind="stable")
        last_S = packed.last_S[order_S]
        for number, batch in enumerate(_batches(packed, rows)):
            first = number * rows * length
            here = slice(*np.searchsorted(last_S, [first, first + rows * length]))
            item_BT, kind_BT, segment_BT = (fixed(part, rows) for part in batch)
            query_ND = self._encode_rows(
                tf.constant(vectors_ID[item_BT.numpy()]), kind_BT, segment_BT
            ).numpy()
            query_BD[with_history[order_S[here]]] = query_ND.reshape(-1, query_BD.shape[1])[
                last_S[here] - first
            ]
        return query_BD

    def weights(self) -> list[Float32]:
        """Returns a copy of everything that is learned."""
        return [variable.numpy() for variable in [*self._read_tables, *self.dense]]

    def set_weights(self, weights: list[Float32]) -> None:
        """Restores what `weights` returned."""
        for variable, value in zip([*self._tables, *self.dense], weights, strict=True):
            variable.assign(value)

    def state(self) -> list[npt.NDArray[Any]]:
        """Returns a copy of everything that training goes on from, the optimiser's too."""
        return [variable.numpy() for variable in self._everything()]

    def restore(self, state: Sequence[npt.NDArray[Any]]) -> None:
        """Restores what `state` returned."""
        for variable, value in zip(self._everything(), state, strict=True):
            variable.assign(value)

    def _everything(self) -> list[tf.Variable]:
        moments = [moment for pair in self._moments for moment in pair]
        return [*self._tables, *self.dense, *moments, *self._averages, self.step_count]

    # ---- steps

    def step_of(self, rows: int) -> Callable[..., tuple[tf.Tensor, tf.Tensor]]:
        """Returns the compiled step over so many packed rows; one for each number of rows that is asked for."""
        if rows not in self._steps:
            token = tf.TensorSpec((rows, self.size.max_history), tf.int32)
            target = tf.TensorSpec((rows, self.size.max_history, self.size.targets), tf.int32)
            self._steps[rows] = tf.function(
                self._train_step_eagerly,
                input_signature=[token, token, token, target, tf.TensorSpec((None,), tf.int32)],
                autograph=False,
            )
        return self._steps[rows]


def fixed(values_RT: npt.NDArray[np.int32], rows: int, empty: int = 0) -> tf.Tensor:
    """Returns a batch filled up with empty rows to the one shape that the graph knows."""
    missing = rows - len(values_RT)
    if missing:
        widths = ((0, missing), *[(0, 0)] * (values_RT.ndim - 1))
        values_RT = np.pad(values_RT, widths, constant_values=empty)
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
