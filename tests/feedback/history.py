"""What callers saw, and whether the log agrees: invoke, ok, fail, info.

An operation is a set of events. `ok`: acknowledged. `fail`: refused for certain. `info`: nobody knows; a killed
server answers so. The log is right when every acknowledged event is there, nothing is there that was never
sent or that was refused for certain, and nothing is there twice.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(slots=True)
class History:
    """Operations by event id; safe to fill from many threads."""

    invoked: set[str] = field(default_factory=set)
    acknowledged: set[str] = field(default_factory=set)
    refused: set[str] = field(default_factory=set)
    unknown: set[str] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def invoke(self, events: Iterable[str]) -> None:
        """The events are about to be sent, perhaps again."""
        with self._lock:
            self.invoked.update(events)

    def ok(self, events: Iterable[str]) -> None:
        """The events were acknowledged, as stored or as duplicates."""
        with self._lock:
            self.acknowledged.update(events)

    def fail(self, events: Iterable[str]) -> None:
        """The events were refused."""
        with self._lock:
            self.refused.update(events)

    def info(self, events: Iterable[str]) -> None:
        """Nobody knows."""
        with self._lock:
            self.unknown.update(events)


def anomalies(history: History, stored: Iterable[str]) -> dict[str, set[str]]:
    """Returns the events that prove the log wrong, by what is wrong; empty when nothing is."""
    counts = Counter(stored)
    present = set(counts)
    found = {
        "lost": history.acknowledged - present,
        "invented": present - history.invoked,
        "stored although refused": (history.refused - history.acknowledged - history.unknown) & present,
        "twice": {event for event, count in counts.items() if count > 1},
    }
    return {name: events for name, events in found.items() if events}
