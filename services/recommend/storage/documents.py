"""Serving configs and rules as files: one JSON document each, in a directory that all replicas share.

    <directory>/serving_configs/<id>.json    <directory>/rules/<id>.json

A document is replaced by one rename, after fsync; whoever reads sees the old one or the new one, whole. Writers
take turns by a lock on the directory, so that of two changes made to one version the second is refused,
whichever replica it came to.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from services.recommend.ports import DocumentKind
from shared.bundle.registry import fsync_directory, write_atomically
from shared.errors import Unavailable

_MAX_BYTES = 4 * 1024 * 1024


class DocumentDirectory:
    """Implements `ports.Documents`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def stamps(self) -> Mapping[tuple[DocumentKind, str], tuple[int, int, int]]:
        found: dict[tuple[DocumentKind, str], tuple[int, int, int]] = {}
        for kind in DocumentKind:
            try:
                entries = list(os.scandir(self._directory / kind.value))
            except OSError:
                continue
            for entry in entries:
                name, suffix = os.path.splitext(entry.name)
                # Names that begin with a dot are being written.
                if suffix != ".json" or name.startswith("."):
                    continue
                try:
                    status = entry.stat()
                except OSError:
                    continue
                found[kind, name] = (status.st_mtime_ns, status.st_ino, status.st_size)
        return found

    def read(self, kind: DocumentKind, document_id: str) -> bytes | None:
        path = self._path(kind, document_id)
        try:
            if path.stat().st_size > _MAX_BYTES:
                raise ValueError(f"it has more than {_MAX_BYTES} bytes")
            return path.read_bytes()
        except FileNotFoundError:
            return None

    def write(self, kind: DocumentKind, document_id: str, content: bytes) -> None:
        with _disk():
            path = self._path(kind, document_id)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, content)

    def delete(self, kind: DocumentKind, document_id: str) -> None:
        with _disk():
            path = self._path(kind, document_id)
            path.unlink(missing_ok=True)
            fsync_directory(path.parent)

    @contextmanager
    def turn(self) -> Iterator[None]:
        with _disk():
            self._directory.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._directory / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _path(self, kind: DocumentKind, document_id: str) -> Path:
        return self._directory / kind.value / f"{document_id}.json"


@contextmanager
def _disk() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Unavailable(
            "CONFIGURATION_UNAVAILABLE",
            f"The configuration directory cannot be written ({error.strerror}); nothing was changed.",
        ) from error
