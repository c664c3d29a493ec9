"""Long-running operations (AIP-151): the states of one, and how it is followed. Pure; any replica may run it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from enum import IntEnum
from typing import Protocol, TypeVar

WATCH_SECONDS = 0.25


class OperationState(IntEnum):
    """Where an operation stands; the numbers are the contract's, whatever each enum there is called."""

    PENDING = 1
    RUNNING = 2
    SUCCEEDED = 3
    FAILED = 4
    CANCELLED = 5

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen."""
        return self >= OperationState.SUCCEEDED


class Operation(Protocol):
    """What can be followed: a value that equals itself as long as nothing has changed."""

    @property
    def state(self) -> OperationState:
        """Where it stands."""


_Operation = TypeVar("_Operation", bound=Operation)


def follow(
    read: Callable[[], _Operation], stopped: threading.Event, is_active: Callable[[], bool]
) -> Iterator[_Operation]:
    """Yields an operation now, after each change, and for the last time when it has ended.

    Args:
        read: the operation as it is stored, asked every quarter of a second: it may run in another replica.
        stopped: this process ends.
        is_active: whether the caller still listens.
    """
    seen: _Operation | None = None
    while is_active() and not stopped.is_set():
        present = read()
        if present != seen:
            yield present
            seen = present
        if present.state.ended:
            return
        stopped.wait(WATCH_SECONDS)
