"""Imports: requests to sources, files to events at the door, and what is told of it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING
from zoneinfo import ZoneInfo

from google.protobuf import json_format
from shopkeeper.feedback.v1 import event_pb2, feedback_service_pb2, import_pb2

from services.feedback.converters.events import EventReader
from services.feedback.converters.people import to_timestamp
from services.feedback.domain.events import RowReason, RowStatus
from services.feedback.domain.imports import MAX_SAMPLES, Import, ImportPart, RowSample
from shared.errors import FieldViolation, InvalidInput
from shared.event_kinds import EventKind
from shared.tokens import TokenSigner

if TYPE_CHECKING:
    from shared.importing.data_set import DataSet
    from shared.importing.mapping import FieldRule, Source

MAX_PATH, MAX_REQUEST_ID, MAX_COLUMN = 1_024, 128, 256
DEFAULT_PAGE, MAX_PAGE = 20, 100
MAPPING_NAME = "import"
_PAGE_TOKEN = "imports-page"  # noqa: S105 - what the token is for
_NO_KIND = "(no kind)"
_FORMATS = {
    import_pb2.IMPORT_FORMAT_UNSPECIFIED: "auto",
    import_pb2.IMPORT_FORMAT_CSV: "csv",
    import_pb2.IMPORT_FORMAT_JSON_LINES: "jsonl",
    import_pb2.IMPORT_FORMAT_PARQUET: "parquet",
}
_UNITS = {"epoch_seconds": "s", "epoch_milliseconds": "ms"}
_ORDERS = (EventKind.PURCHASE, EventKind.RETURN)


# Requests


def from_import_events(request: feedback_service_pb2.ImportEventsRequest) -> tuple[str, str]:
    """Returns the source, as JSON, and the caller's request id.

    Raises:
        InvalidInput: names every field that is wrong.
    """
    problems: list[tuple[str, str]] = []
    source = request.source
    if len(request.request_id) > MAX_REQUEST_ID or "\x00" in request.request_id:
        problems.append(("request_id", f"must be at most {MAX_REQUEST_ID} characters, without NUL"))
    _check_path(source.path, "source.path", problems)
    if source.format not in _FORMATS:
        problems.append(("source.format", "is no format of this contract"))
    chosen = source.WhichOneof("mapping_source")
    if chosen is None:
        problems.append(("source.mapping", "is required; set it, or mapping_path"))
    elif chosen == "mapping_path":
        _check_path(source.mapping_path, "source.mapping_path", problems)
    else:
        _check_mapping(source.mapping, problems)
    if problems:
        raise _invalid(problems)
    return json_format.MessageToJson(source, indent=None), request.request_id


def _check_path(path: str, field: str, problems: list[tuple[str, str]]) -> None:
    if not 1 <= len(path) <= MAX_PATH:
        problems.append((field, f"must be 1 to {MAX_PATH} characters"))
    elif path.startswith(("/", "~")) or ".." in re.split(r"[/\\]", path) or not path.isprintable():
        problems.append((field, "must be a path below the import directory, without `..`"))


def _check_mapping(mapping: import_pb2.ColumnMapping, problems: list[tuple[str, str]]) -> None:
    path = "source.mapping"
    for field in mapping.DESCRIPTOR.fields:
        if field.name.endswith("_column"):
            column = getattr(mapping, field.name)
            if len(column) > MAX_COLUMN or (column and not column.isprintable()):
                problems.append(
                    (f"{path}.{field.name}", f"must be at most {MAX_COLUMN} printable characters")
                )
    for name in ("user_id_column", "occurred_at_column"):
        if not getattr(mapping, name):
            problems.append((f"{path}.{name}", "is required"))
    if len(mapping.occurred_at_format) > 128 or "\x00" in mapping.occurred_at_format:
        problems.append(
            (f"{path}.occurred_at_format", "must be a strptime pattern of at most 128 characters")
        )
    if mapping.time_zone:
        try:
            ZoneInfo(mapping.time_zone)
        except (KeyError, ValueError, OSError):
            problems.append((f"{path}.time_zone", "is no IANA time zone such as Europe/London"))
    if mapping.currency_code and not re.fullmatch(r"[A-Z]{3}", mapping.currency_code):
        problems.append((f"{path}.currency_code", "must be three letters of ISO 4217, such as EUR"))
    if mapping.price_column and not mapping.currency_code:
        problems.append((f"{path}.currency_code", "is required with price_column"))
    if not mapping.kind_column and not mapping.default_kind:
        problems.append((f"{path}.kind_column", "is required, or default_kind"))
    if len(mapping.kind_values) > 100:
        problems.append((f"{path}.kind_values", "must be at most 100"))
    importable = _importable()
    if mapping.default_kind and mapping.default_kind not in importable:
        problems.append((f"{path}.default_kind", "cannot be told by the columns of a file; send such events"))
    for index, entry in enumerate(mapping.kind_values):
        if entry.kind not in importable:
            problems.append((f"{path}.kind_values[{index}].kind", "cannot be told by the columns of a file"))
        if not entry.value or len(entry.value) > MAX_COLUMN:
            problems.append((f"{path}.kind_values[{index}].value", f"must be 1 to {MAX_COLUMN} characters"))
    kinds = _kinds_of(mapping)
    if not mapping.item_id_column and any(
        kind not in (EventKind.SEARCH, EventKind.PAGE_VIEW) for kind in kinds
    ):
        problems.append((f"{path}.item_id_column", "is required: these kinds are about an item"))
    if EventKind.REVIEW in kinds and not mapping.text_column:
        problems.append((f"{path}.text_column", "is required for reviews"))
    if EventKind.SEARCH in kinds and not mapping.text_column:
        problems.append((f"{path}.text_column", "is required for searches: it holds their words"))
    if EventKind.RATING in kinds and not mapping.stars_column:
        problems.append((f"{path}.stars_column", "is required for ratings"))


def _importable() -> set[int]:
    from shared.importing.mapping import KINDS

    return {int(kind) for kind in KINDS.values()}


def _kinds_of(mapping: import_pb2.ColumnMapping) -> set[int]:
    kinds = {int(entry.kind) for entry in mapping.kind_values}
    if mapping.kind_column and not kinds:
        kinds = _named_kinds(mapping)
    return kinds | ({int(mapping.default_kind)} if mapping.default_kind else set())


def _named_kinds(mapping: import_pb2.ColumnMapping) -> set[int]:
    """Returns the kinds that a file may name by themselves, as far as its columns can tell them."""
    without = set() if mapping.text_column else {int(EventKind.REVIEW), int(EventKind.SEARCH)}
    if not mapping.stars_column:
        without.add(int(EventKind.RATING))
    return _importable() - without


def from_list_imports(
    request: feedback_service_pb2.ListImportsRequest, signer: TokenSigner
) -> tuple[tuple[datetime, str] | None, int]:
    """Returns after which import the page begins, and how long it is; raises InvalidInput."""
    if request.page_size < 0:
        raise _invalid([("page_size", "must be 0 to 100")])
    limit = min(request.page_size or DEFAULT_PAGE, MAX_PAGE)
    if not request.page_token:
        return None, limit
    created_at, import_id = json.loads(signer.verify(_PAGE_TOKEN, request.page_token))
    return (datetime.fromisoformat(created_at), import_id), limit


def to_list_imports(
    imports: Sequence[Import], limit: int, signer: TokenSigner
) -> feedback_service_pb2.ListImportsResponse:
    """Returns a page; `imports` may hold one more than `limit`, as a sign that there is another page."""
    token = ""
    if len(imports) > limit:
        last = imports[limit - 1]
        token = signer.sign(_PAGE_TOKEN, json.dumps([last.created_at.isoformat(), last.import_id]).encode())
    return feedback_service_pb2.ListImportsResponse(
        imports=[to_import(one) for one in imports[:limit]], next_page_token=token
    )


def to_import(one: Import) -> import_pb2.Import:
    """Returns an import as the contract says it."""
    progress = one.progress
    return import_pb2.Import(
        import_id=one.import_id,
        state=import_pb2.ImportState.ValueType(int(one.state)),
        source=json_format.Parse(one.source, import_pb2.ImportSource()),
        read_row_count=progress.read_rows,
        total_row_count=progress.total_rows,
        stored_count=progress.stored_rows,
        duplicate_count=progress.duplicate_rows,
        quarantined_count=progress.quarantined_rows,
        rejected_count=progress.refused_rows + progress.unreadable_rows,
        error_samples=[
            import_pb2.ImportErrorSample(
                row_number=sample.row_number,
                result=event_pb2.EventResult(
                    status=event_pb2.EventStatus.ValueType(int(sample.status)),
                    reason=event_pb2.EventReason.ValueType(int(sample.reason)),
                    field=sample.column,
                    message=sample.message,
                ),
            )
            for sample in progress.samples
        ],
        failure=one.failure,
        create_time=to_timestamp(one.created_at),
        end_time=to_timestamp(one.ended_at) if one.ended_at else None,
    )


# Files


class ImportDirectory:
    """The ImportFiles of a directory: nothing outside of it can be reached, not by links either.

    Args:
        directory: need not exist before somebody imports.
        reader: the door.
    """

    def __init__(self, directory: Path, reader: EventReader) -> None:
        self._directory = directory
        self._reader = reader

    def open(self, source: str, created_at: datetime) -> OpenedFile:
        """Opens the file of a source.

        Raises:
            InvalidInput: it is not there, cannot be read, or the mapping does not fit.
        """
        # Arrow takes its time and 60 MB: a service that imports nothing pays nothing.
        from shared.importing.data_set import DataSet, SourceFile, open_data_set
        from shared.importing.mapping import DataSetMapping
        from shared.importing.problems import ImportRefused
        from shared.importing.readers import inspect

        asked = json_format.Parse(source, import_pb2.ImportSource())
        path = self._within(asked.path, "source.path")
        now_us = int(created_at.timestamp() * 1e6)
        try:
            if asked.WhichOneof("mapping_source") == "mapping_path":
                mapping_path = self._within(asked.mapping_path, "source.mapping_path")
                found = open_data_set(path, f"{mapping_path.parent}/{mapping_path.name}", now_us)
                files = tuple(
                    replace(file, source=replace(file.source, derive_items=False))
                    for file in found.files
                    if file.source.role == "events"
                )
                if not files:
                    raise ImportRefused("MAPPING_MISFIT", "the mapping reads no events from this file")
                data_set = DataSet(found.mapping, files, now_us)
            else:
                rules = _source_of(asked)
                layout = inspect(path, rules)
                _check_columns(rules.fields, layout.by_folded_name, layout.columns)
                mapping = DataSetMapping(MAPPING_NAME, MAPPING_NAME, (rules,))
                data_set = DataSet(mapping, (SourceFile(path, rules, layout),), now_us)
        except ImportRefused as error:
            # Where the directory lies is nobody's business outside.
            message = error.message.replace(f"{self._directory.resolve()}/", "")
            raise InvalidInput(
                "IMPORT_REFUSED", message, dict(error.metadata), [FieldViolation("source", message)]
            ) from error
        return OpenedFile(path, data_set, self._reader)

    def _within(self, relative: str, field: str) -> Path:
        root = self._directory.resolve()
        path = (root / relative).resolve()
        if not path.is_relative_to(root) or not path.is_file():
            problem = "is no file below the service's import directory (SHOPKEEPER_IMPORT_DIRECTORY)"
            raise _invalid([(field, problem)], reason="IMPORT_REFUSED")
        return path


class OpenedFile:
    """The ImportFile of a data set of one file."""

    def __init__(self, path: Path, data_set: DataSet, reader: EventReader) -> None:
        self._path = path
        self._data_set = data_set
        self._reader = reader

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the file's bytes."""
        with self._path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").digest()

    @cached_property
    def total_rows(self) -> int:
        """Rows of the file; 0 for forms that do not say."""
        if self._data_set.files[0].layout.format != "parquet":
            return 0
        import pyarrow.parquet

        return int(pyarrow.parquet.ParquetFile(self._path).metadata.num_rows)

    def parts(self) -> Iterator[ImportPart]:
        """Yields the events from the first, in the same parts each time."""
        from shared.importing.upload import event_messages

        for batch in self._data_set.events():
            lines = (batch.offsets[1:] - batch.offsets[:-1]).tolist()
            read, unreadable, samples, _ = self.remainder()
            yield ImportPart(
                self._reader.read(event_messages(batch)),
                batch.row_numbers.tolist(),
                [max(1, count) for count in lines],
                read,
                unreadable,
                samples,
            )

    def remainder(self) -> tuple[int, int, Sequence[RowSample], str]:
        """Returns rows read, rows that did not become events, samples of these, and what cut the file short."""
        problems = self._data_set.problems
        samples: list[RowSample] = []
        damage, damages = "", 0
        for problem in problems.samples:
            if problem.row == 0:
                damage, damages = f"{problem.file} {problem.problem}. {problem.remedy}.", damages + 1
            elif len(samples) < MAX_SAMPLES:
                message = f"{problem.problem[:1].upper()}{problem.problem[1:]}. {problem.remedy}."
                samples.append(
                    RowSample(
                        problem.row, RowStatus.REJECTED, _reason(problem.problem), problem.field, message
                    )
                )
        return self._data_set.rows, problems.rejected_rows - damages, samples, damage


