"""The gRPC server that every service runs in.

Synchronous, on a thread pool: grpcio's sync server costs some 200 µs of CPU a
call where aio costs 300 to 350, and the work behind a call (NumPy, LiteRT,
psycopg) releases the interpreter lock. Methods whose calls wait for others can do
without a thread a call: see `shared.deferred_calls`. A stream occupies a thread, so their
number and their age are limited.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent import futures
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from shared import errors
from shared.admission import Admission, Priority
from shared.authentication import Authenticator, TokenVerifier
from shared.authorization import Gatekeeper
from shared.compute_pool import ComputePool
from shared.interceptor import CallInterceptor
from shared.load_shedding import AdmittedPool, LoadShedding
from shared.serving_loop import ServingLoop
from shared.settings import ServiceSettings
from shared.telemetry import Telemetry
from shared.tls import TlsDirectory, refuse_plain_text

# Of calls that hold no thread: so many are under way at any load, and keep what they wait for busy.
DEFERRED_CALLS_THAT_ARE_NO_QUEUE = 16
MAX_MESSAGE_BYTES = 32 * 1024 * 1024


class GrpcServer:
    """A server with health, reflection, rich errors, metrics, traces and a graceful end.

    Args:
        service_name: for logs.
        settings: address, threads, drain, stream age.
        telemetry: logger and tracer.
        register: each adds one servicer to the `grpc.Server` it is given.
        service_names: full names of those services, for health and reflection.
        workers: threads; default from the settings.
        priorities: of methods, by their name; the others are NORMAL. Under overload LOW is refused first.
        computing_methods: unary methods that compute, by their name: they have threads of their own.
        computing_threads: how many of them compute at once; see `shared.compute_pool`.
        shared_port: several processes listen on the one port, and the kernel divides the connections.

    Raises:
        FailedPrecondition: neither TLS nor plain text on loopback is configured, or a file of it cannot be used.
    """

    def __init__(
        self,
        service_name: str,
        settings: ServiceSettings,
        telemetry: Telemetry,
        *,
        register: Sequence[Callable[[grpc.Server], None]],
        service_names: Sequence[str],
        workers: int | None = None,
        priorities: Mapping[str, Priority] | None = None,
        computing_methods: Collection[str] = (),
        computing_threads: int = 1,
        shared_port: bool = False,
    ) -> None:
        self._service_name = service_name
        self._settings = settings
        self._telemetry = telemetry
        self._service_names = list(service_names)
        self._draining = threading.Event()
        self._stopped = threading.Event()
        self._drain_callbacks: list[Callable[[], None]] = []
        threads = workers or settings.workers
        admission = Admission(threads, settings.max_queue_seconds)
        self._tls = TlsDirectory(settings.tls) if settings.tls is not None else None
        if self._tls is None:
            refuse_plain_text(settings.listen, settings.insecure)
        self._computing: ComputePool | None = None
        self._loop: ServingLoop | None = None
        computing = None
        if computing_methods:
            computing = (
                Admission(computing_threads, settings.max_queue_seconds),
                frozenset(computing_methods),
            )
            self._computing = ComputePool(computing_threads, computing[0], threads)
            self._loop = ServingLoop(self._computing, computing[0], threads)
        self._interceptor = CallInterceptor(
            telemetry,
            self._draining,
            LoadShedding(admission, priorities or {}, computing),
            gatekeeper_of(settings),
            self._computing,
            self._loop,
            frozenset(computing_methods),
            Admission(1, settings.max_queue_seconds, always=DEFERRED_CALLS_THAT_ARE_NO_QUEUE, together=True),
            max_stream_age_seconds=settings.max_stream_age_seconds,
            # A quarter of the threads stays free for short calls and health checks.
            max_streams=max(1, threads * 3 // 4),
        )
        self._server = grpc.server(
            AdmittedPool(threads, admission),
            interceptors=[self._interceptor],
            options=[
                ("grpc.so_reuseport", int(shared_port)),
                ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
                ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
            ],
            # Of gRPC's own, which says neither why nor when to return: far beyond what is ever let in.
            maximum_concurrent_rpcs=8_192,
        )
        if self._loop is not None:
            self._loop.attach(self._server)
        for add in register:
            add(self._server)
        # The health service has threads of its own, so that a full server is still seen alive.
        health_pool = futures.ThreadPoolExecutor(max_workers=2, thread_name_prefix="health")
        self._health = _Health(health_pool)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection(
            [*self._service_names, health.SERVICE_NAME, reflection.SERVICE_NAME], self._server
        )
        self.set_ready(False, "starting")
        # Liveness: the process answers. It never depends on a dependency.
        self._health.set("liveness", health_pb2.HealthCheckResponse.SERVING)
        self.port = 0
        self._probes: grpc.Server | None = None

    def start(self) -> int:
        """Binds and starts; returns the port.

        Raises:
            FailedPrecondition: the address cannot be had.
        """
        settings, tls = self._settings, self._tls
        self.port = _bind(
            self._server, settings.listen, tls.server_credentials() if tls else None, "SHOPKEEPER_LISTEN"
        )
        if tls is not None and settings.token_listen is not None:
            credentials = tls.server_credentials(client_certificates=False)
            _bind(self._server, settings.token_listen, credentials, "SHOPKEEPER_TOKEN_LISTEN")
        if settings.health_listen is not None:
            self._probes = grpc.server(futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="probe"))
            health_pb2_grpc.add_HealthServicer_to_server(self._health, self._probes)
            _bind(self._probes, settings.health_listen, None, "SHOPKEEPER_HEALTH_LISTEN")
        try:
            self._telemetry.serve_metrics()
        except OSError as error:
            raise errors.FailedPrecondition(
                "ADDRESS_UNAVAILABLE",
                f"Metrics port {self._settings.metrics_port} is taken; set SHOPKEEPER_METRICS_PORT to another, "
                "or to 0.",
            ) from error
        self._server.start()
        if self._probes is not None:
            self._probes.start()
        return self.port

    def set_ready(self, ready: bool, reason: str = "") -> None:
        """Tells load balancers whether to send calls here. Health checks name the service, or nothing."""
        if self._draining.is_set():
            ready = False
        status = (
            health_pb2.HealthCheckResponse.SERVING if ready else health_pb2.HealthCheckResponse.NOT_SERVING
        )
        for name in ("", *self._service_names):
            self._health.set(name, status)
        self._telemetry.logger.debug("readiness", ready=ready, reason=reason)

    def waiting(self) -> AbstractContextManager[None]:
        """While a handler of a computing method is in here, it waits, and another call may compute."""
        return nullcontext() if self._loop is None else self._loop.waiting()

    def set_computing_threads(self, count: int) -> None:
        """Changes how many calls of computing methods compute at once."""
        if self._computing is not None and self._computing.places != count:
            self._computing.resize(count)

    def on_drain(self, callback: Callable[[], None]) -> None:
        """Registers what must happen before calls under way are waited for, such as waking streams."""
        self._drain_callbacks.append(callback)

    def serve_until_signal(self) -> None:
        """Announces readiness of the address, then blocks until SIGTERM or SIGINT and drains."""
        wake = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: wake.set())
        host = self._settings.listen.rpartition(":")[0]
        self._telemetry.logger.info(f"{self._service_name} ready on {host}:{self.port}")
        # A wait without a timeout would hold signals back on some platforms.
        while not wake.wait(0.5):
            if self._stopped.is_set():
                return
        self.stop(self._settings.drain_seconds)

    def stop(self, grace_seconds: float = 0.0) -> None:
        """Refuses new calls, ends streams, waits for calls under way at most `grace_seconds`."""
        self._draining.set()
        self._health.enter_graceful_shutdown()
        for callback in self._drain_callbacks:
            try:
                callback()
            except Exception:
                self._telemetry.logger.exception("drain callback failed")
        self._server.stop(grace_seconds).wait()
        if self._probes is not None:
            self._probes.stop(None)
        if self._computing is not None:
            self._computing.shutdown()
        self._interceptor.close()
        self._telemetry.close()
        self._stopped.set()


class _Health(health.HealthServicer):
    """The health service on a pool of its own; left to itself, only `Watch` would be."""

    def __init__(self, pool: futures.ThreadPoolExecutor) -> None:
        super().__init__(experimental_non_blocking=True, experimental_thread_pool=pool)

        def check(request: Any, context: grpc.ServicerContext) -> Any:
            return health.HealthServicer.Check(self, request, context)

        check.experimental_thread_pool = pool  # type: ignore[attr-defined]
        self.Check = check  # type: ignore[method-assign]


def gatekeeper_of(settings: ServiceSettings) -> Gatekeeper | None:
    """Returns who admits calls; None where plain text on loopback was asked for.

    Raises:
        FailedPrecondition: TLS without a policy, or a file that cannot be used.
    """
    if settings.tls is None:
        return None
    if settings.policy is None:
        raise errors.FailedPrecondition(
            "POLICY_UNUSABLE",
            "SHOPKEEPER_TLS is set and SHOPKEEPER_POLICY is not: nobody could call anything. Set it to the file that "
            "says who may call what; deploy/k8s/base/policy.yaml is one to begin with.",
        )
    tokens = None
    if settings.token_keys is not None:
        tokens = TokenVerifier(settings.token_keys, settings.token_issuer, settings.token_audience)
    return Gatekeeper(settings.policy, Authenticator(tokens))


def _bind(server: grpc.Server, address: str, credentials: grpc.ServerCredentials | None, setting: str) -> int:
    try:
        if credentials is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise errors.FailedPrecondition(
            "ADDRESS_UNAVAILABLE",
            f"{address} cannot be listened on: it is taken, or not of this machine. End the "
            f"other process, or set {setting} to another host:port.",
            {"address": address},
        ) from error


def run_service(main: Callable[[], None]) -> None:
    """Runs a service's `main`; a failure that its operator can mend is one line and exit code 2."""
    import sys

    try:
        main()
    except errors.ShopkeeperError as error:
        print(f"{error.reason}: {error.message}", file=sys.stderr)
        raise SystemExit(2) from None
