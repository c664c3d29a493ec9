"""Runs the feedback service: `python -m services.feedback [serve|migrate|finish-erasures|export-tombstones|replay-tombstones]`."""

from __future__ import annotations

import gc
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime

import grpc
import psycopg

from services.feedback.clients import Catalogue, Ed25519Signer, RegistryModelVersions, SystemClock
from services.feedback.converters.events import EventReader
from services.feedback.converters.identities import Door
from services.feedback.converters.imports import ImportDirectory
from services.feedback.domain.bots import BotRules
from services.feedback.servicer import (
    PRIORITIES,
    SERVICE_NAME,
    FeedbackServicer,
    UseCases,
    add_to_server,
)
from services.feedback.settings import FeedbackSettings
from services.feedback.storage.bot_marks import BotMarks
from services.feedback.storage.exclusive import (
    BOTS_LOCK,
    EXPERIMENTS_LOCK,
    IMPORTS_LOCK,
    RETENTION_LOCK,
    ROTATION_LOCK,
    UNKNOWN_ITEMS_LOCK,
    ExclusiveWorker,
)
from services.feedback.storage.experiments import PostgresExperiments
from services.feedback.storage.group_commit import GroupCommitLog
from services.feedback.storage.imports import PostgresImports
from services.feedback.storage.impressions import PostgresImpressions
from services.feedback.storage.key_rotation import PostgresKeyRotation
from services.feedback.storage.log_writer import LogWriter, verify_durability
from services.feedback.storage.master_key import rewrap_data_keys
from services.feedback.storage.metrics import PostgresMetrics
from services.feedback.storage.notifier import LogNotifier
from services.feedback.storage.people import PostgresPeople
from services.feedback.storage.retention import PostgresPurge, Retention
from services.feedback.storage.text_cipher import TextCipher
from services.feedback.storage.tombstone_list import TombstoneList
from services.feedback.storage.unknown_items import PostgresUnknownItems
from services.feedback.use_cases import (
    ExportUser,
    ForgetUser,
    ManageConsent,
    ManageImports,
    MeasureMetrics,
    PurgeEvents,
    RecordEvents,
    ReportUnknownItems,
    RotateUserKeys,
    RunExperiments,
    RunImports,
    ValuePolicies,
)
from shared.channel import open_channel, tls_of
from shared.database import Database, migrate, resolve_url
from shared.errors import FailedPrecondition, ShopkeeperError, Unavailable
from shared.keys import read_signing_key
from shared.server import GrpcServer, run_service
from shared.settings import load_settings
from shared.telemetry import Telemetry, get_logger
from shared.tokens import TokenSigner

SERVICE = "feedback"
STARTUP_PATIENCE_SECONDS = 60.0
ERASURE_CHECK_SECONDS = 30.0
ERASURE_GRACE_SECONDS = 120.0
GC_ALLOCATIONS = 100_000
SWITCH_INTERVAL_SECONDS = 0.0005
# While one waits for the disk the other is prepared and executed; a third finds nothing to do.
CONCURRENT_COMMITS = 2


@dataclass(frozen=True, slots=True)
class Feedback:
    """The wired service."""

    servicer: FeedbackServicer
    people: PostgresPeople
    bots: BotMarks
    catalogue: Catalogue
    unknown_items: PostgresUnknownItems
    experiments: RunExperiments
    log: GroupCommitLog
    notifier: LogNotifier
    database: Database
    workers: Sequence[ExclusiveWorker]
    stopped: threading.Event

    def start(self) -> None:
        """Begins the work in the background."""
        self.catalogue.start()
        for worker in self.workers:
            worker.start()

    def register(self, server: grpc.Server) -> None:
        """Adds the servicer to a server."""
        add_to_server(self.servicer, server)

    def close(self) -> None:
        """Commits what waits, then lets go of the database."""
        self.stopped.set()
        self.catalogue.stop()
        for worker in self.workers:
            worker.stop()
        self.servicer.close()
        self.log.close()
        self.notifier.close()
        self.database.close()


