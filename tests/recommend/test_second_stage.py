"""The second stage over a real socket: the order, its parity with training, its trace, and how it is done without."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
from shopkeeper.recommend.v1 import recommend_service_pb2 as pb
from shopkeeper.recommend.v1.serving_config_pb2 import SecondStage, ServingConfig

from services.recommend.use_cases.stages import second
from services.trainer.ranker.examples import make_examples
from services.trainer.ranker.responses import Responses
from shared.bundle import Ranker, load_bundle
from shared.bundle.ranker_features import FEATURES
from shared.event_kinds import EventKind
from shared.keys import read_verifying_key
from tests.recommend.shop import Shop, causes, eventually, ids
from tests.recommend.test_service import MakeShop
from tests.shared.test_ranker import made_ranker

COUNT = 60
IDS = [f"item-{n:02d}" for n in range(COUNT)]
EVENTS = [(3, EventKind.ITEM_VIEW), (9, EventKind.ADD_TO_CART), (20, EventKind.RECOMMENDATION_CLICK)]


def a_ranker() -> Ranker:
    """Returns one with an opinion, for features of the size that they have."""
    ranker = made_ranker(5, COUNT)
    scale_F = np.full(len(FEATURES), 3.0, np.float32)
    return Ranker(replace(ranker.weights, mean_F=np.zeros_like(scale_F), scale_F=scale_F), ranker.items)


@pytest.fixture
def shop(make_shop: MakeShop) -> Shop:
    generator = np.random.default_rng(4)
    shop = make_shop()
    pairs = {(IDS[i], IDS[j]): 0.3 for i, j in generator.integers(0, COUNT, (300, 2)).tolist() if i != j}
    shop.publish(IDS, generator.normal(size=(COUNT, 6)), pairs=pairs, ranker=a_ranker())
    shop.start()
    now = time.time()
    for place, (number, kind) in enumerate(EVENTS):
        shop.profile.record(shop.user_key("ann"), (IDS[number], kind), at=now - 86_400 * (3 - place))
    eventually(lambda: recommend(shop).freshness.events_used == len(EVENTS))
    return shop


def recommend(shop: Shop, **fields: object) -> pb.RecommendResponse:
    return shop.stub.Recommend(pb.RecommendRequest(user_id="ann", page_size=20, **fields), timeout=5)  # type: ignore[arg-type]


def configure(shop: Shop, config_id: str, **fields: object) -> None:
    config = ServingConfig(**fields)  # type: ignore[arg-type]
    shop.stub.CreateServingConfig(
        pb.CreateServingConfigRequest(serving_config_id=config_id, serving_config=config)
    )


def explained(shop: Shop, item_id: str, **fields: object) -> pb.ExplainResponse:
    request = pb.RecommendRequest(user_id="ann", page_size=20, **fields)  # type: ignore[arg-type]
    return shop.stub.Explain(pb.ExplainRequest(request=request, item_id=item_id))


def as_trained(shop: Shop, at: float) -> dict[str, np.ndarray]:
    """Returns the probabilities of every item by training's own way from a log to features."""
    registry = shop.registry / "main"
    version = next(path for path in registry.iterdir() if path.name != "aliases" and path.is_dir())
    bundle = load_bundle(version, read_verifying_key(shop.keys))
    assert bundle.ranker is not None
    events = shop.profile._histories[shop.user_key("ann")]
    shown = [n for n in range(COUNT) if n not in {number for number, _ in EVENTS}]
    zeros = np.zeros(len(shown), np.int64)
    responses = Responses(
        page_N=zeros, user_N=zeros, item_N=np.array(shown), position_N=zeros + 1,
        propensity_N=np.ones(len(shown)), time_N=zeros + int(at * 1e6), labels_NT=np.zeros((len(shown), 3), bool),
        event_user_E=np.zeros(3, np.int64), event_item_E=np.array([n for n, _ in EVENTS]),
        event_kind_E=np.array([int(kind) for _, kind in EVENTS]),
        event_time_E=np.array([event.occurred_at.ToMicroseconds() for event in events]),
        item_ids=IDS, price_of={},
    )  # fmt: skip
    examples = make_examples(responses, bundle, bundle.ranker.items, exclude_seen=True, max_pages=10)
    p_NT = bundle.ranker.probabilities(examples.features_NF)
    return {IDS[n]: p_T for n, p_T in zip(shown, p_NT, strict=True)}


