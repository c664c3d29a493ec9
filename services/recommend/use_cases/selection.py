"""From scores to a page: tiers, each used up before the next begins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from services.recommend.domain.catalog import Mask
from services.recommend.domain.ranking import (
    determinantal_point_process,
    maximal_marginal_relevance,
    top_rows,
)
from services.recommend.domain.recommendation import Source
from services.recommend.domain.serving_config import DiversityAlgorithm
from services.recommend.ports import Float32, Model

Rows = npt.NDArray[np.int32]

REORDERINGS = {
    DiversityAlgorithm.MMR: maximal_marginal_relevance,
    DiversityAlgorithm.DPP: determinantal_point_process,
}


@dataclass(frozen=True, slots=True)
class Tier:
    """One list of candidates.

    Attributes:
        source: what its items are called in reasons.
        score_R: -inf where the tier has no opinion.
        eligible_R: what may be taken.
        order_R: what the order is made of, where rules shift the scores.
        rows_C: the only rows that have a score, ascending; None: any may.
    """

    source: Source
    score_R: Float32
    eligible_R: Mask
    order_R: Float32 | None = None
    rows_C: Rows | None = None


@dataclass(frozen=True, slots=True)
class Selection:
    """A page: K rows, best first.

    Attributes:
        tiers_K: the tier of each item, int32.
        has_more: something is left for a next page.
    """

    rows_K: Rows
    scores_K: Float32
    tiers_K: npt.NDArray[np.int32]
    has_more: bool

    def first(self, count: int) -> Selection:
        """Returns the first `count` items."""
        if len(self.rows_K) <= count:
            return self
        return Selection(self.rows_K[:count], self.scores_K[:count], self.tiers_K[:count], True)


def select(
    tiers: Sequence[Callable[[], Tier]],
    count: int,
    model: Model | None,
    strength: float,
    depth: int,
    further: int = 0,
    algorithm: DiversityAlgorithm = DiversityAlgorithm.MMR,
) -> Selection:
    """Returns the best `count` items, tier after tier; the first tier alone is diversified.

    Items of a later tier continue the scores downwards by whole numbers: tiers measure in units of
    their own, and the order is that of the page.

    Args:
        further: how many items behind the page are wanted too; they do not change the page.
    """
    rows_K = np.empty(0, dtype=np.int32)
    scores_K = np.empty(0, dtype=np.float32)
    tiers_K = np.empty(0, dtype=np.int32)
    for number, make_tier in enumerate(tiers):
        wanted = count + further - len(rows_K)
        tier = make_tier()
        order_R = tier.score_R if tier.order_R is None else tier.order_R
        eligible_R = tier.eligible_R
        if len(rows_K):
            eligible_R = eligible_R.copy()
            eligible_R[rows_K] = False
        if wanted == 0:
            if len(top_rows(order_R, eligible_R, 1, tier.rows_C)):
                return Selection(rows_K, scores_K, tiers_K, True)
            continue
        diversify = number == 0 and strength > 0 and model is not None
        # One more than wanted tells whether there is a next page.
        rows = top_rows(order_R, eligible_R, max(wanted + 1, depth if diversify else 0), tier.rows_C)
        more = len(rows) > wanted
        if diversify and model is not None:
            near = rows[: max(count + 1, depth)]
            vectors_CD = model.unit_vectors(model.indices_of(near))
            reorder = REORDERINGS[algorithm]
            order = reorder(order_R[near], vectors_CD, strength, min(wanted, len(near)))
            rows = np.concatenate([near[order], rows[len(near) :]])
        rows = rows[:wanted]
        scores = tier.score_R[rows]
        if number and len(scores_K):
            scores = scores_K.min() - np.arange(1, len(rows) + 1, dtype=np.float32)
        rows_K = np.concatenate([rows_K, rows])
        scores_K = np.concatenate([scores_K, scores.astype(np.float32)])
        tiers_K = np.concatenate([tiers_K, np.full(len(rows), number, np.int32)])
        if more:
            return Selection(rows_K, scores_K, tiers_K, True)
    return Selection(rows_K, scores_K, tiers_K, False)
