"""The shopper as a vector in the portrait: from the version in service, when asked for, kept nowhere."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from shopkeeper.profile.v1 import profile_service_pb2 as pb
from shopkeeper.recommend.v1 import recommend_service_pb2, recommend_service_pb2_grpc

from services.profile.clients.breaker import BREAKER_SECONDS, Breaker
from services.profile.clients.embeddings import RecommendEmbeddings
from shared.identity import UserKey
from tests.profile.conftest import Shop


class _Recommend(recommend_service_pb2_grpc.RecommendServiceServicer):
    """Knows shoppers whose keys begin with 1; others have no events that its model knows."""

    def __init__(self) -> None:
        self.calls = 0
        self.version = "v1"

    def EmbedUsers(self, request: Any, context: Any) -> Any:
        self.calls += 1
        if not self.version:
            context.abort(grpc.StatusCode.UNAVAILABLE, "away")
        return recommend_service_pb2.EmbedUsersResponse(
            model_version=self.version,
            embeddings=[
                recommend_service_pb2.UserEmbedding(values=[key[0], key[1]] if key[0] else [])
                for key in request.user_keys
            ],
        )


@pytest.fixture
def recommend() -> Any:
    servicer = _Recommend()
    server = grpc.server(ThreadPoolExecutor(2))
    recommend_service_pb2_grpc.add_RecommendServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield servicer, channel
    server.stop(None)


def key(first: int, second: int = 0) -> UserKey:
    return UserKey(bytes([first, second]) + bytes(14))


def test_vectors_come_with_their_version_in_the_order_asked(recommend: Any) -> None:
    servicer, channel = recommend
    keys = [key(1, n % 200) for n in range(150)] + [key(0)]
    found = RecommendEmbeddings(channel).of(keys)
    assert [None if v is None else (*v.values, v.version) for v in found] == [
        *((1.0, float(n % 200), "v1") for n in range(150)),
        None,
    ]
    assert servicer.calls == 2


def test_where_recommend_is_away_it_is_not_asked_again_for_a_while(recommend: Any) -> None:
    servicer, channel = recommend
    now = [0.0]
    embeddings = RecommendEmbeddings(channel, Breaker(lambda: now[0]))
    servicer.version = ""
    assert embeddings.of([key(1)]) == [None]
    assert embeddings.of([key(1)]) == [None]
    assert servicer.calls == 1
    servicer.version = "v2"
    now[0] = BREAKER_SECONDS + 0.1
    (vector,) = embeddings.of([key(1)])
    assert vector is not None
    assert vector.version == "v2"


def test_a_portrait_holds_the_vector_when_asked_and_two_shoppers_compare_by_it(
    shop: Shop, recommend: Any
) -> None:
    servicer, channel = recommend
    shop.service.profile_servicer._profiles._embeddings = RecommendEmbeddings(channel)
    shop.log.record("ann")
    shop.log.record("bob")
    plain = shop.profiles.GetProfile(pb.GetProfileRequest(user_id="ann"), timeout=20)
    assert not plain.portrait.HasField("embedding")
    assert servicer.calls == 0, "nobody who does not ask pays"

    asked = shop.profiles.GetProfile(pb.GetProfileRequest(user_id="ann", with_embedding=True), timeout=20)
    ann = shop.log.key("ann")
    assert list(asked.portrait.embedding.values) == [float(ann[0]), float(ann[1])]
    assert asked.portrait.embedding.model_version == "v1"
    both = shop.profiles.CompareProfiles(
        pb.CompareProfilesRequest(
            first=pb.UserReference(user_id="ann"), second=pb.UserReference(user_id="bob")
        ),
        timeout=20,
    )
    bob = shop.log.key("bob")
    cosine = (ann[0] * bob[0] + ann[1] * bob[1]) / (
        (ann[0] ** 2 + ann[1] ** 2) ** 0.5 * (bob[0] ** 2 + bob[1] ** 2) ** 0.5
    )
    assert both.embedding_similarity.value == pytest.approx(cosine, rel=1e-5)

    # Who withdraws consent has no portrait, and so no vector.
    shop.log.consent("ann", False)
    token = shop.log.record("ann", consent=1)
    gone = shop.profiles.GetProfile(
        pb.GetProfileRequest(user_id="ann", with_embedding=True, consistency_token=token), timeout=20
    )
    assert not gone.portrait.HasField("embedding")
