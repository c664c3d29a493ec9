"""The catalogue in columns: one immutable snapshot a version.

A snapshot is never written to; the store copies what changes and publishes a new
one. So a request that holds a snapshot sees one state of the shop throughout.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from services.recommend.domain.content_vectors import NO_VECTORS, ContentVectors, ContentVectorStore
from services.recommend.domain.item_index import ItemIndex

Mask = npt.NDArray[np.bool_]
Float = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int32]

NUMBER_COLUMNS = ("price", "list_price", "stock", "rating", "rating_count")
"""Numeric fields of every item, NaN where unknown; prices in units of the currency."""

_TIME_COLUMNS = ("available_from", "available_until", "update_time")
_FLAG_COLUMNS = ("described", "withdrawn", "deleted")


@dataclass(frozen=True, slots=True)
class CatalogItem:
    """What recommending needs to know of one item; `None` and empty are unknown.

    Attributes:
        price, list_price: in units of the currency.
        stock: units; None is not counted, and treated as in stock.
        rating: mean, in [0, 5].
        available_from, available_until, update_time: seconds since 1970, UTC.
        texts: values by text attribute.
        numbers: values by numeric attribute, finite.
        flags: values by boolean attribute.
        placeholder: known only from events.
        record: the record as the caller is to get it, serialised; opaque here.
    """

    item_id: str
    title: str = ""
    brand: str = ""
    category_path: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    currency: str = ""
    language: str = ""
    primary_item_id: str = ""
    price: float | None = None
    list_price: float | None = None
    stock: float | None = None
    rating: float | None = None
    rating_count: float | None = None
    available_from: float | None = None
    available_until: float | None = None
    update_time: float | None = None
    texts: Mapping[str, str] = field(default_factory=dict)
    numbers: Mapping[str, float] = field(default_factory=dict)
    flags: Mapping[str, bool] = field(default_factory=dict)
    withdrawn: bool = False
    placeholder: bool = False
    record: object = None


class Posting(NamedTuple):
    """The rows that have a value: ascending, with the numbers where the field is numeric."""

    rows: Rows
    values: Float | None


EMPTY_POSTING = Posting(np.empty(0, dtype=np.int32), np.empty(0, dtype=np.float64))

PostingKey = tuple[str, str]
"""(field, value) of text and tags; (`#attributes.KEY`, "") of a numeric attribute; a boolean
attribute has (`?attributes.KEY`, "") with the rows where it is true."""


@dataclass(frozen=True, slots=True)
class Catalog:
    """One state of the catalogue over the first `size` rows of the item index.

    Attributes:
        version: counts the states of this process; 0 is the empty one.
        complete: the first snapshot of the profile service has arrived in full.
        described_count: items that the shop has described and not deleted. 0: the shop does not
            use the catalogue, so that it has no say in what is recommended.
        columns: arrays (R,) by name: NUMBER_COLUMNS, times (float64, NaN unknown), flags (bool).
        postings: by key.
        timed_rows: rows that have `available_from` or `available_until`.
        items: what the shop has told of an item, by row; deleted ones are missing.
        content: what items are, as vectors; of those that profile has read.
    """

    version: int
    size: int
    complete: bool
    described_count: int
    columns: Mapping[str, npt.NDArray[np.generic]]
    postings: Mapping[PostingKey, Posting]
    timed_rows: Rows
    items: Mapping[int, CatalogItem]
    index: ItemIndex
    content: ContentVectors = NO_VECTORS

    def numbers(self, name: str) -> Float:
        """Returns a numeric or time column, float64 (R,), NaN where unknown."""
        return self.columns[name]  # type: ignore[return-value]

    def flags(self, name: str) -> Mask:
        """Returns a flag column, bool (R,)."""
        return self.columns[name]  # type: ignore[return-value]

    def posting(self, key: PostingKey) -> Posting:
        """Returns the rows of a key, none where nothing has it."""
        return self.postings.get(key, EMPTY_POSTING)

    def title_of(self, row: int) -> str:
        """Returns the item's title, or its id where it has none."""
        item = self.items.get(row)
        return (item.title if item is not None else "") or self.index.id_of(row)

    def records_of(self, rows: Iterable[int]) -> list[object | None]:
        """Returns the items' records, None where the shop has not described one."""
        item_of = self.items.get
        return [None if (item := item_of(row)) is None or item.placeholder else item.record for row in rows]

    def category_of(self, row: int) -> str:
        """Returns the last step of the item's category path, or "" where unknown."""
        item = self.items.get(row)
        return item.category_path[-1] if item is not None and item.category_path else ""


