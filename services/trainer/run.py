"""One run in a process of its own: `python -m services.trainer.run --run-id ID --attempt N`.

Started by the supervisor. The composition root of a run, as `__main__` is that of the server: it wires the
log, the catalogue, the pipeline and the registry, and says in the database how the run ends.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from datetime import datetime
from importlib import metadata
from typing import Any

import psycopg
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from services.trainer.clients import CatalogueClient
from services.trainer.domain.hyper_parameters import HyperParameters, resolve
from services.trainer.domain.runs import EXIT_INTERRUPTED, RunFailure, RunState, TrainingConfig, TrainingRun
from services.trainer.pipeline.dataset import Cleaning, EventColumns
from services.trainer.pipeline.log_reader import read_events
from services.trainer.pipeline.pipeline import Plan, TrainedModel, peak_resident_bytes, train_model
from services.trainer.settings import TrainerSettings
from services.trainer.storage import PostgresRunStore, PublishingLease
from shared.bundle import Bundle, Registry, load_bundle, write_bundle
from shared.bundle.history import INTEREST_KINDS
from shared.channel import tls_of
from shared.database import Database
from shared.errors import Aborted, Cancelled, DataLoss, FailedPrecondition, ShopkeeperError, Unavailable
from shared.keys import read_signing_key
from shared.settings import load_settings
from shared.telemetry import Telemetry

_HEARTBEAT_SECONDS = 1.0
_LEASE_PATIENCE_SECONDS = 20.0
_NICENESS = 5


class Heart:
    """Renews the run's heartbeat, and learns from it when to stop."""

    def __init__(self, store: PostgresRunStore, run_id: str, attempt: int, max_memory_bytes: int) -> None:
        self._store, self._run_id, self._attempt = store, run_id, attempt
        self._max_memory_bytes = max_memory_bytes
        self.cancelled = threading.Event()
        self.interrupted = threading.Event()
        self._ended = threading.Event()
        threading.Thread(target=self._beat, name="heart", daemon=True).start()

    def should_stop(self) -> bool:
        """Whether the work is no longer wanted."""
        return self.cancelled.is_set() or self.interrupted.is_set()

    def end(self) -> None:
        """Stops beating."""
        self._ended.set()

    def _beat(self) -> None:
        while not self._ended.wait(_HEARTBEAT_SECONDS):
            if 0 < self._max_memory_bytes < peak_resident_bytes():
                self._give_up_for_memory()
            try:
                state = self._store.beat(self._run_id, self._attempt)
            except (Unavailable, psycopg.Error):
                continue
            if state == RunState.CANCELLING:
                self.cancelled.set()
            elif state is None and not self._ended.is_set():
                # Somebody else decided what became of this attempt: nothing it does counts any more.
                self.interrupted.set()

    def _give_up_for_memory(self) -> None:
        message = (
            f"The run's process used more than its limit of {self._max_memory_bytes / 1e6:.0f} MB. Raise the limit, "
            "narrow the window, or choose a smaller size."
        )
        self._store.end(self._run_id, self._attempt, RunState.FAILED, RunFailure("OUT_OF_MEMORY", message))
        os._exit(1)


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


def execute(
    run: TrainingRun, settings: TrainerSettings, database: Database, heart: Heart, logger: Any
) -> None:
    """Does the run's work, to the published version.

    Raises:
        ShopkeeperError: with a reason of the contract; nothing is published.
    """
    if run.config.differential_privacy is not None:
        raise FailedPrecondition("NOT_BUILT_YET", "Training with differential privacy is not built yet.")
    store = PostgresRunStore(database)
    size, plan = plan_of(run.config)

    def report(stage: str, message: str, **fields: Any) -> None:
        logger.info(message, stage=stage, run_id=run.run_id)
        store.append_progress(run.run_id, stage, message, peak_resident_bytes=peak_resident_bytes(), **fields)

    signing_key = read_signing_key(settings.keys_path)
    lease = PublishingLease(database, run.model)
    try:
        _acquire(lease, run, heart)
        report("READING", "Reading the log.")
        events = _read(database, run.config)
        catalogue = CatalogueClient(
            settings.profile_address, settings.catalogue_timeout_seconds, tls_of(settings)
        )
        try:
            attributes, why_none = catalogue.attributes()
        finally:
            catalogue.close()
        known = f"{len(attributes):,} items in the catalogue" if not why_none else f"no catalogue: {why_none}"
        report("READING", f"{len(events):,} events of {len(events.item_ids):,} items; {known}.")
        registry = Registry(settings.registry_path)
        served, incumbent = version_in_service(registry, run, signing_key.public_key(), report)
        trained = train_model(
            events,
            attributes,
            size,
            plan,
            model_name=run.model,
            seed=run.config.seed,
            report=report,
            should_stop=heart.should_stop,
            code_version=code_version(),
            incumbent=incumbent,
        )
        report("PUBLISHING", f"Publishing; the gate says {trained.verdict.verdict}.")
        version = lease.publish(
            run.run_id, run.attempt, lambda: _publish(registry, run, trained, served, signing_key, logger)
        )
        if version is None:
            raise Cancelled("CANCELLED", "The run was cancelled before its version was published.")
    finally:
        lease.close()


def _acquire(lease: PublishingLease, run: TrainingRun, heart: Heart) -> None:
    deadline = time.monotonic() + _LEASE_PATIENCE_SECONDS
    while not lease.try_acquire():
        if time.monotonic() > deadline or heart.should_stop():
            raise Aborted(
                "LEASE_LOST",
                f"Another process holds the publishing lease of model {run.model}; start the run again when it is done.",
                {"model": run.model},
            )
        time.sleep(0.2)


