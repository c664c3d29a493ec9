"""The suite in containers as `compose.yaml` makes them: what it is made of, and what happens when parts are paused, killed or cut off.

Runs with SHOPKEEPER_COMPOSE=1 where a container engine does: `make test-compose`.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from google.protobuf.timestamp_pb2 import Timestamp
from shopkeeper.feedback.v1 import event_pb2, feedback_service_pb2, feedback_service_pb2_grpc
from shopkeeper.profile.v1 import profile_service_pb2, profile_service_pb2_grpc
from shopkeeper.recommend.v1 import recommend_service_pb2, recommend_service_pb2_grpc

from shared.channel import open_channel
from shared.tls import TlsDirectory

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

REPOSITORY = Path(__file__).resolve().parents[2]
SERVICES = ("feedback", "profile", "trainer", "recommend")
# The trainer has TensorFlow.
LEAN = ("feedback", "profile", "recommend")
MAX_LEAN_IMAGE_BYTES = 400_000_000
PORTS = {name: 17001 + index for index, name in enumerate(SERVICES)}
PROJECT = "shopkeeper-test"


def why_not() -> str:
    """Returns why no containers are started here, or nothing."""
    if os.environ.get("SHOPKEEPER_COMPOSE") != "1":
        return "containers are started by `make test-compose` alone"
    if shutil.which("docker") is None:
        return "docker is not installed: no container was started"
    if subprocess.run(["docker", "compose", "version"], capture_output=True).returncode != 0:
        return "docker has no compose plug-in: no container was started"
    if subprocess.run(["docker", "info"], capture_output=True).returncode != 0:
        return "no container engine answers: no container was started"
    return ""


def compose(*arguments: str, check: bool = True, timeout: float = 1500.0) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **{f"{name.upper()}_PORT": str(port) for name, port in PORTS.items()}}
    outcome = subprocess.run(
        ["docker", "compose", "-p", PROJECT, "-f", "compose.yaml", "-f", "compose.tests.yaml", *arguments],
        cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip
    assert not check or outcome.returncode == 0, (outcome.stdout + outcome.stderr)[-6000:]
    return outcome


def inspect(service: str) -> dict[str, Any]:
    container = compose("ps", "-q", "--all", service).stdout.split()[0]
    described: list[dict[str, Any]] = json.loads(
        subprocess.run(["docker", "inspect", container], capture_output=True, check=True).stdout
    )
    return described[0]


def until(what: str, probe: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    last: object = None
    while time.monotonic() < deadline:
        try:
            if probe():
                return
        except grpc.RpcError as error:
            last = f"{error.code().name}: {error.details()}"
        time.sleep(0.2)
    raise AssertionError(f"{what}: not within {seconds:.0f} s; {last}")


class Shop:
    """Stubs of the suite, as the shop's back end."""

    def __init__(self, certificates: Path) -> None:
        self.certificates = certificates
        tls = TlsDirectory(certificates / "storefront")
        self.channels = {name: open_channel(f"localhost:{port}", tls=tls) for name, port in PORTS.items()}
        self.feedback = feedback_service_pb2_grpc.FeedbackServiceStub(self.channels["feedback"])
        self.profile = profile_service_pb2_grpc.ProfileServiceStub(self.channels["profile"])
        self.recommend = recommend_service_pb2_grpc.RecommendServiceStub(self.channels["recommend"])

    def record(self, user_id: str, item_id: str = "anything", timeout: float = 10.0) -> str:
        occurred_at = Timestamp()
        occurred_at.FromNanoseconds(int(time.time() * 1e3) * 1_000_000)
        event = event_pb2.Event(
            event_id=uuid.uuid4().hex, user_id=user_id, occurred_at=occurred_at, item_view=event_pb2.ItemView(item_id=item_id)
        )  # fmt: skip
        answer = self.feedback.RecordEvents(
            feedback_service_pb2.RecordEventsRequest(events=[event]), timeout=timeout
        )
        assert answer.results[0].status == event_pb2.EVENT_STATUS_STORED
        return str(answer.consistency_token)

    def ask(self, user_id: str, timeout: float = 5.0) -> recommend_service_pb2.RecommendResponse:
        return self.recommend.Recommend(
            recommend_service_pb2.RecommendRequest(user_id=user_id, page_size=5), timeout=timeout
        )


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    if reason := why_not():
        pytest.skip(reason)
    compose("down", "--volumes", "--remove-orphans")
    build = [] if os.environ.get("SHOPKEEPER_COMPOSE_BUILD") == "0" else ["--build"]
    try:
        compose("up", "--detach", *build, "--wait", "--wait-timeout", "300", *SERVICES)
        certificates = tmp_path_factory.mktemp("from-the-volume")
        container = compose("ps", "-q", "feedback").stdout.strip()
        subprocess.run(
            ["docker", "cp", f"{container}:/var/lib/shopkeeper/secrets/certs/.", str(certificates)],
            check=True,
        )
        yield Shop(certificates)
    finally:
        logs = compose("logs", "--no-color", "--tail", "40", check=False).stdout
        print(logs[-12_000:])
        if os.environ.get("SHOPKEEPER_COMPOSE_KEEP") != "1":
            compose("down", "--volumes", "--remove-orphans", check=False)


