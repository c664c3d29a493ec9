"""One request on its way through the pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from services.recommend.domain.history import NO_HISTORY, History
from services.recommend.domain.recommendation import (
    Degradation,
    Freshness,
    ListKind,
    Query,
    Reason,
    Stage,
)
from services.recommend.domain.serving_config import PlacementPolicy, ServingConfig
from services.recommend.ports import Clock, Float32
from services.recommend.use_cases.configs import Configuration
from services.recommend.use_cases.eligibility import Eligibility
from services.recommend.use_cases.rules import RulePlan
from services.recommend.use_cases.scoring import Scores
from services.recommend.use_cases.selection import Selection, Tier
from services.recommend.use_cases.world import World

PERSONAL = (ListKind.RECOMMEND, ListKind.CART)
"""Lists that follow from the shopper's history, in which what they have seen comes after all else."""

MAX_PAGED_ITEMS = 1_000
"""Items after which there is no further page: nobody pages so far, and the token grows with them."""

BEHIND_THE_PAGE = 200
"""Candidates behind the page from which rules and exploration choose."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What answers that are to agree are made from."""

    world: World
    configuration: Configuration


@dataclass(slots=True)
class Ranking:
    """One request on its way: what every stage has found so far."""

    query: Query
    world: World
    config: ServingConfig
    policy: PlacementPolicy
    now: float
    deadline: float
    clock: Clock
    history: History = NO_HISTORY
    segments: Sequence[str] = ()
    degraded: list[Degradation] = field(default_factory=list)
    stages: list[Stage] = field(default_factory=list)
    timings: list[tuple[str, float]] = field(default_factory=list)
    freshness: Freshness = field(default_factory=Freshness)
    scores: Scores = field(init=False)
    eligibility: Eligibility = field(init=False)
    tiers: list[Tier] = field(default_factory=list)
    selection: Selection = field(init=False)
    strength: float = 0.0
    reasons: Sequence[Sequence[Reason]] = ()
    plan: RulePlan | None = None
    order_R: Float32 | None = None
    seed: int = 0
    explored: frozenset[int] = frozenset()
    propensities_K: Float32 | None = None

    def remaining(self) -> float:
        """Returns the seconds that are left."""
        return self.deadline - self.clock.monotonic()

    def mark(self, name: str, since: float, before: int, after: int, detail: str = "") -> float:
        """Notes that a stage ended now, having begun at `since`; returns now."""
        now = self.clock.monotonic()
        self.timings.append((name, now - since))
        if self.query.traced:
            self.stages.append(Stage(name, now - since, before, after, detail))
        return now
