"""Values that come from files and follow them: certificates, keys, the policy."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from shared.errors import ShopkeeperError
from shared.telemetry import get_logger

T = TypeVar("T")
LOOK_SECONDS = 2.0


class Watched(Generic[T]):
    """A value that is loaded anew when one of its files changes.

    What cannot be loaded is refused, logged once, and the value before stays: a half-written file must not
    take a service down.

    Args:
        files: whose times, sizes and inodes are compared.
        load: returns the value, or raises a `ShopkeeperError`.
        look_seconds: the files are looked at no more often.
        clock: monotonic seconds.

    Raises:
        ShopkeeperError: the first load failed.
    """

    def __init__(
        self,
        files: Sequence[Path],
        load: Callable[[], T],
        *,
        look_seconds: float = LOOK_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._files, self._load, self._look_seconds, self._clock = tuple(files), load, look_seconds, clock
        self._lock = threading.Lock()
        self._seen = self._stamp()
        self._value = load()
        self._next_look = clock() + look_seconds

    def get(self) -> T:
        """Returns the value of the files as they are, or were when they last made sense."""
        if self._clock() >= self._next_look:
            self._look()
        return self._value

    def _look(self) -> None:
        # Whoever comes while another looks takes the value as it is.
        if not self._lock.acquire(blocking=False):
            return
        try:
            self._next_look = self._clock() + self._look_seconds
            stamp = self._stamp()
            if stamp == self._seen:
                return
            try:
                self._value = self._load()
            except ShopkeeperError as error:
                get_logger("watched").error(
                    "files changed and cannot be used; the ones before stay in force",
                    files=[str(file) for file in self._files],
                    reason=error.reason,
                    message=error.message,
                )
            self._seen = stamp
        finally:
            self._lock.release()

    def _stamp(self) -> tuple[object, ...]:
        return tuple(_stamp_of(file) for file in self._files)


def _stamp_of(file: Path) -> tuple[int, int, int] | None:
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