@pytest.mark.parametrize("service", SERVICES)
def test_a_container_is_nobody_and_writes_nowhere(shop: Shop, service: str) -> None:
    described = inspect(service)
    assert described["State"]["Health"]["Status"] == "healthy"
    assert described["Config"]["User"] == "10001:10001"
    assert described["HostConfig"]["ReadonlyRootfs"] is True
    assert described["HostConfig"]["CapDrop"] == ["ALL"]
    assert not described["HostConfig"]["CapAdd"]
    labels = described["Config"]["Labels"]
    assert labels["org.opencontainers.image.title"] == f"shopkeeper-{service}"
    for program in ("gcc", "cc", "make", "g++"):
        outcome = compose("exec", "-T", service, "sh", "-c", f"command -v {program}", check=False)
        assert outcome.returncode != 0, program
    parts = json.loads(compose("exec", "-T", service, "cat", "/opt/shopkeeper/sbom.cdx.json").stdout)
    assert {part["name"] for part in parts["components"]} >= {"grpcio", "numpy", "shopkeeper-suite"}


@pytest.mark.parametrize("service", LEAN)
def test_a_serving_image_is_small(shop: Shop, service: str) -> None:
    image = inspect(service)["Image"]
    described = subprocess.run(
        ["docker", "image", "inspect", "--format", "{{.Size}}", image], capture_output=True, text=True, check=True
    )  # fmt: skip
    print(f"{service}: {int(described.stdout) / 1e6:.0f} MB")
    assert int(described.stdout) < MAX_LEAN_IMAGE_BYTES


@pytest.mark.parametrize("service", LEAN)
def test_a_serving_image_carries_no_tensorflow(shop: Shop, service: str) -> None:
    outcome = compose("exec", "-T", service, "python", "-c", "import tensorflow", check=False)
    assert "ModuleNotFoundError" in outcome.stderr


def test_another_teams_tests_pass_from_inside_of_the_network(shop: Shop) -> None:
    arguments = ["run", "--rm", "--no-deps", "-T", "tests"]
    outcome = compose("--profile", "tests", *arguments, check=False)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    print(outcome.stdout)


def test_recommend_cannot_even_reach_the_database(shop: Shop) -> None:
    program = "import socket; socket.create_connection(('postgres', 5432), 3)"
    assert compose("exec", "-T", "recommend", "python", "-c", program, check=False).returncode != 0
    compose("exec", "-T", "feedback", "python", "-c", program)


def test_with_the_database_paused_people_still_get_recommendations(shop: Shop) -> None:
    shop.record("paused")
    compose("pause", "postgres")
    try:
        assert shop.ask("paused") is not None
        with pytest.raises(grpc.RpcError) as caught:
            shop.record("paused", timeout=8)
        assert caught.value.code() in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}
    finally:
        compose("unpause", "postgres")
    until("feedback records again", lambda: bool(shop.record("paused")))


