"""A run that folds the whole log anew, and one shopper's part of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from services.profile.domain.events import NO_ITEM, EventWindow, Vocabulary
from services.profile.domain.packing import pack, unpack
from shared.identity import UserKey
from shared.operations import OperationState


@dataclass(frozen=True, slots=True)
class Rebuild:
    """A rebuild.

    Attributes:
        watermark: encoded; empty until it has succeeded.
        created_us, ended_us: microseconds since 1970.
    """

    rebuild_id: str
    state: OperationState
    created_us: int
    folded_events: int = 0
    total_events: int = 0
    portraits: int = 0
    watermark: bytes = b""
    failure_reason: str = ""
    failure_message: str = ""
    cancel_requested: bool = False
    ended_us: int | None = None


@dataclass(frozen=True, slots=True)
class FoldedShopper:
    """A window as it is stored: codes of events are places in `texts`, which any process can read.

    Attributes:
        last_us: when the newest event happened.
        texts: item ids, then currencies, each once.
    """

    user_key: UserKey
    last_us: int
    truncated: bool
    consented: bool
    texts: Sequence[str]
    events: bytes

    @classmethod
    def of(
        cls, user_key: UserKey, window: EventWindow, items: Vocabulary, currencies: Vocabulary
    ) -> FoldedShopper:
        """Returns the stored form of a window."""
        events = window.events_W.copy()
        texts: list[str] = []
        for column, vocabulary in (("item", items), ("currency", currencies)):
            codes, places = np.unique(events[column], return_inverse=True)
            known = codes >= 0
            place_of = np.where(known, len(texts) + np.cumsum(known) - 1, NO_ITEM)
            texts.extend(vocabulary[code] for code in codes[known].tolist())
            events[column] = place_of[places]
        last_us = int(events["occurred_at_us"].max()) if len(events) else 0
        return cls(user_key, last_us, window.truncated, window.consented, texts, pack(events))

    def window(self, items: Vocabulary, currencies: Vocabulary) -> EventWindow:
        """Returns the window, in this process's codes."""
        events = unpack(self.events)
        for column, vocabulary in (("item", items), ("currency", currencies)):
            places = np.unique(events[column][events[column] >= 0])
            codes = vocabulary.encode([self.texts[place] for place in places.tolist()])
            at = np.searchsorted(places, events[column])
            if len(codes):
                events[column] = np.where(events[column] >= 0, codes[np.minimum(at, len(codes) - 1)], NO_ITEM)
        return EventWindow(events, self.truncated, self.consented)
