"""Shoppers as the sequence model in service sees them, from recommend: it holds the model, and runs it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import grpc
from shopkeeper.recommend.v1 import recommend_service_pb2, recommend_service_pb2_grpc

from services.profile.clients.breaker import Breaker
from services.profile.domain.item_portrait import Vector
from shared.identity import UserKey

TIMEOUT_SECONDS = 0.5
MODEL = "sequence"
USERS_AT_ONCE = 100


class RecommendEmbeddings:
    """Implements `ports.UserEmbeddings`.

    Args:
        channel: to recommend.
    """

    def __init__(self, channel: grpc.Channel, breaker: Breaker | None = None) -> None:
        self._embed = recommend_service_pb2_grpc.RecommendServiceStub(channel).EmbedUsers
        self._breaker = breaker or Breaker()

    def of(self, user_keys: Sequence[UserKey]) -> list[Vector | None]:
        """See `ports.UserEmbeddings`."""
        found: list[Vector | None] = []
        for first in range(0, len(user_keys), USERS_AT_ONCE):
            some = user_keys[first : first + USERS_AT_ONCE]
            request = recommend_service_pb2.EmbedUsersRequest(user_keys=some)
            answer = self._breaker.call(partial(self._embed, request, timeout=TIMEOUT_SECONDS))
            if answer is None:
                found += [None] * len(some)
                continue
            found += [
                Vector(list(one.values), MODEL, answer.model_version) if one.values else None
                for one in answer.embeddings
            ]
        return found
