"""A file on its way into the log, and how far it has come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from services.feedback.domain.events import ReadBatch, RecordedBatch, RowReason, RowStatus
from shared.operations import OperationState

MAX_SAMPLES = 100


@dataclass(frozen=True, slots=True)
class RowSample:
    """A row that was not stored: its number in the file from 1 (0: the whole file), verdict, column, remedy.

    Never the value at fault: it may be a person's.
    """

    row_number: int
    status: RowStatus
    reason: RowReason
    column: str
    message: str


@dataclass(frozen=True, slots=True)
class ImportProgress:
    """What has become of the rows so far. An order counts as many rows as it has lines.

    Attributes:
        settled_events: events, from the first of the file, whose verdict is durable.
        read_rows: rows read; total_rows: rows in the file, 0 while that is not known.
        stored_rows, duplicate_rows, quarantined_rows, refused_rows: by the log's verdict.
        unreadable_rows: rows that did not even become events.
        samples: the first rows that were not stored.
    """

    settled_events: int = 0
    read_rows: int = 0
    total_rows: int = 0
    stored_rows: int = 0
    duplicate_rows: int = 0
    quarantined_rows: int = 0
    refused_rows: int = 0
    unreadable_rows: int = 0
    samples: Sequence[RowSample] = ()


@dataclass(frozen=True, slots=True)
class Import:
    """An import.

    Attributes:
        source: what was asked for, JSON of the contract's `ImportSource`.
        file_digest: SHA-256 of the file when it began; None before.
        failure: the problem and its remedy; empty without one.
    """

    import_id: str
    source: str
    state: OperationState
    created_at: datetime
    progress: ImportProgress = ImportProgress()
    file_digest: bytes | None = None
    failure: str = ""
    cancel_requested: bool = False
    ended_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class ImportPart:
    """Some consecutive events of a file, ready for the log.

    Attributes:
        batch: the events as they were read at the door.
        row_numbers: for each event of the batch the row it came from.
        row_counts: for each the rows that it is made of.
        read_rows: rows of the file read so far.
        unreadable_rows: of these, rows that did not become events.
        samples: of these, the first.
    """

    batch: ReadBatch
    row_numbers: Sequence[int]
    row_counts: Sequence[int]
    read_rows: int
    unreadable_rows: int
    samples: Sequence[RowSample]


def advanced(progress: ImportProgress, part: ImportPart, recorded: RecordedBatch) -> ImportProgress:
    """Returns the progress after the verdicts on one part."""
    counts = dict.fromkeys(RowStatus, 0)
    counts[RowStatus.STORED] = sum(part.row_counts)
    samples = list(progress.samples)
    for index, (status, problem) in sorted(recorded.exceptions.items()):
        rows = part.row_counts[index]
        counts[RowStatus.STORED] -= rows
        counts[status] += rows
        if problem is None or status is RowStatus.STORED or len(samples) >= MAX_SAMPLES:
            continue
        # `events[3].item_view.item_id` says nothing about a file; its last name does.
        column = problem.field.rpartition("].")[2]
        samples.append(RowSample(part.row_numbers[index], status, problem.reason, column, problem.message))
    return replace(
        progress,
        settled_events=progress.settled_events + part.batch.size,
        read_rows=part.read_rows,
        stored_rows=progress.stored_rows + counts[RowStatus.STORED],
        duplicate_rows=progress.duplicate_rows + counts[RowStatus.DUPLICATE],
        quarantined_rows=progress.quarantined_rows + counts[RowStatus.QUARANTINED],
        refused_rows=progress.refused_rows + counts[RowStatus.REJECTED],
        unreadable_rows=part.unreadable_rows,
        samples=tuple(merged_samples(samples, part.samples)),
    )


def merged_samples(samples: Sequence[RowSample], more: Sequence[RowSample]) -> list[RowSample]:
    """Returns both by row, each once, at most MAX_SAMPLES."""
    return sorted({*samples, *more}, key=lambda sample: (sample.row_number, sample.column))[:MAX_SAMPLES]
