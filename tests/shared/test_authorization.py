"""Every RPC × every role, over mutual TLS, against the policy that is shipped."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
import yaml
from google.protobuf.descriptor import MethodDescriptor
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from shopkeeper.feedback.v1 import feedback_service_pb2
from shopkeeper.profile.v1 import catalog_service_pb2, profile_service_pb2
from shopkeeper.recommend.v1 import recommend_service_pb2
from shopkeeper.trainer.v1 import trainer_service_pb2

from shared.authorization import read_policy
from shared.channel import open_channel
from shared.cli.certs import issue_certificates
from shared.errors import FailedPrecondition
from shared.server import GrpcServer
from shared.settings import ServiceSettings
from shared.telemetry import Telemetry
from shared.tls import TlsDirectory

REPOSITORY = Path(__file__).resolve().parents[2]
POLICY = REPOSITORY / "deploy" / "k8s" / "base" / "policy.yaml"
FILES = (
    feedback_service_pb2,
    profile_service_pb2,
    catalog_service_pb2,
    trainer_service_pb2,
    recommend_service_pb2,
)
METHODS = [
    method
    for file in FILES
    for descriptor in file.DESCRIPTOR.services_by_name.values()
    for method in descriptor.methods
]
SERVICES = sorted({method.containing_service.full_name for method in METHODS})
ROLES = sorted(yaml.safe_load(POLICY.read_text())["roles"])
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"


def path_of(method: MethodDescriptor) -> str:
    return f"/{method.containing_service.full_name}/{method.name}"


def every_method(server: grpc.Server) -> None:
    """Registers all RPCs of the contract; each answers with nothing."""
    for service in SERVICES:
        handlers = {}
        for method in METHODS:
            if method.containing_service.full_name != service:
                continue
            if method.client_streaming:
                handlers[method.name] = grpc.stream_stream_rpc_method_handler(
                    lambda _requests, _context: iter([b""])
                )
            elif method.server_streaming:
                handlers[method.name] = grpc.unary_stream_rpc_method_handler(
                    lambda _request, _context: iter([b""])
                )
            else:
                handlers[method.name] = grpc.unary_unary_rpc_method_handler(lambda _request, _context: b"")
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))


def call(channel: grpc.Channel, method: MethodDescriptor) -> grpc.StatusCode:
    path = path_of(method)
    try:
        if method.client_streaming:
            list(channel.stream_stream(path)(iter([b""]), timeout=10))
        elif method.server_streaming:
            list(channel.unary_stream(path)(b"", timeout=10))
        else:
            channel.unary_unary(path)(b"", timeout=10)
    except grpc.RpcError as error:
        return error.code()  # type: ignore[no-any-return]
    return grpc.StatusCode.OK


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("certs")
    issue_certificates(directory)
    # By the same authority, but in no role.
    issue_certificates(directory, identities={"stranger": "shop"})
    return directory


@pytest.fixture(scope="module")
def server(certificates: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GrpcServer]:
    # The limits are tested on their own: here every role calls everything as fast as it can.
    document = yaml.safe_load(POLICY.read_text())
    for role in document["roles"].values():
        role["calls_per_second"], role["burst"] = 1e6, 1_000_000
    policy = tmp_path_factory.mktemp("policy") / "policy.yaml"
    policy.write_text(yaml.safe_dump(document))
    settings = ServiceSettings(
        listen="127.0.0.1:0", log_level="error", tls=certificates / "feedback", policy=policy
    )
    server = GrpcServer(
        "test", settings, Telemetry("test", settings), register=[every_method], service_names=SERVICES
    )
    server.start()
    yield server
    server.stop(0)


@pytest.fixture(scope="module")
def channel_of(server: GrpcServer, certificates: Path) -> Iterator[Callable[[str], grpc.Channel]]:
    channels: dict[str, grpc.Channel] = {}

    def channel(role: str) -> grpc.Channel:
        if role not in channels:
            channels[role] = open_channel(f"localhost:{server.port}", tls=TlsDirectory(certificates / role))
        return channels[role]

    yield channel
    for opened in channels.values():
        opened.close()


def test_the_policy_lists_every_rpc_of_the_contract_and_no_other() -> None:
    listed = set(yaml.safe_load(POLICY.read_text())["rpcs"]) - {REFLECTION}
    assert listed == {path_of(method) for method in METHODS}


@pytest.mark.parametrize("role", ROLES)
def test_a_role_may_call_what_the_policy_says_and_nothing_else(
    channel_of: Callable[[str], grpc.Channel], role: str
) -> None:
    rpcs = yaml.safe_load(POLICY.read_text())["rpcs"]
    answers = {path_of(method): call(channel_of(role), method) for method in METHODS}
    expected = {
        rpc: grpc.StatusCode.OK if role in roles else grpc.StatusCode.PERMISSION_DENIED
        for rpc, roles in rpcs.items()
        if rpc != REFLECTION
    }
    assert answers == expected


def test_an_identity_without_a_role_may_call_nothing(channel_of: Callable[[str], grpc.Channel]) -> None:
    assert {call(channel_of("stranger"), method) for method in METHODS} == {grpc.StatusCode.PERMISSION_DENIED}


def test_services_may_call_the_edges_of_the_design_alone() -> None:
    policy = read_policy(POLICY)
    edges = {
        role: {rpc.rpartition("/")[2] for rpc, roles in policy.roles_for.items() if role in roles}
        for role in ("feedback", "profile", "recommend", "trainer", "scheduler")
    }
    assert edges == {
        "feedback": {"ListItems"},
        "profile": {"EmbedUsers", "Recommend"},
        "recommend": {"GetProfile", "BatchGetProfiles", "WatchProfiles", "WatchItems", "ListExperiments"},
        "trainer": {"ListItems"},
        "scheduler": {"CreateTrainingRun", "GetTrainingRun", "WatchTrainingRun"},
    }


def test_what_cannot_be_undone_is_for_those_who_answer_for_it() -> None:
    policy = read_policy(POLICY)
    for name, roles in {
        "ForgetUser": {"privacy-officer", "operator"},
        "ExportUser": {"privacy-officer", "operator"},
        "PurgeEvents": {"operator"},
        "RotateUserKeys": {"operator"},
        "PromoteModel": {"operator"},
    }.items():
        (rpc,) = [rpc for rpc in policy.roles_for if rpc.endswith(f"/{name}")]
        assert policy.roles_for[rpc] == roles


def test_a_forbidden_method_and_one_that_does_not_exist_cannot_be_told_apart(
    channel_of: Callable[[str], grpc.Channel],
) -> None:
    def answer(path: str) -> tuple[grpc.StatusCode, str, bytes]:
        with pytest.raises(grpc.RpcError) as caught:
            channel_of("recommend").unary_unary(path)(b"", timeout=10)
        status = rpc_status.from_call(caught.value)
        assert status is not None
        return caught.value.code(), caught.value.details(), status.SerializeToString(deterministic=True)

    forbidden = answer("/shopkeeper.feedback.v1.FeedbackService/ForgetUser")
    assert forbidden == answer("/shopkeeper.feedback.v1.FeedbackService/NoSuchMethod")
    assert forbidden == answer("/no.such.Service/Method")
    assert forbidden[0] is grpc.StatusCode.PERMISSION_DENIED


def test_a_refusal_does_not_depend_on_the_request(channel_of: Callable[[str], grpc.Channel]) -> None:
    def answer(request: bytes) -> bytes:
        with pytest.raises(grpc.RpcError) as caught:
            channel_of("recommend").unary_unary("/shopkeeper.feedback.v1.FeedbackService/ExportUser")(
                request, timeout=10
            )
        status = rpc_status.from_call(caught.value)
        assert status is not None
        return status.SerializeToString(deterministic=True)

    known = feedback_service_pb2.ExportUserRequest(user_id="somebody").SerializeToString()
    assert answer(known) == answer(b"") == answer(b"\xff\xff\xff")


def test_reflection_is_for_whom_the_policy_names(channel_of: Callable[[str], grpc.Channel]) -> None:
    from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

    assert set(SERVICES) <= set(ProtoReflectionDescriptorDatabase(channel_of("operator")).get_services())
    with pytest.raises(grpc.RpcError) as caught:
        ProtoReflectionDescriptorDatabase(channel_of("storefront")).get_services()
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED


def test_a_caller_over_its_limit_is_told_when_to_come_back_and_harms_no_other(
    certificates: Path, tmp_path: Path
) -> None:
    document = yaml.safe_load(POLICY.read_text())
    document["roles"]["storefront"].update(calls_per_second=0.001, burst=3)
    policy = tmp_path / "policy.yaml"
    policy.write_text(yaml.safe_dump(document))
    settings = ServiceSettings(
        listen="127.0.0.1:0", log_level="error", tls=certificates / "recommend", policy=policy
    )
    server = GrpcServer(
        "test", settings, Telemetry("test", settings), register=[every_method], service_names=SERVICES
    )
    server.start()
    path = "/shopkeeper.recommend.v1.RecommendService/Recommend"
    try:
        with (
            open_channel(
                f"localhost:{server.port}", tls=TlsDirectory(certificates / "storefront")
            ) as storefront,
            open_channel(f"localhost:{server.port}", tls=TlsDirectory(certificates / "operator")) as operator,
        ):
            for _ in range(3):
                storefront.unary_unary(path)(b"", timeout=10)
            with pytest.raises(grpc.RpcError) as caught:
                storefront.unary_unary(path)(b"", timeout=10)
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            status = rpc_status.from_call(caught.value)
            assert status is not None
            retry = error_details_pb2.RetryInfo()
            (detail,) = [d for d in status.details if d.Is(retry.DESCRIPTOR)]
            detail.Unpack(retry)
            assert 0 < retry.retry_delay.seconds <= 1000
            operator.unary_unary(path)(b"", timeout=10)
    finally:
        server.stop(0)


def test_a_policy_that_changes_is_followed_and_a_broken_one_changes_nothing(
    certificates: Path, tmp_path: Path
) -> None:
    policy = tmp_path / "policy.yaml"
    document = yaml.safe_load(POLICY.read_text())
    policy.write_text(yaml.safe_dump(document))
    settings = ServiceSettings(
        listen="127.0.0.1:0", log_level="error", tls=certificates / "recommend", policy=policy
    )
    server = GrpcServer(
        "test", settings, Telemetry("test", settings), register=[every_method], service_names=SERVICES
    )
    server.start()
    path = "/shopkeeper.recommend.v1.RecommendService/Recommend"

    def eventually(code: grpc.StatusCode) -> bool:
        for _ in range(100):
            if call(channel, recommend) is code:
                return True
            time.sleep(0.1)
        return False

    (recommend,) = [method for method in METHODS if path_of(method) == path]
    try:
        with open_channel(
            f"localhost:{server.port}", tls=TlsDirectory(certificates / "storefront")
        ) as channel:
            assert call(channel, recommend) is grpc.StatusCode.OK
            document["rpcs"][path] = ["operator"]
            policy.write_text(yaml.safe_dump(document))
            assert eventually(grpc.StatusCode.PERMISSION_DENIED)
            policy.write_text("version: 1\nroles: {}\nrpcs: {/x: [nobody]}\n")
            time.sleep(2.5)
            assert call(channel, recommend) is grpc.StatusCode.PERMISSION_DENIED
            document["rpcs"][path] = ["storefront"]
            policy.write_text(yaml.safe_dump(document))
            assert eventually(grpc.StatusCode.OK)
    finally:
        server.stop(0)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("version: 2\nroles: {}\nrpcs: {}\n", "version"),
        ("version: 1\nroles: {}\nrpcs: {/a/b: [nobody]}\n", "nobody"),
        ("version: 1\nroles: {a: {identities: [], call_per_second: 3}}\nrpcs: {}\n", "call_per_second"),
        ("version: 1\nroles: {a: {identities: [x], burst: 0}}\nrpcs: {}\n", "burst"),
        ("- a list\n", "dictionary"),
        ("{", "YAML"),
    ],
)
def test_a_policy_that_cannot_be_meant_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text(text)
    with pytest.raises(FailedPrecondition) as caught:
        read_policy(policy)
    assert caught.value.reason == "POLICY_UNUSABLE"
    assert problem in caught.value.message
