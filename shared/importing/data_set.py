"""A directory (or one file) of somebody's shop, opened with a mapping: batches of events, then items."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

import pyarrow as pa

from shared.importing.batches import EventBatch, ItemRecord
from shared.importing.catalogue import DerivedItems, item_records
from shared.importing.events import IdenticalRows, order_events, single_events, typed_lines
from shared.importing.mapping import DataSetMapping, Source, fold, load_mapping, nearest, shipped_mappings
from shared.importing.problems import ImportRefused, ProblemLog
from shared.importing.readers import GATHERED, Layout, inspect, read
from shared.importing.typed_rows import columns_of

# Where orders are put together, reading is that share of the work; sending them is the rest.
READ_SHARE = 0.15


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file, the source that reads it, and its layout."""

    path: Path
    source: Source
    layout: Layout


@dataclass(slots=True)
class DataSet:
    """An opened data set. `events()` must be exhausted before `items()`: events describe items too.

    `rows` counts the rows of event files read so far; `done` is the share of the present step, in [0, 1].
    """

    mapping: DataSetMapping
    files: tuple[SourceFile, ...]
    now_us: int
    problems: ProblemLog = field(default_factory=ProblemLog)
    rows: int = 0
    done: float = 0.0
    _derived: DerivedItems = field(default_factory=DerivedItems)

    def events(self) -> Iterator[EventBatch]:
        """Yields the events in batches: in the order of the files, orders sorted by time."""
        files = [f for f in self.files if f.source.role == "events"]
        seen = IdenticalRows()
        for number, file in enumerate(files):
            orders: list[pa.Table] = []
            for lines, done in self._lines(file):
                read_share = READ_SHARE if file.source.group_by_order else 1.0
                self.done = (number + done * read_share) / len(files)
                if file.source.derive_items:
                    self._derived.add(lines)
                if file.source.group_by_order:
                    orders.append(lines)
                elif lines.num_rows:
                    yield from single_events(
                        lines, self.mapping.name, file.source, seen, self.problems.left_out
                    ).parts()
            # An order's rows may lie anywhere in the file, so orders are built when all rows are known.
            if orders:
                for batch in order_events(pa.concat_tables(orders), self.mapping.name):
                    given = 0
                    for part in batch.parts():
                        given += len(part)
                        share = READ_SHARE + (1 - READ_SHARE) * given / len(batch)
                        self.done = (number + share) / len(files)
                        yield part

    def items(self) -> Iterator[list[ItemRecord]]:
        """Yields the catalogue, 500 items at a time: item files first, completed by what events say."""
        records: dict[str, ItemRecord] = {}
        files = [f for f in self.files if f.source.role == "items"]
        for number, file in enumerate(files):
            for chunk in read(file.path, file.source, file.layout, _wanted(file), self.problems):
                for record in item_records(
                    chunk, file.path.name, file.source, file.layout, self.now_us, self.problems
                ):
                    known = records.setdefault(record.item_id, record)
                    if known is not record:
                        known.complete_with(record)
                self.done = (number + chunk.done) / (len(files) + 1)
        for record in self._derived.records():
            known = records.setdefault(record.item_id, record)
            if known is not record:
                known.complete_with(record)
        fallback = next((s.item_title for s in self.mapping.sources if s.item_title), None)
        pending: list[ItemRecord] = []
        for record in records.values():
            if not record.title and fallback:
                record.title = fallback.format(item=record.item_id)
            pending.append(record)
            if len(pending) == 500:
                yield pending
                pending = []
        if pending:
            yield pending

    def _lines(self, file: SourceFile) -> Iterator[tuple[pa.Table, float]]:
        available = file.layout.by_folded_name
        for chunk in read(file.path, file.source, file.layout, _wanted(file), self.problems):
            self.rows += chunk.table.num_rows
            columns = columns_of(chunk, file.path.name, file.source.fields, available, self.problems)
            yield typed_lines(columns, file.source, self.now_us), chunk.done


def _wanted(file: SourceFile) -> list[str] | None:
    source, available = file.source, file.layout.by_folded_name
    if file.layout.format == "sequences":
        return None
    names = [
        available[fold(c)] for rule in source.fields.values() for c in rule.columns if fold(c) in available
    ]
    names += [available[fold(c)] for c in source.attributes if fold(c) in available]
    if file.layout.format == "jsonl" and source.attribute_prefixes:
        names.append(GATHERED)
    elif source.attribute_prefixes:
        names += [c for c in file.layout.columns if c.startswith(source.attribute_prefixes)]
    return list(dict.fromkeys(names))


