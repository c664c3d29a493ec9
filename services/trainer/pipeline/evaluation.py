"""The ladder: what is served and every baseline, ranked on the same held-out events. NumPy only.

B = held-out events, I = items, D = dimension. Rankings are full.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from services.trainer.pipeline.dataset import HeldOut, Histories
from shared.bundle.manifest import ScoringParameters
from shared.bundle.scoring import (
    CooccurrenceMatrix,
    blended_scores,
    cooccurrence_scores_of_batch,
)
from shared.ranking_metrics import (
    Interval,
    bootstrap_intervals,
    coverage_at_k,
    hits_of_rank,
    hr_at_k,
    ndcg_at_k,
    rank_of_target,
)

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]

BLEND, TRANSFORMER, COOCCURRENCE = "blend", "transformer", "cooccurrence"
POPULARITY, POPULARITY_DECAYED = "popularity", "popularity_decayed"
LAMBDA_GRID = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.85, 1.0, 1.2, 1.5, 2.0, 3.0, 5.0, 10.0)
HALF_LIFE_DAYS_GRID = (7.0, 30.0, 90.0, 365.0)

# Scores held at once, in cells of four bytes: bounds memory whatever the catalogue's size.
_CHUNK_CELLS = 8_000_000
_COVERAGE_USERS = 5_000
_DAY_MICROSECONDS = 86_400e6


@dataclass(frozen=True, slots=True, eq=False)
class Contestants:
    """Everything that ranks.

    Attributes:
        item_vectors_ID, cooccurrence, scoring: the served model.
        popularity_I, popularity_decayed_I: counts of events.
    """

    item_vectors_ID: Float32
    cooccurrence: CooccurrenceMatrix
    scoring: ScoringParameters
    popularity_I: Float32
    popularity_decayed_I: Float32


@dataclass(frozen=True, slots=True)
class Rung:
    """A contestant's measures by name, such as `hr@10`."""

    name: str
    metrics: Mapping[str, Interval]


@dataclass(frozen=True, slots=True)
class SliceReport:
    """The served model's measures on a part of the people."""

    name: str
    user_count: int
    metrics: Mapping[str, Interval]


@dataclass(frozen=True, slots=True)
class Report:
    """The outcome of an evaluation.

    Attributes:
        ladder: the served model first.
        slices: parts of the people.
        lead_over_popularity: paired difference in NDCG@10 between the blend and the better popularity.
        user_count: B.
        protocol: in words.
        confidence: of the intervals.
        tied_share: held-out events with the time of the event before.
    """

    ladder: tuple[Rung, ...]
    slices: tuple[SliceReport, ...]
    lead_over_popularity: Interval
    user_count: int
    protocol: str
    confidence: float
    tied_share: float


def popularity(histories: Histories, half_life_days: float | None = None) -> Float32:
    """Returns events by item, (I,), each counting half for every half-life before the newest event."""
    weight_E = None
    if half_life_days is not None and len(histories.time_E):
        age_E = (histories.time_E.max() - histories.time_E) / _DAY_MICROSECONDS
        weight_E = np.exp2(-age_E / half_life_days)
    return np.bincount(histories.item_E, weight_E, minlength=histories.item_count).astype(np.float32)


def sample_rows(count: int, limit: int, seed: int) -> Int64:
    """Returns at most `limit` of `count` rows, ascending, by the seed."""
    if count <= limit:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, limit, replace=False))


