"""Canaries: what an attacker who sees the release can prove about who was in it.

After Steinke, Nasr & Jagielski (2023): m made-up people each take part by a coin of their own in one and the same
run; the attacker scores each, guesses "in" for the highest and "out" for the lowest, and abstains on the rest. Were
the run (epsilon, delta)-private, so many right guesses would be improbable; the largest epsilon that the guesses
refute is a lower bound on the true one. It must not exceed what the card says; and the same attack on a run without
noise must exceed it, or the attack is too weak to say anything.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import binom

from services.trainer.domain.hyper_parameters import HyperParameters
from services.trainer.domain.privacy import GaussianRelease
from services.trainer.pipeline.dataset import Histories
from services.trainer.privacy.contributions import sum_shares
from services.trainer.privacy.counts import add_noise
from services.trainer.privacy.randomness import SecureRandom

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]

_VIEW = 3
_NO_CLIPPING = 1e6


@dataclass(frozen=True, slots=True)
class Audit:
    """What the attack proved.

    Attributes:
        canaries, guesses, right: how many there were, were guessed, were guessed right.
        epsilon: lower bound, at the confidence that was asked for.
    """

    canaries: int
    guesses: int
    right: int
    epsilon: float


def p_value(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """Returns the most probable that so many right guesses are under (epsilon, delta) (Steinke et al., theorem 5.2)."""
    accuracy = 1 / (1 + math.exp(-epsilon))
    tail = float(binom.sf(right - 1, guesses, accuracy))
    # alpha = max over i of P[right - i <= Binomial < right] / i
    below = np.cumsum(binom.pmf(np.arange(right - 1, -1, -1), guesses, accuracy))
    alpha = float((below / np.arange(1, right + 1)).max()) if right else 0.0
    return min(tail + 2 * canaries * delta * alpha, 1.0)


def epsilon_refuted(canaries: int, guesses: int, right: int, delta: float, confidence: float = 0.95) -> float:
    """Returns the largest epsilon that is refuted with that confidence; 0 where none is."""
    level = 1 - confidence
    if p_value(canaries, guesses, right, 0.0, delta) > level:
        return 0.0
    low, high = 0.0, 1.0
    while p_value(canaries, guesses, right, high, delta) <= level and high < 64:
        low, high = high, 2 * high
    for _ in range(40):
        middle = (low + high) / 2
        if p_value(canaries, guesses, right, middle, delta) <= level:
            low = middle
        else:
            high = middle
    return low


def judge_guesses(score_M: Float64, included_M: npt.NDArray[np.bool_], guesses: int, delta: float) -> Audit:
    """Returns what guessing "in" for the highest half of `guesses`, fixed beforehand, and "out" for the lowest proves."""
    order = np.argsort(score_M, kind="stable")
    half = guesses // 2
    right = int(included_M[order[-half:]].sum() + (~included_M[order[:half]]).sum())
    return Audit(len(score_M), 2 * half, right, epsilon_refuted(len(score_M), 2 * half, right, delta))


def audit_counts(
    people: Histories, canaries: int, noise_multiplier: float, delta: float, generator: np.random.Generator
) -> Audit:
    """Attacks the noisy counts, every cell of them, also those below the threshold.

    A canary took two items in an order in which nobody else did; the attacker reads that cell.
    """
    items = people.item_count
    counted = sum_shares(people, 1.0).pair_N
    free = np.setdiff1d(np.arange(items * items, dtype=np.int64), counted)
    free = free[free // items != free % items]
    pair_M = generator.permutation(free)[:canaries]
    if len(pair_M) < canaries:
        raise ValueError(f"only {len(pair_M)} pairs are free for {canaries} canaries")
    included_M = generator.random(canaries) < 0.5
    with_them = add_people(people, np.stack(np.divmod(pair_M[included_M], items), axis=1))
    counts = add_noise(sum_shares(with_them, 1.0), noise_multiplier, SecureRandom(), threshold=-(1 << 62))
    place_M = np.minimum(np.searchsorted(counts.pair_N, pair_M), max(len(counts.pair_N) - 1, 0))
    found_M = counts.pair_N[place_M] == pair_M
    score_M = np.where(found_M, counts.weight_N[place_M], 0).astype(np.float64)
    return judge_guesses(score_M, included_M, canaries // 2, delta)


def audit_gradients(
    people: Histories,
    canaries: int,
    release: GaussianRelease,
    clip_norm: float,
    delta: float,
    generator: np.random.Generator,
    size: HyperParameters,
    *,
    noise: float | None = None,
    sampling_rate: float | None = None,
    clipping: bool = True,
    random: SecureRandom | None = None,
) -> Audit:
    """Attacks DP-Adam with all that its accounting lets be seen: the noisy sum of every step.

    A canary took items that nobody else did; its score is the sum over steps of the product of the noisy sum with the
    direction in which the canary would have pulled the vectors of those (after Nasr et al., 2023, with real gradients).

    Args:
        people: leave enough items of the catalogue alone for the canaries.
        release: what is claimed.
        noise, sampling_rate, clipping: what is done in truth, for controls: a run that lies must be caught.
        random: for tests that repeat.
    """
    from services.trainer.privacy import gradients
    from services.trainer.privacy.gradients_audit import watching

    length = size.max_history + 1
    free = np.setdiff1d(np.arange(people.item_count), people.item_E)
    if len(free) < canaries * length:
        raise ValueError(f"only {len(free)} items are free for {canaries} canaries of {length}")
    canary_ML = generator.permutation(free)[: canaries * length].reshape(canaries, length)
    included_M = generator.random(canaries) < 0.5
    with_them = add_people(people, canary_ML[included_M])
    canary_rows = gradients.rows_of(
        add_people(take_none(people), canary_ML), np.arange(canaries), size.max_history
    )
    trainer_type, score_M = watching(canary_rows)
    true_noise = release.noise_multiplier if noise is None else noise
    # Without clipping the noise stays as large as it was.
    true_clip = clip_norm if clipping else _NO_CLIPPING
    done = GaussianRelease(release.noise_multiplier, sampling_rate or release.sampling_rate, release.steps)
    gradients.train_gradients(
        with_them, {}, done, true_clip, random or SecureRandom(), 1 / release.sampling_rate, size,
        noise=true_noise * clip_norm / true_clip, trainer_type=trainer_type,
    )  # fmt: skip
    return judge_guesses(score_M, included_M, canaries // 4, delta)


def take_none(people: Histories) -> Histories:
    """Returns nobody, over the same items."""
    return Histories(
        np.zeros(1, np.int64), np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0, np.int64),
        people.item_ids, np.zeros(0, np.int64),
    )  # fmt: skip


def add_people(people: Histories, item_ML: Int64) -> Histories:
    """Returns the histories with those of further people, all of one length, after them."""
    extra, length = item_ML.shape
    last = int(people.start_U1[-1])
    return Histories(
        np.concatenate([people.start_U1, last + length * np.arange(1, extra + 1)]),
        np.concatenate([people.item_E, item_ML.reshape(-1).astype(np.int32)]),
        np.concatenate([people.kind_E, np.full(extra * length, _VIEW, np.int32)]),
        np.concatenate([people.time_E, np.zeros(extra * length, np.int64)]),
        people.item_ids,
        np.arange(people.user_count + extra),
    )
