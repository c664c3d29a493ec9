"""Clipped, noisy gradients beside a naive twin: one person, one tape, the whole table."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from scipy.stats import kstest, norm

from services.trainer.domain.hyper_parameters import HyperParameters
from services.trainer.domain.privacy import GaussianRelease
from services.trainer.pipeline.dataset import ItemAttributes
from services.trainer.pipeline.sequence_model import SequenceModel
from services.trainer.pipeline.transformer import allowed_within_segments
from services.trainer.privacy import gradients
from services.trainer.privacy.gradients import PrivateTrainer, rows_of, train_gradients
from services.trainer.privacy.randomness import SecureRandom
from tests.trainer.test_privacy_counts import histories_of

KEY = bytes(range(32))
ITEMS, LENGTH = 11, 5
SIZE = HyperParameters(
    dimension=8, heads=2, max_history=LENGTH, dropout=0.0, negatives=4, batch_tokens=64, learning_rate=0.05
)
ROWS = [[0, 1, 2, 3], [5, 5, 5], [9, 8, 7, 6, 5, 4, 3], [10], [1, 2, 1, 2, 1, 2]]
NEGATIVES = np.array([1, 4, 6, 9], np.int32)
KINDS_SEEN = 3


def model_of() -> SequenceModel:
    places = np.array([[1 + index % 3, 4 + index % 2] for index in range(ITEMS)], np.int32)
    model = SequenceModel(ITEMS, ItemAttributes(places, 5), SIZE, seed=3)
    # Far from the tiny numbers that it begins with, so that clipping and the encoder's part matter.
    for number, variable in enumerate([model.id_table, *model.dense]):
        variable.assign_add(
            0.3 * np.random.default_rng(number).normal(size=variable.shape).astype(np.float32)
        )
    return model


def trainer_of(model: SequenceModel, clip_norm: float, noise: float = 0.0) -> PrivateTrainer:
    return PrivateTrainer(model, clip_norm, noise, 1.0, SecureRandom(KEY))


def naive_gradient(model: SequenceModel, row: list[int]) -> list[np.ndarray]:
    """One person's gradient with respect to the whole table of item vectors and each of the encoder's weights."""
    newest = row[-(LENGTH + 1) :]
    vectors = tf.Variable(model.item_vectors())
    others = [item for item in NEGATIVES.tolist() if item not in newest]
    with tf.GradientTape() as tape:
        read = [*newest[:-1], *[0] * (LENGTH - len(newest[:-1]))]
        segment = [[1] * len(newest[:-1]) + [0] * (LENGTH - len(newest[:-1]))]
        kinds = [[KINDS_SEEN] * len(newest[:-1]) + [0] * (LENGTH - len(newest[:-1]))]
        query_TD = model.encoder(
            tf.gather(vectors, [read]), tf.constant(kinds), allowed_within_segments(tf.constant(segment))
        )[0]
        losses = []
        for place, target in enumerate(newest[1:]):
            candidates = tf.gather(vectors, [target, *others])
            logits = tf.linalg.matvec(candidates, query_TD[place])
            losses.append(tf.reduce_logsumexp(logits) - logits[0])
        loss = tf.add_n(losses) / len(losses) if losses else 0.0 * tf.reduce_sum(vectors)
    found = tape.gradient(loss, [vectors, *model.dense], unconnected_gradients=tf.UnconnectedGradients.ZERO)
    return [tf.convert_to_tensor(part).numpy() for part in found]


@pytest.mark.parametrize("clip_norm", [1e-3, 0.5, 1e3])
def test_the_clipped_sum_is_that_of_people_clipped_one_by_one(clip_norm: float) -> None:
    model = model_of()
    trainer = trainer_of(model, clip_norm)
    items, kinds = rows_of(histories_of(ROWS, ITEMS), np.arange(len(ROWS)), LENGTH)
    found = trainer._clipped_sum(tf.constant(items), tf.constant(kinds), tf.constant(NEGATIVES))
    expected = [np.zeros(part.shape) for part in found]
    clipped = 0
    for row in ROWS:
        gradient = naive_gradient(model, row)
        size = np.sqrt(sum(float((part.astype(np.float64) ** 2).sum()) for part in gradient))
        clipped += size > clip_norm
        for total, part in zip(expected, gradient, strict=True):
            total += part * min(1.0, clip_norm / max(size, 1e-12))
    assert clipped == {1e-3: 4, 0.5: 4, 1e3: 0}[clip_norm]
    for total, part in zip(expected, found, strict=True):
        np.testing.assert_allclose(part.numpy(), total, atol=3e-5 * max(1.0, min(clip_norm, 10)))


@pytest.mark.parametrize("row", ROWS)
def test_one_person_alone_never_moves_the_sum_by_more_than_the_clipping_norm(row: list[int]) -> None:
    trainer = trainer_of(model_of(), 0.37)
    items, kinds = rows_of(histories_of([row], ITEMS), np.arange(1), LENGTH)
    found = trainer._clipped_sum(tf.constant(items), tf.constant(kinds), tf.constant(NEGATIVES))
    assert sum(float((part.numpy().astype(np.float64) ** 2).sum()) for part in found) <= 0.37**2


def test_a_gradient_that_is_no_number_adds_nothing() -> None:
    model = model_of()
    model.id_table.assign(tf.tensor_scatter_nd_update(model.id_table, [[5]], [[np.nan] * SIZE.dimension]))
    trainer = trainer_of(model, 1.0)
    trainer._vectors.assign(model.item_vectors())
    histories = histories_of([[5, 5, 5], [0, 1, 2, 3]], ITEMS)
    items, kinds = rows_of(histories, np.arange(2), LENGTH)
    found = trainer._clipped_sum(tf.constant(items), tf.constant(kinds), tf.constant(NEGATIVES))
    assert all(np.isfinite(part.numpy()).all() for part in found)
    assert sum(float((part.numpy() ** 2).sum()) for part in found) <= 1.0


def test_noise_of_the_promised_size_is_on_every_entry_also_when_nobody_is_drawn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trainer = trainer_of(model_of(), clip_norm=0.5, noise=3.0)
    seen: list[np.ndarray] = []
    monkeypatch.setattr(trainer, "_apply", lambda parts: seen.extend(part.numpy() for part in parts))
    nobody = np.zeros((0, LENGTH + 1), np.int32)
    trainer.step(nobody, nobody, NEGATIVES)
    assert seen[0].shape == (ITEMS, SIZE.dimension)
    entries = np.concatenate([part.reshape(-1) for part in seen])
    assert (entries != 0).all()
    assert kstest(entries / 1.5, norm.cdf).pvalue > 1e-3


def test_people_are_drawn_independently_with_the_rate_that_is_accounted_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn: list[np.ndarray] = []
    original = gradients.rows_of

    def spy(histories, people, length):  # type: ignore[no-untyped-def]
        drawn.append(people)
        return original(histories, people, length)

    monkeypatch.setattr(gradients, "rows_of", spy)
    monkeypatch.setattr(PrivateTrainer, "step", lambda *_: None)
    people = histories_of([[0, 1]] * 1000, ITEMS)
    train_gradients(people, {}, GaussianRelease(1.0, 0.05, 200), 1.0, SecureRandom(KEY), 1.0, SIZE)
    times_U = np.bincount(np.concatenate(drawn), minlength=1000)
    size_S = np.array([len(step) for step in drawn])
    # Poisson sampling, not batches of one size: sizes vary as a binomial does, and so do the times of a person.
    assert times_U.mean() == pytest.approx(10, rel=0.05)
    assert times_U.var() == pytest.approx(200 * 0.05 * 0.95, rel=0.25)
    assert size_S.var() == pytest.approx(1000 * 0.05 * 0.95, rel=0.4)


def test_enough_people_teach_the_pattern_through_the_noise() -> None:
    generator = np.random.default_rng(0)
    starts = generator.integers(0, ITEMS, 3000)
    people = histories_of([[(start + step) % ITEMS for step in range(5)] for start in starts.tolist()], ITEMS)
    model = train_gradients(people, {}, GaussianRelease(1.0, 0.1, 60), 1.0, SecureRandom(KEY), 3000.0, SIZE)
    good = histories_of([[(start + step) % ITEMS for step in range(5)] for start in range(ITEMS)], ITEMS)
    bad = histories_of([[(start - step) % ITEMS for step in range(5)] for start in range(ITEMS)], ITEMS)
    assert gradients.losses(model, good).mean() < 0.7 * gradients.losses(model, bad).mean()