def open_data_set(path: Path, mapping_name: str | None, now_us: int) -> DataSet:
    """Returns the data set at `path`, a directory or one file.

    Args:
        mapping_name: the name of a shipped mapping or the path of a mapping file; None looks at the
            columns and takes the shipped mapping that fits them best.
        now_us: the present, microseconds since 1970; later events are rejected.

    Raises:
        ImportRefused: PATH_MISSING, FILE_UNREADABLE, MAPPING_INVALID, MAPPING_UNKNOWN, MAPPING_MISFIT
            (a column is missing; names the nearest) or MAPPING_NOT_FOUND (none fits).
    """
    if not path.exists():
        raise ImportRefused(
            "PATH_MISSING", f"{path} does not exist. Give a directory or a file.", {"path": path.name}
        )
    candidates = sorted(p for p in (path.rglob("*") if path.is_dir() else [path]) if p.is_file())
    candidates = [p for p in candidates if not p.name.startswith(".")]
    if not candidates:
        raise ImportRefused("PATH_EMPTY", f"{path} holds no files.", {"path": path.name})
    if mapping_name is not None:
        mapping = _named(mapping_name)
        files, complaint = _match(mapping, candidates, path)
        if complaint is not None:
            raise complaint
        return DataSet(mapping, files, now_us)
    best: tuple[tuple[bool, int], DataSetMapping, tuple[SourceFile, ...]] | None = None
    unreadable: ImportRefused | None = None
    for mapping in shipped_mappings().values():
        files, complaint = _match(mapping, candidates, path)
        if complaint is not None:
            if complaint.reason == "FILE_UNREADABLE":
                unreadable = unreadable or complaint
            continue
        score = (not mapping.fallback, sum(_score(file) for file in files))
        if best is None or score > best[0]:
            best = (score, mapping, files)
    if best is None:
        if unreadable is not None:
            raise unreadable
        raise ImportRefused("MAPPING_NOT_FOUND", _advice(path, candidates), {"path": path.name})
    return DataSet(best[1], best[2], now_us)


def _named(name: str) -> DataSetMapping:
    if Path(name).suffix in (".yaml", ".yml") or "/" in name:
        return load_mapping(Path(name))
    shipped = shipped_mappings()
    if name not in shipped:
        raise ImportRefused(
            "MAPPING_UNKNOWN",
            f"There is no mapping {name!r}. {nearest(name, shipped)} A mapping of your own is a file that ends in .yaml.",
            {"mapping": name},
        )
    return shipped[name]


def _match(
    mapping: DataSetMapping, candidates: Sequence[Path], root: Path
) -> tuple[tuple[SourceFile, ...], ImportRefused | None]:
    """Returns the files that the mapping reads, or why it does not fit."""
    found: list[SourceFile] = []
    missing_source: ImportRefused | None = None
    for source in mapping.sources:
        complaint: ImportRefused | None = None
        matched = 0
        for path in candidates:
            if not any(fnmatch(path.name.lower(), pattern.lower()) for pattern in source.files):
                continue
            if any(f.path == path and f.source.role == source.role for f in found):
                continue
            try:
                layout = inspect(path, source)
            except ImportRefused as error:
                complaint = complaint or error
                continue
            lacking = _lacking(source, layout)
            if lacking is not None:
                complaint = complaint or ImportRefused(
                    "MAPPING_MISFIT",
                    f"{path}: the mapping {mapping.name!r} does not fit: {lacking}",
                    {"file": path.name},
                )
                continue
            found.append(SourceFile(path, source, layout))
            matched += 1
        # One item file may be importable without any events, so a lone file need not fit every source.
        if matched == 0 and not source.optional and missing_source is None:
            patterns = ", ".join(source.files)
            missing_source = complaint or ImportRefused(
                "MAPPING_MISFIT",
                f"{root}: the mapping {mapping.name!r} needs a file named {patterns}.",
                {"mapping": mapping.name},
            )
    if missing_source is not None and not (found and len(candidates) == 1):
        return (), missing_source
    if not found:
        return (), ImportRefused("MAPPING_MISFIT", f"{root}: the mapping {mapping.name!r} fits no file.")
    return tuple(found), None


def _lacking(source: Source, layout: Layout) -> str | None:
    available = layout.by_folded_name
    if not available:
        return f"its rows are not laid out as {source.format}."
    for field_name, rule in source.fields.items():
        if not rule.required or rule.constant is not None or rule.pick(available) is not None:
            continue
        wanted = " or ".join(repr(c) for c in rule.columns)
        return (
            f"the field {field_name!r} needs the column {wanted}. {nearest(rule.columns[0], layout.columns)}"
        )
    return None


def _score(file: SourceFile) -> int:
    """Returns how well a file fits: the number of its columns that the mapping has a use for."""
    used = sum(rule.pick(file.layout.by_folded_name) is not None for rule in file.source.fields.values())
    # A layout that few files have says more than names that many share.
    return used + (5 if file.layout.format in ("words", "sequences") else 0)


def _advice(path: Path, candidates: Sequence[Path]) -> str:
    return (
        f"No shipped mapping fits {path} ({', '.join(p.name for p in candidates[:5])}). Write a mapping file "
        f"(docs/importing.md shows one) and pass it with --mapping FILE.yaml. "
        f"Shipped: {', '.join(sorted(shipped_mappings()))}."
    )
