"""The profile service's process.

Usage:
    python -m services.profile [serve]    serves
    python -m services.profile migrate    brings the schema to the newest version
    python -m services.profile train-churn [--horizon-days DAYS]
                                          trains a churn model on the log and publishes it
    python -m services.profile export-vectors FILE.npz
                                          writes the vectors of all items for a training run
"""

from __future__ import annotations

import gc
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import grpc
import numpy as np
from shopkeeper.profile.v1 import (
    catalog_service_pb2,
    catalog_service_pb2_grpc,
    profile_service_pb2,
    profile_service_pb2_grpc,
)

from services.profile.clients.embeddings import RecommendEmbeddings
from services.profile.clients.encoders import image_encoder, text_encoder
from services.profile.clients.suggestions import RecommendSuggestions
from services.profile.converters.churn import ChurnConverter
from services.profile.converters.item_files import ItemDirectory
from services.profile.converters.items import encode_item
from services.profile.converters.profiles import ProfileConverter
from services.profile.converters.segment_language import parse_filter
from services.profile.converters.segments import SegmentConverter
from services.profile.domain.churn_risk import ChurnRisk
from services.profile.domain.content_space import DIMENSION
from services.profile.domain.events import Vocabulary
from services.profile.metrics import PrometheusMetrics
from services.profile.servicer.catalog import CatalogServicer
from services.profile.servicer.profiles import ProfileServicer
from services.profile.settings import ProfileSettings
from services.profile.storage import catalogue as catalogue_storage
from services.profile.storage import log as log_storage
from services.profile.storage.churn_alerts import PostgresChurnAlerts
from services.profile.storage.churn_registry import ChurnModels, gate_reasons, verdict
from services.profile.storage.contents import PostgresContents
from services.profile.storage.item_figures import PostgresItemFigures
from services.profile.storage.item_imports import PostgresItemImports
from services.profile.storage.merges import PostgresMerges
from services.profile.storage.purchases import PostgresPurchases
from services.profile.storage.rebuilds import PostgresRebuilds
from services.profile.storage.segments import PostgresSegments
from services.profile.use_cases.catalogue import Catalogue
from services.profile.use_cases.churn import ChurnWatch, train_churn
from services.profile.use_cases.follow_log import LogFollower
from services.profile.use_cases.item_imports import ManageItemImports, RunItemImports
from services.profile.use_cases.item_portraits import ItemPortraits
from services.profile.use_cases.item_vectors import ItemVectors
from services.profile.use_cases.live_histories import LiveHistories
from services.profile.use_cases.memberships import Memberships
from services.profile.use_cases.merged_users import MergedUsers
from services.profile.use_cases.population import PopulationWatch
from services.profile.use_cases.profiles import Profiles
from services.profile.use_cases.rebuilds import ManageRebuilds, RunRebuilds, warm
from services.profile.use_cases.segments import SegmentMembers, Segments
from shared.channel import open_channel, tls_of
from shared.database import Database, migrate, resolve_url
from shared.errors import Unavailable
from shared.exclusive_worker import ExclusiveWorker
from shared.identity import UserKey
from shared.keys import read_signing_key, read_verifying_key
from shared.privacy import Pseudonymizer
from shared.server import GrpcServer, run_service
from shared.settings import load_settings
from shared.telemetry import Telemetry, get_logger
from shared.tokens import TokenSigner

SERVICE_NAMES = (
    profile_service_pb2.DESCRIPTOR.services_by_name["ProfileService"].full_name,
    catalog_service_pb2.DESCRIPTOR.services_by_name["CatalogService"].full_name,
)


