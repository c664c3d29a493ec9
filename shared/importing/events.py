"""Typed rows to events: kinds, guests, orders, returns, and ids that make a retry harmless.

Event ids. A row of an order belongs to the event `<data set>:<order>:<kind>`; its id does not
depend on the order's lines, so a corrected file is reported as a conflict instead of being
counted twice. Any other row gets the digest of its content, and the n-th identical row of a file
(n > 0) the suffix `:n`, so that two equal purchases stay two and importing them again adds none.
With `identical_rows: once` equal rows are one event.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from shared.event_kinds import EventKind
from shared.importing.batches import UNKNOWN_PRICE, EventBatch
from shared.importing.mapping import DropRule, Source, nearest
from shared.importing.problems import ProblemLog
from shared.importing.typed_rows import (
    MAX_PRICE,
    MAX_QUANTITY,
    MICROS,
    Columns,
    Mask,
    as_text,
    checked_ids,
    parsed_numbers,
    parsed_times,
    whole_ids,
)

# Limits of the contract (feedback/v1/event.proto).
MAX_LINES_PER_EVENT = 500
MAX_EVENT_ID = 128
MAX_REFERENCE = 128
MAX_QUERY = 1_024
MAX_TEXT = 20_000
KINDS_WITHOUT_ITEM = (EventKind.SEARCH, EventKind.PAGE_VIEW)
_LINE_KINDS = (EventKind.PURCHASE, EventKind.RETURN)
_TEXT_FIELDS = ("session", "order", "query", "title", "category", "brand", "event_id", "text")


def typed_lines(columns: Columns, source: Source, now_us: int) -> pa.Table:
    """Returns the rows that stand, as columns user, item, kind, time, quantity, price, value, currency, ….

    price is int64 millionths (-1: unknown), value float64 (NaN: none). Texts that are unknown are "".
    Order of the checks: what the mapping leaves out goes first, so that no error is reported for it.
    """
    rows = columns.chunk.table.num_rows
    for rule in source.drop:
        _drop(columns, rule)
    for field_name in ("user", "order"):
        if field_name in columns.fields:
            columns.fields[field_name] = whole_ids(columns.fields[field_name])
    texts = {f: as_text(columns.fields[f]) for f in _TEXT_FIELDS if f in columns.fields}
    kind = _kinds(columns, source)
    for reference in ("order", "session"):
        if reference in texts:
            columns.reject(
                _mask(pc.greater(pc.utf8_length(texts[reference]), MAX_REFERENCE)), reference, texts[reference],
                f"is longer than {MAX_REFERENCE} characters", "Shorten it",
            )  # fmt: skip
    if source.group_by_order:
        columns.reject(
            _mask(pc.is_null(texts["order"])), "order", None, "is missing", "Every line needs its order"
        )
    user = _users(columns, source, texts)
    time = _times(columns, source, now_us)
    item = _items(columns, kind)
    quantity = np.ones(rows)
    if "quantity" in columns.fields:
        quantity = parsed_numbers(
            columns, "quantity", scale=source.fields["quantity"].scale, lowest=-MAX_QUANTITY,
            highest=MAX_QUANTITY, missing=1.0,
        )  # fmt: skip
        if source.negative_quantity_is_return:
            kind = np.where((quantity < 0) & (kind == EventKind.PURCHASE), EventKind.RETURN, kind).astype(
                np.uint8
            )
            quantity = np.abs(quantity)
        columns.reject(
            ~(quantity > 0), "quantity", columns.fields["quantity"], "is not above 0",
            "Correct it, drop such rows, or set `negative_quantity_is_return`",
        )  # fmt: skip
    price = np.full(rows, np.nan)
    if "price" in columns.fields:
        price = parsed_numbers(
            columns, "price", scale=source.fields["price"].scale, lowest=0, highest=MAX_PRICE, missing=None
        )
    value = np.full(rows, np.nan)
    if "value" in columns.fields:
        value = parsed_numbers(columns, "value", lowest=-1e9, highest=1e9, missing=None)
    rated = kind == EventKind.RATING
    if rated.any():
        with np.errstate(invalid="ignore"):
            columns.reject(
                rated & ~((value >= 1) & (value <= 5)), "value", columns.fields.get("value"),
                "is no rating", "A rating has 1 to 5 stars; name their column as `value`",
            )  # fmt: skip
    searched = kind == EventKind.SEARCH
    if searched.any():
        query = pc.fill_null(texts["query"], "") if "query" in texts else pa.array([""] * rows)
        length = pc.utf8_length(query).to_numpy(zero_copy_only=False)
        columns.reject(
            searched & ((length == 0) | (length > MAX_QUERY)), "query", query,
            f"is not 1 to {MAX_QUERY} characters long", "Name the column of the words as `query`, or drop such rows",
        )  # fmt: skip
    written = kind == EventKind.REVIEW
    if written.any():
        text = pc.fill_null(texts["text"], "") if "text" in texts else pa.array([""] * rows)
        length = pc.utf8_length(text).to_numpy(zero_copy_only=False)
        # Shown nowhere: it is what a person wrote.
        columns.reject(
            written & ((length == 0) | (length > MAX_TEXT)), "text", None,
            f"is not 1 to {MAX_TEXT} characters long", "Name the column of the words as `text`, or drop such rows",
        )  # fmt: skip
    if "event_id" in texts:
        length = pc.utf8_length(pc.fill_null(texts["event_id"], "")).to_numpy(zero_copy_only=False)
        columns.reject(
            (length == 0) | (length > MAX_EVENT_ID), "event_id", None,
            f"is not 1 to {MAX_EVENT_ID} characters long", "Give every row an id, or do not name the column",
        )  # fmt: skip
    currency = _currency(columns, rows)
    # A price without a currency is no price: the contract refuses one without the other.
    currency_known = _mask(pc.not_equal(currency, ""))
    columns.problems.note(
        "prices without a currency, left out", int((np.isfinite(price) & ~currency_known).sum())
    )
    known = np.isfinite(price) & currency_known
    micros = np.where(known, np.rint(np.where(known, price, 0) * MICROS), UNKNOWN_PRICE).astype(np.int64)
    table = {
        "user": user, "item": item, "kind": pa.array(kind), "time": pa.array(time),
        "quantity": pa.array(quantity), "price": pa.array(micros), "value": pa.array(value),
        "currency": currency,
        **{f: pc.fill_null(texts[f], "") if f in texts else pa.nulls(rows, pa.string()).fill_null("")
           for f in _TEXT_FIELDS},
    }  # fmt: skip
    kept = pa.table(table).filter(pa.array(columns.keep))
    number_of = columns.chunk.row_number
    numbers = [number_of(row) for row in np.flatnonzero(columns.keep).tolist()]
    return kept.append_column("row", pa.array(numbers, pa.int64()))


def _drop(columns: Columns, rule: DropRule) -> None:
    if rule.field not in columns.fields:
        return
    array = columns.fields[rule.field]
    if rule.at_most is not None:
        # What is no number is not this rule's business: the field's own check names it.
        probe = replace(columns, keep=columns.keep.copy(), problems=ProblemLog())
        values = parsed_numbers(probe, rule.field, lowest=-np.inf, highest=np.inf, missing=None)
        with np.errstate(invalid="ignore"):
            rows = values <= rule.at_most
    else:
        texts = as_text(array)
        if rule.missing:
            rows = pc.is_null(texts)
        elif rule.matches is not None:
            encoded = texts.dictionary_encode()
            hits = np.array(
                [rule.matches.search(t) is not None for t in encoded.dictionary.to_pylist()] + [False]
            )
            rows = hits[pc.fill_null(encoded.indices, len(hits) - 1).to_numpy(zero_copy_only=False)]
        else:
            rows = pc.fill_null(pc.is_in(texts, value_set=pa.array(sorted(rule.one_of), pa.string())), False)
    columns.leave_out(np.asarray(rows, bool), rule.reason)


def _kinds(columns: Columns, source: Source) -> NDArray[np.uint8]:
    rows = columns.chunk.table.num_rows
    if source.kind is not None:
        return np.full(rows, int(source.kind), np.uint8)
    encoded = as_text(columns.fields["kind"]).dictionary_encode()
    values = encoded.dictionary.to_pylist()
    known = {name.casefold(): int(kind) for name, kind in source.kind_values.items()}
    codes = np.array([known.get(v.casefold(), 0) for v in values] + [0], np.uint8)
    kinds = codes[pc.fill_null(encoded.indices, len(codes) - 1).to_numpy(zero_copy_only=False)]
    if source.other_kinds == "skip":
        columns.leave_out(kinds == 0, "kinds of event that the mapping does not name")
    else:
        unknown = next((v for v, c in zip(values, codes, strict=False) if c == 0), "")
        hint = nearest(unknown, source.kind_values)
        columns.reject(
            kinds == 0, "kind", columns.fields["kind"], "is no kind that the mapping names",
            f"{hint} Add it to `kinds`, or set `other_kinds: skip`",
        )  # fmt: skip
    return kinds


def _users(columns: Columns, source: Source, texts: dict[str, pa.Array]) -> pa.Array:
    ids = as_text(columns.fields["user"])
    guests = np.asarray(pc.is_null(ids).to_numpy(zero_copy_only=False), bool)
    if guests.any() and source.guests == "skip":
        columns.leave_out(guests, "guests (rows without a user)")
    elif guests.any() and source.guests == "per_order":
        columns.problems.note(
            "rows of guests, each order as a shopper of its own", int((guests & columns.keep).sum())
        )
        named = pc.binary_join_element_wise("guest", texts["order"], ":")
        columns.fields["user"] = pc.if_else(pc.is_null(ids), named, ids)
    return checked_ids(
        columns, "user", missing_remedy="Name the shopper, or choose `guests: skip` or `guests: per_order`"
    )


def _times(columns: Columns, source: Source, now_us: int) -> NDArray[np.int64]:
    if source.format == "sequences":
        # Aligned at the end, so that the newest event of every sequence is among the newest of all.
        table = columns.chunk.table
        from_end = (table["length"].to_numpy() - 1) - table["position"].to_numpy()
        end = np.datetime64(source.sequence_end or "2024-01-01", "us").astype(np.int64)
        # A second for each line of the file keeps times distinct and the file's order.
        line = table["line"].to_numpy() % source.sequence_step_seconds
        return np.asarray(end + (line - from_end * source.sequence_step_seconds) * MICROS, np.int64)
    return parsed_times(columns, "time", source.fields["time"], source.timezone, now_us)


def _items(columns: Columns, kind: NDArray[np.uint8]) -> pa.Array:
    needless = np.isin(kind, [int(k) for k in KINDS_WITHOUT_ITEM])
    if not needless.any():
        return checked_ids(columns, "item", missing_remedy="Every event of this kind is about an item")
    original = columns.fields["item"]
    columns.fields["item"] = pc.if_else(
        pa.array(needless), pc.fill_null(as_text(original), "-"), as_text(original)
    )
    ids = checked_ids(columns, "item", missing_remedy="Every event of this kind is about an item")
    return pc.if_else(pa.array(needless), "", ids)


def _currency(columns: Columns, rows: int) -> pa.Array:
    if "currency" not in columns.fields:
        return pa.nulls(rows, pa.string()).fill_null("")
    codes = pc.utf8_upper(as_text(columns.fields["currency"]))
    bad = pc.fill_null(pc.invert(pc.match_substring_regex(codes, "^[A-Z]{3}$")), False)
    columns.reject(
        _mask(bad), "currency", codes, "is no currency code",
        "Write three letters of ISO 4217, such as EUR",
    )  # fmt: skip
    return pc.fill_null(codes, "")


def _mask(array: Any) -> Mask:
    return np.asarray(pc.fill_null(array, False).to_numpy(zero_copy_only=False), bool)


@dataclass(slots=True)
class IdenticalRows:
    """Counts identical rows across the chunks of a data set, in 16 bytes a distinct row.

    64 bits of each digest are kept: among ten million rows two differing ones collide with a
    probability of 3e-6, and then one of them merely carries a needless suffix (or, with
    `identical_rows: once`, is left out).
    """

    seen: NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, np.uint64))
    counts: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))

    def occurrence(self, digests: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Returns how often each digest came before, in this call and earlier ones."""
        distinct, inverse, counts = np.unique(digests, return_inverse=True, return_counts=True)
        order = np.argsort(inverse, kind="stable")
        starts = np.concatenate(([0], np.cumsum(counts)[:-1]))
        rank = np.empty(digests.size, np.int64)
        rank[order] = np.arange(digests.size) - np.repeat(starts, counts)
        at = np.searchsorted(self.seen, distinct)
        before = np.zeros(distinct.size, np.int64)
        if self.seen.size:
            hit = self.seen[np.minimum(at, self.seen.size - 1)] == distinct
            before[hit] = self.counts[at[hit]]
            self.counts[at[hit]] += counts[hit]
            new = ~hit
        else:
            new = np.ones(distinct.size, bool)
        self.seen = np.insert(self.seen, at[new], distinct[new])
        self.counts = np.insert(self.counts, at[new], counts[new])
        return rank + before[inverse]


