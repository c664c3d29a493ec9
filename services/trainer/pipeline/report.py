"""From ranks to measures with intervals, slices, and what a ranking does beside being right. NumPy only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from services.trainer.pipeline.dataset import HeldOut, Histories
from services.trainer.pipeline.evaluation import BLEND, POPULARITY, POPULARITY_DECAYED, Climb, ndcg_at_10
from shared.event_kinds import EventKind
from shared.ranking_metrics import Interval, bootstrap_intervals, hits_of_rank, hr_at_k

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]

MEASURES = ("hr@5", "hr@10", "hr@20", "ndcg@10", "mrr", "recall@10", "precision@10")
_NDCG = MEASURES.index("ndcg@10")
_BINS = 10
_DIVERSITY_USERS = 2_000
_SLICE_RESAMPLES = 300
NEW_ITEM_EVENTS = 5
# Who comes back after so long is a segment of their own.
RETURN_DAYS = 30
_DAY_MICROSECONDS = 86_400_000_000


@dataclass(frozen=True, slots=True)
class Rung:
    """A contestant's measures by name, such as `hr@10`."""

    name: str
    metrics: Mapping[str, Interval]


@dataclass(frozen=True, slots=True)
class SliceReport:
    """The served model's measures on a part of the people, and the incumbent's where there is one.

    Attributes:
        lead_over_incumbent: paired difference in NDCG@10; None without an incumbent.
    """

    name: str
    user_count: int
    metrics: Mapping[str, Interval]
    incumbent_metrics: Mapping[str, Interval] | None = None
    lead_over_incumbent: Interval | None = None


@dataclass(frozen=True, slots=True)
class Comparison:
    """How the new version does against the one in service.

    Attributes:
        version: the incumbent.
        lead: difference in NDCG@10.
        user_count: people on whom both were measured.
        same_people: whether the difference is paired; else it is between published measures.
        slices: by part of the people, paired or not as the whole.
        why_none: why the two cannot be compared at all; empty where they can.
    """

    version: str
    lead: Interval
    user_count: int
    same_people: bool
    slices: tuple[SliceReport, ...] = ()
    why_none: str = ""


@dataclass(frozen=True, slots=True)
class Calibration:
    """Whether probabilities are what they say, over bins of equally many (person, item) pairs.

    Attributes:
        expected, observed: mean probability and share of hits in each bin.
        error: expected calibration error (Guo et al., 2017), in [0, 1].
    """

    expected: tuple[float, ...]
    observed: tuple[float, ...]
    error: float


@dataclass(frozen=True, slots=True)
class Report:
    """The outcome of an evaluation.

    Attributes:
        ladder: the served model first.
        slices: parts of the people.
        lead_over_popularity: paired difference in NDCG@10 between the blend and the better popularity.
        calibration: of the blend's probabilities for its best 20.
        user_count: B.
        protocol: in words.
        confidence: of the intervals.
        tied_share: held-out events with the time of the event before.
    """

    ladder: tuple[Rung, ...]
    slices: tuple[SliceReport, ...]
    lead_over_popularity: Interval
    calibration: Calibration
    user_count: int
    protocol: str
    confidence: float
    tied_share: float


def measures_of_rank(rank_B: Int64) -> npt.NDArray[np.float64]:
    """Returns each of MEASURES for each ranking, (B, 7).

    MRR is of the whole ranking. One item is wanted: recall is the hit rate, precision a tenth of it.
    """
    hit_BL = hits_of_rank(rank_B, 20)
    hr_10 = hr_at_k(hit_BL, 10)
    return np.stack(
        [hr_at_k(hit_BL, 5), hr_10, hr_at_k(hit_BL, 20), ndcg_at_10(rank_B), 1.0 / rank_B, hr_10, hr_10 / 10],
        axis=1,
    )


