"""Answers who a shopper is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from services.profile.domain.comparison import Comparison, compare
from services.profile.domain.events import NO_ITEM, Vocabulary
from services.profile.domain.item_portrait import Vector
from services.profile.domain.messages import ProfilesMessage, Reading
from services.profile.domain.population import Population
from services.profile.domain.portrait import ItemLookup, Portrait, Summary
from services.profile.domain.portrait_fold import fold_portrait, fold_summary
from services.profile.ports import Merges, UserEmbeddings
from services.profile.use_cases.follow_log import LogFollower
from services.profile.use_cases.live_histories import LiveHistories
from services.profile.use_cases.merged_users import MergedUsers
from shared.identity import UserKey
from shared.tokens import ConsistencyToken, Watermark

MAX_USERS_IN_MESSAGE = 256
HEARTBEAT_SECONDS = 0.2
LOAD_TIMEOUT_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Readings:
    """Shoppers in the order asked, all at least as new as the watermark."""

    watermark: Watermark
    readings: Sequence[Reading]


class Profiles:
    """Reads and watches shoppers."""

    def __init__(
        self,
        follower: LogFollower,
        histories: LiveHistories,
        merged: MergedUsers,
        merges: Merges,
        items: Vocabulary,
        currencies: Vocabulary,
        lookup: ItemLookup,
        population: Callable[[], Population],
        clock_us: Callable[[], int],
        embeddings: UserEmbeddings,
    ) -> None:
        self._follower = follower
        self._embeddings = embeddings
        self._histories = histories
        self._merged = merged
        self._merges = merges
        self._items = items
        self._currencies = currencies
        self._lookup = lookup
        self._population = population
        self._clock_us = clock_us

    def read(
        self, user_keys: Sequence[UserKey], token: ConsistencyToken | None, timeout_seconds: float
    ) -> Readings:
        """Returns shoppers; with a token, as of that commit or later.

        Raises:
            Unavailable, DeadlineExceeded, FailedPrecondition: see `LogFollower` and `LiveHistories`.
        """
        # Read before the shoppers are: they are then at least as new as it says.
        watermark = (
            self._follower.catch_up(token, timeout_seconds) if token is not None else self._follower.watermark
        )
        merged = self._merged
        if not len(merged):
            found = self._histories.read(user_keys, timeout_seconds)
            return Readings(watermark, [found[user_key] for user_key in user_keys])
        roots = [merged.of(user_key) for user_key in user_keys]
        found = self._histories.read(roots, timeout_seconds)
        return Readings(
            watermark,
            [
                # Under the name that was asked for: that is how the caller knows the shopper.
                found[root] if root == user_key else replace(found[root], user_key=user_key)
                for user_key, root in zip(user_keys, roots, strict=True)
            ],
        )

    def merge(self, anonymous: UserKey, known: UserKey, timeout_seconds: float) -> tuple[UserKey, int]:
        """Makes two ids one shopper; returns who stands for both, and how many events came over.

        Raises:
            FailedPrecondition: see `Merges.merge`.
            Unavailable, DeadlineExceeded: see `read`; the merge may be stored, and repeating it is harmless.
        """
        merge = self._merges.merge(anonymous, known)
        # Whoever asks next, here, is told of the one shopper.
        self._follower.catch_up(ConsistencyToken(merge.xid), timeout_seconds)
        return merge.user_key, merge.merged_event_count

    def stands_for(self, user_key: UserKey) -> UserKey:
        """Returns the shopper that an id stands for."""
        return self._merged.of(user_key)

    def portrait(self, reading: Reading) -> Portrait:
        """Returns the portrait of a shopper as of now."""
        return fold_portrait(
            reading.window,
            self._items,
            self._currencies,
            self._lookup,
            self._clock_us(),
            self._population(),
        )

    def compare(self, first: UserKey, second: UserKey, timeout_seconds: float) -> Comparison:
        """Returns how alike two shoppers are.

        Raises:
            Unavailable, DeadlineExceeded: see `read`.
        """
        one, other = self.read([first, second], None, timeout_seconds).readings
        vectors = self.embeddings([self.stands_for(first), self.stands_for(second)])
        pair = None
        if vectors[0] is not None and vectors[1] is not None and vectors[0].version == vectors[1].version:
            pair = vectors[0].values, vectors[1].values
        return compare(
            self.portrait(one),
            self.portrait(other),
            self._items_touched(one),
            self._items_touched(other),
            pair,
        )

    def embeddings(self, user_keys: Sequence[UserKey]) -> list[Vector | None]:
        """Returns shoppers as the sequence model sees them now; None where that is not known."""
        return self._embeddings.of(user_keys)

    @staticmethod
    def _items_touched(reading: Reading) -> set[int]:
        return set(reading.window.personal_events["item"].tolist()) - {NO_ITEM}

    def summary(self, reading: Reading) -> Summary:
        """Returns the summary of a shopper."""
        return fold_summary(reading.window, self._items, self._lookup, self._clock_us())

    def watch(
        self,
        partition_index: int,
        partition_count: int,
        resume: Watermark | None,
        is_active: Callable[[], bool],
    ) -> Iterator[ProfilesMessage]:
        """Yields who changed, in full, and who was erased, until closed; at least every 250 ms.

        Raises:
            Unavailable: the log cannot be read.
        """
        subscription = self._follower.subscribe(partition_index, partition_count, resume)
        try:
            while is_active() and not subscription.closed:
                delivery = subscription.take(MAX_USERS_IN_MESSAGE, HEARTBEAT_SECONDS)
                read = self.read(delivery.changed, None, LOAD_TIMEOUT_SECONDS)
                yield ProfilesMessage(
                    read.readings,
                    delivery.removed,
                    read.watermark,
                    delivery.watermark,
                    delivery.watermark_time_us,
                    delivery.reset,
                )
        finally:
            self._follower.unsubscribe(subscription)