def single_events(
    lines: pa.Table, name: str, source: Source, seen: IdenticalRows, left_out: Counter[str]
) -> EventBatch:
    """Returns one event a row."""
    user, item = lines["user"].to_pylist(), lines["item"].to_pylist()
    kind, time = lines["kind"].to_numpy(), lines["time"].to_numpy()
    session, order, query = (lines[f].to_pylist() for f in ("session", "order", "query"))
    text, given_ids = lines["text"].to_pylist(), lines["event_id"].to_pylist()
    columns = (user, item, kind.tolist(), time.tolist(), lines["quantity"].to_pylist(), lines["price"].to_pylist(),
               lines["value"].to_pylist(), session, order, query, *([text] if any(text) else []))  # fmt: skip
    digests = [
        blake2b("\x1f".join(map(str, row)).encode(), digest_size=12).digest()
        for row in zip(*columns, strict=True)
    ]
    short = np.frombuffer(b"".join(d[:8] for d in digests), np.uint64)
    times_before = seen.occurrence(short)
    ids = [
        f"{name}:{d.hex()}" if n == 0 else f"{name}:{d.hex()}:{n}"
        for d, n in zip(digests, times_before.tolist(), strict=True)
    ]
    if source.identical_rows == "once" and times_before.any():
        left_out["rows identical to an earlier one"] += int((times_before > 0).sum())
        rows = np.flatnonzero(times_before == 0)
        lines = lines.take(pa.array(rows))
        ids = [ids[i] for i in rows]
        user, item, kind, time = lines["user"].to_pylist(), lines["item"].to_pylist(), kind[rows], time[rows]
        session, order, query = (lines[f].to_pylist() for f in ("session", "order", "query"))
        text, given_ids = lines["text"].to_pylist(), lines["event_id"].to_pylist()
    if any(given_ids):
        ids = [given or made for given, made in zip(given_ids, ids, strict=True)]
    has_item = np.array([bool(i) for i in item], bool)
    kept = np.flatnonzero(has_item)
    offsets = np.concatenate(([0], np.cumsum(has_item))).astype(np.int64)
    return EventBatch(
        ids, user, kind.astype(np.uint8), time, offsets, item if len(kept) == len(item) else [item[i] for i in kept],
        lines["quantity"].to_numpy()[kept], lines["price"].to_numpy()[kept],
        _take(lines["currency"].to_pylist(), kept), lines["value"].to_numpy(), session, order, query,
        [""] * len(ids), text, lines["row"].to_numpy(),
    )  # fmt: skip


