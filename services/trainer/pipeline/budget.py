"""The wall time that a run's training may take: the steps that fit, and passes that refit afterwards."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

# After measuring, passes over everything: a part of those that training needed.
_REFIT_SHARE = 0.2
# Steps get dearer when something else wants the processor; this much of the time is planned with.
_PLANNED_SHARE = 0.9


class Budget:
    """Spends seconds on fitting, so that what refitting will need is left.

    Args:
        seconds: for fitting and refitting together; measuring in between is not counted.
        refits: how often the model is refitted, 0 or more.
        clock: monotonic seconds. One that stands still never limits: such a training can be repeated.
    """

    def __init__(self, seconds: float, refits: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds, self._refits, self._clock = seconds, refits, clock
        self._spent, self._started = 0.0, None  # type: float, float | None
        self._step_seconds = 0.0

    def resume(self) -> None:
        """Counts time from here on."""
        self._started = self._clock()

    def pause(self) -> None:
        """Stops counting."""
        self._spent, self._started = self.spent, None

    def charge(self, seconds: float) -> None:
        """Counts what an earlier process spent on the same training."""
        self._spent += seconds

    @property
    def spent(self) -> float:
        """Seconds spent."""
        return self._spent + (0.0 if self._started is None else self._clock() - self._started)

    @property
    def left(self) -> float:
        """Seconds left, at least 0."""
        return max(0.0, self._seconds - self.spent)

    @property
    def fitting_left(self) -> float:
        """Seconds left for fitting, at least 0."""
        return max(0.0, self._seconds / (1 + self._refits * _REFIT_SHARE) - self.spent)

    def affordable_steps(self, seconds_of_step: float) -> int | None:
        """Returns the further steps of fitting that the time allows, None for any number."""
        self._step_seconds = seconds_of_step
        if seconds_of_step <= 0:
            return None
        return int(_PLANNED_SHARE * self.fitting_left / seconds_of_step)

    def fitting_must_end(self) -> bool:
        """Whether fitting must be cut short: the plan was too hopeful."""
        return self.fitting_left <= 0.0

    def refit_passes(self, passes: int) -> int:
        """Returns the passes of each refit after so many passes of fitting."""
        return max(1, math.ceil(_REFIT_SHARE * passes)) if self._refits else 0

    def seconds_of(self, steps: int) -> float:
        """Returns what so many steps take, about."""
        return steps * self._step_seconds

    def share_of_left(self, refit: int) -> float:
        """Returns the seconds that the refit with this number, from 0, may take: an equal part of what is left."""
        return self.left / max(1, self._refits - refit)
