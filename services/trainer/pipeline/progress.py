"""What a training tells of itself while it runs, and how it hears that it shall stop."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from services.trainer.pipeline.budget import Budget
from services.trainer.pipeline.event_log import Scalars
from shared.errors import Cancelled

if TYPE_CHECKING:
    from services.trainer.pipeline.training import EpochReport

_SECONDS_BETWEEN_STEPS = 5.0
_EXPORT_SECONDS = 6.0

Reporter = Callable[..., None]


class Progress:
    """Reports stages, steps and passes with the seconds that are left.

    Args:
        report: called with stage, message, and optionally step, epoch, loss, metrics, remaining_seconds.
        should_stop: asked often; true ends the run.
        scalars: is told the curves.
        budget: of the time for training.
        cells: (person, item) pairs that will be ranked.
        extra_seconds: of the evaluation, for what else is compared.
    """

    def __init__(
        self,
        report: Reporter,
        should_stop: Callable[[], bool],
        scalars: Scalars,
        budget: Budget,
        cells: int,
        extra_seconds: float,
    ) -> None:
        self.report, self.should_stop, self.scalars = report, should_stop, scalars
        self._budget = budget
        # Ranking with every contestant, scores and sorting, on one core.
        self._evaluation_seconds = 2.0 + 2.5e-7 * cells + extra_seconds
        self._steps_per_pass = 0
        self._told_at = time.monotonic()

    def check(self) -> None:
        """Ends the run where it shall stop.

        Raises:
            Cancelled: it shall.
        """
        if self.should_stop():
            raise Cancelled("CANCELLED", "The run was cancelled.")

    @property
    def seconds_left_fitting(self) -> float:
        """Seconds until the end of the run, about, while the model is fitted."""
        return self._budget.left + self._evaluation_seconds + _EXPORT_SECONDS

    def seconds_left_refitting(self, passes: int, evaluated: bool) -> float:
        """Seconds until the end, about, with so many passes of refitting to come."""
        return (
            min(self._budget.seconds_of(passes * self._steps_per_pass), self._budget.left)
            + _EXPORT_SECONDS
            + (0.0 if evaluated else self._evaluation_seconds)
        )

    def fitting(self, stage: str, message: str, extra_seconds: float = 0.0) -> None:
        """Reports a stage before or while fitting."""
        self.report(stage, message, remaining_seconds=self.seconds_left_fitting + extra_seconds)

    def on_step(self, done: int, steps: int) -> None:
        """Reports a step now and then."""
        if done < steps and time.monotonic() - self._told_at >= _SECONDS_BETWEEN_STEPS:
            self._told_at = time.monotonic()
            left = self._budget.fitting_left
            fitting = min(self._budget.seconds_of(steps - done), left) or left
            self.report(
                "TRAINING",
                f"Step {done} of {steps}.",
                remaining_seconds=self.seconds_left_fitting - left + fitting,
            )

    def on_epoch(self, epoch: EpochReport, max_epochs: int) -> None:
        """Reports a pass."""
        self._told_at = time.monotonic()
        self._steps_per_pass = epoch.steps_per_epoch
        measured = bool(np.isfinite(epoch.validation_ndcg))
        metrics = {"ndcg@10": epoch.validation_ndcg} if measured else {}
        curves = {f"pass/validation {name}": value for name, value in metrics.items()}
        self.scalars(epoch.step, {"pass/loss": epoch.loss, **curves})
        found = f", validation NDCG@10 {epoch.validation_ndcg:.4f}" if measured else ""
        self.report(
            "TRAINING",
            f"Pass {epoch.epoch}: loss {epoch.loss:.3f}{found}.",
            step=epoch.step,
            epoch=epoch.epoch,
            max_epochs=max_epochs,
            loss=epoch.loss,
            metrics=metrics,
            remaining_seconds=self.seconds_left_fitting,
        )

    def on_refit(self, what: str, step: int, loss: float, made: int, passes: int, evaluated: bool) -> None:
        """Reports a pass of refitting with more events."""
        self.check()
        self.scalars(step, {"refit/loss": loss})
        to_come = passes - made + (0 if evaluated else passes)
        self.report(
            "REFITTING",
            f"Pass {made} of {passes} with {what} too.",
            step=step,
            loss=loss,
            remaining_seconds=self.seconds_left_refitting(to_come, evaluated),
        )
