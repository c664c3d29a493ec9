"""RecommendService over gRPC: convert, call, convert."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import grpc
from shopkeeper.recommend.v1 import recommend_service_pb2 as pb
from shopkeeper.recommend.v1 import recommend_service_pb2_grpc, rule_pb2, serving_config_pb2

from services.recommend.converters.requests import RequestConverter, check_name, check_page_size
from services.recommend.converters.responses import (
    explanation_of,
    serving_config_of,
    status_of,
    wire_response_of,
)
from services.recommend.domain.recommendation import ListKind
from services.recommend.use_cases.configs import ServingConfigs
from services.recommend.use_cases.explainer import Explainer
from services.recommend.use_cases.recommender import Recommender
from services.recommend.use_cases.status import StatusReader
from shared.errors import DeadlineExceeded, Unimplemented
from shared.server import time_remaining_seconds
from shared.tokens import TokenSigner

SERVICE_NAME = "shopkeeper.recommend.v1.RecommendService"

_WIRE_SECONDS = 0.005
"""Kept back of the caller's time for the way home."""


def register(servicer: RecommendServicer, server: grpc.Server) -> None:
    """Adds the servicer to a server that passes serialised answers on as they are."""
    caught = _Caught()
    recommend_service_pb2_grpc.add_RecommendServiceServicer_to_server(servicer, caught)  # type: ignore[arg-type]
    handlers = {
        name: handler._replace(
            response_serializer=functools.partial(_serialised, handler.response_serializer)
        )
        for name, handler in caught.handlers.items()
    }
    generic = grpc.method_handlers_generic_handler(SERVICE_NAME, handlers)
    server.add_generic_rpc_handlers((generic,))
    server.add_registered_method_handlers(SERVICE_NAME, handlers)


def _serialised(serialise: Callable[[Any], bytes], response: Any) -> bytes:
    return response if type(response) is bytes else serialise(response)


class _Caught:
    """Stands where generated code expects a server, and keeps the handlers."""

    def __init__(self) -> None:
        self.handlers: dict[str, Any] = {}

    def add_generic_rpc_handlers(self, _handlers: Any) -> None:
        """The same handlers come by name."""

    def add_registered_method_handlers(self, _service: str, handlers: dict[str, Any]) -> None:
        self.handlers = handlers


