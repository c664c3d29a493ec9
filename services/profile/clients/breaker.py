"""Whom not to ask again so soon: a call that failed is not repeated for a while, and nobody waits for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

import grpc

BREAKER_SECONDS = 10.0

Answer = TypeVar("Answer")


class Breaker:
    """Thread-safe.

    Args:
        monotonic: seconds.
    """

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._closed_until = -1.0
        self._lock = threading.Lock()

    def call(self, ask: Callable[[], Answer]) -> Answer | None:
        """Returns the answer; None where the call fails, or failed a moment ago."""
        if self._monotonic() < self._closed_until:
            return None
        try:
            return ask()
        except grpc.RpcError:
            with self._lock:
                self._closed_until = self._monotonic() + BREAKER_SECONDS
            return None
