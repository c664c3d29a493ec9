"""DP-Adam on the Transformer: each person's gradient is clipped, their sum gets noise, Adam sees nothing else.

After Abadi et al. (2016) with the person, not the event, as the example. Each step draws every person with
probability q, independently and in secret (Poisson sampling, which the accounting assumes):

    g_u = gradient of u's mean loss with respect to the item vectors V (I, D) and the encoder's weights
    G   = ( sum over drawn u of g_u min(1, C / |g_u|)  +  z C N(0, 1) ) / (q U_0)

with noise on every entry of V, also of items that no drawn person touched: where noise is absent would tell who
was drawn. V = E + W A, of ids and the public catalogue's attributes, is learned through G: dE = G, dA = W'G are
computed from what is private already. U_0 is a public guess of the number of people, not the number.

The loss is a softmax over the person's next item and N negatives drawn from the catalogue, the same for everybody
in a step; a negative that the person took is masked, so that V's rows of a person are the T + 1 of their own
history, each once, and the N others: few enough to hold each person's gradient whole and to clip it exactly.

B = people of a micro-batch, T = events that the encoder sees, R = T + 1 + N rows, D = dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from services.trainer.domain.hyper_parameters import HyperParameters
from services.trainer.domain.privacy import GRADIENTS, DifferentialPrivacy, GaussianRelease
from services.trainer.pipeline.dataset import Histories, encode_attributes, hold_out
from services.trainer.pipeline.evaluation import Contestants
from services.trainer.pipeline.export import convert, measure_parity
from services.trainer.pipeline.sequence_model import SequenceModel
from services.trainer.pipeline.transformer import allowed_within_segments
from services.trainer.privacy.randomness import SecureRandom
from services.trainer.privacy.training import Served
from shared.bundle.manifest import ScoringParameters
from shared.bundle.scoring import Companion, CooccurrenceMatrix
from shared.errors import Cancelled

Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]

# Public constants, chosen on the simulated population.
SAMPLING_RATE = 0.01
STEPS = 300
NEGATIVES = 128
SIZE = HyperParameters(
    dimension=32, blocks=1, heads=2, max_history=16, dropout=0.0, negatives=NEGATIVES, learning_rate=5e-3,
    batch_tokens=4096,
)  # fmt: skip
_MICRO_BATCH = 128
_BETA_1, _BETA_2, _EPSILON = 0.9, 0.999, 1e-8


class PrivateTrainer:
    """Takes steps; holds no data.

    Args:
        model: is trained in place.
        clip_norm: C.
        noise_multiplier: z; 0, for controls alone, adds none.
        expected_people: q U_0: a public number by which sums are divided.
    """

    def __init__(
        self, model: SequenceModel, clip_norm: float, noise_multiplier: float, expected_people: float,
        random: SecureRandom,
    ) -> None:  # fmt: skip
        self.model, self.random = model, random
        self.clip_norm, self.noise_multiplier = clip_norm, noise_multiplier
        self._expected = max(expected_people, 1.0)
        self._vectors = tf.Variable(model.item_vectors())
        self._parameters = [model.id_table, model.attribute_table, *model.dense]
        self._moments = [(tf.Variable(tf.zeros_like(v)), tf.Variable(tf.zeros_like(v))) for v in self._parameters]  # fmt: skip
        self._step = tf.Variable(0.0)
        size = model.size
        rows = tf.TensorSpec((None, size.max_history + 1), tf.int32)
        self._clipped_sum = tf.function(
            self._clipped_sum_eagerly,
            input_signature=[rows, rows, tf.TensorSpec((None,), tf.int32)],
            autograph=False,
        )

    def step(self, item_BT1: Int32, kind_BT1: Int32, negative_N: Int32) -> None:
        """Makes one step with the drawn people's rows (`rows_of`), of any number, also none."""
        sums = [np.zeros(v.shape, np.float64) for v in [self._vectors, *self.model.dense]]
        for first in range(0, len(item_BT1), _MICRO_BATCH):
            part = slice(first, first + _MICRO_BATCH)
            found = self._clipped_sum(
                tf.constant(item_BT1[part]), tf.constant(kind_BT1[part]), tf.constant(negative_N)
            )
            for total, value in zip(sums, found, strict=True):
                total += value.numpy()
        noise = self.noise_multiplier * self.clip_norm
        noisy = [
            (total + noise * self.random.normal(total.size).reshape(total.shape)) / self._expected
            for total in sums
        ]
        self._apply([tf.constant(value.astype(np.float32)) for value in noisy])

    def person_gradients(
        self, item_BT1: tf.Tensor, kind_BT1: tf.Tensor, negative_N: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, list[tf.Tensor]]:
        """Returns each person's gradient: of the R item vectors (B, R, D), which those are (B, R), and the rest."""
        # A person's item that occurs twice is one row: the first place that holds it.
        same_BSS = tf.equal(item_BT1[:, :, None], item_BT1[:, None, :])
        place_BS = tf.argmax(tf.cast(same_BSS, tf.int32), axis=2, output_type=tf.int32)
        taken_BN = tf.reduce_any(item_BT1[:, :, None] == negative_N[None, None, :], axis=1)
        own_BSD = tf.gather(self._vectors, tf.maximum(item_BT1, 0))
        other_ND = tf.gather(self._vectors, negative_N)

        def one(
            arguments: tuple[tf.Tensor, ...],
        ) -> tuple[tf.Tensor, tf.Tensor, list[tf.Tensor]]:
            item_S, kind_S, own_SD, place_S, taken_N = arguments
            with tf.GradientTape() as tape:
                tape.watch([own_SD, other_ND])
                vector_SD = tf.gather(own_SD, place_S)
                known_T = item_S[:-1] >= 0
                segment_T = tf.cast(known_T, tf.int32)
                query_TD = self.model.encoder(
                    vector_SD[None, :-1],
                    tf.maximum(kind_S[None, :-1], 0),
                    allowed_within_segments(segment_T[None]),
                )[0]
                positive_T = tf.reduce_sum(query_TD * vector_SD[1:], axis=1)
                logits_TN = tf.matmul(query_TD, other_ND, transpose_b=True)
                logits_TN = tf.where(taken_N[None, :], -1e9, logits_TN)
                both_T = tf.concat([positive_T[:, None], logits_TN], axis=1)
                loss_T = tf.reduce_logsumexp(both_T, axis=1) - positive_T
                weight_T = tf.cast(item_S[1:] >= 0, tf.float32)
                loss = tf.reduce_sum(loss_T * weight_T) / tf.maximum(tf.reduce_sum(weight_T), 1.0)
            own, other, *rest = tape.gradient(
                loss,
                [own_SD, other_ND, *self.model.dense],
                unconnected_gradients=tf.UnconnectedGradients.ZERO,
            )
            return own, other, rest

        own_BSD, other_BND, rest = tf.vectorized_map(one, (item_BT1, kind_BT1, own_BSD, place_BS, taken_BN))
        row_BR = tf.concat(
            [item_BT1, tf.broadcast_to(negative_N[None], [tf.shape(item_BT1)[0], tf.shape(negative_N)[0]])], 1
        )
        return tf.concat([own_BSD, other_BND], axis=1), row_BR, rest

    def _clipped_sum_eagerly(
        self, item_BT1: tf.Tensor, kind_BT1: tf.Tensor, negative_N: tf.Tensor
    ) -> list[tf.Tensor]:
        vector_BRD, row_BR, rest = self.person_gradients(item_BT1, kind_BT1, negative_N)
        squared_B = tf.reduce_sum(tf.square(vector_BRD), axis=[1, 2])
        for part in rest:
            squared_B += tf.reduce_sum(tf.square(part), axis=tf.range(1, tf.rank(part)))
        norm_B = tf.sqrt(squared_B)
        # A gradient that is no number is no contribution: it would undo every bound.
        scale_B = tf.where(
            tf.math.is_finite(norm_B),
            tf.minimum(1.0, (1 - 1e-6) * self.clip_norm / tf.maximum(norm_B, 1e-12)),
            0.0,
        )
        vector_BRD = tf.where(scale_B[:, None, None] > 0, vector_BRD * scale_B[:, None, None], 0.0)
        flat = tf.reshape(vector_BRD, [-1, self.model.size.dimension])
        row = tf.reshape(row_BR, [-1])
        # Rows of -1, of histories that are shorter, are dropped.
        vectors_ID = tf.math.unsorted_segment_sum(flat, row, self.model.item_count)
        sums = [
            tf.einsum("b,b...->...", scale_B, tf.where(tf.math.is_finite(part), part, 0.0)) for part in rest
        ]
        return [vectors_ID, *sums]

    def _apply(self, gradients: list[tf.Tensor]) -> None:
        """Adam on noisy gradients, which are all that it sees."""
        vectors_ID, *rest = gradients
        model = self.model
        attributes = tf.zeros_like(model.attribute_table)
        if model.has_attributes:
            weighted = model.attribute_weight_IP[:, :, None] * vectors_ID[:, None, :]
            attributes = tf.math.unsorted_segment_sum(
                tf.reshape(weighted, [-1, model.size.dimension]),
                tf.reshape(model.attribute_IP, [-1]),
                tf.shape(model.attribute_table)[0],
            )
        self._step.assign_add(1.0)
        rate = model.size.learning_rate * tf.sqrt(1 - _BETA_2**self._step) / (1 - _BETA_1**self._step)
        for variable, (first, second), gradient in zip(
            self._parameters, self._moments, [vectors_ID, attributes, *rest], strict=True
        ):
            first.assign(_BETA_1 * first + (1 - _BETA_1) * gradient)
            second.assign(_BETA_2 * second + (1 - _BETA_2) * tf.square(gradient))
            variable.assign_sub(rate * first / (tf.sqrt(second) + _EPSILON))
        self._vectors.assign(model.item_vectors())


