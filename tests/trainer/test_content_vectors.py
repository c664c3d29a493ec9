"""Vectors of items' text and pictures: what of a file is refused, and what they are good for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse

from services.trainer.domain.hyper_parameters import resolve
from services.trainer.pipeline.attribute_terms import AttributeTerms
from services.trainer.pipeline.budget import Budget
from services.trainer.pipeline.content import ContentVectors, align
from services.trainer.pipeline.dataset import Cleaning, Histories, ItemAttributes, clean
from services.trainer.pipeline.pipeline import train_model
from services.trainer.pipeline.plan import Plan
from tests.trainer.conftest import columns_of

ITEMS, KINDS = 120, 6


def shop(seed: int = 0) -> tuple[list[list[int]], ContentVectors]:
    """People who stay with one kind of item; half of the items occur once or twice, and only pictures tell their kind."""
    generator = np.random.default_rng(seed)
    kind_I = np.arange(ITEMS) % KINDS
    weight_I = np.where(np.arange(ITEMS) < ITEMS // 2, 20.0, 1.0)
    histories = []
    for _ in range(250):
        mine = np.flatnonzero(kind_I == generator.integers(KINDS))
        share = weight_I[mine] / weight_I[mine].sum()
        histories.append(generator.choice(mine, 6, replace=False, p=share).tolist())
    vectors = np.eye(KINDS)[kind_I] @ generator.normal(size=(KINDS, 24)) + 0.1 * generator.normal(
        size=(ITEMS, 24)
    )
    return histories, ContentVectors(
        [f"item-{index}" for index in range(ITEMS)], (vectors + 3.0).astype(np.float32)
    )


def written(path: Path, **arrays: object) -> Path:
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = written(
        tmp_path / "v.npz", item_ids=np.array(["a", "ß"]), vectors=np.array([[1, 2, 3], [4, 5, 6]])
    )
    content = ContentVectors.read(path)
    assert content.item_ids == ["a", "ß"]
    assert content.vector_NW.tolist() == [[1, 2, 3], [4, 5, 6]]


@pytest.mark.parametrize(
    ("arrays", "why"),
    [
        ({"vectors": np.zeros((1, 2))}, "item_ids"),
        ({"item_ids": np.array([1, 2]), "vectors": np.zeros((2, 2))}, "strings"),
        ({"item_ids": np.array(["a", "b"]), "vectors": np.zeros((3, 2))}, r"\(2, width\)"),
        ({"item_ids": np.array(["a", "a"]), "vectors": np.zeros((2, 2))}, "twice"),
        ({"item_ids": np.array(["a"]), "vectors": np.array([[np.nan]])}, "no number"),
        ({"item_ids": np.array(["a"], object), "vectors": np.zeros((1, 2))}, "allow_pickle"),
    ],
)
def test_what_is_no_file_of_vectors_is_refused_with_words(
    tmp_path: Path, arrays: dict[str, np.ndarray], why: str
) -> None:
    with pytest.raises(ValueError, match=why):
        ContentVectors.read(written(tmp_path / "v.npz", **arrays))


def test_a_torn_file_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "v.npz", item_ids=np.array(["a"]), vectors=np.zeros((1, 2)))
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="no file of item vectors"):
        ContentVectors.read(path)


def test_aligned_vectors_keep_the_angles_around_their_mean_and_leave_the_unknown_at_zero() -> None:
    generator = np.random.default_rng(1)
    vectors = (5.0 + generator.normal(size=(40, 8)) * np.arange(1, 9)).astype(np.float32)
    content = ContentVectors([f"i{n}" for n in range(40)], vectors)
    found = align([*content.item_ids, "stranger"], content)
    assert found is not None
    assert found.shape == (41, 8)
    assert not found[-1].any()
    centred = vectors - vectors.mean(axis=0)
    centred /= np.linalg.norm(centred, axis=1, keepdims=True)
    np.testing.assert_allclose(found[:-1] @ found[:-1].T, centred @ centred.T, atol=1e-5)
    narrow = align(content.item_ids, content, width=2)
    assert narrow is not None
    # Of all directions those two in which items differ most.
    best = np.linalg.svd(vectors - vectors.mean(axis=0), full_matrices=False)[2][:2]
    kept = (vectors - vectors.mean(axis=0)) @ best.T
    kept /= np.linalg.norm(kept, axis=1, keepdims=True)
    np.testing.assert_allclose(narrow @ narrow.T, kept @ kept.T, atol=1e-4)
    assert align(["stranger"], content) is None
    assert align(["stranger"], None) is None


def test_content_is_served_within_the_factors_of_the_attributes() -> None:
    generator = np.random.default_rng(2)
    content_IC = generator.normal(size=(20, 5)).astype(np.float32)
    terms = AttributeTerms(
        ItemAttributes(np.zeros((20, 0), np.int32), 0, content_IC), scipy.sparse.csr_matrix((20, 20))
    )
    queries_IR, keys_IR = terms.factors(0.0, 0.0, 1.7, rank=10)
    np.testing.assert_allclose(queries_IR @ keys_IR.T, 1.7 * content_IC @ content_IC.T, atol=1e-4)
    everyone = scipy.sparse.csr_matrix(np.eye(20, dtype=np.float32))
    np.testing.assert_allclose(terms.content(everyone), content_IC @ content_IC.T, atol=1e-5)


def rare_ranks(histories: Histories, attributes: ItemAttributes) -> np.ndarray:
    """Returns the ranks of rare held-out items by the Transformer alone."""
    from services.trainer.pipeline.dataset import hold_out
    from services.trainer.pipeline.evaluation import popularity, rank_by_query
    from services.trainer.pipeline.sequence_model import SequenceModel
    from services.trainer.pipeline.training import train

    test = hold_out(histories, 1, exclude_seen=True)
    model = SequenceModel(histories.item_count, attributes, resolve("tiny", {"max_epochs": 12}), seed=1)
    train(model, histories.without_last(2), lambda: 0.0, lambda _: None, Budget(1e9, 0))
    rare = test.take(np.flatnonzero(popularity(histories.without_last(1))[test.target_B] <= 3))
    assert len(rare) > 10
    return rank_by_query(histories, rare, model.encode(histories, rare), model.item_vectors(), True)


def test_items_that_hardly_anybody_took_are_found_by_their_content() -> None:
    sequences, content = shop()
    histories = clean(columns_of(sequences), Cleaning())
    blind = ItemAttributes(np.zeros((histories.item_count, 0), np.int32), 0)
    seeing = replace(blind, content_IC=align(histories.item_ids, content))
    assert np.median(rare_ranks(histories, seeing)) < 0.7 * np.median(rare_ranks(histories, blind))


def test_a_run_with_content_is_measured_blended_and_exported() -> None:
    sequences, content = shop()
    said: list[str] = []
    trained = train_model(
        columns_of(sequences),
        {},
        resolve("tiny", {"max_epochs": 8}),
        Plan(refit=False, resamples=20),
        content=content,
        model_name="with-content",
        seed=0,
        report=lambda _stage, message, **_: said.append(message),
    )
    assert any("content vectors" in message for message in said)
    assert trained.manifest_fields["hyper_parameters"]["weight_content"] != 0.0
    assert trained.manifest_fields["training"]["parity"] < 1e-4
    assert trained.arrays["item_vectors"].shape == (trained.histories.item_count, 16)
