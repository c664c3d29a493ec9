"""The profile service's process.

Usage:
    python -m services.profile            serves
    python -m services.profile migrate    brings the schema to the newest version
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import grpc
from shopkeeper.profile.v1 import (
    catalog_service_pb2,
    catalog_service_pb2_grpc,
    profile_service_pb2,
    profile_service_pb2_grpc,
)

from services.profile.converters.items import encode_item
from services.profile.converters.profiles import ProfileConverter
from services.profile.domain.events import Vocabulary
from services.profile.metrics import PrometheusMetrics
from services.profile.servicer.catalog import CatalogServicer
from services.profile.servicer.profiles import ProfileServicer
from services.profile.settings import ProfileSettings
from services.profile.storage import catalogue as catalogue_storage
from services.profile.storage import log as log_storage
from services.profile.use_cases.catalogue import Catalogue
from services.profile.use_cases.follow_log import LogFollower
from services.profile.use_cases.live_histories import LiveHistories
from services.profile.use_cases.profiles import Profiles
from shared.database import Database, migrate, resolve_url
from shared.errors import Unavailable
from shared.privacy import Pseudonymizer
from shared.server import GrpcServer, run_service
from shared.settings import load_settings
from shared.telemetry import Telemetry, get_logger
from shared.tokens import TokenSigner

SERVICE_NAMES = (
    profile_service_pb2.DESCRIPTOR.services_by_name["ProfileService"].full_name,
    catalog_service_pb2.DESCRIPTOR.services_by_name["CatalogService"].full_name,
)


def clock_us() -> int:
    """Returns microseconds since 1970."""
    return time.time_ns() // 1000


@dataclass(frozen=True, slots=True)
class Profile:
    """The parts of the running service."""

    database: Database
    follower: LogFollower
    histories: LiveHistories
    catalogue: Catalogue
    store: catalogue_storage.PostgresCatalogue
    profile_servicer: ProfileServicer
    catalog_servicer: CatalogServicer
    listeners: tuple[log_storage.Listener, ...]
    threads: list[threading.Thread]

    @classmethod
    def wire(cls, settings: ProfileSettings, database_url: str) -> Profile:
        """Builds the service; nothing runs yet.

        Raises:
            FailedPrecondition: a key is missing.
        """
        pseudonymizer = Pseudonymizer.from_directory(settings.keys_path)
        signer = TokenSigner.from_directory(settings.keys_path)
        metrics = PrometheusMetrics()
        database = Database(database_url, schema="profile", pool_size=settings.pool_size)
        items, currencies = Vocabulary(), Vocabulary()
        log = log_storage.PostgresEventLog(database, items, currencies)
        histories = LiveHistories(log, settings.hot_users, metrics)
        follower = LogFollower(log, histories, metrics, clock_us)
        store = catalogue_storage.PostgresCatalogue(database)
        catalogue = Catalogue(store, encode_item, metrics, clock_us)
        profiles = Profiles(follower, histories, items, currencies, catalogue.facts, clock_us)
        converter = ProfileConverter(pseudonymizer, signer, items, currencies, profiles.summary)
        return cls(
            database,
            follower,
            histories,
            catalogue,
            store,
            ProfileServicer(profiles, converter, settings.catch_up_seconds),
            CatalogServicer(catalogue, signer, clock_us),
            (
                log_storage.Listener(database, log_storage.CHANNEL, follower.nudge),
                log_storage.Listener(database, catalogue_storage.CHANNEL, catalogue.nudge),
            ),
            [],
        )

    def register(self, server: grpc.Server) -> None:
        """Adds both services to a server."""
        profile_service_pb2_grpc.add_ProfileServiceServicer_to_server(self.profile_servicer, server)
        catalog_service_pb2_grpc.add_CatalogServiceServicer_to_server(self.catalog_servicer, server)

    def start(self, set_ready: Callable[[bool, str], None] = lambda _ready, _reason: None) -> None:
        """Starts following the log and the catalogue; tells readiness as it changes."""
        told: list[tuple[bool, str]] = []

        def tell() -> None:
            ready, reason = self.readiness()
            if told[-1:] != [(ready, reason)]:
                told[:] = [(ready, reason)]
                set_ready(ready, reason)

        loops: list[tuple[str, Callable[[], None]]] = [
            ("follow-log", partial(self.follower.run, tell)),
            ("follow-items", partial(self.catalogue.run, tell)),
            *((f"listen-{number}", listener.run) for number, listener in enumerate(self.listeners)),
        ]
        for name, run in loops:
            thread = threading.Thread(target=partial(_run_for_ever, name, run), name=name, daemon=True)
            self.threads.append(thread)
            thread.start()

    def readiness(self) -> tuple[bool, str]:
        """Returns whether calls can be answered, and if not, why.

        Once ready it stays so: through an outage of the database, shoppers in memory are still served.
        """
        if not self.follower.started:
            return False, self.follower.problem or "the log has not been read yet"
        if not self.catalogue.loaded:
            return False, self.catalogue.problem or "the catalogue has not been read yet"
        return True, ""

    def drain(self) -> None:
        """Ends every stream and stops following."""
        self.follower.stop()
        self.catalogue.stop()
        for listener in self.listeners:
            listener.stop()

    def close(self) -> None:
        """Frees connections, after `drain`."""
        for thread in self.threads:
            thread.join(5.0)
        self.store.close()
        self.database.close()


def _run_for_ever(name: str, run: Callable[[], None]) -> None:
    """Runs a loop that ends when it is told to; a bug in it is logged, and must not end it."""
    while True:
        try:
            run()
            return
        except Exception:
            get_logger("profile").exception("loop failed; it begins again", loop=name)
            time.sleep(1.0)


def main() -> None:
    """Serves until a signal, or migrates."""
    settings = load_settings(ProfileSettings)
    arguments = sys.argv[1:]
    if arguments == ["migrate"]:
        migrate(resolve_url(settings), "profile")
        return
    if arguments:
        print(__doc__, file=sys.stderr)
        raise SystemExit(2)
    telemetry = Telemetry("profile", settings)
    url = resolve_url(settings)
    profile = Profile.wire(settings, url)
    server = GrpcServer(
        "profile", settings, telemetry, register=[profile.register], service_names=SERVICE_NAMES
    )
    server.on_drain(profile.drain)
    server.start()

    def set_ready(ready: bool, reason: str) -> None:
        server.set_ready(ready, reason)
        telemetry.logger.info("ready" if ready else "not ready", reason=reason)

    if settings.auto_migrate:
        _migrate_when_reachable(url, telemetry)
    profile.start(set_ready)
    server.serve_until_signal()
    profile.close()


def _migrate_when_reachable(url: str, telemetry: Telemetry) -> None:
    while True:
        try:
            migrate(url, "profile")
            return
        except Unavailable as error:
            telemetry.logger.warning("cannot migrate yet", reason=error.message)
            time.sleep(1.0)


if __name__ == "__main__":
    run_service(main)
