"""The mapping file: how the columns of somebody's files become events and items.

A mapping is a small YAML document. `docs/importing.md` is its manual, and the files in
`shared/importing/mappings` are its examples. Reading one is strict: an unknown key is an
error that names the key and the nearest known one, because a misspelt `timezone` that is
silently ignored shifts a year of events by an hour.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from collections.abc import Mapping as MappingType
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import yaml

from shared.event_kinds import EventKind
from shared.importing.problems import ImportRefused

FORMATS = ("auto", "csv", "jsonl", "parquet", "words", "sequences", "json_map")
EVENT_FIELDS = (
    "user", "item", "time", "quantity", "price", "value", "currency", "order", "session", "kind", "query",
    "title", "category", "brand", "event_id", "text",
)  # fmt: skip
ITEM_FIELDS = (
    "item", "title", "description", "category", "brand", "price", "currency", "image", "created", "available",
)  # fmt: skip
# Kinds that a row of columns can say whole; advertising, support and surveys come over gRPC.
KINDS = {
    kind.name.lower(): kind
    for kind in (
        EventKind.SEARCH,
        EventKind.PAGE_VIEW,
        EventKind.ITEM_VIEW,
        EventKind.ADD_TO_CART,
        EventKind.REMOVE_FROM_CART,
        EventKind.PURCHASE,
        EventKind.RETURN,
        EventKind.RATING,
        EventKind.REVIEW,
        EventKind.WISH_LIST,
        EventKind.SHARE,
        EventKind.RECOMMENDATION_CLICK,
    )
}
GUEST_POLICIES = ("reject", "skip", "per_order")
IDENTICAL_POLICIES = ("each", "once")


@dataclass(frozen=True, slots=True)
class FieldRule:
    """Where one field comes from: the first of `columns` that the file has, else `constant`.

    `formats` are strptime patterns tried after ISO 8601; `unit` reads numbers as time since 1970.
    `scale` multiplies a number (0.01 for cents). `shift_days` moves a time: the log refuses what is
    older than the year 2000, and a study of intervals does not mind.
    """

    columns: tuple[str, ...] = ()
    constant: str | None = None
    formats: tuple[str, ...] = ()
    unit: str | None = None
    scale: float = 1.0
    shift_days: int = 0
    required: bool = True

    def pick(self, available: MappingType[str, str]) -> str | None:
        """Returns the file's name of the column, or None; names match without regard to case and spaces."""
        for column in self.columns:
            found = available.get(fold(column))
            if found is not None:
                return found
        return None


@dataclass(frozen=True, slots=True)
class DropRule:
    """Rows to leave out, and the reason to report."""

    field: str
    reason: str
    one_of: frozenset[str] = frozenset()
    matches: re.Pattern[str] | None = None
    at_most: float | None = None
    missing: bool = False


@dataclass(frozen=True, slots=True)
class Source:
    """Files of one layout within a data set, and what their rows are."""

    role: str  # "events" or "items"
    files: tuple[str, ...]
    format: str
    fields: MappingType[str, FieldRule]
    kind: EventKind | None = None
    kind_values: MappingType[str, EventKind] = field(default_factory=dict)
    other_kinds: str = "reject"
    negative_quantity_is_return: bool = False
    drop: tuple[DropRule, ...] = ()
    group_by_order: bool = False
    guests: str = "reject"
    identical_rows: str = "each"
    timezone: ZoneInfo = field(default_factory=lambda: ZoneInfo("UTC"))
    delimiter: str | None = None
    layouts: MappingType[int, tuple[str, ...]] = field(default_factory=dict)
    attributes: tuple[str, ...] = ()
    attribute_prefixes: tuple[str, ...] = ()
    item_title: str | None = None
    derive_items: bool = True
    sequence_end: str | None = None
    sequence_step_seconds: int = 86_400
    optional: bool = False


@dataclass(frozen=True, slots=True)
class DataSetMapping:
    """A named mapping: `name` prefixes every event id, so it must not change between imports.

    A `fallback` is chosen without being named only where nothing else fits.
    """

    name: str
    title: str
    sources: tuple[Source, ...]
    note: str = ""
    fallback: bool = False


