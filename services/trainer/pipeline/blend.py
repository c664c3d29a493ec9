"""The weights of the blend, learned on the validation events. NumPy and SciPy.

A conditional logit (McFadden, 1974): of the items a person could have taken next, which one was it?

    p(i | history) = exp(w · f_i) / sum_j exp(w · f_j)

f are the terms of `FEATURES`, w their weights, found by Newton's method with a Gaussian prior around `DEFAULT_WEIGHTS`: the
fewer the people, the closer to it. The items that compete are those that the default blend ranks highest; where
people are few, all of them.

What was learned must beat popularity on people whose events it was not learned from, by more than chance explains, or
popularity is served: with counts at a fixed weight where that does better on them, else alone.

n = people, K = candidates, F = features.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from services.trainer.pipeline.attribute_terms import AttributeTerms
from services.trainer.pipeline.batch_companion import Neighbours, recency_weights
from services.trainer.pipeline.cooccurrence import PairCounts
from services.trainer.pipeline.dataset import HeldOut, Histories, ItemAttributes
from services.trainer.pipeline.evaluation import (
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
# Of a log that is too thin to learn from: popularity, and what was seen to follow or to go before, as order tells little of so few.
# Once seen makes an item (1 + scale)^2 = 36 times as likely as its popularity says: of a few neighbours each is one in a few.
CAUTIOUS, CAUTIOUS_WEIGHTS = "popularity with counts", {POPULARITY: 1.0, FORWARD: 2.0, BACKWARD: 2.0}
_NEVER_NEGATIVE = (SEQUENCE, FORWARD)

SCALE, QUERY_DECAY, WINDOW = 5.0, float(np.exp(-0.5)), 50
ATTRIBUTE_RANK = 64
# The precision of the prior: of a person's event, about a unit of information is learned on each weight.
_PRIOR_PRECISION = 20.0
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
        fell_back: what was learned is not served, but popularity, alone or with counts at a fixed weight.
        ndcg: NDCG@10 on validation people that did not teach: of the blend, of popularity, and where it fell back, of
            popularity with counts.
    """

    weights: Mapping[str, float]
    people: int
    fell_back: bool
    ndcg: Mapping[str, float]

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
    query_BD: Float32,
    maker: FeatureMaker,
    popularity_I: Float32,
    exclude_seen: bool,
    seed: int,
) -> Blend:
    """Returns the weights that foretell the validation events best, or those of popularity, see the module.

    Args:
        query_BD: the Transformer's query before each validation event.
        popularity_I: plain counts, which the blend must beat.
    """
    items = histories.item_count
    low, high = _PEOPLE
    taught = sample_rows(len(validation), min(high, max(low, _SCORED_CELLS // items)), seed)
    names = maker.names(exclude_seen)
    people, query = validation.take(taught), query_BD[taught]
    feature_nKF, place_n, row_n = _candidates(histories, people, query, maker, names, exclude_seen)
    weights = fit_conditional_logit(feature_nKF, place_n, names)

    # Each half of the people is judged by what the other half taught.
    half_B = np.random.default_rng(seed + 5).permutation(len(taught)) % 2
    low, high = _CHECKED_PEOPLE
    checked = sample_rows(len(taught), min(high, max(low, _CHECKED_CELLS // items)), seed + 6)
    rank_C = np.empty(len(checked), np.int64)
    for half in (0, 1):
        others = half_B[row_n] != half
        taught_by_others = fit_conditional_logit(feature_nKF[others], place_n[others], names)
        mine = np.flatnonzero(half_B[checked] == half)
        rows = checked[mine]
        rank_C[mine] = _ranks(
            histories, people.take(rows), query[rows], maker, names, taught_by_others, exclude_seen
        )
    blended_C = ndcg_at_10(rank_C)
    popular_C = ndcg_at_10(rank_by_fixed_scores(histories, people.take(checked), popularity_I, exclude_seen))
    quality = {"blend": float(blended_C.mean()), "popularity": float(popular_C.mean())}
    fell_back = not beats(blended_C, popular_C)
    if fell_back:
        rank_C = _ranks(
            histories, people.take(checked), query[checked], maker, names, CAUTIOUS_WEIGHTS, exclude_seen
        )
        quality[CAUTIOUS] = float(ndcg_at_10(rank_C).mean())
        # Nothing was learned, so that nothing need be proved: what does better than popularity may be served.
        cautious = quality[CAUTIOUS] > quality["popularity"]
        weights = CAUTIOUS_WEIGHTS if cautious else {POPULARITY: 1.0}
    return Blend({name: weights.get(name, 0.0) for name in FEATURES}, len(row_n), fell_back, quality)


def beats(quality_B: Float64, other_B: Float64) -> bool:
    """Returns whether the mean lead of the first over the second, each in [0, 1], is more than chance explains."""
    lead_B, people = quality_B - other_B, max(len(quality_B), 1)
    margin = _MARGIN_ERRORS * lead_B.std() / np.sqrt(people) + _MARGIN_PEOPLE / people
    return bool(lead_B.mean() > margin)


def fit_conditional_logit(
    feature_nKF: Float32,
    place_n: Int64,
    names: Sequence[str],
    precision: float = _PRIOR_PRECISION,
) -> dict[str, float]:
    """Returns the weights of greatest posterior probability, by name.

    Args:
        feature_nKF: of each candidate of each person; not a number in the first feature where there is none.
        place_n: which candidate was taken.
        precision: of the prior.
    """
    free = list(names)
    while True:
        columns = [names.index(name) for name in free]
        prior_F = np.array([DEFAULT_WEIGHTS.get(name, 0.0) for name in free])
        weight_F = _newton(feature_nKF[:, :, columns], place_n, prior_F, precision)
        negative = [
            name
            for name, weight in zip(free, weight_F, strict=True)
            if weight < 0 and name in _NEVER_NEGATIVE
        ]
        if not negative:
            return dict(zip(free, weight_F.tolist(), strict=True))
        free = [name for name in free if name not in negative]


def _newton(
    feature_nKF: Float32, place_n: Int64, prior_F: Float64, precision: float, iterations: int = 40
) -> Float64:
    """Maximises sum_n log p(taken) - precision / 2 |w - prior|^2; every step is at most 1 long."""
    weight_F = prior_F.copy()
    absent_nK = np.isnan(feature_nKF[:, :, 0])
    known_nKF = np.nan_to_num(feature_nKF)
    taken_nF = known_nKF[np.arange(len(place_n)), place_n]
    for _ in range(iterations):
        score_nK = np.where(absent_nK, -np.inf, known_nKF @ weight_F.astype(np.float32))
        score_nK -= score_nK.max(axis=1, keepdims=True)
        p_nK = np.exp(score_nK, dtype=np.float64)
        p_nK /= p_nK.sum(axis=1, keepdims=True)
        mean_nF = np.einsum("nk,nkf->nf", p_nK, known_nKF)
        gradient_F = (taken_nF - mean_nF).sum(axis=0) - precision * (weight_F - prior_F)
        flat_NF = known_nKF.reshape(-1, len(prior_F)).astype(np.float64)
        hessian_FF = flat_NF.T @ (flat_NF * p_nK.reshape(-1, 1)) - mean_nF.T @ mean_nF
        step_F = np.linalg.solve(hessian_FF + precision * np.eye(len(prior_F)), gradient_F)
        longest = float(np.abs(step_F).max())
        weight_F += step_F / max(longest, 1.0)
        if longest < 1e-4:
            break
    return weight_F


def _scored(
    histories: Histories,
    people: HeldOut,
    query_BD: Float32,
    maker: FeatureMaker,
    names: Sequence[str],
    weights: Mapping[str, float],
    exclude_seen: bool,
) -> Iterator[tuple[slice, HeldOut, dict[str, Float32], Float32, npt.NDArray[np.bool_] | None]]:
    """Yields rows, their events, features, scores by the weights, and what must not be ranked."""
    for rows, part, seen, excluded_BI in chunks(histories, people, exclude_seen):
        features = maker.of(query_BD[rows], seen, names)
        score_BI = np.zeros(features[SEQUENCE].shape, np.float32)
        for name, weight in weights.items():
            score_BI += np.float32(weight) * features[name]
        yield rows, part, features, score_BI, excluded_BI


def _ranks(
    histories: Histories,
    people: HeldOut,
    query_BD: Float32,
    maker: FeatureMaker,
    names: Sequence[str],
    weights: Mapping[str, float],
    exclude_seen: bool,
) -> Int64:
    rank_B = np.empty(len(people), np.int64)
    for rows, part, _, score_BI, excluded_BI in _scored(
        histories, people, query_BD, maker, names, weights, exclude_seen
    ):
        rank_B[rows] = rank_of_target(score_BI, part.target_B, excluded_BI)
    return rank_B


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
    for rows, part, features, score_BI, excluded_BI in _scored(
        histories, people, query_BD, maker, names, DEFAULT_WEIGHTS, exclude_seen
    ):
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
