"""The training loop: passes along a schedule and within a budget, the best averaged weights kept; and refitting."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from services.trainer.domain.hyper_parameters import HyperParameters
from services.trainer.pipeline.budget import Budget
from services.trainer.pipeline.checkpoint import Checkpoints, TrainingState
from services.trainer.pipeline.dataset import Histories
from services.trainer.pipeline.packing import PackedRows, pack_for_training
from services.trainer.pipeline.schedule import Schedule, rows_of_step
from services.trainer.pipeline.sequence_model import AVERAGING_STEPS, SequenceModel, fixed
from shared.errors import FailedPrecondition

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


@dataclass(frozen=True, slots=True, eq=False)
class PassCurve:
    """How the steps of a pass went.

    Attributes:
        loss: mean over the tokens with a target, nats.
        loss_S, rate_S: mean loss and learning rate of each step.
    """

    loss: float
    loss_S: npt.NDArray[np.float64]
    rate_S: npt.NDArray[np.float64]


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

    def run(
        self, before_step: Callable[[], float | None], after_step: Callable[[], None]
    ) -> PassCurve | None:
        """Makes one pass and returns how it went, None where it ended before its first step.

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
        rates: list[float] = []
        for first in range(0, len(order), rows):
            rate = before_step()
            if rate is None:
                break
            model.learning_rate.assign(rate)
            rates.append(rate)
            taken = order[first : first + rows]
            negative_N = self._generator.integers(0, model.item_count, negatives, dtype=np.int32)
            losses.append(
                self._step(
                    fixed(packed.item_RT[taken], rows),
                    fixed(packed.kind_RT[taken], rows),
                    fixed(packed.segment_RT[taken], rows),
                    fixed(packed.target_RTK[taken], rows, -1),
                    tf.constant(negative_N),
                )
            )
            after_step()
        if not losses:
            return None
        loss_S2 = np.array([(float(loss), float(weight)) for loss, weight in losses])
        mean = float(loss_S2[:, 0].sum() / max(loss_S2[:, 1].sum(), 1e-9))
        if not np.isfinite(mean):
            raise FailedPrecondition(
                "DIVERGED", "The loss is no longer a number; lower the learning rate.", {}
            )
        return PassCurve(mean, loss_S2[:, 0] / np.maximum(loss_S2[:, 1], 1e-9), np.array(rates))


def train(
    model: SequenceModel,
    histories: Histories,
    validate: Callable[[], float],
    on_epoch: Callable[[EpochReport], None],
    budget: Budget,
    should_stop: Callable[[], bool] = lambda: False,
    on_step: Callable[[int, int], None] = lambda _done, _all: None,
    checkpoints: Checkpoints | None = None,
    on_curve: Callable[[int, PassCurve], None] = lambda _step, _curve: None,
) -> tuple[int, list[EpochReport]]:
    """Trains along the schedule, as long as validation improves; leaves the best averaged weights in the model.

    Args:
        model: is trained in place.
        histories: of training events alone.
        validate: returns NDCG@10 of the model as it is; called some ten times.
        on_epoch: is told of each pass.
        budget: of the time; the schedule is shortened to it once the first steps tell what a step takes. A pass
            that has begun makes one step at least, and none is begun where time ran out since the last was measured.
        should_stop: ends training early, for a caller who gave up.
        on_step: is told (steps made, steps in all).
        checkpoints: where to go on from, and where to note whole passes.
        on_curve: is told (steps made by the end of a pass, how its steps went).

    Returns:
        The best pass, 1-based, and the reports of all.
    """
    size = model.size
    runner = PassRunner(model, histories, np.random.default_rng(model.seed + 1))
    schedule = Schedule.of(size, runner.steps_per_pass)
    made, probed_at = 0, 0.0
    best, best_epoch = -1.0, 0
    best_weights: list[npt.NDArray[np.float32]] = []
    reports: list[EpochReport] = []
    epoch = made_before_pass = 0
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
        out_of_time = made > made_before_pass and budget.fitting_must_end()
        if made >= schedule.steps or should_stop() or out_of_time:
            return None
        return size.learning_rate * schedule.rate(made)

    def after_step() -> None:
        nonlocal made
        made += 1
        if made % AVERAGING_STEPS == 0 or made == schedule.steps:
            model.average((made - 1) // runner.steps_per_pass)
        on_step(made, schedule.steps)

    def has_ended() -> bool:
        if made >= schedule.steps:
            return True
        if not reports:
            return False
        # Measuring, and noting the pass, take time too.
        measured = np.isfinite(reports[-1].validation_ndcg)
        return _has_converged(size, schedule, epoch, best_epoch) or (measured and budget.fitting_must_end())

    while not has_ended():
        made_before_pass = made
        curve = runner.run(before_step, after_step)
        if curve is None:
            break
        epoch += 1
        last = made >= schedule.steps or should_stop() or budget.fitting_must_end()
        score = float("nan")
        if last or epoch % -(-schedule.passes // _VALIDATIONS) == 0:
            with model.averaged():
                score = validate()
                if score > best:
                    # Freed before it is taken anew: of a large catalogue it is a tenth of the memory.
                    best, best_epoch, best_weights = score, epoch, []
                    best_weights = model.weights()
        step = int(model.step_count.numpy())
        on_curve(step, curve)
        reports.append(EpochReport(epoch, step, curve.loss, score, budget.spent, runner.steps_per_pass))
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
    if best_weights:
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
    """Makes passes with more events at small, falling rates, averaged as in training; returns those that made a step.

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
        if made % AVERAGING_STEPS == 0:
            model.average(passes)

    model.start_averages()
    begun = 0
    while begun < passes and not must_end():
        # Packing takes time too.
        if (curve := runner.run(before_step, after_step)) is None:
            break
        begun += 1
        on_pass(begun, curve.loss)
    model.average(passes)
    with model.averaged():
        weights = model.weights()
    model.set_weights(weights)
    return begun
