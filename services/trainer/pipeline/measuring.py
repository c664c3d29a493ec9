"""The finished model on the test: the ladder, what else was asked for, and the version in service."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from services.trainer.pipeline import card
from services.trainer.pipeline.answering import best_items
from services.trainer.pipeline.baselines import item_item_baselines
from services.trainer.pipeline.blend import Blend, Terms
from services.trainer.pipeline.comparing import compare_with_incumbent
from services.trainer.pipeline.dataset import HeldOut, everyone
from services.trainer.pipeline.describing import is_simulated
from services.trainer.pipeline.evaluation import (
    BLEND,
    FOUNDING,
    Contestants,
    climb_ladder,
    popularity,
    rank_by_blend,
)
from services.trainer.pipeline.memory import trim
from services.trainer.pipeline.plan import Plan
from services.trainer.pipeline.preparing import Counted, Prepared
from services.trainer.pipeline.report import Comparison, Report, report_of
from shared.bundle import Bundle

if TYPE_CHECKING:
    from services.trainer.pipeline.sequence_model import SequenceModel


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """What the test gave.

    Attributes:
        report: the ladder and the rest of the card.
        comparison: with the version in service; None without one.
        frozen_rank_B: see `TrainedModel`.
        best_B20, answered: the blend's answers, and to which events.
        label: SIMULATION where the shop is one.
    """

    report: Report
    comparison: Comparison | None
    frozen_rank_B: npt.NDArray[np.int64] | None
    best_B20: npt.NDArray[np.int32]
    answered: HeldOut
    label: str


def measure(
    model: SequenceModel,
    blend: Blend,
    training_terms: list[Terms],
    counted: Counted,
    prepared: Prepared,
    plan: Plan,
    attributes_of: Mapping[str, Sequence[str]],
    incumbent: Bundle | None,
    seed: int,
    check: Callable[[], None],
    say: Callable[[str], None],
) -> Measured:
    """Ranks the test by every contestant.

    Args:
        training_terms: those of the training events, alone in a list, which is emptied: they are not held twice for long.
        check: called often; raises to stop.
        say: is told what begins.
    """
    histories, test, exclude = prepared.histories, prepared.test, plan.exclude_seen
    training, before_test = prepared.training, prepared.before_test
    query_BD = model.encode(histories, test)
    popularity_I = popularity(before_test)

    def contestants_with(terms: Terms, **others: object) -> Contestants:
        return Contestants(
            model.item_vectors(),
            blend.item_bias(terms),
            blend.companion(terms),
            popularity_I,
            terms.popularity_I,
            **others,  # type: ignore[arg-type]
        )

    frozen_rank_B = None
    if plan.frozen_counts:
        frozen = contestants_with(training_terms[0])
        frozen_rank_B = rank_by_blend(histories, test, query_BD, frozen, exclude)
        del frozen
    training_terms.clear()
    trim()
    check()
    say("Counting the baselines.")
    neighbours = item_item_baselines(
        histories, training, before_test, prepared.validation, prepared.size.cooccurrence_window, exclude, plan.full_ladder
    )  # fmt: skip
    check()
    factors = {}
    if plan.full_ladder:
        say("Training the founding model.")
        from services.trainer.pipeline.founding_model import train_founding_model

        factors[FOUNDING] = train_founding_model(
            training, before_test, histories, prepared.validation, test, exclude, seed, check
        )
    say(f"Ranking {histories.item_count:,} items for {len(test):,} people by every contestant.")
    # Counts are no weights: like the histories, they are up to date when the test is taken.
    contestants = contestants_with(counted.with_validation(), neighbours=neighbours, factors=factors)
    climb = climb_ladder(histories, test, query_BD, contestants, exclude, lambda _done, _all: check())
    # What only ranked beside it has done so.
    contestants = replace(contestants, neighbours={}, factors={})
    del neighbours, factors
    trim()
    best_B20, answered = climb.best_B20, test
    if plan.answer_everyone:
        answered = everyone(histories, prepared.answered_after_all_U)
        say(f"Answering {len(answered):,} people.")
        best_B20 = best_items(
            histories, answered, model.encode(histories, answered), contestants, exclude, check=check
        )
    check()
    label = card.SIMULATION if is_simulated(histories, attributes_of) else ""
    seen = "excluded" if exclude else "included"
    protocol = f"{prepared.split.words}. Every item competes, those seen before {seen}"
    report = report_of(
        histories, test, climb, contestants.item_vectors_ID,
        seed=seed, protocol=f"{label}: {protocol}" if label else protocol, resamples=plan.resamples, confidence=plan.confidence,
    )  # fmt: skip
    comparison = None
    if incumbent is not None:
        comparison = compare_with_incumbent(
            incumbent, histories, test, climb.ranks[BLEND], report.ladder[0].metrics, report.slices, contestants, plan,
            seed, check,
        )  # fmt: skip
    return Measured(report, comparison, frozen_rank_B, best_B20, answered, label)
