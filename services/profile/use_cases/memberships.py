"""Which segments a shopper is in, told with their live profile."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence

from services.profile.domain.churn_risk import ChurnRisk
from services.profile.domain.messages import Reading
from services.profile.domain.portrait import Portrait
from services.profile.domain.segment_filter import Expression, SegmentFacts, matches
from services.profile.ports import SegmentStore
from services.profile.use_cases.looks import Looks
from shared.errors import InvalidInput
from shared.identity import UserKey

MAX_SEGMENTS = 50
"""The segments, by ascending id, that live profiles tell of: each costs a look at every active shopper."""

MEMBERSHIP_SECONDS = 60.0
"""A shopper is looked at again after so long at the earliest: segments are of days, clicks come every second."""

_KEPT_SHOPPERS = 50_000


class Memberships(Looks):
    """Keeps the segments up to date; anybody may ask who is in them.

    Args:
        parse: reads a stored filter.
        portrait: folds a portrait; not called while there is no segment.
        risk_of: what is known of a shopper's risk.
        seconds: how often the segments are read anew, for replicas change them too.
        monotonic: seconds.
    """

    def __init__(
        self,
        store: SegmentStore,
        parse: Callable[[str], Expression],
        portrait: Callable[[Reading], Portrait],
        risk_of: Callable[[UserKey], ChurnRisk | None],
        seconds: float,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(seconds)
        self._store = store
        self._parse = parse
        self._portrait = portrait
        self._risk_of = risk_of
        self._monotonic = monotonic
        self._stored: tuple[tuple[str, str], ...] = ()
        # Revision and filters together: a reader must not see the one without the other.
        self._current: tuple[int, tuple[tuple[str, Expression], ...]] = (0, ())
        self._lock = threading.Lock()
        self._known: OrderedDict[UserKey, tuple[int, float, tuple[str, ...]]] = OrderedDict()

    @property
    def revision(self) -> int:
        """Counts changes of the segments: what was said before one may be wrong after it."""
        return self._current[0]

    def look(self) -> None:
        """Reads the segments anew; raises Unavailable, and those known before stay."""
        segments = self._store.page("", MAX_SEGMENTS)
        stored = tuple((segment.segment_id, segment.filter) for segment in segments)
        if stored == self._stored:
            return
        filters: list[tuple[str, Expression]] = []
        for segment_id, text in stored:
            try:
                filters.append((segment_id, self._parse(text)))
            except InvalidInput:
                # Written by a newer version: of this one nobody is known to be a member.
                continue
        self._current = (self._current[0] + 1, tuple(filters))
        self._stored = stored

    def of(self, reading: Reading, portrait: Portrait | None = None) -> Sequence[str]:
        """Returns the ids of the segments that a shopper is in, ascending; at most MEMBERSHIP_SECONDS old.

        Args:
            portrait: the shopper's, where it is at hand.
        """
        revision, filters = self._current
        if not filters or not reading.window.personalisation:
            return ()
        now = self._monotonic()
        with self._lock:
            known = self._known.get(reading.user_key)
        if known is not None and known[0] == revision and now - known[1] < MEMBERSHIP_SECONDS:
            return known[2]
        facts = SegmentFacts(portrait or self._portrait(reading), self._risk_of(reading.user_key))
        found = tuple(segment_id for segment_id, expression in filters if matches(expression, facts))
        with self._lock:
            self._known[reading.user_key] = (revision, now, found)
            self._known.move_to_end(reading.user_key)
            if len(self._known) > _KEPT_SHOPPERS:
                self._known.popitem(last=False)
        return found
