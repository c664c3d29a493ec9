"""Follows the behaviour log: keeps the shoppers in memory current, and tells the watchers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from services.profile.ports import EventLog, LogChanges, Metrics
from services.profile.use_cases.live_histories import LiveHistories
from services.profile.use_cases.merged_users import MergedUsers
from services.profile.use_cases.subscriptions import Subscription, Subscriptions
from shared.errors import DeadlineExceeded, FailedPrecondition, Unavailable
from shared.identity import UserKey
from shared.tokens import ConsistencyToken, Watermark

POLL_SECONDS = 0.25
MAX_EVENTS_IN_POLL = 500_000
MAX_PENDING_USERS = 200_000
FIRST_RETRY_SECONDS = 0.25
MAX_RETRY_SECONDS = 2.0


class LogFollower:
    """Polls the log by commit order and holds the watermark.

    One thread calls `run`; anybody may call the rest.

    Args:
        clock_us: microseconds since 1970.
        warm: fills the memory at the start, and returns the snapshot that it reflects; None where nothing did.
    """

    def __init__(
        self,
        log: EventLog,
        histories: LiveHistories,
        merged: MergedUsers,
        metrics: Metrics,
        clock_us: Callable[[], int],
        warm: Callable[[], Watermark | None] = lambda: None,
    ) -> None:
        self._log = log
        self._histories = histories
        self._merged = merged
        self._metrics = metrics
        self._clock_us = clock_us
        self._warm = warm
        self._subscriptions: Subscriptions[UserKey] = Subscriptions(
            lambda count: metrics.watchers("profiles", count)
        )
        self._nudged = threading.Event()
        self._moved = threading.Condition()
        self._watermark: Watermark | None = None
        self._snapshot: Watermark | None = None
        self._watermark_time_us = 0
        self._polls_begun = 0
        self._polls_ended = 0
        self._problem: Unavailable | None = None
        self._stopping = threading.Event()

    @property
    def watermark(self) -> Watermark:
        """How far the shoppers in memory reflect the log.

        Raises:
            Unavailable: the log has never been read.
        """
        if self._watermark is None:
            raise self._problem or Unavailable("LOG_UNAVAILABLE", "The log has not been read yet; retry.")
        return self._watermark

    @property
    def started(self) -> bool:
        """Whether the log has been read at least once."""
        return self._watermark is not None

    @property
    def problem(self) -> str:
        """Why the last poll failed, or an empty text."""
        return self._problem.message if self._problem else ""

    def nudge(self) -> None:
        """Makes the next poll begin at once."""
        self._nudged.set()

    def run(self, on_outcome: Callable[[], None] = lambda: None) -> None:
        """Polls until `stop`; survives every outage of the log."""
        retry_seconds = FIRST_RETRY_SECONDS
        while not self._stopping.is_set():
            try:
                self.poll()
                retry_seconds = FIRST_RETRY_SECONDS
                on_outcome()
                self._nudged.wait(POLL_SECONDS)
                self._nudged.clear()
            except Unavailable as error:
                with self._moved:
                    self._problem = error
                    self._polls_ended = self._polls_begun
                    self._moved.notify_all()
                on_outcome()
                # Deaf to nudges: they must not turn an outage into a busy loop.
                self._stopping.wait(retry_seconds)
                retry_seconds = min(MAX_RETRY_SECONDS, 2 * retry_seconds)

    def stop(self) -> None:
        """Ends `run` and every watcher."""
        self._stopping.set()
        self._nudged.set()
        self._subscriptions.close()
        with self._moved:
            self._moved.notify_all()

    def poll(self) -> None:
        """Reads what is new once, applies it, publishes it."""
        self._polls_begun += 1
        begun = time.perf_counter()
        since = self._watermark
        changes = self._log.poll(since, MAX_EVENTS_IN_POLL)
        if since is None:
            # Who was erased, and who stands for whom, is known from here on.
            self._take_names(changes)
            since = self._warm()
            if since is not None:
                changes = self._log.poll(since, MAX_EVENTS_IN_POLL)
        time_us = self._clock_us()
        rewound = since is not None and changes.watermark.xmax < since.xmax
        if changes.overflow or rewound:
            # More than is worth reading, or another log than before: start afresh.
            self._histories.clear()
            self._subscriptions.reset()
        # First of all: from here on events of a merged id are another's.
        erased, anew = self._take_names(changes)
        if anew:
            self._histories.forget(anew)
        events = self._merged.join(changes.events)
        if len(events):
            self._histories.apply(events)
        # Before the watermark moves: a watcher that joins now must not get it ahead of these names.
        changed = self._merged.names([*events.user_keys, *anew])
        self._subscriptions.publish(changed, erased, changes.watermark, time_us)
        with self._moved:
            self._watermark, self._watermark_time_us = changes.watermark, time_us
            self._snapshot = changes.snapshot
            self._problem = None
            self._polls_ended = self._polls_begun
            self._moved.notify_all()
        self._metrics.polled(len(changes.events), time.perf_counter() - begun)

    def _take_names(self, changes: LogChanges) -> tuple[list[UserKey], list[UserKey]]:
        """Takes in who was merged and erased; returns the erased, and those whose history is another now."""
        moved, gone = self._merged.apply(changes.merged)
        erased, lessened = self._merged.erase([*changes.erased, *gone])
        if erased:
            self._histories.erase(erased)
        return erased, [
            *moved, *lessened, *(self._merged.of(user_key) for user_key in changes.reconsented),
        ]  # fmt: skip

    def catch_up(self, token: ConsistencyToken, timeout_seconds: float) -> Watermark:
        """Waits until the shoppers in memory reflect the token's commit; returns the watermark.

        Raises:
            FailedPrecondition: the token is ahead of the log.
            DeadlineExceeded: the log was not read in time.
            Unavailable: the log has never been read.
        """
        if self.watermark.covers(token):
            return self.watermark
        with self._moved:
            # A poll under way may have taken its snapshot before the commit; the one after has not.
            needed = self._polls_begun + 1
            self._nudged.set()
            deadline = time.monotonic() + timeout_seconds
            while not self.watermark.covers(token):
                if self._polls_ended >= needed and self._problem is None and self._snapshot is not None:
                    if token.xid >= self._snapshot.xmax:
                        raise FailedPrecondition(
                            "CONSISTENCY_TOKEN_AHEAD",
                            "The consistency token is ahead of the log: it belongs to another installation, or "
                            "to a time before a restored backup. Leave it out.",
                            {"xid": str(token.xid)},
                        )
                    # Taken after the commit, so the number means the same to it. Of a commit without a row, as where
                    # all was there already, the watermark does not tell.
                    if self._snapshot.covers(token):
                        break
                remaining = deadline - time.monotonic()
                if remaining <= 0 or self._stopping.is_set():
                    raise DeadlineExceeded(
                        "CATCH_UP_TIMEOUT",
                        "The log was not read up to the consistency token in time. Allow more time, or "
                        "leave the token out. " + self.problem,
                    )
                self._moved.wait(min(remaining, POLL_SECONDS))
                self._nudged.set()
            return self.watermark

    def subscribe(
        self, partition_index: int, partition_count: int, resume: Watermark | None
    ) -> Subscription[UserKey]:
        """Returns a subscription to the changes of a partition, beginning where `resume` ended.

        Raises:
            Unavailable: the log cannot be read.
        """
        watermark = self.watermark

        def in_partition(user_key: UserKey) -> bool:
            return int.from_bytes(user_key[:4], "big") % partition_count == partition_index

        subscription: Subscription[UserKey] = Subscription(
            in_partition if partition_count > 1 else None, MAX_PENDING_USERS
        )
        # Before the question below is asked: what is committed after it is heard of here.
        self._subscriptions.add(subscription)
        try:
            if resume is None:
                subscription.reset()
            else:
                since = self._log.changed_since(resume, MAX_PENDING_USERS)
                if since.changed is None:
                    subscription.reset()
                else:
                    subscription.offer(self._merged.names(since.changed), since.erased, None, 0)
            with self._moved:
                watermark, time_us = self.watermark, self._watermark_time_us
            subscription.offer((), (), watermark, time_us)
            subscription.release()
        except BaseException:
            self._subscriptions.remove(subscription)
            raise
        return subscription

    def unsubscribe(self, subscription: Subscription[UserKey]) -> None:
        """Ends a subscription."""
        self._subscriptions.remove(subscription)
