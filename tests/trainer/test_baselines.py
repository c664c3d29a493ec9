"""The baselines of the ladder, beside their formulas in loops or dense matrices."""

from __future__ import annotations

import numpy as np
import pytest

from services.trainer.pipeline.baselines import ease, item_knn
from services.trainer.pipeline.dataset import Cleaning, Histories, clean, leave_one_out
from services.trainer.pipeline.evaluation import ndcg_at_10, popularity, rank_by_fixed_scores, rank_by_query
from shared.bundle.scoring import CooccurrenceMatrix
from tests.trainer.conftest import columns_of, walk


def shop(items: int) -> Histories:
    return clean(columns_of(walk(users=80, items=items, longest=9)), Cleaning())


def people_by_items(histories: Histories) -> np.ndarray:
    X = np.zeros((histories.user_count, histories.item_count))
    for user in range(histories.user_count):
        X[user, histories.item_E[histories.start_U1[user] : histories.start_U1[user + 1]]] = 1
    return X


def largest_of_rows(dense: np.ndarray, count: int) -> np.ndarray:
    kept = np.zeros_like(dense)
    for row in range(len(dense)):
        best = np.argsort(-np.abs(dense[row]), kind="stable")[:count]
        kept[row, best] = dense[row, best]
    return kept


def naive_ease(X: np.ndarray, l2: float) -> np.ndarray:
    P = np.linalg.inv(X.T @ X + l2 * np.eye(X.shape[1]))
    B = -P / np.diag(P)
    np.fill_diagonal(B, 0)
    return B


# Packed storage has a case for an even number of items and one for an odd.
@pytest.mark.parametrize("items", [20, 21, 2])
def test_ease_equals_the_inverse_of_the_dense_matrix(items: int) -> None:
    histories = shop(items)
    assert histories.item_count == items
    found = ease(histories, l2=3.0).to_dense()
    np.testing.assert_allclose(found, naive_ease(people_by_items(histories), 3.0), atol=1e-5)


def test_ease_keeps_the_largest_weights_of_each_row() -> None:
    histories = shop(20)
    found = ease(histories, l2=3.0, neighbours=4).to_dense()
    expected = largest_of_rows(naive_ease(people_by_items(histories), 3.0), 4)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_ease_of_a_large_catalogue_is_that_of_its_most_popular_items() -> None:
    histories = shop(20)
    X = people_by_items(histories)
    popular = np.sort(np.argsort(-X.sum(axis=0), kind="stable")[:7])
    expected = np.zeros((20, 20))
    expected[np.ix_(popular, popular)] = naive_ease(X[:, popular], 3.0)
    np.testing.assert_allclose(ease(histories, l2=3.0, max_items=7).to_dense(), expected, atol=1e-5)


def naive_item_knn(X: np.ndarray, neighbours: int) -> np.ndarray:
    items = X.shape[1]
    cosine = np.zeros((items, items))
    for i in range(items):
        for j in range(items):
            if i != j:
                cosine[i, j] = (X[:, i] @ X[:, j]) / np.sqrt(X[:, i].sum() * X[:, j].sum())
    return largest_of_rows(cosine, neighbours)


def test_item_knn_keeps_the_nearest_items_by_cosine() -> None:
    histories = shop(20)
    X = people_by_items(histories)
    np.testing.assert_allclose(item_knn(histories, 100).to_dense(), naive_item_knn(X, 100), atol=1e-6)
    few = item_knn(histories, 3)
    assert (np.diff(few.indptr_I1) <= 3).all()
    # Equal cosines may be kept or not: what is kept is as near as the nearest three.
    for found, expected in zip(few.to_dense(), naive_item_knn(X, 3), strict=True):
        np.testing.assert_allclose(np.sort(found), np.sort(expected), atol=1e-6)


def test_a_matrix_without_any_pair_is_empty() -> None:
    alone = clean(columns_of([[0], [1], [2]]), Cleaning())
    assert isinstance(item_knn(alone), CooccurrenceMatrix)
    assert item_knn(alone).to_dense().sum() == 0
    assert np.abs(ease(alone).to_dense()).sum() == 0


def test_the_founding_documents_model_learns_who_likes_what_and_beats_popularity() -> None:
    from services.trainer.pipeline.founding_model import FoundingModel, train_founding_model

    # Two crowds, each with a taste: their people and items are told apart, not the order of events.
    generator = np.random.default_rng(0)
    draws = [(generator.permutation(15)[:9] + 15 * (user % 2)).tolist() for user in range(200)]
    histories = clean(columns_of(draws), Cleaning())
    split = leave_one_out(histories, exclude_seen=True)
    training = histories.first(split.training_U)
    query_BD, items_ID = train_founding_model(
        training, histories.first(split.before_test_U), histories, split.validation, split.test, True, 0, lambda: None
    )  # fmt: skip
    ours = ndcg_at_10(rank_by_query(histories, split.test, query_BD, items_ID, True)).mean()
    popular = ndcg_at_10(rank_by_fixed_scores(histories, split.test, popularity(training), True)).mean()
    assert ours > 1.3 * popular

    # Query and item vectors order the items as the probability does.
    model = FoundingModel(histories.user_count, histories.item_count, seed=1)
    model.train_pass(training)
    some = split.test.take(np.arange(3))
    query_BD, items_ID = model.factors(some)
    items = np.arange(histories.item_count)
    for row, user in enumerate(some.user_B):
        p_I = model._model.predict([np.full(len(items), user), items], verbose=0)[:, 0]
        score_I = query_BD[row] @ items_ID.T
        assert (np.diff(p_I[np.argsort(score_I)]) >= -1e-6).all()
