"""What the use cases need of the world. Implemented in `storage` and `clients`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from datetime import datetime
from typing import Any, Protocol

from services.feedback.domain.consent import Consent, Erasure, ModelVersion
from services.feedback.domain.events import Appended, EventColumns
from services.feedback.domain.metrics import Measurement, MetricsQuery


class EventLog(Protocol):
    """The append-only log."""

    def append(self, columns: EventColumns) -> Future[Appended]:
        """Queues rows for the next commit; the future is done once they are durable.

        Raises:
            ResourceExhausted: too many rows wait already.

        The future fails with Unavailable when the commit's outcome is unknown or it did not happen;
        the same rows may then be appended again.
        """
        ...


class ConsentStore(Protocol):
    """What people allow. People are named by all their user keys, the newest first."""

    def read_consent(self, user_keys: Sequence[bytes], tombstone_key: bytes) -> Consent:
        """Returns the stored consent; an empty one when the person never said."""
        ...

    def write_consent(
        self, user_keys: Sequence[bytes], tombstone_key: bytes, consent: Consent, now: datetime
    ) -> Consent:
        """Sets the fields that are not None, and returns the result.

        Raises:
            FailedPrecondition: USER_FORGOTTEN.
        """
        ...


class PersonStore(Protocol):
    """Everything that is stored of one person."""

    def erase(self, user_keys: Sequence[bytes], tombstone_key: bytes, now: datetime) -> Erasure:
        """Erases it, and refuses later events, even those being stored at this moment."""
        ...

    def export_events(self, user_keys: Sequence[bytes]) -> Iterator[list[dict[str, Any]]]:
        """Yields the person's events from the oldest, texts decrypted, in lists of a few hundred."""
        ...


class MetricsStore(Protocol):
    """Counts over attributed events."""

    def measure(self, query: MetricsQuery) -> Measurement:
        """Returns one entry for each group that has events, most impressions first."""
        ...


class ModelVersions(Protocol):
    """The model registry, as far as erasure needs it."""

    def list_versions(self) -> list[ModelVersion]:
        """Returns every version of every model; damaged ones are left out."""
        ...


class ReceiptSigner(Protocol):
    """Signs erasure receipts."""

    def sign(self, payload: bytes) -> bytes:
        """Returns the signature of a payload."""
        ...


class Clock(Protocol):
    """The time."""

    def now(self) -> datetime:
        """Returns the time now, UTC, with time zone."""
        ...
