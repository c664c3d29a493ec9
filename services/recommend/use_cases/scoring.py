"""Scores over the whole catalogue, by kind of question.

Every scorer returns float32 (R,), -inf where it has no opinion.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from services.recommend.domain.catalog import Mask
from services.recommend.domain.cosine import moment_vector
from services.recommend.domain.history import History, Purchases, buy_again_scores, purchases_of
from services.recommend.domain.live_counts import LiveCounts
from services.recommend.domain.recommendation import Cause, Degradation, Source
from services.recommend.domain.segment_counts import SegmentPopularity
from services.recommend.ports import CompanionScores, Float32, Model, ModelHistory
from services.recommend.use_cases.world import World

SIMILAR_COOCCURRENCE_WEIGHT = 0.5
"""Weight of log-damped co-occurrence beside the cosine, item to item."""


@dataclass(frozen=True, slots=True, eq=False)
class SecondStage:
    """What the ranker found of the best candidates of the first stage.

    Attributes:
        rows_C: rows, best of the first stage first.
        first_C: their scores before.
        outcomes_CT: calibrated probabilities of a click, a cart addition and a purchase at position 1, (C, 3).
    """

    rows_C: npt.NDArray[np.int32]
    first_C: Float32
    outcomes_CT: Float32

    def place_of(self, row: int) -> int | None:
        """Returns the place of a row by the first stage, from 0; None where it was not among them."""
        places = np.flatnonzero(self.rows_C == row)
        return int(places[0]) if len(places) else None


@dataclass(frozen=True, slots=True)
class Part:
    """What one source adds to a weighted sum.

    Attributes:
        rows: its candidates, best first.
        found_R: the source's own scores.
        scaled_R: them scaled to [0, 1] over its candidates, 0 elsewhere.
        segment: of POPULAR_IN_SEGMENT, the one that was counted.
    """

    source: Source
    weight: float
    rows: npt.NDArray[np.int32]
    found_R: Float32
    scaled_R: Float32
    segment: str = ""

    def contribution(self, row: int) -> float:
        """Returns what it adds to the score of a row."""
        return self.weight * float(self.scaled_R[row])


@dataclass(slots=True)
class Scores:
    """What a scorer found.

    Attributes:
        score_R: the score, -inf where there is none.
        sources: what it was made of.
        model_history: the history as the model read it, where one took part.
        rows_C: the only rows that have a score, ascending, where some thousands were found by search;
            None: every row that could have one has.
        query_D: the encoded history.
        log_partition: of the query, where the score was made by search.
        logits_I, companion: the parts of the blend, where it is one over all items.
        cooccurrence_I: what was counted, item to item.
        seed_indices: the model's indices of the items that the question is about.
        resembled_row: the item that content vectors were compared with; -1: none.
        purchases: of BUY_AGAIN.
        segment: the one that popularity was counted in, "" for all of the shop.
        in_segment_R: what was counted in it, (R,), 0 where nothing was.
        second: what the ranker did to `score_R`; None where none took part.
        parts: of a weighted sum, else empty.
        degraded: what it went without.
    """

    score_R: Float32
    sources: list[Source]
    model_history: ModelHistory | None = None
    rows_C: npt.NDArray[np.int32] | None = None
    query_D: Float32 | None = None
    log_partition: float = 0.0
    logits_I: Float32 | None = None
    companion: CompanionScores | None = None
    cooccurrence_I: Float32 | None = None
    seed_indices: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    resembled_row: int = -1
    purchases: Purchases | None = None
    segment: str = ""
    in_segment_R: Float32 | None = None
    parts: list[Part] = field(default_factory=list)
    second: SecondStage | None = None
    degraded: list[Degradation] = field(default_factory=list)


def popular_scores(world: World, counts: LiveCounts, now: float) -> Scores:
    """Popularity: the model's, else counted live, else the newest items of the catalogue."""
    if world.model is not None:
        return Scores(world.by_row(world.model.popularity_I), [Source.POPULAR])
    no_model = Degradation(Cause.NO_MODEL, "no model is in service; popularity is counted live")
    popularity_R = counts.popularity(world.size, now)
    if popularity_R.any():
        score_R = np.where(popularity_R > 0, popularity_R, np.float32(-np.inf))
        return Scores(score_R, [Source.POPULAR], degraded=[no_model])
    scores = Scores(newest_scores(world), [Source.NEW_ITEMS], degraded=[no_model])
    scores.degraded.append(
        Degradation(Cause.NO_POPULARITY, "no event has been seen; the newest items stand in")
    )
    return scores


SEGMENT_PRIOR_EVENTS = 50.0
"""Events that the shop's own popularity is worth beside what was counted in a segment."""


