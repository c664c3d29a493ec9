"""Events by columns: a batch is a few arrays, never an object a row."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

Column = npt.NDArray[Any]

# What each holds, and how it says that there is nothing.
_DENSE: dict[str, str] = {
    "event_key": "V16",
    "payload_digest": "i8",
    "user_key": "V16",
    "tombstone_key": "V16",  # compared and not stored
    "kind": "u1",  # EventKind
    "occurred_at_us": "i8",  # microseconds since 1970, UTC
    "session_key": "V16",  # zeros: none
    "item_id": "O",  # text or None
    "quantity": "f4",  # NaN: none
    "price_micros": "i8",  # -1: none
    "currency_code": "S3",  # empty: none
    "value": "f4",  # NaN: none; stars, dwell seconds, CSAT, 1/0 of a verdict
    "device": "u1",  # Device
    "channel": "u1",  # Channel
    "consent": "u1",  # bits of ConsentBit
}
DENSE_COLUMNS = tuple(_DENSE)
"""The order of a row while a batch is being made."""
NO_KEY = bytes(16)

SPARSE_COLUMNS = (
    "line_items",  # list of text
    "line_quantities",  # list of float
    "line_prices",  # list of int or None
    "line_positions",  # list of int or None
    "impression_items",  # list of text
    "impression_positions",  # list of int
    "impression_propensities",  # list of float or None
    "recommendation_id",  # 8 bytes
    "placement",  # text
    "serving_config",  # text
    "model_version",  # text
    "variant",  # text
    "position",  # int, from 1
    "propensity",  # float in (0, 1]
    "quarantine_reason",  # RowReason
    "text",  # plain text, encrypted before it is stored
    "attributes",  # dict of what has no column of its own
    "is_bot",  # True
)
"""Columns that most events leave empty; kept as {row: value}."""


class RowStatus(IntEnum):
    """What became of a row; the numbers of `EventStatus` in the contract."""

    STORED = 1
    DUPLICATE = 2
    QUARANTINED = 3
    REJECTED = 4


class RowReason(IntEnum):
    """Why; the numbers of `EventReason` in the contract."""

    NONE = 0
    REQUIRED = 1
    FORBIDDEN = 2
    OUT_OF_RANGE = 3
    NOT_FINITE = 4
    NUL_CHARACTER = 5
    TOO_LONG = 6
    MALFORMED = 7
    UNKNOWN_KIND = 8
    PAYLOAD_CONFLICT = 9
    USER_FORGOTTEN = 10
    CLOCK_AHEAD = 11
    CLOCK_BEHIND = 12
    ATTRIBUTION_INVALID = 13
    ATTRIBUTION_EXPIRED = 14
    UNKNOWN_ITEM = 15


class ConsentBit(IntEnum):
    """What an event itself said about consent; a stated field sets the first bit of its pair."""

    PERSONALISATION_STATED = 1
    PERSONALISATION = 2
    TRAINING_STATED = 4
    TRAINING = 8
    MARKETING_STATED = 16
    MARKETING = 32


class AppendVerdict(IntEnum):
    """What the log said of one row it was given."""

    STORED = 0
    DUPLICATE = 1
    PAYLOAD_CONFLICT = 2
    USER_FORGOTTEN = 3


@dataclass(frozen=True, slots=True)
class RowProblem:
    """What is wrong with a row: path from the request's root, reason, and the remedy in words."""

    field: str
    reason: RowReason
    message: str


def to_column(name: str, values: Sequence[Any]) -> Column:
    """Returns values, None where there is none, as the column of DENSE_COLUMNS of that name."""
    dtype = np.dtype(_DENSE[name])
    if dtype.kind == "V":
        return key_column([NO_KEY if value is None else value for value in values])
    if name == "price_micros":
        values = [-1 if value is None else value for value in values]
    elif dtype.kind == "S":
        values = [value or "" for value in values]
    return np.array(values, dtype=dtype)


def key_column(keys: Sequence[bytes]) -> Column:
    """Returns keys of 16 bytes as a column."""
    return np.frombuffer(b"".join(keys), dtype="V16") if keys else np.empty(0, dtype="V16")


@dataclass(frozen=True, slots=True)
class EventColumns:
    """Rows that may be stored, by columns.

    Attributes:
        dense: for each of DENSE_COLUMNS an array of shape (n,).
        sparse: for some of SPARSE_COLUMNS a value by row in [0, n).
    """

    dense: tuple[Column, ...]
    sparse: dict[str, dict[int, Any]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.dense[0])

    def column(self, name: str) -> Column:
        """Returns a dense column."""
        return self.dense[_DENSE_INDEX[name]]

    def taken(self, rows: npt.NDArray[np.int64]) -> EventColumns:
        """Returns some of the rows, in the order given."""
        dense = tuple(values[rows] for values in self.dense)
        if not self.sparse:
            return EventColumns(dense)
        place = {row: index for index, row in enumerate(rows.tolist())}
        sparse = {
            name: kept
            for name, values in self.sparse.items()
            if (kept := {place[row]: value for row, value in values.items() if row in place})
        }
        return EventColumns(dense, sparse)

    @classmethod
    def from_rows(cls, rows: Sequence[tuple[Any, ...]], sparse: dict[str, dict[int, Any]]) -> EventColumns:
        """Returns the columns of rows whose values stand in the order of DENSE_COLUMNS, None where there is none."""
        values = zip(*rows, strict=True) if rows else [()] * len(DENSE_COLUMNS)
        return cls(tuple(map(to_column, DENSE_COLUMNS, values)), sparse)

    @classmethod
    def concatenated(cls, batches: Sequence[EventColumns]) -> EventColumns:
        """Returns the rows of all batches, one after another."""
        if len(batches) == 1:
            return batches[0]
        sparse: dict[str, dict[int, Any]] = {}
        offset = 0
        for batch in batches:
            for name, values in batch.sparse.items():
                target = sparse.setdefault(name, {})
                for row, value in values.items():
                    target[row + offset] = value
            offset += len(batch)
        return cls(tuple(map(np.concatenate, zip(*(batch.dense for batch in batches), strict=True))), sparse)


