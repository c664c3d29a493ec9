"""How many steps a training makes, and the learning rate of each. Pure.

The rate rises linearly, then falls along half a cosine (Loshchilov & Hutter, 2017) to a small share of its peak;
the last steps, at the smallest rates, are where a good part of the quality comes from. So the number of steps is
known before the rate begins to fall, and a training that must be shorter falls faster instead of being cut off.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from services.trainer.domain.hyper_parameters import HyperParameters

# Passes that a large log needs, and steps that a small one needs: its passes are short.
_PASSES, _STEPS = 20, 1200
_FINAL_SHARE = 0.02
_LONGEST_WARMUP_SHARE = 0.1
# A step of fewer packed rows is noisier, and there are more of them: a small log is split into so many at least.
_STEPS_OF_PASS, _FEWEST_ROWS = 16, 4


@dataclass(frozen=True, slots=True)
class Schedule:
    """Steps of a training.

    Attributes:
        steps: in all.
        steps_per_pass: of one pass over the data.
        warmup_steps: of the rising rate.
        first_share, final_share: of the peak rate, after the warm-up and at the end.
    """

    steps: int
    steps_per_pass: int
    warmup_steps: int
    first_share: float = 1.0
    final_share: float = _FINAL_SHARE

    @classmethod
    def of(cls, size: HyperParameters, steps_per_pass: int) -> Schedule:
        """Returns the schedule of a full training."""
        passes = min(size.max_epochs, max(_PASSES, math.ceil(_STEPS / max(steps_per_pass, 1))))
        return cls(passes * steps_per_pass, steps_per_pass, size.warmup_steps).shortened(
            passes * steps_per_pass
        )

    @property
    def passes(self) -> int:
        """Passes begun."""
        return math.ceil(self.steps / max(self.steps_per_pass, 1))

    def shortened(self, steps: int) -> Schedule:
        """Returns the schedule with at most so many steps, and a warm-up that fits them."""
        steps = max(1, min(self.steps, steps))
        return replace(
            self, steps=steps, warmup_steps=min(self.warmup_steps, int(_LONGEST_WARMUP_SHARE * steps))
        )

    def rate(self, step: int) -> float:
        """Returns the share of the peak learning rate at a step, 0 for the first."""
        if step < self.warmup_steps:
            return self.first_share * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        falling = 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
        return self.final_share + (self.first_share - self.final_share) * falling


def rows_of_step(size: HyperParameters, rows_of_pass: int) -> int:
    """Returns the packed rows of a step: those of the size, fewer where a pass would be too few steps."""
    return max(1, min(size.rows_per_step, max(_FEWEST_ROWS, rows_of_pass // _STEPS_OF_PASS)))
