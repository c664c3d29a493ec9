"""The ladder: what is served and every baseline, ranked on the same held-out events. NumPy only.

B = held-out events, I = items, D = dimension. Rankings are full. `report` turns ranks into measures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from services.trainer.pipeline.answering import top_items
from services.trainer.pipeline.batch_companion import BatchCompanion, Neighbours
from services.trainer.pipeline.dataset import HeldOut, Histories
from shared.bundle.manifest import ScoringParameters
from shared.bundle.scoring import Companion, CooccurrenceMatrix, blended_scores, log_partition
from shared.ranking_metrics import (
    coverage_at_k,
    hits_of_rank,
    ndcg_at_k,
    rank_of_target,
)

Float32 = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]

BLEND, TRANSFORMER, COOCCURRENCE = "blend", "transformer", "cooccurrence"
EASE, ITEM_KNN, FOUNDING = "ease", "item_knn", "founding"
POPULARITY, POPULARITY_DECAYED = "popularity", "popularity_decayed"
QUERY_DECAY_GRID = (0.3, 0.6065, 0.85, 1.0)
HALF_LIFE_DAYS_GRID = (7.0, 30.0, 90.0, 365.0)

# Scores held at once, in cells of four bytes: bounds memory whatever the catalogue's size. The blend holds some fifteen times
# as much while it is learned.
_CHUNK_CELLS = 2_000_000
_COVERAGE_USERS = 5_000
_DAY_MICROSECONDS = 86_400e6


@dataclass(frozen=True, slots=True, eq=False)
class Contestants:
    """Everything that ranks.

    Attributes:
        item_vectors_ID, item_bias_I, companion: the served model.
        popularity_I, popularity_decayed_I: counts of events.
        neighbours: other item-item models, by name.
        factors: other (query_BD, vectors_ID) models, by name.
        known_I: items that the served model knows; None for all.
    """

    item_vectors_ID: Float32
    item_bias_I: Float32
    companion: Companion
    popularity_I: Float32
    popularity_decayed_I: Float32
    neighbours: Mapping[str, Neighbours] = field(default_factory=dict)
    factors: Mapping[str, tuple[Float32, Float32]] = field(default_factory=dict)
    known_I: npt.NDArray[np.bool_] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Climb:
    """What ranking by every contestant gave.

    Attributes:
        ranks: of the held-out items, (B,), by contestant.
        top: the best 10 items of the first people, (some, 10), by contestant.
        coverage: share of the items among those, by contestant.
        best_B20: the blend's best 20 items of everybody, -1 where there are fewer.
        probability_B20: what the blend takes the probability of each to be.
    """

    ranks: Mapping[str, Int64]
    top: Mapping[str, Int32]
    coverage: Mapping[str, float]
    best_B20: Int32
    probability_B20: Float32


def popularity(histories: Histories, half_life_days: float | None = None) -> Float32:
    """Returns events by item, (I,), each counting half for every half-life before the newest event."""
    weight_E = None
    if half_life_days is not None and len(histories.time_E):
        age_E = (histories.time_E.max() - histories.time_E) / _DAY_MICROSECONDS
        weight_E = np.exp2(-age_E / half_life_days)
    return np.bincount(histories.item_E, weight_E, minlength=histories.item_count).astype(np.float32)


def popularity_bias(popularity_I: Float32, mu: float) -> Float32:
    """Returns the prior b_i = mu * log(1 + popularity_i), (I,): the item bias that is served."""
    return (np.float32(mu) * np.log1p(popularity_I)).astype(np.float32)


def sample_rows(count: int, limit: int, seed: int) -> Int64:
    """Returns at most `limit` of `count` rows, ascending, by the seed."""
    if count <= limit:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, limit, replace=False))


def chunks(
    histories: Histories, held_out: HeldOut, exclude_seen: bool
) -> Iterator[tuple[slice, HeldOut, list[Int64], npt.NDArray[np.bool_] | None]]:
    """Yields rows, their events, their histories, and what must not be ranked."""
    rows_of_chunk = max(1, _CHUNK_CELLS // max(histories.item_count, 1))
    for first in range(0, len(held_out), rows_of_chunk):
        rows = slice(first, min(first + rows_of_chunk, len(held_out)))
        part = held_out.take(np.arange(rows.start, rows.stop))
        seen = [part.prefix(histories, row)[0].astype(np.int64) for row in range(len(part))]
        excluded_BI = None
        if exclude_seen:
            excluded_BI = np.zeros((len(part), histories.item_count), bool)
            excluded_BI[
                np.repeat(np.arange(len(part)), [len(items) for items in seen]), np.concatenate(seen)
            ] = True
            excluded_BI[np.arange(len(part)), part.target_B] = False
        yield rows, part, seen, excluded_BI


def ndcg_at_10(rank_B: Int64) -> npt.NDArray[np.float64]:
    """Returns NDCG@10 of one relevant item at each rank."""
    return ndcg_at_k(hits_of_rank(rank_B, 10), np.ones(len(rank_B), np.int64), 10)


def rank_by_query(
    histories: Histories, held_out: HeldOut, query_BD: Float32, item_vectors_ID: Float32, exclude_seen: bool
) -> Int64:
    """Returns the rank of each held-out item by the Transformer alone, (B,)."""
    rank_B = np.empty(len(held_out), np.int64)
    for rows, part, _seen, excluded_BI in chunks(histories, held_out, exclude_seen):
        rank_B[rows] = rank_of_target(query_BD[rows] @ item_vectors_ID.T, part.target_B, excluded_BI)
    return rank_B


def rank_by_neighbours(
    histories: Histories, held_out: HeldOut, neighbours: Neighbours, exclude_seen: bool
) -> Int64:
    """Returns the rank of each held-out item by an item-item model alone, (B,)."""
    rank_B = np.empty(len(held_out), np.int64)
    for rows, part, seen, excluded_BI in chunks(histories, held_out, exclude_seen):
        rank_B[rows] = rank_of_target(neighbours.scores(seen), part.target_B, excluded_BI)
    return rank_B


def rank_by_blend(
    histories: Histories,
    held_out: HeldOut,
    query_BD: Float32,
    contestants: Contestants,
    exclude_seen: bool,
) -> Int64:
    """Returns the rank of each held-out item by what is served, (B,)."""
    companion = BatchCompanion(contestants.companion, contestants.known_I)
    rank_B = np.empty(len(held_out), np.int64)
    for rows, part, seen, excluded_BI in chunks(histories, held_out, exclude_seen):
        logits_BI = served_logits(contestants, query_BD[rows] @ contestants.item_vectors_ID.T)
        score_BI = blended_scores(logits_BI, companion.added(seen, companion.forward(seen)))
        rank_B[rows] = rank_of_target(score_BI, part.target_B, excluded_BI)
    return rank_B


def rank_by_fixed_scores(
    histories: Histories, held_out: HeldOut, score_I: Float32, exclude_seen: bool
) -> Int64:
    """Returns the rank of each held-out item by one score of an item, the same for all, (B,).

    Everybody's ranking is one order less what they have seen: no row of scores is needed.
    """
    place_I = np.empty(len(score_I), np.int64)
    place_I[np.argsort(-score_I, kind="stable")] = np.arange(len(score_I))
    rank_B = 1 + place_I[held_out.target_B]
    if exclude_seen:
        row_P, item_P = _distinct_seen(histories, held_out)
        before_P = place_I[item_P] < place_I[held_out.target_B[row_P]]
        rank_B -= np.bincount(row_P[before_P], minlength=len(held_out))
    return rank_B


def _distinct_seen(histories: Histories, held_out: HeldOut) -> tuple[Int64, Int64]:
    """Returns (row, item) of every item before a held-out event, each once."""
    pairs = [
        np.unique(held_out.prefix(histories, row)[0].astype(np.int64)) + row * histories.item_count
        for row in range(len(held_out))
    ]
    pair_P = np.concatenate(pairs) if pairs else np.zeros(0, np.int64)
    return pair_P // max(histories.item_count, 1), pair_P % max(histories.item_count, 1)


def choose_half_life(
    histories: Histories, validation: HeldOut, training: Histories, exclude_seen: bool
) -> float:
    """Returns the half-life in days whose popularity ranks the validation events best."""

    def quality(days: float) -> float:
        rank_B = rank_by_fixed_scores(histories, validation, popularity(training, days), exclude_seen)
        return float(ndcg_at_10(rank_B).mean())

    return max(HALF_LIFE_DAYS_GRID, key=quality)


def choose_query_decay(
    histories: Histories, validation: HeldOut, matrix: CooccurrenceMatrix, window: int, exclude_seen: bool
) -> Neighbours:
    """Returns the item-item model with the recency that ranks the validation events best."""
    base = Neighbours.of(matrix, ScoringParameters(1.0, window=window))

    def with_decay(decay: float) -> Neighbours:
        return replace(base, scoring=replace(base.scoring, query_decay=decay))

    def quality(decay: float) -> float:
        return float(
            ndcg_at_10(rank_by_neighbours(histories, validation, with_decay(decay), exclude_seen)).mean()
        )

    return with_decay(max(QUERY_DECAY_GRID, key=quality))


def served_logits(contestants: Contestants, product_BI: Float32) -> Float32:
    """Returns the served logits, (B, I), of products of query and item vectors."""
    return np.float32(contestants.companion.scoring.sequence) * product_BI + contestants.item_bias_I


def climb_ladder(
    histories: Histories,
    held_out: HeldOut,
    query_BD: Float32,
    contestants: Contestants,
    exclude_seen: bool,
    on_chunk: Callable[[int, int], None] = lambda _done, _all: None,
) -> Climb:
    """Ranks by every contestant; see `Climb`. `on_chunk` is told (people done, people in all)."""
    names = (BLEND, TRANSFORMER, COOCCURRENCE, *contestants.neighbours, *contestants.factors)
    ranks = {name: np.empty(len(held_out), np.int64) for name in names}
    top: dict[str, list[Int32]] = {name: [] for name in names}
    best_B20 = np.full((len(held_out), 20), -1, np.int32)
    probability_B20 = np.zeros((len(held_out), 20), np.float32)
    companion = BatchCompanion(contestants.companion, contestants.known_I)
    # Where nothing was counted, the more popular goes first, whatever its place in the catalogue.
    order_I = contestants.popularity_I.argsort().argsort()
    tie_break_I = (1e-6 * (order_I + 1) / max(len(order_I), 1)).astype(np.float32)

    def place(name: str, rows: slice, part: HeldOut, score_BI: Float32, excluded_BI: object) -> None:
        ranks[name][rows] = rank_of_target(score_BI, part.target_B, excluded_BI)  # type: ignore[arg-type]
        if name == BLEND:
            allowed_BI = score_BI if excluded_BI is None else np.where(excluded_BI, -np.inf, score_BI)  # type: ignore[call-overload]
            best_BK = top_items(allowed_BI, 20)
            best_B20[rows, : best_BK.shape[1]] = best_BK
            probability_B20[rows, : best_BK.shape[1]] = np.exp(
                np.take_along_axis(allowed_BI, best_BK, axis=1) - log_partition(allowed_BI)[:, None]
            )
        if rows.start < _COVERAGE_USERS:
            if name == BLEND:
                top[name].append(best_B20[rows, :10])
            else:
                allowed_BI = score_BI if excluded_BI is None else np.where(excluded_BI, -np.inf, score_BI)  # type: ignore[call-overload]
                top[name].append(_padded(top_items(allowed_BI, 10), 10))

    for rows, part, seen, excluded_BI in chunks(histories, held_out, exclude_seen):
        logits_BI = query_BD[rows] @ contestants.item_vectors_ID.T
        c_BI = companion.forward(seen)
        served_BI = blended_scores(served_logits(contestants, logits_BI), companion.added(seen, c_BI))
        place(BLEND, rows, part, served_BI, excluded_BI)
        place(TRANSFORMER, rows, part, logits_BI, excluded_BI)
        place(COOCCURRENCE, rows, part, c_BI + tie_break_I, excluded_BI)
        for name, neighbours in contestants.neighbours.items():
            place(name, rows, part, neighbours.scores(seen) + tie_break_I, excluded_BI)
        for name, (factor_BD, vectors_ID) in contestants.factors.items():
            place(name, rows, part, factor_BD[rows] @ vectors_ID.T, excluded_BI)
        on_chunk(rows.stop, len(held_out))
    lists = {
        name: np.concatenate(parts)[:_COVERAGE_USERS] if parts else np.zeros((0, 10), np.int32)
        for name, parts in top.items()
    }
    for name, score_I in (
        (POPULARITY_DECAYED, contestants.popularity_decayed_I),
        (POPULARITY, contestants.popularity_I),
    ):
        ranks[name] = rank_by_fixed_scores(histories, held_out, score_I, exclude_seen)
        lists[name] = _top_of_fixed_scores(histories, held_out, score_I, exclude_seen)
    coverage = {name: coverage_at_k(list_, histories.item_count, 10) for name, list_ in lists.items()}
    return Climb(ranks, lists, coverage, best_B20, probability_B20)


def _top_of_fixed_scores(
    histories: Histories, held_out: HeldOut, score_I: Float32, exclude_seen: bool
) -> Int32:
    order_I = np.argsort(-score_I, kind="stable").astype(np.int32)
    rows = []
    for row in range(min(len(held_out), _COVERAGE_USERS)):
        seen, _ = held_out.prefix(histories, row)
        if exclude_seen:
            candidates = order_I[: 10 + len(seen)]
            rows.append(candidates[~np.isin(candidates, seen)][:10])
        else:
            rows.append(order_I[:10])
    return np.stack([np.pad(row, (0, 10 - len(row)), constant_values=-1) for row in rows])


def _padded(best_BK: Int32, k: int) -> Int32:
    return np.pad(best_BK, ((0, 0), (0, k - best_BK.shape[1])), constant_values=-1)
