"""What recommend would show a shopper: drawn for what may win them back, and done without where it is away."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import grpc
from shopkeeper.recommend.v1 import recommend_service_pb2, recommend_service_pb2_grpc

from services.profile.clients.breaker import Breaker
from shared.identity import UserKey

TIMEOUT_SECONDS = 0.5
# All shoppers of a call together.
BUDGET_SECONDS = 2.0
PLACEMENT = "email"


class RecommendSuggestions:
    """Implements `ports.Suggestions`.

    Args:
        channel: to recommend.
        monotonic: seconds.
    """

    def __init__(self, channel: grpc.Channel, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._recommend = recommend_service_pb2_grpc.RecommendServiceStub(channel).Recommend
        self._monotonic = monotonic
        self._breaker = Breaker(monotonic)

    def items(self, user_keys: Sequence[UserKey], count: int) -> list[list[str]]:
        """See `ports.Suggestions`."""
        until = self._monotonic() + BUDGET_SECONDS
        return [self._of(user_key, count) if self._monotonic() < until else [] for user_key in user_keys]

    def _of(self, user_key: UserKey, count: int) -> list[str]:
        request = recommend_service_pb2.RecommendRequest(
            user_key=user_key, placement=PLACEMENT, page_size=count
        )
        answer = self._breaker.call(lambda: self._recommend(request, timeout=TIMEOUT_SECONDS))
        return [] if answer is None else [item.item_id for item in answer.items]