def report_of(
    histories: Histories,
    held_out: HeldOut,
    climb: Climb,
    item_vectors_ID: Float32,
    *,
    seed: int,
    protocol: str,
    resamples: int,
    confidence: float,
) -> Report:
    """Returns the measures of each contestant with intervals, and of the blend by slice."""
    generator = np.random.default_rng(seed)
    values = {name: measures_of_rank(rank_B) for name, rank_B in climb.ranks.items()}
    better = max((POPULARITY, POPULARITY_DECAYED), key=lambda name: values[name][:, _NDCG].mean())
    lead_B1 = (values[BLEND] - values[better])[:, [_NDCG]]
    columns = np.concatenate([*values.values(), lead_B1], axis=1)
    intervals = bootstrap_intervals(columns, generator, resamples, confidence)
    count_I = np.bincount(histories.item_E, minlength=histories.item_count)
    ladder = []
    for place, name in enumerate(values):
        first = place * len(MEASURES)
        metrics = dict(zip(MEASURES, intervals[first : first + len(MEASURES)], strict=True))
        beyond = {
            "coverage@10": climb.coverage[name],
            "novelty@10": novelty(climb.top[name], count_I),
            "diversity@10": diversity(climb.top[name][:_DIVERSITY_USERS], item_vectors_ID),
            "popularity_bias@10": popularity_lift(climb.top[name], held_out.target_B, count_I),
        }
        metrics.update({key: Interval(value, value, value) for key, value in beyond.items()})
        ladder.append(Rung(name, metrics))
    calibration = calibrate(climb.probability_B20, climb.best_B20 == held_out.target_B[:, None])
    ladder[0] = Rung(
        BLEND,
        {**ladder[0].metrics, "ece@20": Interval(calibration.error, calibration.error, calibration.error)},
    )
    slices = []
    for words, chosen_B in slices_of(histories, held_out):
        if chosen_B.any():
            found = bootstrap_intervals(
                values[BLEND][chosen_B], generator, min(resamples, _SLICE_RESAMPLES), confidence
            )
            slices.append(SliceReport(words, int(chosen_B.sum()), dict(zip(MEASURES, found, strict=True))))
    return Report(
        ladder=tuple(ladder),
        slices=tuple(slices),
        lead_over_popularity=intervals[-1],
        calibration=calibration,
        user_count=len(held_out),
        protocol=protocol,
        confidence=confidence,
        tied_share=_tied_share(histories, held_out),
    )


def compare(
    histories: Histories,
    held_out: HeldOut,
    rank_B: Int64,
    incumbent_rank_B: Int64,
    version: str,
    *,
    seed: int,
    resamples: int,
    confidence: float,
    min_slice: int,
) -> Comparison:
    """Returns the paired comparison of two rankings of the same events; parts of fewer than `min_slice` are left out."""
    generator = np.random.default_rng(seed + 1)
    new, old = measures_of_rank(rank_B), measures_of_rank(incumbent_rank_B)
    (lead,) = bootstrap_intervals((new - old)[:, [_NDCG]], generator, resamples, confidence)
    slices = []
    for words, chosen_B in slices_of(histories, held_out):
        if chosen_B.sum() < min_slice:
            continue
        columns = np.concatenate([new[chosen_B], old[chosen_B], (new - old)[chosen_B][:, [_NDCG]]], axis=1)
        found = bootstrap_intervals(columns, generator, min(resamples, _SLICE_RESAMPLES), confidence)
        count = len(MEASURES)
        slices.append(
            SliceReport(
                words,
                int(chosen_B.sum()),
                dict(zip(MEASURES, found[:count], strict=True)),
                dict(zip(MEASURES, found[count : 2 * count], strict=True)),
                found[-1],
            )
        )
    return Comparison(version, lead, len(held_out), True, tuple(slices))


def compare_published(
    version: str,
    new: Interval,
    old: Interval,
    user_count: int,
    slices: tuple[SliceReport, ...] = (),
    old_slices: Mapping[str, Mapping[str, Interval]] | None = None,
) -> Comparison:
    """Returns the difference of what two versions were measured at, on people of their own.

    Args:
        slices: of the new version; those that are too small for a verdict left out.
        old_slices: measures of the old version by the name of the slice.
    """
    compared = []
    for part in slices:
        before = (old_slices or {}).get(part.name)
        if before is not None:
            lead = independent_difference(part.metrics["ndcg@10"], before["ndcg@10"])
            compared.append(replace(part, incumbent_metrics=before, lead_over_incumbent=lead))
    return Comparison(version, independent_difference(new, old), user_count, False, tuple(compared))


def independent_difference(new: Interval, old: Interval) -> Interval:
    """Returns the difference of two independent means, its interval from theirs (Cochran, 1977)."""
    below = np.hypot(new.value - new.low, old.high - old.value)
    above = np.hypot(new.high - new.value, old.value - old.low)
    value = new.value - old.value
    return Interval(value, float(value - below), float(value + above))


