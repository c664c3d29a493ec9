"""Files to column chunks: CSV, JSON lines, Parquet, words, sequences and JSON tables, plain or gzipped.

Every reader yields `Chunk`s of Arrow columns, so that a file larger than memory is no
problem. A line that cannot be read is counted and named in the `ProblemLog`; a file that
cannot be read at all raises `ImportRefused`.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from bisect import insort
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from shared.importing.mapping import Source, fold
from shared.importing.problems import ImportRefused, ProblemLog, RowProblem, shown

ROWS_PER_CHUNK = 65_536
CSV_BLOCK_BYTES = 8 << 20
MAX_LINE_CHARACTERS = 4 << 20
# Thousands of sparse attribute keys travel as one JSON column, not as thousands of columns.
GATHERED = "*attributes"
_SEQUENCE_COLUMNS = ("user", "item", "position", "length")


@dataclass(slots=True)
class Chunk:
    """Columns of consecutive rows.

    `row_number(i)` is the number, from 1, of the chunk's i-th row in its file. `done` is the
    share of the file read so far, in [0, 1].
    """

    table: pa.Table
    row_number: Callable[[int], int]
    done: float


@dataclass(frozen=True, slots=True)
class Layout:
    """What a file turns out to hold: its real format and, where it has any, column names."""

    format: str
    columns: tuple[str, ...]
    delimiter: str = ","

    @property
    def by_folded_name(self) -> dict[str, str]:
        """Returns the columns by their name without case and spaces; the first of equals wins."""
        return {fold(name): name for name in reversed(self.columns)}


def inspect(path: Path, source: Source) -> Layout:
    """Returns the layout of a file from its name and its first lines.

    Raises:
        ImportRefused: FILE_UNREADABLE, with what to do about it.
    """
    if source.format in ("words", "sequences", "json_map"):
        with _opened(path) as stream:
            first = _text(stream).readline(MAX_LINE_CHARACTERS)
        if source.format == "words":
            return Layout("words", source.layouts.get(len(first.split()), ()))
        if source.format == "sequences":
            return Layout("sequences", _SEQUENCE_COLUMNS if len(first.split()) >= 2 else ())
        return Layout("json_map", ("item", "attributes") if first.lstrip().startswith("{") else ())
    name = path.name.lower().removesuffix(".gz")
    chosen = source.format
    if chosen == "auto":
        endings = {".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl"}
        chosen = next((f for ending, f in endings.items() if name.endswith(ending)), "csv")
    if chosen == "parquet":
        return Layout("parquet", tuple(_parquet(path).schema_arrow.names))
    with _opened(path) as stream:
        if chosen == "jsonl":
            return Layout("jsonl", _json_columns(path, stream))
        head = stream.read(1 << 16)
    if b"\x00" in head:
        raise _unreadable(
            path, "holds NUL bytes, so it is no UTF-8 text", "Save it as UTF-8 CSV, or as Parquet"
        )
    lines = head.decode("utf-8-sig", errors="replace").splitlines()
    if not lines:
        raise _unreadable(path, "is empty", "Export it again, with a header line")
    delimiter = source.delimiter or max(",;\t|", key=lambda mark: lines[0].count(mark))
    names = [name.strip() for name in next(csv.reader([lines[0]], delimiter=delimiter))]
    # Two columns of one name: the first keeps it, as `by_folded_name` promises.
    columns = tuple(n if n not in names[:i] else f"{n}#{i}" for i, n in enumerate(names))
    return Layout("csv", columns, delimiter)


def read(
    path: Path, source: Source, layout: Layout, columns: Sequence[str] | None, problems: ProblemLog
) -> Iterator[Chunk]:
    """Yields the wanted columns of a file, chunk by chunk; None stands for all columns.

    Raises:
        ImportRefused: FILE_UNREADABLE when not even the first chunk can be read. Damage further on
            is reported as a problem of the file, and what came before it stays.
    """
    if layout.format == "parquet":
        yield from _read_parquet(path, columns, problems)
    elif layout.format == "csv":
        yield from _read_csv(path, layout, columns, problems)
    elif layout.format == "jsonl":
        yield from _from_records(path, _json_records(path, source.attribute_prefixes, problems), columns)
    elif layout.format == "words":
        yield from _from_records(path, _word_records(path, source, problems), columns)
    elif layout.format == "sequences":
        yield from _read_sequences(path, problems)
    else:
        yield from _from_records(path, _json_map_records(path), columns)


def _read_parquet(path: Path, columns: Sequence[str] | None, problems: ProblemLog) -> Iterator[Chunk]:
    file = _parquet(path)
    total = max(1, file.metadata.num_rows)
    first = 0
    try:
        wanted = list(columns) if columns is not None else None
        for batch in file.iter_batches(batch_size=ROWS_PER_CHUNK, columns=wanted):
            table = pa.Table.from_batches([batch])
            start = first
            first += table.num_rows
            yield Chunk(table, lambda i, start=start: start + i + 1, first / total)  # type: ignore[misc]
    except (pa.ArrowException, OSError) as error:
        _damaged(path, first, error, problems)


@dataclass(slots=True)
class _SkippedRows:
    """Remembers malformed rows, so that the numbers of the good ones stay those of the file."""

    file: str
    problems: ProblemLog
    numbers: list[int] = field(default_factory=list)

    def __call__(self, row: Any) -> str:
        # The reader counts the header as row 1 here; data rows are counted from 1.
        number = (row.number or 1) - 1
        insort(self.numbers, number)
        self.problems.reject(
            RowProblem(
                self.file, number, "", shown(row.text),
                f"has {row.actual_columns} values where the header has {row.expected_columns}",
                "Quote values that hold the delimiter or a line break, or name the `delimiter` in the mapping",
            )
        )  # fmt: skip
        return "skip"

    def number_of(self, index: int) -> int:
        number = index + 1
        for skipped in self.numbers:
            if skipped > number:
                break
            number += 1
        return number


def _read_csv(
    path: Path, layout: Layout, columns: Sequence[str] | None, problems: ProblemLog
) -> Iterator[Chunk]:
    skipped = _SkippedRows(path.name, problems)
    size = max(1, path.stat().st_size)
    first = 0
    try:
        with path.open("rb") as raw:
            stream: Any = gzip.GzipFile(fileobj=raw) if path.suffix.lower() == ".gz" else raw
            reader = pa.csv.open_csv(
                pa.PythonFile(stream, mode="r"),
                # One thread: only then does the reader know the number of a malformed row.
                read_options=pa.csv.ReadOptions(
                    use_threads=False, block_size=CSV_BLOCK_BYTES, column_names=layout.columns, skip_rows=1
                ),
                parse_options=pa.csv.ParseOptions(
                    delimiter=layout.delimiter, newlines_in_values=True, invalid_row_handler=skipped
                ),
                # Bytes first: one name that is not UTF-8 must cost one warning, not the file.
                convert_options=pa.csv.ConvertOptions(
                    check_utf8=False,
                    column_types=dict.fromkeys(layout.columns, pa.binary()),
                    include_columns=list(columns) if columns is not None else None,
                ),
            )
            for batch in reader:
                table = pa.table(
                    {name: _decoded(batch.column(name), path, problems) for name in batch.schema.names}
                )
                start = first
                first += table.num_rows
                done = min(1.0, raw.tell() / size)
                yield Chunk(table, lambda i, start=start: skipped.number_of(start + i), done)  # type: ignore[misc]
    except (pa.ArrowException, OSError, EOFError) as error:
        if "Empty CSV" in str(error):
            return
        _damaged(path, first, error, problems)


def _decoded(column: pa.Array, path: Path, problems: ProblemLog) -> pa.Array:
    try:
        return column.cast(pa.string())
    except pa.ArrowInvalid:
        texts: list[str | None] = []
        foreign = 0
        for value in column.to_pylist():
            try:
                texts.append(None if value is None else value.decode())
            except UnicodeDecodeError:
                # What a browser does with undeclared text: Windows-1252.
                texts.append(value.decode("cp1252", errors="replace"))
                foreign += 1
        problems.note(f"{path.name}: values that are not UTF-8 were read as Windows-1252", foreign)
        return pa.array(texts, pa.string())


@dataclass(slots=True)
class _Record:
    row: int
    values: dict[str, Any]
    done: float


def _from_records(path: Path, records: Iterator[_Record], columns: Sequence[str] | None) -> Iterator[Chunk]:
    rows: list[_Record] = []
    size = ROWS_PER_CHUNK if columns is not None else 4_096
    for record in records:
        rows.append(record)
        if len(rows) == size:
            yield _chunk_of(rows, columns)
            rows = []
    if rows:
        yield _chunk_of(rows, columns)


def _chunk_of(rows: list[_Record], columns: Sequence[str] | None) -> Chunk:
    names = columns if columns is not None else list(dict.fromkeys(k for r in rows for k in r.values))
    arrays = {name: pa.array([_scalar_text(r.values.get(name)) for r in rows], pa.string()) for name in names}
    numbers = [r.row for r in rows]
    return Chunk(pa.table(arrays), numbers.__getitem__, rows[-1].done)


def _scalar_text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, dict)):
        return json.dumps(value, ensure_ascii=False)
    return repr(value) if isinstance(value, float) else str(value)


def _lines(path: Path, problems: ProblemLog) -> Iterator[tuple[int, str, float]]:
    size = max(1, path.stat().st_size)
    number = 0
    try:
        with path.open("rb") as raw:
            stream: Any = gzip.GzipFile(fileobj=raw) if path.suffix.lower() == ".gz" else raw
            for number, line in enumerate(_text(stream), start=1):
                # The position lags behind by a buffer; a progress bar does not mind.
                yield number, line, raw.tell() / size if number % 1_024 == 0 else 0.0
    except (OSError, EOFError) as error:
        _damaged(path, number, error, problems)


def _json_records(path: Path, prefixes: tuple[str, ...], problems: ProblemLog) -> Iterator[_Record]:
    for number, line, done in _lines(path, problems):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            if not isinstance(value, dict):
                raise ValueError("is no JSON object")
        except (ValueError, RecursionError) as error:
            why = error.msg if isinstance(error, json.JSONDecodeError) else str(error) or "nests too deep"
            problems.reject(
                RowProblem(path.name, number, "", shown(line.strip()), f"not a JSON object ({why})",
                           "Write one JSON object a line")
            )  # fmt: skip
            continue
        if prefixes:
            value[GATHERED] = {
                key[len(prefix) :]: content
                for key, content in value.items()
                for prefix in prefixes
                if key.startswith(prefix)
            }
        yield _Record(number, value, done)


def _word_records(path: Path, source: Source, problems: ProblemLog) -> Iterator[_Record]:
    for number, line, done in _lines(path, problems):
        words = line.split()
        if not words:
            continue
        layout = source.layouts.get(len(words))
        if layout is None:
            widths = ", ".join(map(str, sorted(source.layouts)))
            problems.reject(
                RowProblem(path.name, number, "", shown(line.strip()), f"has {len(words)} words",
                           f"A row has one of these many: {widths}")
            )  # fmt: skip
            continue
        yield _Record(number, dict(zip(layout, words, strict=True)), done)


def _json_map_records(path: Path) -> Iterator[_Record]:
    try:
        with _opened(path) as stream:
            document = json.load(_text(stream))
    except (OSError, EOFError, ValueError, RecursionError) as error:
        raise _unreadable(
            path, f"is no JSON ({error})", "It must be one object: item id to a list"
        ) from error
    if not isinstance(document, dict):
        raise _unreadable(path, "is no JSON object", "It must be one object: item id to a list")
    for number, (item, attributes) in enumerate(document.items(), start=1):
        yield _Record(number, {"item": item, "attributes": attributes}, number / len(document))


def _read_sequences(path: Path, problems: ProblemLog) -> Iterator[Chunk]:
    users: list[str] = []
    items: list[str] = []
    positions: list[int] = []
    lengths: list[int] = []
    numbers: list[int] = []
    for number, line, done in _lines(path, problems):
        words = line.split()
        if not words:
            continue
        if len(words) == 1:
            problems.reject(
                RowProblem(path.name, number, "", shown(words[0]), "a user without items",
                           "Write `user item item …`, oldest first")
            )  # fmt: skip
            continue
        length = len(words) - 1
        users += [words[0]] * length
        items += words[1:]
        positions += range(length)
        lengths += [length] * length
        numbers += [number] * length
        if len(users) >= ROWS_PER_CHUNK:
            yield _sequence_chunk(users, items, positions, lengths, numbers, done)
            users, items, positions, lengths, numbers = [], [], [], [], []
    if users:
        yield _sequence_chunk(users, items, positions, lengths, numbers, 1.0)


def _sequence_chunk(
    users: list[str],
    items: list[str],
    positions: list[int],
    lengths: list[int],
    numbers: list[int],
    done: float,
) -> Chunk:
    table = pa.table({"user": users, "item": items, "position": positions, "length": lengths})
    return Chunk(table.append_column("line", pa.array(numbers)), numbers.__getitem__, done)


def _json_columns(path: Path, stream: IO[bytes]) -> tuple[str, ...]:
    names: dict[str, None] = {}
    first = ""
    for _, line in zip(range(200), _text(stream), strict=False):
        first = first or line.strip()
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            names.update(dict.fromkeys(map(str, value)))
    if not names:
        remedy = "Write one JSON object a line" + (" (this is one list)" if first.startswith("[") else "")
        raise _unreadable(path, "has no JSON object in its first lines", remedy)
    return tuple(names)


def _parquet(path: Path) -> pa.parquet.ParquetFile:
    try:
        return pa.parquet.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, f"is no Parquet file ({_first_line(error)})", "Export it again") from error


def _opened(path: Path) -> IO[bytes]:
    try:
        if path.suffix.lower() == ".gz":
            stream = gzip.GzipFile(path, "rb")
            stream.peek(1)
            return cast("IO[bytes]", stream)
        return path.open("rb")
    except (OSError, EOFError) as error:
        raise _unreadable(
            path, f"cannot be opened ({_first_line(error)})", "Check its path and permissions"
        ) from error


def _text(stream: IO[bytes]) -> io.TextIOWrapper:
    return io.TextIOWrapper(stream, encoding="utf-8-sig", errors="replace", newline="\n")


def _damaged(path: Path, rows: int, error: BaseException, problems: ProblemLog) -> None:
    if rows == 0:
        raise _unreadable(
            path, f"cannot be read ({_first_line(error)})", "Export or download it again"
        ) from error
    problems.reject(
        RowProblem(path.name, 0, "", "", f"is damaged after row {rows} ({_first_line(error)})",
                   "The rows before it were read; export or download the file again and import it once more")
    )  # fmt: skip


def _unreadable(path: Path, problem: str, remedy: str) -> ImportRefused:
    return ImportRefused("FILE_UNREADABLE", f"{path}: {problem}. {remedy}.", {"file": path.name})


def _first_line(error: BaseException) -> str:
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0][:200]
