"""Two versions side by side: people divided by an experiment, and a shadow that is never shown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import grpc
import numpy as np
import pytest
from prometheus_client import REGISTRY
from shopkeeper.feedback.v1 import experiment_pb2, feedback_service_pb2, feedback_service_pb2_grpc
from shopkeeper.recommend.v1 import recommend_service_pb2 as pb
from shopkeeper.recommend.v1.serving_config_pb2 import ServingConfig

from services.recommend.domain.ranking import (
    determinantal_point_process,
    dpp_kernel,
    naive_determinantal_point_process,
)
from services.recommend.use_cases.shadow import rank_biased_overlap
from shared.experiments import Split, VariantShare, assign
from shared.tokens import AttributionToken
from tests.recommend.shop import Shop, causes, eventually, ids, item, point
from tests.recommend.test_service import IDS, VECTORS, recommend

MakeShop = Callable[..., Shop]
REVERSED = [float(n) for n in range(1, 8)]


class Feedback(feedback_service_pb2_grpc.FeedbackServiceServicer):
    """Says which experiments run, on a socket."""

    def __init__(self) -> None:
        self.experiments: list[experiment_pb2.Experiment] = []
        self.server = grpc.server(futures.ThreadPoolExecutor(4), options=[("grpc.so_reuseport", 0)])
        feedback_service_pb2_grpc.add_FeedbackServiceServicer_to_server(self, self.server)
        self.port = self.server.add_insecure_port("127.0.0.1:0")
        self.server.start()

    def ListExperiments(self, request: Any, context: grpc.ServicerContext) -> Any:
        running = [one for one in self.experiments if request.state in (0, one.state)]
        start = int(request.page_token or 0)
        page = running[start : start + 1]
        more = start + 1 < len(running)
        return feedback_service_pb2.ListExperimentsResponse(
            experiments=page, next_page_token=str(start + 1) if more else ""
        )


@pytest.fixture
def feedback() -> Iterator[Feedback]:
    feedback = Feedback()
    yield feedback
    feedback.server.stop(0)


@pytest.fixture
def shop(make_shop: MakeShop, feedback: Feedback) -> Shop:
    shop = make_shop(
        feedback_address=f"127.0.0.1:{feedback.port}",
        experiment_poll_seconds=0.05,
        configuration_poll_seconds=0.02,
    )
    shop.publish(IDS, VECTORS)
    shop.profile.upsert(*(item(item_id) for item_id in IDS))
    return shop.start()


def create_config(shop: Shop, config_id: str, **fields: Any) -> None:
    shop.stub.CreateServingConfig(
        pb.CreateServingConfigRequest(serving_config_id=config_id, serving_config=ServingConfig(**fields))
    )


def candidate(shop: Shop) -> str:
    """Publishes a version in which the least popular is the most popular, as "candidate"."""
    version = shop.publish(IDS, VECTORS, popularity=REVERSED, alias=False)
    point(shop.registry, version, "candidate")
    return version


class TestAnExperiment:
    def test_divides_people_between_two_versions_and_says_so_in_the_token(
        self, shop: Shop, feedback: Feedback
    ) -> None:
        version = candidate(shop)
        create_config(shop, "next", model_alias="candidate")
        feedback.experiments = [
            experiment_pb2.Experiment(experiment_id="other", placement="cart", state=2),
            experiment_pb2.Experiment(
                experiment_id="models",
                placement="home",
                traffic_fraction=0.8,
                state=experiment_pb2.EXPERIMENT_STATE_RUNNING,
                variants=[
                    experiment_pb2.Variant(variant_id="control", weight=1, serving_config="default"),
                    experiment_pb2.Variant(variant_id="next", weight=1, serving_config="next"),
                ],
            ),
        ]
        split = Split(
            "models",
            "models",
            0.8,
            [VariantShare("control", 1, "default"), VariantShare("next", 1, "next")],
        )
        eventually(lambda: shop.service.experiments.split("home") == split or _same(shop, split))  # type: ignore[union-attr]
        eventually(lambda: recommend(shop, serving_config="next").model.version == version)
        seen: Counter[str] = Counter()
        for n in range(60):
            answer = recommend(shop, user_id=f"u{n}", page_size=3)
            expected = assign(shop.user_key(f"u{n}"), split)
            label = expected.label if expected is not None else ""
            assert answer.model.variant == label
            assert AttributionToken.verify(shop.signer, answer.attribution_token).variant == label
            assert (answer.model.version == version) == (label == "models/next")
            assert ids(answer)[0] == (IDS[-1] if label == "models/next" else IDS[0])
            # The next page is of the same variant.
            more = recommend(shop, user_id=f"u{n}", page_size=3, page_token=answer.next_page_token)
            assert more.model.variant == label
            seen[label] += 1
        assert len(seen) == 3
        # Who names a config or a variant is nobody's subject; neither is who has no name.
        assert recommend(shop, user_id="u1", serving_config="default").model.variant == ""
        assert recommend(shop, user_id="u1", variant="mine").model.variant == "mine"
        assert recommend(shop).model.variant == ""

    def test_goes_on_while_feedback_is_away_and_ends_when_it_is_stopped(
        self, shop: Shop, feedback: Feedback
    ) -> None:
        experiment = experiment_pb2.Experiment(
            experiment_id="x",
            placement="home",
            traffic_fraction=1,
            state=experiment_pb2.EXPERIMENT_STATE_RUNNING,
            variants=[experiment_pb2.Variant(variant_id="a", weight=1, serving_config="popular")],
        )
        feedback.experiments = [experiment]
        eventually(lambda: recommend(shop, user_id="u").model.variant == "x/a")
        experiment.state = experiment_pb2.EXPERIMENT_STATE_STOPPED
        eventually(lambda: recommend(shop, user_id="u").model.variant == "")
        experiment.state = experiment_pb2.EXPERIMENT_STATE_RUNNING
        eventually(lambda: recommend(shop, user_id="u").model.variant == "x/a")
        feedback.server.stop(0).wait()
        eventually(lambda: shop.service.experiments.last_error)  # type: ignore[union-attr]
        assert recommend(shop, user_id="u").model.variant == "x/a"

    def test_a_config_that_there_is_not_leaves_people_where_they_are(
        self, shop: Shop, feedback: Feedback
    ) -> None:
        feedback.experiments = [
            experiment_pb2.Experiment(
                experiment_id="x",
                placement="home",
                traffic_fraction=1,
                state=experiment_pb2.EXPERIMENT_STATE_RUNNING,
                variants=[experiment_pb2.Variant(variant_id="a", weight=1, serving_config="nobody")],
            )
        ]
        eventually(lambda: shop.service.experiments.split("home"))  # type: ignore[union-attr]
        answer = recommend(shop, user_id="u")
        assert (answer.model.variant, answer.model.serving_config) == ("", "default")


def _same(shop: Shop, split: Split) -> bool:
    found = shop.service.experiments.split("home")  # type: ignore[union-attr]
    return found is not None and (found.salt, tuple(found.variants)) == (split.salt, tuple(split.variants))


class TestAnAlias:
    def test_without_a_version_the_services_own_answers_and_says_so(self, shop: Shop) -> None:
        create_config(shop, "next", model_alias="candidate")
        answer = recommend(shop, serving_config="next")
        assert answer.model.version == recommend(shop).model.version
        assert "NO_MODEL" in causes(answer)
        version = candidate(shop)
        eventually(lambda: recommend(shop, serving_config="next").model.version == version)
        assert not causes(recommend(shop, serving_config="next"))

    def test_is_followed_as_long_as_a_config_names_it(self, shop: Shop) -> None:
        candidate(shop)
        create_config(shop, "next", model_alias="candidate")
        eventually(lambda: len(shop.stub.GetModelStatus(pb.GetModelStatusRequest()).models) == 2)
        shop.stub.DeleteServingConfig(pb.DeleteServingConfigRequest(serving_config_id="next"))
        eventually(lambda: len(shop.stub.GetModelStatus(pb.GetModelStatusRequest()).models) == 1)

    def test_a_damaged_version_behind_it_is_refused_and_told(self, shop: Shop) -> None:
        create_config(shop, "next", model_alias="candidate")
        point(shop.registry, "20990101t000000z-000000", "candidate")
        eventually(lambda: shop.stub.GetModelStatus(pb.GetModelStatusRequest()).refused)
        assert recommend(shop, serving_config="next").items


class TestAShadow:
    def test_is_compared_and_never_shown(self, shop: Shop) -> None:
        version = candidate(shop)
        create_config(shop, "watched", shadow_model_alias="candidate", scorer=ServingConfig.SCORER_POPULARITY)
        eventually(
            lambda: (
                version
                in [one.version for one in shop.stub.GetModelStatus(pb.GetModelStatusRequest()).models]
            )
        )
        labels = {"serving_config": "watched"}

        def value(suffix: str) -> float:
            return REGISTRY.get_sample_value(f"shopkeeper_recommend_shadow_overlap_{suffix}", labels) or 0.0

        for _ in range(5):
            answer = recommend(shop, serving_config="watched", page_size=4)
            assert answer.model.version != version
            assert ids(answer) == IDS[:4]
        eventually(lambda: value("count") == 5)
        # Of 7 items in the opposite order, the first four of both have one in common.
        assert value("sum") == pytest.approx(5 * 1 / 4)

    @pytest.mark.parametrize(
        ("first", "second", "expected"),
        [
            ([1, 2, 3], [1, 2, 3], 1.0),
            ([1, 2], [3, 4], 0.0),
            # Depth 1: 0 of 1; depth 2: 2 of 2. Weights 1 and 0.9.
            ([1, 2], [2, 1], 0.9 / 1.9),
            ([], [], 1.0),
            ([1], [], 0.0),
        ],
    )
    def test_rank_biased_overlap(self, first: list[int], second: list[int], expected: float) -> None:
        pair = np.array(first, np.int32), np.array(second, np.int32)
        assert rank_biased_overlap(*pair) == pytest.approx(expected)


class TestDeterminantalPointProcess:
    @pytest.mark.parametrize("seed", range(10))
    @pytest.mark.parametrize("strength", [0.2, 0.5, 0.9])
    def test_the_fast_greedy_takes_what_the_determinants_say(self, seed: int, strength: float) -> None:
        random = np.random.default_rng(seed)
        relevance = np.sort(random.normal(size=12).astype(np.float32))[::-1].copy()
        vectors = random.normal(size=(12, 5)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        fast = determinantal_point_process(relevance, vectors, strength, 6)
        slow = naive_determinantal_point_process(relevance, vectors, strength, 6)
        kernel = dpp_kernel(relevance, vectors, strength)
        # Equal up to ties of determinants.
        assert np.linalg.det(kernel[np.ix_(fast, fast)]) == pytest.approx(
            np.linalg.det(kernel[np.ix_(slow, slow)]), rel=1e-6
        )

    def test_a_twin_of_the_best_waits_and_without_strength_the_order_stays(self) -> None:
        relevance = np.array([3.0, 2.9, 1.0], np.float32)
        vectors = np.array([[1, 0], [0.9, 0.436], [0, 1]], np.float32)
        assert determinantal_point_process(relevance, vectors, 0.8, 3).tolist() == [0, 2, 1]
        assert determinantal_point_process(relevance, vectors, 0.05, 3).tolist() == [0, 1, 2]
        assert determinantal_point_process(relevance, vectors, 0.0, 3).tolist() == [0, 1, 2]

    def test_it_can_be_chosen(self, shop: Shop) -> None:
        create_config(shop, "diverse", diversity={"algorithm": "ALGORITHM_DPP", "strength": 0.7})
        got = shop.stub.GetServingConfig(pb.GetServingConfigRequest(serving_config_id="diverse"))
        assert got.diversity.algorithm == 2
        context = [{"item_id": "shoe-1"}]
        answer = recommend(shop, serving_config="diverse", context_events=context, page_size=7)
        plain = recommend(shop, context_events=context, page_size=7)
        assert sorted(ids(answer)) == sorted(ids(plain))
