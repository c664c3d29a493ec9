"""Events of the log as arrays, and the bounded window of them that is kept of a shopper.

Shapes: N = events of a batch, W = events of a window.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shared.identity import UserKey

MAX_WINDOW_EVENTS = 1000
MAX_HISTORY_EVENTS = 200
NO_ITEM = -1

PERSONALISATION = 1
HAS_PRICE = 2

EVENT = np.dtype(
    [
        # The 128 bits of the event key; with the line they identify and order events.
        ("key_high", np.uint64),
        ("key_low", np.uint64),
        ("occurred_at_us", np.int64),
        ("price_micros", np.int64),
        # Codes of a Vocabulary.
        ("item", np.int32),
        # NaN where the event has none.
        ("quantity", np.float32),
        ("value", np.float32),
        ("line", np.int16),
        ("currency", np.int16),
        ("kind", np.uint8),
        # Numbers of the contract; 0 where not known.
        ("device", np.uint8),
        ("channel", np.uint8),
        # PERSONALISATION | HAS_PRICE
        ("flags", np.uint8),
    ]
)
"""One line of one event, 52 bytes; `packing` keeps it in a third of that."""

Events = npt.NDArray[np.void]
"""An array of EVENT, shape (N,)."""


class Vocabulary:
    """Gives texts small numbers, for ever. Thread-safe; numbers differ between processes."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._code_of_text: dict[str, int] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._texts)

    def encode(self, texts: Sequence[str | None], missing: int = NO_ITEM) -> npt.NDArray[np.int32]:
        """Returns the code of each text, shape (N,), int32; `missing` for None."""
        known = self._code_of_text
        try:
            return np.fromiter(
                (missing if text is None else known[text] for text in texts), np.int32, len(texts)
            )
        except KeyError:
            with self._lock:
                for text in texts:
                    if text is not None and text not in known:
                        self._texts.append(text)
                        # Published last: a reader that finds the code also finds the text.
                        known[text] = len(self._texts) - 1
            return np.fromiter(
                (missing if text is None else known[text] for text in texts), np.int32, len(texts)
            )

    def __getitem__(self, code: int) -> str:
        return self._texts[code]


@dataclass(frozen=True, slots=True)
class EventBatch:
    """Events of several shoppers, grouped: the events of `user_keys[u]` are
    `events[bounds[u]:bounds[u + 1]]`, in no particular order.
    """

    user_keys: Sequence[UserKey]
    bounds: Sequence[int]
    events: Events

    def __iter__(self) -> Iterator[tuple[UserKey, Events]]:
        for user, user_key in enumerate(self.user_keys):
            yield user_key, self.events[self.bounds[user] : self.bounds[user + 1]]

    def __len__(self) -> int:
        return len(self.events)


def group_by_user(
    user_high_N: npt.NDArray[np.uint64], user_low_N: npt.NDArray[np.uint64], events_N: Events
) -> EventBatch:
    """Returns the batch of events whose shoppers are given as the two halves of their keys."""
    if not len(events_N):
        return EventBatch((), (0,), events_N)
    order = np.lexsort((user_low_N, user_high_N))
    high, low = user_high_N[order], user_low_N[order]
    starts = np.flatnonzero(np.r_[True, (high[1:] != high[:-1]) | (low[1:] != low[:-1])])
    keys = np.stack((high[starts], low[starts]), axis=1).astype(">u8").tobytes()
    user_keys = [UserKey(keys[at : at + 16]) for at in range(0, len(keys), 16)]
    return EventBatch(user_keys, [*starts.tolist(), len(order)], events_N[order])


@dataclass(frozen=True, slots=True)
class EventWindow:
    """The newest events of one shopper, by event key and line, the newest first.

    A pure function of the set of the shopper's events: whatever the order in which they are merged,
    and however often each is, the window is the same. It stays bounded for any shopper.

    Attributes:
        events_W: EVENT, W <= `MAX_WINDOW_EVENTS`, without duplicates.
        truncated: whether older events are left out.
        consented: whether the shopper's own setting allows personalisation.
    """

    events_W: Events
    truncated: bool = False
    consented: bool = True

    @property
    def personalisation(self) -> bool:
        """Whether the shopper may be served personally: by their setting, and by their newest event."""
        return self.consented and (
            not len(self.events_W) or bool(self.events_W["flags"][0] & PERSONALISATION)
        )

    @property
    def personal_events(self) -> Events:
        """The events that may be used to serve the shopper personally, in the window's order."""
        if not self.personalisation:
            return self.events_W[:0]
        personal = (self.events_W["flags"] & PERSONALISATION) != 0
        # Most shoppers have no others, and a copy of all costs more than the question.
        return self.events_W if personal.all() else self.events_W[personal]

    def merge(self, *others: Events) -> EventWindow:
        """Returns the window of these events and others."""
        events = np.concatenate((self.events_W, *others))
        events = events[np.lexsort((events["line"], events["key_low"], events["key_high"]))[::-1]]
        if len(events) > 1:
            same = (
                (events["key_high"][1:] == events["key_high"][:-1])
                & (events["key_low"][1:] == events["key_low"][:-1])
                & (events["line"][1:] == events["line"][:-1])
            )
            if same.any():
                events = events[np.r_[True, ~same]]
        truncated = self.truncated or len(events) > MAX_WINDOW_EVENTS
        # A copy: a slice would keep the whole batch that it was cut from.
        return EventWindow(events[:MAX_WINDOW_EVENTS].copy(), truncated, self.consented)

    def history(self) -> Events:
        """Returns the newest personal events that name an item, at most 200, shape (H,).

        Newest first by the time at which they happened: models are trained on that order. Event
        keys, which order the window, are as young as the client that made them.
        """
        events = self.personal_events
        events = events[events["item"] != NO_ITEM]
        return events[newest_first(events)][:MAX_HISTORY_EVENTS]


def newest_first(events_N: Events) -> npt.NDArray[np.intp]:
    """Returns the order by falling time; event key and line decide between equals."""
    return np.lexsort(
        (events_N["line"], events_N["key_low"], events_N["key_high"], events_N["occurred_at_us"])
    )[::-1]


EMPTY_WINDOW = EventWindow(np.empty(0, EVENT))
