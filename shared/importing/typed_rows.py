"""Text columns to typed columns, a whole column at a time; bad values are named, row by row.

Strings are parsed once per distinct value, not once per row: half a million rows of an
order log hold twenty thousand distinct times.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from shared.identity import MAX_ID_CHARACTERS
from shared.importing.mapping import FieldRule
from shared.importing.problems import ProblemLog, RowProblem, shown
from shared.importing.readers import Chunk

Mask = NDArray[np.bool_]
# The log does not believe older events (feedback/v1/event.proto).
EARLIEST_US = 946_684_800_000_000
MICROS = 1_000_000
MAX_PRICE = 1e9
MAX_QUANTITY = 1e6
_CONTROL = r"[\x00-\x1f\x7f]"


@dataclass(slots=True)
class Columns:
    """The fields of one chunk as Arrow columns of the file's own types, and which rows still stand.

    A row that a check rejects is cleared from `keep`; later checks do not report it again.
    """

    file: str
    chunk: Chunk
    fields: dict[str, pa.Array]
    names: dict[str, str]
    keep: Mask
    problems: ProblemLog

    def reject(self, bad: Mask, field: str, values: pa.Array | None, problem: str, remedy: str) -> None:
        """Rejects the rows of `bad` that still stand; names the first few."""
        rows = np.flatnonzero(bad & self.keep)
        if rows.size == 0:
            return
        column = self.names.get(field, field)
        for n, row in enumerate(rows):
            rest = int(rows.size - n)
            sampled = self.problems.wants_sample(column, problem)
            value = shown(values[int(row)].as_py()) if values is not None else ""
            number = self.chunk.row_number(int(row))
            self.problems.reject(
                RowProblem(self.file, number, column, value, problem, remedy), 1 if sampled else rest
            )
            if not sampled:
                break
        self.keep[rows] = False

    def leave_out(self, rows: Mask, reason: str) -> None:
        """Leaves out rows on purpose."""
        left = rows & self.keep
        self.problems.leave_out(reason, int(left.sum()))
        self.keep[left] = False


def columns_of(
    chunk: Chunk,
    file: str,
    rules: Mapping[str, FieldRule],
    by_folded_name: Mapping[str, str],
    problems: ProblemLog,
) -> Columns:
    """Returns a chunk's columns by the field that the mapping gives them."""
    fields: dict[str, pa.Array] = {}
    names: dict[str, str] = {}
    for field, rule in rules.items():
        column = rule.pick(by_folded_name)
        if column is not None:
            array = chunk.table[column]
            fields[field] = array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array
            names[field] = column
            if rule.constant is not None:
                fields[field] = pc.fill_null(as_text(fields[field]), rule.constant)
        elif rule.constant is not None:
            fields[field] = pa.array([rule.constant] * chunk.table.num_rows, pa.string())
            names[field] = field
    return Columns(file, chunk, fields, names, np.ones(chunk.table.num_rows, bool), problems)


def as_text(array: pa.Array) -> pa.Array:
    """Returns a column as trimmed text; empty values are null; 17850.0 of a float column is "17850"."""
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if pa.types.is_floating(array.type):
        whole = pc.equal(array, pc.round(array))
        texts = pc.if_else(
            pc.and_(whole, pc.less(pc.abs(array), 9e15)),
            pc.cast(pc.cast(pc.if_else(whole, array, 0.0), pa.int64(), safe=False), pa.string()),
            pc.cast(array, pa.string()),
        )
        return pc.if_else(pc.is_nan(array), pa.scalar(None, pa.string()), texts)
    if pa.types.is_binary(array.type) or pa.types.is_large_binary(array.type):
        array = pa.array(
            [None if v is None else v.decode("utf-8", "replace") for v in array.to_pylist()], pa.string()
        )
    elif not pa.types.is_string(array.type):
        try:
            array = array.cast(pa.string())
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            array = pa.array([None if v is None else str(v) for v in array.to_pylist()], pa.string())
    trimmed = pc.utf8_trim_whitespace(array)
    return pc.if_else(pc.equal(trimmed, ""), pa.scalar(None, pa.string()), trimmed)


