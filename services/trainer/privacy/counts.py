"""Private counts: the sum of bounded shares, Gaussian noise on every cell, and what serves from them alone.

    S = sum over people of their shares (`contributions`), in whole grid units
    S~ = S + round(z G N(0, 1)),  for every pair of catalogue items and for every item
    C~_ab = S~_ab where that is at least T, else 0

Every cell gets noise, also the empty ones, for which it is drawn only where it passes the threshold: the same
distribution at the cost of what is kept. T lets half a false neighbour an item through, and depends on the
catalogue's size and the noise alone. All that follows is computed from S~ and the catalogue, and costs no privacy:

    score_i = .5 log p_i + 2 log(1 + c_i) + w sim(history, i)

with c of C~, p and sim of `backoff`, and w of `choosing`. With so much noise that nothing passes T, likeness by the catalogue and the
popularity of groups still serve.

I = items, N = entries, D = dimension.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import scipy.sparse.linalg
from scipy.special import ndtr, ndtri

from services.trainer.pipeline.dataset import ItemAttributes
from services.trainer.pipeline.evaluation import Contestants
from services.trainer.privacy.backoff import groups_of, likeness_factors, shrunk
from services.trainer.privacy.contributions import GRID, POPULARITY_SHARE, Shares
from services.trainer.privacy.randomness import SecureRandom
from shared.bundle.manifest import ScoringParameters
from shared.bundle.scoring import Companion, CooccurrenceMatrix

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]

FALSE_NEIGHBOURS_AN_ITEM = 0.5
# Public constants. Weights are scaled to a median of 1, so that the companion's own scale is 1.
SCORING = ScoringParameters(lambda_=2.0, scale=1.0, query_decay=0.6065, window=24)
POPULARITY_WEIGHT = 0.5
DIMENSION = 16
# For likeness between items, not for scores: too small to move any.
_VECTOR_SIZE = 1e-3


@dataclass(frozen=True, slots=True, eq=False)
class NoisyCounts:
    """What may be known of people. In units of clip_norm / GRID.

    Attributes:
        item_count: I.
        pair_N, weight_N: pairs a * I + b whose noisy sum is at least `threshold`, ascending, and that sum.
        popularity_I: noisy, may be negative.
        threshold: T.
        noise: standard deviation of a cell.
    """

    item_count: int
    pair_N: Int64
    weight_N: Int64
    popularity_I: Int64
    threshold: int
    noise: float


def add_noise(
    shares: Shares, noise_multiplier: float, random: SecureRandom, threshold: int | None = None
) -> NoisyCounts:
    """Returns the noisy sums; a noise multiplier of 0, for controls and comparisons alone, adds none.

    `threshold` is T by default; any other is as private, and a low one keeps every cell.
    """
    items = len(shares.popularity_I)
    cells = items * items
    noise = noise_multiplier * GRID
    if threshold is None:
        threshold = max(1, int(np.ceil(threshold_of(items) * noise)))
    weight_N = shares.weight_N + np.rint(noise * random.normal(len(shares.pair_N))).astype(np.int64)
    kept = weight_N >= threshold
    pair_N, weight_N = shares.pair_N[kept], weight_N[kept]
    if noise:
        # Of rounded noise: it passes where the number before rounding is at least T - 1/2.
        bar = (threshold - 0.5) / noise
        places = random.successes(cells - len(shares.pair_N), float(ndtr(-bar)))
        false_N = _skip(places, shares.pair_N)
        false_weight_N = np.rint(noise * random.normal_above(bar, len(false_N))).astype(np.int64)
        pair_N = np.concatenate([pair_N, false_N])
        weight_N = np.concatenate([weight_N, false_weight_N])
        order = np.argsort(pair_N, kind="stable")
        pair_N, weight_N = pair_N[order], weight_N[order]
    popularity_I = shares.popularity_I + np.rint(noise * random.normal(items)).astype(np.int64)
    return NoisyCounts(items, pair_N, weight_N, popularity_I, threshold, noise)


def threshold_of(item_count: int) -> float:
    """Returns T over the noise's standard deviation."""
    return float(-ndtri(min(FALSE_NEIGHBOURS_AN_ITEM / item_count, 0.5)))


