"""What the feedback service does, step by step, without gRPC and SQL."""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from services.feedback.domain.bots import RateBotDetector
from services.feedback.domain.consent import Consent, Receipt, containing_versions, receipt_payload
from services.feedback.domain.events import Appended, ReadBatch, RecordedBatch, settled
from services.feedback.domain.metrics import Measurement, MetricsQuery
from services.feedback.ports import (
    Clock,
    ConsentStore,
    EventLog,
    MetricsStore,
    ModelVersions,
    PersonStore,
    ReceiptSigner,
)
from shared.errors import DeadlineExceeded, Unavailable


@dataclass(frozen=True, slots=True)
class PendingBatch:
    """A batch on its way into the log."""

    batch: ReadBatch
    appended: Future[Appended] | None

    def wait(self, timeout_seconds: float) -> RecordedBatch:
        """Returns what became of every row, once the durable ones are durable.

        Raises:
            Unavailable: the log could not be written; a retry is harmless.
            DeadlineExceeded: the commit did not return in time; the outcome is unknown.
        """
        if self.appended is None:
            return settled(self.batch, None)
        try:
            return settled(self.batch, self.appended.result(timeout_seconds))
        except FutureTimeoutError:
            raise DeadlineExceeded(
                "COMMIT_TIMEOUT",
                "The commit did not return within the deadline. Send the same events again: those that "
                "were stored come back as DUPLICATE.",
            ) from None
        except CancelledError:
            raise Unavailable(
                "LOG_UNAVAILABLE", "The service is stopping; send the same events again."
            ) from None


class RecordEvents:
    """Marks bots and appends a batch to the log."""

    def __init__(self, log: EventLog, bots: RateBotDetector) -> None:
        self._log = log
        self._bots = bots

    def submit(self, batch: ReadBatch) -> PendingBatch:
        """Queues the rows of a batch; `PendingBatch.wait` tells what became of them.

        Raises:
            ResourceExhausted: too many rows wait for their commit.
        """
        columns = batch.columns
        if not len(columns):
            return PendingBatch(batch, None)
        marked = self._bots.marked_rows(
            columns.column("user_key"), columns.column("kind"), columns.column("occurred_at_us")
        )
        if marked:
            columns.sparse.setdefault("is_bot", {}).update(dict.fromkeys(marked, True))
        return PendingBatch(batch, self._log.append(columns))


class ManageConsent:
    """Sets and reads what a person allows."""

    def __init__(
        self, store: ConsentStore, clock: Clock, wake_readers: Callable[[], None] = lambda: None
    ) -> None:
        self._store = store
        self._clock = clock
        self._wake_readers = wake_readers

    def set(self, user_keys: Sequence[bytes], tombstone_key: bytes, consent: Consent) -> Consent:
        """Sets the fields that are not None; returns what is in force from now on."""
        written = self._store.write_consent(user_keys, tombstone_key, consent, self._clock.now())
        self._wake_readers()
        return written.in_force()

    def get(self, user_keys: Sequence[bytes], tombstone_key: bytes) -> Consent:
        """Returns what is in force."""
        return self._store.read_consent(user_keys, tombstone_key).in_force()


class ForgetUser:
    """Erases a person and signs a receipt."""

    def __init__(
        self,
        store: PersonStore,
        versions: ModelVersions,
        signer: ReceiptSigner,
        clock: Clock,
        wake_readers: Callable[[], None] = lambda: None,
    ) -> None:
        self._store = store
        self._versions = versions
        self._signer = signer
        self._clock = clock
        self._wake_readers = wake_readers

    def forget(self, user_keys: Sequence[bytes], tombstone_key: bytes) -> Receipt:
        """Returns the receipt once everything is erased. Repeating it is harmless."""
        erasure = self._store.erase(user_keys, tombstone_key, self._clock.now())
        self._wake_readers()
        versions = containing_versions(self._versions.list_versions(), erasure.first_received_at)
        receipt_id = str(uuid.uuid4())
        payload = receipt_payload(receipt_id, erasure, user_keys, versions)
        return Receipt(receipt_id, erasure, user_keys, versions, payload, self._signer.sign(payload))


class ExportUser:
    """Tells a person all that is known of them."""

    def __init__(self, people: PersonStore, consents: ConsentStore) -> None:
        self._people = people
        self._consents = consents

    def export(self, user_keys: Sequence[bytes], tombstone_key: bytes) -> Iterator[list[str]]:
        """Yields JSON lines: first the consent in force, then the events from the oldest."""
        consent = self._consents.read_consent(user_keys, tombstone_key).in_force()
        yield [
            _json_line(
                {
                    "type": "consent",
                    "personalisation": consent.personalisation,
                    "training": consent.training,
                    "marketing": consent.marketing,
                    "update_time": consent.updated_at.isoformat() if consent.updated_at else None,
                    "forgotten": consent.forgotten,
                }
            )
        ]
        for events in self._people.export_events(user_keys):
            yield [_json_line({"type": "event", **event}) for event in events]


class MeasureMetrics:
    """Counts what came of recommendations."""

    def __init__(self, store: MetricsStore, clock: Clock) -> None:
        self._store = store
        self._clock = clock

    def measure(self, query: MetricsQuery) -> Measurement:
        """Returns the counts by group."""
        return self._store.measure(query)

    def watch(
        self,
        window: timedelta,
        interval_seconds: float,
        query_of: Callable[[Any, Any], MetricsQuery],
        stopped: threading.Event,
        is_active: Callable[[], bool],
    ) -> Iterator[tuple[MetricsQuery, Measurement]]:
        """Yields the counts of the last `window` every `interval_seconds`, until nobody listens."""
        while is_active() and not stopped.is_set():
            end = self._clock.now()
            query = query_of(end - window, end)
            yield query, self._store.measure(query)
            wake_at = time.monotonic() + interval_seconds
            # A short wait at a time: a caller that left must not hold its thread for an hour.
            while is_active() and not stopped.is_set() and (left := wake_at - time.monotonic()) > 0:
                stopped.wait(min(left, 0.25))


def _json_line(fields: dict[str, Any]) -> str:
    return json.dumps(fields, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