def popular_with_such(world: World, counts: LiveCounts, now: float, segments: Sequence[str]) -> Scores:
    """Popularity with shoppers of the same segment, as far as it is known; else with all.

    score_i = n_i + k p_i, n_i the decayed events of item i in the segment, p_i its share of the shop's popularity and
    k = SEGMENT_PRIOR_EVENTS: the posterior mean under a Dirichlet prior, times the events. Little is known of a small
    segment, and it then stays near the shop.
    """
    scores = popular_scores(world, counts, now)
    found = counts.popularity_in(segments, now)
    if found is None or scores.sources != [Source.POPULAR]:
        return scores
    known_R = scores.score_R > -np.inf
    total = float(scores.score_R[known_R].sum())
    in_segment_R = segment_counts(world.size, found)
    prior_R = scores.score_R * np.float32(SEGMENT_PRIOR_EVENTS / total) if total > 0 else scores.score_R
    # An item that nothing but the segment knows has no prior, and its count.
    scores.score_R = np.where(
        in_segment_R > 0, np.where(known_R, prior_R, np.float32(0)) + in_segment_R, prior_R
    )
    scores.sources = [Source.POPULAR_IN_SEGMENT, Source.POPULAR]
    scores.segment, scores.in_segment_R = found.segment, in_segment_R
    return scores


def segment_counts(size: int, found: SegmentPopularity) -> Float32:
    """Returns the counts of a segment by row, float32, (R,)."""
    in_segment_R = np.zeros(size, np.float32)
    known = found.rows < size
    in_segment_R[found.rows[known]] = found.counts[known]
    return in_segment_R


def newest_scores(world: World) -> Float32:
    """Returns the time of the last write of each described item, in days since 1970."""
    days_R = (world.catalog.numbers("update_time") / 86_400.0).astype(np.float32)
    described_R = world.catalog.flags("described")
    return np.where(described_R, np.nan_to_num(days_R, nan=0.0), np.float32(-np.inf))


EXACT_ROWS = 20_000
"""Eligible rows up to which a large catalogue's are all scored: cheaper than to search among the others too."""
_CANDIDATES = 1_000
_MOST_CANDIDATES = 20_000


def searched_scores(
    world: World,
    model: Model,
    history: History,
    popular: Callable[[], Scores],
    eligible_R: Mask,
    wanted: int,
    further_rows: npt.NDArray[np.int32],
) -> Scores:
    """As `blended_scores`, of candidates alone: those that a search finds.

    More are fetched where filters let few through; where they leave fewer than EXACT_ROWS items, or the
    candidates too few, all eligible items are scored, so that what a filter lets through is always found.

    Args:
        popular: what stands in where the model knows no event.
        eligible_R: what may be shown.
        wanted: items that must be eligible among the candidates, as long as there are so many.
        further_rows: candidates in any case: what rules would move up.
    """
    read = model.read_history(history)
    if not len(read):
        return popular()
    try:
        query_D = model.encode(read)
    except (RuntimeError, ValueError) as error:
        scores = _without_encoder(world, model, read, model.companion(read))
        scores.degraded.append(Degradation(Cause.ENCODER_SKIPPED, f"the encoder failed: {error}"))
        return scores
    eligible = int(np.count_nonzero(eligible_R))
    fetched = math.ceil(max(_CANDIDATES, 1.5 * wanted * world.size / max(eligible, 1)))
    indices_C, partition = model.candidates(query_D, read, min(fetched, _MOST_CANDIDATES))
    rows_C = model.rows_I[indices_C]
    found = int(np.count_nonzero(eligible_R[rows_C]))
    if eligible <= EXACT_ROWS or found < min(wanted, eligible):
        rows = np.flatnonzero(eligible_R).astype(np.int32)
        further_rows = np.concatenate([further_rows, rows])
    if len(further_rows):
        further = model.indices_of(further_rows)
        indices_C = np.union1d(indices_C, further[further >= 0])
        rows_C = model.rows_I[indices_C]
    score_C = model.score_candidates(query_D, read, indices_C, partition)
    score_R = np.full(world.size, -np.inf, dtype=np.float32)
    score_R[rows_C] = score_C
    return Scores(
        score_R,
        [Source.SEQUENCE, Source.COOCCURRENCE],
        model_history=read,
        rows_C=np.sort(rows_C),
        query_D=query_D,
        log_partition=partition,
    )


