"""Who an event is about, once the raw id has stopped at the door. Pure."""

from __future__ import annotations

import re
import unicodedata
from typing import NewType

from shared.errors import FieldViolation, InvalidInput

UserKey = NewType("UserKey", bytes)
"""16 bytes: the truncated HMAC-SHA-256 of a normalised user id."""

USER_KEY_BYTES = 16
MAX_ID_CHARACTERS = 256
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def normalise_user_id(user_id: str, field: str = "user_id") -> str:
    """Returns the NFC form of a raw user id, 1 to 256 characters.

    Two spellings of the same text are one person: `é` is `é`, however it was typed.

    Raises:
        InvalidInput: the id is empty, too long, or has a control character.
    """
    return _normalise_id(user_id, field)


def normalise_item_id(item_id: str, field: str = "item_id") -> str:
    """Returns the NFC form of an item id, 1 to 256 characters; fails as `normalise_user_id` does."""
    return _normalise_id(item_id, field)


def parse_user_key(user_key: bytes, field: str = "user_key") -> UserKey:
    """Returns the bytes as a key.

    Raises:
        InvalidInput: not 16 bytes.
    """
    if len(user_key) != USER_KEY_BYTES:
        raise _invalid(field, f"has {len(user_key)} bytes; a user key has {USER_KEY_BYTES}.")
    return UserKey(bytes(user_key))


def _normalise_id(value: str, field: str) -> str:
    if not value:
        raise _invalid(field, "is empty; send 1 to 256 characters.")
    # ASCII is its own normal form; most ids are ASCII, and normalisation is the dearer check.
    normal = value if value.isascii() else unicodedata.normalize("NFC", value)
    if len(normal) > MAX_ID_CHARACTERS:
        raise _invalid(field, f"has {len(normal)} characters; the most is {MAX_ID_CHARACTERS}.")
    if _CONTROL.search(normal):
        raise _invalid(field, "has a control character (such as NUL or a line break); remove it.")
    return normal


def _invalid(field: str, problem: str) -> InvalidInput:
    return InvalidInput(
        "INVALID_ID", f"{field} {problem}", violations=[FieldViolation(field, problem, "INVALID_ID")]
    )
