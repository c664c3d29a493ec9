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

# The fields of a row but the last, with what holds them.
_FIELDS = {"event_key": "V16", "user_key": "V16", "kind": ">i2", "occurred_at": ">i8", "line": ">i2"}


class RowLayout:
    """What a row is as COPY sends it: int16 count of fields, then int32 length and value of each.

    Attributes:
        columns: as SQL selects them.
        head: everything but the bytes of the item id.
        fixed_bytes: the bytes of a head that are the same in every row, by place.
    """

    def __init__(self, *names: str) -> None:
        self.columns = ", ".join((*names, "item_id"))
        fields: list[tuple[str, str]] = [("fields", ">i2")]
        for name in names:
            fields += [(f"{name}_length", ">i4"), (name, _FIELDS[name])]
        self.head = np.dtype([*fields, ("item_length", ">i4")])
        low, high = np.zeros(1, self.head), np.full(self.head.itemsize, 255, np.uint8).view(self.head)
        low["fields"] = high["fields"] = len(names) + 1
        for name in names:
            low[f"{name}_length"] = high[f"{name}_length"] = np.dtype(_FIELDS[name]).itemsize
        self.fixed_bytes = {
            place: byte
            for place, (byte, other) in enumerate(zip(low.tobytes(), high.tobytes(), strict=True))
            if byte == other
        }


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
        self._rest = b""
        self._begun = self._ended = False
        self.blocks: list[RowBlock] = []

    def feed(self, content: bytes | bytearray) -> None:
        """Decodes what is complete and keeps the rest for the next piece.

        Raises:
            ValueError: it is no such COPY: its header, a null, or a field of another width.
        """
        content = self._rest + content if self._rest else content
        first = 0
        if not self._begun:
            header = len(_SIGNATURE) + 8
            if len(content) < header:
                self._rest = bytes(content)
                return
            if bytes(content[: len(_SIGNATURE)]) != _SIGNATURE:
                raise ValueError("not a binary COPY")
            first = header + int.from_bytes(content[header - 4 : header], "big")
            self._begun = True
        content_B = np.frombuffer(content, np.uint8)[first:]
        start_E, used = row_starts(content_B, self._layout)
        if len(start_E):
            self.blocks.append(_block(content_B, start_E, self._layout))
        self._rest = content_B[used:].tobytes()
        if self._rest[:2] == _TRAILER:
            self._ended = True

    def finish(self) -> list[RowBlock]:
        """Returns every row.

        Raises:
            ValueError: the COPY was cut short, or goes on behind its end.
        """
        if not self._ended or len(self._rest) != len(_TRAILER):
            raise ValueError("not a complete binary COPY")
        return self.blocks


def row_starts(
    content_B: npt.NDArray[np.uint8], layout: RowLayout = WITHOUT_EVENT_KEY
) -> tuple[npt.NDArray[np.int64], int]:
    """Returns where each complete row begins, and where the first incomplete one does.

    Some bytes of a head are alike in every row. Where they stand is where a row may begin; that each row ends where the
    next one begins proves it. Should random bytes of a user key look like a head, the rows are walked one by one.

    Raises:
        ValueError: something else than a row.
    """
    size = layout.head.itemsize
    if len(content_B) < size:
        return np.zeros(0, np.int64), 0
    start_E = np.flatnonzero(content_B[1 : len(content_B) - size + 2] == layout.fixed_bytes[1])
    for place, value in layout.fixed_bytes.items():
        if place != 1:
            start_E = start_E[content_B[start_E + place] == value]
    end_E = _ends(content_B, start_E, size)
    if not len(start_E) or start_E[0] != 0 or (start_E[1:] != end_E[:-1]).any():
        return _walk(content_B, layout)
    whole = len(start_E) - int(end_E[-1] > len(content_B))
    used = int(end_E[whole - 1]) if whole else 0
    # Behind the last row is the beginning of another one or the end, and nothing that was not understood.
    if len(content_B) - used >= size and whole == len(start_E):
        raise ValueError("a row of the COPY has another shape: a null, or a field of another type")
    return start_E[:whole], used


