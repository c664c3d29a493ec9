"""What people wrote, encrypted under a key of their own.

AES-256-GCM-SIV (RFC 8452): a repeated nonce reveals no more than that two texts
are equal. The data key of a person is wrapped by the master key; destroying the
wrapped key makes the texts unreadable, in backups too. The associated data bind
a text to its table, row, column and key: moved elsewhere, it does not decrypt.
"""

from __future__ import annotations

import os
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCMSIV

from shared.errors import DataLoss
from shared.keys import read_secret

_NONCE_BYTES = 12
DATA_KEY_BYTES = 32
# While the master key is rotated: first the coming key, then the former.
OTHER_MASTER_KEY = "master_key.other"


class TextCipher:
    """Encrypts texts of the column `events.text`.

    Args:
        master_key: 32 bytes; wraps every new data key.
        other_key: 32 bytes; what it wrapped is read too, while the master key is being rotated.
    """

    def __init__(self, master_key: bytes, other_key: bytes | None = None) -> None:
        self._master = AESGCMSIV(master_key)
        self._readable = (self._master,) if other_key is None else (self._master, AESGCMSIV(other_key))

    @classmethod
    def from_directory(cls, keys: Path) -> TextCipher:
        """Returns the cipher of an installation's keys.

        Raises:
            FailedPrecondition: the master key is missing, or one of the two cannot be read.
        """
        other = read_secret(keys, OTHER_MASTER_KEY) if (keys / f"{OTHER_MASTER_KEY}.hex").exists() else None
        return cls(read_secret(keys, "master_key"), other)

    def new_wrapped_key(self, key_id: bytes) -> bytes:
        """Returns a new data key, wrapped; `key_id` is what it is stored under."""
        return self._wrapped(os.urandom(DATA_KEY_BYTES), key_id)

    def rewrapped(self, wrapped: bytes, key_id: bytes) -> bytes | None:
        """Returns a data key wrapped by the master key, or None where it is already.

        Raises:
            DataLoss: neither key unwraps it.
        """
        data_key, master = self._opened(wrapped, key_id)
        return None if master is self._master else self._wrapped(data_key, key_id)

    def unwrap(self, wrapped: bytes, key_id: bytes) -> AESGCMSIV:
        """Returns a data key, ready for use.

        Raises:
            DataLoss: wrapped under another master key, or altered.
        """
        return AESGCMSIV(self._opened(wrapped, key_id)[0])

    def _wrapped(self, data_key: bytes, key_id: bytes) -> bytes:
        nonce = os.urandom(_NONCE_BYTES)
        return nonce + self._master.encrypt(nonce, data_key, b"data_keys|" + key_id)

    def _opened(self, wrapped: bytes, key_id: bytes) -> tuple[bytes, AESGCMSIV]:
        nonce, sealed = wrapped[:_NONCE_BYTES], wrapped[_NONCE_BYTES:]
        for master in self._readable:
            try:
                return master.decrypt(nonce, sealed, b"data_keys|" + key_id), master
            except (InvalidTag, ValueError):
                continue
        raise DataLoss(
            "TEXT_UNREADABLE",
            "A data key cannot be unwrapped: the master key is another one, or the row was altered. "
            "Restore the master key that this database was written with.",
        )


def encrypt(key: AESGCMSIV, text: str, event_key: bytes, key_id: bytes) -> bytes:
    """Returns nonce and ciphertext of a text of one event."""
    nonce = os.urandom(_NONCE_BYTES)
    return nonce + key.encrypt(nonce, text.encode(), _associated(event_key, key_id))


def decrypt(key: AESGCMSIV, sealed: bytes, event_key: bytes, key_id: bytes) -> str:
    """Returns the text of one event.

    Raises:
        DataLoss: altered, or moved from another row.
    """
    try:
        return key.decrypt(
            sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], _associated(event_key, key_id)
        ).decode()
    except (InvalidTag, ValueError) as error:
        raise DataLoss(
            "TEXT_UNREADABLE",
            "A stored text does not decrypt: the row was altered, or moved from another row.",
            {"eventKey": event_key.hex()},
        ) from error


def _associated(event_key: bytes, key_id: bytes) -> bytes:
    return b"|".join((b"events", event_key, b"text", key_id))
