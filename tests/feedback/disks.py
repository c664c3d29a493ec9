"""Disks that can be cut off and that can be full: file systems in files, for those who may mount them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from shared import embedded_postgres


class Disk:
    """An ext4 file system in a file, behind the page cache as behind that of a disk.

    What was written and not synced is in the cache alone; the file holds what a power cut would leave. The
    journal is not committed by a timer meanwhile, and old pages are not written back within the seconds of a test.
    """

    def __init__(self, root: Path, name: str, megabytes: int = 0, copy_of: Path | None = None) -> None:
        self.image, self.home = root / f"{name}.img", root / name
        if copy_of is None:
            with self.image.open("wb") as file:
                file.truncate(megabytes << 20)
            _run("mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", str(self.image))
        else:
            _run("cp", "--sparse=always", str(copy_of), str(self.image))
        self.home.mkdir()
        _run("mount", "-o", "loop,commit=300,noatime", str(self.image), str(self.home))
        self.home.chmod(0o755)

    def sync(self) -> None:
        """Brings everything to the disk."""
        _run("sync", "-f", str(self.home))

    def close(self) -> None:
        """Lets go of the file system; nothing may use it any more."""
        with suppress(subprocess.CalledProcessError):
            _run("umount", str(self.home))


@contextmanager
def disks() -> Iterator[Path]:
    """Yields a directory for disks; skips where none can be mounted."""
    if os.geteuid() or not all(map(shutil.which, ("mkfs.ext4", "mount", "losetup"))):
        pytest.skip("needs root, mkfs.ext4 and mount: a disk of its own is mounted")
    # Not below pytest's own directory: as root PostgreSQL runs as another user, who may not enter it.
    root = Path(tempfile.mkdtemp(prefix="shopkeeper-disk-"))
    root.chmod(0o755)
    try:
        try:
            Disk(root, "probe", 16).close()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"a file system cannot be mounted here: {error.stderr}")
        yield root
    finally:
        for mounted in root.iterdir():
            if os.path.ismount(mounted):
                embedded_postgres.stop(mounted)
                _run("umount", "-l", str(mounted))
        shutil.rmtree(root, ignore_errors=True)


@contextmanager
def tmpfs(megabytes: int) -> Iterator[Path]:
    """Yields a directory that holds so much and no more; skips where none can be mounted."""
    if os.geteuid():
        pytest.skip("needs root: a small file system is mounted")
    root = Path(tempfile.mkdtemp(prefix="shopkeeper-small-"))
    try:
        try:
            _run("mount", "-t", "tmpfs", "-o", f"size={megabytes}m,mode=1777", "tmpfs", str(root))
        except subprocess.CalledProcessError as error:
            pytest.skip(f"a file system cannot be mounted here: {error.stderr}")
        yield root
    finally:
        if os.path.ismount(root):
            _run("umount", "-l", str(root))
        root.rmdir()


def postmaster(home: Path) -> psutil.Process:
    """Returns the main process of the embedded PostgreSQL of a home."""
    return psutil.Process(int((home / "postgres" / "postmaster.pid").read_text().split()[0]))


def stop_still(process: psutil.Process) -> list[psutil.Process]:
    """Stops a process and its children where they stand; returns them."""
    # The parent first, so that it has no more children while they are being counted.
    process.suspend()
    stopped = [process, *process.children(recursive=True)]
    for child in stopped[1:]:
        with suppress(psutil.NoSuchProcess):
            child.suspend()
    return stopped


def kill_all(processes: list[psutil.Process]) -> None:
    """Kills stopped processes, and waits until they are gone."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL)
    psutil.wait_procs(processes, timeout=20)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
