"""The weights of the blend, learned on the validation events. NumPy and SciPy.

A conditional logit: of the items a person could have taken next, which one was it?

    p(i | history) = exp(w · f_i) / sum_j exp(w · f_j)

f are the terms of `FEATURES`, w their weights, with a Gaussian prior around `DEFAULT_WEIGHTS`: the
fewer the people, the closer to it. How narrow the prior is, is what foretells best what each half of the people took by what
the other half taught. The items that compete are those that the default blend ranks highest; where people are few, all of them.

What was learned must beat popularity on people whose events it was not learned from, by more than chance explains, or
popularity is served: with counts at a fixed weight where that does better on them, else alone. And none of its own parts may
beat it there by more than chance explains, or that part is served.

n = people, K = candidates, F = features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from services.trainer.pipeline.attribute_terms import AttributeTerms
from services.trainer.pipeline.batch_companion import Neighbours, recency_weights
from services.trainer.pipeline.conditional_logit import Prior, fit_by_halves, fit_conditional_logit
from services.trainer.pipeline.cooccurrence import PairCounts
from services.trainer.pipeline.dataset import HeldOut, Histories, ItemAttributes
from services.trainer.pipeline.evaluation import (
    BLEND,
    chunks,
    ndcg_at_10,
    popularity_bias,
    rank_by_fixed_scores,
    sample_rows,
)
from shared.bundle.manifest import ScoringParameters
from shared.bundle.scoring import Companion, CooccurrenceMatrix, log_partition
from shared.ranking_metrics import rank_of_target

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]

SEQUENCE, FORWARD, BACKWARD = "sequence", "forward", "backward"
SIMILARITY, TRANSITION, CONTENT = "similarity", "transition", "content"
POPULARITY, REPEAT = "popularity", "repeat"
FEATURES = (SEQUENCE, FORWARD, BACKWARD, SIMILARITY, TRANSITION, CONTENT, POPULARITY, REPEAT)
DEFAULT_WEIGHTS = {SEQUENCE: 1.0, FORWARD: 0.7}
PRIOR = Prior(DEFAULT_WEIGHTS, never_negative=(SEQUENCE, FORWARD))
# Of a log that is too thin to learn from: popularity, and what was seen to follow or to go before, as order tells little of so few.
# Once seen makes an item (1 + scale)^2 = 36 times as likely as its popularity says: of a few neighbours each is one in a few.
CAUTIOUS, CAUTIOUS_WEIGHTS = "popularity with counts", {POPULARITY: 1.0, FORWARD: 2.0, BACKWARD: 2.0}
# What the blend must not lose to: the Transformer, and counts with the more popular first where they say nothing.
PARTS = {SEQUENCE: {SEQUENCE: 1.0}, FORWARD: {FORWARD: 1.0, POPULARITY: 1e-3}}

SCALE, QUERY_DECAY, WINDOW = 5.0, float(np.exp(-0.5)), 50
ATTRIBUTE_RANK = 64
_CANDIDATES = 120
# (n, K) cells of features that are held, and (B, I) cells that are scored to find them.
_CANDIDATE_CELLS, _SCORED_CELLS = 3_000_000, 100_000_000
_PEOPLE = (1_500, 12_000)
_CHECKED_CELLS, _CHECKED_PEOPLE = 30_000_000, (500, 3_000)
# How far above popularity the blend must be: standard errors of the difference, and one person's best answer. Where few
# have a hit at all, the standard error alone would take one for proof.
_MARGIN_ERRORS, _MARGIN_PEOPLE = 1.0, 1.0


@dataclass(frozen=True, slots=True, eq=False)
class Terms:
    """Everything that the blend can be made of, counted from the same events.

    Attributes:
        forward, backward: counts.
        attributes: None where the catalogue says nothing.
        popularity_I: decayed counts.
    """

    forward: CooccurrenceMatrix
    backward: CooccurrenceMatrix
    attributes: AttributeTerms | None
    popularity_I: Float32

    @classmethod
    def of(cls, counts: PairCounts, attributes: ItemAttributes, popularity_I: Float32) -> Terms:
        """Returns the terms of what was counted so far."""
        forward, backward = counts.matrices()
        says_something = attributes.attribute_count or attributes.content_IC is not None
        terms = AttributeTerms(attributes, counts.weights()) if says_something else None
        return cls(forward, backward, terms, popularity_I)


@dataclass(frozen=True, slots=True, eq=False)
class Blend:
    """Learned weights.

    Attributes:
        weights: of each feature, 0 where it takes no part.
        people: whose events taught them.
        served: `BLEND`, or what is served in place of what was learned: `POPULARITY`, `CAUTIOUS` or one of `PARTS`.
        ndcg: NDCG@10 of each of these on validation people that did not teach.
        precision: of the prior.
    """

    weights: Mapping[str, float]
    people: int
    served: str
    ndcg: Mapping[str, float]
    precision: float

    def scoring(self) -> ScoringParameters:
        """Returns the constants that are served."""
        return ScoringParameters(
            lambda_=self.weights[FORWARD],
            scale=SCALE,
            query_decay=QUERY_DECAY,
            window=WINDOW,
            sequence=self.weights[SEQUENCE],
            backward=self.weights[BACKWARD],
            repeat=self.weights[REPEAT],
        )

    def companion(self, terms: Terms) -> Companion:
        """Returns what is served beside the Transformer."""
        similarity, transition = self.weights[SIMILARITY], self.weights[TRANSITION]
        content = self.weights[CONTENT]
        queries_IR = keys_IR = None
        if terms.attributes is not None and (similarity or transition or content):
            queries_IR, keys_IR = terms.attributes.factors(similarity, transition, content, ATTRIBUTE_RANK)
        backward = terms.backward if self.weights[BACKWARD] else None
        return Companion(self.scoring(), terms.forward, backward, queries_IR, keys_IR)

    def item_bias(self, terms: Terms) -> Float32:
        """Returns the prior of each item, (I,)."""
        return popularity_bias(terms.popularity_I, self.weights[POPULARITY])


class FeatureMaker:
    """Computes the features of every item for histories."""

    def __init__(self, item_vectors_ID: Float32, terms: Terms) -> None:
        self._item_vectors_ID, self._terms = item_vectors_ID, terms
        self._base = ScoringParameters(1.0, SCALE, QUERY_DECAY, WINDOW)
        self._forward = Neighbours.of(terms.forward, self._base)
        self._backward = Neighbours.of(terms.backward, self._base)
        self._prior_I = popularity_bias(terms.popularity_I, 1.0)

    def names(self, exclude_seen: bool) -> tuple[str, ...]:
        """Returns the features that can tell items apart here."""
        absent = set()
        attributes = self._terms.attributes
        if attributes is None or not attributes.has_attributes:
            absent |= {SIMILARITY, TRANSITION}
        if attributes is None or attributes.content_IC is None:
            absent.add(CONTENT)
        if exclude_seen:
            absent.add(REPEAT)
        return tuple(name for name in FEATURES if name not in absent)

    def of(self, query_BD: Float32, seen: list[Int64], names: Sequence[str]) -> dict[str, Float32]:
        """Returns each named feature, (B, I)."""
        items = len(self._item_vectors_ID)
        logits_BI = query_BD @ self._item_vectors_ID.T
        found = {SEQUENCE: logits_BI - log_partition(logits_BI)[:, None]}
        found[FORWARD] = np.log1p(np.float32(SCALE) * self._forward.scores(seen))
        found[BACKWARD] = np.log1p(np.float32(SCALE) * self._backward.scores(seen))
        found[POPULARITY] = np.broadcast_to(self._prior_I, logits_BI.shape)
        if REPEAT in names:
            repeats_BI = recency_weights(seen, items, self._base, mean=False).toarray()
            found[REPEAT] = np.log1p(np.float32(SCALE) * repeats_BI.astype(np.float32))
        if self._terms.attributes is not None:
            mean_BI = recency_weights(seen, items, self._base, mean=True)
            if SIMILARITY in names:
                found[SIMILARITY] = self._terms.attributes.similarity(mean_BI)
                found[TRANSITION] = self._terms.attributes.transition(mean_BI)
            if CONTENT in names:
                found[CONTENT] = self._terms.attributes.content(mean_BI)
        return {name: found[name] for name in names}


def learn_blend(
    histories: Histories,
    validation: HeldOut,
    encode: Callable[[HeldOut], Float32],
    maker: FeatureMaker,
    popularity_I: Float32,
    exclude_seen: bool,
    seed: int,
) -> Blend:
    """Returns the weights that foretell the validation events best, or those of popularity, see the module.

    Args:
        encode: returns the Transformer's query before each event that it is asked about, (B, D); of a large log those are few.
        popularity_I: plain counts, which the blend must beat.
    """
    items = histories.item_count
    low, high = _PEOPLE
    taught = sample_rows(len(validation), min(high, max(low, _SCORED_CELLS // items)), seed)
    names = maker.names(exclude_seen)
    people = validation.take(taught)
    query = encode(people)
    feature_nKF, place_n, row_n = _candidates(histories, people, query, maker, names, exclude_seen)

    # Each half of the people is judged by what the other half taught.
    half_B = np.random.default_rng(seed + 5).permutation(len(taught)) % 2
    precision, taught_by_other = fit_by_halves(feature_nKF, place_n, half_B[row_n], names, PRIOR)
    weights = fit_conditional_logit(feature_nKF, place_n, names, PRIOR, precision)

    low, high = _CHECKED_PEOPLE
    checked = sample_rows(len(taught), min(high, max(low, _CHECKED_CELLS // items)), seed + 6)
    fixed = {**PARTS, CAUTIOUS: CAUTIOUS_WEIGHTS}
    rank_of = {name: np.empty(len(checked), np.int64) for name in (BLEND, *fixed)}
    for half in (0, 1):
        mine = np.flatnonzero(half_B[checked] == half)
        rows = checked[mine]
        found = _ranks(
            histories, people.take(rows), query[rows], maker, names,
            {BLEND: taught_by_other[half], **fixed}, exclude_seen,
        )  # fmt: skip
        for name, rank_B in found.items():
            rank_of[name][mine] = rank_B
    rank_of[POPULARITY] = rank_by_fixed_scores(histories, people.take(checked), popularity_I, exclude_seen)
    quality_of = {name: ndcg_at_10(rank_C) for name, rank_C in rank_of.items()}
    served = choose(quality_of)
    chosen = {BLEND: weights, POPULARITY: {POPULARITY: 1.0}, **fixed}[served]
    ndcg = {name: float(quality_C.mean()) for name, quality_C in quality_of.items()}
    return Blend({name: chosen.get(name, 0.0) for name in FEATURES}, len(row_n), served, ndcg, precision)


def choose(quality_of: Mapping[str, Float64]) -> str:
    """Returns what is served, by the quality of each for people that did not teach it, (C,) in [0, 1]; see the module."""
    mean = {name: float(quality_C.mean()) for name, quality_C in quality_of.items()}
    if not beats(quality_of[BLEND], quality_of[POPULARITY]):
        # Nothing was learned, so that nothing need be proved: what does better than popularity may be served.
        return CAUTIOUS if mean[CAUTIOUS] > mean[POPULARITY] else POPULARITY
    better = [name for name in PARTS if beats(quality_of[name], quality_of[BLEND])]
    return max(better, key=mean.__getitem__, default=BLEND)


def beats(quality_B: Float64, other_B: Float64) -> bool:
    """Returns whether the mean lead of the first over the second, each in [0, 1], is more than chance explains."""
    lead_B, people = quality_B - other_B, max(len(quality_B), 1)
    margin = _MARGIN_ERRORS * lead_B.std() / np.sqrt(people) + _MARGIN_PEOPLE / people
    return bool(lead_B.mean() > margin)


def _described(
    histories: Histories,
    people: HeldOut,
    query_BD: Float32,
    maker: FeatureMaker,
    names: Sequence[str],
    exclude_seen: bool,
) -> Iterator[tuple[slice, HeldOut, dict[str, Float32], npt.NDArray[np.bool_] | None]]:
    """Yields rows, their events, their features, and what must not be ranked."""
    for rows, part, seen, excluded_BI in chunks(histories, people, exclude_seen):
        yield rows, part, maker.of(query_BD[rows], seen, names), excluded_BI


def _weighted(features: Mapping[str, Float32], weights: Mapping[str, float]) -> Float32:
    score_BI = np.zeros(features[SEQUENCE].shape, np.float32)
    for name, weight in weights.items():
        score_BI += np.float32(weight) * features[name]
    return score_BI


def _ranks(
    histories: Histories,
    people: HeldOut,
    query_BD: Float32,
    maker: FeatureMaker,
    names: Sequence[str],
    weightings: Mapping[str, Mapping[str, float]],
    exclude_seen: bool,
) -> dict[str, Int64]:
    """Returns the rank of each held-out item by each of the weightings, (B,)."""
    rank_of = {name: np.empty(len(people), np.int64) for name in weightings}
    for rows, part, features, excluded_BI in _described(
        histories, people, query_BD, maker, names, exclude_seen
    ):
        for name, weights in weightings.items():
            rank_of[name][rows] = rank_of_target(_weighted(features, weights), part.target_B, excluded_BI)
    return rank_of


def _candidates(
    histories: Histories,
    people: HeldOut,
    query_BD: Float32,
    maker: FeatureMaker,
    names: Sequence[str],
    exclude_seen: bool,
) -> tuple[Float32, Int64, Int64]:
    """Returns the features of the candidates, (n, K, F), which was taken, (n,), and whose row it is, (n,).

    Left out is who took none of the candidates.
    """
    items = histories.item_count
    kept = items if len(people) * items <= _CANDIDATE_CELLS else min(items, _CANDIDATES)
    found: list[Float32] = [np.zeros((0, kept, len(names)), np.float32)]
    places: list[Int64] = [np.zeros(0, np.int64)]
    whose: list[Int64] = [np.zeros(0, np.int64)]
    for rows, part, features, excluded_BI in _described(
        histories, people, query_BD, maker, names, exclude_seen
    ):
        score_BI = _weighted(features, DEFAULT_WEIGHTS)
        if excluded_BI is not None:
            score_BI = np.where(excluded_BI, -np.inf, score_BI)
        best_BK = np.argpartition(-score_BI, kept - 1, axis=1)[:, :kept]
        taken_BK = best_BK == part.target_B[:, None]
        some = np.flatnonzero(taken_BK.any(axis=1))
        feature_BKF = np.stack([np.take_along_axis(features[name], best_BK, 1) for name in names], axis=2)
        feature_BKF[~np.isfinite(np.take_along_axis(score_BI, best_BK, 1))] = np.nan
        found.append(feature_BKF[some])
        places.append(taken_BK[some].argmax(axis=1))
        whose.append(rows.start + some)
    return np.concatenate(found), np.concatenate(places), np.concatenate(whose)
