"""What the use cases need of the world. Implemented in `storage` and `clients`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from datetime import datetime
from typing import Any, Protocol

from services.feedback.domain.consent import Consent, Erasure, ModelVersion
from services.feedback.domain.events import Appended, EventColumns
from services.feedback.domain.experiments import Experiment, Observation, State, StopCause
from services.feedback.domain.imports import Import, ImportPart, ImportProgress, RowSample
from services.feedback.domain.key_rotation import KeyRotation
from services.feedback.domain.metrics import Measurement, Metric, MetricsQuery
from services.feedback.domain.off_policy import LoggedImpressions
from services.feedback.domain.unknown_items import UnknownItemOrder, UnknownItemsPage
from shared.errors import Unavailable
from shared.operations import OperationState


class EventLog(Protocol):
    """The append-only log."""

    def append(self, columns: EventColumns, callers: Sequence[object] | None = None) -> Future[Appended]:
        """Queues rows for the next commit; the future is done once they are durable.

        Args:
            callers: whose rows they are, as traces name them; whoever calls this when None.

        Raises:
            ResourceExhausted: too many rows wait already.

        The future fails with Unavailable when the commit's outcome is unknown or it did not happen;
        the same rows may then be appended again. It fails with Unstorable where a row of them is why.
        """
        ...


class Unstorable(Unavailable):
    """At least one of the rows cannot be stored as it is, and so none of them was. Others may fare better alone."""


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

    def keep_receipt(
        self,
        receipt_id: str,
        tombstone_key: bytes,
        user_keys: Sequence[bytes],
        rows: Mapping[str, int],
        now: datetime,
    ) -> None:
        """Keeps what a receipt says of the rows, so that it can be issued anew."""
        ...

    def receipt(self, receipt_id: str) -> tuple[Erasure, Sequence[bytes]]:
        """Returns the erasure of a receipt, and the user keys that it names.

        Raises:
            NotFound: RECEIPT_NOT_FOUND.
        """
        ...

    def first_purged(self, user_keys: Sequence[bytes]) -> datetime | None:
        """Returns when the first of the person's events came in that a purge or its age took; None where none did."""
        ...

    def export_events(self, user_keys: Sequence[bytes]) -> Iterator[list[dict[str, Any]]]:
        """Yields the person's events from the oldest, texts decrypted, in lists of a few hundred."""
        ...


class MetricsStore(Protocol):
    """Counts over attributed events."""

    def measure(self, query: MetricsQuery) -> Measurement:
        """Returns one entry for each group that has events, most impressions first."""
        ...


class ExperimentStore(Protocol):
    """Experiments and what was seen of them."""

    def create(self, experiment: Experiment) -> Experiment:
        """Stores an experiment; returns the stored one when it is the same.

        Raises:
            AlreadyExists: EXPERIMENT_ALREADY_EXISTS, another one has this id.
            FailedPrecondition: PLACEMENT_TAKEN, another one runs on the shelf.
        """
        ...

    def get(self, experiment_id: str) -> Experiment:
        """Returns an experiment.

        Raises:
            NotFound: EXPERIMENT_NOT_FOUND.
        """
        ...

    def list_newest(
        self, placement: str, state: State | None, after: tuple[datetime, str] | None, limit: int
    ) -> list[Experiment]:
        """Returns experiments, newest first, that come after a key (created_at, experiment_id)."""
        ...

    def list_running(self) -> list[Experiment]:
        """Returns the experiments that run."""
        ...

    def stop(
        self, experiment_id: str, expected_version: int | None, cause: StopCause, now: datetime
    ) -> Experiment:
        """Stops an experiment and returns it; one that has stopped stays as it is.

        Raises:
            NotFound: EXPERIMENT_NOT_FOUND.
            Aborted: STALE_ETAG, it runs and has another version.
        """
        ...

    def observe(self, experiment: Experiment, observed_until: datetime) -> Observation:
        """Returns what was seen of an experiment while it ran, and of its people's return until a moment."""
        ...


