"""Who may connect, and as whom: certificates, tokens, and plain text on loopback alone."""

from __future__ import annotations

import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import jwt
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from grpc_health.v1 import health_pb2, health_pb2_grpc

from shared.authentication import TokenVerifier, spiffe_id
from shared.channel import open_channel
from shared.cli.certs import issue_certificates
from shared.errors import FailedPrecondition, Unauthenticated
from shared.server import GrpcServer
from shared.settings import ServiceSettings
from shared.telemetry import Telemetry
from shared.tls import TlsDirectory, is_loopback

RPC = "/test.Service/Call"
ISSUER = "https://issuer.test"
POLICY = """
version: 1
roles:
  caller:
    identities: [spiffe://shopkeeper.local/ns/shop/sa/storefront, "token:system:serviceaccount:shop:web"]
rpcs: {/test.Service/Call: [caller]}
"""


def register(server: grpc.Server) -> None:
    handler = grpc.unary_unary_rpc_method_handler(lambda _request, _context: b"answer")
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("test.Service", {"Call": handler}),)
    )


@pytest.fixture
def certificates(tmp_path: Path) -> Path:
    issue_certificates(tmp_path / "certs", identities={"feedback": "shopkeeper", "storefront": "shop"})
    return tmp_path / "certs"


@pytest.fixture
def serve_tls(certificates: Path, tmp_path: Path) -> Iterator[Callable[..., GrpcServer]]:
    servers: list[GrpcServer] = []

    def start(**values: Any) -> GrpcServer:
        policy = tmp_path / "policy.yaml"
        policy.write_text(POLICY)
        settings = ServiceSettings(
            listen="127.0.0.1:0", log_level="error", tls=certificates / "feedback", policy=policy, **values
        )
        server = GrpcServer(
            "test", settings, Telemetry("test", settings), register=[register], service_names=["test.Service"]
        )
        server.start()
        server.set_ready(True)
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.stop(0)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def code_of(channel: grpc.Channel, **options: Any) -> grpc.StatusCode:
    try:
        channel.unary_unary(RPC)(b"", timeout=10, **options)
    except grpc.RpcError as error:
        return error.code()  # type: ignore[no-any-return]
    return grpc.StatusCode.OK


def serial_of(port: int, certificates: Path) -> int:
    """Returns the serial number of the certificate that the server shows now."""
    context = ssl.create_default_context(cafile=str(certificates / "storefront" / "ca.crt"))
    context.load_cert_chain(certificates / "storefront" / "tls.crt", certificates / "storefront" / "tls.key")
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection(("127.0.0.1", port), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as wrapped,
    ):
        shown = wrapped.getpeercert(binary_form=True)
        assert shown is not None
        return x509.load_der_x509_certificate(shown).serial_number


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_nothing_older_than_tls_1_3_is_spoken(
    serve_tls: Callable[..., GrpcServer], certificates: Path, version: ssl.TLSVersion
) -> None:
    server = serve_tls()
    own = certificates / "storefront"
    context = ssl.create_default_context(cafile=str(own / "ca.crt"))
    context.minimum_version = context.maximum_version = version
    context.load_cert_chain(own / "tls.crt", own / "tls.key")
    context.set_alpn_protocols(["h2"])
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as plain:
        if version is ssl.TLSVersion.TLSv1_2:
            with pytest.raises((ssl.SSLError, ConnectionError)):
                context.wrap_socket(plain, server_hostname="localhost")
        else:
            with context.wrap_socket(plain, server_hostname="localhost") as wrapped:
                assert wrapped.version() == "TLSv1.3"
                assert wrapped.recv(1)


def test_a_caller_needs_a_certificate_of_the_authority(
    serve_tls: Callable[..., GrpcServer], certificates: Path, tmp_path: Path
) -> None:
    server = serve_tls()
    address = f"localhost:{server.port}"
    with open_channel(address, tls=TlsDirectory(certificates / "storefront")) as channel:
        assert code_of(channel) is grpc.StatusCode.OK
    authority = (certificates / "storefront" / "ca.crt").read_bytes()
    with grpc.secure_channel(address, grpc.ssl_channel_credentials(authority)) as channel:
        assert code_of(channel) is grpc.StatusCode.UNAVAILABLE
    with grpc.insecure_channel(address) as channel:
        assert code_of(channel) is grpc.StatusCode.UNAVAILABLE
    issue_certificates(tmp_path / "others", identities={"storefront": "shop"})
    stranger = tmp_path / "others" / "storefront"
    credentials = grpc.ssl_channel_credentials(
        authority, (stranger / "tls.key").read_bytes(), (stranger / "tls.crt").read_bytes()
    )
    with grpc.secure_channel(address, credentials) as channel:
        assert code_of(channel) is grpc.StatusCode.UNAVAILABLE