def whole_ids(array: pa.Array) -> pa.Array:
    """Returns ids as text in which 17850.0 is 17850: tables with gaps are exported that way."""
    return pc.replace_substring_regex(as_text(array), r"^(\d+)\.0$", r"\1")


def checked_ids(columns: Columns, field: str, *, missing_remedy: str) -> pa.Array:
    """Returns the ids of a field; missing, too long ones and those with control characters reject their row."""
    ids = as_text(columns.fields[field])
    columns.reject(_mask(pc.is_null(ids)), field, None, "is missing", missing_remedy)
    too_long = pc.greater(pc.utf8_length(ids), MAX_ID_CHARACTERS)
    columns.reject(
        _mask(too_long), field, ids, f"is longer than {MAX_ID_CHARACTERS} characters", "Send a shorter id"
    )
    control = pc.match_substring_regex(ids, _CONTROL)
    columns.reject(_mask(control), field, ids, "has a control character", "Remove it from the file")
    return ids


def parsed_numbers(
    columns: Columns, field: str, *, scale: float = 1.0, lowest: float, highest: float, missing: float | None
) -> NDArray[np.float64]:
    """Returns a field as float64, in [lowest, highest]; null is `missing`, or NaN where that is None."""
    array = columns.fields[field]
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    is_number = (
        pa.types.is_integer(array.type) or pa.types.is_floating(array.type) or pa.types.is_decimal(array.type)
    )
    if is_number:
        numbers = np.asarray(pc.cast(array, pa.float64()).to_numpy(zero_copy_only=False), np.float64)
        if pa.types.is_float32(array.type):
            # 2.55 stored as float32 reads back 2.549999952; seven digits are what it holds.
            numbers = _seven_digits(numbers)
        null = _mask(pc.is_null(array)) | np.isnan(numbers)
    else:
        texts = as_text(array)
        numbers = _by_distinct_value(texts, _number, np.nan)
        null = _mask(pc.is_null(texts))
        columns.reject(
            np.isnan(numbers) & ~null, field, texts, "is no number", "Write digits with a point, such as 12.5"
        )
    numbers = numbers * scale
    with np.errstate(invalid="ignore"):
        outside = (numbers < lowest) | (numbers > highest)
    columns.reject(
        outside & ~null,
        field,
        array,
        f"is outside [{lowest:g}, {highest:g}]",
        "Correct the value, or drop such rows",
    )
    return np.where(null, np.nan if missing is None else missing, numbers)


def parsed_times(
    columns: Columns, field: str, rule: FieldRule, zone: ZoneInfo, now_us: int
) -> NDArray[np.int64]:
    """Returns a field as microseconds since 1970 UTC; times before 2000 or after `now_us` reject their row.

    Naive times are wall-clock times in `zone`. Texts are ISO 8601 or one of the rule's strptime
    formats. Numbers are since 1970, in the rule's unit, else seconds, milliseconds or microseconds
    by their size.
    """
    array = columns.fields[field]
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if pa.types.is_date(array.type):
        array = array.cast(pa.timestamp("us"))
    if pa.types.is_timestamp(array.type):
        if array.type.tz is None:
            array = pc.assume_timezone(
                array.cast(pa.timestamp("us")), zone.key, ambiguous="earliest", nonexistent="latest"
            )
        times = array.cast(pa.timestamp("us", "UTC")).cast(pa.int64())
        null = _mask(pc.is_null(times))
        micros = np.asarray(pc.fill_null(times, -1).to_numpy(zero_copy_only=False), np.int64)
        shown_values: pa.Array = array
    elif pa.types.is_integer(array.type) or pa.types.is_floating(array.type):
        null = _mask(pc.is_null(array))
        numbers = np.nan_to_num(
            np.asarray(pc.cast(array, pa.float64()).to_numpy(zero_copy_only=False), np.float64), nan=-1.0
        )
        micros = _since_epoch(numbers, rule.unit)
        shown_values = array
    else:
        shown_values = as_text(array)
        null = _mask(pc.is_null(shown_values))
        parse = _time_parser(rule, zone)
        parsed = _by_distinct_value(shown_values, parse, np.nan)
        formats = " or ".join(rule.formats) or "ISO 8601, such as 2026-01-31T15:59:54Z"
        columns.reject(
            np.isnan(parsed) & ~null, field, shown_values, "is no date and time", f"Write it as {formats}"
        )
        micros = np.nan_to_num(parsed, nan=-1.0).astype(np.int64)
    columns.reject(null, field, None, "is missing", "Every event needs its time")
    micros = micros + rule.shift_days * 86_400 * MICROS
    columns.reject(
        micros < EARLIEST_US,
        field,
        shown_values,
        "is before the year 2000",
        "Correct the value or its unit, or move old times with `shift_days`",
    )
    columns.reject(micros > now_us, field, shown_values, "is in the future", "Correct the value or its unit")
    return micros