def _read(database: Database, config: TrainingConfig) -> EventColumns:
    window = config.window
    try:
        with database.dedicated_connection(autocommit=True) as connection:
            return read_events(
                connection,
                start_time=datetime.fromisoformat(window.start_time) if window.start_time else None,
                end_time=datetime.fromisoformat(window.end_time) if window.end_time else None,
                kinds=window.kinds or INTEREST_KINDS,
            )
    except (psycopg.Error, ValueError) as error:
        raise Unavailable(
            "LOG_UNAVAILABLE",
            f"The log could not be read: {str(error).strip().splitlines()[0]}. Is feedback running, and migrated?",
        ) from error


def version_in_service(
    registry: Registry, run: TrainingRun, public_key: Ed25519PublicKey, report: Callable[..., None]
) -> tuple[str, Bundle | None]:
    """Returns where the alias points that the run would change (empty: nowhere), and what the new one must beat.

    A version that no longer loads is no reason to keep its successor back.
    """
    alias = registry.alias(run.model, run.config.promote_alias)
    if alias is None:
        return "", None
    try:
        return alias.version, load_bundle(registry.version_path(run.model, alias.version), public_key)
    except DataLoss as error:
        report("READING", f"The version in service is not compared with: {error.message}")
        return alias.version, None


def _publish(
    registry: Registry, run: TrainingRun, trained: TrainedModel, served: str, signing_key: Any, logger: Any
) -> tuple[str, dict[str, Any], str | None]:
    version = write_bundle(
        registry,
        run.model,
        arrays=trained.arrays,
        vocabulary=trained.vocabulary,
        encoder_bytes=trained.encoder_bytes,
        manifest_fields={**trained.manifest_fields, "run_id": run.run_id},
        attachments=trained.attachments,
        signing_key=signing_key,
    )
    return version, trained.manifest_fields["gate"], _promote(registry, run, trained, version, served, logger)


def _promote(
    registry: Registry, run: TrainingRun, trained: TrainedModel, version: str, served: str, logger: Any
) -> str | None:
    """Points the alias where the gate and the run allow it; returns why not, or None where it did."""
    if not run.config.promote:
        return "the run was told not to promote"
    if not trained.verdict.may_serve:
        return "the gate failed it"
    cause = "GATE_PASSED" if trained.verdict.verdict == "PASSED" else "FORCED"
    try:
        # The verdict is about the version that served when the run began, and holds for no other.
        registry.set_alias(
            run.model, run.config.promote_alias, version, reason=cause, comment=f"run {run.run_id}",
            expected_current=served,
        )  # fmt: skip
    except Aborted as error:
        return f"another version was promoted during the run. {error.message}"
    except OSError as error:
        # The version stands; an operator can promote it when the disk is mended.
        logger.error("alias not changed", alias=run.config.promote_alias, error=str(error))
        return f"the alias could not be written ({error.strerror})"
    return None


def failure_of(error: BaseException) -> RunFailure:
    """Returns what to tell of a run that failed."""
    if isinstance(error, ShopkeeperError):
        known = "LOG_UNAVAILABLE" if error.reason == "DATABASE_UNAVAILABLE" else error.reason
        return RunFailure(known, error.message)
    if isinstance(error, MemoryError):
        return RunFailure(
            "OUT_OF_MEMORY", "The machine has no memory left. Narrow the window, or choose a smaller size."
        )
    if isinstance(error, OSError):
        why = error.strerror or type(error).__name__
        return RunFailure(
            "REGISTRY_UNWRITABLE",
            f"The registry could not be written: {why}. It is as it was; free space, then retry.",
        )
    if isinstance(error, psycopg.Error):
        return RunFailure("LOG_UNAVAILABLE", "The database was lost during the run; start it again.")
    return RunFailure(
        "INTERNAL", f"A fault of the trainer ({type(error).__name__}); the run's log has the details."
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run-id", required=True)
    parser.add_argument("--attempt", type=int, required=True)
    arguments = parser.parse_args()
    # Serving goes first where both share a machine.
    os.nice(_NICENESS)
    settings = load_settings(TrainerSettings)
    telemetry = Telemetry("trainer-run", settings)
    logger = telemetry.logger
    if settings.database_url is None:
        logger.error("a run is started by the trainer, which names the database")
        return 2
    database = Database(settings.database_url, schema="trainer", pool_size=3)
    store = PostgresRunStore(database)
    run = store.get(arguments.run_id)
    if run is None or run.attempt != arguments.attempt or run.state.has_ended:
        logger.error("this attempt is no longer the run's", run_id=arguments.run_id)
        return 2
    limit = run.config.max_memory_bytes or settings.run_memory_bytes
    heart = Heart(store, run.run_id, run.attempt, limit)
    signal.signal(signal.SIGTERM, lambda *_: heart.interrupted.set())
    try:
        execute(run, settings, database, heart, logger)
        return 0
    except Cancelled:
        # Told by a signal, the reason is in the database: a caller, or the trainer's own end.
        if heart.cancelled.is_set() or store.beat(run.run_id, run.attempt) == RunState.CANCELLING:
            store.end(run.run_id, run.attempt, RunState.CANCELLED)
            return 0
        return EXIT_INTERRUPTED
    except Exception as error:
        logger.error("run failed", run_id=run.run_id, exc_info=error)
        store.end(run.run_id, run.attempt, RunState.FAILED, failure_of(error))
        return 1
    finally:
        heart.end()
        database.close()


if __name__ == "__main__":
    raise SystemExit(main())
