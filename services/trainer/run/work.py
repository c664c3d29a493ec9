"""What the kinds of runs have in common: the run at work, its plan, the log, the catalogue."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from importlib import metadata
from typing import Any

import psycopg

from services.trainer.clients import CatalogueClient
from services.trainer.domain.hyper_parameters import HyperParameters, resolve
from services.trainer.domain.runs import DataSnapshot, TrainingConfig, TrainingRun
from services.trainer.pipeline.catalogue_files import Attributes, CatalogueFiles
from services.trainer.pipeline.checkpoint import Checkpoints
from services.trainer.pipeline.content import ContentVectors
from services.trainer.pipeline.dataset import Cleaning, EventColumns
from services.trainer.pipeline.describing import peak_resident_bytes
from services.trainer.pipeline.event_log import DIRECTORY, EventLog
from services.trainer.pipeline.log_reader import LOG_ERRORS, read_events
from services.trainer.pipeline.log_snapshot import read_again, read_through
from services.trainer.pipeline.plan import Plan
from services.trainer.pipeline.snapshot_files import SnapshotDirectory
from services.trainer.run.heart import Heart
from services.trainer.settings import TrainerSettings, catalogues_of, directory_of, snapshots_of
from services.trainer.storage import PostgresRunStore
from shared.bundle.history import INTEREST_KINDS
from shared.channel import tls_of
from shared.database import Database
from shared.errors import Cancelled, FailedPrecondition, Unavailable


@dataclass(frozen=True, slots=True)
class Catalogue:
    """Attribute values of each item id, why there are none, and the digest under which they are kept, if they are."""

    attributes: Attributes
    why_none: str = ""
    digest: str = ""


@dataclass(frozen=True, slots=True)
class Work:
    """A run at work."""

    run: TrainingRun
    settings: TrainerSettings
    database: Database
    store: PostgresRunStore
    heart: Heart
    logger: Any

    def report(self, stage: str, message: str, **fields: Any) -> None:
        """Writes an entry of the run's journal."""
        self.logger.info(message, stage=stage, run_id=self.run.run_id)
        # How much memory a run takes tells how many people there are.
        memory = 0 if self._is_private else peak_resident_bytes()
        self.store.append_progress(self.run.run_id, stage, message, peak_resident_bytes=memory, **fields)

    def check(self) -> None:
        """Raises Cancelled where the work is no longer wanted."""
        if self.heart.should_stop():
            raise Cancelled("CANCELLED", "The run was cancelled.")

    def read_log(self) -> EventColumns:
        """Returns the events of the run's window: of the snapshot that it names, else as of its first attempt.

        Raises:
            Unavailable: LOG_UNAVAILABLE.
            FailedPrecondition: DATA_SNAPSHOT_GONE.
        """
        self.report("READING", "Reading the log.")
        window = self.run.config.window
        chosen = {
            "start_time": datetime.fromisoformat(window.start_time) if window.start_time else None,
            "end_time": datetime.fromisoformat(window.end_time) if window.end_time else None,
            "kinds": window.kinds or INTEREST_KINDS,
        }
        as_of = self.store.read_watermark(self.run.run_id)
        try:
            events = self._read_named(chosen)
            if events is None and self.settings.snapshots:
                events = self._read_day_files(as_of, chosen)
            if events is None:
                events = read_events(self.database.conninfo, as_of=as_of, **chosen)
            self.store.set_read_watermark(self.run.run_id, events.watermark.decode())
            if events.snapshot and not self._is_private:
                snapshot = DataSnapshot(events.snapshot, watermark=events.watermark.decode())
                self.store.set_data_snapshot(self.run.run_id, snapshot)
            return events
        except (psycopg.Error, *LOG_ERRORS) as error:
            raise Unavailable(
                "LOG_UNAVAILABLE",
                f"The log could not be read: {(str(error).strip() or type(error).__name__).splitlines()[0]}. Is feedback running, and migrated?",
            ) from error

    @property
    def _is_private(self) -> bool:
        return self.run.config.differential_privacy is not None

    @property
    def _day_files(self) -> SnapshotDirectory:
        return SnapshotDirectory(snapshots_of(self.settings.home), self.settings.snapshot_retention_days)

    def _read_named(self, window: Mapping[str, Any]) -> EventColumns | None:
        """Returns the events of the snapshot that the run names, or that an earlier attempt read; None without."""
        wanted = self.run.config.data_snapshot
        named = wanted or self.run.data_snapshot
        if named is None:
            return None
        events = read_again(self._day_files, named.snapshot_set, **window)
        if events is None and wanted is not None:
            raise _gone("set of day files", named.snapshot_set)
        return events

    def _read_day_files(self, as_of: str, window: Mapping[str, Any]) -> EventColumns | None:
        """Returns the events through the day files; None where they cannot give them, and the log itself must."""

        def report(words: str) -> None:
            # How much a private run finds in the log is nobody's to read.
            if not self._is_private:
                self.report("READING", words)

        try:
            return read_through(
                self.database.conninfo,
                self._day_files,
                watermark=as_of,
                report=report,
                **window,
            )
        except LOG_ERRORS as error:
            why = (str(error).strip() or type(error).__name__).splitlines()[0]
            self.report("READING", f"The day files are of no use now ({why}); the log is read as a whole.")
            return None

    def checkpoints(self) -> Checkpoints:
        """Returns the run's checkpoint."""
        return Checkpoints(
            directory_of(self.settings.home, self.run.run_id), lambda words: self.report("TRAINING", words)
        )

    def event_log(self) -> EventLog:
        """Returns where the run's curves are written for TensorBoard."""
        return EventLog(
            directory_of(self.settings.home, self.run.run_id) / DIRECTORY,
            lambda words: self.report("TRAINING", words),
        )

    def read_item_vectors(self) -> tuple[ContentVectors | None, str]:
        """Returns the vectors that the operator has of items, and what is to be said of them.

        A model can do without: a file that cannot be read costs its vectors, not the run.
        """
        path = self.settings.item_vectors_path
        if path is None:
            return None, ""
        try:
            content = ContentVectors.read(path)
        except ValueError as error:
            return None, f"; no item vectors: {error}"
        return content, f"; vectors of {len(content.item_ids):,} items"

    def read_catalogue(self, events: EventColumns) -> Catalogue:
        """Returns what is known of items: of the snapshot that the run names, else as it is, which is then kept.

        Raises:
            FailedPrecondition: DATA_SNAPSHOT_GONE.
        """
        files = CatalogueFiles(catalogues_of(self.settings.home), self.settings.snapshot_retention_days)
        wanted = self.run.config.data_snapshot
        named = wanted or self.run.data_snapshot
        found: Attributes | None = None
        why_none = ""
        if named is not None and named.catalogue:
            found = files.load(named.catalogue)
            if found is None and wanted is not None:
                raise _gone("catalogue", named.catalogue)
        if found is None:
            found, why_none = self._ask_for_catalogue()
        if not events.snapshot or self._is_private:
            return Catalogue(found, why_none)
        try:
            digest = files.keep(found)
        except OSError as error:
            self.report(
                "READING", f"The catalogue cannot be kept ({error.strerror}); it will not be read again."
            )
            return Catalogue(found, why_none)
        snapshot = DataSnapshot(events.snapshot, digest, events.watermark.decode())
        self.store.set_data_snapshot(self.run.run_id, snapshot)
        return Catalogue(found, why_none, digest)

    def _ask_for_catalogue(self) -> tuple[Attributes, str]:
        settings = self.settings
        catalogue = CatalogueClient(
            settings.profile_address, settings.catalogue_timeout_seconds, tls_of(settings)
        )
        try:
            return catalogue.attributes()
        finally:
            catalogue.close()


