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
        canary_rows: items and kinds of the canaries, as `gradients.rows_of` gives them; no two share an item.
    """
    items, kinds = (tf.constant(rows) for rows in canary_rows)
    places = canary_rows[0].shape[1]
    score_M = np.zeros(len(canary_rows[0]))

    class Watching(PrivateTrainer):
        """A trainer with somebody looking over its shoulder."""

        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            # Traced once: without that every step builds the graph anew.
            self._directions = tf.function(self._directions_eagerly, autograph=False)

        def _directions_eagerly(self, negative_N: tf.Tensor) -> tf.Tensor:
            """Returns how each canary would pull the vectors of its items, (M, S, D), of length 1.

            The items that are also everybody's negatives tell of everybody, and are left out.
            """
            own_MSD = self.person_gradients(items, kinds, negative_N)[0][:, :places]
            shared_MS = tf.reduce_any(items[:, :, None] == negative_N[None, None, :], axis=2)
            own_MSD = tf.where(shared_MS[:, :, None], 0.0, own_MSD)
            length_M = tf.sqrt(tf.reduce_sum(tf.square(own_MSD), axis=[1, 2]))
            return own_MSD / tf.maximum(length_M, 1e-12)[:, None, None]

        def step(self, item_BT1: Int32, kind_BT1: Int32, negative_N: Int32) -> None:
            self._direction_MSD = self._directions(tf.constant(negative_N))
            super().step(item_BT1, kind_BT1, negative_N)

        def _apply(self, gradients: list[tf.Tensor]) -> None:
            seen_MSD = tf.gather(gradients[0], items)
            score_M[:] += tf.reduce_sum(self._direction_MSD * seen_MSD, axis=[1, 2]).numpy()
            super()._apply(gradients)

    return Watching, score_M
