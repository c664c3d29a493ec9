"""Why an item is recommended to a shopper, and why not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from services.recommend.domain.ranking import top_rows
from services.recommend.domain.recommendation import (
    Explanation,
    Query,
    Reason,
    SecondStageScore,
    Source,
    SourceScore,
    Verdict,
)
from services.recommend.ports import Float32
from services.recommend.use_cases.ranking import Ranking
from services.recommend.use_cases.recommender import Recommender
from services.recommend.use_cases.selection import REORDERINGS
from services.recommend.use_cases.stages.explain import reasons_of
from shared.errors import NotFound

_FINDING_OF_VERDICT = {
    Verdict.NOT_IN_CATALOG: "the catalogue does not describe it",
    Verdict.WITHDRAWN: "the shop has withdrawn or deleted it",
    Verdict.OUT_OF_STOCK: "it is sold out",
    Verdict.NOT_AVAILABLE_NOW: "it is not for sale at this time",
    Verdict.EXCLUDED: "the request excludes it",
    Verdict.IN_CART: "it is in the cart",
    Verdict.OWNED: "the shopper has bought it, and this placement leaves such out",
    Verdict.FILTER_EXPRESSION: "the filter expression is false for it",
    Verdict.CONTEXT_ITEM: "it is the item that the request is about",
    Verdict.SEEN: "the shopper has seen it already, and this placement shows such items after all others",
    Verdict.RULE: "a merchandising rule leaves it out",
    Verdict.NO_SCORE: "no source has a score for it: the model has not learnt it yet",
}


class Explainer:
    """Runs a request as `Recommender` does, and looks at one item on the way."""

    def __init__(self, recommender: Recommender) -> None:
        self._recommender = recommender

    def explain(self, query: Query, item_id: str, budget_seconds: float) -> Explanation:
        """Returns how the item fared in the answer to the query.

        Raises:
            NotFound: ITEM_NOT_FOUND: neither catalogue nor model knows the item; and as `answer`.
            InvalidInput: as `answer`.
        """
        ranking = self._recommender.rank(query.as_explained(), budget_seconds)
        world, selection, scores = ranking.world, ranking.selection, ranking.scores
        row = world.index.row_of(item_id)
        if row is None or row >= world.size or not (world.knows(row) or scores.score_R[row] > -np.inf):
            raise NotFound(
                "ITEM_NOT_FOUND",
                "Neither the catalogue nor the model in service knows this item; upsert it first.",
                {"itemId": item_id},
            )
        answer = self._recommender.assemble(ranking)
        places = np.flatnonzero(selection.rows_K == row)
        tier = int(selection.tiers_K[places[0]]) if len(places) else 0
        scored = bool(scores.score_R[row] > -np.inf) or tier > 0
        verdicts = ranking.eligibility.verdicts(row, scored=scored)
        by_score = _rank(scores.score_R, ranking.eligibility.eligible_R, row)
        position = int(places[0]) + 1 if len(places) else self._later_position(ranking, row)
        score = float(selection.scores_K[places[0]]) if len(places) else float(scores.score_R[row])
        threshold = float(selection.scores_K[-1]) if len(selection.scores_K) else 0.0
        reasons: list[Reason] = []
        if scored:
            rows, tiers = np.array([row], np.int32), np.array([tier], np.int32)
            reasons = reasons_of(ranking, rows, tiers)[0]
        explanation = Explanation(
            recommended=bool(len(places)),
            position=position,
            position_by_score=by_score,
            score=score if np.isfinite(score) else 0.0,
            page_threshold_score=threshold,
            source_scores=_source_scores(ranking, row),
            verdicts=verdicts,
            reasons=reasons,
            findings=(),
            answer=answer,
            rule_ids=ranking.plan.rules_of(row) if ranking.plan is not None else (),
            second_stage=_second_stage(ranking, row),
        )
        return replace(explanation, findings=_findings(explanation, len(selection.rows_K)))

    @staticmethod
    def _later_position(ranking: Ranking, row: int) -> int:
        """Returns the position beyond the first page: 0 where the item is not in the order."""
        scores, model = ranking.scores, ranking.world.model
        unseen_R, seen_R = ranking.eligibility.split_by_seen()
        if place := _rank(scores.score_R if ranking.order_R is None else ranking.order_R, seen_R, row):
            # Behind everything that the model scores, and everything that it has not learnt yet.
            return int(np.count_nonzero(unseen_R)) + place
        order_R = scores.score_R if ranking.order_R is None else ranking.order_R
        place = _rank(order_R, unseen_R, row)
        depth = ranking.config.diversity_depth
        if not place or ranking.strength <= 0 or model is None or place > depth:
            return place
        rows = top_rows(order_R, unseen_R, depth)
        vectors_CD = model.unit_vectors(model.indices_of(rows))
        reorder = REORDERINGS[ranking.config.diversity_algorithm]
        order = reorder(order_R[rows], vectors_CD, ranking.strength, len(rows))
        return int(np.flatnonzero(rows[order] == row)[0]) + 1


def _rank(score_R: Float32, eligible_R: npt.NDArray[np.bool_], row: int) -> int:
    """Returns the row's place by score among the eligible, from 1; 0 where it is not among them."""
    if not eligible_R[row] or not score_R[row] > -np.inf:
        return 0
    better = np.count_nonzero(eligible_R & (score_R > score_R[row]))
    equal = np.count_nonzero(eligible_R[:row] & (score_R[:row] == score_R[row]))
    return int(better + equal) + 1


