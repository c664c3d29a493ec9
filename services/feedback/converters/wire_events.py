"""Plain events read from the wire by columns, all events of a request at once.

A message object an event, and a call an attribute, is what reading costs. Most events of a shop are plain: a
UUIDv7, printable ASCII, one item, values in range, no attribution. Of these the serialised bytes are read in
step: one cursor an event, all cursors advanced by one field a step, by NumPy. What is not plain, for whatever
reason, is not judged here: its row is left to the converter that reads one message after another, so that the
rules for what is refused stand in one place. The encoding is that of https://protobuf.dev/programming-guides/encoding.

A plain event is in canonical form: fields ascend, defaults are absent, numbers are of the shortest form. So its
bytes are what serialising the parsed message would give, and so is their digest.
"""

# N = events of a request, W = bytes of a field

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from shared.event_kinds import EventKind

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Bytes = npt.NDArray[np.uint8]

_PADDING = bytes(256)
_LONGEST_TEXT = 127  # characters whose length is one byte
_UUID_TEXT = 36
_MAX_QUANTITY, _MAX_DWELL_SECONDS, _MAX_PRICE_MICROS = 1e6, 86_400.0, 10**15
_LAST_SECOND = 253_402_300_799
_ITEM_VIEW, _ADD_TO_CART, _REMOVE_FROM_CART, _RATING = map(
    int, (EventKind.ITEM_VIEW, EventKind.ADD_TO_CART, EventKind.REMOVE_FROM_CART, EventKind.RATING)
)
# In which of the 36 characters of a UUID the high and the low half of each byte stand.
_HEX_PLACES = np.array([place for place in range(_UUID_TEXT) if place not in (8, 13, 18, 23)])
_HYPHENS = np.array([8, 13, 18, 23])
_UUID_SPAN = np.arange(_UUID_TEXT)
_NOT_HEX = 255


def _table(characters: bytes, values: Any, default: int) -> Bytes:
    table = np.full(256, default, dtype=np.uint8)
    table[np.frombuffer(characters, dtype=np.uint8)] = values
    return table


_HEX = _table(b"0123456789abcdefABCDEF", [*range(16), *range(10, 16)], _NOT_HEX)
_VARIANT = _table(b"89abAB", 1, 0).astype(bool)
_IS_CAPITAL = np.zeros(256, dtype=bool)
_IS_CAPITAL[ord("A") : ord("Z") + 1] = True

# Serialised tag of a plain detail, as two bytes or one → kind. Field numbers of the oneof begin at 10, kinds at 1.
_ONE_BYTE_KIND = np.zeros(256, dtype=np.int64)
_TWO_BYTE_KIND = np.zeros(256, dtype=np.int64)
for _kind in (EventKind.ITEM_VIEW, EventKind.ADD_TO_CART, EventKind.REMOVE_FROM_CART):
    _ONE_BYTE_KIND[(_kind + 9) << 3 | 2] = _kind
for _kind in (EventKind.RATING, EventKind.WISH_LIST):
    # 0x80 is the mark of the first byte that a second follows, which here is always 1.
    _TWO_BYTE_KIND[0x80 | ((_kind + 9) << 3 | 2) & 0x7F] = _kind


@dataclass(frozen=True, slots=True)
class PlainEvents:
    """What was read of N events; of one that is not plain, nothing means anything.

    Attributes:
        is_plain: (N,).
        start, end: (N,) where the event stands.
        event_key: (N, 16) bytes.
        occurred_at_us: (N,) microseconds since 1970, UTC.
        user_start, user_end: (N,) where the user id stands: 1 to 127 printable ASCII characters.
        session_start, session_end: (N,) likewise; both 0 where there is none.
        item_start, item_end: (N,) likewise.
        kind, device, channel, consent: (N,).
        number: (N,) float64: dwell seconds, quantity or stars; NaN where absent.
        price_micros: (N,), -1 where absent.
        currency_code: (N,) its three letters; empty where absent.
    """

    is_plain: Bools
    start: Ints
    end: Ints
    event_key: Bytes
    occurred_at_us: Ints
    user_start: Ints
    user_end: Ints
    session_start: Ints
    session_end: Ints
    item_start: Ints
    item_end: Ints
    kind: Ints
    device: Ints
    channel: Ints
    consent: Ints
    number: npt.NDArray[np.float64]
    price_micros: Ints
    currency_code: npt.NDArray[np.bytes_]

    def taken(self, rows: Ints) -> PlainEvents:
        """Returns some of the events, in the order given."""
        return PlainEvents(*(getattr(self, field.name)[rows] for field in fields(self)))


def event_spans(request: bytes, field_number: int = 1) -> tuple[list[int], list[int]] | None:
    """Returns where each event of a request starts and ends; None when the request holds anything else.

    Args:
        field_number: of the repeated events, below 16.
    """
    tag = field_number << 3 | 2
    starts, ends = [], []
    at, size = 0, len(request)
    try:
        while at < size:
            if request[at] != tag:
                return None
            length = request[at + 1]
            at += 2
            if length >= 128:
                second = request[at]
                if second < 128:
                    length += (second - 1) << 7
                    at += 1
                else:
                    length += ((second - 1) << 7) + ((request[at + 1] - 1) << 14)
                    if request[at + 1] >= 128:
                        return None
                    at += 2
            starts.append(at)
            at += length
            ends.append(at)
    except IndexError:
        return None
    return (starts, ends) if at == size else None


