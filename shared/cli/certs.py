"""A certificate authority for development: `shopkeeper certs`. In production an issuer such as cert-manager does this."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from shared.cli.installation import SERVICES
from shared.errors import FailedPrecondition

TRUST_DOMAIN = "shopkeeper.local"
SUITE_NAMESPACE = "shopkeeper"
SHOP_NAMESPACE = "shop"
# The identities of the policy that is shipped, by namespace.
IDENTITIES = {
    **dict.fromkeys((*SERVICES, "operator", "scheduler"), SUITE_NAMESPACE),
    **dict.fromkeys(
        ("storefront", "catalogue", "merchandiser", "analyst", "privacy-officer"), SHOP_NAMESPACE
    ),
}
CA_DAYS = 3_650
# A clock may be behind the one that issued.
CLOCK_SKEW = timedelta(minutes=5)


def issue_certificates(
    directory: Path,
    *,
    trust_domain: str = TRUST_DOMAIN,
    days: int = 90,
    hosts: Iterable[str] = (),
    identities: dict[str, str] | None = None,
) -> list[Path]:
    """Writes a directory for each identity, with a certificate that is valid for `days` from now on.

    The authority in `directory/ca` is kept where there is one, so that running it again renews.

    Args:
        directory: gets `ca/` and `<identity>/{tls.crt,tls.key,ca.crt}`.
        trust_domain: of the SPIFFE ids.
        hosts: more DNS names or addresses under which every service is called.
        identities: service account → namespace; default: those of the policy that is shipped.

    Returns the directories written.

    Raises:
        FailedPrecondition: CERTIFICATES_NOT_WRITTEN, or the authority's files cannot be used.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        authority, authority_key = _authority(directory / "ca", trust_domain)
        written = []
        for name, namespace in (identities or IDENTITIES).items():
            spiffe_id = f"spiffe://{trust_domain}/ns/{namespace}/sa/{name}"
            names = [
                "localhost", "127.0.0.1", "::1", name, f"{name}.{namespace}", f"{name}.{namespace}.svc",
                f"{name}.{namespace}.svc.cluster.local", *hosts,
            ]  # fmt: skip
            target = directory / name
            target.mkdir(exist_ok=True, mode=0o700)
            _write_leaf(target, authority, authority_key, name, spiffe_id, names, days)
            written.append(target)
        return written
    except OSError as error:
        raise FailedPrecondition(
            "CERTIFICATES_NOT_WRITTEN",
            f"{error.filename or directory} cannot be written: {error.strerror}. Choose another directory.",
        ) from error


def _authority(directory: Path, trust_domain: str) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    certificate_path, key_path = directory / "ca.crt", directory / "ca.key"
    if certificate_path.exists() and key_path.exists():
        try:
            key = load_pem_private_key(key_path.read_bytes(), password=None)
            certificate = x509.load_pem_x509_certificate(certificate_path.read_bytes())
        except ValueError as error:
            raise FailedPrecondition(
                "CERTIFICATES_NOT_WRITTEN",
                f"{directory} holds no usable authority: {error}. Remove it to begin with a new one.",
            ) from error
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        return certificate, key
    directory.mkdir(exist_ok=True, mode=0o700)
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"Shopkeeper development CA ({trust_domain})")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + timedelta(days=CA_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    replace_file(key_path, _pem_of(key), 0o600)
    replace_file(certificate_path, certificate.public_bytes(Encoding.PEM), 0o644)
    return certificate, key


def _write_leaf(
    target: Path,
    authority: x509.Certificate,
    authority_key: ec.EllipticCurvePrivateKey,
    name: str,
    spiffe_id: str,
    names: list[str],
    days: int,
) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(authority.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(
            x509.SubjectAlternativeName(
                [x509.UniformResourceIdentifier(spiffe_id), *map(_general_name, dict.fromkeys(names))]
            ),
            critical=False,
        )
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]),
            critical=False,
        )
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False
        )
        .sign(authority_key, hashes.SHA256())
    )
    replace_file(target / "ca.crt", authority.public_bytes(Encoding.PEM), 0o644)
    # The key first: whoever reads between the two sees that they do not fit, and keeps what it has.
    replace_file(target / "tls.key", _pem_of(key), 0o600)
    replace_file(target / "tls.crt", certificate.public_bytes(Encoding.PEM), 0o644)


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _pem_of(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def replace_file(path: Path, content: bytes, mode: int) -> None:
    """Writes a file whole or not at all, with exactly this mode."""
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
    # What the umask took away.
    staged.chmod(mode)
    staged.replace(path)