def order_events(lines: pa.Table, name: str) -> Iterator[EventBatch]:
    """Yields the lines of each (order, kind, user) as one event, oldest first, in parts of bounded size.

    An event's time is that of its earliest line. Lines of kinds that have no lines (views, carts) come as
    single events of their own order position.
    """
    if lines.num_rows == 0:
        return
    order_code = _codes(lines["order"])
    user_code = _codes(lines["user"])
    kind = lines["kind"].to_numpy()
    time = lines["time"].to_numpy()
    several = np.isin(kind, [int(k) for k in _LINE_KINDS])
    # An event that holds one item only gets a group of its own.
    own = np.where(several, -1, np.arange(kind.size))
    keys = np.stack([order_code, user_code, kind.astype(np.int64), own], axis=1)
    _, group = np.unique(keys, axis=0, return_inverse=True)
    group = group.reshape(-1)
    earliest = np.full(group.max() + 1, np.iinfo(np.int64).max)
    np.minimum.at(earliest, group, time)
    rows = np.lexsort((np.arange(kind.size), group, earliest[group]))
    lines = lines.take(pa.array(rows))
    group = group[rows]
    first = np.flatnonzero(np.concatenate(([True], group[1:] != group[:-1])))
    first = _split_long(np.append(first, group.size))
    heads = first[:-1]
    orders = _take(lines["order"].to_pylist(), heads)
    kinds = lines["kind"].to_numpy()[heads]
    names = [EventKind(k).name.lower() for k in kinds.tolist()]
    ids: list[str] = []
    used: Counter[str] = Counter()
    for order, kind_name in zip(orders, names, strict=True):
        key = f"{name}:{order}:{kind_name}"
        ids.append(key if used[key] == 0 else f"{key}:{used[key]}")
        used[key] += 1
    ids = [
        i if len(i) <= MAX_EVENT_ID else f"{name}:{blake2b(i.encode(), digest_size=16).hexdigest()}"
        for i in ids
    ]
    users = _take(lines["user"].to_pylist(), heads)
    batch = EventBatch(
        ids, users, kinds.astype(np.uint8), earliest[group[heads]], first.astype(np.int64),
        lines["item"].to_pylist(), lines["quantity"].to_numpy(), lines["price"].to_numpy(),
        lines["currency"].to_pylist(), lines["value"].to_numpy()[heads],
        _take(lines["session"].to_pylist(), heads), orders, [""] * len(ids), [""] * len(ids),
        _take(lines["text"].to_pylist(), heads), lines["row"].to_numpy()[heads],
    )  # fmt: skip
    yield batch


def _split_long(first: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns the starts with more put in, so that no event has more than MAX_LINES_PER_EVENT lines."""
    lengths = np.diff(first)
    if lengths.size == 0 or lengths.max() <= MAX_LINES_PER_EVENT:
        return first
    starts: list[int] = []
    for start, end in zip(first[:-1].tolist(), first[1:].tolist(), strict=True):
        starts += range(start, end, MAX_LINES_PER_EVENT)
    return np.array([*starts, int(first[-1])])


def _codes(column: Any) -> NDArray[np.int64]:
    encoded = column.combine_chunks().dictionary_encode()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.combine_chunks()
    return np.asarray(encoded.indices.to_numpy(zero_copy_only=False), np.int64)


def _take(values: list[str], rows: NDArray[np.int64]) -> list[str]:
    return [values[i] for i in rows.tolist()]
