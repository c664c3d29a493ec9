"""The identity of an event: one UUIDv7 that is time and id at once.

The log is range-partitioned on this key, so that a primary key alone gives
time partitions and de-duplication for ever (RFC 9562, section 5.7, for the
layout).
"""

from __future__ import annotations

import hashlib

EVENT_KEY_BYTES = 16
_MAX_MS = (1 << 48) - 1


def event_key_of_uuid(event_id: str) -> bytes | None:
    """Returns the 16 bytes of an id that is the text of a UUIDv7, or None of any other id."""
    if (
        len(event_id) != 36
        or event_id[14] != "7"
        or event_id[19] not in "89abAB"
        or not event_id[8] == event_id[13] == event_id[18] == event_id[23] == "-"
    ):
        return None
    try:
        key = bytes.fromhex(event_id.replace("-", ""))
    except ValueError:
        return None
    # White space, which `fromhex` skips, and further hyphens leave fewer than 16 bytes.
    return key if len(key) == EVENT_KEY_BYTES else None


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
