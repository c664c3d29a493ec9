"""What the feedback service does, step by step, without gRPC and SQL."""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from services.feedback.domain.consent import Consent, Receipt, containing_versions, receipt_payload
from services.feedback.domain.events import Appended, ReadBatch, RecordedBatch, RowProblem, RowReason, settled
from services.feedback.domain.experiments import (
    GUARD_CONFIDENCE_LEVEL,
    Experiment,
    Judgement,
    Observation,
    State,
    StopCause,
    judge,
)
from services.feedback.domain.imports import (
    Import,
    ImportPart,
    ImportProgress,
    advanced,
    merged_samples,
)
from services.feedback.domain.key_rotation import KeyRotation
from services.feedback.domain.metrics import Dimension, Measurement, Metric, MetricsQuery
from services.feedback.domain.off_policy import PolicyEstimate, TargetPolicy, estimate_policy_value
from services.feedback.ports import (
    Clock,
    ConsentStore,
    EventLog,
    ExperimentStore,
    ImportFiles,
    ImportStore,
    ImpressionStore,
    KeyRotationStore,
    KnownItems,
    MetricsStore,
    ModelVersions,
    PersonStore,
    PurgeStore,
    ReceiptSigner,
)
from shared.errors import DeadlineExceeded, ResourceExhausted, ShopkeeperError, Unavailable
from shared.operations import OperationState, follow


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
    """Appends batches to the log."""

    def __init__(self, log: EventLog, items: KnownItems | None = None) -> None:
        self._log = log
        self._items = items

    def submit(self, batch: ReadBatch) -> PendingBatch:
        """Queues the rows of a batch; `PendingBatch.wait` tells what became of them.

        Raises:
            ResourceExhausted: too many rows wait for their commit.
        """
        columns = batch.columns
        if not len(columns):
            return PendingBatch(batch, None)
        if self._items is not None:
            for row, item_id in self._items.unknown_items(columns).items():
                index = batch.row_numbers[row]
                # What is amiss already counts for more.
                batch.remarks.setdefault(
                    index,
                    RowProblem(
                        f"events[{index}]",
                        RowReason.UNKNOWN_ITEM,
                        f"Stored, but the catalogue does not know the item {item_id!r} (yet): upsert it in profile.",
                    ),
                )
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


@dataclass(frozen=True, slots=True)
class ExperimentReport:
    """What an experiment has shown until a moment."""

    experiment: Experiment
    observation: Observation
    judgement: Judgement
    measured: Measurement
    confidence_level: float
    reported_at: datetime


class RunExperiments:
    """Creates, reports and stops experiments."""

    def __init__(self, store: ExperimentStore, metrics: MetricsStore, clock: Clock) -> None:
        self._store = store
        self._metrics = metrics
        self._clock = clock

    def create(self, experiment: Experiment) -> Experiment:
        """Starts an experiment; raises as `ExperimentStore.create` does."""
        return self._store.create(experiment)

    def get(self, experiment_id: str) -> Experiment:
        """Returns an experiment; raises NotFound."""
        return self._store.get(experiment_id)

    def page(
        self, placement: str, state: State | None, after: tuple[datetime, str] | None, size: int
    ) -> tuple[list[Experiment], bool]:
        """Returns a page of experiments, newest first, and whether there are more."""
        found = self._store.list_newest(placement, state, after, size + 1)
        return found[:size], len(found) > size

    def stop(self, experiment_id: str, expected_version: int | None) -> Experiment:
        """Stops an experiment because somebody asked for it; raises as `ExperimentStore.stop` does."""
        return self._store.stop(experiment_id, expected_version, StopCause.REQUESTED, self._clock.now())

    def report(self, experiment_id: str, confidence_level: float) -> ExperimentReport:
        """Returns what an experiment has shown; raises NotFound."""
        experiment, now = self._store.get(experiment_id), self._clock.now()
        observation = self._store.observe(experiment, now)
        measured = self._metrics.measure(
            MetricsQuery(
                experiment.created_at,
                experiment.stopped_at or now,
                [Dimension.VARIANT],
                confidence_level=confidence_level,
                variants=experiment.labels,
                observed_until=now,
            )
        )
        judgement = judge(experiment, observation, confidence_level)
        return ExperimentReport(experiment, observation, judgement, measured, confidence_level, now)

    def stop_broken(self) -> list[Experiment]:
        """Stops every running experiment whose guard rail or split is broken; returns those it stopped."""
        stopped = []
        for experiment in self._store.list_running():
            if experiment.report_only:
                continue
            now = self._clock.now()
            observation = self._store.observe(experiment, now)
            cause = judge(experiment, observation, GUARD_CONFIDENCE_LEVEL).cause_to_stop
            if cause is not None:
                stopped.append(self._store.stop(experiment.experiment_id, None, cause, now))
        return stopped


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


IMPORT_COMMIT_TIMEOUT_SECONDS = 60.0
# Parts of an import that may wait for their commit at once: enough to keep it busy, and no more.
IMPORT_READ_AHEAD = 2