@pytest.mark.parametrize("service", ["profile", "recommend", "feedback"])
def test_a_service_that_is_killed_comes_back_by_itself(shop: Shop, service: str) -> None:
    before = inspect(service)["State"]
    # From outside of the engine, as the kernel kills: the engine's own `kill` counts as a wish.
    os.kill(before["Pid"], signal.SIGKILL)
    if service == "profile":
        assert shop.ask("anybody") is not None
    until(f"{service} is healthy again", lambda: healthy(service, before["StartedAt"]), 120)
    until("events are recorded", lambda: bool(shop.record("survivor")))
    until("recommendations are given", lambda: shop.ask("survivor") is not None)


def healthy(service: str, started_before: str) -> bool:
    state = inspect(service)["State"]
    return bool(state["StartedAt"] != started_before and state.get("Health", {}).get("Status") == "healthy")


def test_cut_off_from_profile_recommend_answers_and_says_what_is_missing(shop: Shop) -> None:
    network = f"{PROJECT}_suite"
    container = inspect("profile")["Id"]
    subprocess.run(["docker", "network", "disconnect", network, container], check=True)
    try:
        until("an answer says that it is degraded", lambda: bool(shop.ask(uuid.uuid4().hex).degraded))
    finally:
        subprocess.run(["docker", "network", "connect", "--alias", "profile", network, container], check=True)
    token = shop.record("reconnected", "something")

    def fresh() -> bool:
        answer = shop.recommend.Recommend(
            recommend_service_pb2.RecommendRequest(
                user_id="reconnected", page_size=5, consistency_token=token
            ),
            timeout=5,
        )
        return not any("PROFILE" in str(each) for each in answer.degraded)

    until("recommend sees profile again", fresh)
    assert shop.profile.GetProfile(profile_service_pb2.GetProfileRequest(user_id="reconnected"), timeout=10)


def test_an_acknowledged_event_survives_the_database_being_killed(shop: Shop) -> None:
    person = f"kept-{uuid.uuid4().hex}"
    for index in range(20):
        shop.record(person, f"item-{index}")
    before = inspect("postgres")["State"]
    os.kill(before["Pid"], signal.SIGKILL)
    until("the database is back", lambda: healthy("postgres", before["StartedAt"]), 120)
    until("feedback records again", lambda: bool(shop.record("after")))

    def kept() -> bool:
        answer = shop.profile.GetProfile(profile_service_pb2.GetProfileRequest(user_id=person), timeout=10)
        return "item-19" in str(answer)

    until("all of the events are there", kept)


def test_sigterm_drains_within_the_grace_period(shop: Shop) -> None:
    start = time.monotonic()
    compose("stop", "recommend")
    assert time.monotonic() - start < 20
    assert inspect("recommend")["State"]["ExitCode"] == 0
    compose("up", "--detach", "--wait", "recommend")
    until("recommendations are given", lambda: shop.ask("after-a-stop") is not None)


def test_renewed_certificates_are_shown_without_a_restart(shop: Shop) -> None:
    import socket
    import ssl

    directory = shop.certificates / "storefront"
    context = ssl.create_default_context(cafile=str(directory / "ca.crt"))
    context.load_cert_chain(directory / "tls.crt", directory / "tls.key")
    context.set_alpn_protocols(["h2"])

    def serial() -> int:
        with (
            socket.create_connection(("127.0.0.1", PORTS["feedback"]), timeout=5) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as wrapped,
        ):
            shown = wrapped.getpeercert(binary_form=True)
            assert shown is not None
            return x509.load_der_x509_certificate(shown).serial_number

    before, started = serial(), inspect("feedback")["State"]["StartedAt"]
    compose("run", "--rm", "-T", "--no-deps", "prepare")
    until("feedback shows a new certificate", lambda: serial() != before, 30)
    assert inspect("feedback")["State"]["StartedAt"] == started
    assert shop.ask("after-a-renewal") is not None
