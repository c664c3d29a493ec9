"""Who is in a segment."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from services.profile.domain.churn_risk import ChurnRisk
from services.profile.domain.events import EMPTY_WINDOW
from services.profile.domain.messages import Reading
from services.profile.domain.portrait import Portrait
from services.profile.domain.segment_filter import Expression, SegmentFacts, matches
from services.profile.ports import EventLog, SegmentStore
from shared.identity import UserKey

USERS_IN_LOAD = 500
# A page may be short, never slow: a rare segment of a large shop takes several calls.
SECONDS_IN_CALL = 2.0


@dataclass(frozen=True, slots=True)
class SegmentPage:
    """Members by ascending key; `next_key` is where the walk stopped, None at its end."""

    user_keys: Sequence[UserKey]
    next_key: bytes | None


class Segments:
    """Segments as resources."""

    def __init__(self, store: SegmentStore) -> None:
        self.create = store.create
        self.get = store.get
        self.page = store.page
        self.update = store.update
        self.delete = store.delete


class SegmentMembers:
    """Applies filters to portraits. Loads past the hot set: a walk over everybody must not empty it.

    Args:
        stands_for: the shopper that an id stands for.
        portrait: folds a portrait.
        risk_of: what is known of a shopper's risk.
        monotonic: seconds.
    """

    def __init__(
        self,
        log: EventLog,
        store: SegmentStore,
        stands_for: Callable[[UserKey], UserKey],
        portrait: Callable[[Reading], Portrait],
        risk_of: Callable[[UserKey], ChurnRisk | None],
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._log = log
        self._store = store
        self._stands_for = stands_for
        self._portrait = portrait
        self._risk_of = risk_of
        self._monotonic = monotonic

    def contains(self, expression: Expression, user_keys: Sequence[UserKey]) -> list[bool]:
        """Returns for each shopper whether the filter holds; never for who does not want to be profiled."""
        windows = self._log.load(user_keys)
        inside = []
        for user_key in user_keys:
            window = windows.get(user_key, EMPTY_WINDOW)
            inside.append(
                window.personalisation
                and matches(
                    expression,
                    SegmentFacts(self._portrait(Reading(user_key, window, 0)), self._risk_of(user_key)),
                )
            )
        return inside

    def page(self, expression: Expression, after: bytes, limit: int) -> SegmentPage:
        """Returns members behind a key: at most `limit`, fewer where the time of a call is over."""
        deadline = self._monotonic() + SECONDS_IN_CALL
        found: list[UserKey] = []
        while True:
            keys, next_key = self._store.users_after(after, USERS_IN_LOAD)
            # One shopper, one entry: under the id that stands for all of theirs.
            keys = [key for key in keys if self._stands_for(key) == key]
            for key, chosen in zip(keys, self.contains(expression, keys), strict=True):
                if not chosen:
                    continue
                found.append(key)
                if len(found) == limit:
                    return SegmentPage(found, key)
            if next_key is None or self._monotonic() >= deadline:
                return SegmentPage(found, next_key)
            after = next_key