def _skip(place_N: Int64, taken_N: Int64) -> Int64:
    """Returns the numbers at places among those that are not taken (ascending)."""
    free_before = taken_N - np.arange(len(taken_N))
    return place_N + np.searchsorted(free_before, place_N, "right")


def cooccurrence_of(counts: NoisyCounts) -> CooccurrenceMatrix:
    """Returns the companion: rows divided by the root of their sum, the median weight 1; the diagonal is left out."""
    items = counts.item_count
    row_N, column_N = np.divmod(counts.pair_N, items)
    apart = row_N != column_N
    row_N, column_N, weight_N = row_N[apart], column_N[apart], counts.weight_N[apart].astype(np.float64)
    sum_I = np.bincount(row_N, weight_N, minlength=items)
    # A row of which little is known must not look certain.
    divided_N = weight_N / np.sqrt(sum_I[row_N] + counts.noise * np.sqrt(items))
    if len(divided_N):
        divided_N /= np.median(divided_N)
    indptr_I1 = np.concatenate([[0], np.cumsum(np.bincount(row_N, minlength=items))]).astype(np.int64)
    return CooccurrenceMatrix(indptr_I1, column_N.astype(np.int32), divided_N.astype(np.float32))


def popularity_of(counts: NoisyCounts, group_I: Int64) -> Float32:
    """Returns p of each item, (I,), above 0: about how many people took it, each counting less the more they took."""
    unit = GRID * np.sqrt(POPULARITY_SHARE)
    return shrunk(counts.popularity_I / unit, counts.noise / unit, group_I).astype(np.float32)


def contestants_of(counts: NoisyCounts, attributes: ItemAttributes) -> Contestants:
    """Returns what serves, from the noisy counts and the catalogue alone, with likeness at a weight of 1."""
    matrix, popularity_I = cooccurrence_of(counts), popularity_of(counts, groups_of(attributes))
    bias_I = (POPULARITY_WEIGHT * np.log(popularity_I)).astype(np.float32)
    queries_IR, keys_IR = likeness_factors(attributes) or (None, None)
    companion = Companion(SCORING, matrix, None, queries_IR, keys_IR)
    return Contestants(vectors_of(matrix), bias_I, companion, popularity_I, popularity_I)


def with_likeness(contestants: Contestants, weight: float) -> Contestants:
    """Returns what serves with likeness at that weight."""
    companion = contestants.companion
    if companion.attribute_queries_IR is None:
        return contestants
    queries_IR = np.float32(weight) * companion.attribute_queries_IR if weight else None
    keys_IR = companion.attribute_keys_IR if weight else None
    return replace(
        contestants,
        companion=replace(companion, attribute_queries_IR=queries_IR, attribute_keys_IR=keys_IR),
    )


def vectors_of(matrix: CooccurrenceMatrix) -> Float32:
    """Returns item vectors whose cosine says which items are taken together, (I, D): a spectral embedding.

    What nothing is known of gets a direction of its own, by its place in the catalogue.
    """
    items = matrix.item_count
    width = min(DIMENSION, items)
    found_ID = np.random.default_rng(items).normal(size=(items, width)) * 1e-3
    rank = min(width, items - 1)
    if len(matrix.indices_N) and rank > 0:
        square = scipy.sparse.csr_matrix(
            (matrix.weights_N.astype(np.float64), matrix.indices_N, matrix.indptr_I1), shape=(items, items)
        )
        left, size, _right = scipy.sparse.linalg.svds(
            square + square.T, k=rank, v0=np.ones(items), solver="arpack"
        )
        found_ID[:, :rank] += left * np.sqrt(np.maximum(size, 0))
    norm_I = np.maximum(np.linalg.norm(found_ID, axis=1, keepdims=True), 1e-12)
    return (_VECTOR_SIZE * found_ID / norm_I).astype(np.float32)
