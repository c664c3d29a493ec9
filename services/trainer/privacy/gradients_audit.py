"""Looks on while DP-Adam takes its steps, as an attacker may. TensorFlow. M = canaries, see `audit`."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from services.trainer.privacy.gradients import PrivateTrainer

Int32 = npt.NDArray[np.int32]


def watching(canary_rows: tuple[Int32, Int32]) -> tuple[type[PrivateTrainer], npt.NDArray[np.float64]]:
    """Returns a trainer that scores canaries while it trains, and the scores, (M,), which it fills.

    Args:
        canary_rows: items and kinds of the canaries, as `gradients.rows_of` gives them.
    """
    items, kinds = (tf.constant(rows) for rows in canary_rows)
    score_M = np.zeros(len(canary_rows[0]))

    class Watching(PrivateTrainer):
        """A trainer with somebody looking over its shoulder."""

        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            # Traced once: without that every step builds the graph anew.
            self._gradients_of = tf.function(self.person_gradients, autograph=False)

        def step(self, item_BT1: Int32, kind_BT1: Int32, negative_N: Int32) -> None:
            self._canaries = self._gradients_of(items, kinds, tf.constant(negative_N))
            super().step(item_BT1, kind_BT1, negative_N)

        def _apply(self, gradients: list[tf.Tensor]) -> None:
            vector_MRD, row_MR, rest = self._canaries
            noisy_ID, *noisy_rest = gradients
            known_MR = tf.cast(row_MR >= 0, tf.float32)[:, :, None]
            product_M = tf.reduce_sum(
                vector_MRD * tf.gather(noisy_ID, tf.maximum(row_MR, 0)) * known_MR, axis=[1, 2]
            )
            squared_M = tf.reduce_sum(tf.square(vector_MRD) * known_MR, axis=[1, 2])
            for own, noisy in zip(rest, noisy_rest, strict=True):
                axes = tf.range(1, tf.rank(own))
                product_M += tf.reduce_sum(own * noisy[None], axis=axes)
                squared_M += tf.reduce_sum(tf.square(own), axis=axes)
            score_M[:] += (product_M / tf.maximum(tf.sqrt(squared_M), 1e-12)).numpy()
            super()._apply(gradients)

    return Watching, score_M