def _time_parser(rule: FieldRule, zone: ZoneInfo) -> Callable[[str], float]:
    def parse(text: str) -> float:
        if rule.unit is not None or re.fullmatch(r"\d{9,19}(\.\d+)?", text):
            try:
                return float(_since_epoch(np.array([float(text)]), rule.unit)[0])
            except (ValueError, OverflowError):
                return math.nan
        moment: datetime | None = None
        # A mapping that names formats means them: ISO would read 19970101 too, but not 01021997.
        for pattern in rule.formats:
            try:
                moment = datetime.strptime(text, pattern)
                break
            except ValueError:
                continue
        if moment is None:
            # "2019-10-01 00:00:00 UTC" is common, and not quite ISO 8601.
            iso = re.sub(r"\s*(UTC|GMT|Z)$", "+00:00", text)
            try:
                moment = datetime.fromisoformat(iso)
            except ValueError:
                return math.nan
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=zone)
        try:
            since = moment.astimezone(UTC) - datetime(1970, 1, 1, tzinfo=UTC)
        except OverflowError:
            return math.nan
        return float((since.days * 86_400 + since.seconds) * MICROS + since.microseconds)

    return parse


def _since_epoch(numbers: NDArray[np.float64], unit: str | None) -> NDArray[np.int64]:
    if unit is not None:
        factor = np.full(numbers.shape, {"s": 1e6, "ms": 1e3, "us": 1.0}[unit])
    else:
        factor = np.where(numbers < 1e11, 1e6, np.where(numbers < 1e14, 1e3, 1.0))
    return np.clip(np.rint(numbers * factor), -1, 9e18).astype(np.int64)


def _number(text: str) -> float:
    # Python would also read "1_000", "nan" and Arabic digits; a price list should not.
    return (
        float(text)
        if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?", text, re.ASCII)
        else math.nan
    )


def _by_distinct_value(texts: pa.Array, parse: Callable[[str], float], null: float) -> NDArray[np.float64]:
    encoded = texts.dictionary_encode()
    values = np.array([parse(text) for text in encoded.dictionary.to_pylist()] + [null], np.float64)
    codes = pc.fill_null(encoded.indices, len(values) - 1).to_numpy(zero_copy_only=False)
    return values[codes]


def _seven_digits(numbers: NDArray[np.float64]) -> NDArray[np.float64]:
    with np.errstate(divide="ignore", invalid="ignore"):
        digits = np.where(numbers == 0, 0, 6 - np.floor(np.log10(np.abs(numbers))))
    power = 10.0 ** np.clip(np.nan_to_num(digits), 0, 6)
    rounded = np.rint(numbers * power) / power
    return np.where(np.isfinite(rounded), rounded, numbers)


def _mask(array: pa.Array) -> Mask:
    return np.asarray(pc.fill_null(array, False).to_numpy(zero_copy_only=False), bool)