def _chunks(
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
    for rows, part, _seen, excluded_BI in _chunks(histories, held_out, exclude_seen):
        rank_B[rows] = rank_of_target(query_BD[rows] @ item_vectors_ID.T, part.target_B, excluded_BI)
    return rank_B


def rank_by_fixed_scores(
    histories: Histories, held_out: HeldOut, score_I: Float32, exclude_seen: bool
) -> Int64:
    """Returns the rank of each held-out item by one score of an item, the same for all, (B,)."""
    rank_B = np.empty(len(held_out), np.int64)
    for rows, part, _seen, excluded_BI in _chunks(histories, held_out, exclude_seen):
        score_BI = np.broadcast_to(score_I, (len(part), len(score_I)))
        rank_B[rows] = rank_of_target(score_BI, part.target_B, excluded_BI)
    return rank_B


def choose_half_life(
    histories: Histories, validation: HeldOut, training: Histories, exclude_seen: bool
) -> float:
    """Returns the half-life in days whose popularity ranks the validation events best."""

    def quality(days: float) -> float:
        rank_B = rank_by_fixed_scores(histories, validation, popularity(training, days), exclude_seen)
        return float(ndcg_at_10(rank_B).mean())

    return max(HALF_LIFE_DAYS_GRID, key=quality)


def choose_lambda(
    histories: Histories,
    validation: HeldOut,
    query_BD: Float32,
    contestants: Contestants,
    exclude_seen: bool,
    grid: tuple[float, ...] = LAMBDA_GRID,
) -> tuple[float, dict[float, float]]:
    """Returns the blend's weight with the best NDCG@10 on the validation events, and that of each tried."""
    total = dict.fromkeys(grid, 0.0)
    for rows, part, seen, excluded_BI in _chunks(histories, validation, exclude_seen):
        logits_BI = query_BD[rows] @ contestants.item_vectors_ID.T
        c_BI = cooccurrence_scores_of_batch(contestants.cooccurrence, seen, contestants.scoring)
        for value in grid:
            score_BI = blended_scores(logits_BI, c_BI, replace(contestants.scoring, lambda_=value))
            rank_B = rank_of_target(score_BI, part.target_B, excluded_BI)
            total[value] += float(ndcg_at_10(rank_B).sum())
    quality = {value: total[value] / max(len(validation), 1) for value in grid}
    return max(grid, key=lambda value: quality[value]), quality


def climb_ladder(
    histories: Histories,
    held_out: HeldOut,
    query_BD: Float32,
    contestants: Contestants,
    exclude_seen: bool,
    on_chunk: Callable[[int, int], None] = lambda _done, _all: None,
) -> tuple[dict[str, Int64], dict[str, float], npt.NDArray[np.int32]]:
    """Ranks by every contestant.

    Returns:
        Ranks of the held-out items (B,) by contestant; coverage@10 by contestant, on the first people; and
        the blend's best 20 items of everybody, (B, 20), -1 where the catalogue has fewer.
    """
    ranks = {
        name: np.empty(len(held_out), np.int64)
        for name in (BLEND, TRANSFORMER, COOCCURRENCE, POPULARITY_DECAYED, POPULARITY)
    }
    top: dict[str, list[npt.NDArray[np.int32]]] = {name: [] for name in ranks}
    best_B20 = np.full((len(held_out), 20), -1, np.int32)
    # Where nothing was counted, the more popular goes first, whatever its place in the catalogue.
    order_I = contestants.popularity_I.argsort().argsort()
    tie_break_I = (1e-6 * (order_I + 1) / max(len(order_I), 1)).astype(np.float32)
    for rows, part, seen, excluded_BI in _chunks(histories, held_out, exclude_seen):
        logits_BI = query_BD[rows] @ contestants.item_vectors_ID.T
        c_BI = cooccurrence_scores_of_batch(contestants.cooccurrence, seen, contestants.scoring)
        shape = logits_BI.shape
        scores = {
            BLEND: blended_scores(logits_BI, c_BI, contestants.scoring),
            TRANSFORMER: logits_BI,
            COOCCURRENCE: c_BI + tie_break_I,
            POPULARITY_DECAYED: np.broadcast_to(contestants.popularity_decayed_I, shape),
            POPULARITY: np.broadcast_to(contestants.popularity_I, shape),
        }
        for name, score_BI in scores.items():
            ranks[name][rows] = rank_of_target(score_BI, part.target_B, excluded_BI)
            if name == BLEND:
                best_BK = top_items(score_BI, excluded_BI, part.target_B, 20)
                best_B20[rows, : best_BK.shape[1]] = best_BK
                top[name].append(best_BK[:, :10])
            elif rows.start < _COVERAGE_USERS:
                top[name].append(top_items(score_BI, excluded_BI, part.target_B, 10))
        on_chunk(rows.stop, len(held_out))
    coverage = {
        name: coverage_at_k(np.concatenate(parts)[:_COVERAGE_USERS], histories.item_count, 10)
        for name, parts in top.items()
    }
    return ranks, coverage, best_B20


def top_items(
    score_BI: npt.NDArray[np.floating], excluded_BI: npt.NDArray[np.bool_] | None, target_B: Int64, k: int
) -> npt.NDArray[np.int32]:
    """Returns the k best items of each row that are not excluded, best first, (B, k or fewer)."""
    k = min(k, score_BI.shape[1])
    allowed_BI = score_BI if excluded_BI is None else np.where(excluded_BI, -np.inf, score_BI)
    best_BK = np.argpartition(-allowed_BI, k - 1, axis=1)[:, :k]
    order_BK = np.argsort(-np.take_along_axis(allowed_BI, best_BK, axis=1), axis=1, kind="stable")
    return np.take_along_axis(best_BK, order_BK, axis=1).astype(np.int32)


MEASURES = ("hr@5", "hr@10", "hr@20", "ndcg@10", "mrr")


def measures_of_rank(rank_B: Int64) -> npt.NDArray[np.float64]:
    """Returns each of MEASURES for each ranking, (B, 5). MRR is of the whole ranking."""
    hit_BL = hits_of_rank(rank_B, 20)
    return np.stack(
        [hr_at_k(hit_BL, 5), hr_at_k(hit_BL, 10), hr_at_k(hit_BL, 20), ndcg_at_10(rank_B), 1.0 / rank_B],
        axis=1,
    )


def report_of(
    histories: Histories,
    held_out: HeldOut,
    ranks: Mapping[str, Int64],
    coverage: Mapping[str, float],
    *,
    seed: int,
    protocol: str,
    resamples: int,
    confidence: float,
) -> Report:
    """Returns the measures of each contestant with intervals, and of the blend by slice."""
    generator = np.random.default_rng(seed)
    values = {name: measures_of_rank(rank_B) for name, rank_B in ranks.items()}
    ndcg = MEASURES.index("ndcg@10")
    better = max((POPULARITY, POPULARITY_DECAYED), key=lambda name: values[name][:, ndcg].mean())
    lead_B1 = (values[BLEND] - values[better])[:, [ndcg]]
    columns = np.concatenate([*values.values(), lead_B1], axis=1)
    intervals = bootstrap_intervals(columns, generator, resamples, confidence)
    ladder = []
    for place, name in enumerate(values):
        first = place * len(MEASURES)
        metrics = dict(zip(MEASURES, intervals[first : first + len(MEASURES)], strict=True))
        metrics["coverage@10"] = Interval(coverage[name], coverage[name], coverage[name])
        ladder.append(Rung(name, metrics))
    slices = []
    for words, chosen_B in _slices(histories, held_out):
        if chosen_B.any():
            found = bootstrap_intervals(values[BLEND][chosen_B], generator, min(resamples, 300), confidence)
            slices.append(SliceReport(words, int(chosen_B.sum()), dict(zip(MEASURES, found, strict=True))))
    return Report(
        ladder=tuple(ladder),
        slices=tuple(slices),
        lead_over_popularity=intervals[-1],
        user_count=len(held_out),
        protocol=protocol,
        confidence=confidence,
        tied_share=_tied_share(histories, held_out),
    )


def _slices(histories: Histories, held_out: HeldOut) -> list[tuple[str, npt.NDArray[np.bool_]]]:
    length_B = held_out.prefix_B
    # Popularity of the target among everything: the last event itself counts once for everyone.
    count_I = np.bincount(histories.item_E, minlength=histories.item_count)
    common_B = count_I[held_out.target_B] >= np.quantile(count_I, 0.8)
    return [
        ("history of at most 5 events", length_B <= 5),
        ("history of 6 to 20 events", (length_B > 5) & (length_B <= 20)),
        ("history of more than 20 events", length_B > 20),
        ("wanted item among the most popular fifth", common_B),
        ("wanted item among the other four fifths", ~common_B),
    ]


def _tied_share(histories: Histories, held_out: HeldOut) -> float:
    place_B = histories.start_U1[held_out.user_B] + held_out.prefix_B
    return (
        float(np.mean(histories.time_E[place_B] == histories.time_E[place_B - 1])) if len(held_out) else 0.0
    )
