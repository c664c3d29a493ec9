"""A published version measured anew, beside baselines that are counted on the spot. NumPy and LiteRT, no TensorFlow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from services.trainer.domain.hyper_parameters import HyperParameters
from services.trainer.pipeline.baselines import item_item_baselines
from services.trainer.pipeline.dataset import MIN_USERS, EventColumns, HeldOut, clean, require_enough
from services.trainer.pipeline.describing import describe_report
from services.trainer.pipeline.evaluation import (
    Neighbours,
    choose_half_life,
    climb_ladder,
    popularity,
    sample_rows,
)
from services.trainer.pipeline.plan import Plan, split_of
from services.trainer.pipeline.published import contestants_of, encode_published, index_in, newer_than
from services.trainer.pipeline.report import report_of
from shared.bundle import Bundle

Reporter = Callable[..., None]


def evaluate_version(
    bundle: Bundle,
    events: EventColumns,
    plan: Plan,
    *,
    seed: int,
    report: Reporter,
    check: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Returns the measures of a version on a split of the log, in the manifest's form.

    A version has seen every event of its day. Where at least MIN_USERS held-out events are newer, only those are
    asked; else all are, and the protocol says that the numbers flatter it. The baselines never see a tested event.

    Args:
        check: called often; raises to end the evaluation.

    Raises:
        FailedPrecondition: TOO_LITTLE_DATA.
    """
    report("PREPARING", f"Cleaning {len(events):,} events.")
    histories = clean(events, plan.cleaning)
    require_enough(histories)
    split = split_of(histories, plan)
    test, caveat = fair_questions(bundle, split.test, newer_than(bundle, histories, split.test))
    test = test.take(sample_rows(len(test), plan.max_test_users, seed))
    check()
    report("COUNTING", "Counting the baselines.")
    training, before_test = histories.first(split.training_U), histories.first(split.before_test_U)
    exclude = plan.exclude_seen
    half_life_days = choose_half_life(histories, split.validation, training, exclude)
    window = HyperParameters().cooccurrence_window
    validation = split.validation.take(sample_rows(len(split.validation), 3_000, seed))
    neighbours: dict[str, Neighbours] = item_item_baselines(
        histories, training, before_test, validation, window, exclude, plan.full_ladder
    )
    check()
    report("EVALUATING", f"Ranking {histories.item_count:,} items for {len(test):,} people.")
    contestants = contestants_of(
        bundle, histories, popularity(before_test), popularity(before_test, half_life_days), neighbours
    )
    query_BD = encode_published(bundle, histories, test, check)
    climb = climb_ladder(histories, test, query_BD, contestants, exclude, lambda _done, _all: check())
    unknown = int((index_in(bundle, histories) < 0).sum())
    protocol = (
        f"{split.words}. Every item competes, items seen before {'excluded' if exclude else 'included'}. {caveat} "
        f"{unknown:,} of {histories.item_count:,} items are unknown to the version"
    )
    measured = report_of(
        histories, test, climb, contestants.item_vectors_ID,
        seed=seed, protocol=protocol, resamples=plan.resamples, confidence=plan.confidence,
    )  # fmt: skip
    blend = measured.ladder[0].metrics
    report(
        "EVALUATING",
        f"HR@10 {blend['hr@10'].value:.4f}, NDCG@10 {blend['ndcg@10'].value:.4f}.",
        metrics={name: interval.value for name, interval in blend.items()},
        remaining_seconds=0.0,
    )
    return {**describe_report(measured, exclude, split=plan.split), "version": bundle.version}


def fair_questions(bundle: Bundle, test: HeldOut, fresh: npt.NDArray[np.int64]) -> tuple[HeldOut, str]:
    """Returns the held-out events to ask a version about, and what must be said of them."""
    if len(fresh) >= MIN_USERS:
        return test.take(fresh), (
            f"Only events newer than anything that version {bundle.version} was trained on."
        )
    return test, (
        f"CAUTION: {len(test) - len(fresh):,} of {len(test):,} held-out events are not newer than version "
        f"{bundle.version}, which may have been trained on them: its numbers flatter it."
    )
