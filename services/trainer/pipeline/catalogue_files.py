"""The catalogue's attributes as a run read them, kept beside the day files: with both a run can be repeated.

A file is named by the digest of what it says. It holds items and their attributes, and nothing of people. Order is kept:
attributes are numbered in the order in which they come.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from shared.bundle.registry import write_atomically

Attributes = Mapping[str, Sequence[str]]


class CatalogueFiles:
    """Catalogues by digest.

    Args:
        path: the directory; made when something is written.
        retention_days: how long a catalogue is kept that no run has read since.
    """

    def __init__(self, path: Path, retention_days: int = 30) -> None:
        self._path, self._retention_seconds = path, retention_days * 86_400

    def keep(self, attributes: Attributes, *, now: float | None = None) -> str:
        """Writes what is not there yet, removes what is past its time; returns the digest. Raises OSError."""
        now = time.time() if now is None else now
        content = json.dumps({item_id: list(values) for item_id, values in attributes.items()}).encode()
        digest = hashlib.sha256(content).hexdigest()
        self._path.mkdir(parents=True, exist_ok=True)
        if self.load(digest) is None:
            write_atomically(self._file(digest), zlib.compress(content, 6))
        os.utime(self._file(digest), (now, now))
        for path in self._path.iterdir():
            if path.stat().st_mtime < now - self._retention_seconds:
                path.unlink(missing_ok=True)
        return digest

    def load(self, digest: str) -> dict[str, list[str]] | None:
        """Returns a catalogue by its digest; None where it is gone or damaged."""
        try:
            content = zlib.decompress(self._file(digest).read_bytes())
        except (OSError, zlib.error):
            return None
        if hashlib.sha256(content).hexdigest() != digest:
            return None
        return {str(item_id): list(values) for item_id, values in json.loads(content).items()}

    def _file(self, digest: str) -> Path:
        return self._path / f"{digest}.json.z"