# One family with the lock of alerts: work that one replica does for all.
IMPORTS_LOCK = 0x53484F50_494D504F
REBUILDS_LOCK = 0x53484F50_52454255
CONTENTS_LOCK = 0x53484F50_434F4E54


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
    vectors: ItemVectors
    churn: ChurnWatch
    population: PopulationWatch
    memberships: Memberships
    merges: PostgresMerges
    pseudonymizer: Pseudonymizer
    store: catalogue_storage.PostgresCatalogue
    profile_servicer: ProfileServicer
    catalog_servicer: CatalogServicer
    listeners: tuple[log_storage.Listener, ...]
    workers: tuple[ExclusiveWorker, ...]
    threads: list[threading.Thread]
    drained: threading.Event
    channel: grpc.Channel

    @classmethod
    def wire(cls, settings: ProfileSettings, database_url: str) -> Profile:
        """Builds the service; nothing runs yet.

        Raises:
            FailedPrecondition: a key is missing.
        """
        pseudonymizer = Pseudonymizer.from_directory(settings.keys_path)
        channel = open_channel(settings.recommend_address, tls=tls_of(settings))
        signer = TokenSigner.from_directory(settings.keys_path)
        metrics = PrometheusMetrics()
        database = Database(database_url, schema="profile", pool_size=settings.pool_size)
        items, currencies = Vocabulary(), Vocabulary()
        log = log_storage.PostgresEventLog(database, items, currencies)
        histories = LiveHistories(log, settings.hot_users, metrics)
        merged = MergedUsers()
        segments = PostgresSegments(database)
        rebuilds = PostgresRebuilds(database, segments.users_after)
        follower = LogFollower(
            log, histories, merged, metrics, clock_us, partial(warm, rebuilds, histories, items, currencies)
        )
        store = catalogue_storage.PostgresCatalogue(database)
        catalogue = Catalogue(store, encode_item, metrics, clock_us)
        vectors = ItemVectors(
            PostgresContents(database),
            text_encoder(settings.text_encoder),
            image_encoder(settings.image_encoder),
            catalogue.publish_vectors,
        )
        catalogue.follow_vectors(vectors.touch, vectors.of)
        merges = PostgresMerges(database, pseudonymizer.current_version)
        purchases = PostgresPurchases(database)
        population = PopulationWatch(purchases, clock_us, settings.population_seconds)
        profiles = Profiles(
            follower,
            histories,
            merged,
            merges,
            items,
            currencies,
            catalogue.facts,
            lambda: population.current,
            clock_us,
            RecommendEmbeddings(channel),
        )
        churn = ChurnWatch(
            purchases,
            ChurnModels(settings.registry_path, read_verifying_key(settings.keys_path)),
            PostgresChurnAlerts(database),
            metrics,
            clock_us,
            settings.churn_score_seconds,
            settings.margin_share,
            RecommendSuggestions(channel),
        )
        drained = threading.Event()
        imports = PostgresItemImports(database)
        files = ItemDirectory(settings.import_path, clock_us)
        importer = ExclusiveWorker(
            "item-imports",
            database,
            IMPORTS_LOCK,
            RunItemImports(imports, files, catalogue, clock_us, drained).run_next,
            idle_seconds=2.0,
        )
        rebuilder = ExclusiveWorker(
            "rebuilds",
            database,
            REBUILDS_LOCK,
            RunRebuilds(rebuilds, log, merged, items, currencies, clock_us, drained).run_next,
            idle_seconds=2.0,
        )

        encoder = ExclusiveWorker("contents", database, CONTENTS_LOCK, vectors.work, idle_seconds=1.0)
        vectors.wake_worker = encoder.wake

        def risk_of(user_key: UserKey) -> ChurnRisk | None:
            known = churn.risk_of(user_key)
            return known[1] if known else None

        memberships = Memberships(
            segments,
            parse_filter,
            profiles.portrait,
            lambda user_key: risk_of(merged.of(user_key)),
            settings.segment_seconds,
        )
        converter = ProfileConverter(
            pseudonymizer,
            signer,
            items,
            currencies,
            profiles.summary,
            memberships.of,
            lambda: memberships.revision,
        )
        return cls(
            database,
            follower,
            histories,
            catalogue,
            vectors,
            churn,
            population,
            memberships,
            merges,
            pseudonymizer,
            store,
            ProfileServicer(
                profiles,
                ManageRebuilds(rebuilds, clock_us, rebuilder.wake),
                converter,
                churn,
                ChurnConverter(signer),
                Segments(segments),
                SegmentMembers(log, segments, merged.of, profiles.portrait, risk_of),
                SegmentConverter(signer),
                settings.catch_up_seconds,
                drained,
            ),
            CatalogServicer(
                catalogue,
                ItemPortraits(
                    store,
                    catalogue,
                    PostgresItemFigures(database),
                    vectors,
                    settings.item_portrait_seconds,
                    clock_us,
                ),
                ManageItemImports(imports, files, clock_us, importer.wake),
                signer,
                clock_us,
                drained,
            ),
            (
                log_storage.Listener(database, log_storage.CHANNEL, follower.nudge),
                log_storage.Listener(database, catalogue_storage.CHANNEL, catalogue.nudge),
            ),
            (importer, rebuilder, encoder),
            [],
            drained,
            channel,
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
            ("item-vectors", self.vectors.run),
            ("watch-churn", self.churn.run),
            ("watch-population", self.population.run),
            ("watch-segments", self.memberships.run),
            ("bring-merges-forward", self._bring_merges_forward),
            *((f"listen-{number}", listener.run) for number, listener in enumerate(self.listeners)),
        ]
        for name, run in loops:
            thread = threading.Thread(target=partial(_run_for_ever, name, run), name=name, daemon=True)
            self.threads.append(thread)
            thread.start()
        for worker in self.workers:
            worker.start()

    def readiness(self) -> tuple[bool, str]:
        """Returns whether calls can be answered, and if not, why.

        Once ready it stays so: through an outage of the database, shoppers in memory are still served.
        """
        if not self.follower.started:
            return False, self.follower.problem or "the log has not been read yet"
        if not self.catalogue.loaded:
            return False, self.catalogue.problem or "the catalogue has not been read yet"
        return True, ""

    def _bring_merges_forward(self) -> None:
        while not self.drained.is_set():
            try:
                self.merges.bring_forward(self.pseudonymizer.rotated)
                return
            except Unavailable:
                self.drained.wait(1.0)

    def drain(self) -> None:
        """Ends every stream and stops following."""
        self.drained.set()
        self.follower.stop()
        self.catalogue.stop()
        self.vectors.stop()
        self.churn.stop()
        self.population.stop()
        self.memberships.stop()
        for listener in self.listeners:
            listener.stop()

    def close(self) -> None:
        """Frees connections, after `drain`."""
        for worker in self.workers:
            worker.stop()
        for thread in self.threads:
            thread.join(5.0)
        self.store.close()
        self.database.close()
        self.channel.close()


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
    if arguments[:1] == ["train-churn"]:
        train_and_publish(settings, _horizon_days(arguments[1:]))
        return
    if arguments[:1] == ["export-vectors"] and len(arguments) == 2:
        count = export_vectors(settings, Path(arguments[1]))
        print(f"vectors of {count} items")
        return
    if arguments not in ([], ["serve"]):
        print(__doc__, file=sys.stderr)
        raise SystemExit(2)
    # Calls make little garbage that counting references does not end: look for it seldom.
    gc.set_threshold(20_000, 20, 50)
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
        if ready:
            # What has been loaded is not garbage: looking through it stops all threads for tens of milliseconds.
            gc.collect()
            gc.freeze()

    if settings.auto_migrate:
        _migrate_when_reachable(url, telemetry)
    profile.start(set_ready)
    server.serve_until_signal()
    profile.close()


