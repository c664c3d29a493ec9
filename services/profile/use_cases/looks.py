"""What is looked at again and again."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod

from shared.errors import Unavailable

RETRY_SECONDS = 5.0


class Looks(ABC):
    """Keeps something in memory up to date. One thread calls `run`; anybody may stop it.

    Args:
        seconds: between two looks.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._stopping = threading.Event()

    @abstractmethod
    def look(self) -> None:
        """Looks once; raises Unavailable, and what was known before stays."""

    def run(self) -> None:
        """Looks until `stop`; survives every outage."""
        while not self._stopping.is_set():
            try:
                self.look()
                self._stopping.wait(self._seconds)
            except Unavailable:
                self._stopping.wait(RETRY_SECONDS)

    def stop(self) -> None:
        """Ends `run`."""
        self._stopping.set()
