"""The weights of the blend: what they are learned from, and when they are not trusted."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse

from services.trainer.pipeline import blend as blend_module
from services.trainer.pipeline.attribute_terms import AttributeTerms
from services.trainer.pipeline.batch_companion import BatchCompanion, recency_weights
from services.trainer.pipeline.blend import (
    CAUTIOUS,
    CAUTIOUS_WEIGHTS,
    FEATURES,
    PRIOR,
    Blend,
    FeatureMaker,
    Terms,
    beats,
    choose,
    learn_blend,
)
from services.trainer.pipeline.conditional_logit import (
    fit_by_halves,
    fit_conditional_logit,
    log_likelihood,
)
from services.trainer.pipeline.cooccurrence import PairCounts, count_cooccurrence
from services.trainer.pipeline.dataset import (
    Cleaning,
    HeldOut,
    ItemAttributes,
    clean,
    encode_attributes,
    leave_one_out,
)
from services.trainer.pipeline.describing import describe_blend
from services.trainer.pipeline.evaluation import popularity
from shared.bundle.manifest import ScoringParameters
from shared.bundle.scoring import Companion
from tests.trainer.conftest import columns_of, walk

ATTRIBUTES_OF = {
    f"item-{n}": [f"colour:{n % 3}", f"brand:{n % 7}", "shop:all"][: 1 + n % 3] for n in range(20)
}


def attribute_case() -> tuple[ItemAttributes, scipy.sparse.csr_matrix]:
    histories = clean(columns_of(walk(users=60, items=20, longest=12)), Cleaning())
    counts = PairCounts(histories.item_count, 50)
    counts.add(histories)
    return encode_attributes(histories.item_ids, ATTRIBUTES_OF), counts.weights()


def naive_attribute_terms(attributes: ItemAttributes, pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """sim(h, i) and tr(h, i) of the module, in loops."""
    owned = [[a - 1 for a in places if a] for places in attributes.attribute_IP.tolist()]
    items, count = len(owned), attributes.attribute_count
    with_A = [sum(a in mine for mine in owned) for a in range(count)]
    weighted = [{a: np.log(items / with_A[a]) ** 2 for a in mine} for mine in owned]
    sim = np.zeros((items, items))
    N = np.zeros((count, count))
    for h in range(items):
        for i in range(items):
            dot = sum(weight * weighted[i].get(a, 0.0) for a, weight in weighted[h].items())
            lengths = [np.sqrt(sum(w * w for w in weighted[k].values())) for k in (h, i)]
            sim[h, i] = dot / (lengths[0] * lengths[1]) if min(lengths) > 0 else 0.0
            for a in owned[h]:
                for b in owned[i]:
                    N[a, b] += pairs[h, i] / (len(owned[h]) * len(owned[i]))
    E = np.outer(N.sum(1), N.sum(0)) / N.sum()
    L = np.log((N + 0.1) / (E + 0.1))
    tr = np.array(
        [
            [np.mean([L[a, b] for a in owned[h] for b in owned[i]] or [0.0]) for i in range(items)]
            for h in range(items)
        ]
    )
    return sim, tr


def test_attribute_terms_equal_the_formulas_in_loops() -> None:
    attributes, pairs_II = attribute_case()
    terms = AttributeTerms(attributes, pairs_II)
    sim, tr = naive_attribute_terms(attributes, pairs_II.toarray())
    one_of_each = scipy.sparse.csr_matrix(np.eye(len(sim)))
    np.testing.assert_allclose(terms.similarity(one_of_each), sim, atol=1e-5)
    np.testing.assert_allclose(terms.transition(one_of_each), tr, atol=1e-5)


def test_the_served_factors_are_the_weighted_terms_where_the_rank_suffices() -> None:
    attributes, pairs_II = attribute_case()
    terms = AttributeTerms(attributes, pairs_II)
    sim, tr = naive_attribute_terms(attributes, pairs_II.toarray())
    queries_IR, keys_IR = terms.factors(2.9, 1.1, 0.0, rank=20)
    np.testing.assert_allclose(queries_IR @ keys_IR.T, 2.9 * sim + 1.1 * tr, atol=1e-4)
    narrow = terms.factors(2.9, 1.1, 0.0, rank=3)
    assert narrow[0].shape == (len(sim), 3)
    best = np.linalg.svd(2.9 * sim + 1.1 * tr)[1]
    # Of all matrices of rank 3 none is closer (Eckart & Young, 1936).
    missed = np.linalg.norm(narrow[0] @ narrow[1].T - (2.9 * sim + 1.1 * tr))
    assert missed == pytest.approx(np.sqrt((best[3:] ** 2).sum()), rel=1e-3)


def test_recency_weights_count_the_newest_as_one_and_repeats_together() -> None:
    scoring = ScoringParameters(1.0, query_decay=0.5, window=3)
    found = recency_weights([np.array([4, 1, 2, 1]), np.zeros(0, np.int64)], 5, scoring, mean=False).toarray()
    np.testing.assert_allclose(found, [[0, 1.25, 0.5, 0, 0], [0, 0, 0, 0, 0]])
    means = recency_weights([np.array([4, 1, 2, 1])], 5, scoring, mean=True).toarray()
    np.testing.assert_allclose(means.sum(), 1)


def test_a_batch_gets_what_each_of_its_histories_is_served() -> None:
    histories = clean(columns_of(walk(users=60, items=20, longest=12)), Cleaning())
    generator = np.random.default_rng(0)
    factors = generator.normal(size=(2, histories.item_count, 4)).astype(np.float32)
    scoring = ScoringParameters(0.7, 5.0, window=4, backward=-0.3, repeat=0.4)
    companion = Companion(scoring, *count_cooccurrence(histories, 50), *factors)
    batch = BatchCompanion(companion)
    seen = [generator.integers(0, histories.item_count, length).astype(np.int64) for length in (1, 3, 9)]
    added_BI = batch.added(seen, batch.forward(seen))
    for row, history_H in enumerate(seen):
        np.testing.assert_allclose(added_BI[row], companion.added(history_H), rtol=1e-4, atol=1e-5)


def drawn_choices(people: int, weight_F: np.ndarray, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    feature_nKF = generator.normal(size=(people, 30, len(weight_F))).astype(np.float32)
    score_nK = feature_nKF @ weight_F + generator.gumbel(size=(people, 30))
    return feature_nKF, score_nK.argmax(axis=1)


def test_the_logit_finds_the_weights_that_choices_were_drawn_with() -> None:
    names = ("sequence", "forward", "backward")
    feature_nKF, place_n = drawn_choices(4_000, np.array([0.5, 1.2, -0.6]))
    found = fit_conditional_logit(feature_nKF, place_n, names, PRIOR)
    np.testing.assert_allclose(list(found.values()), [0.5, 1.2, -0.6], atol=0.06)
    # A place without a candidate is as good as none.
    padded = np.concatenate([feature_nKF, np.full_like(feature_nKF[:, :2], np.nan)], axis=1)
    np.testing.assert_allclose(
        list(fit_conditional_logit(padded, place_n, names, PRIOR).values()), list(found.values()), rtol=1e-4
    )


def test_of_few_people_the_weights_stay_near_the_default() -> None:
    names = ("sequence", "forward", "backward")
    feature_nKF, place_n = drawn_choices(3, np.array([-2.0, 5.0, -3.0]))
    found = fit_conditional_logit(feature_nKF, place_n, names, PRIOR)
    np.testing.assert_allclose(list(found.values()), [1.0, 0.7, 0.0], atol=0.4)
    nobody = fit_conditional_logit(feature_nKF[:0], place_n[:0], names, PRIOR)
    assert nobody == {"sequence": 1.0, "forward": 0.7, "backward": 0.0}


def test_the_model_and_the_counts_are_left_out_rather_than_turned_round() -> None:
    names = ("sequence", "forward", "backward")
    feature_nKF, place_n = drawn_choices(2_000, np.array([-1.0, 1.0, 0.0]))
    found = fit_conditional_logit(feature_nKF, place_n, names, PRIOR)
    assert set(found) == {"forward", "backward"}


def learned(draws: list[list[int]], vectors_of_walk: bool) -> Blend:
    histories = clean(columns_of(draws), Cleaning())
    split = leave_one_out(histories, exclude_seen=False)
    training = histories.first(split.training_U)
    generator = np.random.default_rng(0)
    vectors_ID = generator.normal(size=(histories.item_count, 8)).astype(np.float32)
    if vectors_of_walk:
        vectors_ID = np.eye(histories.item_count, dtype=np.float32)

    def encode(asked: HeldOut) -> np.ndarray:
        if vectors_of_walk:
            return 4 * vectors_ID[asked.target_B]
        return generator.normal(size=(len(asked), 8)).astype(np.float32)

    counts = count_cooccurrence(training, 50)
    maker = FeatureMaker(vectors_ID, Terms(*counts, None, popularity(training)))
    return learn_blend(histories, split.validation, encode, maker, popularity(training), False, seed=0)


def test_what_does_not_clearly_beat_popularity_is_not_served() -> None:
    generator = np.random.default_rng(5)
    share_I = np.arange(200, 0, -1) ** 2.0
    draws = [generator.choice(200, 3, p=share_I / share_I.sum()).tolist() for _ in range(30)]
    blend = learned(draws, vectors_of_walk=False)
    assert blend.served in {CAUTIOUS, "popularity"}
    assert not {name for name, weight in blend.weights.items() if weight} - set(CAUTIOUS_WEIGHTS)


@pytest.mark.parametrize("draws", [walk(users=40, items=60), [[n, n + 20, (n * 7) % 20] for n in range(20)]])
def test_where_nothing_is_learned_counts_are_served_with_popularity_only_if_they_help(
    draws: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blend_module, "beats", lambda *_: False)
    blend = learned(draws, vectors_of_walk=True)
    helps = blend.ndcg[CAUTIOUS] > blend.ndcg["popularity"]
    assert helps == (len(draws) == 40)
    assert blend.served == (CAUTIOUS if helps else "popularity")
    expected = CAUTIOUS_WEIGHTS if helps else {"popularity": 1.0}
    assert blend.weights == {name: expected.get(name, 0.0) for name in FEATURES}
    assert ("counts" in describe_blend(blend)[0].split(":")[-1]) == helps


def test_a_model_that_knows_is_served_also_where_people_are_few() -> None:
    blend = learned(walk(users=40, items=60), vectors_of_walk=True)
    assert blend.served == "blend"
    assert blend.weights["sequence"] > 0.5
    assert blend.ndcg["blend"] > blend.ndcg["popularity"]


def test_a_blend_that_loses_to_one_of_its_parts_is_not_served(monkeypatch: pytest.MonkeyPatch) -> None:
    # Weights that drown a model which knows: better than popularity still, worse than the model.
    drowned = {"sequence": 0.3, "forward": 0.0, "backward": 0.0, "popularity": 3.0}
    monkeypatch.setattr(blend_module, "fit_conditional_logit", lambda *_, **__: drowned)
    monkeypatch.setattr(blend_module, "fit_by_halves", lambda *_: (20.0, [drowned, drowned]))
    blend = learned(walk(users=60, items=60), vectors_of_walk=True)
    assert blend.ndcg["blend"] < blend.ndcg["sequence"]
    assert blend.served == "sequence"
    assert {name: weight for name, weight in blend.weights.items() if weight} == {"sequence": 1.0}
    assert "sequence alone is served" in describe_blend(blend)[0]


def test_of_several_better_parts_the_best_is_served_and_none_that_chance_explains() -> None:
    zero = np.zeros(100)
    qualities = {"blend": zero + 0.2, "popularity": zero, "sequence": zero + 0.3, "forward": zero + 0.4}
    assert choose({**qualities, CAUTIOUS: zero}) == "forward"
    one_person = zero + 0.2
    one_person[0] = 1.0
    assert choose({**qualities, "sequence": one_person, "forward": zero, CAUTIOUS: zero}) == "blend"


def test_likelihood_of_choices_equals_the_formula_in_loops() -> None:
    names = ("sequence", "forward")
    feature_nKF, place_n = drawn_choices(20, np.array([0.7, 0.4]))
    feature_nKF[3, 5] = np.nan
    place_n[3] = 0
    weights = {"sequence": 0.7, "forward": 0.4}
    expected = 0.0
    for row, place in enumerate(place_n):
        scores = [0.7 * f[0] + 0.4 * f[1] for f in feature_nKF[row].astype(float) if not np.isnan(f[0])]
        taken = 0.7 * float(feature_nKF[row, place, 0]) + 0.4 * float(feature_nKF[row, place, 1])
        expected += taken - np.log(np.exp(scores).sum())
    assert log_likelihood(feature_nKF, place_n, names, weights) == pytest.approx(expected, rel=1e-4)


def test_the_prior_holds_the_more_the_less_people_foretell_of_each_other() -> None:
    names = ("sequence", "forward", "backward")

    def precisions(people: int, truth: list[float]) -> list[float]:
        found = []
        for seed in range(9):
            feature_nKF, place_n = drawn_choices(people, np.array(truth), seed)
            half_n = np.arange(people) % 2
            precision, taught_by_other = fit_by_halves(feature_nKF, place_n, half_n, names, PRIOR)
            for half in (0, 1):
                others = half_n != half
                expected = fit_conditional_logit(
                    feature_nKF[others], place_n[others], names, PRIOR, precision
                )
                assert taught_by_other[half] == pytest.approx(expected)
            found.append(precision)
        return found

    assert np.median(precisions(30, [1.0, 0.7, 0.0])) > 100
    assert max(precisions(1_000, [0.2, 2.0, -1.0])) < 100


def test_a_lead_must_be_larger_than_chance_explains() -> None:
    zero = np.zeros(100)
    assert not beats(zero, zero)
    assert beats(zero + 0.02, zero)
    # One person's hit proves nothing.
    assert not beats(np.eye(100)[0], zero)
    noisy = np.random.default_rng(0).normal(0, 1, 100)
    assert not beats(noisy - noisy.mean() + 0.01, zero)
