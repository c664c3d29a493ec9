"""Starts queued runs as processes of their own, stops cancelled ones, and buries the dead.

The database says what is true: a run is claimed there, its process renews a
heartbeat there, and whoever ends it says so there. A trainer that was killed
leaves its runs' processes working; the next one watches them by their heartbeat.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from services.trainer.domain.runs import EXIT_INTERRUPTED, RunFailure, RunState, TrainingRun
from services.trainer.settings import TrainerSettings, directory_of
from services.trainer.storage import PostgresRunStore, PublishingLease
from shared.bundle import Registry
from shared.database import Database
from shared.errors import DataLoss, NotFound, Unavailable

_TICK_SECONDS = 0.25
_PACKAGE_ROOT = Path(__file__).resolve().parents[2]


@dataclass(slots=True)
class _Child:
    run: TrainingRun
    process: subprocess.Popen[bytes]
    told_to_stop_at: float | None = None
    log: Path | None = field(default=None)


class Supervisor:
    """A thread that keeps runs and processes in step; implements `ports.RunStarter`.

    Args:
        store: the runs.
        database: for the leases.
        registry: whose abandoned staging is removed.
        database_url: handed to the processes.
    """

    def __init__(
        self,
        store: PostgresRunStore,
        database: Database,
        registry: Registry,
        settings: TrainerSettings,
        database_url: str,
        logger: Any,
    ) -> None:
        self._store, self._database, self._registry = store, database, registry
        self._settings, self._database_url, self._logger = settings, database_url, logger
        self._children: dict[str, _Child] = {}
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="supervisor", daemon=True)
        self._looked_for_silent_at = 0.0

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def wake(self) -> None:
        """See `ports.RunStarter`."""
        self._wake.set()

    def stop(self) -> None:
        """Stops the processes and the thread; their runs wait for the next trainer."""
        self._stopping.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout=self._settings.cancel_grace_seconds + 10)

    def processes(self) -> dict[str, int]:
        """Returns the process id of each run that works here."""
        return {run_id: child.process.pid for run_id, child in list(self._children.items())}

    def _loop(self) -> None:
        while not self._stopping.is_set():
            try:
                self._reap()
                self._stop_cancelled()
                self._bury_silent()
                self._start_queued()
            except Unavailable as error:
                self._logger.warning("supervisor waits for the database", reason=error.reason)
                self._stopping.wait(1.0)
            except Exception as error:
                # The thread must live: without it no run would ever start again.
                self._logger.error("supervisor failed", exc_info=error)
                self._stopping.wait(1.0)
            self._wake.wait(_TICK_SECONDS if self._children else 1.0)
            self._wake.clear()
        self._stop_all()

    def _start_queued(self) -> None:
        while len(self._children) < self._settings.max_concurrent_runs and not self._stopping.is_set():
            run = self._store.claim_next()
            if run is None:
                return
            try:
                self._children[run.run_id] = self._spawn(run)
            except OSError as error:
                message = f"The run's process could not be started: {error.strerror}."
                self._store.end(run.run_id, run.attempt, RunState.FAILED, RunFailure("INTERNAL", message))
                continue
            self._logger.info("run started", run_id=run.run_id, model=run.model, attempt=run.attempt)

    def _spawn(self, run: TrainingRun) -> _Child:
        settings = self._settings
        environment = {
            **os.environ,
            "DATABASE_URL": self._database_url,
            "SHOPKEEPER_HOME": str(settings.home.resolve()),
            "SHOPKEEPER_REGISTRY": str(settings.registry_path.resolve()),
            "SHOPKEEPER_KEYS": str(settings.keys_path.resolve()),
            "SHOPKEEPER_PROFILE_ADDRESS": settings.profile_address,
            "SHOPKEEPER_RUN_MEMORY_BYTES": str(settings.run_memory_bytes),
            "SHOPKEEPER_CATALOGUE_TIMEOUT_SECONDS": str(settings.catalogue_timeout_seconds),
            "SHOPKEEPER_SNAPSHOTS": str(settings.snapshots),
            "SHOPKEEPER_SNAPSHOT_RETENTION_DAYS": str(settings.snapshot_retention_days),
            "SHOPKEEPER_PRIVACY_EPSILON_LIMIT": str(settings.privacy_epsilon_limit),
            "SHOPKEEPER_PRIVACY_DELTA": str(settings.privacy_delta),
            "SHOPKEEPER_LOG_LEVEL": settings.log_level,
            "SHOPKEEPER_LOG_FORMAT": settings.log_format,
            "SHOPKEEPER_METRICS_PORT": "0",
            "TF_CPP_MIN_LOG_LEVEL": "3",
        }
        log: Path | None = directory_of(settings.home, run.run_id) / "run.log"
        with contextlib.ExitStack() as stack:
            output: Any = None
            try:
                assert log is not None
                log.parent.mkdir(parents=True, exist_ok=True)
                output = stack.enter_context(log.open("ab"))
            except OSError:
                # A read-only home: the run's lines go where the server's go.
                log = None
            process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "services.trainer.run",
                    "--run-id",
                    run.run_id,
                    "--attempt",
                    str(run.attempt),
                ],
                cwd=_PACKAGE_ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                # Ctrl-C at the terminal is for the server; it decides what becomes of its runs.
                start_new_session=True,
            )
        return _Child(run, process, log=log)

    def _reap(self) -> None:
        for run_id, child in list(self._children.items()):
            code = child.process.poll()
            if code is None:
                continue
            del self._children[run_id]
            run = self._store.get(run_id)
            if run is not None and run.attempt == child.run.attempt and not run.state.has_ended:
                # A process that was stopped before it could listen for the signal died of it.
                self._bury(run, EXIT_INTERRUPTED if self._stopping.is_set() else code, child.log)
            self._remove_checkpoint(run_id)
            self._remove_staging(child.run.model)
            self._logger.info("run's process ended", run_id=run_id, exit_code=code)

    def _bury(self, run: TrainingRun, code: int, log: Path | None) -> None:
        """Ends a run whose process ended without saying how."""
        if self._adopt(run):
            return
        if run.state == RunState.CANCELLING:
            self._store.end(run.run_id, run.attempt, RunState.CANCELLED)
        elif code == EXIT_INTERRUPTED:
            self._interrupted(run, "The trainer stopped")
        elif code < 0 and self._checkpoint_of(run).exists() and run.attempt < self._settings.max_run_attempts:
            # What it had learned is on disk: a run is worth more than its process.
            self._interrupted(run, f"The run's process was killed by {_signal_name(-code)}")
        else:
            how = f"killed by {_signal_name(-code)}" if code < 0 else f"it exited with code {code}"
            hint = " The kernel does that when memory is short." if code == -signal.SIGKILL else ""
            where = f" Its log is runs/{log.parent.name}/{log.name} in the trainer's home." if log else ""
            message = (
                f"The run's process ended before its work was done: {how}.{hint}{where} Start another run."
            )
            self._store.append_progress(run.run_id, run.stage, message)
            self._store.end(run.run_id, run.attempt, RunState.FAILED, RunFailure("PROCESS_DIED", message))

    def _adopt(self, run: TrainingRun) -> bool:
        """Returns whether the run had published after all; its process died between the two."""
        for version in self._registry.list_versions(run.model)[:5]:
            with contextlib.suppress(DataLoss, NotFound):
                manifest = self._registry.read_manifest(run.model, version)
                if manifest.get("run_id") == run.run_id:
                    alias = self._registry.alias(run.model, run.config.promote_alias)
                    promoted = alias is not None and alias.version == version
                    self._store.adopt(run.run_id, run.attempt, version, manifest.get("gate", {}), promoted)
                    return True
        return False

    def _interrupted(self, run: TrainingRun, what: str) -> None:
        if run.attempt < self._settings.max_run_attempts:
            goes_on = "goes on from its checkpoint" if self._checkpoint_of(run).exists() else "starts anew"
            self._store.append_progress(run.run_id, run.stage, f"{what}; the run {goes_on}.")
            self._store.requeue(run.run_id, run.attempt)
        else:
            message = f"The trainer stopped during each of {run.attempt} attempts. Start another run."
            self._store.end(run.run_id, run.attempt, RunState.FAILED, RunFailure("INTERRUPTED", message))

    def _stop_cancelled(self) -> None:
        if not self._children:
            return
        cancelling = {run.run_id for run in self._store.active() if run.state == RunState.CANCELLING}
        for run_id in cancelling & set(self._children):
            child = self._children[run_id]
            now = time.monotonic()
            if child.told_to_stop_at is None:
                child.told_to_stop_at = now
                child.process.send_signal(signal.SIGTERM)
            elif now - child.told_to_stop_at > self._settings.cancel_grace_seconds:
                child.process.kill()

    def _bury_silent(self) -> None:
        now = time.monotonic()
        if now - self._looked_for_silent_at < 2.0:
            return
        self._looked_for_silent_at = now
        for run in self._store.silent(self._settings.run_silence_seconds):
            if run.run_id in self._children:
                continue
            self._logger.warning("run has no process any more", run_id=run.run_id)
            if self._adopt(run):
                continue
            if run.state == RunState.CANCELLING:
                self._store.end(run.run_id, run.attempt, RunState.CANCELLED)
            else:
                self._interrupted(run, "Nothing was heard of the run any more")
            self._remove_checkpoint(run.run_id)
            self._remove_staging(run.model)

    def _checkpoint_of(self, run: TrainingRun) -> Path:
        return directory_of(self._settings.home, run.run_id) / "checkpoint"

    def _remove_checkpoint(self, run_id: str) -> None:
        run = self._store.get(run_id)
        if run is not None and run.state.has_ended:
            self._checkpoint_of(run).unlink(missing_ok=True)

    def _remove_staging(self, model: str) -> None:
        # Only with the lease in hand: another trainer's run of the model may be writing.
        lease = PublishingLease(self._database, model)
        try:
            if lease.try_acquire():
                self._registry.remove_abandoned_staging(model)
        finally:
            lease.close()

    def _stop_all(self) -> None:
        for child in self._children.values():
            child.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + self._settings.cancel_grace_seconds
        for child in self._children.values():
            try:
                child.process.wait(timeout=max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.process.kill()
                child.process.wait()
        with contextlib.suppress(Unavailable):
            self._reap()


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
