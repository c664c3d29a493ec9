"""Fan-out of state to many watchers, none of which can hold up another or the source.

A source names what changed and how far it is; each watcher has a set of names that it has not been
told yet. Names coalesce, so a slow watcher costs at most one entry a name, and then only its own time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from shared.tokens import Watermark

Key = TypeVar("Key")


@dataclass(frozen=True, slots=True)
class Delivery(Generic[Key]):
    """What a watcher is to be told next.

    Attributes:
        changed, removed: names; removals come before changes.
        watermark: how far the watcher is once it has been told; None while more is pending.
        watermark_time_us: when that was read.
        reset: everything told before is void.
    """

    changed: list[Key] = field(default_factory=list)
    removed: list[Key] = field(default_factory=list)
    watermark: Watermark | None = None
    watermark_time_us: int = 0
    reset: bool = False


class Subscription(Generic[Key]):
    """One watcher's pending names.

    Args:
        wants: whether a name concerns this watcher.
        max_pending: a watcher that is behind by more is reset instead.
    """

    def __init__(self, wants: Callable[[Key], bool] | None, max_pending: int) -> None:
        self._wants = wants
        self._max_pending = max_pending
        self._wake = threading.Condition()
        # Dictionaries as ordered sets: what waited longest is told first.
        self._changed: dict[Key, None] = {}
        self._removed: dict[Key, None] = {}
        self._watermark: Watermark | None = None
        self._watermark_time_us = 0
        self._reset = False
        self._held = True
        self._closed = False

    @property
    def closed(self) -> bool:
        """Whether the source has ended."""
        return self._closed

    def offer(
        self, changed: Iterable[Key], removed: Iterable[Key], watermark: Watermark | None, time_us: int
    ) -> None:
        """Adds names and moves the watermark on. Never blocks on the watcher."""
        wants = self._wants
        with self._wake:
            for key in removed:
                if wants is None or wants(key):
                    self._changed.pop(key, None)
                    self._removed[key] = None
            for key in changed:
                if wants is None or wants(key):
                    self._changed[key] = None
            if len(self._changed) + len(self._removed) > self._max_pending:
                self._drop()
            if watermark is not None:
                self._watermark, self._watermark_time_us = watermark, time_us
            self._wake.notify()

    def reset(self) -> None:
        """Voids everything told and pending."""
        with self._wake:
            self._drop()
            self._wake.notify()

    def release(self) -> None:
        """Lets deliveries begin: until then watermarks are held back, for older names may still come."""
        with self._wake:
            self._held = False
            self._wake.notify()

    def close(self) -> None:
        """Ends the watcher's wait."""
        with self._wake:
            self._closed = True
            self._wake.notify()

    def take(self, max_names: int, timeout_seconds: float) -> Delivery[Key]:
        """Returns up to `max_names` pending names, or a bare watermark when there are none in time."""
        with self._wake:
            self._wake.wait_for(
                lambda: self._closed or self._reset or self._changed or self._removed, timeout_seconds
            )
            reset, self._reset = self._reset, False
            removed = _pop(self._removed, max_names)
            changed = _pop(self._changed, max_names - len(removed)) if not self._removed else []
            done = not self._changed and not self._removed and not self._held
            return Delivery(
                changed, removed, self._watermark if done else None, self._watermark_time_us, reset
            )

    def _drop(self) -> None:
        self._changed.clear()
        self._removed.clear()
        self._reset = True


class Subscriptions(Generic[Key]):
    """Every watcher of one source."""

    def __init__(self, on_count: Callable[[int], None] = lambda _count: None) -> None:
        self._on_count = on_count
        self._lock = threading.Lock()
        self._members: list[Subscription[Key]] = []

    def add(self, subscription: Subscription[Key]) -> None:
        """Adds a watcher: it hears of everything that is published from now on."""
        with self._lock:
            self._members.append(subscription)
            self._on_count(len(self._members))

    def remove(self, subscription: Subscription[Key]) -> None:
        """Removes a watcher, if it is one."""
        with self._lock:
            if subscription in self._members:
                self._members.remove(subscription)
            self._on_count(len(self._members))

    def publish(
        self, changed: Iterable[Key], removed: Iterable[Key], watermark: Watermark, time_us: int
    ) -> None:
        """Offers a change to every watcher."""
        changed, removed = list(changed), list(removed)
        for subscription in self._copy():
            subscription.offer(changed, removed, watermark, time_us)

    def offer(self, changed: Sequence[Key]) -> None:
        """Offers names to every watcher, and moves no watermark."""
        for subscription in self._copy():
            subscription.offer(changed, (), None, 0)

    def reset(self) -> None:
        """Resets every watcher."""
        for subscription in self._copy():
            subscription.reset()

    def close(self) -> None:
        """Ends every watcher."""
        for subscription in self._copy():
            subscription.close()

    def _copy(self) -> list[Subscription[Key]]:
        with self._lock:
            return list(self._members)


def _pop(names: dict[Key, None], count: int) -> list[Key]:
    taken: list[Key] = []
    while names and len(taken) < count:
        key = next(iter(names))
        del names[key]
        taken.append(key)
    return taken