class ManageImports:
    """Begins, follows and cancels imports."""

    def __init__(
        self, store: ImportStore, files: ImportFiles, clock: Clock, wake: Callable[[], None] = lambda: None
    ) -> None:
        self._store = store
        self._files = files
        self._clock = clock
        self._wake = wake

    def begin(self, source: str, request_id: str) -> Import:
        """Returns a new import, or the earlier one of the same request id.

        Raises:
            ShopkeeperError: the file or its mapping cannot be read; told at once rather than later.
        """
        now = self._clock.now()
        self._files.open(source, now)
        created = self._store.create(source, request_id, now)
        self._wake()
        return created

    def get(self, import_id: str) -> Import:
        """Returns an import; raises NotFound."""
        return self._store.get(import_id)

    def page(self, after: tuple[Any, str] | None, limit: int) -> list[Import]:
        """Returns imports, newest first."""
        return self._store.page(after, limit)

    def cancel(self, import_id: str) -> Import:
        """Stops an import; raises NotFound."""
        return self._store.request_cancel(import_id, self._clock.now())

    def watch(
        self, import_id: str, stopped: threading.Event, is_active: Callable[[], bool]
    ) -> Iterator[Import]:
        """Yields an import now, after each change, and for the last time when it has ended."""
        return follow(lambda: self._store.get(import_id), stopped, is_active)


class RunImports:
    """Brings files into the log, one after another, through the same door as every event."""

    def __init__(
        self,
        store: ImportStore,
        files: ImportFiles,
        record_events: RecordEvents,
        clock: Clock,
        stopped: threading.Event,
    ) -> None:
        self._store = store
        self._files = files
        self._record_events = record_events
        self._clock = clock
        self._stopped = stopped

    def run_next(self) -> bool:
        """Runs the oldest unfinished import to its end; returns whether there was one.

        A stopped service leaves it as it is; whoever runs it next goes on behind the last checkpoint.
        The parts since then are sent again, and their events come back as duplicates.

        Raises:
            Unavailable: the store is away; nothing is lost.
        """
        job = self._store.oldest_unfinished()
        if job is None:
            return False
        try:
            file = self._files.open(job.source, job.created_at)
            if job.file_digest not in (None, file.digest):
                self._finish(
                    job,
                    OperationState.FAILED,
                    "The file is not the one that the import began with. Import it again: rows that are in the "
                    "log already come back as duplicates.",
                )
                return True
            self._store.begin(job.import_id, file.digest, file.total_rows)
            progress = replace(job.progress, total_rows=file.total_rows)
            under_way: deque[tuple[ImportPart, PendingBatch]] = deque()
            passed = 0
            for part in file.parts():
                passed += part.batch.size
                # Settled before the restart. A part is never settled by half.
                if passed <= job.progress.settled_events:
                    continue
                under_way.append((part, self._submitted(part)))
                if len(under_way) == IMPORT_READ_AHEAD:
                    progress = self._settled(progress, under_way.popleft())
                    if not self._store.checkpoint(job.import_id, progress):
                        self._finish(job, OperationState.CANCELLED)
                        return True
            while under_way:
                progress = self._settled(progress, under_way.popleft())
            read, unreadable, samples, damage = file.remainder()
            progress = replace(
                progress,
                read_rows=read,
                total_rows=progress.total_rows if damage else read,
                unreadable_rows=unreadable,
                samples=tuple(merged_samples(progress.samples, samples)),
            )
            goes_on = self._store.checkpoint(job.import_id, progress)
            if damage:
                self._finish(job, OperationState.FAILED, damage)
            else:
                self._finish(job, OperationState.SUCCEEDED if goes_on else OperationState.CANCELLED)
        except _ServiceStops:
            pass
        except Unavailable:
            raise
        except ShopkeeperError as error:
            self._finish(job, OperationState.FAILED, error.message)
        return True

    def _finish(self, job: Import, state: OperationState, failure: str = "") -> None:
        self._store.finish(job.import_id, state, failure, self._clock.now())

    def _submitted(self, part: ImportPart) -> PendingBatch:
        while not self._stopped.is_set():
            try:
                return self._record_events.submit(part.batch)
            except ResourceExhausted:
                # Shoppers go first.
                self._stopped.wait(0.25)
        raise _ServiceStops

    def _settled(self, progress: ImportProgress, sent: tuple[ImportPart, PendingBatch]) -> ImportProgress:
        part, pending = sent
        while not self._stopped.is_set():
            try:
                return advanced(progress, part, pending.wait(IMPORT_COMMIT_TIMEOUT_SECONDS))
            except (Unavailable, DeadlineExceeded):
                self._stopped.wait(0.5)
                pending = self._submitted(part)
        raise _ServiceStops


class _ServiceStops(Exception):
    """The service ends; what is not settled is for its successor."""


class ValuePolicies:
    """Says what another policy would have earned."""

    def __init__(self, store: ImpressionStore) -> None:
        self._store = store

    def estimate(
        self,
        placement: str,
        start: datetime,
        end: datetime,
        reward: Metric,
        policy: TargetPolicy,
        weight_clip: float,
        confidence_level: float,
    ) -> tuple[PolicyEstimate, str]:
        """Returns the estimates and the currency of money; raises FailedPrecondition rather than guess."""
        impressions = self._store.read(placement, start, end, reward)
        estimate = estimate_policy_value(impressions, policy, weight_clip, confidence_level)
        return estimate, impressions.currency_code


def _json_line(fields: dict[str, Any]) -> str:
    return json.dumps(fields, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