def fold(name: str) -> str:
    """Returns a column name without case, spaces, underscores and hyphens: `Customer ID` is `customer_id`."""
    return re.sub(r"[\s_\-]+", "", name).casefold().lstrip("\ufeff")


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns " Did you mean …?" for the closest known name, else the list of known names."""
    names = list(known)
    folded = {fold(n): n for n in names}
    close = difflib.get_close_matches(fold(name), folded, n=1, cutoff=0.6)
    if close:
        return f"Did you mean {folded[close[0]]!r}?"
    return f"Known are: {', '.join(sorted(names))}." if names else ""


class _Reader:
    """Walks a YAML document and refuses what it does not understand, naming the path to it."""

    def __init__(self, origin: str) -> None:
        self.origin = origin

    def refuse(self, path: str, problem: str) -> ImportRefused:
        return ImportRefused("MAPPING_INVALID", f"{self.origin}: {path}: {problem}", {"key": path})

    def table(
        self, value: Any, path: str, known: Iterable[str], required: Iterable[str] = ()
    ) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self.refuse(path, f"must be a table of keys, not {type(value).__name__}.")
        known = tuple(known)
        for key in value:
            if key not in known:
                raise self.refuse(f"{path}.{key}".lstrip("."), f"unknown key. {nearest(str(key), known)}")
        for key in required:
            if key not in value:
                raise self.refuse(f"{path}.{key}".lstrip("."), "this key is required and missing.")
        return value

    def one_of(self, value: Any, path: str, known: Iterable[str]) -> str:
        known = tuple(known)
        if value not in known:
            raise self.refuse(path, f"{value!r} is not known. {nearest(str(value), known)}")
        return str(value)

    def texts(self, value: Any, path: str) -> tuple[str, ...]:
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(v, (str, int, float)) for v in values):
            raise self.refuse(path, "must be a text or a list of texts.")
        return tuple(str(v) for v in values)

    def flag(self, value: Any, path: str) -> bool:
        if not isinstance(value, bool):
            raise self.refuse(path, "must be true or false.")
        return value

    def kind(self, value: Any, path: str) -> EventKind:
        return KINDS[self.one_of(value, path, KINDS)]

    def number(self, value: Any, path: str) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.refuse(path, f"must be a number, not {value!r}.")
        return float(value)

    def field_rule(self, value: Any, path: str) -> FieldRule:
        if isinstance(value, (str, list, int)):
            return FieldRule(columns=self.texts(value, path))
        keys = ("column", "constant", "format", "unit", "scale", "shift_days", "optional")
        table = self.table(value, path, keys)
        if "column" not in table and "constant" not in table:
            raise self.refuse(path, "needs `column` or `constant`.")
        unit = table.get("unit")
        if unit is not None:
            self.one_of(unit, f"{path}.unit", ("s", "ms", "us"))
        return FieldRule(
            columns=self.texts(table["column"], f"{path}.column") if "column" in table else (),
            constant=str(table["constant"]) if "constant" in table else None,
            formats=self.texts(table["format"], f"{path}.format") if "format" in table else (),
            unit=unit,
            scale=self.number(table.get("scale", 1), f"{path}.scale"),
            shift_days=int(self.number(table.get("shift_days", 0), f"{path}.shift_days")),
            required=not self.flag(table.get("optional", False), f"{path}.optional"),
        )

    def drop_rule(self, value: Any, path: str, fields: Iterable[str]) -> DropRule:
        table = self.table(
            value, path, ("field", "in", "matches", "at_most", "missing", "reason"), ("field", "reason")
        )
        if len(table) != 3:
            raise self.refuse(
                path, "needs `field`, `reason` and exactly one of `in`, `matches`, `at_most`, `missing`."
            )
        pattern = None
        if "matches" in table:
            try:
                pattern = re.compile(str(table["matches"]))
            except re.error as error:
                raise self.refuse(f"{path}.matches", f"is no regular expression: {error}.") from error
        return DropRule(
            field=self.one_of(table["field"], f"{path}.field", fields),
            reason=str(table["reason"]),
            one_of=frozenset(self.texts(table["in"], f"{path}.in")) if "in" in table else frozenset(),
            matches=pattern,
            at_most=self.number(table["at_most"], f"{path}.at_most") if "at_most" in table else None,
            missing=self.flag(table.get("missing", False), f"{path}.missing"),
        )

    def source(self, value: Any, path: str) -> Source:
        known = (
            "role", "files", "format", "fields", "kind", "kinds", "other_kinds", "negative_quantity_is_return",
            "drop", "group_by_order", "guests", "identical_rows", "timezone", "delimiter", "layouts", "attributes",
            "attribute_prefixes", "item_title", "derive_items", "sequence_end", "sequence_step_seconds", "optional",
        )  # fmt: skip
        table = self.table(value, path, known, ("role", "files", "fields"))
        role = self.one_of(table["role"], f"{path}.role", ("events", "items"))
        names = EVENT_FIELDS if role == "events" else ITEM_FIELDS
        rules = {
            key: self.field_rule(rule, f"{path}.fields.{key}")
            for key, rule in self.table(table["fields"], f"{path}.fields", names, ("item",)).items()
        }
        chosen_format = self.one_of(table.get("format", "auto"), f"{path}.format", FORMATS)
        kind_values = {
            str(raw): self.kind(name, f"{path}.kinds.{raw}")
            for raw, name in self.table(
                table.get("kinds", {}), f"{path}.kinds", table.get("kinds", {})
            ).items()
        }
        if role == "events":
            for key in ("user", "time") if chosen_format != "sequences" else ("user",):
                if key not in rules:
                    raise self.refuse(f"{path}.fields.{key}", "events need this field.")
            if ("kind" in table) == bool(kind_values):
                raise self.refuse(f"{path}.kind", "give either `kind`, or `kinds` with a field `kind`.")
            if kind_values and "kind" not in rules:
                raise self.refuse(f"{path}.fields.kind", "`kinds` needs the column that they stand in.")
        zone = str(table.get("timezone", "UTC"))
        try:
            timezone = ZoneInfo(zone)
        except (KeyError, ValueError, OSError) as error:
            raise self.refuse(
                f"{path}.timezone", f"{zone!r} is no IANA time zone such as Europe/London."
            ) from error
        layouts = self.table(table.get("layouts", {}), f"{path}.layouts", table.get("layouts", {}))
        group = self.flag(table.get("group_by_order", False), f"{path}.group_by_order")
        guests = self.one_of(table.get("guests", "reject"), f"{path}.guests", GUEST_POLICIES)
        if (group or guests == "per_order") and "order" not in rules:
            raise self.refuse(
                f"{path}.fields.order", "`group_by_order` and `guests: per_order` need this field."
            )
        return Source(
            role=role,
            files=self.texts(table["files"], f"{path}.files"),
            format=chosen_format,
            fields=rules,
            kind=self.kind(table["kind"], f"{path}.kind") if "kind" in table else None,
            kind_values=kind_values,
            other_kinds=self.one_of(
                table.get("other_kinds", "reject"), f"{path}.other_kinds", ("reject", "skip")
            ),
            negative_quantity_is_return=self.flag(
                table.get("negative_quantity_is_return", False), f"{path}.negative_quantity_is_return"
            ),
            drop=tuple(
                self.drop_rule(rule, f"{path}.drop[{i}]", rules)
                for i, rule in enumerate(table.get("drop", []))
            ),
            group_by_order=group,
            guests=guests,
            identical_rows=self.one_of(
                table.get("identical_rows", "each"), f"{path}.identical_rows", IDENTICAL_POLICIES
            ),
            timezone=timezone,
            delimiter=table.get("delimiter"),
            layouts={
                int(width): self.texts(columns, f"{path}.layouts.{width}")
                for width, columns in layouts.items()
            },
            attributes=self.texts(table.get("attributes", []), f"{path}.attributes"),
            attribute_prefixes=self.texts(table.get("attribute_prefixes", []), f"{path}.attribute_prefixes"),
            item_title=table.get("item_title"),
            derive_items=self.flag(table.get("derive_items", True), f"{path}.derive_items"),
            sequence_end=str(table["sequence_end"]) if "sequence_end" in table else None,
            sequence_step_seconds=int(
                self.number(table.get("sequence_step_seconds", 86_400), f"{path}.step")
            ),
            optional=self.flag(table.get("optional", False), f"{path}.optional"),
        )


def parse_mapping(text: str, origin: str) -> DataSetMapping:
    """Returns the mapping of a YAML text; `origin` names it in errors.

    Raises:
        ImportRefused: MAPPING_INVALID, with the path of the key and the nearest known one.
    """
    reader = _Reader(origin)
    try:
        document = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}" if mark else "the file"
        raise reader.refuse(where, f"is no YAML: {getattr(error, 'problem', error)}.") from error
    table = reader.table(
        document, "mapping", ("name", "title", "note", "fallback", "sources"), ("name", "sources")
    )
    name = str(table["name"])
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,62}", name):
        raise reader.refuse("name", f"{name!r} must be 1..63 of a-z, 0-9, `_` and `-`.")
    if not isinstance(table["sources"], list) or not table["sources"]:
        raise reader.refuse("sources", "must be a list with at least one source.")
    sources = tuple(reader.source(value, f"sources[{i}]") for i, value in enumerate(table["sources"]))
    return DataSetMapping(
        name,
        str(table.get("title", name)),
        sources,
        str(table.get("note", "")).strip(),
        reader.flag(table.get("fallback", False), "fallback"),
    )


def load_mapping(path: Path) -> DataSetMapping:
    """Returns the mapping in a file.

    Raises:
        ImportRefused: MAPPING_UNREADABLE or MAPPING_INVALID.
    """
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ImportRefused("MAPPING_UNREADABLE", f"{path}: cannot be read: {error}") from error
    return parse_mapping(text, path.name)


def shipped_mappings() -> dict[str, DataSetMapping]:
    """Returns the mappings that come with Shopkeeper, by name."""
    directory = Path(__file__).parent / "mappings"
    loaded = [load_mapping(path) for path in sorted(directory.glob("*.yaml"))]
    return {mapping.name: mapping for mapping in loaded}