def _reason(problem: str) -> RowReason:
    if problem == "is missing":
        return RowReason.REQUIRED
    if "longer than" in problem:
        return RowReason.TOO_LONG
    if problem.startswith(("is before", "is in the future", "is not above", "is below", "is above")):
        return RowReason.OUT_OF_RANGE
    return RowReason.MALFORMED


def _source_of(asked: import_pb2.ImportSource) -> Source:
    from shared.importing.mapping import FieldRule, Source

    mapping = asked.mapping
    fields: dict[str, FieldRule] = {}
    for name, column, required in (
        ("user", mapping.user_id_column, True),
        ("item", mapping.item_id_column, True),
        ("kind", mapping.kind_column, True),
        ("quantity", mapping.quantity_column, True),
        ("price", mapping.price_column, True),
        ("value", mapping.stars_column, True),
        ("order", mapping.order_id_column, True),
        ("session", mapping.session_id_column, True),
        ("event_id", mapping.event_id_column, True),
        ("text", mapping.text_column, True),
        ("query", mapping.text_column, True),
    ):
        if column:
            fields[name] = FieldRule(columns=(column,), required=required)
    kinds = _kinds_of(mapping)
    if EventKind.SEARCH not in kinds:
        fields.pop("query", None)
    if EventKind.REVIEW not in kinds:
        fields.pop("text", None)
    # A file of searches alone has no items.
    fields.setdefault("item", FieldRule(constant="-"))
    form = mapping.occurred_at_format
    fields["time"] = FieldRule(
        columns=(mapping.occurred_at_column,),
        formats=(form,) if form and form not in _UNITS else (),
        unit=_UNITS.get(form),
    )
    if mapping.currency_code:
        fields["currency"] = FieldRule(constant=mapping.currency_code)
    kind, values = None, {}
    if mapping.kind_column:
        values = {entry.value: EventKind(entry.kind) for entry in mapping.kind_values} or {
            EventKind(known).name.lower(): EventKind(known) for known in _named_kinds(mapping)
        }
        if mapping.default_kind:
            fields["kind"] = replace(fields["kind"], constant=_NO_KIND)
            values[_NO_KIND] = EventKind(mapping.default_kind)
    else:
        kind = EventKind(mapping.default_kind)
    return Source(
        role="events",
        files=("*",),
        format=_FORMATS[asked.format],
        fields=fields,
        kind=kind,
        kind_values=values,
        negative_quantity_is_return=True,
        group_by_order=bool(mapping.order_id_column) and kinds <= {int(one) for one in _ORDERS},
        timezone=ZoneInfo(mapping.time_zone or "UTC"),
        derive_items=False,
    )


def _check_columns(
    rules: Mapping[str, FieldRule], available: Mapping[str, str], columns: Sequence[str]
) -> None:
    from shared.importing.mapping import nearest
    from shared.importing.problems import ImportRefused

    for rule in rules.values():
        if rule.columns and rule.pick(available) is None:
            raise ImportRefused(
                "MAPPING_MISFIT",
                f"the file has no column {rule.columns[0]!r}. {nearest(rule.columns[0], columns)}",
            )


def _invalid(problems: Sequence[tuple[str, str]], reason: str = "INVALID_ARGUMENT") -> InvalidInput:
    violations = [FieldViolation(field, f"{problem}.") for field, problem in problems]
    message = " ".join(f"{field} {problem}." for field, problem in problems)
    return InvalidInput(reason, message, violations=violations)
