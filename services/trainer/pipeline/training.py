"""The training loop: softmax over the catalogue, sparse Adam on the tables, averaged weights.

U = distinct items of a step, N = negatives, M = tokens with a target, K = targets of a token. See `transformer` for
the rest.

    loss = sum_mk w_k (log(exp s_mk + sum_n exp(s_mn + log Q)) - s_mk) / sum_mk w_k

s is the product of query and item vector; target k is the k-th next item, w_k = target_decay^(k - 1); negatives are
drawn alike for all tokens, a token's own targets left out, or are the whole catalogue.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from services.trainer.domain.hyper_parameters import HyperParameters
from services.trainer.pipeline.budget import Budget
from services.trainer.pipeline.checkpoint import Checkpoints, TrainingState
from services.trainer.pipeline.dataset import HeldOut, Histories, ItemAttributes
from services.trainer.pipeline.packing import PackedRows, pack_for_encoding, pack_for_training
from services.trainer.pipeline.schedule import Schedule, rows_of_step
from services.trainer.pipeline.transformer import Encoder, allowed_within_segments
from shared.errors import FailedPrecondition

Float32 = npt.NDArray[np.float32]

_BETA_1, _BETA_2, _EPSILON = 0.9, 0.999, 1e-8
_INITIAL_STDDEV = 0.02
# The weights that are served are a moving average of those that are trained (Polyak & Juditsky, 1992), of a window
# that grows with the passes made: at first there is nothing worth remembering.
_AVERAGING_STEPS = 8
_AVERAGING_KEEP = 0.99**_AVERAGING_STEPS
_AVERAGING_PASSES = 3
# Steps whose time tells how many the budget allows; the first ones build the graph.
_PROBE_FROM, _PROBE_TO = 4, 24
# More often than this many times validation would cost more than it tells.
_VALIDATIONS = 10
# Of the peak, where refitting begins: it shall add what is new and disturb nothing.
_REFIT_RATE_SHARE = 0.2


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
        self._averages = [tf.Variable(v) for v in [*self._tables, *self.dense]]
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
            self._encode_rows_eagerly, input_signature=[token, token, token], autograph=False
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
        """The model within has the averaged weights, after it the trained ones again."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for average, variable in zip(self._averages, [*self._tables, *self.dense], strict=True):
            trained = variable.numpy().copy()
            variable.assign(average)
            average.assign(trained)

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
        """Returns the query vector before each held-out event, (B, D); zeros where there is no event before it."""
        query_BD = np.zeros((len(held_out), self.size.dimension), np.float32)
        with_history = np.flatnonzero(held_out.prefix_B > 0)
        packed = pack_for_encoding(histories, held_out.take(with_history), self.size.max_history)
        self._refresh_vectors()
        rows, length = self.size.rows_per_step, self.size.max_history
        # Of each batch only the answers are kept: all tokens of a large log would be gigabytes.
        order_S = np.argsort(packed.last_S, kind="stable")
        last_S = packed.last_S[order_S]
        for number, batch in enumerate(_batches(packed, rows)):
            first = number * rows * length
            here = slice(*np.searchsorted(last_S, [first, first + rows * length]))
            query_ND = self._encode_rows(*(_fixed(part, rows) for part in batch)).numpy()
            query_BD[with_history[order_S[here]]] = query_ND.reshape(-1, query_BD.shape[1])[
                last_S[here] - first
            ]
        return query_BD

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

    def state(self) -> list[npt.NDArray[Any]]:
        """Returns a copy of everything that training goes on from, the optimiser's too."""
        return [variable.numpy().copy() for variable in self._everything()]

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


