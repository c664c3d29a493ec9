"""Until when the caller of this thread waits: what the thread does for it may take no longer.

A thread that answers a call is told the call's deadline; whatever blocks on its way, the database before all, asks
here how long it may.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import grpc

Default = TypeVar("Default", float, None)
_this_thread = threading.local()


def begin(remaining_seconds: float | None) -> None:
    """A call begins on this thread; None for one that has no deadline."""
    _this_thread.at = None if remaining_seconds is None else time.monotonic() + remaining_seconds


def end() -> None:
    """The call has ended."""
    _this_thread.at = None


def remaining_seconds() -> float | None:
    """Returns the seconds left to the call of this thread, at least 0; None without a deadline or a call."""
    at = getattr(_this_thread, "at", None)
    return None if at is None else max(0.0, at - time.monotonic())


def has_passed() -> bool:
    """Returns whether the call of this thread had a deadline and it is over."""
    return remaining_seconds() == 0.0


def time_remaining_seconds(context: grpc.ServicerContext, default: Default) -> float | Default:
    """Returns the seconds until the caller's deadline, at least 0, or `default` where it set none."""
    remaining = context.time_remaining()
    # Without a deadline grpcio answers with a number of years.
    return default if remaining is None or remaining > 1e6 else max(0.0, remaining)
