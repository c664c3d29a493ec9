"""PostgreSQL arrays in binary form, made a column at a time.

psycopg would convert element by element; here NumPy writes whole columns in
the layout of `array_recv`: dimensions, a flag for nulls, the element's oid,
length and lower bound, then each element behind its length (-1: null).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import psycopg
from psycopg.adapt import Dumper, PyFormat
from psycopg.pq import Format

# element oid → array oid
_ARRAY_OID = {
    16: 1000,
    17: 1001,
    20: 1016,
    21: 1005,
    23: 1007,
    25: 1009,
    700: 1021,
    1184: 1185,
    2950: 2951,
}
BOOL, BYTEA, INT8, INT2, INT4, TEXT, FLOAT4, TIMESTAMPTZ, UUID = _ARRAY_OID
_HEAD = struct.Struct(">iiIii")
_NULL = struct.pack(">i", -1)
# From 1970 to 2000 in microseconds: PostgreSQL counts from 2000.
POSTGRES_EPOCH_US = 946_684_800_000_000
_MAX_CACHED_TEXTS = 50_000


OID = {
    "boolean": BOOL, "bytea": BYTEA, "bigint": INT8, "smallint": INT2, "integer": INT4, "text": TEXT, "real": FLOAT4,
    "timestamptz": TIMESTAMPTZ, "uuid": UUID,
}  # fmt: skip
"""The oid of a type by the name that statements give it."""


class BinaryArray:
    """An array parameter that is ready for the wire."""

    __slots__ = ("content", "oid")

    def __init__(self, element_oid: int, content: bytes) -> None:
        self.oid = _ARRAY_OID[element_oid]
        self.content = content


class _BinaryArrayDumper(Dumper):
    format = Format.BINARY

    def get_key(self, obj: BinaryArray, format: PyFormat) -> Any:
        return (self.cls, obj.oid)

    def upgrade(self, obj: BinaryArray, format: PyFormat) -> Dumper:
        dumper = type(self)(self.cls)
        dumper.oid = obj.oid
        return dumper

    def dump(self, obj: BinaryArray) -> bytes:
        return obj.content


def register(connection: psycopg.Connection[Any]) -> None:
    """Lets a connection take BinaryArray parameters."""
    connection.adapters.register_dumper(BinaryArray, _BinaryArrayDumper)


def empty_array(element_oid: int) -> BinaryArray:
    """Returns an array without elements; `unnest` fills it up with nulls beside longer ones."""
    return BinaryArray(element_oid, struct.pack(">iiI", 0, 0, element_oid))


EMPTY = {name: empty_array(oid) for name, oid in OID.items()}
"""`empty_array` by the name of its type."""


def fixed_array(element_oid: int, values: npt.NDArray[Any]) -> BinaryArray:
    """Returns an array without nulls of values of one size; the dtype of `values`, big-endian, is theirs on the wire."""
    n = len(values)
    if not n:
        return empty_array(element_oid)
    elements = np.empty(n, dtype=[("length", ">i4"), ("value", values.dtype)])
    elements["length"] = values.dtype.itemsize
    elements["value"] = values
    return BinaryArray(element_oid, _HEAD.pack(1, 0, element_oid, n, 1) + elements.tobytes())


def nullable_array(element_oid: int, values: npt.NDArray[Any], absent: npt.NDArray[np.bool_]) -> BinaryArray:
    """Returns an array of values as `fixed_array` does, with null where one is absent; empty when all are."""
    if not absent.any():
        return fixed_array(element_oid, values)
    if absent.all():
        return empty_array(element_oid)
    n, size = len(values), values.dtype.itemsize
    elements = np.empty(n, dtype=[("length", ">i4"), ("value", values.dtype)])
    elements["length"] = np.where(absent, -1, size)
    elements["value"] = values
    kept = np.ones((n, 4 + size), dtype=bool)
    kept[absent, 4:] = False
    content = elements.view(np.uint8).reshape(n, 4 + size)[kept].tobytes()
    return BinaryArray(element_oid, _HEAD.pack(1, 1, element_oid, n, 1) + content)


def uuid_array(keys: Sequence[bytes]) -> BinaryArray:
    """Returns an array of uuid from values of 16 bytes."""
    return fixed_array(UUID, np.frombuffer(b"".join(keys), dtype="V16"))


def key_array(keys: Sequence[bytes]) -> BinaryArray:
    """Returns an array of bytea from values of 16 bytes."""
    return fixed_array(BYTEA, np.frombuffer(b"".join(keys), dtype="V16"))


def bytes_array(values: Sequence[bytes | None]) -> BinaryArray:
    """Returns an array of bytea of any length; empty when all values are None."""
    return _joined(
        BYTEA, [_NULL if value is None else struct.pack(">i", len(value)) + value for value in values]
    )


def timestamp_array(microseconds: npt.NDArray[np.int64]) -> BinaryArray:
    """Returns an array of timestamptz from microseconds since 1970, UTC."""
    return fixed_array(TIMESTAMPTZ, (microseconds - POSTGRES_EPOCH_US).astype(">i8"))


class _EncodedTexts(dict[str | None, bytes]):
    def __missing__(self, value: str | None) -> bytes:
        element = self[value] = _NULL if value is None else _text_element(value)
        return element


class TextArrays:
    """Makes arrays of text; short texts that come again and again are encoded once.

    Not for what a person wrote: the memory holds item ids, currencies and placements. Not thread-safe.
    """

    def __init__(self) -> None:
        self._encoded = _EncodedTexts()

    def array(self, values: Sequence[str | None]) -> BinaryArray:
        """Returns an array of text; empty when all values are None."""
        if len(self._encoded) > _MAX_CACHED_TEXTS:
            self._encoded.clear()
        return _joined(TEXT, list(map(self._encoded.__getitem__, values)))


def text_array(values: Sequence[str | None]) -> BinaryArray:
    """Returns an array of text that is not remembered; empty when all values are None."""
    return _joined(TEXT, [_NULL if value is None else _text_element(value) for value in values])


def array_literal(values: Sequence[Any]) -> str:
    """Returns the text form of an array of texts, numbers or None, for a cast inside of a statement."""
    return "{" + ",".join(_literal(value) for value in values) + "}"


def _literal(value: Any) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return repr(value)


def _text_element(value: str) -> bytes:
    encoded = value.encode()
    return struct.pack(">i", len(encoded)) + encoded


def _joined(element_oid: int, elements: Sequence[bytes]) -> BinaryArray:
    nulls = _NULL in elements
    if not elements or (nulls and all(element == _NULL for element in elements)):
        return empty_array(element_oid)
    return BinaryArray(
        element_oid, _HEAD.pack(1, int(nulls), element_oid, len(elements), 1) + b"".join(elements)
    )