def read_plain(content: bytes, start: Ints, end: Ints) -> PlainEvents:
    """Reads the events that stand at these places, each of shape (N,), of one or more requests."""
    return _Cursors(content, start, end).read()


class _Cursors:
    """One cursor an event. A row that turns out not to be plain stays in step, with values that mean nothing."""

    def __init__(self, content: bytes, start: Ints, end: Ints) -> None:
        # Behind the last event a cursor may look a field's length too far before it is stopped.
        self._bytes = np.frombuffer(content + _PADDING, dtype=np.uint8)
        self._unprintable = np.zeros(len(self._bytes) + 1, dtype=np.int32)
        # The first printable character is 0x20, the last 0x7E; what is below wraps round.
        np.cumsum(self._bytes - np.uint8(0x20) > 0x5E, out=self._unprintable[1:])
        self._start = start
        self._end = end
        self._at = start.copy()
        self._is_plain: Bools = np.ones(len(start), dtype=bool)

    def read(self) -> PlainEvents:
        bytes_, ok = self._bytes, self._is_plain
        id_start, id_end = self._text(0x0A)
        ok &= id_end - id_start == _UUID_TEXT
        event_key = self._uuids(np.where(ok, id_start, 0))
        user_start, user_end = self._text(0x12)
        ok &= user_end > user_start
        occurred_at_us = self._timestamp(0x1A)
        from_key = event_key[:, :6].astype(np.int64) @ (1 << np.arange(40, -1, -8, dtype=np.int64))
        occurred_at_us = np.where(occurred_at_us < 0, from_key * 1_000, occurred_at_us)
        ok &= occurred_at_us <= _LAST_SECOND * 1_000_000
        session_start, session_end = self._text(0x22)
        device = self._digit(0x28, 6)
        channel = self._digit(0x30, 8)
        consent = self._consent(0x42)

        first, second = bytes_[self._at], bytes_[self._at + 1]
        kind = _ONE_BYTE_KIND[first]
        two = second == 1
        kind = np.where(two & (_TWO_BYTE_KIND[first] > 0), _TWO_BYTE_KIND[first], kind)
        ok &= kind > 0
        self._at += 1 + (kind >= _RATING)
        length = bytes_[self._at]
        ok &= length <= _LONGEST_TEXT
        self._at += 1
        ok &= self._at + length == self._end
        item_start, item_end = self._text(0x0A)
        ok &= item_end > item_start
        number = self._float(0x15)
        with_price = (kind == _ITEM_VIEW) | (kind == _ADD_TO_CART)
        price_micros = self._price(0x18, with_price)
        currency_code = self._currency(0x22, with_price)
        ok &= (price_micros >= 0) == (currency_code != b"")
        ok &= self._at == self._end
        number = self._checked(kind, number)
        return PlainEvents(
            ok, self._start, self._end, event_key, occurred_at_us, user_start, user_end, session_start,
            session_end, item_start, item_end, kind, device, channel, consent, number, price_micros, currency_code,
        )  # fmt: skip

    def _checked(self, kind: Ints, number: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Checks the number by its kind; an absent quantity is one."""
        absent = np.isnan(number)
        is_cart = (kind == _ADD_TO_CART) | (kind == _REMOVE_FROM_CART)
        is_rating = kind == _RATING
        most = np.where(
            is_cart, _MAX_QUANTITY, np.where(is_rating, 5.0, np.where(kind == _ITEM_VIEW, _MAX_DWELL_SECONDS, 0))
        )  # fmt: skip
        least = np.where(is_rating, 1.0, np.nextafter(0, 1))
        self._is_plain &= np.where(absent, ~is_rating, (number >= least) & (number <= most))
        number[absent & is_cart] = 1.0
        return number

    def _has(self, tag: int) -> Bools:
        # A field may stand at the very end of its event, and what follows then is the next one's.
        return (self._bytes[self._at] == tag) & (self._at < self._end)

    def _advance(self, by: Any) -> None:
        self._at += by
        beyond = self._at > self._end
        if beyond.any():
            self._is_plain &= ~beyond
            np.minimum(self._at, self._end, out=self._at)

    def _text(self, tag: int) -> tuple[Ints, Ints]:
        """Reads a text of 1 to 127 printable ASCII characters; start and end are 0 where it is absent."""
        has = self._has(tag)
        length = self._bytes[self._at + 1].astype(np.int64)
        start = np.where(has, self._at + 2, 0)
        self._is_plain &= ~has | ((length > 0) & (length <= _LONGEST_TEXT))
        self._advance(np.where(has, length + 2, 0))
        end = np.where(has, self._at, 0)
        self._is_plain &= self._unprintable[end] == self._unprintable[start]
        return start, end

    def _digit(self, tag: int, last: int) -> Ints:
        """Reads an enum's number in [1, last]; 0 where absent."""
        has = self._has(tag)
        value = np.where(has, self._bytes[self._at + 1], 0).astype(np.int64)
        self._is_plain &= (value > 0) & (value <= last) | ~has
        self._advance(np.where(has, 2, 0))
        return value

    def _varint(self, has: Bools, most_bytes: int) -> Ints:
        """Reads an unsigned number of the shortest form at the cursors; 0 where `has` is false."""
        value = np.zeros(len(self._at), dtype=np.int64)
        goes_on = has.copy()
        size = np.zeros(len(self._at), dtype=np.int64)
        for number in range(most_bytes):
            byte = self._bytes[self._at + number].astype(np.int64)
            value += np.where(goes_on, (byte & 0x7F) << (7 * number), 0)
            size += goes_on
            more = goes_on & (byte >= 128)
            if number:
                # A last byte of nothing but zeros could have been left out.
                self._is_plain &= ~(goes_on & (byte == 0))
            goes_on = more
            if not goes_on.any():
                break
        self._is_plain &= ~goes_on
        self._advance(size)
        return value

    def _timestamp(self, tag: int) -> Ints:
        """Reads a time from 1970 on, in microseconds; -1 where absent."""
        has = self._has(tag)
        if not has.any():
            return np.full(len(has), -1, dtype=np.int64)
        inner_end = self._at + 2 + self._bytes[self._at + 1]
        self._advance(np.where(has, 2, 0))
        has_seconds = has & self._has(0x08) & (self._at < inner_end)
        self._advance(has_seconds)
        seconds = self._varint(has_seconds, 6)
        self._is_plain &= (seconds > 0) | ~has_seconds
        has_nanos = has & self._has(0x10) & (self._at < inner_end)
        self._advance(has_nanos)
        nanos = self._varint(has_nanos, 5)
        self._is_plain &= ((nanos > 0) & (nanos < 1_000_000_000)) | ~has_nanos
        self._is_plain &= (seconds <= _LAST_SECOND) & ((self._at == inner_end) | ~has)
        return np.where(has, seconds * 1_000_000 + nanos // 1_000, -1)

    def _consent(self, tag: int) -> Ints:
        """Reads the bits of ConsentBit."""
        has = self._has(tag)
        bits = np.zeros(len(has), dtype=np.int64)
        if not has.any():
            return bits
        inner_end = self._at + 2 + self._bytes[self._at + 1]
        self._advance(np.where(has, 2, 0))
        for number in range(3):
            stated = has & self._has((number + 1) << 3) & (self._at < inner_end)
            value = self._bytes[self._at + 1]
            self._is_plain &= (value <= 1) | ~stated
            bits |= np.where(stated, (1 | (value.astype(np.int64) & 1) << 1) << (2 * number), 0)
            self._advance(np.where(stated, 2, 0))
        self._is_plain &= (self._at == inner_end) | ~has
        return bits

    def _float(self, tag: int) -> npt.NDArray[np.float64]:
        """Reads a float; NaN where absent, and a NaN that was sent is not plain."""
        has = self._has(tag)
        content = self._bytes[(self._at + 1)[:, None] + np.arange(4)]
        with np.errstate(invalid="ignore"):  # A signalling NaN is no reason for a warning.
            value = np.where(has, content.view("<f4")[:, 0], np.float32(np.nan)).astype(np.float64)
        self._is_plain &= ~has | (value > 0)
        self._advance(np.where(has, 5, 0))
        return value

    def _price(self, tag: int, allowed: Bools) -> Ints:
        has = self._has(tag) & allowed
        self._advance(has)
        price = self._varint(has, 8)
        self._is_plain &= price <= _MAX_PRICE_MICROS
        return np.where(has, price, -1)

    def _currency(self, tag: int, allowed: Bools) -> npt.NDArray[np.bytes_]:
        has = self._has(tag) & allowed
        start = np.where(has, self._at + 2, 0)
        letters = self._bytes[start[:, None] + np.arange(3)]
        self._is_plain &= ~has | ((self._bytes[self._at + 1] == 3) & _IS_CAPITAL[letters].all(axis=1))
        self._advance(np.where(has, 5, 0))
        letters[~has] = 0
        return letters.view("S3").ravel()

    def _uuids(self, start: Ints) -> Bytes:
        """Returns the bytes of the UUIDv7s that stand at `start`, shape (N, 16)."""
        characters = self._bytes[start[:, None] + _UUID_SPAN]
        halves = _HEX[characters[:, _HEX_PLACES]]
        self._is_plain &= (characters[:, _HYPHENS] == ord("-")).all(axis=1)
        self._is_plain &= (halves != _NOT_HEX).all(axis=1)
        self._is_plain &= (characters[:, 14] == ord("7")) & _VARIANT[characters[:, 19]]
        return halves[:, 0::2] << 4 | halves[:, 1::2] & 0x0F
