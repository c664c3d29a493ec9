"""Folds the whole log anew, and lets a replica start from the result."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

from services.profile.domain.events import EMPTY_WINDOW, Vocabulary
from services.profile.domain.rebuilds import FoldedShopper, Rebuild
from services.profile.ports import EventLog, RebuildStore
from services.profile.use_cases.live_histories import LiveHistories
from services.profile.use_cases.merged_users import MergedUsers
from shared.errors import ShopkeeperError, Unavailable
from shared.operations import OperationState, follow
from shared.tokens import Watermark

SHOPPERS_AT_ONCE = 1000


class ManageRebuilds:
    """Begins, follows and cancels rebuilds."""

    def __init__(self, store: RebuildStore, clock_us: Callable[[], int], wake: Callable[[], None]) -> None:
        self._store = store
        self._clock_us = clock_us
        self._wake = wake
        self.get = store.get

    def begin(self, request_id: str) -> Rebuild:
        """Returns a new rebuild, or the earlier one of the same request id."""
        created = self._store.create(request_id, self._clock_us())
        self._wake()
        return created

    def cancel(self, rebuild_id: str) -> Rebuild:
        """Stops a rebuild; raises NotFound."""
        return self._store.request_cancel(rebuild_id, self._clock_us())

    def watch(
        self, rebuild_id: str, stopped: threading.Event, is_active: Callable[[], bool]
    ) -> Iterator[Rebuild]:
        """Yields a rebuild now, after each change, and for the last time when it has ended."""
        return follow(lambda: self._store.get(rebuild_id), stopped, is_active)


class RunRebuilds:
    """Folds shopper by shopper, past those in memory: a rebuild must not push out who is served.

    The watermark is that of the beginning, and every shopper is read later, so some events are in already that
    a reader who goes on from the watermark will see again. Windows are sets: that is harmless, and so the run
    needs no transaction that lasts as long as itself.
    """

    def __init__(
        self,
        store: RebuildStore,
        log: EventLog,
        merged: MergedUsers,
        items: Vocabulary,
        currencies: Vocabulary,
        clock_us: Callable[[], int],
        stopped: threading.Event,
    ) -> None:
        self._store = store
        self._log = log
        self._merged = merged
        self._items = items
        self._currencies = currencies
        self._clock_us = clock_us
        self._stopped = stopped

    def run_next(self) -> bool:
        """Runs the oldest unfinished rebuild to its end; returns whether there was one.

        One that was cut short begins again from nothing; until it succeeds, the earlier one is in force.

        Raises:
            Unavailable: the database is away; nothing is lost.
        """
        job = self._store.oldest_unfinished()
        if job is None:
            return False
        try:
            watermark = self._store.begin(job.rebuild_id)
            after: bytes | None = b""
            while after is not None:
                if self._stopped.is_set():
                    return True
                keys, after = self._store.users_after(after, SHOPPERS_AT_ONCE)
                # One shopper, one row: under the id that stands for all of theirs.
                keys = [key for key in keys if self._merged.of(key) == key]
                windows = self._log.load(keys) if keys else {}
                shoppers = [
                    FoldedShopper.of(key, windows.get(key, EMPTY_WINDOW), self._items, self._currencies)
                    for key in keys
                ]
                events = sum(len(window.events_W) for window in windows.values())
                if not self._store.write(job.rebuild_id, shoppers, events):
                    return self._end(job, OperationState.CANCELLED)
            self._store.succeed(job.rebuild_id, watermark, self._clock_us())
        except Unavailable:
            raise
        except ShopkeeperError as error:
            return self._end(job, OperationState.FAILED, error.reason, error.message)
        return True

    def _end(self, job: Rebuild, state: OperationState, reason: str = "", message: str = "") -> bool:
        self._store.finish(job.rebuild_id, state, reason, message, self._clock_us())
        return True


def warm(
    store: RebuildStore, histories: LiveHistories, items: Vocabulary, currencies: Vocabulary
) -> Watermark | None:
    """Puts the shoppers of the rebuild in force into memory; returns the snapshot to read the log from.

    None where there is no rebuild.

    Raises:
        Unavailable: the database does not answer.
    """
    found = store.in_force(histories.capacity)
    if found is None:
        return None
    watermark, shoppers = found
    for shopper in shoppers:
        histories.warm(shopper.user_key, shopper.window(items, currencies))
    return watermark
