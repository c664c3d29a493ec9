"""The sum of sources that a serving config names, each times its weight.

Sources measure in units of their own: log-probabilities, counts, days. So each is scaled over its own
candidates, the best of them 1 and the last 0, before it is weighted: a weight says how much the first item of a
source is worth beside the first of another. An item that a source does not name gets nothing from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from services.recommend.domain.catalog import Catalog, Mask, keys_of
from services.recommend.domain.history import History
from services.recommend.domain.live_counts import LiveCounts
from services.recommend.domain.ranking import top_rows
from services.recommend.domain.recommendation import Cause, Degradation
from services.recommend.domain.source import Source, SourceWeight
from services.recommend.ports import Float32, Model, ModelHistory
from services.recommend.use_cases.scoring import (
    Part,
    Scores,
    buy_again,
    cosine_scores,
    newest_scores,
    popular_scores,
    popular_with_such,
    segment_counts,
    trending_scores,
)
from services.recommend.use_cases.world import World

_TRENDING_SECONDS = 86_400.0
_CONTENT_EVENTS = 10
_CONTENT_DECAY = 0.8
_KNOWN_SHARE = 0.5
"""Share of the described items that must have a content vector for vectors to be gone by."""
_WIDEST_SHARE = 0.5
"""Share of the catalogue above which a value that items have in common says nothing."""


@dataclass(frozen=True, slots=True)
class Asking:
    """What every source is asked with."""

    world: World
    history: History
    segments: Sequence[str]
    counts: LiveCounts
    now: float
    alpha: float
    may_encode: bool


def weighted_sum(asking: Asking, weights: Sequence[SourceWeight], eligible_R: Mask) -> Scores:
    """Returns the scores; popularity where no source names an item that may be shown.

    Args:
        weights: the sources and what they count.
        eligible_R: what may be shown: a source's candidates are its best among these.
    """
    world = asking.world
    model = world.model
    read = None if model is None else model.read_history(asking.history)
    degraded: list[Degradation] = []
    parts: list[Part] = []
    score_R = np.full(world.size, -np.inf, dtype=np.float32)
    for entry in weights:
        segment = ""
        if entry.source is Source.POPULAR_IN_SEGMENT:
            found_R, segment = _popular_in_segment(asking)
        else:
            found_R = _found(asking, read, entry, degraded)
        rows = top_rows(found_R, eligible_R, entry.candidate_limit)
        scaled_R = np.zeros(world.size, np.float32)
        if len(rows):
            best, last = float(found_R[rows[0]]), float(found_R[rows[-1]])
            scaled_R[rows] = (found_R[rows] - last) / (best - last) if best > last else 1.0
        parts.append(Part(entry.source, entry.weight, rows, found_R, scaled_R, segment))
        score_R[rows] = np.maximum(score_R[rows], 0.0)
        score_R[rows] += np.float32(entry.weight) * scaled_R[rows]
    if not (score_R > -np.inf).any():
        scores = popular_with_such(world, asking.counts, asking.now, asking.segments)
        scores.degraded += degraded
        return scores
    return Scores(
        score_R,
        [entry.source for entry in weights],
        parts=parts,
        segment=next((part.segment for part in parts if part.segment), ""),
        degraded=degraded,
    )


def content_scores(catalog: Catalog, history: History) -> Float32:
    """Returns how much each item resembles the newest items of a history, (R,), -inf where not at all.

    sum over the events of 0.8^age * cosine of the content vectors, where most items have one; else by what they have
    in common in the catalogue. Either way an item that no model knows yet has a score as soon as it is described.
    """
    content = catalog.content
    rows_N = content.known_of(history.rows_N[-_CONTENT_EVENTS:])
    if not len(rows_N) or content.count < _KNOWN_SHARE * catalog.described_count:
        return common_scores(catalog, history)
    age_N = np.arange(len(rows_N))[::-1].astype(np.float32)
    query_D = (np.float32(_CONTENT_DECAY) ** age_N @ content.of(rows_N)).astype(np.float32)
    score_R = content.products(query_D, catalog.size)
    # What they have done already resembles itself most of all, and is no find.
    newest = history.rows_N[-_CONTENT_EVENTS:]
    score_R[newest[newest < catalog.size]] = -np.inf
    return np.where(score_R > 0, score_R, np.float32(-np.inf))


def common_scores(catalog: Catalog, history: History) -> Float32:
    """Returns how much each item has in common with the newest items of a history, (R,), -inf where nothing.

    sum over the events of 0.8^age * sum over the values that both items have (category, brand, tag, text
    attribute) of log(R / items that have it): what few items share counts most.
    """
    score_R = np.zeros(catalog.size, np.float32)
    described = max(1, catalog.described_count)
    rows_N = history.rows_N[-_CONTENT_EVENTS:]
    for age, row in enumerate(reversed(rows_N.tolist())):
        item = catalog.items.get(row)
        if item is None:
            continue
        for key in keys_of(item):
            posting = catalog.posting(key)
            if posting.values is None and len(posting.rows) <= max(1, _WIDEST_SHARE * described):
                score_R[posting.rows] += np.float32(
                    _CONTENT_DECAY**age * np.log(1 + described / len(posting.rows))
                )
    # What they have done already resembles itself most of all, and is no find.
    score_R[rows_N[rows_N < catalog.size]] = 0
    return np.where(score_R > 0, score_R, np.float32(-np.inf))


def _popular_in_segment(asking: Asking) -> tuple[Float32, str]:
    """Returns what was counted in the shopper's segment, (R,), -inf where nothing, and the segment."""
    found = asking.counts.popularity_in(asking.segments, asking.now)
    if found is None:
        return np.full(asking.world.size, -np.inf, dtype=np.float32), ""
    counts_R = segment_counts(asking.world.size, found)
    return np.where(counts_R > 0, counts_R, np.float32(-np.inf)), found.segment