class RecommendServicer(recommend_service_pb2_grpc.RecommendServiceServicer):
    """Answers RecommendService.

    Calls that recommend return the serialised `RecommendResponse`; see `register`.

    Args:
        budget_seconds: the longest that an answer takes, however late the caller's deadline.
    """

    def __init__(
        self,
        *,
        converter: RequestConverter,
        signer: TokenSigner,
        recommender: Recommender,
        explainer: Explainer,
        configs: ServingConfigs,
        status: StatusReader,
        budget_seconds: float,
    ) -> None:
        self._converter = converter
        self._signer = signer
        self._recommender = recommender
        self._explainer = explainer
        self._configs = configs
        self._status = status
        self._budget_seconds = budget_seconds

    def Recommend(self, request: pb.RecommendRequest, context: grpc.ServicerContext) -> Any:
        return self._answer(ListKind.RECOMMEND, request, context)

    def SimilarItems(self, request: pb.SimilarItemsRequest, context: grpc.ServicerContext) -> Any:
        return self._answer(ListKind.SIMILAR, request, context)

    def FrequentlyBoughtTogether(
        self, request: pb.FrequentlyBoughtTogetherRequest, context: grpc.ServicerContext
    ) -> Any:
        return self._answer(ListKind.TOGETHER, request, context)

    def BuyItAgain(self, request: pb.BuyItAgainRequest, context: grpc.ServicerContext) -> Any:
        return self._answer(ListKind.BUY_AGAIN, request, context)

    def Trending(self, request: pb.TrendingRequest, context: grpc.ServicerContext) -> Any:
        return self._answer(ListKind.TRENDING, request, context)

    def RecommendForCart(self, request: pb.RecommendForCartRequest, context: grpc.ServicerContext) -> Any:
        return self._answer(ListKind.CART, request, context)

    def Explain(self, request: pb.ExplainRequest, context: grpc.ServicerContext) -> pb.ExplainResponse:
        query, item_id = self._converter.explain_query(request)
        return explanation_of(self._explainer.explain(query, item_id, self._budget(context)))

    def GetServingConfig(
        self, request: pb.GetServingConfigRequest, context: grpc.ServicerContext
    ) -> serving_config_pb2.ServingConfig:
        return serving_config_of(
            self._configs.get(check_name(request.serving_config_id, "serving_config_id"))
        )

    def ListServingConfigs(
        self, request: pb.ListServingConfigsRequest, context: grpc.ServicerContext
    ) -> pb.ListServingConfigsResponse:
        after = self._converter.after_of(request.page_token)
        page, next_after = self._configs.list(check_page_size(request.page_size), after)
        return pb.ListServingConfigsResponse(
            serving_configs=[serving_config_of(config) for config in page],
            next_page_token=self._converter.after_token(next_after),
        )

    def GetModelStatus(
        self, request: pb.GetModelStatusRequest, context: grpc.ServicerContext
    ) -> pb.GetModelStatusResponse:
        return status_of(self._status.read())

    def BatchRecommend(
        self, request: pb.BatchRecommendRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.BatchRecommendResponse]:
        _not_built("BatchRecommend", "Call Recommend for each shopper")

    def RehearseRule(
        self, request: pb.RehearseRuleRequest, context: grpc.ServicerContext
    ) -> pb.RehearseRuleResponse:
        _not_built("RehearseRule", _RULES_INSTEAD)

    def CreateServingConfig(
        self, request: pb.CreateServingConfigRequest, context: grpc.ServicerContext
    ) -> serving_config_pb2.ServingConfig:
        _not_built("CreateServingConfig", _CONFIGS_INSTEAD)

    def UpdateServingConfig(
        self, request: pb.UpdateServingConfigRequest, context: grpc.ServicerContext
    ) -> serving_config_pb2.ServingConfig:
        _not_built("UpdateServingConfig", _CONFIGS_INSTEAD)

    def DeleteServingConfig(
        self, request: pb.DeleteServingConfigRequest, context: grpc.ServicerContext
    ) -> Any:
        _not_built("DeleteServingConfig", _CONFIGS_INSTEAD)

    def CreateRule(self, request: pb.CreateRuleRequest, context: grpc.ServicerContext) -> rule_pb2.Rule:
        _not_built("CreateRule", _RULES_INSTEAD)

    def GetRule(self, request: pb.GetRuleRequest, context: grpc.ServicerContext) -> rule_pb2.Rule:
        _not_built("GetRule", _RULES_INSTEAD)

    def ListRules(self, request: pb.ListRulesRequest, context: grpc.ServicerContext) -> pb.ListRulesResponse:
        _not_built("ListRules", _RULES_INSTEAD)

    def UpdateRule(self, request: pb.UpdateRuleRequest, context: grpc.ServicerContext) -> rule_pb2.Rule:
        _not_built("UpdateRule", _RULES_INSTEAD)

    def DeleteRule(self, request: pb.DeleteRuleRequest, context: grpc.ServicerContext) -> Any:
        _not_built("DeleteRule", _RULES_INSTEAD)

    def _answer(self, kind: ListKind, request: Any, context: grpc.ServicerContext) -> bytes:
        query = self._converter.query(kind, request)
        answer = self._recommender.answer(query, self._budget(context))
        return wire_response_of(answer, self._signer, self._converter.page_token(query, answer.next_page))

    def _budget(self, context: grpc.ServicerContext) -> float:
        remaining = time_remaining_seconds(context, self._budget_seconds)
        if remaining <= 0:
            raise DeadlineExceeded(
                "DEADLINE_TOO_SHORT", "The deadline had passed before work began; allow at least 20 ms."
            )
        return min(self._budget_seconds, max(0.0, remaining - _WIRE_SECONDS))


_RULES_INSTEAD = "Until then use filter and exclude_item_ids of the request"
_CONFIGS_INSTEAD = "Until then choose one of those that ListServingConfigs names"


def _not_built(method: str, instead: str) -> NoReturn:
    raise Unimplemented("NOT_BUILT_YET", f"{method} is part of the contract and not built yet. {instead}.")
