"""Secrets of an installation: where they lie, how they are read, how a developer gets some.

A key directory holds one file a key, as a Kubernetes secret would be mounted:

    user_key.<version>.hex  32 bytes  pseudonyms; the highest version is current
    tombstone_key.hex       32 bytes  recognises forgotten people, and nothing else
    master_key.hex          32 bytes  wraps the data keys of people's texts
    master_key.other.hex    32 bytes  only while the master key is rotated: read too, never written with
    token_key.hex           32 bytes  signs consistency, attribution and page tokens
    signing_key.pem         Ed25519   signs bundles and receipts (private)
    signing_key.pub.pem     Ed25519   verifies them (public)
"""

from __future__ import annotations

import os
import re
import secrets
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from shared.errors import FailedPrecondition

KEY_BYTES = 32
_USER_KEY_NAME = re.compile(r"^user_key\.([1-9][0-9]*)\.hex$")


def read_secret(keys: Path, name: str) -> bytes:
    """Returns the 32 bytes of `<name>.hex`.

    Raises:
        FailedPrecondition: the file is missing, unreadable, or not 64 hexadecimal digits.
    """
    path = keys / f"{name}.hex"
    try:
        secret = bytes.fromhex(path.read_text().strip())
    except OSError as error:
        raise _missing(path, error.strerror or str(error)) from error
    except ValueError as error:
        raise _missing(path, "it is not hexadecimal") from error
    if len(secret) != KEY_BYTES:
        raise _missing(path, f"it holds {len(secret)} bytes, not {KEY_BYTES}")
    return secret


def read_user_keys(keys: Path) -> dict[int, bytes]:
    """Returns every version of the pseudonym key, by version number.

    Raises:
        FailedPrecondition: there is none, or one cannot be read.
    """
    try:
        names = sorted(entry.name for entry in keys.iterdir())
    except OSError as error:
        raise _missing(keys, error.strerror or str(error)) from error
    versions = {int(match[1]): name for name in names if (match := _USER_KEY_NAME.match(name))}
    if not versions:
        raise _missing(keys / "user_key.1.hex", "no version of it exists")
    return {version: read_secret(keys, name.removesuffix(".hex")) for version, name in versions.items()}


def read_signing_key(keys: Path) -> Ed25519PrivateKey:
    """Returns the private key that signs bundles and receipts; fails as `read_secret` does."""
    path = keys / "signing_key.pem"
    key = _load_pem(path, lambda pem: load_pem_private_key(pem, password=None))
    if not isinstance(key, Ed25519PrivateKey):
        raise _missing(path, "it is not an Ed25519 key")
    return key


def read_verifying_key(keys: Path) -> Ed25519PublicKey:
    """Returns the public key that verifies bundles and receipts; fails as `read_secret` does."""
    path = keys / "signing_key.pub.pem"
    key = _load_pem(path, load_pem_public_key)
    if not isinstance(key, Ed25519PublicKey):
        raise _missing(path, "it is not an Ed25519 key")
    return key


def ensure_development_keys(keys: Path) -> list[str]:
    """Creates what is missing in `keys`, readable by the owner only; returns the names created.

    For a developer's machine. An operator mounts secrets instead.
    """
    keys.mkdir(parents=True, exist_ok=True, mode=0o700)
    created = []
    for name in ("user_key.1.hex", "tombstone_key.hex", "master_key.hex", "token_key.hex"):
        if not (keys / name).exists():
            _write_private(keys / name, secrets.token_hex(KEY_BYTES).encode())
            created.append(name)
    if not (keys / "signing_key.pem").exists():
        _write_private(
            keys / "signing_key.pem",
            Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        )
        created.append("signing_key.pem")
        (keys / "signing_key.pub.pem").unlink(missing_ok=True)
    if not (keys / "signing_key.pub.pem").exists():
        public = read_signing_key(keys).public_key()
        _write_private(
            keys / "signing_key.pub.pem",
            public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
        )
        created.append("signing_key.pub.pem")
    return created


def _load_pem(path: Path, load):  # type: ignore[no-untyped-def]
    try:
        return load(path.read_bytes())
    except OSError as error:
        raise _missing(path, error.strerror or str(error)) from error
    except ValueError as error:
        raise _missing(path, "it is not a PEM key") from error


def _write_private(path: Path, content: bytes) -> None:
    # Created with its final mode: there is no moment at which others can read it.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)


def _missing(path: Path, why: str) -> FailedPrecondition:
    return FailedPrecondition(
        "KEY_MISSING",
        f"Key {path} cannot be used: {why}. `shopkeeper doctor` says how to mend it; on a developer's "
        "machine `shopkeeper up` creates the keys.",
        {"key": path.name},
    )