def _found(
    asking: Asking, read: ModelHistory | None, entry: SourceWeight, degraded: list[Degradation]
) -> Float32:
    world, model = asking.world, asking.world.model
    nothing_R = np.full(world.size, -np.inf, dtype=np.float32)
    match entry.source:
        case Source.CONTENT:
            return content_scores(world.catalog, asking.history)
        case Source.BUY_AGAIN:
            return buy_again(world, asking.history, asking.now).score_R
        case Source.TRENDING:
            return trending_scores(world, asking.counts, _TRENDING_SECONDS, asking.now).score_R
        case Source.NEW_ITEMS:
            nothing_R[world.unlearnt_rows] = newest_scores(world)[world.unlearnt_rows]
            return nothing_R
        case Source.POPULAR:
            return popular_scores(world, asking.counts, asking.now).score_R
    if model is None or read is None or not len(read):
        return nothing_R
    if entry.source is Source.COOCCURRENCE:
        counted_I = model.cooccurrence(read)
        return world.by_row(np.where(counted_I > 0, counted_I, np.float32(-np.inf)))
    if not asking.may_encode:
        degraded.append(Degradation(Cause.ENCODER_SKIPPED, "left out to keep the deadline"))
        return nothing_R
    if entry.source is Source.COSINE:

        def popular() -> Scores:
            return popular_scores(world, asking.counts, asking.now)

        scores = cosine_scores(world, model, asking.history, popular, asking.alpha)
        if scores.degraded:
            degraded.extend(scores.degraded)
            return nothing_R
        return scores.score_R
    try:
        query_D = model.encode(read)
    except (RuntimeError, ValueError) as error:
        degraded.append(Degradation(Cause.ENCODER_SKIPPED, f"the encoder failed: {error}"))
        return nothing_R
    return _sequence(world, model, read, query_D, entry.candidate_limit)


def _sequence(world: World, model: Model, read: ModelHistory, query_D: Float32, limit: int) -> Float32:
    if not model.is_searched:
        return world.by_row(model.logits(query_D))
    indices_C: npt.NDArray[np.int64] = model.candidates(query_D, read, 2 * limit)[0]
    found_R = np.full(world.size, -np.inf, dtype=np.float32)
    found_R[model.rows_I[indices_C]] = model.candidate_logits(query_D[None], indices_C)[0]
    return found_R
