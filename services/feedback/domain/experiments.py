"""Experiments: what is compared, what was seen of it, and what that allows to say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import IntEnum

from services.feedback.domain.clustered import ClusteredSums
from services.feedback.domain.metrics import Interval, Metric
from services.feedback.domain.sample_ratio import (
    MISMATCH_P_VALUE,
    sample_ratio_p_value,
    sequential_sample_ratio_p_value,
)
from services.feedback.domain.sequential import difference_interval
from shared.experiments import Split, VariantShare, variant_label

DEFAULT_EXPECTED_PEOPLE = 10_000
GUARD_CONFIDENCE_LEVEL = 0.95
"""With which experiments are stopped, whatever level somebody asks reports for."""
_PER_MILLE = 1000.0
_NPS_POINTS = 100.0


class State(IntEnum):
    """Where an experiment stands; the numbers of `ExperimentState` in the contract."""

    RUNNING = 1
    STOPPED = 2


class StopCause(IntEnum):
    """Why it stopped; the numbers of `StopCause` in the contract."""

    REQUESTED = 1
    GUARD_RAIL = 2
    SAMPLE_RATIO_MISMATCH = 3


class Verdict(IntEnum):
    """What it allows to say; the numbers of `ExperimentVerdict` in the contract."""

    UNDECIDED = 1
    BETTER = 2
    WORSE = 3
    INVALID = 4


@dataclass(frozen=True, slots=True)
class GuardRail:
    """A metric that must not get worse by more than a share, in [0, 1], of the control's."""

    metric: Metric
    tolerated_loss: float


@dataclass(frozen=True, slots=True)
class Experiment:
    """A comparison of variants on one shelf.

    Attributes:
        variants: at least two, the control first.
        expected_people: when the intervals are to be at their narrowest.
        report_only: whether it is never stopped but by request.
        version: rises with every change.
    """

    experiment_id: str
    placement: str
    variants: Sequence[VariantShare]
    salt: str
    created_at: datetime
    display_name: str = ""
    traffic_fraction: float = 1.0
    primary_metric: Metric = Metric.CLICK_THROUGH_RATE
    guard_rails: Sequence[GuardRail] = ()
    expected_people: int = DEFAULT_EXPECTED_PEOPLE
    report_only: bool = False
    state: State = State.RUNNING
    stopped_at: datetime | None = None
    stop_cause: StopCause | None = None
    version: int = 1

    @property
    def split(self) -> Split:
        """Returns how it divides people."""
        return Split(self.experiment_id, self.salt, self.traffic_fraction, self.variants)

    @property
    def labels(self) -> list[str]:
        """Returns what events carry as their variant, in the order of the variants."""
        return [variant_label(self.experiment_id, variant.variant_id) for variant in self.variants]

    def same_definition(self, other: Experiment) -> bool:
        """Returns whether both ask for the same, whatever became of them."""
        return _definition(self) == _definition(other)


@dataclass(frozen=True, slots=True)
class VariantObservation:
    """What was seen of one variant: its people, and of each metric the sums over them."""

    people: int = 0
    sums: Mapping[Metric, ClusteredSums] = field(default_factory=dict)

    def of(self, metric: Metric) -> ClusteredSums:
        """Returns the sums of a metric, scaled to its unit; empty where nothing was seen."""
        sums = self.sums.get(metric, ClusteredSums())
        if metric is not Metric.REVENUE_PER_MILLE:
            return sums
        k = _PER_MILLE
        return ClusteredSums(
            sums.people, sums.earners, k * sums.x, sums.n, k * k * sums.xx, k * sums.xn, sums.nn
        )


@dataclass(frozen=True, slots=True)
class Observation:
    """What was seen of an experiment.

    Attributes:
        variants: in the experiment's order.
        currency_code: of the revenue; empty when nothing was bought.
    """

    variants: Sequence[VariantObservation]
    currency_code: str = ""


