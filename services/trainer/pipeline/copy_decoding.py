"""Rows of PostgreSQL's binary COPY into columns: NumPy and Arrow, no Python object a row.

A row is a count of fields and then, for each, its length and its bytes
(https://www.postgresql.org/docs/current/sql-copy.html). The columns of fixed width come first and the item id
last, so that a row is a fixed head and a tail whose length the head tells. E = events, B = bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

# The fields of a row but the last, with what holds them.
_FIELDS = {"event_key": "V16", "user_key": "V16", "kind": ">i2", "occurred_at": ">i8", "line": ">i2"}


class RowLayout:
    """What a row is as COPY sends it: int16 count of fields, then int32 length and value of each.

    Attributes:
        columns: as SQL selects them.
        head: everything but the bytes of the item id.
        fixed: fields of a head that are the same in every row, and their values.
        marks: three bytes of them, by place: where all stand a row most probably begins.
    """

    def __init__(self, *names: str) -> None:
        self.columns = ", ".join((*names, "item_id"))
        fields: list[tuple[str, str]] = [("fields", ">i2")]
        for name in names:
            fields += [(f"{name}_length", ">i4"), (name, _FIELDS[name])]
        self.head = np.dtype([*fields, ("item_length", ">u4")])
        width = {name: np.dtype(_FIELDS[name]).itemsize for name in names}
        self.fixed = {"fields": len(names) + 1, **{f"{name}_length": width[name] for name in names}}
        # The low bytes of the count, and of the first and the last length: lengths are int32, high byte first.
        self.marks = (
            (1, len(names) + 1),
            *((self.head.fields[f"{name}_length"][1] + 3, width[name]) for name in (names[0], names[-1])),  # type: ignore[index]
        )
        # Compared as they lie in memory: turning the bytes of every row round would take longer than comparing.
        self._raw = self.head.newbyteorder("<")
        self._raw_fixed = {
            name: int(np.array(value, self.head[name]).view(self._raw[name]))
            for name, value in self.fixed.items()
        }

    def heads_at(
        self, content_B: npt.NDArray[np.uint8], start_E: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.void]:
        """Returns a copy of the heads that begin at these places, dtype `head`."""
        size = self.head.itemsize
        window = np.ndarray((len(content_B) - size + 1,), f"V{size}", content_B, strides=(1,))
        return window[start_E].view(self.head)

    def is_head(self, head_E: npt.NDArray[np.void]) -> npt.NDArray[np.bool_]:
        """Returns which of these have every fixed field right."""
        raw_E = head_E.view(self._raw)
        right_E = np.ones(len(head_E), bool)
        for name, value in self._raw_fixed.items():
            right_E &= raw_E[name] == value
        return right_E


WITHOUT_EVENT_KEY = RowLayout("user_key", "kind", "occurred_at", "line")
WITH_EVENT_KEY = RowLayout("event_key", "user_key", "kind", "occurred_at", "line")
_SIGNATURE = b"PGCOPY\n\xff\r\n\x00"
_TRAILER = b"\xff\xff"
# Postgres counts microseconds from 2000.
_EPOCH_MICROSECONDS = 946_684_800_000_000


@dataclass(frozen=True, slots=True, eq=False)
class RowBlock:
    """Some rows as columns.

    Attributes:
        user_key_E: 16-byte user keys, V16, (E,).
        item: dictionary of item ids, int32 indices, (E,).
        event: 16-byte event keys where they were asked for.
        kind_E: int16. time_E: microseconds since 1970, int64. line_E: int16.
    """

    user_key_E: npt.NDArray[np.void]
    item: pa.DictionaryArray
    kind_E: npt.NDArray[np.int16]
    time_E: npt.NDArray[np.int64]
    line_E: npt.NDArray[np.int16]
    event: pa.Array | None = None


class CopyDecoder:
    """Takes the bytes of a COPY as they come, in pieces of any length, and gives them back as columns."""

    def __init__(self, layout: RowLayout = WITHOUT_EVENT_KEY) -> None:
        self._layout = layout
        # One for all pieces: memory that is fresh for each would cost more than to fill it.
        self._buffer_B = np.empty(0, np.uint8)
        self._rest = b""
        self._begun = self._ended = False
        self._blocks: list[RowBlock] = []

    def feed(self, *pieces: bytes | bytearray) -> None:
        """Decodes what is complete and keeps the rest for the next pieces.

        Raises:
            ValueError: it is no such COPY: its header, a null, or a field of another width.
        """
        content_B = self._together(self._rest, *pieces)
        first = 0
        if not self._begun:
            header = len(_SIGNATURE) + 8
            if len(content_B) < header:
                self._rest = content_B.tobytes()
                return
            if content_B[: len(_SIGNATURE)].tobytes() != _SIGNATURE:
                raise ValueError("not a binary COPY")
            first = header + int.from_bytes(content_B[header - 4 : header].tobytes(), "big")
            self._begun = True
        content_B = content_B[first:]
        start_E, used, head_E = row_starts(content_B, self._layout)
        if len(start_E):
            self._blocks.append(_block(content_B, start_E, head_E))
        self._rest = content_B[used:].tobytes()
        if self._rest[:2] == _TRAILER:
            self._ended = True

    def take(self) -> list[RowBlock]:
        """Returns the rows that were not taken before."""
        taken, self._blocks = self._blocks, []
        return taken

    def finish(self) -> list[RowBlock]:
        """Returns the last rows.

        Raises:
            ValueError: the COPY was cut short, or goes on behind its end.
        """
        if not self._ended or len(self._rest) != len(_TRAILER):
            raise ValueError("not a complete binary COPY")
        return self.take()

    def _together(self, *pieces: bytes | bytearray) -> npt.NDArray[np.uint8]:
        count = sum(map(len, pieces))
        if count > len(self._buffer_B):
            self._buffer_B = np.empty(count + count // 4, np.uint8)
        place = 0
        for piece in pieces:
            self._buffer_B[place : place + len(piece)] = np.frombuffer(piece, np.uint8)
            place += len(piece)
        return self._buffer_B[:count]


def row_starts(
    content_B: npt.NDArray[np.uint8], layout: RowLayout = WITHOUT_EVENT_KEY
) -> tuple[npt.NDArray[np.int64], int, npt.NDArray[np.void]]:
    """Returns where each complete row begins, where the first incomplete one does, and the heads of the rows.

    Some bytes of a head are alike in every row. Where they stand is where a row may begin; that each row ends where the
    next one begins proves it. Should random bytes of a user key look like a head, the rows are walked one by one.

    Raises:
        ValueError: something else than a row.
    """
    size = layout.head.itemsize
    places = len(content_B) - size + 1
    if places <= 0:
        return np.zeros(0, np.int64), 0, np.zeros(0, layout.head)
    (place, value), *others = layout.marks
    may_begin_B = content_B[place : place + places] == value
    for place, value in others:
        may_begin_B &= content_B[place : place + places] == value
    start_E = np.flatnonzero(may_begin_B)
    head_E = layout.heads_at(content_B, start_E)
    is_head_E = layout.is_head(head_E)
    if not is_head_E.all():
        start_E = start_E[is_head_E]
        head_E = layout.heads_at(content_B, start_E)
    end_E = _ends(start_E, head_E)
    if not len(start_E) or start_E[0] != 0 or (start_E[1:] != end_E[:-1]).any():
        start_E, used = _walk(content_B, layout)
        return start_E, used, layout.heads_at(content_B, start_E)
    whole = len(start_E) - int(end_E[-1] > len(content_B))
    used = int(end_E[whole - 1]) if whole else 0
    # Behind the last row is the beginning of another one or the end, and nothing that was not understood.
    if len(content_B) - used >= size and whole == len(start_E):
        raise ValueError("a row of the COPY has another shape: a null, or a field of another type")
    return start_E[:whole], used, head_E[:whole]


def _ends(start_E: npt.NDArray[np.int64], head_E: npt.NDArray[np.void]) -> npt.NDArray[np.int64]:
    return start_E + head_E.itemsize + head_E["item_length"].astype(np.int64)


def _walk(content_B: npt.NDArray[np.uint8], layout: RowLayout) -> tuple[npt.NDArray[np.int64], int]:
    size, place, starts = layout.head.itemsize, 0, []
    while place + size <= len(content_B):
        start = np.array([place])
        head = layout.heads_at(content_B, start)
        if not layout.is_head(head)[0]:
            if content_B[place : place + 2].tobytes() == _TRAILER:
                break
            raise ValueError("a row of the COPY has another shape: a null, or a field of another type")
        end = int(_ends(start, head)[0])
        if end > len(content_B):
            break
        starts.append(place)
        place = end
    return np.array(starts, np.int64), place


def _block(
    content_B: npt.NDArray[np.uint8], start_E: npt.NDArray[np.int64], head_E: npt.NDArray[np.void]
) -> RowBlock:
    count = len(start_E)
    # Every other value of this array is an item id; between them lie the heads.
    offsets = np.empty(2 * count + 1, np.int32)
    offsets[0:-1:2] = start_E + head_E.itemsize
    offsets[1::2] = offsets[0:-1:2] + head_E["item_length"]
    offsets[-1] = offsets[-2]
    laid_out = pa.Array.from_buffers(
        pa.string(), 2 * count, [None, pa.py_buffer(offsets), pa.py_buffer(content_B)]
    )
    items = laid_out.take(pa.array(2 * np.arange(count, dtype=np.int32)))
    return RowBlock(
        np.ascontiguousarray(head_E["user_key"]),
        items.dictionary_encode(),
        head_E["kind"].astype(np.int16),
        head_E["occurred_at"].astype(np.int64) + _EPOCH_MICROSECONDS,
        head_E["line"].astype(np.int16),
        arrow_keys(head_E["event_key"]) if "event_key" in (head_E.dtype.names or ()) else None,
    )


def arrow_keys(key_E: npt.NDArray[np.void]) -> pa.Array:
    """Returns 16-byte keys for Arrow."""
    content = pa.py_buffer(np.ascontiguousarray(key_E))
    return pa.Array.from_buffers(pa.binary(16), len(key_E), [None, content])


class KeyNumbers:
    """Numbers 16-byte keys by their order, as they come: what comes while a server makes the next rows costs no time.

    Args:
        rows_at_once: keys that are looked through together: many, since one block holds most people but once.
    """

    def __init__(self, rows_at_once: int = 1 << 18) -> None:
        self._rows_at_once, self._waiting_rows = rows_at_once, 0
        self._waiting: list[npt.NDArray[np.void]] = []
        self._parts: list[tuple[npt.NDArray[np.int32], npt.NDArray[np.void]]] = []

    def add(self, key_E: npt.NDArray[np.void]) -> None:
        """Takes the next keys."""
        self._waiting.append(key_E)
        self._waiting_rows += len(key_E)
        if self._waiting_rows >= self._rows_at_once:
            self._look_through()

    def finish(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.void]]:
        """Returns (the number of each key, (E,), the distinct keys in byte order, (U,))."""
        self._look_through()
        index_D, distinct_U = _distinct(np.concatenate([key_D for _, key_D in self._parts]))
        high_U, low_U = distinct_U.view(">u8").reshape(-1, 2).T.astype(np.uint64)
        order = np.lexsort((low_U, high_U))
        rank_U = np.empty(len(order), np.int64)
        rank_U[order] = np.arange(len(order))
        rank_D = rank_U[index_D]
        user_E = np.empty(sum(len(index_E) for index_E, _ in self._parts), np.int64)
        row = first = 0
        for index_E, key_D in self._parts:
            user_E[row : row + len(index_E)] = rank_D[first : first + len(key_D)][index_E]
            row, first = row + len(index_E), first + len(key_D)
        self._parts.clear()
        return user_E, distinct_U[order]

    def _look_through(self) -> None:
        self._parts.append(_distinct(np.concatenate([np.empty(0, "V16"), *self._waiting])))
        self._waiting, self._waiting_rows = [], 0


def _distinct(key_E: npt.NDArray[np.void]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.void]]:
    """Returns (the place of each key among the distinct ones, (E,), those, (U,))."""
    half_E2 = key_E.view(np.uint64).reshape(-1, 2)
    high_E, low_E = np.ascontiguousarray(half_E2[:, 0]), np.ascontiguousarray(half_E2[:, 1])
    # Half of a key tells people apart, since keys are digests; the other half proves it.
    encoded = pa.array(high_E).dictionary_encode()
    index_E = encoded.indices.to_numpy()
    low_U = np.empty(len(encoded.dictionary), np.uint64)
    low_U[index_E] = low_E
    if (low_U[index_E] == low_E).all():
        return index_E, np.stack([encoded.dictionary.to_numpy(), low_U], axis=1).reshape(-1).view("V16")
    encoded = arrow_keys(key_E).dictionary_encode()
    first, count = encoded.dictionary.offset, len(encoded.dictionary)
    content = encoded.dictionary.buffers()[1] or b""
    return encoded.indices.to_numpy(), np.frombuffer(content, "V16")[first : first + count]


def unified(blocks: list[Any], kind: pa.DataType) -> tuple[npt.NDArray[np.int32], pa.Array]:
    """Returns (indices of all, (E,), the one dictionary in byte order) of dictionary arrays; empties the list."""
    if not blocks:
        return np.zeros(0, np.int32), pa.array([], kind)
    together = pa.chunked_array(blocks).unify_dictionaries()
    blocks.clear()
    dictionary = together.chunk(together.num_chunks - 1).dictionary
    order = np.asarray(pc.sort_indices(dictionary.cast(pa.binary())))
    rank = np.empty(len(order), np.int32)
    rank[order] = np.arange(len(order), dtype=np.int32)
    index_E = np.empty(len(together), np.int32)
    first = 0
    for chunk in together.chunks:
        index_E[first : first + len(chunk)] = rank[chunk.indices.to_numpy()]
        first += len(chunk)
    return index_E, dictionary.take(pa.array(order))
