"""Items from item files, and items derived from the events that mention them."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from shared.importing.batches import UNKNOWN_PRICE, ItemRecord
from shared.importing.mapping import Source, fold
from shared.importing.problems import ProblemLog
from shared.importing.readers import GATHERED, Chunk, Layout
from shared.importing.typed_rows import (
    MAX_PRICE,
    MICROS,
    Columns,
    as_text,
    checked_ids,
    columns_of,
    parsed_numbers,
    parsed_times,
)

MAX_TITLE = 1_000
MAX_DESCRIPTION = 20_000
MAX_NAME = 256
MAX_ATTRIBUTES = 100
MAX_ATTRIBUTE_KEY = 128
MAX_ATTRIBUTE_TEXT = 1_024
_DERIVED = ("title", "category", "brand")


@dataclass(slots=True)
class DerivedItems:
    """What events say about items: the commonest title, category and brand, and the median unit price."""

    texts: dict[str, defaultdict[str, dict[str, int]]] = field(
        default_factory=lambda: {name: defaultdict(dict) for name in _DERIVED}
    )
    prices: defaultdict[str, dict[tuple[int, str], int]] = field(default_factory=lambda: defaultdict(dict))
    item_ids: dict[str, None] = field(default_factory=dict)

    def add(self, lines: pa.Table) -> None:
        """Counts the lines of one chunk."""
        lines = lines.filter(pc.not_equal(lines["item"], ""))
        for name in _DERIVED:
            counted = lines.select(["item", name]).group_by(["item", name]).aggregate([([], "count_all")])
            for item, text, count in zip(
                *(counted[c].to_pylist() for c in ("item", name, "count_all")), strict=True
            ):
                self.item_ids.setdefault(item)
                if text:
                    counts = self.texts[name][item]
                    counts[text] = counts.get(text, 0) + count
        keys = ["item", "price", "currency"]
        counted = lines.select(keys).group_by(keys).aggregate([([], "count_all")])
        for item, price, currency, count in zip(
            *(counted[c].to_pylist() for c in [*keys, "count_all"]), strict=True
        ):
            if price > 0 and currency:
                counts_of_price = self.prices[item]
                counts_of_price[price, currency] = counts_of_price.get((price, currency), 0) + count

    def records(self) -> Iterable[ItemRecord]:
        """Yields one record an item, in order of first mention."""
        for item in self.item_ids:
            price, currency = _median_price(self.prices.get(item, {}))
            category = _commonest(self.texts["category"][item])
            yield ItemRecord(
                item,
                title=_commonest(self.texts["title"][item])[:MAX_TITLE],
                brand=_commonest(self.texts["brand"][item])[:MAX_NAME],
                category_path=category_path(category),
                price_micros=price,
                currency_code=currency,
            )


def _commonest(counts: dict[str, int]) -> str:
    # Ties go to the first in the alphabet, so that the order of rows does not matter.
    return min(counts, key=lambda text: (-counts[text], text)) if counts else ""


def _median_price(counts: dict[tuple[int, str], int]) -> tuple[int, str]:
    if not counts:
        return UNKNOWN_PRICE, ""
    by_currency: dict[str, int] = defaultdict(int)
    for (_, currency), count in counts.items():
        by_currency[currency] += count
    currency = _commonest(by_currency)
    prices = sorted((p, n) for (p, c), n in counts.items() if c == currency)
    cumulated = np.cumsum([n for _, n in prices])
    return prices[int(np.searchsorted(cumulated, cumulated[-1] / 2))][0], currency


def category_path(text: str) -> tuple[str, ...]:
    """Returns the steps of a category such as `Women > Shoes` or `electronics.audio`, at most 16."""
    for mark in (" > ", ">", "|", "/"):
        if mark in text:
            break
    else:
        mark = "." if "." in text and " " not in text else "\x00"
    return tuple(step.strip()[:MAX_NAME] for step in text.split(mark) if step.strip())[:16]


def item_records(
    chunk: Chunk, file: str, source: Source, layout: Layout, now_us: int, problems: ProblemLog
) -> list[ItemRecord]:
    """Returns the items of one chunk of an item file; rows without an id are rejected and named."""
    by_folded = layout.by_folded_name | {fold(n): n for n in chunk.table.column_names}
    available = {k: v for k, v in by_folded.items() if v in chunk.table.column_names}
    columns = columns_of(chunk, file, source.fields, available, problems)
    ids = checked_ids(columns, "item", missing_remedy="Every item needs its id")
    rows = chunk.table.num_rows
    price = np.full(rows, np.nan)
    if "price" in columns.fields:
        price = parsed_numbers(
            columns, "price", scale=source.fields["price"].scale, lowest=0, highest=MAX_PRICE, missing=None
        )
    created = None
    if "created" in columns.fields:
        created = _optional_times(columns, source, now_us)
    texts: dict[str, list[str | None]] = {
        name: as_text(columns.fields[name]).to_pylist()
        for name in ("title", "description", "brand", "currency", "image", "available")
        if name in columns.fields
    }
    paths = _paths(chunk, source, available)
    attributes = _attributes(chunk, source, available)
    records = []
    id_list = ids.to_pylist()
    for row in np.flatnonzero(columns.keep).tolist():
        known_price = not math.isnan(price[row])
        currency = (_at(texts, "currency", row) or "").upper()
        title = _at(texts, "title", row) or ""
        if not title and source.item_title:
            title = source.item_title.format(item=id_list[row])
        records.append(
            ItemRecord(
                id_list[row],
                title=_clean(title)[:MAX_TITLE],
                description=_clean(_at(texts, "description", row) or "")[:MAX_DESCRIPTION],
                brand=_clean(_at(texts, "brand", row) or "")[:MAX_NAME],
                category_path=paths(row),
                price_micros=round(float(price[row]) * MICROS) if known_price and currency else UNKNOWN_PRICE,
                currency_code=currency if known_price else "",
                image_uri=_image(_at(texts, "image", row)),
                created_at_us=created[row] if created else None,
                withdrawn=(_at(texts, "available", row) or "").casefold()
                in ("0", "false", "no", "out of stock"),
                attributes=attributes(row),
            )
        )
    return records


def _optional_times(columns: Columns, source: Source, now_us: int) -> list[int | None]:
    stand = columns.keep.copy()
    quiet, columns.problems = columns.problems, ProblemLog()
    micros = parsed_times(columns, "created", source.fields["created"], source.timezone, now_us)
    wrong = (
        stand & ~columns.keep & (as_text(columns.fields["created"]).is_valid().to_numpy(zero_copy_only=False))
    )
    columns.problems, good = quiet, columns.keep
    columns.keep = stand
    columns.problems.note("items with a date that cannot be read; the date was left empty", int(wrong.sum()))
    return [int(m) if ok else None for m, ok in zip(micros, good, strict=True)]


def _paths(chunk: Chunk, source: Source, available: dict[str, str]) -> Any:
    rule = source.fields.get("category")
    if rule is None:
        return lambda row: ()
    present = [available[fold(c)] for c in rule.columns if fold(c) in available]
    columns = [as_text(chunk.table[c].combine_chunks()).to_pylist() for c in present]
    if len(columns) == 1:
        return lambda row: category_path(columns[0][row] or "")
    # Several columns are the steps of the path, from the top down; a repeated step says nothing.
    return lambda row: tuple(dict.fromkeys(c[row][:MAX_NAME] for c in columns if c[row]))[:16]


def _attributes(chunk: Chunk, source: Source, available: dict[str, str]) -> Any:
    named = [(c, available[fold(c)]) for c in source.attributes if fold(c) in available]
    prefixed = [
        (name[len(prefix) :], name)
        for prefix in source.attribute_prefixes
        for name in chunk.table.column_names
        if name.startswith(prefix)
    ]
    columns = [
        (key[:MAX_ATTRIBUTE_KEY], as_text(chunk.table[c].combine_chunks()).to_pylist())
        for key, c in named + prefixed
    ]
    gathered = chunk.table[GATHERED].to_pylist() if GATHERED in chunk.table.column_names else None

    def attributes(row: int) -> dict[str, str | float | bool]:
        found: dict[str, str | float | bool] = {}
        for key, values in columns:
            value = values[row]
            if value is None:
                continue
            for name, part in _attribute_parts(key, value):
                if len(found) < MAX_ATTRIBUTES:
                    found[name] = part
        if gathered is not None and gathered[row]:
            for key, value in json.loads(gathered[row]).items():
                if len(found) < MAX_ATTRIBUTES and value is not None and key:
                    found[key[:MAX_ATTRIBUTE_KEY]] = _attribute_value(value)
        return found

    return attributes


def _attribute_parts(key: str, value: str) -> Iterable[tuple[str, str | float | bool]]:
    if value.startswith("["):
        try:
            members = json.loads(value)
        except ValueError:
            members = None
        if isinstance(members, list):
            return [(f"{key}.{member}"[:MAX_ATTRIBUTE_KEY], True) for member in members]
    if value in ("true", "false"):
        return [(key, value == "true")]
    try:
        number = float(value)
    except ValueError:
        return [(key, _clean(value)[:MAX_ATTRIBUTE_TEXT])]
    return [(key, number if math.isfinite(number) else value)]


def _attribute_value(value: Any) -> str | float | bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, (int, float)) and math.isfinite(value):
        return float(value)
    return _clean(str(value))[:MAX_ATTRIBUTE_TEXT]


def _clean(text: str) -> str:
    return text.replace("\x00", "")


def _image(uri: str | None) -> str:
    return uri if uri and uri.startswith(("http://", "https://", "data:")) and len(uri) <= 2_048 else ""


def _at(columns: dict[str, list[str | None]], name: str, row: int) -> str | None:
    return columns[name][row] if name in columns else None