def test_a_server_of_another_authority_is_not_trusted(
    serve_tls: Callable[..., GrpcServer], tmp_path: Path
) -> None:
    server = serve_tls()
    issue_certificates(tmp_path / "others", identities={"storefront": "shop"})
    with open_channel(
        f"localhost:{server.port}", tls=TlsDirectory(tmp_path / "others" / "storefront")
    ) as channel:
        assert code_of(channel) is grpc.StatusCode.UNAVAILABLE


def test_renewed_certificates_are_used_without_a_restart(
    serve_tls: Callable[..., GrpcServer], certificates: Path
) -> None:
    server = serve_tls()
    before = serial_of(server.port, certificates)
    with open_channel(f"localhost:{server.port}", tls=TlsDirectory(certificates / "storefront")) as channel:
        assert code_of(channel) is grpc.StatusCode.OK
        issue_certificates(certificates, identities={"feedback": "shopkeeper", "storefront": "shop"})
        deadline = time.monotonic() + 30
        while serial_of(server.port, certificates) == before:
            assert time.monotonic() < deadline, "the server still shows its first certificate"
            time.sleep(0.2)
        assert code_of(channel) is grpc.StatusCode.OK


def test_a_channel_goes_over_to_a_new_authority_by_itself(
    serve_tls: Callable[..., GrpcServer], certificates: Path
) -> None:
    server = serve_tls()
    with open_channel(f"localhost:{server.port}", tls=TlsDirectory(certificates / "storefront")) as channel:
        call = channel.unary_unary(RPC)
        assert call(b"", timeout=10) == b"answer"
        # Both sides change their authority: only a client that follows its files can connect to the next server.
        shutil.rmtree(certificates / "ca")
        issue_certificates(certificates, identities={"feedback": "shopkeeper", "storefront": "shop"})
        server.stop(0)
        again = serve_tls()
        with open_channel(f"localhost:{again.port}", tls=TlsDirectory(certificates / "storefront")) as fresh:
            assert code_of(fresh) is grpc.StatusCode.OK
        follower = channel.current()  # type: ignore[attr-defined]
        deadline = time.monotonic() + 30
        while channel.current() is follower:  # type: ignore[attr-defined]
            assert time.monotonic() < deadline, "the channel still uses its first certificate"
            time.sleep(0.2)


def test_half_written_files_change_nothing(serve_tls: Callable[..., GrpcServer], certificates: Path) -> None:
    server = serve_tls()
    before = serial_of(server.port, certificates)
    (certificates / "feedback" / "tls.key").write_bytes(
        (certificates / "storefront" / "tls.key").read_bytes()
    )
    time.sleep(2.5)
    assert serial_of(server.port, certificates) == before


def test_plain_text_is_refused_unless_asked_for_and_then_only_on_loopback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def start(listen: str) -> None:
        settings = ServiceSettings(listen=listen, log_level="error")
        GrpcServer("test", settings, Telemetry("test", settings), register=[], service_names=[])

    start("127.0.0.1:0")
    for listen in ("0.0.0.0:0", "[::]:0", "10.1.2.3:0", "feedback:7001"):
        with pytest.raises(FailedPrecondition) as caught:
            start(listen)
        assert caught.value.reason == "PLAIN_TEXT_REFUSED"
    monkeypatch.delenv("INSECURE")
    with pytest.raises(FailedPrecondition) as caught:
        start("127.0.0.1:0")
    assert caught.value.reason == "PLAIN_TEXT_REFUSED"


def test_another_machine_is_not_called_in_plain_text() -> None:
    with pytest.raises(FailedPrecondition):
        open_channel("profile:7002")
    open_channel("localhost:7002").close()


