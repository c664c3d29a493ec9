"""What a private version holds is a function of private outputs and the catalogue: two logs, one noise, the same bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest

from services.trainer.domain.privacy import COUNTS, GRADIENTS, DifferentialPrivacy
from services.trainer.pipeline.plan import Plan
from services.trainer.pipeline.sequence_model import SequenceModel
from services.trainer.privacy import training
from services.trainer.privacy.contributions import GRID
from services.trainer.privacy.counts import NoisyCounts
from services.trainer.privacy.measuring import summarise
from services.trainer.privacy.randomness import SecureRandom
from services.trainer.privacy.training import PrivateModel, train_privately
from tests.trainer.conftest import columns_of, walk

ITEMS = 30
CATALOGUE = {f"item-{index}": [f"shelf={index % 4}"] for index in range(ITEMS)}
MOMENT = datetime(2026, 1, 1, tzinfo=UTC)
LOGS = {
    "many": walk(users=300, items=ITEMS, seed=1),
    "few": walk(users=40, items=7, seed=2),
    "one": [[5, 6, 7]],
    "nobody": [],
}


@pytest.fixture
def fixed_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts one answer in the place of everything that noise makes private: counts, the choice, measures, weights."""
    generator = np.random.default_rng(0)
    pair_N = np.sort(generator.choice(ITEMS * ITEMS, 60, replace=False))
    counts = NoisyCounts(
        ITEMS,
        pair_N,
        generator.integers(GRID, 9 * GRID, 60),
        generator.integers(0, 9 * GRID, ITEMS),
        GRID,
        GRID,
    )
    measures = summarise(generator.random((200, 5)), 3.0, SecureRandom(bytes(32)))
    monkeypatch.setattr(training, "add_noise", lambda *_: counts)
    monkeypatch.setattr(training, "choose_weight", lambda *_: 3.0)
    monkeypatch.setattr(training, "measure", lambda *_: measures)
    # Milliseconds are the machine's, on histories of nobody.
    monkeypatch.setattr(training, "parity_of_sum_encoder", lambda *_: (1e-7, 0.25))


def published(log: list[list[int]], mechanism: str) -> tuple[PrivateModel, list[Any]]:
    told: list[Any] = []
    model = train_privately(
        columns_of(log), CATALOGUE, DifferentialPrivacy(2.0, mechanism=mechanism), Plan(), model_name="main",
        report=lambda *words, **fields: told.append((words, sorted(fields.items()))),
        charge=lambda releases: told.append(tuple(releases)), as_of=MOMENT,
    )  # fmt: skip
    return model, told


def bytes_of(model: PrivateModel) -> dict[str, bytes]:
    return {
        **{name: array.tobytes() for name, array in model.arrays.items()},
        "encoder": model.encoder_bytes,
        "vocabulary": json.dumps(list(model.vocabulary)).encode(),
        "manifest": json.dumps(model.manifest_fields, sort_keys=True).encode(),
        **model.attachments,
    }


@pytest.mark.parametrize("log", ["few", "one", "nobody"])
@pytest.mark.usefixtures("fixed_outputs")
def test_a_version_of_counts_its_card_and_its_journal_read_nothing_but_noisy_outputs(log: str) -> None:
    expected, expected_journal = published(LOGS["many"], COUNTS)
    found, journal = published(LOGS[log], COUNTS)
    assert bytes_of(found) == bytes_of(expected)
    assert journal == expected_journal


@pytest.mark.usefixtures("fixed_outputs")
def test_a_version_of_gradients_reads_nothing_but_the_trained_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from services.trainer.pipeline.dataset import encode_attributes
    from services.trainer.privacy import gradients

    def untrained(training_people: Any, attributes_of: Any, *_: Any, **__: Any) -> SequenceModel:
        attributes = encode_attributes(training_people.item_ids, attributes_of)
        return SequenceModel(training_people.item_count, attributes, gradients.SIZE, seed=0)

    monkeypatch.setattr(gradients, "train_gradients", untrained)
    # Milliseconds, again.
    measured: Callable[..., tuple[float, float]] = gradients.measure_parity
    monkeypatch.setattr(gradients, "measure_parity", lambda *given: (measured(*given)[0], 0.25))
    expected, expected_journal = published(LOGS["many"], GRADIENTS)
    found, journal = published(LOGS["few"], GRADIENTS)
    assert bytes_of(found) == bytes_of(expected)
    assert journal == expected_journal


def test_with_noise_of_its_own_each_run_is_another() -> None:
    # The tests above compare something: what is fixed there does reach the version.
    one, two = (bytes_of(published(LOGS["many"], COUNTS)[0]) for _ in range(2))
    assert one["item_bias"] != two["item_bias"]
    assert one["card.md"] != two["card.md"]
