"""The wall time that a run's training may take: passes that fit, and passes that refit afterwards."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

# After measuring, passes over everything: a part of those that training needed.
_REFIT_SHARE = 0.2
# Before the first pass has ended nobody knows what one costs; this much of the time it may take.
_FIRST_PASS_SHARE = 0.7


class Budget:
    """Spends seconds on fitting, so that what refitting will need is left.

    Args:
        seconds: for fitting and refitting together; measuring in between is not counted.
        refits: how often the model is refitted, 0 or more.
        clock: monotonic seconds.
    """

    def __init__(self, seconds: float, refits: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds, self._refits, self._clock = seconds, refits, clock
        self._spent, self._started = 0.0, None  # type: float, float | None
        self._pass_seconds = 0.0

    def resume(self) -> None:
        """Counts time from here on."""
        self._started = self._clock()

    def pause(self) -> None:
        """Stops counting."""
        self._spent, self._started = self.spent, None

    @property
    def spent(self) -> float:
        """Seconds spent."""
        return self._spent + (0.0 if self._started is None else self._clock() - self._started)

    @property
    def left(self) -> float:
        """Seconds left, at least 0."""
        return max(0.0, self._seconds - self.spent)

    def refit_passes(self, epochs: int) -> int:
        """Returns the passes of each refit after so many passes of fitting."""
        return max(1, math.ceil(_REFIT_SHARE * epochs)) if self._refits else 0

    def pass_ended(self, seconds: float) -> None:
        """Learns what a pass costs; the newest is believed."""
        self._pass_seconds = seconds

    def refit_seconds(self, epochs: int) -> float:
        """Returns what all refits after so many passes will take, about."""
        return self._refits * self.refit_passes(epochs) * self._pass_seconds

    def allows_pass(self, epochs: int) -> bool:
        """Whether another pass after `epochs`, and its refits, would end in time."""
        return self._pass_seconds + self.refit_seconds(epochs + 1) <= self.left

    def pass_must_end(self) -> bool:
        """Whether the running pass must be cut short."""
        if self._pass_seconds == 0.0 and self._refits:
            return self.spent > _FIRST_PASS_SHARE * self._seconds
        return self.left <= 0.0

    def share_of_left(self, refit: int) -> float:
        """Returns the seconds that the refit with this number, from 0, may take: an equal part of what is left."""
        return self.left / max(1, self._refits - refit)
