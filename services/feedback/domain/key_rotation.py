"""The rewriting of all stored pseudonyms to the newest user key."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import IntEnum

DEFAULT_ROWS_PER_SECOND = 5_000
MAX_ROWS_PER_SECOND = 1_000_000


class KeyRotationState(IntEnum):
    """Where a rotation stands; the numbers of `KeyRotationState` in the contract."""

    RUNNING = 1
    SUCCEEDED = 2
    FAILED = 3


@dataclass(frozen=True, slots=True)
class KeyRotation:
    """A rotation.

    Attributes:
        target_version: the version that all rows are brought to.
        rewritten_rows, remaining_rows: events so far, and events that were there when it began and are left.
    """

    rotation_id: str
    state: KeyRotationState
    target_version: int
    rewritten_rows: int
    remaining_rows: int
    created_at: datetime
    ended_at: datetime | None
