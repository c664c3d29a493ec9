"""Items that events name and the catalogue does not know."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import IntEnum


class UnknownItemOrder(IntEnum):
    """In which order they are listed; the numbers of the contract."""

    EVENT_COUNT = 1
    ITEM_ID = 2


@dataclass(frozen=True, slots=True)
class UnknownItem:
    """An item.

    Attributes:
        event_count: events stored that name it, each once.
        first_seen_at, last_seen_at: when the first and the last of them were stored, UTC.
    """

    item_id: str
    event_count: int
    first_seen_at: datetime
    last_seen_at: datetime


@dataclass(frozen=True, slots=True)
class UnknownItemsPage:
    """A page of them.

    Attributes:
        items: at most as many as were asked for.
        has_more: whether another page follows.
        total: on all pages.
        compared_at: when the whole log had been compared with the catalogue; None when it never was.
    """

    items: Sequence[UnknownItem]
    has_more: bool
    total: int
    compared_at: datetime | None