def rows_of(histories: Histories, people: npt.NDArray[np.int64], length: int) -> tuple[Int32, Int32]:
    """Returns the newest `length` + 1 events of people, oldest first, items and kinds, (B, length + 1); -1 is none."""
    count_B = np.minimum(histories.length_U[people], length + 1)
    end_B = histories.start_U1[people + 1]
    place_BT = end_B[:, None] - count_B[:, None] + np.arange(length + 1)[None, :]
    known_BT = np.arange(length + 1)[None, :] < count_B[:, None]
    place_BT = np.where(known_BT, place_BT, 0)
    if not len(histories.item_E):
        return np.full(place_BT.shape, -1, np.int32), np.zeros(place_BT.shape, np.int32)
    items = np.where(known_BT, histories.item_E[place_BT], -1).astype(np.int32)
    return items, np.where(known_BT, histories.kind_E[place_BT], 0).astype(np.int32)


def train_gradients(
    training: Histories,
    attributes_of: Mapping[str, Sequence[str]],
    release: GaussianRelease,
    clip_norm: float,
    random: SecureRandom,
    expected_people: float,
    size: HyperParameters = SIZE,
    on_step: Callable[[int], None] = lambda _step: None,
    noise: float | None = None,
    trainer_type: type[PrivateTrainer] = PrivateTrainer,
) -> SequenceModel:
    """Returns the trained model.

    Args:
        trainer_type: what takes the steps; an audit looks on with one of its own.
        expected_people: the public U_0.
        noise: in place of the release's noise multiplier, for controls and comparisons alone; 0 adds none.
    """
    attributes = encode_attributes(training.item_ids, attributes_of)
    model = SequenceModel(training.item_count, attributes, size, seed=0)
    trainer = trainer_type(
        model, clip_norm, release.noise_multiplier if noise is None else noise,
        release.sampling_rate * expected_people, random,
    )  # fmt: skip
    # The negatives are of the catalogue and of nobody: a public seed will do.
    public = np.random.default_rng(0)
    for step in range(release.steps):
        drawn = np.flatnonzero(random.coins(training.user_count, release.sampling_rate))
        items, kinds = rows_of(training, drawn, size.max_history)
        negatives = public.choice(
            training.item_count, min(size.negatives, training.item_count), replace=False
        ).astype(np.int32)
        trainer.step(items, kinds, negatives)
        on_step(step + 1)
    return model


