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
from services.feedback.converters.event_details import DETAILS, DetailReader, Rejected, id_reason, refuse_nul
from services.feedback.converters.identities import Door
from services.feedback.domain.event_key import event_key_of_digest, event_key_of_uuid, milliseconds_of
from services.feedback.domain.events import (
    NO_KEY,
    ConsentBit,
    EventColumns,
    ReadBatch,
    RowProblem,
    RowReason,
)
from shared.errors import FieldViolation, InvalidInput
from shared.event_kinds import EventKind
from shared.tokens import AttributionToken, TokenSigner

MAX_BATCH = 1_000
# Reading by columns costs some 150 µs before the first event.
LEAST_FOR_COLUMNS = 24
MAX_TOKEN = 65_536
_CLOCK_SKEW_US = 5 * 60 * 1_000_000
_YEAR_2000_US = 946_684_800 * 1_000_000
# What google.protobuf.Timestamp allows: the years 1 to 9999.
_FIRST_SECOND, _LAST_SECOND = -62_135_596_800, 253_402_300_799
_DAY_MS = 86_400_000
_ADD_TO_CART, _REMOVE_FROM_CART = int(EventKind.ADD_TO_CART), int(EventKind.REMOVE_FROM_CART)
# Clocks of the replicas that issue and that verify a token differ a little.
_TOKEN_SKEW_MS = 300_000


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