def wire(settings: FeedbackSettings, url: str) -> Feedback:
    """Returns the service over a migrated database.

    Raises:
        FailedPrecondition: a key is missing, or the database does not keep what it commits.
        Unavailable: the database cannot be reached.
    """
    keys = settings.keys_path
    door = Door.from_directory(keys)
    signer = TokenSigner.from_directory(keys)
    cipher = TextCipher.from_directory(keys)
    receipt_signer = Ed25519Signer(read_signing_key(keys))
    database = Database(url, schema=SERVICE)
    with database.dedicated_connection() as connection:
        verify_durability(connection)
    clock = SystemClock()
    people = PostgresPeople(database, cipher)
    notifier = LogNotifier(database, interval_seconds=settings.notify_interval_ms / 1000)
    log = GroupCommitLog(
        *(LogWriter(database, cipher, door.key_version) for _ in range(CONCURRENT_COMMITS)),
        max_rows=settings.commit_max_rows,
        queue_rows=settings.commit_queue_rows,
        on_commit=notifier.wake,
    )
    metrics = PostgresMetrics(database)
    experiments = RunExperiments(PostgresExperiments(database), metrics, clock)
    catalogue = Catalogue(
        open_channel(settings.profile_address, tls=tls_of(settings)), settings.catalogue_check_seconds
    )
    record_events = RecordEvents(log, catalogue)
    reader = EventReader(door, signer, attribution_max_age_days=settings.attribution_max_age_days)
    stopped = threading.Event()
    rotation = PostgresKeyRotation(
        database, cipher, door.key_chain, on_commit=notifier.wake, wait=stopped.wait
    )
    rotation.adopt_consents()
    imports = PostgresImports(database)
    files = ImportDirectory(settings.import_path, reader)
    run_imports = RunImports(imports, files, record_events, clock, stopped)
    retention = Retention(database, settings.retention_days, clock.now)
    importer = ExclusiveWorker("imports", database, IMPORTS_LOCK, run_imports.run_next, idle_seconds=2.0)
    rotator = ExclusiveWorker("key-rotation", database, ROTATION_LOCK, rotation.step, idle_seconds=5.0)
    keeper = ExclusiveWorker("retention", database, RETENTION_LOCK, retention.run, idle_seconds=3_600.0)
    unknown_items = PostgresUnknownItems(database, catalogue.known, wait=stopped.wait)
    servicer = FeedbackServicer(
        UseCases(
            record_events,
            ManageConsent(people, clock, notifier.wake),
            ForgetUser(
                people,
                RegistryModelVersions(settings.registry_path, settings.model_retention_days),
                receipt_signer,
                clock,
                notifier.wake,
            ),
            ExportUser(people, people),
            MeasureMetrics(metrics, clock),
            experiments,
            ValuePolicies(PostgresImpressions(database)),
            ManageImports(imports, files, clock, importer.wake),
            PurgeEvents(PostgresPurge(database)),
            RotateUserKeys(rotation, clock, rotator.wake),
            ReportUnknownItems(unknown_items),
        ),
        reader,
        door,
        signer,
        commit_timeout_seconds=settings.commit_timeout_seconds,
        stream_read_ahead=settings.stream_read_ahead,
    )
    guard = ExclusiveWorker(
        "experiments",
        database,
        EXPERIMENTS_LOCK,
        lambda: _stop_broken(experiments),
        idle_seconds=settings.experiment_check_seconds,
    )
    bots = BotMarks(
        database,
        BotRules(
            settings.bot_views_per_minute,
            settings.bot_bare_views_per_hour,
            settings.bot_users_per_session,
            settings.bot_metronome_views,
        ),
        wait=stopped.wait,
    )
    marker = ExclusiveWorker("bots", database, BOTS_LOCK, bots.step, idle_seconds=settings.bot_check_seconds)
    comparer = ExclusiveWorker(
        "unknown-items",
        database,
        UNKNOWN_ITEMS_LOCK,
        unknown_items.step,
        idle_seconds=settings.bot_check_seconds,
    )
    workers = (importer, rotator, keeper, guard, marker, comparer)
    return Feedback(
        servicer,
        people,
        bots,
        catalogue,
        unknown_items,
        experiments,
        log,
        notifier,
        database,
        workers,
        stopped,
    )


def serve() -> None:
    """Serves until SIGTERM."""
    settings = load_settings(FeedbackSettings)
    telemetry = Telemetry(SERVICE, settings)
    # Keys first: a missing one is not mended by waiting for the database.
    Door.from_directory(settings.keys_path)
    feedback = _when_the_database_is_up(lambda: _prepared(settings), telemetry)
    server = GrpcServer(
        SERVICE,
        settings,
        telemetry,
        register=[feedback.register],
        service_names=[SERVICE_NAME],
        priorities=PRIORITIES,
    )
    stopped = threading.Event()
    server.on_drain(stopped.set)
    server.on_drain(feedback.servicer.drain)
    server.on_drain(feedback.stopped.set)
    try:
        server.start()
        server.set_ready(True)
        feedback.start()
        # The thread that takes calls in, the one that reads and those that commit hand work to each other: whoever has it
        # waited 5 ms for the interpreter, time and again.
        sys.setswitchinterval(SWITCH_INTERVAL_SECONDS)
        # What is here now stays. The columns of events under way are many objects without a circle among them:
        # looking through them again and again took a tenth of the time.
        gc.collect()
        gc.freeze()
        gc.set_threshold(GC_ALLOCATIONS)
        threading.Thread(
            target=_watch_database,
            args=(feedback, server, telemetry, stopped),
            name="database-watch",
            daemon=True,
        ).start()
        server.serve_until_signal()
    finally:
        feedback.close()


def _prepared(settings: FeedbackSettings) -> Feedback:
    url = resolve_url(settings)
    if settings.auto_migrate:
        migrate(url, SERVICE)
    return wire(settings, url)