def losses(model: SequenceModel, people: Histories) -> npt.NDArray[np.float64]:
    """Returns each person's mean loss over the full catalogue, (U,): what an attacker who has the model can compute."""
    vectors_ID = model.item_vectors()
    total_U = np.zeros(people.user_count)
    longest = min(int(people.length_U.max(initial=0)), model.size.max_history)
    for back in range(1, longest):
        held = hold_out(people, back, exclude_seen=False)
        logits_BI = model.encode(people, held) @ vectors_ID.T
        largest_B = logits_BI.max(axis=1)
        partition_B = largest_B + np.log(np.exp(logits_BI - largest_B[:, None]).sum(axis=1))
        total_U[held.user_B] += partition_B - logits_BI[np.arange(len(held)), held.target_B]
    return total_U / np.maximum(np.minimum(people.length_U, longest) - 1, 1)


def contestants_of(model: SequenceModel) -> Contestants:
    """Returns the Transformer alone, as it serves."""
    items = model.item_count
    nothing = CooccurrenceMatrix(
        np.zeros(items + 1, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32)
    )
    zeros = np.zeros(items, np.float32)
    return Contestants(model.item_vectors(), zeros, Companion(ScoringParameters(0.0), nothing), zeros, zeros)


def serve_gradients(
    training: Histories,
    attributes_of: Mapping[str, Sequence[str]],
    private: DifferentialPrivacy,
    release: GaussianRelease,
    random: SecureRandom,
    report: Callable[..., None],
    should_stop: Callable[[], bool],
) -> Served:
    """Returns the Transformer alone, as it serves: no co-occurrence, no popularity."""

    def on_step(step: int) -> None:
        if should_stop():
            raise Cancelled("CANCELLED", "The run was cancelled.")
        if step % 20 == 0:
            report("TRAINING", f"Step {step} of {release.steps}.", step=step)

    # A public guess of the scale: it moves the step size of Adam by nothing, which divides by it again.
    model = train_gradients(
        training,
        attributes_of,
        release,
        private.clip_norm,
        random,
        1 / release.sampling_rate,
        on_step=on_step,
    )
    encoder_bytes = convert(model.encoder)
    probe = _catalogue_walks(training, model.size.max_history)
    parity, milliseconds = measure_parity(model, encoder_bytes, probe, hold_out(probe, 1, False))
    hyper_parameters: dict[str, Any] = {
        "mechanism": GRADIENTS, "clip_norm": private.clip_norm, "dimension": model.size.dimension,
        "max_history": model.size.max_history, "negatives": model.size.negatives,
        "learning_rate": model.size.learning_rate,
    }  # fmt: skip
    return Served(
        contestants_of(model),
        encoder_bytes,
        model.size.max_history,
        parity,
        milliseconds,
        hyper_parameters,
        lambda test: model.encode(test, hold_out(test, 1, exclude_seen=True)),
    )


def _catalogue_walks(histories: Histories, length: int) -> Histories:
    """Returns histories of nobody, over the same catalogue, to compare serving with training on."""
    generator = np.random.default_rng(0)
    rows = 16
    item_E = generator.integers(0, histories.item_count, rows * length).astype(np.int32)
    return Histories(
        np.arange(rows + 1, dtype=np.int64) * length, item_E, np.full(rows * length, 3, np.int32),
        np.arange(rows * length, dtype=np.int64), histories.item_ids, np.arange(rows),
    )  # fmt: skip
