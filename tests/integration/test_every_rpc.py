"""Every RPC of the contract answers something that a caller can act on."""

from __future__ import annotations

import grpc
import pytest
from google.protobuf import descriptor_pool, message_factory
from google.protobuf.descriptor import MethodDescriptor
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from shopkeeper.feedback.v1 import feedback_service_pb2
from shopkeeper.profile.v1 import catalog_service_pb2, profile_service_pb2
from shopkeeper.recommend.v1 import recommend_service_pb2
from shopkeeper.trainer.v1 import trainer_service_pb2, training_run_pb2

from tests.integration.suite import Suite

pytestmark = pytest.mark.slow

FILES = {
    "feedback": (feedback_service_pb2,),
    "profile": (profile_service_pb2, catalog_service_pb2),
    "trainer": (trainer_service_pb2,),
    "recommend": (recommend_service_pb2,),
}
METHODS = [
    (service, method)
    for service, files in FILES.items()
    for file in files
    for descriptor in file.DESCRIPTOR.services_by_name.values()
    for method in descriptor.methods
]
# What else the suite is asked to do; each name is a promise to integrators.
JOBS = {
    "feedback": "RecordEvents StreamEvents ImportEvents SetConsent ForgetUser ExportUser PurgeEvents GetMetrics "
    "WatchMetrics CreateExperiment RotateUserKeys EstimatePolicyValue",
    "profile": "GetProfile BatchGetProfiles WatchProfiles ListSegments ListUsersInSegment CompareProfiles MergeUsers "
    "ListAtRiskUsers WatchChurnAlerts UpsertItems PatchItems SetInventory DeleteItems GetItem ListItems ImportItems "
    "WatchItems",
    "trainer": "CreateTrainingRun GetTrainingRun ListTrainingRuns WatchTrainingRun CancelTrainingRun ListModels "
    "GetModel PromoteModel RollbackModel EvaluateModel TuneModel WatchAliases",
    "recommend": "Recommend SimilarItems FrequentlyBoughtTogether BuyItAgain Trending RecommendForCart "
    "BatchRecommend Explain RehearseRule",
}


@pytest.mark.parametrize("service", FILES)
def test_every_job_has_its_rpc(service: str) -> None:
    names = {method.name for owner, method in METHODS if owner == service}
    assert set(JOBS[service].split()) <= names


@pytest.mark.parametrize(
    ("service", "method"),
    METHODS,
    ids=[f"{method.containing_service.name}.{method.name}" for _, method in METHODS],
)
def test_an_empty_request_gets_an_answer_or_a_reason(
    trained: Suite, service: str, method: MethodDescriptor
) -> None:
    request = message_factory.GetMessageClass(method.input_type)()
    response_type = message_factory.GetMessageClass(method.output_type)
    path = f"/{method.containing_service.full_name}/{method.name}"
    codec = {
        "request_serializer": type(request).SerializeToString,
        "response_deserializer": response_type.FromString,
    }
    channel = trained.channels[service]
    failure = None
    try:
        if method.client_streaming:
            list(channel.stream_stream(path, **codec)(iter([request]), timeout=20))
        elif method.server_streaming:
            responses = channel.unary_stream(path, **codec)(request, timeout=20)
            next(iter(responses), None)
            responses.cancel()
        else:
            answer = channel.unary_unary(path, **codec)(request, timeout=20)
            if isinstance(answer, training_run_pb2.TrainingRun) and answer.run_id:
                # Nobody waits for it, and it would take both cores.
                trained.trainer.CancelTrainingRun(
                    trainer_service_pb2.CancelTrainingRunRequest(run_id=answer.run_id), timeout=20
                )
    except grpc.RpcError as error:
        failure = error
    if failure is not None:
        assert failure.code() not in (grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL), failure.details()
        status = rpc_status.from_call(failure)
        assert status is not None, f"{failure.code().name} without details: {failure.details()}"
        assert error_details_pb2.ErrorInfo.DESCRIPTOR.full_name in [d.TypeName() for d in status.details]


def test_the_services_are_found_by_reflection(trained: Suite) -> None:
    from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

    for service, files in FILES.items():
        database = ProtoReflectionDescriptorDatabase(trained.channels[service])
        expected = {d.full_name for file in files for d in file.DESCRIPTOR.services_by_name.values()}
        assert expected <= set(database.get_services())
        pool = descriptor_pool.DescriptorPool(database)
        for name in expected:
            assert pool.FindServiceByName(name).methods
