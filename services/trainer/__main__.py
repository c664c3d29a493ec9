"""The trainer: `python -m services.trainer` serves, `python -m services.trainer migrate` migrates.

The composition root: the only place that wires. This process never imports TensorFlow.
"""

from __future__ import annotations

import sys
import threading
from datetime import UTC, datetime

from shopkeeper.trainer.v1 import trainer_service_pb2_grpc

from services.trainer.clock import next_run_at
from services.trainer.drift import DriftMeter
from services.trainer.metrics import RunMetrics
from services.trainer.privacy.accounting import epsilon_of_ledger
from services.trainer.privacy.ledger import PostgresPrivacyLedger
from services.trainer.retirement import Retirement
from services.trainer.scheduler import Scheduler
from services.trainer.servicer import TrainerServicer
from services.trainer.settings import TrainerSettings
from services.trainer.snapshot_upkeep import SnapshotUpkeep
from services.trainer.storage import (
    DirectoryRegistry,
    PostgresRunOverview,
    PostgresRunStore,
    PostgresScheduleStore,
)
from services.trainer.supervisor import Supervisor
from services.trainer.use_cases import Models, PrivacyBudgets, Schedules, TrainingRuns
from shared.bundle import Registry
from shared.database import Database, migrate, resolve_url
from shared.errors import FailedPrecondition, Unavailable
from shared.keys import read_signing_key, read_verifying_key
from shared.server import GrpcServer, run_service
from shared.settings import load_settings
from shared.telemetry import Telemetry
from shared.tokens import TokenSigner

SERVICE_NAME = "shopkeeper.trainer.v1.TrainerService"


class Trainer:
    """The service, wired: a server and a supervisor over one database and one registry.

    Raises:
        FailedPrecondition: a key is missing, or the address cannot be had.
        Unavailable: the database cannot be reached.
    """

    def __init__(self, settings: TrainerSettings, telemetry: Telemetry, database_url: str) -> None:
        signer = TokenSigner.from_directory(settings.keys_path)
        self.database = Database(database_url, schema="trainer")
        registry = Registry(settings.registry_path)
        store = PostgresRunStore(self.database)
        ledger = PostgresPrivacyLedger(
            self.database, settings.privacy_epsilon_limit, settings.privacy_delta, epsilon_of_ledger
        )
        self.supervisor = Supervisor(store, self.database, registry, settings, database_url, telemetry.logger)
        # Streams wait on it, so that a draining server need not wait for them.
        self._draining = threading.Event()
        versions = DirectoryRegistry(registry, read_verifying_key(settings.keys_path))
        runs = TrainingRuns(
            store, self.supervisor, versions, wait=self._wait, max_queued=settings.max_queued_runs
        )
        models = Models(versions, wait=self._wait)
        schedule_store = PostgresScheduleStore(self.database)
        drift = DriftMeter(self.database, registry, telemetry.logger)
        self.scheduler = Scheduler(
            schedule_store,
            store,
            self.supervisor,
            drift.why_to_train,
            telemetry.logger,
            drift_interval_seconds=settings.drift_check_seconds,
            max_queued=settings.max_queued_runs,
        )
        self.snapshots = SnapshotUpkeep(settings, database_url, telemetry.logger)
        self.retirement = Retirement(registry, settings.model_retention_days, telemetry.logger)
        schedules = Schedules(schedule_store, next_run_at=next_run_at, now=lambda: datetime.now(UTC))
        self.metrics = RunMetrics(PostgresRunOverview(self.database), ledger, drift.latest)
        self.metrics.register()
        budgets = PrivacyBudgets(ledger, required=settings.privacy_required)
        servicer = TrainerServicer(runs, models, schedules, budgets, signer)
        self.server = GrpcServer(
            "trainer",
            settings,
            telemetry,
            register=[
                lambda server: trainer_service_pb2_grpc.add_TrainerServiceServicer_to_server(servicer, server)
            ],
            service_names=[SERVICE_NAME],
        )
        self.server.on_drain(self._draining.set)
        self.server.on_drain(self.scheduler.stop)
        self.server.on_drain(self.snapshots.stop)
        self.server.on_drain(self.supervisor.stop)
        self.server.on_drain(self.retirement.stop)

    def start(self) -> int:
        """Starts answering and supervising; returns the port."""
        port = self.server.start()
        self.supervisor.start()
        self.scheduler.start()
        self.snapshots.start()
        self.retirement.start()
        self.server.set_ready(True)
        return port

    def close(self) -> None:
        """Ends the server, the runs' processes and the connections."""
        self._draining.set()
        self.scheduler.stop()
        self.snapshots.stop()
        self.supervisor.stop()
        self.retirement.stop()
        self.server.stop(0)
        self.metrics.unregister()
        self.database.close()

    def _wait(self, seconds: float) -> None:
        if self._draining.wait(seconds):
            raise Unavailable("DRAINING", "The trainer is stopping; call again and resume.")


def serve() -> None:
    """Serves until SIGTERM."""
    settings = load_settings(TrainerSettings)
    telemetry = Telemetry("trainer", settings)
    # Before the database: a missing key is what an operator should hear of first.
    read_signing_key(settings.keys_path)
    database_url = resolve_url(settings)
    if settings.auto_migrate:
        migrate(database_url, "trainer")
    trainer = Trainer(settings, telemetry, database_url)
    trainer.start()
    try:
        trainer.server.serve_until_signal()
    finally:
        trainer.database.close()


def main() -> None:
    """Dispatches on the command."""
    command = sys.argv[1] if len(sys.argv) > 1 else "serve"
    if command == "serve":
        serve()
    elif command == "migrate":
        migrate(resolve_url(load_settings(TrainerSettings)), "trainer")
    else:
        raise FailedPrecondition("USAGE", f"Unknown command {command!r}; use serve or migrate.")


if __name__ == "__main__":
    run_service(main)
