"""Lets the day files forget, run or no run: a thread of the server that starts a process every so often."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from services.trainer.settings import TrainerSettings, snapshots_of

_PACKAGE_ROOT = Path(__file__).resolve().parents[2]


class SnapshotUpkeep:
    """Runs `services.trainer.run.snapshots` once every interval, as long as there are day files.

    Args:
        database_url: of the log.
    """

    def __init__(self, settings: TrainerSettings, database_url: str, logger: Any) -> None:
        self._directory: Path = snapshots_of(settings.home)
        self._interval_seconds = settings.snapshot_upkeep_seconds
        self._enabled = settings.snapshots
        self._logger = logger
        self._environment = {
            **os.environ,
            "DATABASE_URL": database_url,
            "SHOPKEEPER_HOME": str(settings.home.resolve()),
            "SHOPKEEPER_SNAPSHOT_RETENTION_DAYS": str(settings.snapshot_retention_days),
            "SHOPKEEPER_LOG_LEVEL": settings.log_level,
            "SHOPKEEPER_LOG_FORMAT": settings.log_format,
            "SHOPKEEPER_METRICS_PORT": "0",
        }
        self._stopping = threading.Event()
        self._child: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._loop, name="snapshots", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        if self._enabled:
            self._thread.start()

    def stop(self) -> None:
        """Ends the thread and its process; a process that is ended at any point leaves a whole set."""
        self._stopping.set()
        if self._child is not None and self._child.poll() is None:
            self._child.terminate()
        if self._thread.is_alive():
            self._thread.join(timeout=10)

    def _loop(self) -> None:
        while not self._stopping.wait(self._interval_seconds):
            if not self._directory.is_dir():
                continue
            try:
                self._child = subprocess.Popen(
                    [sys.executable, "-m", "services.trainer.run.snapshots"],
                    cwd=_PACKAGE_ROOT,
                    env=self._environment,
                    stdin=subprocess.DEVNULL,
                )
                if self._child.wait() and not self._stopping.is_set():
                    self._logger.error("upkeep of the day files failed", returncode=self._child.returncode)
            except OSError as error:
                self._logger.error("upkeep of the day files did not start", error=str(error))
