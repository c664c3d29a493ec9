"""Stubs of the four services, over channels that retry and reconnect."""

from __future__ import annotations

from types import TracebackType
from typing import Self

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from shopkeeper.feedback.v1 import feedback_service_pb2_grpc
from shopkeeper.profile.v1 import catalog_service_pb2_grpc, profile_service_pb2_grpc
from shopkeeper.recommend.v1 import recommend_service_pb2_grpc
from shopkeeper.trainer.v1 import trainer_service_pb2_grpc

from shared.channel import open_channel, tls_of
from shared.cli.installation import SERVICES, Installation
from shared.settings import ServiceSettings, load_settings


class Clients:
    """Channels and stubs; a context manager that closes them."""

    def __init__(self, installation: Installation) -> None:
        self.addresses = installation.addresses()
        tls = tls_of(load_settings(ServiceSettings))
        self.channels: dict[str, grpc.Channel] = {
            name: open_channel(self.addresses[name], traced=False, tls=tls) for name in SERVICES
        }
        self.feedback = feedback_service_pb2_grpc.FeedbackServiceStub(self.channels["feedback"])
        self.profile = profile_service_pb2_grpc.ProfileServiceStub(self.channels["profile"])
        self.catalog = catalog_service_pb2_grpc.CatalogServiceStub(self.channels["profile"])
        self.trainer = trainer_service_pb2_grpc.TrainerServiceStub(self.channels["trainer"])
        self.recommend = recommend_service_pb2_grpc.RecommendServiceStub(self.channels["recommend"])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for channel in self.channels.values():
            channel.close()


def health_of(address: str, timeout_seconds: float = 2.0) -> str:
    """Returns SERVING, NOT_SERVING, …, or what kept the service from answering."""
    with open_channel(address, traced=False, tls=tls_of(load_settings(ServiceSettings))) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(  # type: ignore[attr-defined]
                health_pb2.HealthCheckRequest(), timeout=timeout_seconds
            )
        except grpc.RpcError as error:
            return str(error.code().name)
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))
