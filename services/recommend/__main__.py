"""Starts the recommend service: `python -m services.recommend`. The only place that wires."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import threading
import time
from collections.abc import Callable

import grpc

from services.recommend.clients.catalog import CatalogClient
from services.recommend.clients.experiments import ExperimentClient
from services.recommend.clients.metrics import (
    BUNDLE_REFUSED,
    CONFIGURATION_REFUSED,
    EVENT_LAG_SECONDS,
    MODEL_CREATED,
    MODEL_INFO,
    MODEL_SWAPS,
    SHADOW_OVERLAP,
    SHADOW_SKIPPED,
    PrometheusObserver,
)
from services.recommend.clients.profiles import ProfileClient
from services.recommend.converters.configuration import ConfigurationConverter
from services.recommend.converters.filter_language import FilterLanguage
from services.recommend.converters.requests import RequestConverter
from services.recommend.domain.catalog import CatalogStore
from services.recommend.domain.item_index import ItemIndex
from services.recommend.domain.live_counts import LiveCounts
from services.recommend.servicer import COMPUTING_METHODS, SERVICE_NAME, RecommendServicer, register
from services.recommend.settings import RecommendSettings
from services.recommend.storage import BundleModel, DocumentDirectory, ModelPool, ModelWatcher
from services.recommend.use_cases.configs import ServingConfigs
from services.recommend.use_cases.embedding import UserEmbedder
from services.recommend.use_cases.explainer import Explainer
from services.recommend.use_cases.histories import HistoryReader
from services.recommend.use_cases.recommender import Recommender
from services.recommend.use_cases.rehearsal import Rehearser, RequestRecorder
from services.recommend.use_cases.shadow import Comparison, Shadow
from services.recommend.use_cases.status import StatusReader
from services.recommend.use_cases.world import Worlds
from shared.admission import Priority
from shared.channel import open_channel, tls_of
from shared.keys import read_verifying_key
from shared.privacy import Pseudonymizer
from shared.server import GrpcServer, run_service
from shared.settings import EXIT_USAGE, load_settings
from shared.telemetry import Telemetry, get_logger
from shared.tokens import TokenSigner

_LOGGER = get_logger("recommend.configuration")

# Between two threads the interpreter changes hands at every array operation, which costs a request as much again.
_EXACT_THREADS = 1
_M_ARENA_MAX = -8
# A search spends milliseconds outside of the interpreter.
_SEARCHING_THREADS = 2


class SystemClock:
    """Implements `ports.Clock`."""

    def now(self) -> float:
        return time.time()

    def monotonic(self) -> float:
        return time.monotonic()


class RecommendService:
    """The wired service: a server, two streams and a watcher.

    Args:
        settings: see there.
        telemetry: logger and tracer.

    Raises:
        FailedPrecondition: a key is missing.
    """

    def __init__(self, settings: RecommendSettings, telemetry: Telemetry) -> None:
        self.settings = settings
        signer = TokenSigner.from_directory(settings.keys_path)
        pseudonymizer = Pseudonymizer.from_directory(settings.keys_path)
        public_key = read_verifying_key(settings.keys_path)
        clock = SystemClock()
        index = ItemIndex()
        self.catalog_store = CatalogStore(index, settings.content_vector_items)
        counts = LiveCounts()
        recorder = RequestRecorder(settings.recorded_requests)
        self._channel = open_channel(settings.profile_address, tls=tls_of(settings))
        self.profiles = ProfileClient(
            self._channel,
            index,
            counts,
            partition_index=settings.profile_partition_index,
            partition_count=settings.profile_partition_count,
            max_profiles=settings.max_profiles,
            max_items=settings.max_items,
            observe_lag=EVENT_LAG_SECONDS.observe,
            on_erased=recorder.forget,
        )
        self.catalog = CatalogClient(self._channel, self.catalog_store, index)

        def watcher(model: str, alias: str) -> ModelWatcher:
            return ModelWatcher(
                settings.registry_path,
                public_key,
                index,
                model=model,
                alias=alias,
                poll_seconds=settings.registry_poll_seconds,
                most_exact=settings.exact_search_items,
                on_loaded=_before_service(self.catalog_store, self._make_room),
                on_refused=lambda refusal: BUNDLE_REFUSED.labels(refusal.reason).inc(),
            )

        names = (settings.recommend_model, settings.recommend_alias)
        self.models = watcher(*names)
        self._model_pool = ModelPool(self.models, *names, watcher)
        self._feedback_channel = open_channel(settings.feedback_address, tls=tls_of(settings))
        self.experiments = ExperimentClient(self._feedback_channel, settings.experiment_poll_seconds)
        self._shadow = Shadow(_compared, _not_compared)
        filters = FilterLanguage()
        configuration_converter = ConfigurationConverter(
            filters, settings.recommend_model, settings.recommend_alias
        )
        self.configs = ServingConfigs(
            DocumentDirectory(settings.configuration_path),
            configuration_converter,
            clock,
            on_refused=_refused_document,
        )
        worlds = Worlds(self._model_pool, self.catalog_store, index)
        histories = HistoryReader(self.profiles, clock, aside=lambda: self.server.waiting())
        recommender = Recommender(
            worlds=worlds,
            histories=histories,
            counts=counts,
            filters=filters,
            catalog_stream=self.catalog,
            observer=PrometheusObserver(),
            clock=clock,
            new_id=lambda: os.urandom(8),
            configs=self.configs,
            record=recorder.record,
            experiments=self.experiments,
            shadow=self._shadow,
        )
        self._servicer = RecommendServicer(
            converter=RequestConverter(pseudonymizer, signer),
            signer=signer,
            recommender=recommender,
            explainer=Explainer(recommender),
            embedder=UserEmbedder(worlds, histories, clock),
            configs=self.configs,
            status=StatusReader(self._model_pool, self.profiles, self.catalog, clock),
            budget_seconds=settings.answer_budget_seconds,
            configuration_converter=configuration_converter,
            rehearser=Rehearser(recommender, recorder, clock),
        )
        self.server = GrpcServer(
            "recommend",
            settings,
            telemetry,
            register=[self._register],
            service_names=[SERVICE_NAME],
            priorities={"BatchRecommend": Priority.LOW, "RehearseRule": Priority.LOW},
            computing_methods=COMPUTING_METHODS,
            computing_threads=settings.computing_threads or _EXACT_THREADS,
            shared_port=settings.shared_port,
        )
        self._stopped = threading.Event()

    def start(self) -> int:
        """Starts everything and returns the port; calls are accepted at once, readiness follows."""
        port = self.server.start()
        self.profiles.start()
        self.catalog.start()
        self.models.start()
        self._look_at_configuration()
        self.experiments.start()
        threading.Thread(target=self._follow_configuration, name="configuration", daemon=True).start()
        threading.Thread(target=self._become_ready, name="readiness", daemon=True).start()
        return port

    def stop(self, grace_seconds: float = 0.0) -> None:
        """Ends everything."""
        self._stopped.set()
        self.server.stop(grace_seconds)
        self.close()

    def close(self) -> None:
        """Ends what runs beside the server."""
        self._stopped.set()
        self._model_pool.stop()
        self._shadow.stop()
        self.experiments.stop()
        self.profiles.stop()
        self.catalog.stop()
        self._channel.close()
        self._feedback_channel.close()

    def _become_ready(self) -> None:
        # Without the catalogue an item that is withdrawn might be shown; but not to answer is worse.
        complete = self.catalog.wait_until_complete(self.settings.catalog_grace_seconds)
        _forget_garbage()
        if not self._stopped.is_set():
            self.server.set_ready(True, "" if complete else "degraded: the catalogue has not arrived yet")

    def _follow_configuration(self) -> None:
        while not self._stopped.wait(self.settings.configuration_poll_seconds):
            self._look_at_configuration()

    def _look_at_configuration(self) -> None:
        self.configs.look()
        self._model_pool.follow(
            names for config in self.configs.current().configs.values() for names in config.models()
        )

    def _make_room(self, model: BundleModel) -> None:
        if model.is_searched and not self.settings.computing_threads:
            self.server.set_computing_threads(_SEARCHING_THREADS)

    def _register(self, server: grpc.Server) -> None:
        register(self._servicer, server)


def _forget_garbage() -> None:
    """Takes what has been loaded out of the collector's sight: it is not garbage, and is looked at for nothing.

    A full collection over the catalogue's objects stops all threads for tens of milliseconds at 12,000 items.
    """
    gc.collect()
    gc.freeze()
    _give_memory_back()


def _give_memory_back() -> None:
    """Has the allocator return what loading left behind; glibc keeps it otherwise."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _use_few_arenas() -> None:
    """Has glibc keep two heaps instead of eight a core: threads here take turns, and each heap keeps what it once held."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 2)


def _before_service(
    catalog_store: CatalogStore, make_room: Callable[[BundleModel], None]
) -> Callable[[BundleModel], None]:
    previous: list[BundleModel] = []

    def prepare(model: BundleModel) -> None:
        # Makes room for the model's items beside the old model, not in the first request of the new one.
        catalog_store.publish()
        make_room(model)
        gc.freeze()
        for old in previous:
            MODEL_INFO.remove(old.name, old.version)
        previous[:] = [model]
        MODEL_INFO.labels(model.name, model.version).set(1)
        if model.created_time is not None:
            MODEL_CREATED.labels(model.name).set(model.created_time)
        MODEL_SWAPS.inc()

    return prepare


def _compared(comparison: Comparison) -> None:
    SHADOW_OVERLAP.labels(comparison.serving_config).observe(comparison.overlap)
    _LOGGER.info(
        "shadow compared",
        serving_config=comparison.serving_config,
        shown=comparison.shown_version,
        shadow=comparison.shadow_version,
        items=comparison.item_count,
        overlap=round(comparison.overlap, 3),
        rank_biased_overlap=round(comparison.rank_biased_overlap, 3),
    )


def _not_compared(error: Exception | None) -> None:
    SHADOW_SKIPPED.labels("busy" if error is None else "failed").inc()
    if error is not None:
        _LOGGER.warning("shadow failed", error=f"{type(error).__name__}: {error}")


def _refused_document(kind: str, document_id: str, why: str) -> None:
    CONFIGURATION_REFUSED.labels(kind).inc()
    _LOGGER.error("document of the configuration left out", kind=kind, id=document_id, why=why)


def main() -> None:
    """Serves until SIGTERM or SIGINT."""
    if sys.argv[1:] not in ([], ["serve"], ["migrate"]):
        print("usage: python -m services.recommend [serve|migrate]", file=sys.stderr)
        raise SystemExit(EXIT_USAGE)
    if sys.argv[1:] == ["migrate"]:
        print("recommend keeps nothing in a database: nothing to migrate", file=sys.stderr)
        return
    _use_few_arenas()
    # A stream's message or a version being loaded would hold the interpreter for 5 ms each time it is let go for an array.
    sys.setswitchinterval(0.0005)
    # Requests make little garbage that counting references does not end: look for it seldom.
    gc.set_threshold(20_000, 20, 50)
    settings = load_settings(RecommendSettings)
    service = RecommendService(settings, Telemetry("recommend", settings))
    service.start()
    try:
        service.server.serve_until_signal()
    finally:
        service.close()


if __name__ == "__main__":
    run_service(main)