def slices_of(histories: Histories, held_out: HeldOut) -> list[tuple[str, npt.NDArray[np.bool_]]]:
    """Returns the parts of the people that are watched, and who is in each, (B,)."""
    length_B = held_out.prefix_B
    # Popularity of the target among everything: the last event itself counts once for everyone.
    count_I = np.bincount(histories.item_E, minlength=histories.item_count)
    count_B = count_I[held_out.target_B]
    common_B = count_B >= np.quantile(count_I, 0.8)
    return [
        ("history of at most 5 events", length_B <= 5),
        ("history of 6 to 20 events", (length_B > 5) & (length_B <= 20)),
        ("history of more than 20 events", length_B > 20),
        ("wanted item among the most popular fifth", common_B),
        ("wanted item among the other four fifths", ~common_B),
        (f"wanted item new: at most {NEW_ITEM_EVENTS} events", count_B <= NEW_ITEM_EVENTS),
        *_segments_of(histories, held_out),
    ]


def _segments_of(histories: Histories, held_out: HeldOut) -> list[tuple[str, npt.NDArray[np.bool_]]]:
    """Returns segments of the people as they were just before the held-out event, where the log tells them apart.

    Not the shop's own segments, which hold who is in them today: the held-out event would be known to them.
    """
    bought_E1 = np.concatenate([[0], np.cumsum(histories.kind_E == EventKind.PURCHASE)])
    first_B = histories.start_U1[held_out.user_B]
    place_B = first_B + held_out.prefix_B
    bought_B = bought_E1[place_B] > bought_E1[first_B]
    gap_B = histories.time_E[place_B] - histories.time_E[np.maximum(place_B - 1, first_B)]
    away_B = gap_B >= RETURN_DAYS * _DAY_MICROSECONDS
    parts = [
        ("segment: never bought before", ~bought_B),
        ("segment: bought before", bought_B),
        (f"segment: back after {RETURN_DAYS} days or more", away_B),
        (f"segment: away for less than {RETURN_DAYS} days", ~away_B),
    ]
    return [(words, chosen_B) for words, chosen_B in parts if 0 < chosen_B.sum() < len(held_out)]


def novelty(top_BK: npt.NDArray[np.int32], count_I: Int64) -> float:
    """Returns the mean of -log2 of the share of events on a shown item, in bits (Vargas & Castells, 2011)."""
    shown = top_BK[top_BK >= 0]
    share_I = np.maximum(count_I, 1) / max(count_I.sum(), 1)
    return float(-np.log2(share_I[shown]).mean()) if len(shown) else 0.0


def diversity(top_BK: npt.NDArray[np.int32], item_vectors_ID: Float32) -> float:
    """Returns one less the mean cosine between two items of a list, in [0, 2] (Ziegler et al., 2005)."""
    full_BK = top_BK[(top_BK >= 0).all(axis=1)]
    k = top_BK.shape[1]
    if not len(full_BK) or k < 2:
        return 0.0
    norm_I1 = np.linalg.norm(item_vectors_ID, axis=1, keepdims=True)
    unit_ID = item_vectors_ID / np.maximum(norm_I1, 1e-12)
    # The sum over pairs is the squared length of the sum, less each with itself.
    length_B = np.square(unit_ID[full_BK].sum(axis=1)).sum(axis=1)
    self_B = (norm_I1[full_BK, 0] > 0).sum(axis=1)
    return float(1 - ((length_B - self_B) / (k * (k - 1))).mean())


def popularity_lift(top_BK: npt.NDArray[np.int32], target_B: Int64, count_I: Int64) -> float:
    """Returns how much more popular shown items are than wanted ones, as a difference of mean percentiles, in [-1, 1]."""
    percentile_I = count_I.argsort(kind="stable").argsort(kind="stable") / max(len(count_I) - 1, 1)
    shown = top_BK[top_BK >= 0]
    return float(percentile_I[shown].mean() - percentile_I[target_B].mean()) if len(shown) else 0.0


def calibrate(probability_BK: Float32, hit_BK: npt.NDArray[np.bool_]) -> Calibration:
    """Returns the calibration of probabilities against hits; see `Calibration`."""
    order = np.argsort(probability_BK, axis=None, kind="stable")
    expected, observed, error = [], [], 0.0
    for part in np.array_split(order, min(_BINS, len(order))):
        mean, share = float(probability_BK.flat[part].mean()), float(hit_BK.flat[part].mean())
        expected.append(mean)
        observed.append(share)
        error += abs(mean - share) * len(part) / len(order)
    return Calibration(tuple(expected), tuple(observed), error)


def _tied_share(histories: Histories, held_out: HeldOut) -> float:
    place_B = histories.start_U1[held_out.user_B] + held_out.prefix_B
    return (
        float(np.mean(histories.time_E[place_B] == histories.time_E[place_B - 1])) if len(held_out) else 0.0
    )
