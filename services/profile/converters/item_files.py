"""Rows of a file as items: which column feeds which field, and what is wrong with a cell."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from shopkeeper.profile.v1 import catalog_service_pb2, item_pb2

from services.profile.converters.items import MAX_BATCH_ROWS, WriteConverter
from services.profile.converters.profiles import invalid
from services.profile.domain.item_imports import MAX_SAMPLES, ItemPart, RejectedRow
from shared.errors import FieldViolation, InvalidInput

if TYPE_CHECKING:
    from shared.importing.mapping import Source
    from shared.importing.readers import Layout

MAX_COLUMNS = 1000
_ATTRIBUTE = "attributes."
_MICROS = 1_000_000
_INT64_MAX = 2**63 - 1
_YES, _NO = {"true", "yes", "1", "t", "y"}, {"false", "no", "0", "f", "n"}


class BadCell(ValueError):
    """A cell that its field cannot take; the text says what would be right."""


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        # A column of whole numbers with a gap in it comes as floats.
        return str(int(value))
    return value if isinstance(value, str) else str(value)


def _whole(value: Any) -> int:
    try:
        number = Decimal(_text(value).strip())
    except InvalidOperation:
        raise BadCell("is no whole number.") from None
    if not number.is_finite() or number != number.to_integral_value():
        raise BadCell("is no whole number.")
    if abs(number) > _INT64_MAX:
        raise BadCell("is too large.")
    return int(number)


def _micros(value: Any) -> int:
    try:
        number = Decimal(_text(value).strip())
    except InvalidOperation:
        raise BadCell("is no number; write 19.99, without a currency sign.") from None
    if not number.is_finite() or abs(number) > _INT64_MAX // _MICROS:
        raise BadCell("is no price.")
    return round(number * _MICROS)


def _number(value: Any) -> float:
    try:
        number = float(_text(value).strip())
    except ValueError:
        raise BadCell("is no number.") from None
    if not math.isfinite(number):
        raise BadCell("is not finite.")
    return number


def _flag(value: Any) -> bool:
    text = _text(value).strip().casefold()
    if text in _YES:
        return True
    if text in _NO:
        return False
    raise BadCell("is neither true nor false.")


def _time_us(value: Any) -> int:
    moment = value
    if not isinstance(moment, datetime):
        if isinstance(moment, date):
            moment = datetime(moment.year, moment.month, moment.day)
        else:
            try:
                moment = datetime.fromisoformat(_text(value).strip())
            except ValueError:
                raise BadCell("is no time of ISO 8601, such as 2026-01-31T09:00:00Z.") from None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    seconds = moment - datetime(1970, 1, 1, tzinfo=UTC)
    return (seconds.days * 86_400 + seconds.seconds) * _MICROS + seconds.microseconds


def _texts(value: Any, separator: str) -> list[str]:
    if isinstance(value, (list, tuple)):
        return [_text(step) for step in value if step is not None]
    text = _text(value)
    if text.startswith("["):
        try:
            steps = json.loads(text)
        except ValueError:
            steps = None
        if isinstance(steps, list):
            return [_text(step) for step in steps if step is not None]
    if not separator:
        return [text]
    return [step for part in text.split(separator) if (step := part.strip())]


_PLAIN: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(
        ("item_id", "title", "description", "brand", "currency_code", "primary_item_id", "image_uri", "language_code"),
        _text,
    ),
    **dict.fromkeys(
        ("price_micros", "list_price_micros", "margin_micros", "stock_quantity", "rating_count"), _whole
    ),
    "rating_mean": _number,
    "withdrawn": _flag,
}  # fmt: skip
# Files give money in units.
_MONEY = {"price": "price_micros", "list_price": "list_price_micros", "margin": "margin_micros"}
_TIMES = ("available_from", "available_until")
_LISTS = ("category_path", "tags")
FIELDS = (*_PLAIN, *_MONEY, *_TIMES, *_LISTS, "attributes")


@dataclass(frozen=True, slots=True)
class _Feed:
    column: str
    field: str
    separator: str


def check_columns(request: catalog_service_pb2.ImportItemsRequest) -> None:
    """Raises InvalidInput naming every column mapping that is wrong in itself."""
    violations: list[FieldViolation] = []
    if len(request.columns) > MAX_COLUMNS:
        raise invalid("columns", f"has {len(request.columns)} entries; the most is {MAX_COLUMNS}.")
    for at, mapping in enumerate(request.columns):
        if not 1 <= len(mapping.column) <= 256:
            violations.append(FieldViolation(f"columns[{at}].column", "must be 1 to 256 characters."))
        key = mapping.field.removeprefix(_ATTRIBUTE)
        named = mapping.field.startswith(_ATTRIBUTE) and 1 <= len(key) <= 128
        if mapping.field not in FIELDS and not named:
            near = difflib.get_close_matches(mapping.field, FIELDS, 1)
            hint = f"; did you mean {near[0]}?" if near else f"; fields are {', '.join(FIELDS)}."
            violations.append(FieldViolation(f"columns[{at}].field", f"is no field of an item{hint}"))
        if len(mapping.separator) > 16:
            violations.append(FieldViolation(f"columns[{at}].separator", "must be at most 16 characters."))
    if violations:
        first = violations[0]
        raise InvalidInput("INVALID_REQUEST", f"{first.field} {first.description}", violations=violations)


class ItemDirectory:
    """Implements `ports.ItemFiles`: nothing outside of a directory can be reached, not by links either.

    Args:
        directory: need not exist before somebody imports.
        clock_us: microseconds since 1970.
    """

    def __init__(self, directory: Path, clock_us: Callable[[], int]) -> None:
        self._directory = directory
        self._clock_us = clock_us

    def check(self, source: bytes) -> None:
        """See `ItemFiles.check`."""
        self._opened(source)

    def parts(self, source: bytes, write_time_us: int) -> Iterator[ItemPart]:
        """See `ItemFiles.parts`."""
        # Arrow takes its time and 60 MB: a service that imports nothing pays nothing.
        from shared.importing.problems import ProblemLog
        from shared.importing.readers import read

        request, path, rules, layout, feeds = self._opened(source)
        problems = ProblemLog()
        told = 0
        for chunk in read(path, rules, layout, None, problems):
            columns = {name: chunk.table[name].to_pylist() for name in chunk.table.column_names}
            rows = chunk.table.num_rows
            for start in range(0, rows, MAX_BATCH_ROWS):
                end = min(rows, start + MAX_BATCH_ROWS)
                numbers = [chunk.row_number(row) for row in range(start, end)]
                part = _part(
                    request, feeds, columns, range(start, end), numbers, write_time_us, self._clock_us()
                )
                share = chunk.done * (end / rows) if rows else chunk.done
                malformed, told = problems.rejected_rows - told, problems.rejected_rows
                yield ItemPart(
                    part.writes,
                    part.row_count + malformed,
                    part.rejected_count + malformed,
                    sorted((*part.rejected, *_samples(problems)), key=lambda row: row.row_number)[
                        :MAX_SAMPLES
                    ],
                    min(1.0, share),
                )
                problems.samples.clear()
        damage = next((f"{p.file} {p.problem}. {p.remedy}." for p in problems.samples if not p.row), "")
        malformed = problems.rejected_rows - told - bool(damage)
        if malformed or damage:
            yield ItemPart((), malformed, malformed, _samples(problems), 1.0, damage)

    def _opened(
        self, source: bytes
    ) -> tuple[catalog_service_pb2.ImportItemsRequest, Path, Source, Layout, list[_Feed]]:
        from shared.importing.mapping import Source
        from shared.importing.problems import ImportRefused
        from shared.importing.readers import inspect

        request = catalog_service_pb2.ImportItemsRequest.FromString(source)
        path = self._within(request.source_uri)
        formats = {1: "csv", 2: "jsonl", 3: "parquet"}
        rules = Source("items", (path.name,), formats.get(request.format, "auto"), {})
        try:
            layout = inspect(path, rules)
        except ImportRefused as error:
            # Where the directory lies is nobody's business outside.
            message = error.message.replace(f"{self._directory.resolve()}/", "")
            raise _refused("source_uri", message) from error
        return request, path, rules, layout, _feeds(request, layout)

    def _within(self, source_uri: str) -> Path:
        root = self._directory.resolve()
        relative = source_uri
        if source_uri.startswith("file:"):
            parts = urlsplit(source_uri)
            relative = unquote(parts.path)
            if parts.netloc not in ("", "localhost") or not relative.startswith("/"):
                raise _refused("source_uri", "is no absolute file: URI, such as file:///imports/items.csv.")
        elif source_uri.startswith(("/", "~")):
            raise _refused("source_uri", "must be relative to the import directory, or a file: URI below it.")
        try:
            path = (root / relative).resolve()
            found = path.is_relative_to(root) and path.is_file()
        except (OSError, ValueError):
            found = False
        if not found:
            raise _refused(
                "source_uri",
                "is no file below the service's import directory (SHOPKEEPER_IMPORT_DIRECTORY).",
            )
        return path


def _feeds(request: catalog_service_pb2.ImportItemsRequest, layout: Layout) -> list[_Feed]:
    available = layout.by_folded_name
    feeds: list[_Feed] = []
    for at, mapping in enumerate(request.columns):
        column = available.get(_folded(mapping.column))
        if column is None:
            near = difflib.get_close_matches(mapping.column, layout.columns, 1)
            hint = f" Did you mean {near[0]!r}?" if near else f" Columns: {', '.join(layout.columns[:20])}."
            raise _refused(f"columns[{at}].column", f"is no column of the file.{hint}")
        feeds.append(_Feed(column, mapping.field, mapping.separator))
    fed = {feed.field for feed in feeds}
    taken = {feed.column for feed in feeds}
    for column in layout.columns:
        field = _field_named(column)
        if field and field not in fed and column not in taken:
            feeds.append(_Feed(column, field, ""))
            fed.add(field)
    # In the order of the file, whoever named them: attributes keep the order that the shop gave them.
    feeds.sort(key=lambda feed: layout.columns.index(feed.column))
    if "item_id" not in fed:
        raise _refused(
            "columns", f"name no column for item_id, and the file has none. Columns: {', '.join(layout.columns[:20])}."
        )  # fmt: skip
    return feeds


def _field_named(column: str) -> str:
    folded = _folded(column)
    if "." in column:
        head, _, key = column.partition(".")
        return f"{_ATTRIBUTE}{key}" if _folded(head) == "attributes" and key else ""
    return next((field for field in FIELDS if _folded(field) == folded), "")


def _folded(name: str) -> str:
    return re.sub(r"[\s_\-]+", "", name).casefold().lstrip("\ufeff")


def _part(
    request: catalog_service_pb2.ImportItemsRequest,
    feeds: Sequence[_Feed],
    columns: dict[str, list[Any]],
    rows: range,
    numbers: Sequence[int],
    write_time_us: int,
    now_us: int,
) -> ItemPart:
    items: list[item_pb2.Item] = []
    places: list[int] = []
    rejected: list[RejectedRow] = []
    for row, number in zip(rows, numbers, strict=True):
        item, violations = _row_item(request, feeds, columns, row)
        if violations:
            rejected.append(RejectedRow(number, tuple(violations)))
        else:
            items.append(item)
            places.append(number)
    door = WriteConverter(now_us)
    if items:
        upsert = catalog_service_pb2.UpsertItemsRequest(items=items)
        upsert.write_time.FromMicroseconds(write_time_us)
        door.upsert(upsert)
    for at, result in sorted(door.rejected.items()):
        # `items[3].title` says nothing about a file; its last name does.
        problems = tuple((v.field.partition("].")[2] or "row", v.description) for v in result.violations)
        rejected.append(RejectedRow(places[at], problems))
    rejected.sort(key=lambda one: one.row_number)
    return ItemPart(door.writes, len(rows), len(rejected), rejected[:MAX_SAMPLES], 0.0)


def _row_item(
    request: catalog_service_pb2.ImportItemsRequest,
    feeds: Sequence[_Feed],
    columns: dict[str, list[Any]],
    row: int,
) -> tuple[item_pb2.Item, list[tuple[str, str]]]:
    item = item_pb2.Item()
    violations: list[tuple[str, str]] = []
    for feed in feeds:
        column = columns.get(feed.column)
        value = column[row] if column is not None else None
        if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
            continue
        try:
            _set(item, feed, value)
        except BadCell as error:
            violations.append((feed.column, str(error)))
    if not item.currency_code and request.currency_code and _priced(item):
        item.currency_code = request.currency_code
    return item, violations


def _priced(item: item_pb2.Item) -> bool:
    return any(item.HasField(name) for name in ("price_micros", "list_price_micros", "margin_micros"))


def _set(item: item_pb2.Item, feed: _Feed, value: Any) -> None:
    field = feed.field
    if field in _PLAIN:
        setattr(item, field, _PLAIN[field](value))
    elif field in _MONEY:
        setattr(item, _MONEY[field], _micros(value))
    elif field in _TIMES:
        try:
            getattr(item, field).FromMicroseconds(_time_us(value))
        except (ValueError, OverflowError):
            raise BadCell("is no time of ISO 8601, such as 2026-01-31T09:00:00Z.") from None
    elif field in _LISTS:
        getattr(item, field).extend(_texts(value, feed.separator))
    elif field == "attributes":
        for key, part in _attribute_object(value).items():
            _add_attribute(item, key, part, "")
    else:
        _add_attribute(item, field.removeprefix(_ATTRIBUTE), value, feed.separator)


def _attribute_object(value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = None
    if isinstance(value, list) and all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in value):
        # How Parquet gives a map.
        value = dict(value)
    if not isinstance(value, dict):
        raise BadCell('is no JSON object, such as {"colour": "red"}.')
    return {str(key): part for key, part in value.items() if part is not None}


def _add_attribute(item: item_pb2.Item, key: str, value: Any, separator: str) -> None:
    if isinstance(value, str) and separator:
        for part in _texts(value, separator):
            item.attributes.add(key=f"{key}.{part}", flag=True)
        return
    attribute = item.attributes.add(key=key)
    if isinstance(value, bool):
        attribute.flag = value
    elif isinstance(value, (int, float, Decimal)):
        attribute.number = _number(value)
    elif isinstance(value, str) and value.strip().casefold() in ("true", "false"):
        attribute.flag = value.strip().casefold() == "true"
    elif isinstance(value, (dict, list)):
        attribute.text = json.dumps(value, ensure_ascii=False)
    else:
        text = _text(value)
        try:
            # Sizes and codes with leading zeros are names, not numbers.
            attribute.number = _number(text) if not re.match(r"0\d|\+", text) else _refuse_number()
        except BadCell:
            attribute.text = text


def _refuse_number() -> float:
    raise BadCell("is a name.")


def _samples(problems: Any) -> list[RejectedRow]:
    return [
        RejectedRow(p.row, ((p.field or "row", f"{p.problem}. {p.remedy}."),))
        for p in problems.samples
        if p.row
    ][:MAX_SAMPLES]


def _refused(field: str, problem: str) -> InvalidInput:
    return InvalidInput("IMPORT_REFUSED", f"{field} {problem}", violations=[FieldViolation(field, problem)])
