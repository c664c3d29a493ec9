"""What a draft rule would change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Estimate:
    """A relative change with its 95 % interval; (-1, infinity) where fewer than two shoppers were replayed."""

    change: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """What a draft does; displacements are (item id, shown before, shown after), the largest first."""

    requests_replayed: int
    requests_changed: int
    displacements: Sequence[tuple[str, int, int]]
    clicks: Estimate
    revenue: Estimate