@pytest.mark.parametrize(
    ("address", "loopback"),
    [
        ("127.0.0.1:1", True), ("127.8.8.8:1", True), ("[::1]:1", True), ("localhost:1", True), ("unix:/x", True),
        ("0.0.0.0:1", False), ("[::]:1", False), ("localhost.evil.test:1", False), ("ipv4:127.0.0.1:1,127.0.0.1:2", True),
        ("ipv4:127.0.0.1:1,10.0.0.1:2", False), ("ipv6:[::1]:1,[::1]:2", True), ("dns:///127.0.0.1.evil.test:1", False), ("128.0.0.1:1", False),
    ],
)  # fmt: skip
def test_loopback_is_recognised(address: str, loopback: bool) -> None:
    assert is_loopback(address) is loopback


def test_a_service_without_certificates_says_what_to_do(tmp_path: Path, keys_dir: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "INSECURE"}
    environment |= {"SHOPKEEPER_HOME": str(tmp_path), "SHOPKEEPER_KEYS": str(keys_dir)}
    outcome = subprocess.run(
        [sys.executable, "-m", "services.recommend"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert outcome.returncode == 2
    assert "PLAIN_TEXT_REFUSED" in outcome.stderr
    assert "SHOPKEEPER_TLS" in outcome.stderr


def test_the_command_issues_what_a_service_takes(tmp_path: Path) -> None:
    outcome = subprocess.run(
        [sys.executable, "-m", "shared.cli.app", "certs", "--out", str(tmp_path / "certs"), "--host", "shop.test"],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert "SHOPKEEPER_TLS" in outcome.stderr
    certificate = x509.load_pem_x509_certificate((tmp_path / "certs" / "trainer" / "tls.crt").read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == [
        "spiffe://shopkeeper.local/ns/shopkeeper/sa/trainer"
    ]
    assert "shop.test" in names.get_values_for_type(x509.DNSName)
    assert (tmp_path / "certs" / "trainer" / "tls.key").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    "names",
    [[], [b"feedback"], [b"spiffe://a/ns/x/sa/y", b"spiffe://a/ns/x/sa/z"], [b"https://shopkeeper.local"]],
)
def test_a_certificate_names_exactly_one_identity(names: list[bytes]) -> None:
    with pytest.raises(Unauthenticated):
        spiffe_id(names)


@pytest.fixture
def issuer(tmp_path: Path) -> Callable[..., str]:
    """Returns a function that signs tokens with the key of `tmp_path/jwks.json`."""
    key = ec.generate_private_key(ec.SECP256R1())
    write_keys(tmp_path / "jwks.json", {"one": key})

    def sign(signing_key: Any = key, kid: str = "one", algorithm: str = "ES256", **claims: Any) -> str:
        values = {
            "iss": ISSUER, "aud": ["shopkeeper"], "sub": "system:serviceaccount:shop:web",
            "exp": time.time() + 600, **claims,
        }  # fmt: skip
        values = {name: value for name, value in values.items() if value is not None}
        return jwt.encode(values, signing_key, algorithm=algorithm, headers={"kid": kid})

    return sign


def write_keys(path: Path, keys: dict[str, ec.EllipticCurvePrivateKey]) -> None:
    entries = []
    for kid, key in keys.items():
        entry = json.loads(jwt.algorithms.ECAlgorithm.to_jwk(key.public_key()))
        entries.append({**entry, "kid": kid, "alg": "ES256", "use": "sig"})
    path.write_text(json.dumps({"keys": entries}))


def test_a_token_names_its_subject(tmp_path: Path, issuer: Callable[..., str]) -> None:
    verifier = TokenVerifier(tmp_path / "jwks.json", ISSUER, "shopkeeper")
    token = issuer()
    assert verifier.identity_of(token) == "token:system:serviceaccount:shop:web"
    assert verifier.identity_of(token) == "token:system:serviceaccount:shop:web"


@pytest.mark.parametrize(
    "claims",
    [
        {"aud": ["another-suite"]},
        {"aud": None},
        {"iss": "https://elsewhere.test"},
        {"exp": 1.0},
        {"exp": None},
        {"sub": None},
        {"nbf": 4e9},
        {"kid": "unknown"},
        {"signing_key": ec.generate_private_key(ec.SECP256R1())},
        {"signing_key": b"x" * 32, "algorithm": "HS256"},
        {"signing_key": None, "algorithm": "none"},
    ],
    ids=[
        "another audience", "no audience", "another issuer", "expired", "no end", "no subject", "not yet",
        "unknown key", "another key", "a shared secret", "unsigned",
    ],
)  # fmt: skip
def test_a_token_that_is_not_for_us_is_refused(
    tmp_path: Path, issuer: Callable[..., str], claims: dict[str, Any]
) -> None:
    verifier = TokenVerifier(tmp_path / "jwks.json", ISSUER, "shopkeeper")
    with pytest.raises(Unauthenticated):
        verifier.identity_of(issuer(**claims))
    with pytest.raises(Unauthenticated):
        verifier.identity_of("no.token.at-all")


def test_a_remembered_token_ends_when_it_says_so(tmp_path: Path, issuer: Callable[..., str]) -> None:
    now = time.time()
    verifier = TokenVerifier(tmp_path / "jwks.json", ISSUER, "shopkeeper", now=lambda: now)
    token = issuer(exp=now + 10)
    assert verifier.identity_of(token)
    now += 11
    with pytest.raises(Unauthenticated):
        verifier.identity_of(token)


def test_a_remembered_token_ends_when_its_key_is_withdrawn(
    tmp_path: Path, issuer: Callable[..., str]
) -> None:
    verifier = TokenVerifier(tmp_path / "jwks.json", ISSUER, "shopkeeper", look_seconds=0.0)
    token = issuer()
    assert verifier.identity_of(token)
    write_keys(tmp_path / "jwks.json", {"two": ec.generate_private_key(ec.SECP256R1())})
    with pytest.raises(Unauthenticated):
        verifier.identity_of(token)


def test_a_caller_with_a_token_needs_no_certificate_of_its_own(
    serve_tls: Callable[..., GrpcServer], certificates: Path, tmp_path: Path, issuer: Callable[..., str]
) -> None:
    port = free_port()
    server = serve_tls(
        token_listen=f"127.0.0.1:{port}", token_keys=tmp_path / "jwks.json", token_issuer=ISSUER
    )
    authority = (certificates / "storefront" / "ca.crt").read_bytes()
    with grpc.secure_channel(f"localhost:{port}", grpc.ssl_channel_credentials(authority)) as channel:
        assert code_of(channel) is grpc.StatusCode.UNAUTHENTICATED
        for header, code in (
            (f"Bearer {issuer()}", grpc.StatusCode.OK),
            (f"Bearer {issuer(sub='system:serviceaccount:shop:other')}", grpc.StatusCode.PERMISSION_DENIED),
            # A subject that looks like a certificate's identity is not one.
            (
                f"Bearer {issuer(sub='spiffe://shopkeeper.local/ns/shop/sa/storefront')}",
                grpc.StatusCode.PERMISSION_DENIED,
            ),
            (f"Bearer {issuer(aud='else')}", grpc.StatusCode.UNAUTHENTICATED),
            ("Basic d2ViOndlYg==", grpc.StatusCode.UNAUTHENTICATED),
        ):
            assert code_of(channel, metadata=[("authorization", header)]) is code
    # A bad token is not made good by the certificate of the connection.
    with open_channel(f"localhost:{server.port}", tls=TlsDirectory(certificates / "storefront")) as channel:
        assert code_of(channel, metadata=[("authorization", "Bearer x")]) is grpc.StatusCode.UNAUTHENTICATED


def test_probes_are_answered_in_plain_text_and_nothing_else_is(serve_tls: Callable[..., GrpcServer]) -> None:
    port = free_port()
    serve_tls(health_listen=f"127.0.0.1:{port}")
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)  # type: ignore[attr-defined]
        for service in ("", "liveness", "test.Service"):
            answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        assert code_of(channel) is grpc.StatusCode.UNIMPLEMENTED


def test_tls_without_a_policy_does_not_start(certificates: Path) -> None:
    settings = ServiceSettings(listen="127.0.0.1:0", tls=certificates / "feedback")
    with pytest.raises(FailedPrecondition) as caught:
        GrpcServer("test", settings, Telemetry("test", settings), register=[], service_names=[])
    assert caught.value.reason == "POLICY_UNUSABLE"


@pytest.mark.parametrize("name", ["tls.crt", "tls.key", "ca.crt"])
def test_a_file_that_is_missing_or_no_pem_is_named(certificates: Path, name: str) -> None:
    (certificates / "feedback" / name).write_text("garbage")
    with pytest.raises(FailedPrecondition) as caught:
        TlsDirectory(certificates / "feedback")
    assert caught.value.reason == "TLS_UNUSABLE"
    (certificates / "feedback" / name).unlink()
    with pytest.raises(FailedPrecondition) as caught:
        TlsDirectory(certificates / "feedback")
    assert name in caught.value.message