def blended_scores(
    world: World, model: Model, history: History, popular: Callable[[], Scores], *, may_encode: bool
) -> Scores:
    """The sequence model blended with co-occurrence; `popular` where the model knows no event."""
    read = model.read_history(history)
    if not len(read):
        return popular()
    companion = model.companion(read)
    if may_encode:
        try:
            query_D = model.encode(read)
            logits_I = model.logits(query_D)
        except (RuntimeError, ValueError) as error:
            scores = _without_encoder(world, model, read, companion)
            scores.degraded.append(Degradation(Cause.ENCODER_SKIPPED, f"the encoder failed: {error}"))
            return scores
        return Scores(
            world.by_row(model.blend(logits_I, companion)),
            [Source.SEQUENCE, Source.COOCCURRENCE],
            model_history=read,
            query_D=query_D,
            logits_I=logits_I,
            companion=companion,
        )
    scores = _without_encoder(world, model, read, companion)
    scores.degraded.append(Degradation(Cause.ENCODER_SKIPPED, "left out to keep the deadline"))
    return scores


def cosine_scores(
    world: World, model: Model, history: History, popular: Callable[[], Scores], alpha: float
) -> Scores:
    """The cosine scorer; `popular` where the model knows no event or the encoder fails."""
    read = model.read_history(history)
    if not len(read):
        return popular()
    try:
        portrait_D = model.encode(read)
    except (RuntimeError, ValueError) as error:
        scores = popular()
        scores.degraded.append(Degradation(Cause.ENCODER_SKIPPED, f"the encoder failed: {error}"))
        return scores
    moment_D = moment_vector(model.vectors(read.indices_H), history.times_N[read.places_H])
    return Scores(world.by_row(model.similarities(portrait_D, moment_D, alpha)), [Source.COSINE])


def _without_encoder(world: World, model: Model, read: ModelHistory, companion: CompanionScores) -> Scores:
    # The same blend with the popularity prior in place of the model's distribution.
    prior_I = np.log(model.popularity_I + np.float32(1e-3))
    return Scores(
        world.by_row(model.blend(prior_I, companion)),
        [Source.POPULAR, Source.COOCCURRENCE],
        model_history=read,
        companion=companion,
    )


def resembling_scores(world: World, row: int) -> Scores | None:
    """Cosine of the content vectors with one item's; None where it has none yet."""
    content = world.catalog.content
    if not content.knows(row):
        return None
    content_R = content.products(content.of(np.array([row], np.int32))[0], world.size)
    content_R = np.where(content_R > 0, content_R, np.float32(-np.inf))
    content_R[row] = -np.inf
    return Scores(content_R, [Source.CONTENT], resembled_row=row)


def similar_scores(world: World, model: Model, index: int) -> Scores:
    """Cosine of item vectors plus log-damped co-occurrence from the one item.

    Of items that the model has not learnt yet the cosine of the content vectors, where both have one.
    """
    seed = _as_history(np.array([index], np.int64))
    cooccurrence_I = model.cooccurrence(seed)
    score_I = model.cosines(index) + np.float32(SIMILAR_COOCCURRENCE_WEIGHT) * model.damped(cooccurrence_I)
    score_R = world.by_row(score_I)
    row, content = int(model.rows_I[index]), world.catalog.content
    if content.knows(row) and len(rows := content.known_of(world.unlearnt_rows)):
        score_R[rows] = content.of(rows) @ content.of(np.array([row], np.int32))[0]
    return Scores(
        score_R,
        [Source.CONTENT, Source.COOCCURRENCE],
        cooccurrence_I=cooccurrence_I,
        seed_indices=seed.indices_H,
        resembled_row=row,
    )


def together_scores(world: World, model: Model, indices: npt.NDArray[np.int64]) -> Scores:
    """Co-occurrence from all of the items alike; none where it is 0."""
    total_I = np.zeros(model.item_count, dtype=np.float32)
    for index in indices:
        total_I += model.cooccurrence(_as_history(np.array([index], np.int64)))
    score_I = np.where(total_I > 0, total_I, np.float32(-np.inf))
    return Scores(world.by_row(score_I), [Source.COOCCURRENCE], cooccurrence_I=total_I, seed_indices=indices)


def buy_again(world: World, history: History, now: float) -> Scores:
    """How much each bought item is due."""
    purchases = purchases_of(history)
    known_P = purchases.rows_P < world.size
    score_R = np.full(world.size, -np.inf, dtype=np.float32)
    score_R[purchases.rows_P[known_P]] = buy_again_scores(purchases, now)[known_P]
    return Scores(score_R, [Source.BUY_AGAIN], purchases=purchases)


def trending_scores(world: World, counts: LiveCounts, window_seconds: float, now: float) -> Scores:
    """Events within the window; none where there was no event."""
    counts_R = counts.trending(world.size, window_seconds, now)
    return Scores(np.where(counts_R > 0, counts_R, np.float32(-np.inf)), [Source.TRENDING])


def _as_history(indices: npt.NDArray[np.int64]) -> ModelHistory:
    return ModelHistory(indices, np.zeros(len(indices), np.int32), np.zeros(len(indices), np.int64))
