"""What went wrong with which row, counted in full and kept as a sample.

A bad row never stops an import. Each one is named with its file, its row, the
field and value at fault and the remedy; beyond the sample only the count grows,
so a file of a billion bad rows costs no memory.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from shared.errors import ShopkeeperError

SAMPLES_PER_PROBLEM = 3
SHOWN_VALUE_CHARACTERS = 60


class ImportRefused(ShopkeeperError):
    """A file or a mapping that nothing can be read with: the whole import stops (exit code 2)."""


@dataclass(frozen=True, slots=True)
class RowProblem:
    """One rejected row.

    `row` counts data rows from 1 (a CSV header is not a row); 0 stands for the whole file.
    """

    file: str
    row: int
    field: str
    value: str
    problem: str
    remedy: str

    def __str__(self) -> str:
        where = f"{self.file}, row {self.row}" if self.row else self.file
        named = f"{self.field} = {self.value!r}" if self.value else self.field
        what = f"{named}: " if named else ""
        return f"{where}: {what}{self.problem}. {self.remedy}"


@dataclass(slots=True)
class ProblemLog:
    """Counts rejected rows and rows left out on purpose, with samples of the former."""

    rejected: Counter[tuple[str, str]] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    samples: list[RowProblem] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)

    @property
    def rejected_rows(self) -> int:
        """Returns how many rows were rejected because something is wrong with them."""
        return sum(self.rejected.values())

    @property
    def left_out_rows(self) -> int:
        """Returns how many rows the mapping leaves out on purpose."""
        return sum(self.left_out.values())

    def reject(self, problem: RowProblem, count: int = 1) -> None:
        """Counts `count` rows that share one problem and keeps the given one as a sample."""
        key = (problem.field, problem.problem)
        if self.rejected[key] < SAMPLES_PER_PROBLEM:
            self.samples.append(problem)
        self.rejected[key] += count

    def wants_sample(self, field_name: str, problem: str) -> bool:
        """Returns whether another example of this problem would be kept."""
        return self.rejected[(field_name, problem)] < SAMPLES_PER_PROBLEM

    def leave_out(self, reason: str, count: int = 1) -> None:
        """Counts rows that the mapping drops; they are no errors."""
        if count:
            self.left_out[reason] += count

    def note(self, text: str, count: int = 1) -> None:
        """Counts something worth telling that costs no row."""
        if count:
            self.notes[text] += count


def shown(value: object) -> str:
    """Returns a value as it may stand in a message: one line, no control characters, shortened."""
    text = "" if value is None else str(value)
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    return text if len(text) <= SHOWN_VALUE_CHARACTERS else text[: SHOWN_VALUE_CHARACTERS - 1] + "…"
