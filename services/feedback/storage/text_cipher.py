"""What people wrote, encrypted under a key of their own.

AES-256-GCM-SIV (RFC 8452): a repeated nonce reveals no more than that two texts
are equal. The data key of a person is wrapped by the master key; destroying the
wrapped key makes the texts unreadable, in backups too. The associated data bind
a text to its table, row, column and key: moved elsewhere, it does not decrypt.
"""

from __future__ import annotations

import os

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCMSIV

from shared.errors import DataLoss

_NONCE_BYTES = 12
DATA_KEY_BYTES = 32


class TextCipher:
    """Encrypts texts of the column `events.text`.

    Args:
        master_key: 32 bytes.
    """

    def __init__(self, master_key: bytes) -> None:
        self._master = AESGCMSIV(master_key)

    def new_wrapped_key(self, key_id: bytes) -> bytes:
        """Returns a new data key, wrapped; `key_id` is what it is stored under."""
        nonce = os.urandom(_NONCE_BYTES)
        return nonce + self._master.encrypt(nonce, os.urandom(DATA_KEY_BYTES), b"data_keys|" + key_id)

    def unwrap(self, wrapped: bytes, key_id: bytes) -> AESGCMSIV:
        """Returns a data key, ready for use.

        Raises:
            DataLoss: wrapped under another master key, or altered.
        """
        try:
            return AESGCMSIV(
                self._master.decrypt(wrapped[:_NONCE_BYTES], wrapped[_NONCE_BYTES:], b"data_keys|" + key_id)
            )
        except (InvalidTag, ValueError) as error:
            raise DataLoss(
                "TEXT_UNREADABLE",
                "A data key cannot be unwrapped: the master key is another one, or the row was altered. "
                "Restore the master key that this database was written with.",
            ) from error


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