class PassRunner:
    """Makes steps over packed histories, pass after pass."""

    def __init__(self, model: SequenceModel, histories: Histories, generator: np.random.Generator) -> None:
        self._model, self._histories, self._generator = model, histories, generator
        packed = self._pack()
        self._packed: PackedRows | None = packed
        rows = len(packed.item_RT)
        self.rows = rows_of_step(model.size, rows)
        self.steps_per_pass = max(1, -(-rows // self.rows))
        self._step = model.step_of(self.rows)

    def go_on_from(self, generator_state: Mapping[str, Any]) -> None:
        """Continues the generator's sequence where an earlier runner stood after a whole pass."""
        self._generator.bit_generator.state = dict(generator_state)
        self._packed = None

    @property
    def generator_state(self) -> Mapping[str, Any]:
        """Where the generator stands, fit for JSON."""
        return self._generator.bit_generator.state

    def _pack(self) -> PackedRows:
        size = self._model.size
        return pack_for_training(self._histories, size.max_history, self._generator, size.targets)

    def run(self, before_step: Callable[[], float | None], after_step: Callable[[], None]) -> float:
        """Makes one pass and returns the mean loss.

        Args:
            before_step: returns the learning rate of the next step, None to end the pass.
            after_step: is called after each.

        Raises:
            FailedPrecondition: DIVERGED: the loss is no longer a number.
        """
        model, rows = self._model, self.rows
        packed, self._packed = self._packed or self._pack(), None
        order = self._generator.permutation(len(packed.item_RT))
        negatives = 0 if model.full_softmax else model.size.negatives
        losses: list[tuple[tf.Tensor, tf.Tensor]] = []
        for first in range(0, len(order), rows):
            rate = before_step()
            if rate is None:
                break
            model.learning_rate.assign(rate)
            taken = order[first : first + rows]
            negative_N = self._generator.integers(0, model.item_count, negatives, dtype=np.int32)
            losses.append(
                self._step(
                    _fixed(packed.item_RT[taken], rows),
                    _fixed(packed.kind_RT[taken], rows),
                    _fixed(packed.segment_RT[taken], rows),
                    _fixed(packed.target_RTK[taken], rows, -1),
                    tf.constant(negative_N),
                )
            )
            after_step()
        weight = sum(float(weight) for _, weight in losses)
        mean = sum(float(loss) for loss, _ in losses) / max(weight, 1e-9)
        if not np.isfinite(mean):
            raise FailedPrecondition(
                "DIVERGED", "The loss is no longer a number; lower the learning rate.", {}
            )
        return mean


def _fixed(values_RT: npt.NDArray[np.int32], rows: int, empty: int = 0) -> tf.Tensor:
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


def train(
    model: SequenceModel,
    histories: Histories,
    validate: Callable[[], float],
    on_epoch: Callable[[EpochReport], None],
    budget: Budget,
    should_stop: Callable[[], bool] = lambda: False,
    on_step: Callable[[int, int], None] = lambda _done, _all: None,
    checkpoints: Checkpoints | None = None,
) -> tuple[int, list[EpochReport]]:
    """Trains along the schedule, as long as validation improves; leaves the best averaged weights in the model.

    Args:
        model: is trained in place.
        histories: of training events alone.
        validate: returns NDCG@10 of the model as it is; called some ten times.
        on_epoch: is told of each pass.
        budget: of the time; the schedule is shortened to it once the first steps tell what a step takes.
        should_stop: ends training early, for a caller who gave up.
        on_step: is told (steps made, steps in all).
        checkpoints: where to go on from, and where to note whole passes.

    Returns:
        The best pass, 1-based, and the reports of all.
    """
    size = model.size
    runner = PassRunner(model, histories, np.random.default_rng(model.seed + 1))
    schedule = Schedule.of(size, runner.steps_per_pass)
    made, probed_at = 0, 0.0
    best, best_epoch, best_weights = -1.0, 0, model.weights()
    reports: list[EpochReport] = []
    epoch = 0
    if checkpoints is not None and (state := checkpoints.load()) is not None:
        model.restore(state.weights)
        best_weights = list(state.best_weights)
        progress = state.progress
        runner.go_on_from(progress["generator"])
        schedule = schedule.shortened(progress["steps"])
        made, epoch = progress["made"], progress["epoch"]
        best, best_epoch = progress["best"], progress["best_epoch"]
        reports = [EpochReport(**fields) for fields in progress["reports"]]
        budget.charge(progress["spent"])

    def before_step() -> float | None:
        nonlocal schedule, probed_at
        if made == _PROBE_FROM:
            probed_at = budget.spent
        if made == _PROBE_TO:
            affordable = budget.affordable_steps((budget.spent - probed_at) / (_PROBE_TO - _PROBE_FROM))
            if affordable is not None:
                schedule = schedule.shortened(made + max(affordable, 1))
        if made >= schedule.steps or should_stop() or budget.fitting_must_end():
            return None
        return size.learning_rate * schedule.rate(made)

    def after_step() -> None:
        nonlocal made
        made += 1
        if made % _AVERAGING_STEPS == 0 or made == schedule.steps:
            model.average((made - 1) // runner.steps_per_pass)
        on_step(made, schedule.steps)

    while made < schedule.steps and not (reports and _has_converged(size, schedule, epoch, best_epoch)):
        epoch += 1
        loss = runner.run(before_step, after_step)
        last = made >= schedule.steps or should_stop() or budget.fitting_must_end()
        score = float("nan")
        if last or epoch % -(-schedule.passes // _VALIDATIONS) == 0:
            with model.averaged():
                score = validate()
                if score > best:
                    best, best_epoch, best_weights = score, epoch, model.weights()
        step = int(model.step_count.numpy())
        reports.append(EpochReport(epoch, step, loss, score, budget.spent, runner.steps_per_pass))
        on_epoch(reports[-1])
        # A pass that was cut short is not noted: an uninterrupted training would not have stood there.
        if checkpoints is not None and not should_stop():
            checkpoints.save(
                TrainingState(
                    model.state(),
                    best_weights,
                    {
                        "generator": runner.generator_state,
                        "steps": schedule.steps,
                        "made": made,
                        "epoch": epoch,
                        "best": best,
                        "best_epoch": best_epoch,
                        "reports": [asdict(report) for report in reports],
                        "spent": budget.spent,
                    },
                )
            )
        if last:
            break
    model.set_weights(best_weights)
    return best_epoch, reports


def _has_converged(size: HyperParameters, schedule: Schedule, epoch: int, best_epoch: int) -> bool:
    return epoch - best_epoch >= max(size.patience, schedule.passes // 2)


def refit(
    model: SequenceModel,
    histories: Histories,
    passes: int,
    generator: np.random.Generator,
    must_end: Callable[[], bool],
    on_pass: Callable[[int, float], None],
) -> int:
    """Makes passes with more events at small, falling rates, averaged as in training; returns those begun.

    Args:
        model: trained; is refitted in place.
        must_end: asked before every step.
        on_pass: is told (passes made, mean loss).
    """
    if not passes:
        return 0
    runner = PassRunner(model, histories, generator)
    schedule = Schedule(passes * runner.steps_per_pass, runner.steps_per_pass, 0, _REFIT_RATE_SHARE)
    made = 0

    def before_step() -> float | None:
        return None if must_end() else model.size.learning_rate * schedule.rate(made)

    def after_step() -> None:
        nonlocal made
        made += 1
        if made % _AVERAGING_STEPS == 0:
            model.average(passes)

    model.start_averages()
    begun = 0
    while begun < passes and not must_end():
        begun += 1
        on_pass(begun, runner.run(before_step, after_step))
    model.average(passes)
    with model.averaged():
        weights = model.weights()
    model.set_weights(weights)
    return begun
