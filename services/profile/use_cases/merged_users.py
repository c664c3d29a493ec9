"""Which ids stand for one shopper, in memory."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence

from services.profile.domain.events import EventBatch
from shared.identity import UserKey


class MergedUsers:
    """Ids that stand for another. Thread-safe; one thread applies."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._root_of: dict[UserKey, UserKey] = {}
        self._members_of: dict[UserKey, list[UserKey]] = {}

    def __len__(self) -> int:
        return len(self._root_of)

    def of(self, user_key: UserKey) -> UserKey:
        """Returns who stands for an id: itself, unless it was merged."""
        return self._root_of.get(user_key, user_key)

    def names(self, user_keys: Iterable[UserKey]) -> list[UserKey]:
        """Returns every id of the shoppers that these ids stand for, each once."""
        if not self._root_of:
            return list(user_keys)
        with self._lock:
            found: dict[UserKey, None] = {}
            for user_key in user_keys:
                root = self._root_of.get(user_key, user_key)
                found.update(dict.fromkeys((root, *self._members_of.get(root, ()))))
            return list(found)

    def join(self, batch: EventBatch) -> EventBatch:
        """Returns the batch with every shopper under the id that stands for them."""
        if not self._root_of:
            return batch
        return EventBatch([self.of(user_key) for user_key in batch.user_keys], batch.bounds, batch.events)

    def apply(self, pairs: Sequence[tuple[UserKey, UserKey | None]]) -> tuple[list[UserKey], list[UserKey]]:
        """Takes merges in; returns ids whose history is another now, and ids that went with an erased shopper.

        Args:
            pairs: a merged id and who stands for it; None where that shopper was erased.
        """
        moved: dict[UserKey, None] = {}
        gone: list[UserKey] = []
        with self._lock:
            for anonymous, root in pairs:
                before = self._root_of.pop(anonymous, None)
                if before is not None:
                    self._members_of[before].remove(anonymous)
                if root is None:
                    gone.append(anonymous)
                    continue
                self._root_of[anonymous] = root
                self._members_of.setdefault(root, []).append(anonymous)
                moved.update(dict.fromkeys((anonymous, root)))
        return list(moved), gone

    def erase(self, user_keys: Sequence[UserKey]) -> tuple[list[UserKey], list[UserKey]]:
        """Drops erased ids; returns (everybody who goes, shoppers who lose a part of their history).

        With the shopper go the visitors that they once were.
        """
        with self._lock:
            gone: dict[UserKey, None] = dict.fromkeys(user_keys)
            lessened: dict[UserKey, None] = {}
            for user_key in user_keys:
                members = self._members_of.pop(user_key, ())
                for member in members:
                    self._root_of.pop(member, None)
                gone.update(dict.fromkeys(members))
                root = self._root_of.pop(user_key, None)
                if root is not None:
                    self._members_of[root].remove(user_key)
                    lessened[root] = None
            return list(gone), [root for root in lessened if root not in gone]
