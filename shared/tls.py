"""Mutual TLS 1.3 from a directory of three files, which may change while the process runs.

    tls.crt   the certificate, then its intermediates; SAN: the DNS names of the service, one SPIFFE id
    tls.key   its private key
    ca.crt    who signs the certificates of the others

These are the names under which cert-manager and `kubernetes.io/tls` secrets are mounted. New files are used
from the next handshake on: the server asks at each, a channel opens a new connection.
"""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key
from prometheus_client import Gauge

import shared
from shared.errors import FailedPrecondition
from shared.watched import Watched

_EXPIRES = Gauge(
    "shopkeeper_tls_certificate_expires_timestamp_seconds",
    "End of validity of the certificate in use, seconds since 1970.",
    # A label, so that nothing is told where there is no certificate.
    ["certificate"],
)
FILES = ("tls.crt", "tls.key", "ca.crt")


@dataclass(frozen=True, slots=True)
class KeyPair:
    """What the three files hold, PEM.

    Attributes:
        expires_at: end of the certificate's validity.
    """

    certificate: bytes
    key: bytes
    authority: bytes
    expires_at: datetime


class TlsDirectory:
    """The three files, followed.

    Raises:
        FailedPrecondition: TLS_UNUSABLE: a file is missing or no PEM, or key and certificate do not belong together.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._pair = Watched([directory / name for name in FILES], lambda: read_key_pair(directory))

    def pair(self) -> KeyPair:
        """Returns the files' contents as they are now."""
        return self._pair.get()

    def server_credentials(self, *, client_certificates: bool = True) -> grpc.ServerCredentials:
        """Returns credentials that follow the files.

        Args:
            client_certificates: refuse whoever shows no certificate of the authority.
        """
        require_tls_1_3()
        current = self.pair()

        def fetch() -> grpc.ServerCertificateConfiguration | None:
            nonlocal current
            pair = self.pair()
            if pair is current:
                return None
            current = pair
            return _server_configuration(pair, client_certificates)

        return grpc.dynamic_ssl_server_credentials(
            _server_configuration(current, client_certificates),
            fetch,  # type: ignore[arg-type]  # the stubs forget that None means "as before"
            client_certificates,
        )

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """Returns credentials of the files as they are now; a new channel is needed to follow them."""
        require_tls_1_3()
        pair = self.pair()
        return grpc.ssl_channel_credentials(pair.authority, pair.key, pair.certificate)


def read_key_pair(directory: Path) -> KeyPair:
    """Returns what lies in `directory`; fails as `TlsDirectory` does."""
    contents = {}
    for name in FILES:
        try:
            contents[name] = (directory / name).read_bytes()
        except OSError as error:
            raise _unusable(directory / name, error.strerror or str(error)) from error
    try:
        certificate = x509.load_pem_x509_certificates(contents["tls.crt"])[0]
        x509.load_pem_x509_certificates(contents["ca.crt"])
        key = load_pem_private_key(contents["tls.key"], password=None)
    except (ValueError, TypeError, IndexError) as error:
        raise _unusable(directory, f"it is not PEM ({error})") from error
    form = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    # Both files change one after the other: between, they do not fit.
    if key.public_key().public_bytes(*form) != certificate.public_key().public_bytes(*form):
        raise _unusable(directory, "tls.key is not the key of tls.crt")
    _EXPIRES.labels(directory.name).set(certificate.not_valid_after_utc.timestamp())
    return KeyPair(
        contents["tls.crt"],
        contents["tls.key"],
        contents["ca.crt"],
        certificate.not_valid_after_utc.astimezone(UTC),
    )


def require_tls_1_3() -> None:
    """Checks that this process speaks no older TLS.

    Raises:
        FailedPrecondition: TLS_UNUSABLE: grpc was imported before it could be told.
    """
    if not shared.TLS_1_3_ONLY:
        raise FailedPrecondition(
            "TLS_UNUSABLE",
            "grpc was imported before `shared`, so that it would accept TLS 1.2. Import `shared` first, or set "
            f"GRPC_SSL_CIPHER_SUITES={shared.NO_TLS_1_2_CIPHER} in the environment.",
        )


def is_loopback(address: str) -> bool:
    """Returns whether `host:port`, or each of gRPC's `ipv4:host:port,host:port`, is reached from this machine alone."""
    if address.startswith("unix:"):
        return True
    for scheme in ("ipv4:", "ipv6:"):
        if address.startswith(scheme):
            return all(is_loopback(each) for each in address.removeprefix(scheme).split(","))
    host = address.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def refuse_plain_text(address: str, insecure: bool) -> None:
    """Checks that plain text is both asked for and confined to this machine.

    Raises:
        FailedPrecondition: PLAIN_TEXT_REFUSED.
    """
    if not insecure:
        raise FailedPrecondition(
            "PLAIN_TEXT_REFUSED",
            "No certificate is configured. Set SHOPKEEPER_TLS to a directory with tls.crt, tls.key and ca.crt "
            "(`shopkeeper certs` makes some for development), or INSECURE=1 for plain text on this machine alone.",
        )
    if not is_loopback(address):
        raise FailedPrecondition(
            "PLAIN_TEXT_REFUSED",
            f"INSECURE=1 is for loopback alone, and {address} is reached from elsewhere. Set SHOPKEEPER_TLS, or "
            "listen on 127.0.0.1.",
            {"address": address},
        )


def _server_configuration(pair: KeyPair, client_certificates: bool) -> grpc.ServerCertificateConfiguration:
    authority = pair.authority if client_certificates else None
    return grpc.ssl_server_certificate_configuration([(pair.key, pair.certificate)], authority)


def _unusable(path: Path, why: str) -> FailedPrecondition:
    return FailedPrecondition(
        "TLS_UNUSABLE",
        f"{path} cannot be used: {why}. SHOPKEEPER_TLS names a directory with {', '.join(FILES)}; `shopkeeper certs` "
        "makes one for development.",
        {"path": os.fspath(path)},
    )
