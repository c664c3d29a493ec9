"""Day files: the log's events as Parquet, a day of `occurred_at` a directory, every file named by its digest.

A set is a list of files and the watermark of the log that they hold. Files are never changed: what is new is a further
file of its day, and a day that must forget somebody is written anew. `CURRENT` names the newest set and is replaced by one
rename after everything it lists is on disk: whoever is killed at any point leaves the set before. Files hold user
keys, never raw ids. E = events.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from shared.bundle.registry import write_atomically

CURRENT = "CURRENT"
_FORMAT = 1
DAY_MICROSECONDS = 86_400_000_000
SCHEMA = pa.schema(
    [
        ("event_key", pa.binary(16)),
        ("user_key", pa.binary(16)),
        ("item_id", pa.string()),
        ("kind", pa.int16()),
        ("time", pa.int64()),
        ("line", pa.int16()),
    ]
)


class DamagedFile(Exception):
    """A day file is missing, or its digest does not fit. `day` says which must be read again."""

    def __init__(self, day: int) -> None:
        super().__init__(day)
        self.day = day


@dataclass(frozen=True, slots=True)
class SnapshotFile:
    """A file of a day: digest of its bytes, which names it, and its rows."""

    sha256: str
    rows: int


@dataclass(frozen=True, slots=True)
class SnapshotSet:
    """Files that together are the log as of a watermark.

    Attributes:
        watermark: `pg_snapshot`, as text.
        days: files by day since 1970, in the order in which they are read.
    """

    watermark: str
    days: Mapping[int, Sequence[SnapshotFile]]

    @property
    def digest(self) -> str:
        """Identifies the set: equal digests, equal arrays."""
        return hashlib.sha256(self.to_json()).hexdigest()

    def to_json(self) -> bytes:
        """Returns the set as it is stored."""
        days = {str(day): [[f.sha256, f.rows] for f in files] for day, files in sorted(self.days.items())}
        return json.dumps({"format": _FORMAT, "watermark": self.watermark, "days": days}).encode()

    def rows_of(self, day: int) -> int:
        """Returns how many events of a day the set holds."""
        return sum(file.rows for file in self.days.get(day, ()))


class SnapshotDirectory:
    """The day files of a trainer.

    Args:
        path: the directory; made when something is written.
        retention_days: how long a set that was replaced is kept, so that a run can be repeated from it. What an
            erasure replaced goes at once.
    """

    def __init__(self, path: Path, retention_days: int = 30) -> None:
        self.path, self._retention_seconds = path, retention_days * 86_400

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other runs from changing the files. Raises OSError where the directory cannot be made."""
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def current(self) -> SnapshotSet | None:
        """Returns the newest set; None where there is none that can be trusted."""
        try:
            name = (self.path / CURRENT).read_text().strip()
        except (OSError, UnicodeDecodeError):
            return None
        return self.load_set(name)

    def load_set(self, digest: str) -> SnapshotSet | None:
        """Returns a set by its digest; None where it is gone or damaged."""
        try:
            content = self._set_path(digest).read_bytes()
            if hashlib.sha256(content).hexdigest() != digest:
                return None
            stored = json.loads(content)
            days = {
                int(d): tuple(SnapshotFile(*file) for file in files) for d, files in stored["days"].items()
            }
            return SnapshotSet(stored["watermark"], days) if stored["format"] == _FORMAT else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def set_of_watermark(self, watermark: str) -> SnapshotSet | None:
        """Returns the kept set that was read at a watermark, or None."""
        for path in sorted((self.path / "sets").glob("*.json")):
            found = self.load_set(path.stem)
            if found is not None and found.watermark == watermark:
                return found
        return None

    def write(self, day: int, table: pa.Table) -> SnapshotFile:
        """Writes events of a day; on disk when it returns. Raises OSError; nothing is then changed."""
        buffer = io.BytesIO()
        pq.write_table(table.cast(SCHEMA), buffer, compression="zstd")
        content = buffer.getvalue()
        file = SnapshotFile(hashlib.sha256(content).hexdigest(), len(table))
        path = self.file_path(day, file)
        path.parent.mkdir(parents=True, exist_ok=True)
        if not self._is_whole(path, file):
            write_atomically(path, content)
        return file

    def read(self, day: int, file: SnapshotFile) -> pa.Table:
        """Returns the events of a file. Raises DamagedFile where its digest does not fit."""
        try:
            content = self.file_path(day, file).read_bytes()
        except OSError as error:
            raise DamagedFile(day) from error
        if hashlib.sha256(content).hexdigest() != file.sha256:
            raise DamagedFile(day)
        return pq.read_table(io.BytesIO(content), schema=SCHEMA)

    def publish(self, chosen: SnapshotSet) -> None:
        """Makes a set the newest. Raises OSError; the one before then stays."""
        self._set_path(chosen.digest).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self._set_path(chosen.digest), chosen.to_json())
        write_atomically(self.path / CURRENT, chosen.digest.encode())

    def collect(self, forget: Sequence[tuple[int, SnapshotFile]] = (), *, now: float | None = None) -> None:
        """Removes files that must be forgotten, sets past their time, and files that no kept set lists."""
        now = time.time() if now is None else now
        current = self.current()
        kept: set[Path] = set()
        for path in [*(self.path / "sets").glob("*.json")]:
            found = self.load_set(path.stem)
            is_current = found is not None and current is not None and found.digest == current.digest
            if found is None or (not is_current and path.stat().st_mtime < now - self._retention_seconds):
                path.unlink(missing_ok=True)
                continue
            kept |= {self.file_path(day, file) for day, files in found.days.items() for file in files}
        kept -= {self.file_path(day, file) for day, file in forget}
        for path in (self.path / "days").glob("*/*"):
            # Temporary files of a process that was killed are listed by no set.
            if path not in kept:
                path.unlink(missing_ok=True)

    def file_path(self, day: int, file: SnapshotFile) -> Path:
        """Returns where a file lies."""
        return self.path / "days" / str(day) / f"{file.sha256}.parquet"

    def _set_path(self, digest: str) -> Path:
        return self.path / "sets" / f"{digest}.json"

    @staticmethod
    def _is_whole(path: Path, file: SnapshotFile) -> bool:
        try:
            return hashlib.sha256(path.read_bytes()).hexdigest() == file.sha256
        except OSError:
            return False


def table_of(columns: Mapping[str, Any]) -> pa.Table:
    """Returns columns as a table of day files."""
    return pa.table(dict(columns)).select(SCHEMA.names).cast(SCHEMA)
