"""The second stage: the best of the first, in the order of what the shopper is expected to do with them."""

from __future__ import annotations

import numpy as np

from services.recommend.domain.ranking import top_rows
from services.recommend.domain.recommendation import Cause, Degradation
from services.recommend.domain.serving_config import Scorer
from services.recommend.use_cases.ranking import PERSONAL, Ranking
from services.recommend.use_cases.scoring import SecondStage

_SECOND_STAGE_SECONDS = 0.001


def rank_again(ranking: Ranking) -> int:
    """Replaces the scores of the best candidates by the ranker's; returns of how many.

    The candidates keep the lowest of their scores, and stand above it by the logarithm of what they are expected to be
    worth: so they stay ahead of all others, and rules and diversity find scores of the unit that they know.
    """
    world, config, scores, query = ranking.world, ranking.config, ranking.scores, ranking.query
    model = world.model
    if model is None or not model.has_ranker or not config.ranks_again or query.kind not in PERSONAL:
        return 0
    read = scores.model_history
    # What was scored otherwise is not what the ranker was taught with.
    if config.scorer is not Scorer.BLENDED or read is None or scores.query_D is None:
        return 0
    if ranking.remaining() <= _SECOND_STAGE_SECONDS:
        ranking.degraded.append(Degradation(Cause.RANKER_SKIPPED, "left out to keep the deadline"))
        return 0
    unseen_R, _ = ranking.eligibility.split_by_seen()
    rows_C = top_rows(scores.score_R, unseen_R, config.ranker_depth, scores.rows_C)
    if len(rows_C) < 2:
        return 0
    first_C = scores.score_R[rows_C]
    outcomes_CT = model.outcomes(
        ranking.history,
        read,
        ranking.now,
        model.indices_of(rows_C),
        first_C,
        query.page.offset + np.arange(1, len(rows_C) + 1),
        None if scores.companion is None else scores.companion.cooccurrence_I,
    )
    worth_T = config.outcome_weights or model.outcome_weights
    log_worth_C = np.log(np.maximum(outcomes_CT @ np.array(worth_T, np.float32), np.float32(1e-20)))
    if not np.isfinite(log_worth_C).all():
        ranking.degraded.append(Degradation(Cause.RANKER_SKIPPED, "it found values that are no numbers"))
        return 0
    scores.score_R[rows_C] = first_C[-1] + (log_worth_C - log_worth_C.min())
    scores.second = SecondStage(rows_C, first_C, outcomes_CT)
    return len(rows_C)
