"""The door: raw ids become keys here, and go no further."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from shared.identity import MAX_ID_CHARACTERS, USER_KEY_BYTES, normalise_user_id
from shared.keys import read_secret
from shared.privacy import HmacSha256, Pseudonymizer

# People whose keys are remembered, some 0.3 kB each. Deriving them costs four times as much as finding them.
_MAX_RECENT = 32_768


def is_plain_id(value: str) -> bool:
    """Returns whether an id is its own normal form at a glance: printable ASCII of the right length."""
    return value.isascii() and value.isprintable() and 0 < len(value) <= MAX_ID_CHARACTERS


@dataclass(frozen=True, slots=True)
class Person:
    """A person, as everything behind the door knows them.

    Attributes:
        user_keys: under every version of the user key, the newest first; 16 bytes each.
        tombstone_key: 16 bytes, under a key that never rotates.
    """

    user_keys: Sequence[bytes]
    tombstone_key: bytes


class Door:
    """Derives keys from raw ids. Thread-safe.

    It remembers the keys of people who were seen lately, and whose they are by a digest alone, under a random
    key that this process never tells: a dump of the memory is no more than one of the secrets would be.

    Args:
        pseudonymizer: makes user keys.
        tombstone_secret: 32 bytes. Recognises the forgotten, and is the root of digests that
            must stay the same when the user key rotates.
    """

    def __init__(self, pseudonymizer: Pseudonymizer, tombstone_secret: bytes) -> None:
        self._pseudonymizer = pseudonymizer
        self._key_of_normal = pseudonymizer.key_of_normal
        self._handle = hashlib.blake2b(digest_size=16, key=secrets.token_bytes(32))
        self._recent: dict[bytes, bytes] = {}
        self._tombstone_digest = HmacSha256(tombstone_secret, b"tombstone\x00").digest
        # Keyed states are prepared once and copied: half the price of a new one on the hot path.
        self._digest = hashlib.blake2b(
            digest_size=8, key=hmac.digest(tombstone_secret, b"payload digest", "sha256")
        )
        self._session = hashlib.blake2b(
            digest_size=16, key=hmac.digest(tombstone_secret, b"session", "sha256")
        )

    @classmethod
    def from_directory(cls, keys: Path) -> Door:
        """Reads the keys; fails with FailedPrecondition where one is missing."""
        return cls(Pseudonymizer.from_directory(keys), read_secret(keys, "tombstone_key"))

    @property
    def key_version(self) -> int:
        """The version of the user keys that `keys_of` returns."""
        return self._pseudonymizer.current_version

    @property
    def key_chain(self) -> Pseudonymizer:
        """What brings stored user keys to the current version."""
        return self._pseudonymizer

    def keys_of(self, user_id: str) -> tuple[bytes, bytes]:
        """Returns the current user key and the tombstone key; raises InvalidInput for a bad id."""
        return self.keys_of_normal((user_id if is_plain_id(user_id) else normalise_user_id(user_id)).encode())

    def keys_of_normal(self, normal: bytes) -> tuple[bytes, bytes]:
        """Returns the current user key and the tombstone key of an id in its normal form, in UTF-8."""
        both = self.keys_of_all_normal([normal])
        return both[:USER_KEY_BYTES], both[USER_KEY_BYTES:]

    def keys_of_all_normal(self, ids: Sequence[bytes]) -> bytes:
        """Returns user key and tombstone key, 32 bytes, of one id after another."""
        copy, recent = self._handle.copy, self._recent
        keys = []
        for normal in ids:
            state = copy()
            state.update(normal)
            handle = state.digest()
            both = recent.get(handle)
            if both is None:
                if len(recent) >= _MAX_RECENT:
                    recent.clear()
                both = recent[handle] = (
                    self._key_of_normal(normal) + self._tombstone_digest(normal)[:USER_KEY_BYTES]
                )
            keys.append(both)
        return b"".join(keys)

    def person(self, user_id: str) -> Person:
        """Returns all keys of a person; raises InvalidInput for a bad id."""
        normal = normalise_user_id(user_id).encode()
        return Person(self._pseudonymizer.all_keys(user_id), self._tombstone_digest(normal)[:USER_KEY_BYTES])

    def session_key(self, session_id: str) -> bytes:
        """Returns 16 bytes of keyed BLAKE2b of a session id."""
        return self.session_key_of_bytes(session_id.encode())

    def session_key_of_bytes(self, session_id: bytes) -> bytes:
        """Returns the key of a session id in UTF-8."""
        return self.session_keys_of_bytes([session_id])

    def session_keys_of_bytes(self, session_ids: Sequence[bytes]) -> bytes:
        """Returns the keys, 16 bytes each, of one session id in UTF-8 after another."""
        copy = self._session.copy
        keys = []
        for session_id in session_ids:
            state = copy()
            state.update(session_id)
            keys.append(state.digest())
        return b"".join(keys)

    def payload_digest(self, payload: bytes) -> int:
        """Returns 64 bits of keyed BLAKE2b, signed: equal for a retry, and no oracle for raw ids."""
        state = self._digest.copy()
        state.update(payload)
        return int.from_bytes(state.digest(), "big", signed=True)

    def payload_digests(self, payloads: Sequence[bytes]) -> npt.NDArray[np.int64]:
        """Returns `payload_digest` of each of N payloads, shape (N,)."""
        copy = self._digest.copy
        digests = []
        for payload in payloads:
            state = copy()
            state.update(payload)
            digests.append(state.digest())
        return np.frombuffer(b"".join(digests), dtype=">i8").astype(np.int64)
