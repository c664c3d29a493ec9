"""Purges, and rotations of the user key."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime

from services.feedback.domain.key_rotation import KeyRotation
from services.feedback.ports import Clock, KeyRotationStore, PurgeStore


class PurgeEvents:
    """Erases events of a time range, or says how many there are."""

    def __init__(self, store: PurgeStore) -> None:
        self._store = store

    def purge(
        self,
        start: datetime | None,
        end: datetime,
        kinds: Sequence[int],
        *,
        force: bool,
        goes_on: Callable[[], bool],
    ) -> int:
        """Returns the number of events erased, or that would be without `force`.

        Ends early, and keeps what is done, when nobody waits for the answer any more.
        """
        return self._store.purge(start, end, kinds, force=force, goes_on=goes_on)


class RotateUserKeys:
    """Brings all stored pseudonyms to the newest user key."""

    def __init__(self, store: KeyRotationStore, clock: Clock, wake: Callable[[], None]) -> None:
        self._store = store
        self._clock = clock
        self._wake = wake

    def begin(self, rows_per_second: int) -> KeyRotation:
        """Begins a rotation, or goes on with the one under way."""
        rotation = self._store.begin(rows_per_second, self._clock.now())
        self._wake()
        return rotation

    def get(self, rotation_id: str) -> KeyRotation:
        """Returns a rotation; raises NotFound."""
        return self._store.get(rotation_id)
