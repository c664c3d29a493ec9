"""Pseudonyms: raw user ids stop at the door.

Versions of the user key form a chain. The first makes a pseudonym of the raw id, each later one makes its
pseudonym of the one before:

    key_1(id) = HMAC(secret_1, "user" 0 id)        key_n(id) = HMAC(secret_n, "rotated" 0 key_{n-1}(id))

so that what is stored can be brought to a new version without any raw id, to the last row. The price is that
every secret stays in use; see docs/decisions/0009-user-keys-rotate-in-a-chain.md.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from shared.errors import FailedPrecondition
from shared.identity import USER_KEY_BYTES, UserKey, normalise_user_id
from shared.keys import read_user_keys

_BLOCK_BYTES = 64


class HmacSha256:
    """HMAC-SHA-256 (RFC 2104) by two prepared states: copying those takes a third of the time of `hmac`'s.

    Args:
        secret: at most 64 bytes.
        prefix: what every message begins with.
    """

    __slots__ = ("_inner", "_outer")

    def __init__(self, secret: bytes, prefix: bytes = b"") -> None:
        if len(secret) > _BLOCK_BYTES:
            raise ValueError("a longer secret would have to be digested first")
        padded = secret.ljust(_BLOCK_BYTES, b"\x00")
        self._inner = hashlib.sha256(bytes(byte ^ 0x36 for byte in padded) + prefix)
        self._outer = hashlib.sha256(bytes(byte ^ 0x5C for byte in padded))

    def digest(self, message: bytes) -> bytes:
        """Returns the 32 bytes of HMAC(secret, prefix + message)."""
        inner = self._inner.copy()
        inner.update(message)
        outer = self._outer.copy()
        outer.update(inner.digest())
        return outer.digest()


class Pseudonymizer:
    """Turns raw user ids into user keys by keyed HMAC-SHA-256 (RFC 2104), truncated to 16 bytes.

    Without the secrets a key cannot be traced to an id, not even by trying all ids.

    Args:
        secret_of_version: the secrets by version number, 1 to n without a gap; the highest is current.
    """

    def __init__(self, secret_of_version: Mapping[int, bytes]) -> None:
        if not secret_of_version:
            raise ValueError("at least one key version is needed")
        if sorted(secret_of_version) != list(range(1, len(secret_of_version) + 1)):
            raise ValueError("a later version is derived from the earlier ones: none may be missing")
        self.current_version = len(secret_of_version)
        self._first = HmacSha256(secret_of_version[1], b"user\x00")
        self._later = [
            HmacSha256(secret_of_version[version], b"rotated\x00")
            for version in range(2, self.current_version + 1)
        ]

    @classmethod
    def from_directory(cls, keys: Path) -> Pseudonymizer:
        """Reads every version from a key directory.

        Raises:
            FailedPrecondition: there is none, or one between the first and the current is missing.
        """
        secrets = read_user_keys(keys)
        for version in range(1, max(secrets)):
            if version not in secrets:
                raise FailedPrecondition(
                    "KEY_MISSING",
                    f"Key {keys / f'user_key.{version}.hex'} is missing: later versions are derived from it, so "
                    "without it every shopper would be a stranger. Restore it from where secrets are kept.",
                    {"key": f"user_key.{version}.hex"},
                )
        return cls(secrets)

    def user_key(self, user_id: str, field: str = "user_id") -> UserKey:
        """Returns the key of a raw id under the current version.

        Raises:
            InvalidInput: the id is not 1 to 256 printable characters.
        """
        return self.key_of_normal(normalise_user_id(user_id, field).encode())

    def key_of_normal(self, normal: bytes) -> UserKey:
        """Returns the current key of an id that is in its normal form already, in UTF-8."""
        key = self._first.digest(normal)[:USER_KEY_BYTES]
        for step in self._later:
            key = step.digest(key)[:USER_KEY_BYTES]
        return UserKey(key)

    def all_keys(self, user_id: str, field: str = "user_id") -> list[UserKey]:
        """Returns the keys of a raw id under every version, the newest first."""
        keys = [self._first.digest(normalise_user_id(user_id, field).encode())[:USER_KEY_BYTES]]
        for step in self._later:
            keys.append(step.digest(keys[-1])[:USER_KEY_BYTES])
        return [UserKey(key) for key in reversed(keys)]

    def rotated(self, user_key: bytes, version: int, target: int | None = None) -> UserKey:
        """Returns the key under `target`, the current version when None, of the person whose key under
        `version` is given; needs no raw id.
        """
        for step in self._later[version - 1 : None if target is None else target - 1]:
            user_key = step.digest(user_key)[:USER_KEY_BYTES]
        return UserKey(user_key)
