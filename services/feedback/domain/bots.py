"""Marks shoppers that look at more pages than a person can.

Marked, never dropped: what is a bot today may be a school class tomorrow, and
the log must be able to say so.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from shared.event_kinds import EventKind

_MINUTE_US = 60_000_000
_ITEM_VIEW = int(EventKind.ITEM_VIEW)


class RateBotDetector:
    """Counts item views a shopper and minute of `occurred_at`; those beyond the limit are marked.

    The memory of a replica alone: a bot that spreads over r replicas passes r times the limit.

    Args:
        views_per_minute: the most item views of one shopper in one minute that are believed.
        capacity: shopper-minutes remembered at most; the older half is forgotten at once.
    """

    def __init__(self, views_per_minute: int = 120, capacity: int = 100_000) -> None:
        self._limit = views_per_minute
        self._capacity = capacity
        self._views: dict[tuple[bytes, int], int] = {}
        self._older_views: dict[tuple[bytes, int], int] = {}
        self._lock = threading.Lock()

    def marked_rows(
        self, user_keys: Sequence[bytes], kinds: Sequence[int], occurred_at_us: Sequence[int]
    ) -> list[int]:
        """Returns the rows, in [0, n), that go beyond the limit, and remembers the batch."""
        marked: list[int] = []
        with self._lock:
            if len(self._views) > self._capacity // 2:
                self._older_views, self._views = self._views, {}
            views, older_views, limit = self._views, self._older_views, self._limit
            for row, kind in enumerate(kinds):
                if kind != _ITEM_VIEW:
                    continue
                window = (user_keys[row], occurred_at_us[row] // _MINUTE_US)
                count = views.get(window) or older_views.get(window, 0)
                views[window] = count + 1
                if count >= limit:
                    marked.append(row)
        return marked
