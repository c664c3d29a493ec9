"""The model of the founding document, as a baseline (TensorFlow, Keras).

    p(u, i) = sigmoid(w * (e_u . f_i) + b)

User embedding, item embedding, their dot product, Dense(1, sigmoid), binary cross-entropy. A pair that happened
is positive; pairs drawn at random are negative. It knows people by number and no order of events.
"""

from __future__ import annotations

from collections.abc import Callable

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from services.trainer.pipeline.dataset import HeldOut, Histories
from services.trainer.pipeline.evaluation import ndcg_at_10, rank_by_query
from services.trainer.pipeline.memory import end_variables

Float32 = npt.NDArray[np.float32]

_DIMENSION = 32
# A step moves every row of both tables, whatever its pairs: a large log is taken in larger steps.
_BATCH, _STEPS_OF_PASS = 4096, 60
_NEGATIVES = 4
_MAX_PASSES, _PATIENCE = 20, 3
_LEARNING_RATE = 3e-3


class FoundingModel:
    """See the module."""

    def __init__(self, user_count: int, item_count: int, seed: int) -> None:
        keras.utils.set_random_seed(seed)
        self._generator = np.random.default_rng(seed)
        user, item = keras.Input((), dtype="int32"), keras.Input((), dtype="int32")
        self._user = keras.layers.Embedding(user_count, _DIMENSION)
        self._item = keras.layers.Embedding(item_count, _DIMENSION)
        dot = keras.layers.Dot(axes=1)([self._user(user), self._item(item)])
        self._out = keras.layers.Dense(1, activation="sigmoid")
        self._model = keras.Model([user, item], self._out(dot))
        self._optimizer = keras.optimizers.Adam(_LEARNING_RATE)
        self._optimizer.build(self._model.trainable_variables)
        self._item_count = item_count
        pair = tf.TensorSpec((None,), tf.int32)
        self._step = tf.function(self._step_eagerly, input_signature=[pair, pair, tf.TensorSpec((None,))])

    def _step_eagerly(self, user_M: tf.Tensor, item_M: tf.Tensor, label_M: tf.Tensor) -> None:
        with tf.GradientTape() as tape:
            p_M = self._model([user_M, item_M], training=True)[:, 0]
            loss = tf.reduce_mean(keras.losses.binary_crossentropy(label_M[:, None], p_M[:, None]))
        variables = self._model.trainable_variables
        self._optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))

    def train_pass(self, histories: Histories) -> None:
        """Makes one pass over the pairs."""
        user_E = np.repeat(np.arange(histories.user_count, dtype=np.int32), histories.length_U)
        steps = max(1, min(_STEPS_OF_PASS, round(len(user_E) / _BATCH)))
        for taken in np.array_split(self._generator.permutation(len(user_E)), steps):
            drawn = self._generator.integers(0, self._item_count, len(taken) * _NEGATIVES, dtype=np.int32)
            self._step(
                tf.constant(np.concatenate([user_E[taken], np.repeat(user_E[taken], _NEGATIVES)])),
                tf.constant(np.concatenate([histories.item_E[taken], drawn])),
                tf.constant(
                    np.concatenate([np.ones(len(taken)), np.zeros(len(taken) * _NEGATIVES)]), tf.float32
                ),
            )

    def factors(self, held_out: HeldOut) -> tuple[Float32, Float32]:
        """Returns (B, D) and (I, D) whose product orders items as p does: the sigmoid rises, b is one for all."""
        weight = float(self._out.kernel.numpy()[0, 0])
        users_UD, items_ID = (table.embeddings.numpy() for table in (self._user, self._item))
        return (np.sign(weight) * users_UD[held_out.user_B]).astype(np.float32), items_ID

    def end(self) -> None:
        """Gives its memory back; it cannot be used any more."""
        keras_variables = [*self._model.trainable_variables, *self._optimizer.variables]
        end_variables(v.value for v in keras_variables if v.dtype == "float32" and len(v.shape))


def train_founding_model(
    training: Histories,
    before_test: Histories,
    histories: Histories,
    validation: HeldOut,
    test: HeldOut,
    exclude_seen: bool,
    seed: int,
    check: Callable[[], None],
) -> tuple[Float32, Float32]:
    """Returns the factors for the test, after as many passes as served the validation best.

    Args:
        training, before_test: what is learned from while choosing, and for the test.
        check: called between passes; raises to stop.
    """
    model = FoundingModel(histories.user_count, histories.item_count, seed)
    best, best_pass = -1.0, 0
    for number in range(1, _MAX_PASSES + 1):
        model.train_pass(training)
        check()
        query_BD, items_ID = model.factors(validation)
        quality = float(
            ndcg_at_10(rank_by_query(histories, validation, query_BD, items_ID, exclude_seen)).mean()
        )
        if quality > best:
            best, best_pass = quality, number
        elif number - best_pass >= _PATIENCE:
            break
    model.end()
    model = FoundingModel(histories.user_count, histories.item_count, seed)
    for _ in range(best_pass):
        model.train_pass(before_test)
        check()
    factors = model.factors(test)
    model.end()
    return factors