class CatalogStore:
    """Builds the snapshots. Writers take turns; reading `current` takes no lock.

    Args:
        max_vectors: items up to which content vectors are kept.
    """

    def __init__(self, index: ItemIndex, max_vectors: int = 0) -> None:
        self._index = index
        self.vectors = ContentVectorStore(max_vectors)
        self._lock = threading.RLock()
        self._keys_of_row: dict[int, dict[PostingKey, float | None]] = {}
        self._added: defaultdict[PostingKey, dict[int, float | None]] = defaultdict(dict)
        self._removed: defaultdict[PostingKey, set[int]] = defaultdict(set)
        self._staged: dict[int, CatalogItem | None] = {}
        self._known: set[int] = set()
        self._seen_since_reset: set[int] | None = None
        self._complete = False
        self.current = self._empty()

    def stage(self, upserted: Iterable[CatalogItem], deleted: Iterable[str]) -> None:
        """Takes changes in; they become visible with `publish`."""
        with self._lock:
            items = list(upserted)
            for row, item in zip(self._index.intern(i.item_id for i in items).tolist(), items, strict=True):
                self._staged[row] = item
                self._reindex(row, keys_of(item))
                self._known.add(row)
                if self._seen_since_reset is not None:
                    self._seen_since_reset.add(row)
            for item_id in deleted:
                row = self._index.row_of(item_id)
                if row is not None:
                    self._delete(row)

    def begin_snapshot(self) -> None:
        """Begins a snapshot from nothing.

        What is known stays until the new snapshot is complete: were it dropped here, items that
        are withdrawn would be recommended in between.
        """
        with self._lock:
            self._seen_since_reset = set()

    def complete_snapshot(self) -> None:
        """Ends a snapshot: what it did not name is gone."""
        with self._lock:
            if self._seen_since_reset is not None:
                for row in self._known - self._seen_since_reset:
                    self._delete(row)
            self._seen_since_reset = None
            self._complete = True

    def publish(self) -> Catalog:
        """Makes the staged changes visible, all at once, and returns the new state."""
        with self._lock:
            old, size = self.current, len(self._index)
            unchanged = size == old.size and old.complete == self._complete
            if not self._staged and unchanged and old.content is self.vectors.current:
                return old
            columns = {name: _grown(old.columns[name], size) for name in old.columns}
            items = dict(old.items)
            for row, item in self._staged.items():
                self._write(columns, row, item)
                if item is None:
                    items.pop(row, None)
                else:
                    items[row] = item
            timed_R = ~(np.isnan(columns["available_from"]) & np.isnan(columns["available_until"]))
            for column in columns.values():
                column.flags.writeable = False
            self.current = Catalog(
                version=old.version + 1,
                size=size,
                complete=self._complete,
                described_count=int(np.count_nonzero(columns["described"])),
                columns=columns,
                postings=self._merged_postings(),
                timed_rows=np.flatnonzero(timed_R).astype(np.int32),
                items=items,
                index=self._index,
                content=self.vectors.current,
            )
            self._staged = {}
            return self.current

    def _delete(self, row: int) -> None:
        self._staged[row] = None
        self._reindex(row, {})
        self.vectors.drop(np.array([row], np.int32))
        self._known.discard(row)

    def _reindex(self, row: int, keys: dict[PostingKey, float | None]) -> None:
        before = self._keys_of_row.get(row, {})
        for key in before.keys() - keys.keys():
            self._added[key].pop(row, None)
            self._removed[key].add(row)
        for key, value in keys.items():
            if key not in before or before[key] != value:
                self._added[key][row] = value
                self._removed[key].add(row)
        if keys:
            self._keys_of_row[row] = keys
        else:
            self._keys_of_row.pop(row, None)

    def _merged_postings(self) -> dict[PostingKey, Posting]:
        postings = dict(self.current.postings)
        for key, removed in self._removed.items():
            old, added = postings.get(key, EMPTY_POSTING), self._added.get(key, {})
            keep = ~np.isin(old.rows, np.fromiter(removed, dtype=np.int32, count=len(removed)))
            rows = np.concatenate([old.rows[keep], np.fromiter(added, dtype=np.int32, count=len(added))])
            if not len(rows):
                postings.pop(key, None)
                continue
            order = np.argsort(rows, kind="stable")
            values = None
            if key[0].startswith("#"):
                new = np.fromiter((v or 0.0 for v in added.values()), dtype=np.float64, count=len(added))
                kept = old.values[keep] if old.values is not None else np.empty(0)
                values = np.concatenate([kept, new])[order]
            postings[key] = Posting(rows[order], values)
        self._added.clear()
        self._removed.clear()
        return postings

    @staticmethod
    def _write(columns: Mapping[str, npt.NDArray[np.generic]], row: int, item: CatalogItem | None) -> None:
        for name in (*NUMBER_COLUMNS, *_TIME_COLUMNS):
            value = getattr(item, name) if item is not None else None
            columns[name][row] = np.nan if value is None else value
        columns["described"][row] = item is not None and not item.placeholder
        columns["withdrawn"][row] = item is not None and item.withdrawn
        columns["deleted"][row] = item is None

    def _empty(self) -> Catalog:
        columns: dict[str, npt.NDArray[np.generic]] = {
            name: np.empty(0, dtype=np.float64) for name in (*NUMBER_COLUMNS, *_TIME_COLUMNS)
        }
        columns |= {name: np.empty(0, dtype=np.bool_) for name in _FLAG_COLUMNS}
        no_rows = np.empty(0, dtype=np.int32)
        return Catalog(0, 0, False, 0, columns, {}, no_rows, {}, self._index)


def _grown(column: npt.NDArray[np.generic], size: int) -> npt.NDArray[np.generic]:
    missing: float | bool = np.nan if column.dtype == np.float64 else False
    grown = np.full(size, missing, dtype=column.dtype)
    grown[: len(column)] = column
    return grown


def keys_of(item: CatalogItem) -> dict[PostingKey, float | None]:
    """Returns the postings that an item is in, with its number where the posting is numeric."""
    texts: list[PostingKey] = [
        *(("category", step) for step in item.category_path),
        *(("tags", tag) for tag in item.tags),
        *((f"attributes.{key}", value) for key, value in item.texts.items()),
        *((f"?attributes.{key}", "") for key, value in item.flags.items() if value),
    ]
    for name, value in (
        ("brand", item.brand),
        ("currency", item.currency),
        ("language", item.language),
        ("primary_item_id", item.primary_item_id),
    ):
        if value:
            texts.append((name, value))
    keys: dict[PostingKey, float | None] = dict.fromkeys(texts)
    keys |= {(f"#attributes.{key}", ""): value for key, value in item.numbers.items()}
    return keys
