"""A new version beside the one in service, on events that neither has learned from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from services.trainer.pipeline.dataset import MIN_USERS, HeldOut, Histories
from services.trainer.pipeline.evaluation import Contestants, rank_by_blend, sample_rows
from services.trainer.pipeline.plan import Plan
from services.trainer.pipeline.published import (
    contestants_of,
    encode_published,
    newer_than,
    published_ndcg,
    published_slices,
)
from services.trainer.pipeline.report import Comparison, SliceReport, compare, compare_published
from shared.bundle import Bundle
from shared.ranking_metrics import Interval

# A version in service is encoded person by person, as it serves: so many are enough to compare.
COMPARED_USERS = 3_000
_NO_LEAD = Interval(0.0, 0.0, 0.0)


def compare_with_incumbent(
    incumbent: Bundle,
    histories: Histories,
    test: HeldOut,
    rank_B: npt.NDArray[np.int64],
    measures: Mapping[str, Interval],
    slices: Sequence[SliceReport],
    contestants: Contestants,
    plan: Plan,
    seed: int,
    check: Callable[[], None],
) -> Comparison:
    """Returns how the new version does against the one in service.

    The one in service was trained on every event of its day. Only events after those are a fair question to
    it; where there are too few, what both were measured at before they saw their test is compared.

    Args:
        rank_B: of the test by the new version.
        measures, slices: of the new version, on the whole test.
    """
    fresh = newer_than(incumbent, histories, test)
    fresh = fresh[sample_rows(len(fresh), COMPARED_USERS, seed)]
    if len(fresh) < MIN_USERS:
        old_interval, why_none = published_ndcg(incumbent, plan.split, plan.exclude_seen)
        if old_interval is None:
            return Comparison(incumbent.version, _NO_LEAD, len(test), False, why_none=why_none)
        return compare_published(
            incumbent.version,
            measures["ndcg@10"],
            old_interval,
            len(test),
            tuple(part for part in slices if part.user_count >= MIN_USERS),
            published_slices(incumbent, MIN_USERS),
        )
    asked = test.take(fresh)
    served = contestants_of(incumbent, histories, contestants.popularity_I, contestants.popularity_decayed_I)
    query_BD = encode_published(incumbent, histories, asked, check)
    old_rank_B = rank_by_blend(histories, asked, query_BD, served, plan.exclude_seen)
    return compare(
        histories, asked, rank_B[fresh], old_rank_B, incumbent.version,
        seed=seed, resamples=plan.resamples, confidence=plan.confidence, min_slice=MIN_USERS,
    )  # fmt: skip
