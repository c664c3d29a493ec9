"""RecommendService over gRPC: convert, call, convert."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
from google.protobuf.empty_pb2 import Empty
from shopkeeper.recommend.v1 import recommend_service_pb2 as pb
from shopkeeper.recommend.v1 import recommend_service_pb2_grpc, rule_pb2, serving_config_pb2

from services.recommend.converters.configuration import ConfigurationConverter, rule_of, serving_config_of
from services.recommend.converters.requests import RequestConverter, check_name, check_page_size
from services.recommend.converters.responses import (
    degradation_of,
    embeddings_of,
    explanation_of,
    rehearsal_of,
    response_of,
    status_of,
    wire_response_of,
)
from services.recommend.domain.recommendation import SNAPSHOT_CHANGED, ListKind
from services.recommend.use_cases.configs import ServingConfigs
from services.recommend.use_cases.embedding import UserEmbedder
from services.recommend.use_cases.explainer import Explainer
from services.recommend.use_cases.recommender import Recommender
from services.recommend.use_cases.rehearsal import Rehearser
from services.recommend.use_cases.status import StatusReader
from shared import grpc_status
from shared.deadline import time_remaining_seconds
from shared.errors import DeadlineExceeded, ShopkeeperError
from shared.tokens import TokenSigner

SERVICE_NAME = "shopkeeper.recommend.v1.RecommendService"

COMPUTING_METHODS = (
    "Recommend",
    "SimilarItems",
    "FrequentlyBoughtTogether",
    "BuyItAgain",
    "Trending",
    "RecommendForCart",
    "Explain",
    "EmbedUsers",
)
"""Calls that compute, and have few threads of their own."""

_WIRE_SECONDS = 0.005
"""Kept back of the caller's time for the way home."""

