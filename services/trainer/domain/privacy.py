"""What a run may tell about people, and what has been told. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import Any

# Numbers that depend on nobody: a default taken from the data would tell of them.
DEFAULT_DELTA = 1e-6
MAX_DELTA = 1e-3
MAX_EPSILON = 100.0
MAX_CLIP_NORM = 1000.0
BUDGET_YEAR = timedelta(days=365)
COUNTS, GRADIENTS = "COUNTS", "GRADIENTS"
MECHANISMS = (COUNTS, GRADIENTS)
UNIT, ADJACENCY = "PERSON", "ADD_OR_REMOVE_ONE"


@dataclass(frozen=True, slots=True)
class DifferentialPrivacy:
    """What a run promises: (epsilon, delta), for the presence of one person. See the proto."""

    epsilon: float
    delta: float = DEFAULT_DELTA
    clip_norm: float = 1.0
    mechanism: str = COUNTS

    def to_json(self) -> dict[str, Any]:
        """Returns a form that `from_json` reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> DifferentialPrivacy:
        """Reads the form of `to_json`; fields of a later build are ignored."""
        return cls(**{name: fields[name] for name in cls.__dataclass_fields__ if name in fields})


@dataclass(frozen=True, slots=True)
class GaussianRelease:
    """Noisy sums over people.

    Attributes:
        noise_multiplier: standard deviation over the L2 norm of one person's share, above 0.
        sampling_rate: probability with which each person takes part, in (0, 1], drawn anew each time.
        steps: how often, at least 1.
    """

    noise_multiplier: float
    sampling_rate: float = 1.0
    steps: int = 1

    def __post_init__(self) -> None:
        if not (
            self.noise_multiplier > 0
            and math.isfinite(self.noise_multiplier)
            and 0 < self.sampling_rate <= 1
            and self.steps >= 1
        ):
            raise ValueError(f"{self} is out of range")

    def to_json(self) -> dict[str, Any]:
        """Returns the fields by name."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class PrivacyCharge:
    """One charge to the budget: what a run was going to tell, written down before it did."""

    run_id: str
    attempt: int
    model: str
    epsilon: float
    delta: float
    mechanism: str
    releases: tuple[GaussianRelease, ...]
    charged_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class PrivacyBudget:
    """The ledger: limit and spending of all models, and the charges of one, newest first."""

    epsilon_limit: float
    epsilon_spent: float
    delta: float
    charges: Sequence[PrivacyCharge]

    @property
    def epsilon_left(self) -> float:
        """What a further charge may at most cost, by basic composition."""
        return max(self.epsilon_limit - self.epsilon_spent, 0.0)
