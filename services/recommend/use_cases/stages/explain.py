"""The reasons of the page: those of the scores, and those of the shop."""

from __future__ import annotations

import numpy as np

from services.recommend.domain.recommendation import Cause, Degradation, Reason, ReasonKind, Source
from services.recommend.use_cases.ranking import Ranking
from services.recommend.use_cases.reasons import reasons_for

_EXPLANATION_SECONDS = 0.005


def explain_page(ranking: Ranking) -> None:
    """Puts the reasons of the page into the ranking, as far as the deadline allows."""
    selection = ranking.selection
    if ranking.remaining() < _EXPLANATION_SECONDS:
        ranking.degraded.append(
            Degradation(Cause.DEADLINE_EXPLANATIONS_SKIPPED, "left out to keep the deadline")
        )
        return
    ranking.reasons = reasons_of(ranking, selection.rows_K, selection.tiers_K)


def reasons_of(ranking: Ranking, rows_K: np.ndarray, tiers_K: np.ndarray) -> list[list[Reason]]:
    """Returns the reasons of rows, each of a tier of the ranking."""
    tiers = ranking.tiers
    values_K = np.array(
        [tiers[tier].score_R[row] for row, tier in zip(rows_K, tiers_K, strict=True)], dtype=np.float32
    )
    sources_K = [tiers[tier].source for tier in tiers_K]
    parts = ranking.scores.parts
    if parts:
        # Of a weighted sum the source that adds most is the reason.
        for k in np.flatnonzero(tiers_K == 0).tolist():
            strongest = max(parts, key=lambda part: part.contribution(int(rows_K[k])))
            sources_K[k] = strongest.source
            values_K[k] = strongest.contribution(int(rows_K[k]))
    if ranking.scores.model_history is not None and ranking.scores.logits_I is None:
        # The prior that stood in for the encoder is no count.
        sources_K = [Source.COOCCURRENCE if tier == 0 else tiers[tier].source for tier in tiers_K]
    found = reasons_for(ranking.world, ranking.scores, ranking.history, rows_K, sources_K, values_K)
    if ranking.plan is None and not ranking.explored:
        return found
    return [
        [*_reasons_of_shop(ranking, int(row)), *reasons] for row, reasons in zip(rows_K, found, strict=True)
    ]


def _reasons_of_shop(ranking: Ranking, row: int) -> list[Reason]:
    """Returns what rules and exploration did for an item; it comes before what the item itself did."""
    if row in ranking.explored:
        return [Reason(ReasonKind.EXPLORATION, "Shown to learn how it does")]
    if ranking.plan is None:
        return []
    contributions = ranking.plan.contributions(row)
    return [
        Reason(ReasonKind.RULE, "Chosen by the shop", contribution=added, rule_id=rule_id)
        for rule_id, added in contributions.items()
    ]
