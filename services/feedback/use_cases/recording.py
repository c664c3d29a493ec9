"""Takes events in."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass

from services.feedback.domain.events import Appended, ReadBatch, RecordedBatch, RowProblem, RowReason, settled
from services.feedback.ports import EventLog, KnownItems
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
            raise commit_timeout() from None
        except CancelledError:
            raise Unavailable(
                "LOG_UNAVAILABLE", "The service is stopping; send the same events again."
            ) from None


def commit_timeout() -> DeadlineExceeded:
    """Returns the failure of a call whose commit does not return in time."""
    return DeadlineExceeded(
        "COMMIT_TIMEOUT",
        "The commit did not return within the deadline. Send the same events again: those that "
        "were stored come back as DUPLICATE.",
    )


class RecordEvents:
    """Appends batches to the log."""

    def __init__(self, log: EventLog, items: KnownItems | None = None) -> None:
        self._log = log
        self._items = items

    def submit(self, batch: ReadBatch, callers: Sequence[object] | None = None) -> PendingBatch:
        """Queues the rows of a batch; `PendingBatch.wait` tells what became of them.

        Args:
            callers: see `EventLog.append`.

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
                        batch.path(index),
                        RowReason.UNKNOWN_ITEM,
                        f"Stored, but the catalogue does not know the item {item_id!r} (yet): upsert it in profile.",
                    ),
                )
        return PendingBatch(batch, self._log.append(columns, callers))
