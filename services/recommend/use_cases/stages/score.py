"""What each item is worth: the scorer that kind of question and serving config ask for."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from services.recommend.domain.live_counts import LiveCounts
from services.recommend.domain.recommendation import Cause, Degradation, ListKind, Source
from services.recommend.domain.serving_config import Scorer
from services.recommend.ports import Model
from services.recommend.use_cases.eligibility import rows_of
from services.recommend.use_cases.ranking import BEHIND_THE_PAGE, Ranking
from services.recommend.use_cases.scoring import (
    Scores,
    blended_scores,
    buy_again,
    cosine_scores,
    popular_scores,
    popular_with_such,
    resembling_scores,
    searched_scores,
    similar_scores,
    together_scores,
    trending_scores,
)
from services.recommend.use_cases.weighted_sum import Asking, weighted_sum
from shared.errors import NotFound

_ENCODE_SECONDS = 0.002
_MOST_MOVED = 50_000
"""Items that rules add to what a search finds in a large catalogue."""


class Scoring:
    """Scores the catalogue for one request.

    Args:
        counts: what is popular now.
    """

    def __init__(self, counts: LiveCounts) -> None:
        self._counts = counts

    def score(self, ranking: Ranking) -> Scores:
        """Returns the scores; raises NotFound: ITEM_NOT_FOUND for SIMILAR."""
        world, query, history, now = ranking.world, ranking.query, ranking.history, ranking.now
        model = world.model
        popular = partial(popular_with_such, world, self._counts, now, ranking.segments)
        match query.kind:
            case ListKind.TRENDING:
                return trending_scores(world, self._counts, query.window_seconds, now)
            case ListKind.BUY_AGAIN:
                return buy_again(world, history, now)
            case ListKind.SIMILAR:
                return self._similar(ranking, query.item_ids[0])
            case ListKind.TOGETHER:
                if model is None:
                    nothing_R = np.full(world.size, -np.inf, dtype=np.float32)
                    missing = Degradation(Cause.NO_MODEL, "no model is in service; nothing is known together")
                    return Scores(nothing_R, [Source.COOCCURRENCE], degraded=[missing])
                indices = model.indices_of(rows_of(world, query.item_ids))
                return together_scores(world, model, np.unique(indices[indices >= 0]))
        if ranking.config.scorer is Scorer.WEIGHTED_SUM:
            may_encode = ranking.remaining() > _ENCODE_SECONDS
            asking = Asking(
                world, history, ranking.segments, self._counts, now, ranking.config.cosine_alpha, may_encode
            )
            return weighted_sum(asking, ranking.config.sources, ranking.eligibility.eligible_R)
        if ranking.config.scorer is Scorer.ITEM_TO_ITEM and model is not None and len(history):
            indices_N = model.indices_of(history.rows_N)
            known = np.flatnonzero(indices_N >= 0)
            if len(known):
                return similar_scores(world, model, int(indices_N[known[-1]]))
        if ranking.config.scorer is Scorer.COSINE and model is not None and len(history):
            return cosine_scores(world, model, history, popular, ranking.config.cosine_alpha)
        if ranking.config.scorer is Scorer.BLENDED and model is not None and len(history):
            may_encode = ranking.remaining() > _ENCODE_SECONDS
            # A trace shows every item's place, and takes the time that a pass over all takes.
            if model.is_searched and may_encode and not query.traced:
                return self._searched(ranking, model, popular)
            return blended_scores(world, model, history, popular, may_encode=may_encode)
        if ranking.config.scorer is Scorer.POPULARITY:
            return popular_scores(world, self._counts, now)
        return popular()

    def _searched(self, ranking: Ranking, model: Model, popular: Callable[[], Scores]) -> Scores:
        query, plan = ranking.query, ranking.plan
        count = query.page_size or ranking.policy.default_page_size
        wanted = query.page.offset + max(count, ranking.config.diversity_depth) + BEHIND_THE_PAGE
        moved_R = np.zeros(ranking.world.size, dtype=np.bool_)
        if plan is not None:
            # What a rule moves up, or wants a share of, may be far from what a search would find.
            for _, mask_R, amount in plan.shifts:
                if amount > 0:
                    moved_R |= mask_R
            for _, mask_R, _ in plan.shares:
                moved_R |= mask_R
        return searched_scores(
            ranking.world,
            model,
            ranking.history,
            popular,
            ranking.eligibility.eligible_R,
            wanted,
            np.flatnonzero(moved_R & ranking.eligibility.eligible_R).astype(np.int32)[:_MOST_MOVED],
        )

    def _similar(self, ranking: Ranking, item_id: str) -> Scores:
        world = ranking.world
        row = world.index.row_of(item_id)
        if row is None or row >= world.size or not world.knows(row):
            raise NotFound(
                "ITEM_NOT_FOUND",
                "Neither the catalogue nor the model in service knows this item; upsert it first.",
                {"itemId": item_id},
            )
        model = world.model
        index = -1 if model is None else int(model.indices_of(np.array([row], np.int32))[0])
        if model is not None and index >= 0:
            return similar_scores(world, model, index)
        newer = Degradation(Cause.ITEM_UNKNOWN_TO_MODEL, "the item is newer than the model in service")
        scores = resembling_scores(world, row) or Scores(
            np.full(world.size, -np.inf, np.float32), [Source.CONTENT]
        )
        if (scores.score_R[ranking.eligibility.eligible_R] > -np.inf).any():
            if model is not None:
                scores.degraded.append(newer)
            return scores
        scores = popular_scores(world, self._counts, ranking.now)
        category = world.catalog.category_of(row)
        if category:
            peers = world.catalog.posting(("category", category)).rows
            peers = peers[scores.score_R[peers] > -np.inf]
            if len(peers):
                in_category_R = np.full(world.size, -np.inf, dtype=np.float32)
                in_category_R[peers] = scores.score_R[peers]
                scores.score_R = in_category_R
        if model is not None:
            scores.degraded.append(newer)
        return scores