def test_the_page_is_in_the_order_of_what_the_shopper_is_expected_to_do(shop: Shop) -> None:
    configure(shop, "plain")
    configure(shop, "first", second_stage=SecondStage(disabled=True))
    expected = as_trained(shop, time.time())
    best = sorted(expected, key=lambda item_id: -expected[item_id][0])
    assert ids(recommend(shop, serving_config="plain")) == best[:20]
    # A control: without it the order is another one.
    assert ids(recommend(shop, serving_config="first")) != best[:20]


def test_probabilities_at_serving_are_those_of_training(shop: Shop) -> None:
    found = explained(shop, IDS[30])
    expected = as_trained(shop, time.time())[IDS[30]]
    stage = found.second_stage
    served = [stage.click_probability, stage.cart_probability, stage.purchase_probability]
    # Seconds pass between the two; an hour would show.
    assert served == pytest.approx(expected.tolist(), abs=1e-5)
    assert np.abs(as_trained(shop, time.time() - 7_200)[IDS[30]] - expected).max() > 1e-4


def test_explain_says_what_the_second_stage_did(shop: Shop) -> None:
    configure(shop, "plain")
    configure(shop, "first", second_stage=SecondStage(disabled=True))
    top = ids(recommend(shop, serving_config="plain"))[0]
    after, before = explained(shop, top, serving_config="plain"), explained(shop, top, serving_config="first")
    assert after.second_stage.position == after.position == 1
    assert after.second_stage.first_stage_position == before.position > 1
    assert after.second_stage.first_stage_score == pytest.approx(before.score, abs=1e-4)
    sources = sum(entry.contribution for entry in after.source_scores if entry.source != 8)
    assert sources == pytest.approx(after.second_stage.first_stage_score, abs=1e-4)
    assert any("second stage expects a click" in finding for finding in after.findings)
    assert "second_stage" in [stage.name for stage in after.trace.stages]
    assert not before.HasField("second_stage")


def test_a_serving_config_says_what_outcomes_are_worth_and_how_deep_the_stage_goes(shop: Shop) -> None:
    expected = as_trained(shop, time.time())
    configure(shop, "sales", second_stage=SecondStage(purchase_weight=1))
    assert (
        ids(recommend(shop, serving_config="sales"))
        == sorted(expected, key=lambda item_id: -expected[item_id][2])[:20]
    )
    configure(shop, "first", second_stage=SecondStage(disabled=True))
    configure(shop, "shallow", second_stage=SecondStage(depth=5))
    first, shallow = (ids(recommend(shop, serving_config=name)) for name in ("first", "shallow"))
    assert sorted(first[:5]) == sorted(shallow[:5])
    assert first[:5] != shallow[:5]
    assert first[5:] == shallow[5:]


def test_without_the_time_for_it_the_first_stage_answers_and_says_so(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(shop, "plain")
    configure(shop, "first", second_stage=SecondStage(disabled=True))
    monkeypatch.setattr(second, "_SECOND_STAGE_SECONDS", 60.0)
    answer = recommend(shop, serving_config="plain")
    assert ids(answer) == ids(recommend(shop, serving_config="first"))
    assert causes(answer) == {"RANKER_SKIPPED"}


def test_a_stranger_is_not_ranked_again(shop: Shop) -> None:
    answer = shop.stub.Recommend(pb.RecommendRequest(page_size=5, include_trace=True))
    assert "second_stage" not in [stage.name for stage in answer.trace.stages]
    assert not answer.degraded
