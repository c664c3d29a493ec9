"""What a training is asked to do, and what comes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from services.trainer.pipeline.dataset import (
    Cleaning,
    HeldOut,
    Histories,
    Split,
    leave_one_out,
    split_by_time,
)
from services.trainer.pipeline.gate import Verdict
from services.trainer.pipeline.report import Report
from shared.errors import FailedPrecondition


@dataclass(frozen=True, slots=True)
class Plan:
    """What a training is asked to do, beside its size.

    Attributes:
        cleaning: who and what takes part.
        exclude_seen: leave seen items out of rankings.
        refit: train on with the held-out events: with those of validation before measuring, with all before
            serving. Without it no weight ever learned from a held-out event.
        force: promote whatever the gate says.
        max_test_users, resamples, confidence: of the evaluation.
        max_size_bytes: of the version.
        split: "leave_one_out" or "global_time".
        full_ladder: measure every baseline; else those that take about a second.
        answer_everyone: rank also for those whose last event is no fair test or was not drawn for it.
        frozen_counts: rank also with the counts of the training events alone.
        answered_after_all: people, by their number in the events, who are not tested but answered after all that they did.
    """

    cleaning: Cleaning = field(default_factory=Cleaning)
    exclude_seen: bool = True
    refit: bool = True
    force: bool = False
    max_test_users: int = 20_000
    resamples: int = 1000
    confidence: float = 0.95
    max_size_bytes: int = 4_000_000_000
    split: str = "leave_one_out"
    full_ladder: bool = False
    answer_everyone: bool = False
    frozen_counts: bool = False
    answered_after_all: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True, eq=False)
class TrainedModel:
    """Everything that `shared.bundle.write_bundle` needs, and what came of it.

    Attributes:
        best_B20: the blend's answers to the held-out events, item indices, -1 where there are fewer.
        tested: those events; of everybody, where everyone is answered.
        frozen_rank_B: ranks of the test by the blend with the counts of the training events alone, where asked for.
        histories: all of the data.
    """

    arrays: dict[str, npt.NDArray[Any]]
    vocabulary: Sequence[str]
    encoder_bytes: bytes
    manifest_fields: dict[str, Any]
    attachments: dict[str, bytes]
    verdict: Verdict
    report: Report
    best_B20: npt.NDArray[np.int32]
    tested: HeldOut
    histories: Histories
    frozen_rank_B: npt.NDArray[np.int64] | None = None


def split_of(histories: Histories, plan: Plan) -> Split:
    """Returns the split of the plan.

    Raises:
        FailedPrecondition: TOO_LITTLE_DATA: it holds out next to nothing.
    """
    make = split_by_time if plan.split == "global_time" else leave_one_out
    split = make(histories, plan.exclude_seen)
    fewest = min(len(split.validation), len(split.test))
    if fewest < 5:
        raise FailedPrecondition(
            "TOO_LITTLE_DATA",
            f"Too little data: only {fewest} events can be held out, one a person, on items that are new to them. "
            "Record more events, or set evaluation.exclude_seen to false if people here buy the same again.",
        )
    return split