def _gone(what: str, digest: str) -> FailedPrecondition:
    return FailedPrecondition(
        "DATA_SNAPSHOT_GONE",
        f"The {what} {digest[:12]}… of data_snapshot is not on this trainer's disk: it is past its retention, somebody "
        "in it was erased, or another trainer has it. Leave data_snapshot out to read the log as it is now.",
    )


def plan_of(config: TrainingConfig) -> tuple[HyperParameters, Plan]:
    """Returns the size and the plan that a configuration asks for."""
    overrides = dict(config.overrides)
    if config.max_train_seconds:
        overrides["max_train_seconds"] = config.max_train_seconds
    window, evaluation = config.window, config.evaluation
    return resolve(config.size, overrides), Plan(
        cleaning=Cleaning(window.min_user_events, window.min_item_events, window.max_user_events),
        exclude_seen=evaluation.exclude_seen,
        refit=config.refit,
        force=config.force,
        max_test_users=evaluation.max_users,
        resamples=evaluation.bootstrap_resamples,
        confidence=evaluation.confidence,
        split=evaluation.split,
    )


def code_version() -> str:
    """Returns the commit of the code where there is one, else the version of the suite."""
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, timeout=5, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = ""
    try:
        version = metadata.version("shopkeeper-suite")
    except metadata.PackageNotFoundError:
        version = "0"
    return f"{version}+{commit}" if commit else version