def _ends(
    content_B: npt.NDArray[np.uint8], start_E: npt.NDArray[np.int64], size: int
) -> npt.NDArray[np.int64]:
    length_E = np.zeros(len(start_E), np.int64)
    for place in range(size - 4, size):
        length_E = (length_E << 8) | content_B[start_E + place]
    return start_E + size + length_E


def _walk(content_B: npt.NDArray[np.uint8], layout: RowLayout) -> tuple[npt.NDArray[np.int64], int]:
    size, place, starts = layout.head.itemsize, 0, []
    while place + size <= len(content_B):
        if any(content_B[place + offset] != value for offset, value in layout.fixed_bytes.items()):
            if bytes(content_B[place : place + 2]) == _TRAILER:
                break
            raise ValueError("a row of the COPY has another shape: a null, or a field of another type")
        end = int(_ends(content_B, np.array([place]), size)[0])
        if end > len(content_B):
            break
        starts.append(place)
        place = end
    return np.array(starts, np.int64), place


def _block(content_B: npt.NDArray[np.uint8], start_E: npt.NDArray[np.int64], layout: RowLayout) -> RowBlock:
    size, count = layout.head.itemsize, len(start_E)
    heads = np.lib.stride_tricks.sliding_window_view(content_B, size)[start_E]
    head_E = heads.reshape(-1).view(layout.head)
    # Every other value of this array is an item id; between them lie the heads.
    offsets = np.empty(2 * count + 1, np.int32)
    offsets[0:-1:2] = start_E + size
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
        arrow_keys(head_E["event_key"]) if "event_key" in (layout.head.names or ()) else None,
    )


def arrow_keys(key_E: npt.NDArray[np.void]) -> pa.Array:
    """Returns 16-byte keys for Arrow."""
    content = pa.py_buffer(np.ascontiguousarray(key_E))
    return pa.Array.from_buffers(pa.binary(16), len(key_E), [None, content])


def numbered(keys: list[npt.NDArray[np.void]]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.void]]:
    """Returns (the number of each key, (E,), the distinct keys in byte order, (U,)) of 16-byte keys; empties the list.

    Once for all blocks: of so many people a block holds most but once, so that dictionaries of blocks would save nothing.
    """
    together = arrow_keys(np.concatenate(keys)) if keys else pa.array([], pa.binary(16))
    keys.clear()
    encoded = together.dictionary_encode()
    first, count = encoded.dictionary.offset, len(encoded.dictionary)
    distinct_U = np.frombuffer(encoded.dictionary.buffers()[1] or b"", "V16")[first : first + count]
    high_U, low_U = distinct_U.view(">u8").reshape(-1, 2).T.astype(np.uint64)
    order = np.lexsort((low_U, high_U))
    rank = np.empty(count, np.int64)
    rank[order] = np.arange(count)
    return rank[encoded.indices.to_numpy()], distinct_U[order]


def unified(blocks: list[Any], kind: pa.DataType) -> tuple[npt.NDArray[np.int32], pa.Array]:
    """Returns (indices of all, (E,), the one dictionary in byte order) of dictionary arrays; empties the list."""
    if not blocks:
        return np.zeros(0, np.int32), pa.array([], kind)
    together = pa.chunked_array(blocks).unify_dictionaries()
    blocks.clear()
    dictionary = together.chunk(together.num_chunks - 1).dictionary
    order = np.asarray(pa.compute.sort_indices(dictionary.cast(pa.binary())))
    rank = np.empty(len(order), np.int32)
    rank[order] = np.arange(len(order), dtype=np.int32)
    index_E = np.empty(len(together), np.int32)
    first = 0
    for chunk in together.chunks:
        index_E[first : first + len(chunk)] = rank[chunk.indices.to_numpy()]
        first += len(chunk)
    return index_E, dictionary.take(pa.array(order))