@dataclass(frozen=True, slots=True)
class Judgement:
    """What an observation allows to say.

    Attributes:
        sample_ratio_p_value: for this look alone.
        sequential_p_value: of the same question, for any number of looks.
        differences: primary metric minus the control's, by variant; None for the control and for too few people.
        broken_guard_rails: by variant.
        winner: index of the winning variant.
    """

    sample_ratio_p_value: float
    sequential_p_value: float
    differences: Sequence[Interval | None]
    broken_guard_rails: Sequence[Sequence[Metric]]
    verdict: Verdict
    winner: int | None = None

    @property
    def sample_ratio_mismatch(self) -> bool:
        """Returns whether the split is broken."""
        return self.sample_ratio_p_value < MISMATCH_P_VALUE

    @property
    def cause_to_stop(self) -> StopCause | None:
        """Returns why the experiment ought to be stopped, if it ought to.

        The sequential test decides on the split: the other, asked every minute, would sooner or later say yes.
        """
        if self.sequential_p_value < MISMATCH_P_VALUE:
            return StopCause.SAMPLE_RATIO_MISMATCH
        if any(self.broken_guard_rails):
            return StopCause.GUARD_RAIL
        return None


def judge(experiment: Experiment, observation: Observation, confidence_level: float) -> Judgement:
    """Returns what an observation allows to say, with intervals that are always valid.

    The level holds for all comparisons of the primary metric together, and for all guard rails together: each
    gets its share of alpha (Bonferroni).
    """
    variants = observation.variants
    people = [variant.people for variant in variants]
    weights = [variant.weight for variant in experiment.variants]
    control, treatments = variants[0], variants[1:]
    alpha = (1 - confidence_level) / len(treatments)
    differences: list[Interval | None] = [None]
    broken: list[list[Metric]] = [[]]
    for treatment in treatments:
        differences.append(
            difference_interval(
                treatment.of(experiment.primary_metric),
                control.of(experiment.primary_metric),
                alpha,
                experiment.expected_people,
            )
        )
        broken.append(
            [
                guard_rail.metric
                for guard_rail in experiment.guard_rails
                if _is_broken(
                    guard_rail,
                    treatment,
                    control,
                    alpha / len(experiment.guard_rails),
                    experiment.expected_people,
                )
            ]
        )
    p_value = sample_ratio_p_value(people, weights)
    sequential = sequential_sample_ratio_p_value(people, weights)
    if p_value < MISMATCH_P_VALUE:
        return Judgement(p_value, sequential, differences, broken, Verdict.INVALID)
    verdict, winner = _verdict(differences, broken)
    return Judgement(p_value, sequential, differences, broken, verdict, winner)


def _verdict(
    differences: Sequence[Interval | None], broken: Sequence[Sequence[Metric]]
) -> tuple[Verdict, int | None]:
    # A variant that breaks a guard rail has not won, whatever it gained.
    better = [
        (difference.value, index)
        for index, difference in enumerate(differences)
        if difference is not None and difference.lower > 0 and not broken[index]
    ]
    if better:
        return Verdict.BETTER, max(better)[1]
    if all(difference is not None and difference.upper < 0 for difference in differences[1:]):
        return Verdict.WORSE, None
    return Verdict.UNDECIDED, None


def _is_broken(
    guard_rail: GuardRail,
    treatment: VariantObservation,
    control: VariantObservation,
    alpha: float,
    expected_people: int,
) -> bool:
    # NPS may be negative, where a share of it would be no loss: its loss is counted in points.
    in_points = guard_rail.metric is Metric.NPS
    beyond = difference_interval(
        treatment.of(guard_rail.metric),
        control.of(guard_rail.metric),
        alpha,
        expected_people,
        control_factor=1.0 if in_points else 1.0 - guard_rail.tolerated_loss,
        offset=_NPS_POINTS * guard_rail.tolerated_loss if in_points else 0.0,
    )
    return beyond is not None and beyond.upper < 0


def _definition(experiment: Experiment) -> tuple[object, ...]:
    return (
        experiment.experiment_id,
        experiment.placement,
        tuple(experiment.variants),
        experiment.salt,
        experiment.display_name,
        experiment.traffic_fraction,
        experiment.primary_metric,
        tuple(experiment.guard_rails),
        experiment.expected_people,
        experiment.report_only,
    )
