"""Measures that are private themselves, on people whom training never read. NumPy only.

Each person's secret coin puts them either into training or here; whoever is added or removed changes one of the
two, so that both may spend all of epsilon (parallel composition). Of each person here one event, the last, is
foretold; the person adds

    (1, hit@10 and ndcg@10 of what would serve, the same of popularity),  each in [0, 1]

to a sum with Gaussian noise. Its L2 norm is at most sqrt(5).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from services.trainer.pipeline.dataset import Histories, hold_out
from services.trainer.pipeline.evaluation import (
    Contestants,
    ndcg_at_10,
    rank_by_blend,
    rank_by_fixed_scores,
)
from services.trainer.privacy.randomness import SecureRandom
from shared.bundle.encoder import LiteRtEncoder
from shared.bundle.history import History, encoder_inputs
from shared.ranking_metrics import Interval

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

# Of the people, public: each with this probability is measured on, and not trained on.
TEST_SHARE = 0.1
NUMBERS = 5
SENSITIVITY = float(np.sqrt(NUMBERS))
_Z95 = 1.959964


@dataclass(frozen=True, slots=True)
class NoisyMeasures:
    """What may be known of the quality.

    Attributes:
        people: about how many were measured on.
        served, popularity: hr@10 and ndcg@10 with 95% intervals, of sampling and of noise.
        lead: of ndcg@10 over popularity.
        noise: standard deviation of each sum.
    """

    people: float
    served: dict[str, Interval]
    popularity: dict[str, Interval]
    lead: Interval
    noise: float


def measure(
    test: Histories,
    queries: Float32 | None,
    contestants: Contestants,
    exclude_seen: bool,
    noise_multiplier: float,
    random: SecureRandom,
) -> NoisyMeasures:
    """Returns noisy measures.

    Args:
        test: people whom training never read.
        queries: of the people who have an event to foretell, in the order of `hold_out`; None where the query has
            no weight.
        noise_multiplier: 0, for comparisons alone, adds none.
    """
    held_out = hold_out(test, 1, exclude_seen)
    if queries is None:
        queries = np.zeros((len(held_out), contestants.item_vectors_ID.shape[1]), np.float32)
    served_B = rank_by_blend(test, held_out, queries, contestants, exclude_seen)
    popular_B = rank_by_fixed_scores(test, held_out, contestants.popularity_I, exclude_seen)
    return summarise(person_numbers(served_B, popular_B), noise_multiplier, random)


def person_numbers(served_B: npt.NDArray[np.int64], popular_B: npt.NDArray[np.int64]) -> Float64:
    """Returns what each person adds, (B, 5), every number in [0, 1]."""
    columns = [np.ones(len(served_B))]
    for rank_B in (served_B, popular_B):
        columns += [(rank_B <= 10).astype(np.float64), ndcg_at_10(rank_B)]
    return np.clip(np.stack(columns, axis=1), 0.0, 1.0)


def summarise(numbers_B5: Float64, noise_multiplier: float, random: SecureRandom) -> NoisyMeasures:
    """Returns the noisy sums as measures; nothing but the sums is read."""
    noise = noise_multiplier * SENSITIVITY
    count, *sums = (numbers_B5.sum(axis=0) + noise * random.normal(NUMBERS)).tolist()
    people = max(count, 1.0)
    hit, ndcg, popular_hit, popular_ndcg = (min(max(value / people, 0.0), 1.0) for value in sums)

    def interval(value: float, low: float = 0.0) -> Interval:
        # A number in [0, 1] with this mean varies at most so much; the noise is of the sum and of the count.
        variance = value * (1 - value) / people + noise**2 * (1 + value**2) / people**2
        width = _Z95 * float(np.sqrt(variance))
        return Interval(value, max(value - width, low), min(value + width, 1.0))

    difference = ndcg - popular_ndcg
    # The difference is in [-1, 1]; its square is at most the sum of the two.
    variance = (ndcg + popular_ndcg) / people + noise**2 * (2 + difference**2) / people**2
    width = _Z95 * float(np.sqrt(variance))
    return NoisyMeasures(
        count,
        {"hr@10": interval(hit), "ndcg@10": interval(ndcg)},
        {"hr@10": interval(popular_hit), "ndcg@10": interval(popular_ndcg)},
        Interval(difference, difference - width, difference + width),
        noise,
    )


def parity_of_sum_encoder(encoder_bytes: bytes, vectors_ID: Float32, max_history: int) -> tuple[float, float]:
    """Returns the largest relative difference between the encoder as it serves and a sum, and its milliseconds.

    On histories drawn from the catalogue: nobody's own.
    """
    import time

    generator = np.random.default_rng(0)
    runner = LiteRtEncoder(encoder_bytes, max_history, vectors_ID.shape[1])
    worst, seconds = 0.0, []
    for length in (1, 2, max_history // 2, max_history):
        items = generator.integers(0, len(vectors_ID), length)
        inputs = encoder_inputs(History(items, np.full(length, 3, np.int32)), vectors_ID, max_history)
        started = time.perf_counter()
        served_D = runner.encode(*inputs)
        seconds.append(time.perf_counter() - started)
        expected_D = vectors_ID[items].sum(axis=0)
        worst = max(worst, float(np.abs(served_D - expected_D).max()))
    return worst, float(np.median(seconds) * 1e3)
