"""What recommend would show a shopper: drawn for what may win them back, and done without where it is away."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import grpc
from shopkeeper.recommend.v1 import recommend_service_pb2, recommend_service_pb2_grpc

from shared.identity import UserKey

TIMEOUT_SECONDS = 0.5
# All shoppers of a call together.
BUDGET_SECONDS = 2.0
# After a failure nobody waits for it again so soon.
BREAKER_SECONDS = 10.0
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
        self._closed_until = -1.0
        self._lock = threading.Lock()

    def items(self, user_keys: Sequence[UserKey], count: int) -> list[list[str]]:
        """See `Suggestions.items`."""
        until = self._monotonic() + BUDGET_SECONDS
        return [self._of(user_key, count) if self._monotonic() < until else [] for user_key in user_keys]

    def _of(self, user_key: UserKey, count: int) -> list[str]:
        if self._monotonic() < self._closed_until:
            return []
        request = recommend_service_pb2.RecommendRequest(
            user_key=user_key, placement=PLACEMENT, page_size=count
        )
        try:
            answer = self._recommend(request, timeout=TIMEOUT_SECONDS)
        except grpc.RpcError:
            with self._lock:
                self._closed_until = self._monotonic() + BREAKER_SECONDS
            return []
        return [item.item_id for item in answer.items]