_REHEARSAL_SECONDS = 30.0
_MOST_YIELDED_SECONDS = 0.02


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
        embedder: UserEmbedder,
        configs: ServingConfigs,
        status: StatusReader,
        budget_seconds: float,
        configuration_converter: ConfigurationConverter,
        rehearser: Rehearser,
    ) -> None:
        self._converter = converter
        self._signer = signer
        self._recommender = recommender
        self._explainer = explainer
        self._embedder = embedder
        self._configs = configs
        self._status = status
        self._budget_seconds = budget_seconds
        self._configuration_converter = configuration_converter
        self._rehearser = rehearser
        self._lock = threading.Lock()
        self._under_way = 0

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

    def EmbedUsers(
        self, request: pb.EmbedUsersRequest, context: grpc.ServicerContext
    ) -> pb.EmbedUsersResponse:
        user_keys = self._converter.embedded_users(request)
        return embeddings_of(*self._embedder.embed(user_keys, self._budget(context)))

    def GetModelStatus(
        self, request: pb.GetModelStatusRequest, context: grpc.ServicerContext
    ) -> pb.GetModelStatusResponse:
        return status_of(self._status.read())

    def RehearseRule(
        self, request: pb.RehearseRuleRequest, context: grpc.ServicerContext
    ) -> pb.RehearseRuleResponse:
        draft, serving_config, limit = self._configuration_converter.rehearsal(request)
        remaining = min(time_remaining_seconds(context, _REHEARSAL_SECONDS), _REHEARSAL_SECONDS)
        return rehearsal_of(self._rehearser.rehearse(draft, serving_config, limit, 0.8 * remaining))

    def CreateServingConfig(
        self, request: pb.CreateServingConfigRequest, context: grpc.ServicerContext
    ) -> serving_config_pb2.ServingConfig:
        config_id = check_name(request.serving_config_id, "serving_config_id")
        config = self._configuration_converter.serving_config(config_id, request.serving_config)
        return serving_config_of(self._configs.create_config(config))

    def GetServingConfig(
        self, request: pb.GetServingConfigRequest, context: grpc.ServicerContext
    ) -> serving_config_pb2.ServingConfig:
        config_id = check_name(request.serving_config_id, "serving_config_id")
        return serving_config_of(self._configs.current().config(config_id))

    def ListServingConfigs(
        self, request: pb.ListServingConfigsRequest, context: grpc.ServicerContext
    ) -> pb.ListServingConfigsResponse:
        after = self._converter.after_of(request.page_token)
        page, next_after = self._configs.list_configs(check_page_size(request.page_size), after)
        return pb.ListServingConfigsResponse(
            serving_configs=[serving_config_of(config) for config in page],
            next_page_token=self._converter.after_token(next_after),
        )

    def UpdateServingConfig(
        self, request: pb.UpdateServingConfigRequest, context: grpc.ServicerContext
    ) -> serving_config_pb2.ServingConfig:
        sent = request.serving_config
        config_id = check_name(sent.serving_config_id, "serving_config.serving_config_id")
        return serving_config_of(
            self._configs.update_config(
                config_id,
                sent.etag,
                lambda current: self._configuration_converter.changed_serving_config(
                    current, sent, request.update_mask
                ),
            )
        )

    def DeleteServingConfig(
        self, request: pb.DeleteServingConfigRequest, context: grpc.ServicerContext
    ) -> Empty:
        self._configs.delete_config(check_name(request.serving_config_id, "serving_config_id"), request.etag)
        return Empty()

    def CreateRule(self, request: pb.CreateRuleRequest, context: grpc.ServicerContext) -> rule_pb2.Rule:
        rule_id = check_name(request.rule_id, "rule_id")
        rule = self._configuration_converter.rule(rule_id, request.rule)
        return rule_of(self._configs.create_rule(rule))

    def GetRule(self, request: pb.GetRuleRequest, context: grpc.ServicerContext) -> rule_pb2.Rule:
        return rule_of(self._configs.current().rule(check_name(request.rule_id, "rule_id")))

    def ListRules(self, request: pb.ListRulesRequest, context: grpc.ServicerContext) -> pb.ListRulesResponse:
        after = self._converter.after_of(request.page_token)
        page, next_after = self._configs.list_rules(check_page_size(request.page_size), after)
        return pb.ListRulesResponse(
            rules=[rule_of(rule) for rule in page],
            next_page_token=self._converter.after_token(next_after),
        )

    def UpdateRule(self, request: pb.UpdateRuleRequest, context: grpc.ServicerContext) -> rule_pb2.Rule:
        sent = request.rule
        rule_id = check_name(sent.rule_id, "rule.rule_id")
        return rule_of(
            self._configs.update_rule(
                rule_id,
                sent.etag,
                lambda current: self._configuration_converter.changed_rule(
                    current, sent, request.update_mask
                ),
            )
        )

    def DeleteRule(self, request: pb.DeleteRuleRequest, context: grpc.ServicerContext) -> Empty:
        self._configs.delete_rule(check_name(request.rule_id, "rule_id"), request.etag)
        return Empty()

    def BatchRecommend(
        self, request: pb.BatchRecommendRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.BatchRecommendResponse]:
        batch = self._converter.batch(request)
        # Named before the first answer: nobody's answer could be made.
        snapshot = self._recommender.snapshot(batch.serving_config)
        model = snapshot.world.model
        version = model.version if model is not None else ""
        for index in range(batch.first, len(request.users)):
            self._let_others_pass()
            response = pb.BatchRecommendResponse(
                index=index, resume_token=self._converter.resume_token(batch, index + 1, version)
            )
            try:
                query = self._converter.batch_query(request, index)
                answer = self._recommender.answer(query, self._budget(context), snapshot)
                page_token = self._converter.page_token(query, answer.next_page)
                response.response.CopyFrom(response_of(answer, self._signer, page_token))
                if batch.model_version not in (None, version):
                    response.response.degraded.append(degradation_of(SNAPSHOT_CHANGED))
            except DeadlineExceeded:
                raise
            except ShopkeeperError as error:
                response.error.CopyFrom(grpc_status.to_status(error))
            yield response

    def _answer(self, kind: ListKind, request: Any, context: grpc.ServicerContext) -> bytes:
        query = self._converter.query(kind, request)
        with self._lock:
            self._under_way += 1
        try:
            answer = self._recommender.answer(query, self._budget(context))
        finally:
            with self._lock:
                self._under_way -= 1
        return wire_response_of(answer, self._signer, self._converter.page_token(query, answer.next_page))

    def _budget(self, context: grpc.ServicerContext) -> float:
        remaining = time_remaining_seconds(context, self._budget_seconds)
        if remaining <= 0:
            raise DeadlineExceeded(
                "DEADLINE_TOO_SHORT", "The deadline had passed before work began; allow at least 20 ms."
            )
        return min(self._budget_seconds, max(0.0, remaining - _WIRE_SECONDS))

    def _let_others_pass(self) -> None:
        # People who wait for a page come before a mail-out, which makes some progress all the same.
        end = time.monotonic() + _MOST_YIELDED_SECONDS
        while self._under_way and time.monotonic() < end:
            time.sleep(0.001)
