"""Events of a request to columns, each row judged alone.

Two ways lead to the same columns. `EventReader.read` looks at one message after another and knows every rule.
`EventReader.read_request` reads the plain events of a large request from its bytes, by columns, and sends the
others the first way.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from shopkeeper.feedback.v1 import event_pb2, feedback_service_pb2

from services.feedback.converters import wire_events
from services.feedback.converters.event_rows import CLOCK_SKEW_US, YEAR_2000_US, RowReader
from services.feedback.converters.identities import Door
from services.feedback.domain.events import (
    NO_KEY,
    EventColumns,
    ReadBatch,
)
from shared.errors import FieldViolation, InvalidInput
from shared.event_kinds import EventKind
from shared.tokens import TokenSigner

MAX_BATCH = 1_000
# Reading by columns costs some 150 µs before the first event.
LEAST_FOR_COLUMNS = 24
_DAY_MS = 86_400_000
_ADD_TO_CART, _REMOVE_FROM_CART = int(EventKind.ADD_TO_CART), int(EventKind.REMOVE_FROM_CART)


class EventReader:
    """Reads requests into columns.

    Args:
        door: turns raw ids into keys.
        signer: verifies attribution tokens.
        attribution_max_age_days: an older token earns no credit.
    """

    def __init__(self, door: Door, signer: TokenSigner, *, attribution_max_age_days: float = 30.0) -> None:
        self._door = door
        self._signer = signer
        self._attribution_max_age_ms = int(attribution_max_age_days * _DAY_MS)
        # Threads that wait for the interpreter wake up at every switch interval; those that wait here sleep.
        self._one_at_a_time = threading.Lock()

    def read(self, events: Sequence[event_pb2.Event], now_us: int | None = None) -> ReadBatch:
        """Returns the rows of a request.

        Args:
            events: 1 to 1,000 of them.
            now_us: microseconds since 1970, UTC; the system's clock when None.

        Raises:
            InvalidInput: no events, or too many (BATCH_TOO_LARGE).
        """
        _check_size(len(events))
        reading = self._reading(now_us)
        with self._one_at_a_time:
            return reading.read(events)

    def read_request(self, request: bytes, now_us: int | None = None) -> ReadBatch:
        """Returns the rows of a serialised `RecordEventsRequest`; like `read` of its events in every respect.

        Raises:
            InvalidInput: no such message, no events, or too many (BATCH_TOO_LARGE).
        """
        batch, refusals = self.read_requests([request], now_us)
        if refusals:
            raise refusals[0]
        return batch

    def read_requests(
        self, requests: Sequence[bytes], now_us: int | None = None
    ) -> tuple[ReadBatch, dict[int, InvalidInput]]:
        """Returns the rows of serialised requests together, and by request why it is refused as a whole.

        The more there is to do, the less an event costs. A refused request has no events in the batch.
        """
        reading = self._reading(now_us)
        with self._one_at_a_time:
            return reading.read_requests(requests)

    def _reading(self, now_us: int | None) -> _Reading:
        return _Reading(
            self._door,
            self._signer,
            self._attribution_max_age_ms,
            time.time_ns() // 1_000 if now_us is None else now_us,
        )


def _check_size(count: int) -> None:
    if not 1 <= count <= MAX_BATCH:
        problem = f"has {count} elements; send 1 to {MAX_BATCH}."
        raise InvalidInput(
            "BATCH_TOO_LARGE" if count else "INVALID_ARGUMENT",
            f"events {problem}",
            {"limit": str(MAX_BATCH), "count": str(count)} if count else None,
            [FieldViolation("events", problem)],
        )


def _undecodable() -> InvalidInput:
    problem = "holds bytes that are no Event of this contract, or text that is not UTF-8; serialise it anew."
    return InvalidInput(
        "INVALID_ARGUMENT", f"events {problem}", violations=[FieldViolation("events", problem)]
    )


def _split(request: bytes) -> _Request:
    """Returns where the events of a request stand; raises InvalidInput for what is no request."""
    spans = wire_events.event_spans(request)
    if spans is not None:
        _check_size(len(spans[0]))
        return _Request(request, *spans, ())
    try:
        message = feedback_service_pb2.RecordEventsRequest.FromString(request)
    except DecodeError:
        raise _undecodable() from None
    _check_size(len(message.events))
    return _Request(b"", [], [], message.events)


@dataclass(slots=True, eq=False)
class _Request:
    """A request, where its events stand where they can be read by columns, or else its messages."""

    content: bytes
    starts: list[int]
    ends: list[int]
    messages: Sequence[event_pb2.Event]

    @property
    def size(self) -> int:
        return len(self.starts) or len(self.messages)


class _Reading(RowReader):
    """One request, or a few at once. Ids that repeat within them are derived once, and forgotten with them."""

    def read(self, events: Sequence[event_pb2.Event]) -> ReadBatch:
        rows: list[tuple[Any, ...]] = []
        row_numbers: list[int] = []
        for index, event in enumerate(events):
            if (row := self._judged(index, index, event, len(rows))) is not None:
                rows.append(row)
                row_numbers.append(index)
        return ReadBatch(
            EventColumns.from_rows(rows, self._sparse),
            row_numbers,
            len(events),
            self._problems,
            self._remarks,
        )

    def read_requests(self, requests: Sequence[bytes]) -> tuple[ReadBatch, dict[int, InvalidInput]]:
        refusals: dict[int, InvalidInput] = {}
        group = []
        for number, content in enumerate(requests):
            try:
                group.append(_split(content))
            except InvalidInput as error:
                refusals[number] = error
                group.append(_Request(b"", [], [], ()))
        if 0 < sum(len(request.starts) for request in group) < LEAST_FOR_COLUMNS:
            for number, request in enumerate(group):
                if request.starts:
                    try:
                        message = feedback_service_pb2.RecordEventsRequest.FromString(request.content)
                        group[number] = _Request(b"", [], [], message.events)
                    except DecodeError:
                        refusals[number] = _undecodable()
                        group[number] = _Request(b"", [], [], ())
        content = b"".join(request.content for request in group)
        plain, is_plain = self._read_plain(content, group)
        others = self._others(group, is_plain, refusals)
        starts = list(accumulate((request.size for request in group), initial=0))
        size = starts.pop()
        # Where each event that was read by columns stands among all.
        places = np.concatenate(
            [
                np.arange(start, start + len(request.starts))
                for request, start in zip(group, starts, strict=True)
            ]
        )
        row_numbers: list[int] = []
        columns = None
        if plain is not None and len(kept := np.flatnonzero(is_plain)):
            columns = self._plain_columns(content, plain if len(kept) == len(places) else plain.taken(kept))
            row_numbers = places[kept].tolist()
        rows = []
        for number, index, event in others:
            if (row := self._judged(starts[number] + index, index, event, len(row_numbers))) is not None:
                rows.append(row)
                row_numbers.append(starts[number] + index)
        if columns is None or rows:
            others_columns = EventColumns.from_rows(rows, self._sparse)
            columns = (
                others_columns
                if columns is None
                else EventColumns(
                    tuple(map(np.concatenate, zip(columns.dense, others_columns.dense, strict=True))),
                    self._sparse,
                )
            )
        return ReadBatch(columns, row_numbers, size, self._problems, self._remarks, starts), refusals

    def _read_plain(
        self, content: bytes, group: Sequence[_Request]
    ) -> tuple[wire_events.PlainEvents | None, wire_events.Bools]:
        """Returns the events that can be read by columns, and which of them are what they seem."""
        if not content:
            return None, np.zeros(0, dtype=bool)
        offsets = accumulate((len(request.content) for request in group), initial=0)
        starts, ends = [], []
        for request, offset in zip(group, offsets, strict=False):
            starts.append(np.array(request.starts, dtype=np.int64) + offset)
            ends.append(np.array(request.ends, dtype=np.int64) + offset)
        plain = wire_events.read_plain(content, np.concatenate(starts), np.concatenate(ends))
        is_plain = (
            plain.is_plain
            & (plain.occurred_at_us <= self._now_us + CLOCK_SKEW_US)
            & (plain.occurred_at_us >= YEAR_2000_US)
        )
        return plain, is_plain

    def _others(
        self, group: list[_Request], is_plain: wire_events.Bools, refusals: dict[int, InvalidInput]
    ) -> list[tuple[int, int, event_pb2.Event]]:
        """Returns request, index in it and message of what is read message by message.

        A request with an event that cannot be decoded is refused as a whole: it keeps its place, and its rows go.
        """
        others = []
        first = 0
        for number, request in enumerate(group):
            if request.messages:
                others += [(number, index, event) for index, event in enumerate(request.messages)]
                continue
            last = first + len(request.starts)
            own = []
            try:
                for index in np.flatnonzero(~is_plain[first:last]).tolist():
                    event = event_pb2.Event.FromString(
                        request.content[request.starts[index] : request.ends[index]]
                    )
                    own.append((number, index, event))
                others += own
            except DecodeError:
                refusals[number] = _undecodable()
                is_plain[first:last] = False
            first = last
        return others

    def _plain_columns(self, content: bytes, plain: wire_events.PlainEvents) -> EventColumns:
        door = self._door
        # One byte a character: where it is ASCII, it is what was sent.
        characters = content.decode("latin-1")

        def bytes_of(start: wire_events.Ints, end: wire_events.Ints) -> list[bytes]:
            return [content[start:end] for start, end in zip(start.tolist(), end.tolist(), strict=True)]

        both_keys = door.keys_of_all_normal(bytes_of(plain.user_start, plain.user_end))
        user_keys, tombstone_keys = np.frombuffer(both_keys, dtype="V16").reshape(-1, 2).T
        session_keys = np.frombuffer(
            bytearray(door.session_keys_of_bytes(bytes_of(plain.session_start, plain.session_end))),
            dtype="V16",
        )
        session_keys[plain.session_end == 0] = np.void(NO_KEY)
        item_ids = [
            characters[start:end]
            for start, end in zip(plain.item_start.tolist(), plain.item_end.tolist(), strict=True)
        ]
        is_cart = (plain.kind == _ADD_TO_CART) | (plain.kind == _REMOVE_FROM_CART)
        nothing = np.float32(np.nan)
        number = plain.number.astype(np.float32)
        small = np.uint8
        return EventColumns(
            (
                np.ascontiguousarray(plain.event_key).view("V16").ravel(),
                door.payload_digests(bytes_of(plain.start, plain.end)),
                np.ascontiguousarray(user_keys),
                np.ascontiguousarray(tombstone_keys),
                plain.kind.astype(small),
                plain.occurred_at_us,
                session_keys,
                np.array(item_ids, dtype=object),
                np.where(is_cart, number, nothing),
                plain.price_micros,
                plain.currency_code,
                np.where(is_cart, nothing, number),
                plain.device.astype(small),
                plain.channel.astype(small),
                plain.consent.astype(small),
            ),
            self._sparse,
        )
