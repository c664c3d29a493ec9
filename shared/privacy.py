"""Pseudonyms: raw user ids stop at the door."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from pathlib import Path

from shared.identity import USER_KEY_BYTES, UserKey, normalise_user_id
from shared.keys import read_user_keys


class Pseudonymizer:
    """Turns raw user ids into user keys by keyed HMAC-SHA-256 (RFC 2104), truncated to 16 bytes.

    Without the secret a key cannot be traced to an id, not even by trying all ids.

    Args:
        secret_of_version: the secrets by version number; the highest is the current one.
    """

    def __init__(self, secret_of_version: Mapping[int, bytes]) -> None:
        if not secret_of_version:
            raise ValueError("at least one key version is needed")
        # The keyed state is prepared once; a copy of it costs a third of a new HMAC.
        self._hmac_of_version = {
            version: hmac.new(secret, b"user\x00", hashlib.sha256)
            for version, secret in sorted(secret_of_version.items(), reverse=True)
        }
        self.current_version = max(secret_of_version)

    @classmethod
    def from_directory(cls, keys: Path) -> Pseudonymizer:
        """Reads every version from a key directory; fails with FailedPrecondition where there is none."""
        return cls(read_user_keys(keys))

    def user_key(self, user_id: str, field: str = "user_id") -> UserKey:
        """Returns the key of a raw id under the current version.

        Raises:
            InvalidInput: the id is not 1 to 256 printable characters.
        """
        return self._derive(self.current_version, normalise_user_id(user_id, field))

    def all_keys(self, user_id: str, field: str = "user_id") -> list[UserKey]:
        """Returns the keys of a raw id under every version, the newest first."""
        normal = normalise_user_id(user_id, field)
        return [self._derive(version, normal) for version in self._hmac_of_version]

    def _derive(self, version: int, normal: str) -> UserKey:
        state = self._hmac_of_version[version].copy()
        state.update(normal.encode())
        return UserKey(state.digest()[:USER_KEY_BYTES])