def train_and_publish(settings: ProfileSettings, horizon_days: int) -> str:
    """Trains a churn model, publishes it, says how good it is, and returns its version.

    Raises:
        FailedPrecondition: a key is missing, or there is nothing to learn from.
        Unavailable: the log cannot be read.
    """
    signing_key = read_signing_key(settings.keys_path)
    models = ChurnModels(settings.registry_path, read_verifying_key(settings.keys_path))
    database = Database(resolve_url(settings), schema="profile", pool_size=2)
    try:
        model = train_churn(PostgresPurchases(database), horizon_days, clock_us())
    finally:
        database.close()
    version = models.publish(model, signing_key)
    print(f"churn model {version}: gate {verdict(model)}")
    for name, quality in (("model", model.quality), ("BG/NBD", model.reference_quality)):
        if quality is not None:
            print(
                f"  {name}: AUC {quality.auc:.4f}, logarithmic loss {quality.log_loss:.4f}, "
                f"calibration error {quality.expected_calibration_error:.4f}"
            )
    for reason in gate_reasons(model):
        print(f"  {reason}")
    return version


def export_vectors(settings: ProfileSettings, path: Path) -> int:
    """Writes `item_ids` (N,) and `vectors` (N, D), float32, as `numpy.savez` does, and returns N.

    A vector is an item's fused vector, of what encoders have read by now; items without one are left out.

    Raises:
        FailedPrecondition: an encoder that is chosen is not installed.
        Unavailable: the database does not answer.
    """
    database = Database(resolve_url(settings), schema="profile", pool_size=2)
    store = catalogue_storage.PostgresCatalogue(database)
    try:
        vectors = ItemVectors(
            PostgresContents(database),
            text_encoder(settings.text_encoder),
            image_encoder(settings.image_encoder),
            lambda _item_ids: None,
        )
        item_ids = [
            stored.item.item_id for part in store.load() for stored in part.items if not stored.item.deleted
        ]
        vectors.touch(item_ids)
        if not vectors.load_space():
            vectors.fit_space()
            vectors.load_space()
        _, found = vectors.of(item_ids)
    finally:
        store.close()
        database.close()
    values = np.frombuffer(b"".join(packed for _, packed in found), "<f4")
    with path.open("wb") as stream:
        np.savez(
            stream,
            item_ids=np.array([item_id for item_id, _ in found], np.str_),
            vectors=values.reshape(len(found), DIMENSION),
        )
    return len(found)


def _horizon_days(arguments: list[str]) -> int:
    if not arguments:
        return 90
    match arguments:
        case ["--horizon-days", days] if days.isascii() and days.isdigit() and 1 <= int(days) <= 365:
            return int(days)
    print("train-churn takes --horizon-days DAYS, 1 to 365; 90 by default", file=sys.stderr)
    raise SystemExit(2)


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