class _Reading(DetailReader):
    """One request, or a few at once. Ids that repeat within them are derived once, and forgotten with them."""

    def __init__(self, door: Door, signer: TokenSigner, attribution_max_age_ms: int, now_us: int) -> None:
        super().__init__()
        self._door = door
        self._signer = signer
        self._attribution_max_age_ms = attribution_max_age_ms
        self._now_us = now_us
        self._keys_of: dict[str, tuple[bytes, bytes]] = {}
        self._session_key_of: dict[str, bytes] = {}
        self._token_of: dict[str, AttributionToken | RowProblem] = {}
        self._sparse: dict[str, dict[int, Any]] = {}
        self._problems: dict[int, RowProblem] = {}
        self._remarks: dict[int, RowProblem] = {}

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
            & (plain.occurred_at_us <= self._now_us + _CLOCK_SKEW_US)
            & (plain.occurred_at_us >= _YEAR_2000_US)
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

    def _judged(self, number: int, index: int, event: event_pb2.Event, place: int) -> tuple[Any, ...] | None:
        """Returns the row of an event, or None and notes why not.

        Args:
            number: under which problems are noted.
            index: of the event in its request.
            place: of the row, under which its sparse values are kept.
        """
        try:
            row = self._row(event)
        except Rejected as problem:
            self._row_sparse = {}
            path = f"events[{index}].{problem.path}" if problem.path else f"events[{index}]"
            self._problems[number] = RowProblem(path, problem.reason, problem.message)
            return None
        if self._row_sparse:
            for name, value in self._row_sparse.items():
                if name == "remark":
                    path, reason, message = value
                    self._remarks[number] = RowProblem(f"events[{index}].{path}", reason, message)
                else:
                    self._sparse.setdefault(name, {})[place] = value
            self._row_sparse = {}
        return row

    def _row(self, event: event_pb2.Event) -> tuple[Any, ...]:
        kind_name = event.WhichOneof("detail")
        if kind_name is None:
            raise Rejected(
                "detail",
                RowReason.UNKNOWN_KIND,
                "None of the details of this contract is set; set exactly one, or upgrade the service.",
            )
        user_id = event.user_id
        keys = self._keys_of.get(user_id)
        if keys is None:
            keys = self._keys_of[user_id] = self._derive_keys(user_id)
        event_id = event.event_id
        event_key = event_key_of_uuid(event_id)
        if event.HasField("occurred_at"):
            occurred_at_us = self._timestamp(event.occurred_at)
        elif event_key is not None:
            occurred_at_us = milliseconds_of(event_key) * 1_000
            if occurred_at_us // 1_000_000 > _LAST_SECOND:
                raise Rejected("event_id", RowReason.OUT_OF_RANGE, "Its time lies beyond the year 9999.")
        elif not event_id:
            raise Rejected("event_id", RowReason.REQUIRED, "Give every event an id, best a UUIDv7.")
        else:
            raise Rejected(
                "occurred_at",
                RowReason.REQUIRED,
                "Required, because event_id is no UUIDv7 that tells the time.",
            )
        if event_key is None:
            event_key = event_key_of_digest(
                self._text(event_id, "event_id", 128, required=True), occurred_at_us // 1_000
            )
        kind, read = DETAILS[kind_name]
        product = read(self, getattr(event, kind_name), kind_name)
        session_id = event.session_id
        session_key = None
        if session_id:
            session_key = self._session_key_of.get(session_id)
            if session_key is None:
                # Most are short and plain: no need to look at them twice.
                text = (
                    session_id
                    if len(session_id) <= 128 and session_id.isascii() and session_id.isprintable()
                    else self._text(session_id, "session_id", 128)
                )
                session_key = self._session_key_of[session_id] = self._door.session_key(text)
        device, channel = event.device, event.channel
        if not 0 <= device <= 6:
            raise Rejected("device", RowReason.OUT_OF_RANGE, "No device of this contract; use DEVICE_OTHER.")
        if not 0 <= channel <= 8:
            raise Rejected(
                "channel", RowReason.OUT_OF_RANGE, "No channel of this contract; leave it unspecified."
            )
        consent = _consent_bits(event.consent) if event.HasField("consent") else 0
        if token := event.attribution_token:
            self._attribute(token, product[0])
        if occurred_at_us > self._now_us + _CLOCK_SKEW_US:
            self._quarantine(RowReason.CLOCK_AHEAD, "More than five minutes in the future; set the clock.")
        elif occurred_at_us < _YEAR_2000_US:
            self._quarantine(RowReason.CLOCK_BEHIND, "Before the year 2000; set the clock.")
        return (
            event_key,
            # The contract's events hold no maps: two equal ones have the same bytes.
            self._door.payload_digest(event.SerializeToString()),
            keys[0],
            keys[1],
            kind,
            occurred_at_us,
            session_key,
            *product,
            device,
            channel,
            consent,
        )

    def _derive_keys(self, user_id: str) -> tuple[bytes, bytes]:
        if not user_id:
            raise Rejected("user_id", RowReason.REQUIRED, "Say whose event it is, 1 to 256 characters.")
        try:
            return self._door.keys_of(user_id)
        except InvalidInput as error:
            refuse_nul(user_id, "user_id")
            raise Rejected("user_id", id_reason(user_id), error.message) from None

    def _timestamp(self, timestamp: Any) -> int:
        seconds, nanos = timestamp.seconds, timestamp.nanos
        if not (_FIRST_SECOND <= seconds <= _LAST_SECOND and 0 <= nanos < 1_000_000_000):
            raise Rejected(
                "occurred_at",
                RowReason.OUT_OF_RANGE,
                "No time: seconds of the years 1 to 9999, nanos below 1e9.",
            )
        return int(seconds) * 1_000_000 + int(nanos) // 1_000

    def _quarantine(self, reason: RowReason, message: str) -> None:
        self._row_sparse["quarantine_reason"] = int(reason)
        self._row_sparse["remark"] = ("occurred_at", reason, message)

    # Attribution

    def _attribute(self, token: str, item_id: str | None) -> None:
        attribution = self._token_of.get(token)
        if attribution is None:
            attribution = self._token_of[token] = self._verified(token)
        if isinstance(attribution, RowProblem):
            self._row_sparse["remark"] = (attribution.field, attribution.reason, attribution.message)
            return
        sparse = self._row_sparse
        sparse["recommendation_id"] = attribution.recommendation_id
        sparse["placement"] = attribution.placement
        sparse["serving_config"] = attribution.serving_config
        if attribution.model_version:
            sparse["model_version"] = attribution.model_version
        if attribution.variant:
            sparse["variant"] = attribution.variant
        if item_id is not None and (position := attribution.position_of(item_id)) is not None:
            # The token is signed and the client's word is not.
            sparse["position"] = position
            sparse["propensity"] = float(attribution.propensities_K[position - 1])
        else:
            # A position of something else, such as an advertisement, is no position in this recommendation.
            sparse.pop("position", None)
        if items := sparse.get("line_items"):
            sparse["line_positions"] = [attribution.position_of(item) for item in items]
        if items := sparse.get("impression_items"):
            positions = [attribution.position_of(item) for item in items]
            sparse["impression_propensities"] = [
                None if position is None else float(attribution.propensities_K[position - 1])
                for position in positions
            ]

    def _verified(self, token: str) -> AttributionToken | RowProblem:
        if len(token) > MAX_TOKEN:
            return RowProblem(
                "attribution_token",
                RowReason.ATTRIBUTION_INVALID,
                "Longer than any token; stored without it.",
            )
        try:
            attribution = AttributionToken.verify(self._signer, token)
        except InvalidInput:
            return RowProblem(
                "attribution_token",
                RowReason.ATTRIBUTION_INVALID,
                "Not issued by this installation, so stored without it; send tokens back unchanged.",
            )
        age_ms = self._now_us // 1_000 - attribution.issued_at_ms
        if age_ms > self._attribution_max_age_ms or age_ms < -_TOKEN_SKEW_MS:
            return RowProblem(
                "attribution_token",
                RowReason.ATTRIBUTION_EXPIRED,
                "Too old to earn credit; stored without it.",
            )
        return attribution


def _consent_bits(consent: event_pb2.EventConsent) -> int:
    bits = 0
    if consent.HasField("personalisation"):
        bits |= ConsentBit.PERSONALISATION_STATED | (consent.personalisation * ConsentBit.PERSONALISATION)
    if consent.HasField("training"):
        bits |= ConsentBit.TRAINING_STATED | (consent.training * ConsentBit.TRAINING)
    if consent.HasField("marketing"):
        bits |= ConsentBit.MARKETING_STATED | (consent.marketing * ConsentBit.MARKETING)
    return int(bits)
