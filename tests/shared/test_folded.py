"""The server's form of the companion says what the formula's own form says."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.bundle.folded import FoldedCompanion
from shared.bundle.manifest import ScoringParameters
from shared.bundle.scoring import (
    Companion,
    CooccurrenceMatrix,
    cooccurrence_scores,
    naive_blended_scores,
)

ITEMS = 30


def counts_of(random: np.random.Generator) -> CooccurrenceMatrix:
    dense_II = random.random((ITEMS, ITEMS)) * (random.random((ITEMS, ITEMS)) < 0.2)
    row_N, column_N = np.nonzero(dense_II)
    indptr = np.concatenate([[0], np.cumsum(np.bincount(row_N, minlength=ITEMS))])
    return CooccurrenceMatrix(
        indptr.astype(np.int64), column_N.astype(np.int32), dense_II[row_N, column_N].astype(np.float32)
    )


def companion_of(
    random: np.random.Generator, *, window: int, backward: float, repeat: float, attributes: bool
) -> Companion:
    factors = (
        [random.normal(size=(ITEMS, 4)).astype(np.float32) for _ in range(2)] if attributes else [None] * 2
    )
    scoring = ScoringParameters(0.5, 30.0, 0.6065, window, 1.0, backward, repeat)
    return Companion(scoring, counts_of(random), counts_of(random) if backward else None, *factors)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    length=st.integers(1, 12),
    window=st.sampled_from([1, 4, 50]),
    backward=st.sampled_from([0.0, 0.3]),
    repeat=st.sampled_from([0.0, -0.4]),
    attributes=st.booleans(),
)
def test_folding_changes_no_score(
    seed: int, length: int, window: int, backward: float, repeat: float, attributes: bool
) -> None:
    random = np.random.default_rng(seed)
    companion = companion_of(random, window=window, backward=backward, repeat=repeat, attributes=attributes)
    folded = FoldedCompanion.of(companion)
    history_H = random.integers(0, ITEMS, length)
    everything_I = np.arange(ITEMS)

    c_I, counted_I = folded.counts(history_H)
    content_I = folded.content(history_H)
    added_I = counted_I if content_I is None else counted_I + content_I
    nothing_ID, bias_I = np.zeros((ITEMS, 1), np.float32), np.zeros(ITEMS, np.float32)
    naive_I = naive_blended_scores(nothing_ID, bias_I, companion, np.zeros(1, np.float32), history_H)
    np.testing.assert_allclose(added_I, naive_I + np.log(ITEMS), atol=1e-5)
    np.testing.assert_allclose(
        counted_I, companion.counted(history_H), atol=1e-6, err_msg="what counts and repeats add"
    )
    np.testing.assert_allclose(
        c_I, cooccurrence_scores(companion.forward, history_H, companion.scoring), atol=1e-6
    )

    # In any order, and one of them twice.
    candidates_C = np.concatenate([random.permutation(everything_I)[:9], [3, 3]])
    np.testing.assert_allclose(
        folded.losses(history_H, candidates_C), companion.losses(history_H, candidates_C), atol=1e-5
    )
    places_E = np.arange(max(0, length - 5), length)
    without_EC = folded.added_without(history_H, places_E, candidates_C)
    for place, without_C in zip(places_E, without_EC, strict=True):
        rest_H = np.delete(history_H, place)
        np.testing.assert_allclose(without_C, companion.added_to(rest_H, candidates_C), atol=1e-5)