def _second_stage(ranking: Ranking, row: int) -> SecondStageScore | None:
    """Returns what the ranker did to an item; None where it did nothing."""
    second = ranking.scores.second
    place = None if second is None else second.place_of(row)
    if second is None or place is None:
        return None
    score_C = ranking.scores.score_R[second.rows_C]
    click, cart, purchase = second.outcomes_CT[place].tolist()
    offset = ranking.query.page.offset
    position = offset + 1 + int(np.count_nonzero(score_C > score_C[place]))
    return SecondStageScore(float(second.first_C[place]), offset + place + 1, position, click, cart, purchase)


def _first_score(ranking: Ranking, row: int) -> float:
    """Returns the score that the sources make, before the second stage."""
    second = ranking.scores.second
    place = None if second is None else second.place_of(row)
    if second is None or place is None:
        return float(ranking.scores.score_R[row])
    return float(second.first_C[place])


def _source_scores(ranking: Ranking, row: int) -> list[SourceScore]:
    world, scores = ranking.world, ranking.scores
    model = world.model
    found: list[SourceScore] = []
    if scores.parts:
        for part in scores.parts:
            if (value := float(part.found_R[row])) > -np.inf:
                rank = int(np.count_nonzero(part.found_R > part.found_R[row])) + 1
                found.append(SourceScore(part.source, value, part.contribution(row), rank))
        return found
    if scores.in_segment_R is not None:
        whole, counted = float(scores.score_R[row]), float(scores.in_segment_R[row])
        if counted > 0:
            rank = int(np.count_nonzero(scores.in_segment_R > counted)) + 1
            found.append(SourceScore(Source.POPULAR_IN_SEGMENT, counted, counted, rank))
        if whole > counted:
            prior_R = scores.score_R - scores.in_segment_R
            rank = int(np.count_nonzero(prior_R > prior_R[row])) + 1
            found.append(SourceScore(Source.POPULAR, whole - counted, whole - counted, rank))
        return found
    index = -1 if model is None else int(model.indices_of(np.array([row], np.int32))[0])
    if model is not None and index >= 0:
        companion, cooccurrence_I = scores.companion, scores.cooccurrence_I
        if companion is not None:
            counted = float(companion.counted_I[index])
            content_I = companion.content_I
            if scores.logits_I is not None:
                alone = _first_score(ranking, row) - counted
                alone -= 0.0 if content_I is None else float(content_I[index])
                found.append(_entry(Source.SEQUENCE, scores.logits_I, index, alone))
            found.append(_entry(Source.COOCCURRENCE, companion.cooccurrence_I, index, counted))
            if content_I is not None:
                found.append(_entry(Source.CONTENT, content_I, index, float(content_I[index])))
        elif cooccurrence_I is not None:
            whole, c = float(scores.score_R[row]), float(cooccurrence_I[index])
            if Source.CONTENT in scores.sources:
                cosine_I = model.cosines(int(scores.seed_indices[0]))
                found.append(_entry(Source.CONTENT, cosine_I, index, float(cosine_I[index])))
                whole -= float(cosine_I[index])
            if c > 0:
                found.append(_entry(Source.COOCCURRENCE, cooccurrence_I, index, whole))
        popularity = float(model.popularity_I[index])
        counts = popularity if scores.sources == [Source.POPULAR] else 0.0
        found.append(_entry(Source.POPULAR, model.popularity_I, index, counts))
        if scores.sources == [Source.COSINE]:
            similarity_I = scores.score_R[model.rows_I]
            found.append(_entry(Source.COSINE, similarity_I, index, float(similarity_I[index])))
    elif scores.score_R[row] > -np.inf:
        rank = int(np.count_nonzero(scores.score_R > scores.score_R[row])) + 1
        value = float(scores.score_R[row])
        found.append(SourceScore(scores.sources[0], value, value, rank))
    return found


def _entry(source: Source, values_I: Float32, index: int, contribution: float) -> SourceScore:
    rank = int(np.count_nonzero(values_I > values_I[index])) + 1
    return SourceScore(source, float(values_I[index]), contribution, rank)


def _findings(explanation: Explanation, page_size: int) -> list[str]:
    findings = []
    against = [verdict for verdict in explanation.verdicts if verdict is not Verdict.PASSED]
    if explanation.recommended:
        findings.append(f"Recommended, at position {explanation.position} of {page_size}.")
    elif against:
        findings += [f"Not recommended: {_FINDING_OF_VERDICT[verdict]}." for verdict in against]
        if explanation.source_scores and Verdict.NO_SCORE not in against:
            findings.append(
                f"Its score would have been {explanation.score:.4g}; the page ends at "
                f"{explanation.page_threshold_score:.4g}."
            )
    else:
        findings.append(
            f"Not on the page, though nothing speaks against it: its score of {explanation.score:.4g} puts it "
            f"at position {explanation.position}, and the page of {page_size} ends at "
            f"{explanation.page_threshold_score:.4g}."
        )
    if explanation.position and explanation.position_by_score not in (0, explanation.position):
        findings.append(
            f"By score alone it would be at position {explanation.position_by_score}; "
            f"{'rules or ' if explanation.rule_ids else ''}diversity moved it to {explanation.position}."
        )
    if explanation.rule_ids:
        findings.append(f"Rules that moved or removed it: {', '.join(explanation.rule_ids)}.")
    if second := explanation.second_stage:
        findings.append(
            f"The second stage expects a click with {second.click_probability:.2%}, a cart addition with "
            f"{second.cart_probability:.2%} and a purchase with {second.purchase_probability:.2%}: position "
            f"{second.first_stage_position} by the first stage became {second.position}."
        )
    findings += [f"{reason.text} (adds {reason.contribution:.3g})." for reason in explanation.reasons]
    return findings