class ImportStore(Protocol):
    """Imports and how far they have come. Durable, and the same for all replicas."""

    def create(self, source: str, request_id: str, now: datetime) -> Import:
        """Stores a new import, or returns the one that the same (not empty) `request_id` made before."""
        ...

    def get(self, import_id: str) -> Import:
        """Returns an import; raises NotFound (IMPORT_NOT_FOUND)."""
        ...

    def page(self, after: tuple[datetime, str] | None, limit: int) -> list[Import]:
        """Returns at most `limit` imports, newest first, that come after (time of creation, id)."""
        ...

    def oldest_unfinished(self) -> Import | None:
        """Returns the import whose turn it is."""
        ...

    def begin(self, import_id: str, file_digest: bytes, total_rows: int) -> None:
        """Marks an import as running."""
        ...

    def checkpoint(self, import_id: str, progress: ImportProgress) -> bool:
        """Stores how far an import has come; returns whether it is to go on, and not to be cancelled."""
        ...

    def finish(self, import_id: str, state: OperationState, failure: str, now: datetime) -> None:
        """Ends an import; does nothing to one that has ended."""
        ...

    def request_cancel(self, import_id: str, now: datetime) -> Import:
        """Asks an import to stop, at once where it has not begun; raises NotFound."""
        ...


class ImportFile(Protocol):
    """An opened file. Reading it again yields the same parts."""

    @property
    def digest(self) -> bytes:
        """SHA-256 of the file."""
        ...

    @property
    def total_rows(self) -> int:
        """Rows of the file; 0 where that is not known before the end."""
        ...

    def parts(self) -> Iterator[ImportPart]:
        """Yields the events from the first."""
        ...

    def remainder(self) -> tuple[int, int, Sequence[RowSample], str]:
        """Returns rows read, rows that did not become events, samples, and what cut the file short ("" if nothing)."""
        ...


class ImportFiles(Protocol):
    """Files below the import directory."""

    def open(self, source: str, created_at: datetime) -> ImportFile:
        """Opens the file of a source; raises ShopkeeperError with the problem and its remedy."""
        ...


class PurgeStore(Protocol):
    """Events of a time range, all at once."""

    def purge(
        self,
        start: datetime | None,
        end: datetime,
        kinds: Sequence[int],
        *,
        force: bool,
        goes_on: Callable[[], bool],
    ) -> int:
        """Returns the number of events that are erased, or would be without `force`."""
        ...


class KeyRotationStore(Protocol):
    """Rotations of the user key."""

    def begin(self, rows_per_second: int, now: datetime) -> KeyRotation:
        """Returns the rotation to the current version that is under way, or a new one."""
        ...

    def get(self, rotation_id: str) -> KeyRotation:
        """Returns a rotation; raises NotFound (KEY_ROTATION_NOT_FOUND)."""
        ...


class ImpressionStore(Protocol):
    """Impressions with their propensities."""

    def read(self, placement: str, start: datetime, end: datetime, reward: Metric) -> LoggedImpressions:
        """Returns the impressions of a shelf in [start, end), each with what it earned until now.

        Raises:
            FailedPrecondition: TOO_MANY_IMPRESSIONS.
        """
        ...


class ModelVersions(Protocol):
    """The model registry, as far as erasure needs it."""

    def list_versions(self) -> list[ModelVersion]:
        """Returns every version of every model; damaged ones are left out."""
        ...


class KnownItems(Protocol):
    """The catalogue, as far as events name its items."""

    def unknown_items(self, columns: EventColumns) -> dict[int, str]:
        """Returns, by row, an item that the catalogue does not know; empty while it cannot tell."""
        ...


class UnknownItemStore(Protocol):
    """Items of events that the catalogue does not know."""

    def page(self, order: UnknownItemOrder, after: tuple[int, str] | None, limit: int) -> UnknownItemsPage:
        """Returns at most `limit` items that come after a (number of events, id)."""
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
