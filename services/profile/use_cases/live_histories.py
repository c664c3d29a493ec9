"""The shoppers in memory: a bounded, least-recently-used set of event windows.

A shopper in it is always complete up to the follower's watermark: the follower applies what is new to
whoever is in it, and to whoever is being loaded. Since a window is a set, it does not matter that a load
may already hold what the follower brings.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np

from services.profile.domain.events import EMPTY_WINDOW, EVENT, EventBatch, Events, EventWindow
from services.profile.domain.messages import Reading
from services.profile.domain.packing import pack, unpack
from services.profile.ports import EventLog, Metrics
from shared.errors import DeadlineExceeded, ShopkeeperError, Unavailable
from shared.identity import UserKey

MAX_USERS_IN_LOAD = 1000
MAX_PENDING_BYTES = 32 * EVENT.itemsize


class _HotUser:
    """A shopper in memory, as bytes: a million of them must fit."""

    __slots__ = ("consented", "packed", "pending", "truncated", "version")

    def __init__(self, window: EventWindow, version: int) -> None:
        self._keep(window)
        self.pending = b""
        self.version = version

    def _keep(self, window: EventWindow) -> None:
        self.packed = pack(window.events_W)
        self.truncated = window.truncated
        self.consented = window.consented

    def add(self, events: Events, version: int) -> None:
        # Sorting and packing wait for a reader; only the memory of it is bounded here.
        self.pending += events.tobytes()
        self.version = version
        if len(self.pending) > MAX_PENDING_BYTES:
            self.settle()

    def settle(self) -> EventWindow:
        window = EventWindow(unpack(self.packed), self.truncated, self.consented)
        if self.pending:
            window = window.merge(np.frombuffer(self.pending, EVENT))
            self._keep(window)
            self.pending = b""
        return window


class _Flight:
    """One load under way, for everybody who waits for it."""

    __slots__ = ("arrived", "done", "error", "reading", "stale")

    def __init__(self) -> None:
        self.done = threading.Event()
        self.arrived: list[Events] = []
        self.stale = False
        self.reading: Reading | None = None
        self.error: ShopkeeperError | None = None


class LiveHistories:
    """Windows by user key. Thread-safe.

    Args:
        log: where shoppers that are not in memory are loaded from.
        capacity: the most shoppers in memory.
    """

    def __init__(self, log: EventLog, capacity: int, metrics: Metrics) -> None:
        self._log = log
        self.capacity = capacity
        self._metrics = metrics
        self._lock = threading.Lock()
        self._hot: OrderedDict[UserKey, _HotUser] = OrderedDict()
        self._flights: dict[UserKey, _Flight] = {}
        self._version = 0
        self._erased: set[UserKey] = set()

    def __len__(self) -> int:
        return len(self._hot)

    def read(self, user_keys: Iterable[UserKey], timeout_seconds: float) -> dict[UserKey, Reading]:
        """Returns the shoppers' windows, loading who is missing by one query.

        Callers that miss the same shopper at once share one load.

        Raises:
            Unavailable: the log cannot be read.
            DeadlineExceeded: another caller's load did not end in time.
        """
        readings: dict[UserKey, Reading] = {}
        mine: dict[UserKey, _Flight] = {}
        others: dict[UserKey, _Flight] = {}
        with self._lock:
            for user_key in user_keys:
                user = self._hot.get(user_key)
                if user is not None:
                    self._hot.move_to_end(user_key)
                    readings[user_key] = Reading(user_key, user.settle(), user.version)
                elif user_key in self._flights:
                    others.setdefault(user_key, self._flights[user_key])
                else:
                    mine[user_key] = self._flights[user_key] = _Flight()
            # A shopper named twice in one call finds their own flight.
            for user_key in mine:
                others.pop(user_key, None)
        if mine:
            self._metrics.missed(len(mine))
            self._fly(mine)
        deadline = time.monotonic() + timeout_seconds
        for user_key, flight in (mine | others).items():
            if not flight.done.wait(max(0.0, deadline - time.monotonic())):
                raise DeadlineExceeded(
                    "DEADLINE_EXCEEDED", "The shopper was still being loaded at the deadline; retry."
                )
            if flight.error is not None:
                # Anew: several threads must not raise one exception object.
                raise type(flight.error)(flight.error.reason, flight.error.message, flight.error.metadata)
            assert flight.reading is not None
            readings[user_key] = flight.reading
        return readings

    def warm(self, user_key: UserKey, window: EventWindow) -> None:
        """Takes a shopper into memory who is complete up to where the follower will go on from.

        Called before the follower's first poll. One who is erased, or in memory, stays as they are.
        """
        with self._lock:
            if user_key in self._erased or user_key in self._hot or len(self._hot) >= self.capacity:
                return
            self._version += 1
            self._hot[user_key] = _HotUser(window, self._version)
            # Who comes first was active last: they are the last to be dropped.
            self._hot.move_to_end(user_key, last=False)

    def apply(self, batch: EventBatch) -> None:
        """Adds new events to those shoppers who are in memory or being loaded."""
        with self._lock:
            hot, flights = self._hot, self._flights
            self._version += 1
            for user, user_key in enumerate(batch.user_keys):
                entry = hot.get(user_key)
                flight = flights.get(user_key)
                if (entry is None and flight is None) or user_key in self._erased:
                    continue
                events = batch.events[batch.bounds[user] : batch.bounds[user + 1]]
                if entry is not None:
                    entry.add(events, self._version)
                if flight is not None:
                    # A copy: a slice would keep the whole batch in memory.
                    flight.arrived.append(events.copy())

    def erase(self, user_keys: Sequence[UserKey]) -> None:
        """Drops erased shoppers, who stay empty for ever.

        Their rows may be in the log for a while yet: a load must not bring them back.
        """
        with self._lock:
            self._erased.update(user_keys)
        self.forget(user_keys)

    def forget(self, user_keys: Iterable[UserKey]) -> None:
        """Drops shoppers from memory; a load of them under way starts anew."""
        with self._lock:
            for user_key in user_keys:
                self._hot.pop(user_key, None)
                if flight := self._flights.get(user_key):
                    flight.stale = True
                    flight.arrived.clear()
            self._metrics.hot(len(self._hot))

    def clear(self) -> None:
        """Drops everybody."""
        with self._lock:
            self._hot.clear()
            for flight in self._flights.values():
                flight.stale = True
                flight.arrived.clear()
            self._metrics.hot(0)

    def _fly(self, flights: dict[UserKey, _Flight]) -> None:
        user_keys = list(flights)
        try:
            for start in range(0, len(user_keys), MAX_USERS_IN_LOAD):
                chunk = user_keys[start : start + MAX_USERS_IN_LOAD]
                while chunk:
                    chunk = self._land(chunk, flights, self._log.load(chunk))
        except ShopkeeperError as error:
            self._crash(flights, error)
        except BaseException:
            # Whoever waits must not wait for ever for a load that died of a bug.
            self._crash(flights, Unavailable("LOG_UNAVAILABLE", "The shopper could not be loaded; retry."))
            raise

    def _land(
        self,
        user_keys: Sequence[UserKey],
        flights: dict[UserKey, _Flight],
        loaded: dict[UserKey, EventWindow],
    ) -> list[UserKey]:
        """Puts loaded shoppers into memory; returns those who were erased meanwhile."""
        again = []
        with self._lock:
            for user_key in user_keys:
                flight = flights[user_key]
                if flight.stale:
                    flight.stale = False
                    again.append(user_key)
                    continue
                erased = user_key in self._erased
                window = EMPTY_WINDOW if erased else loaded.get(user_key, EMPTY_WINDOW)
                if flight.arrived:
                    window = window.merge(*flight.arrived)
                self._version += 1
                self._hot[user_key] = _HotUser(window, self._version)
                flight.reading = Reading(user_key, window, self._version)
                del self._flights[user_key]
                flight.done.set()
            while len(self._hot) > self.capacity:
                self._hot.popitem(last=False)
            self._metrics.hot(len(self._hot))
        return again

    def _crash(self, flights: dict[UserKey, _Flight], error: ShopkeeperError) -> None:
        with self._lock:
            for user_key, flight in flights.items():
                if not flight.done.is_set():
                    self._flights.pop(user_key, None)
                    flight.error = error
                    flight.done.set()
