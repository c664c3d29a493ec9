"""What readers and watchers are told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from services.profile.domain.events import EventWindow
from shared.identity import UserKey
from shared.tokens import Watermark


@dataclass(frozen=True, slots=True)
class Reading:
    """A shopper's window. Two readings of one shopper with equal versions are equal."""

    user_key: UserKey
    window: EventWindow
    version: int


@dataclass(frozen=True, slots=True)
class ProfilesMessage:
    """What a watcher of profiles is told next.

    Attributes:
        live_watermark: what the readings reflect at least.
        watermark: how far the watcher is; None while more is pending.
    """

    readings: Sequence[Reading]
    erased: Sequence[UserKey]
    live_watermark: Watermark
    watermark: Watermark | None
    watermark_time_us: int
    reset: bool


@dataclass(frozen=True, slots=True)
class ItemsMessage:
    """What a watcher of items is told next.

    Attributes:
        vectors: (item id, float32 little endian), all of the space `vector_version`.
    """

    upserted: Sequence[bytes]
    deleted_item_ids: Sequence[str]
    watermark: Watermark | None
    snapshot_complete: bool
    reset: bool
    vectors: Sequence[tuple[str, bytes]] = ()
    vector_version: str = ""