@dataclass(frozen=True, slots=True)
class ReadBatch:
    """A request, or some that are stored together, after they were read: rows to store, and what is already decided.

    Attributes:
        columns: the n rows to store.
        row_numbers: for each of them the index of its event; those of a later request go on behind the earlier ones'.
        size: the number of events.
        problems: by index, why a row is rejected.
        remarks: by index, what is amiss with a row that is stored all the same.
        starts: of each request the index of its first event, ascending.
    """

    columns: EventColumns
    row_numbers: Sequence[int]
    size: int
    problems: dict[int, RowProblem]
    remarks: dict[int, RowProblem]
    starts: Sequence[int] = (0,)

    def path(self, index: int) -> str:
        """Returns where an event stands in its own request."""
        return f"events[{index - self.starts[bisect_right(self.starts, index) - 1]}]"


@dataclass(frozen=True, slots=True)
class Appended:
    """The answer of the log.

    Attributes:
        xid: the transaction that a reader must have seen to have seen these rows.
        exceptions: verdicts other than STORED, by row.
    """

    xid: int
    exceptions: dict[int, AppendVerdict]


@dataclass(frozen=True, slots=True)
class RecordedBatch:
    """What became of a request.

    Attributes:
        size: the number of events in the request.
        exceptions: by index, status and problem of every row that was not simply stored.
        xid: the commit that covers the durable rows; None when none is durable.
    """

    size: int
    exceptions: dict[int, tuple[RowStatus, RowProblem | None]]
    xid: int | None


def settled(batch: ReadBatch, appended: Appended | None) -> RecordedBatch:
    """Returns the verdict on every row of a request, from what was read and what the log said."""
    exceptions: dict[int, tuple[RowStatus, RowProblem | None]] = {
        index: (RowStatus.REJECTED, problem) for index, problem in batch.problems.items()
    }
    for index, remark in batch.remarks.items():
        quarantined = remark.reason in (RowReason.CLOCK_AHEAD, RowReason.CLOCK_BEHIND)
        exceptions[index] = (RowStatus.QUARANTINED if quarantined else RowStatus.STORED, remark)
    if appended is None:
        return RecordedBatch(batch.size, exceptions, None)
    durable = len(batch.columns)
    for row, verdict in appended.exceptions.items():
        index = batch.row_numbers[row]
        if verdict is AppendVerdict.DUPLICATE:
            exceptions[index] = (RowStatus.DUPLICATE, None)
            continue
        durable -= 1
        if verdict is AppendVerdict.USER_FORGOTTEN:
            problem = RowProblem(
                f"{batch.path(index)}.user_id",
                RowReason.USER_FORGOTTEN,
                "This person has been forgotten, and stays so; a returning shopper needs a new user_id.",
            )
        else:
            problem = RowProblem(
                f"{batch.path(index)}.event_id",
                RowReason.PAYLOAD_CONFLICT,
                "An event with this id was stored with other content; give every event an id of its own.",
            )
        exceptions[index] = (RowStatus.REJECTED, problem)
    return RecordedBatch(batch.size, exceptions, appended.xid if durable else None)


def divided(recorded: RecordedBatch, starts: Sequence[int]) -> list[RecordedBatch]:
    """Returns what became of each request of some that were stored together, indices counted within it."""
    ends = [*starts[1:], recorded.size]
    own: list[dict[int, tuple[RowStatus, RowProblem | None]]] = [{} for _ in starts]
    for index, verdict in recorded.exceptions.items():
        # Of requests that start at the same index all but the last are empty.
        request = bisect_right(starts, index) - 1
        own[request][index - starts[request]] = verdict
    parts = []
    for start, end, exceptions in zip(starts, ends, own, strict=True):
        refused = sum(status is RowStatus.REJECTED for status, _ in exceptions.values())
        parts.append(RecordedBatch(end - start, exceptions, recorded.xid if end - start > refused else None))
    return parts


_DENSE_INDEX = {name: index for index, name in enumerate(DENSE_COLUMNS)}


def rows_with(columns: EventColumns, name: str) -> Iterable[int]:
    """Returns the rows that have a value in a sparse column."""
    return columns.sparse.get(name, {}).keys()
