"""Marks shoppers that look at more pages than a person can.

Marked, never dropped: what is a bot today may be a school class tomorrow, and
the log must be able to say so.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence

from shared.event_kinds import EventKind

_MINUTE_US = 60_000_000
_ITEM_VIEW = int(EventKind.ITEM_VIEW)


class RateBotDetector:
    """Counts item views a shopper and minute of `occurred_at`; those beyond the limit are marked.

    The memory of a replica alone: a bot that spreads over r replicas passes r times the limit.

    Args:
        views_per_minute: the most item views of one shopper in one minute that are believed.
        capacity: shopper-minutes remembered; the oldest are forgotten first.
    """

    def __init__(self, views_per_minute: int = 120, capacity: int = 100_000) -> None:
        self._limit = views_per_minute
        self._capacity = capacity
        self._views: OrderedDict[tuple[bytes, int], int] = OrderedDict()
        self._lock = threading.Lock()

    def marked_rows(
        self, user_keys: Sequence[bytes], kinds: Sequence[int], occurred_at_us: Sequence[int]
    ) -> list[int]:
        """Returns the rows, in [0, n), that go beyond the limit, and remembers the batch."""
        marked: list[int] = []
        with self._lock:
            views = self._views
            for row, kind in enumerate(kinds):
                if kind != _ITEM_VIEW:
                    continue
                window = (user_keys[row], occurred_at_us[row] // _MINUTE_US)
                count = views.get(window, 0) + 1
                views[window] = count
                if count > self._limit:
                    marked.append(row)
            while len(views) > self._capacity:
                views.popitem(last=False)
        return marked
