"""The identity of an event: one UUIDv7 that is time and id at once.

The log is range-partitioned on this key, so that a primary key alone gives
time partitions and de-duplication for ever (RFC 9562, section 5.7, for the
layout).
"""

from __future__ import annotations

import hashlib
import re

EVENT_KEY_BYTES = 16
_UUID_V7 = re.compile(
    r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", re.IGNORECASE | re.ASCII
)
_MAX_MS = (1 << 48) - 1


def event_key_of_uuid(event_id: str) -> bytes | None:
    """Returns the 16 bytes of an id that is the text of a UUIDv7, or None of any other id."""
    if len(event_id) != 36 or event_id[14] != "7" or not _UUID_V7.fullmatch(event_id):
        return None
    return bytes.fromhex(event_id.replace("-", ""))


def event_key_of_digest(event_id: str, occurred_at_ms: int) -> bytes:
    """Returns a key in the form of a UUIDv7: 48 bits of time and 74 bits of SHA-256 of the id.

    Args:
        event_id: any text; in NFC, or two spellings would be two events.
        occurred_at_ms: milliseconds since 1970, UTC; clamped to 48 bits.
    """
    digest = int.from_bytes(hashlib.sha256(event_id.encode()).digest()[:10], "big") >> 6
    ms = min(max(occurred_at_ms, 0), _MAX_MS)
    key = (ms << 80) | (0x7 << 76) | ((digest >> 62) << 64) | (0b10 << 62) | (digest & ((1 << 62) - 1))
    return key.to_bytes(EVENT_KEY_BYTES, "big")


def milliseconds_of(event_key: bytes) -> int:
    """Returns the time inside a key, in milliseconds since 1970, UTC."""
    return int.from_bytes(event_key[:6], "big")


def first_event_key(ms: int) -> bytes:
    """Returns the lower bound of all keys of `ms` milliseconds since 1970 and later."""
    return min(max(ms, 0), _MAX_MS).to_bytes(6, "big") + bytes(10)