def _when_the_database_is_up(prepare: Callable[[], Feedback], telemetry: Telemetry) -> Feedback:
    deadline = time.monotonic() + STARTUP_PATIENCE_SECONDS
    while True:
        try:
            return prepare()
        except Unavailable as error:
            if time.monotonic() > deadline:
                raise
            telemetry.logger.warning("waiting for the database", reason=error.reason, **error.metadata)
            time.sleep(1.0)


def _watch_database(
    feedback: Feedback, server: GrpcServer, telemetry: Telemetry, stopped: threading.Event
) -> None:
    """Tells load balancers while the log cannot be reached, and completes erasures that were cut short."""
    ready, finish_at, minimum_age_seconds = True, 0.0, 0.0
    while not stopped.wait(1.0 if finish_at else 0.0):
        try:
            if time.monotonic() >= finish_at:
                if count := feedback.people.finish_erasures(minimum_age_seconds):
                    telemetry.logger.info("erasures completed", count=count)
                # Those of before this start at once; later ones only when whoever began them must have given up.
                finish_at, minimum_age_seconds = (
                    time.monotonic() + ERASURE_CHECK_SECONDS,
                    ERASURE_GRACE_SECONDS,
                )
            with feedback.database.connect() as connection:
                connection.execute("SELECT 1")
            reachable = True
        except (ShopkeeperError, psycopg.Error):
            reachable = False
            stopped.wait(1.0)
        if reachable != ready:
            ready = reachable
            server.set_ready(ready, "" if ready else "the database cannot be reached")


def _stop_broken(experiments: RunExperiments) -> bool:
    stopped = experiments.stop_broken()
    for experiment in stopped:
        cause = experiment.stop_cause.name.lower() if experiment.stop_cause else ""
        get_logger(SERVICE).warning("experiment stopped", experiment=experiment.experiment_id, cause=cause)
    return bool(stopped)


def finish_erasures(settings: FeedbackSettings) -> None:
    """Erases whoever has a tombstone that is not completed: after a restore, before anything is served."""
    database = Database(resolve_url(settings), schema=SERVICE, pool_size=2)
    try:
        people = PostgresPeople(database, TextCipher.from_directory(settings.keys_path))
        print(f"{people.finish_erasures()} erasures completed")
    finally:
        database.close()


def rewrap_keys(settings: FeedbackSettings) -> None:
    """Brings every data key under the present master key."""
    database = Database(resolve_url(settings), schema=SERVICE, pool_size=2)
    try:
        rewrapped, seen = rewrap_data_keys(database, TextCipher.from_directory(settings.keys_path))
        print(f"{rewrapped} of {seen} data keys wrapped anew; all are under the present master key")
    finally:
        database.close()


def move_tombstones(settings: FeedbackSettings, command: str, *options: str) -> None:
    """Writes the list of erased people to stdout, or reads it from stdin."""
    database = Database(resolve_url(settings), schema=SERVICE, pool_size=2)
    try:
        tombstones = TombstoneList.from_directory(database, settings.keys_path)
        if command == "export-tombstones":
            sys.stdout.write(tombstones.export())
        else:
            replayed = tombstones.replay(sys.stdin.read(), _exported_after(options))
            newest = replayed.newest_erased_at
            print(
                f"{replayed.people} people to be erased again, as of {replayed.exported_at.isoformat(timespec='seconds')}"
                f" (the newest erasure {newest.isoformat(timespec='seconds') if newest else 'none'}): run "
                "finish-erasures. Who was erased after that is not on the list: see the receipts since."
            )
    finally:
        database.close()


def _exported_after(arguments: Sequence[str]) -> datetime | None:
    match arguments:
        case []:
            return None
        case ["--exported-after", moment]:
            with suppress(ValueError):
                after = datetime.fromisoformat(moment)
                return after if after.tzinfo else after.replace(tzinfo=UTC)
    raise FailedPrecondition(
        "USAGE", "replay-tombstones takes --exported-after 2026-01-31T12:00:00Z, or nothing."
    )


def main() -> None:
    """Dispatches on the command."""
    command = sys.argv[1] if len(sys.argv) > 1 else "serve"
    if command == "serve":
        serve()
    elif command == "migrate":
        settings = load_settings(FeedbackSettings)
        migrate(resolve_url(settings), SERVICE)
    elif command == "finish-erasures":
        finish_erasures(load_settings(FeedbackSettings))
    elif command == "rewrap-keys":
        rewrap_keys(load_settings(FeedbackSettings))
    elif command in ("export-tombstones", "replay-tombstones"):
        move_tombstones(load_settings(FeedbackSettings), command, *sys.argv[2:])
    else:
        raise FailedPrecondition(
            "USAGE",
            f"Unknown command {command!r}; use serve, migrate, finish-erasures, rewrap-keys, export-tombstones or "
            "replay-tombstones.",
        )


if __name__ == "__main__":
    run_service(main)
