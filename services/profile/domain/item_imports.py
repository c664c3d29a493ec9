"""A file on its way into the catalogue, and how far it has come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from services.profile.domain.items import ItemWrite
from shared.operations import OperationState

MAX_SAMPLES = 100


@dataclass(frozen=True, slots=True)
class RejectedRow:
    """A row that was not taken: its number from 1, and every problem as (column, what is wrong)."""

    row_number: int
    violations: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class ItemImportProgress:
    """What has become of the rows so far; `done` is the share of the file, in [0, 1]."""

    read_rows: int = 0
    stored_rows: int = 0
    superseded_rows: int = 0
    rejected_rows: int = 0
    rejected: tuple[RejectedRow, ...] = ()
    done: float = 0.0

    def after(self, part: ItemPart, stored: int, superseded: int) -> ItemImportProgress:
        """Returns the progress once a part is written."""
        return replace(
            self,
            read_rows=self.read_rows + part.row_count,
            stored_rows=self.stored_rows + stored,
            superseded_rows=self.superseded_rows + superseded,
            rejected_rows=self.rejected_rows + part.rejected_count,
            rejected=(*self.rejected, *part.rejected)[:MAX_SAMPLES],
            done=part.done,
        )


@dataclass(frozen=True, slots=True)
class ItemPart:
    """Some consecutive rows of a file.

    Attributes:
        rejected: the first rows of this part that cannot be taken.
        damage: what cut the file short behind this part; empty where nothing did.
    """

    writes: Sequence[ItemWrite]
    row_count: int
    rejected_count: int
    rejected: Sequence[RejectedRow]
    done: float
    damage: str = ""


@dataclass(frozen=True, slots=True)
class ItemImport:
    """An import.

    Attributes:
        source: what was asked for, as the contract encodes it.
        write_time_us: the time of every write of it, so that running it twice changes nothing.
        created_us, ended_us: microseconds since 1970.
    """

    import_id: str
    source: bytes
    state: OperationState
    write_time_us: int
    created_us: int
    progress: ItemImportProgress = ItemImportProgress()
    failure_reason: str = ""
    failure_message: str = ""
    cancel_requested: bool = False
    ended_us: int | None = None
