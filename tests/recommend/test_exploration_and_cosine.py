"""Propensities that are true, and the founding document's scorer worked by hand."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from shopkeeper.recommend.v1 import recommend_service_pb2 as pb
from shopkeeper.recommend.v1 import recommendation_pb2
from shopkeeper.recommend.v1.serving_config_pb2 import ServingConfig

from services.recommend.domain.cosine import cosine_similarities, moment_vector
from services.recommend.use_cases.exploration import explore
from shared.tokens import AttributionToken
from tests.recommend.shop import Shop, ids
from tests.recommend.test_rules import IDS, VECTORS, create, mine, record

Reason = recommendation_pb2.Reason


@pytest.mark.parametrize("probability", [0.1, 0.5, 1.0])
@pytest.mark.parametrize(("slots", "candidates"), [(1, 4), (3, 4), (2, 7)])
def test_the_frequency_of_what_is_shown_is_its_propensity(
    probability: float, slots: int, candidates: int
) -> None:
    page, behind = np.arange(5, dtype=np.int32), np.arange(100, 100 + candidates, dtype=np.int32)
    random, draws = np.random.default_rng(7), 6000
    shown: dict[tuple[int, int], int] = {}
    stated: dict[tuple[int, int], float] = {}
    for _ in range(draws):
        explored = explore(page, [0, 1, 2, 3, 4], behind, slots, probability, random)
        rows = explored.rows_K.tolist()
        assert len(set(rows)) == 5
        for place, (row, propensity) in enumerate(zip(rows, explored.propensities_K.tolist(), strict=True)):
            shown[place, row] = shown.get((place, row), 0) + 1
            assert stated.setdefault((place, row), propensity) == propensity
    for key, propensity in stated.items():
        # Five standard errors of a binomial share.
        error = 5 * np.sqrt(propensity * (1 - propensity) / draws)
        assert shown[key] / draws == pytest.approx(propensity, abs=error + 1e-7), key
    # At each place the propensities of everything that can stand there make 1.
    for place in range(5):
        possible = sum(value for (at, _), value in stated.items() if at == place)
        assert possible == pytest.approx(1, abs=1e-5)


def test_places_that_are_not_open_do_not_explore() -> None:
    page = np.arange(4, dtype=np.int32)
    explored = explore(page, [1], np.array([9], np.int32), 3, 1.0, np.random.default_rng(1))
    assert explored.rows_K.tolist() == [0, 9, 2, 3]
    assert explored.propensities_K.tolist() == [1, 1, 1, 1]


@pytest.fixture
def shop(make_shop: Callable[..., Shop]) -> Shop:
    shop = make_shop()
    shop.publish(IDS, VECTORS)
    shop.profile.upsert(*(record(n) for n in range(12)))
    return shop.start()


class TestExploration:
    def test_a_seed_repeats_a_draw_and_the_token_has_its_propensities(self, shop: Shop) -> None:
        create(shop, {}, exploration={"slots": 2, "probability": 0.5})
        pages = {seed: mine(shop, page_size=4, seed=seed, include_explanations=True) for seed in range(1, 25)}
        for seed, answer in pages.items():
            assert ids(mine(shop, page_size=4, seed=seed)) == ids(answer)
            assert ids(answer)[:2] == ["i0", "i1"]
            token = AttributionToken.verify(shop.signer, answer.attribution_token)
            assert token.propensities_K.tolist() == [entry.propensity for entry in answer.items]
            for entry in answer.items[2:]:
                explored = entry.item_id not in ("i2", "i3")
                assert entry.propensity == pytest.approx(0.5 / 8 if explored else 0.5)
                kinds = [reason.kind for reason in entry.reasons]
                assert (Reason.KIND_EXPLORATION in kinds) == explored
        assert len({tuple(ids(answer)) for answer in pages.values()}) > 5

    def test_what_a_pin_has_taken_does_not_explore(self, shop: Shop) -> None:
        pin = {"pin": {"pins": [{"item_id": "i9", "position": 4}]}}
        create(shop, {"p": pin}, exploration={"slots": 2, "probability": 1.0})
        for seed in range(1, 10):
            answer = mine(shop, page_size=4, seed=seed)
            assert ids(answer)[0] == "i0"
            assert ids(answer)[3] == "i9"
            assert answer.items[3].propensity == 1
            # i2 .. i11 without the pinned one, and without what stood on the page.
            assert answer.items[1].propensity == pytest.approx(1 / 8)

    def test_pages_under_exploration_repeat_nothing(self, shop: Shop) -> None:
        create(shop, {}, exploration={"slots": 2, "probability": 0.7})
        seen: list[str] = []
        token = ""
        while True:
            answer = mine(shop, page_size=4, page_token=token)
            seen += ids(answer)
            if not (token := answer.next_page_token):
                break
        assert sorted(seen) == sorted(IDS)


class TestCosine:
    def test_the_formula_worked_by_hand(self) -> None:
        # U = (3, 4), |U| = 5; R(T) = (0, 2); alpha = 0.5; U + alpha R = (3, 5).
        # I = (1, 0): 3 / (5 * 1) = 0.6.  I = (0, 2): (8 + 0.5 * 4) / (5 * 2) = 1.
        # I = (4, 3): (24 + 0.5 * 6) / (5 * 5) = 1.08.  I = 0: 0.
        items_ID = np.array([[1, 0], [0, 2], [4, 3], [0, 0]], np.float32)
        inverse_norms_I = np.array([1, 1 / 2, 1 / 5, 0], np.float32)
        portrait_D, moment_D = np.array([3, 4], np.float32), np.array([0, 2], np.float32)
        found = cosine_similarities(portrait_D, moment_D, items_ID, inverse_norms_I, 0.5)
        assert found == pytest.approx([0.6, 1.0, 1.08, 0.0])
        without = cosine_similarities(portrait_D, moment_D, items_ID, inverse_norms_I, 0.0)
        assert without == pytest.approx([0.6, 0.8, 0.96, 0.0])
        assert not cosine_similarities(np.zeros(2, np.float32), moment_D, items_ID, inverse_norms_I, 1).any()

    def test_the_moment_is_what_was_done_last(self) -> None:
        # An hour apart: weights 1/2 and 1, so R(T) = (1/2 * (3, 0) + (0, 3)) / 1.5 = (1, 2).
        vectors_HD = np.array([[3, 0], [0, 3]], np.float32)
        assert moment_vector(vectors_HD, np.array([1e9 - 3600, 1e9])) == pytest.approx([1, 2])

    def test_it_can_be_chosen_and_explained(self, shop: Shop) -> None:
        create(shop, {}, scorer=ServingConfig.Scorer.SCORER_COSINE, cosine_alpha=0.5)
        context = [{"item_id": "i5"}]
        answer = mine(shop, context_events=context, placement="search", page_size=12)
        # One event: U = R(T) = v, so that sim = 1.5 v · I / (|v| |I|).
        unit_ID = VECTORS / np.linalg.norm(VECTORS, axis=1, keepdims=True)
        expected = 1.5 * unit_ID @ unit_ID[5]
        assert {e.item_id: e.score for e in answer.items} == pytest.approx(
            {item_id: float(expected[n]) for n, item_id in enumerate(IDS)}, abs=1e-5
        )
        assert ids(answer)[0] == "i5"
        request = pb.RecommendRequest(serving_config="mine", context_events=context, placement="search")
        explained = shop.stub.Explain(pb.ExplainRequest(request=request, item_id="i6"))
        by_source = {entry.source: entry.score for entry in explained.source_scores}
        assert by_source[recommendation_pb2.CANDIDATE_SOURCE_COSINE] == pytest.approx(expected[6], abs=1e-5)

    def test_a_stranger_gets_what_is_popular(self, shop: Shop) -> None:
        create(shop, {}, scorer=ServingConfig.Scorer.SCORER_COSINE)
        assert ids(mine(shop, page_size=2)) == ["i0", "i1"]
