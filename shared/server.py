"""The gRPC server that every service runs in.

Synchronous, on a thread pool: grpcio's sync server costs some 200 µs of CPU a
call where aio costs 300 to 350, and the work behind a call (NumPy, LiteRT,
psycopg) releases the interpreter lock. A stream occupies a thread, so their
number and their age are limited.
"""

from __future__ import annotations

import math
import signal
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent import futures
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from grpc_status import rpc_status
from opentelemetry import context as trace_context
from opentelemetry import propagate, trace
from prometheus_client import Counter, Gauge, Histogram

from shared import deadline, errors, grpc_status
from shared.admission import Admission, Priority
from shared.authentication import Authenticator, TokenVerifier
from shared.authorization import Gatekeeper
from shared.compute_pool import ComputePool
from shared.load_shedding import AdmittedPool, LoadShedding
from shared.settings import ServiceSettings
from shared.telemetry import Telemetry, current_trace_id
from shared.tls import TlsDirectory, refuse_plain_text

MAX_MESSAGE_BYTES = 32 * 1024 * 1024

_HANDLED = Counter(
    "grpc_server_handled_total",
    "RPCs completed on the server, by outcome.",
    ["grpc_service", "grpc_method", "grpc_type", "grpc_code"],
)
_SECONDS = Histogram(
    "grpc_server_handling_seconds",
    "Seconds until an RPC was completed.",
    ["grpc_service", "grpc_method", "grpc_type"],
    buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0),
)
_OPEN_STREAMS = Gauge("shopkeeper_grpc_open_streams", "Streams that occupy a thread.", ["grpc_service"])


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
        computing_threads: int = 2,
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
        computing = None
        if computing_methods:
            computing = (
                Admission(computing_threads, settings.max_queue_seconds),
                frozenset(computing_methods),
            )
            self._computing = ComputePool(computing_threads, computing[0], threads)
        self._server = grpc.server(
            AdmittedPool(threads, admission),
            interceptors=[
                _CallInterceptor(
                    telemetry,
                    self._draining,
                    LoadShedding(admission, priorities or {}, computing),
                    gatekeeper_of(settings),
                    self._computing,
                    frozenset(computing_methods),
                    max_stream_age_seconds=settings.max_stream_age_seconds,
                    # A quarter of the threads stays free for short calls and health checks.
                    max_streams=max(1, threads * 3 // 4),
                )
            ],
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
        return nullcontext() if self._computing is None else self._computing.waiting()

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


def time_remaining_seconds(context: grpc.ServicerContext, default: float) -> float:
    """Returns the seconds until the caller's deadline, or `default` where it set none."""
    remaining = context.time_remaining()
    # Without a deadline grpcio answers with a number of years.
    return default if remaining is None or remaining > 1e6 else max(0.0, remaining)


class _CallInterceptor(grpc.ServerInterceptor):
    """Around every call: trace, deadline, error status, metrics, log line.

    One interceptor, not five, and one wrapped handler a method, not one a call: each layer of
    indirection costs microseconds on the hot path.
    """

    def __init__(
        self,
        telemetry: Telemetry,
        draining: threading.Event,
        shedding: LoadShedding,
        gatekeeper: Gatekeeper | None,
        computing: ComputePool | None,
        computing_methods: frozenset[str],
        *,
        max_stream_age_seconds: float,
        max_streams: int,
    ) -> None:
        self._telemetry = telemetry
        self._draining = draining
        self._shedding = shedding
        self._computing = computing
        self._computing_methods = computing_methods
        self._told_at = -math.inf
        self._gatekeeper = gatekeeper
        self._max_stream_age_seconds = max_stream_age_seconds
        self._max_streams = max_streams
        self._streams = threading.BoundedSemaphore(max_streams)
        self._wrapped: dict[str, grpc.RpcMethodHandler] = {}
        self._calls: dict[str, _Call] = {}

    def intercept_service(self, continuation: Any, details: grpc.HandlerCallDetails) -> Any:
        method: str = details.method
        wrapped = self._wrapped.get(method)
        if wrapped is None:
            handler = continuation(details)
            # Unknown methods are not remembered: a caller must not be able to fill the memory with names.
            if handler is None:
                return self._unknown() if self._gatekeeper is not None else None
            wrapped = self._wrapped[method] = self._wrap(method, handler)
        call = self._calls.get(method)
        if call is None:
            return wrapped
        refusing = self._shedding.refusing_handler(call.service, call.method, details.invocation_metadata)
        if refusing is None:
            return wrapped
        self._count_refused(call)
        return refusing

    def _count_refused(self, call: _Call) -> None:
        call.handled("RESOURCE_EXHAUSTED").inc()
        # One line a second: a flood of calls must not become a flood of lines.
        if (now := time.monotonic()) >= self._told_at + 1.0:
            self._told_at = now
            self._telemetry.logger.warning(
                "calls refused", reason="OVERLOADED", count=self._shedding.take_refused()
            )

    def _wrap(self, method: str, handler: Any) -> grpc.RpcMethodHandler:
        service, _, name = method.lstrip("/").rpartition("/")
        kinds = {
            (False, False): ("unary", handler.unary_unary, grpc.unary_unary_rpc_method_handler),
            (False, True): ("server_stream", handler.unary_stream, grpc.unary_stream_rpc_method_handler),
            (True, False): ("client_stream", handler.stream_unary, grpc.stream_unary_rpc_method_handler),
            (True, True): ("bidi_stream", handler.stream_stream, grpc.stream_stream_rpc_method_handler),
        }
        kind, behavior, make = kinds[handler.request_streaming, handler.response_streaming]
        # Health and reflection bring their own manners; the contract is no secret, but for those who may know it.
        if service == health.SERVICE_NAME or (service.startswith("grpc.") and self._gatekeeper is None):
            return handler
        call = self._calls[method] = _Call(self._telemetry, service, name, kind, method, self._gatekeeper)
        if handler.response_streaming:
            wrapped = self._streaming(call, behavior)
        elif handler.request_streaming:
            wrapped = self._limited(call, behavior)
        else:
            wrapped = self._unary(call, behavior)
            if self._computing is not None and name in self._computing_methods:
                # The attribute by which grpc takes another pool for one method.
                wrapped.experimental_thread_pool = self._computing
        return make(wrapped, handler.request_deserializer, handler.response_serializer)

    def _unknown(self) -> grpc.RpcMethodHandler:
        # Admitted by no policy, so refused in the words that forbidden methods are refused in.
        call = _Call(self._telemetry, "unknown", "unknown", "unary", "", self._gatekeeper)
        return grpc.unary_unary_rpc_method_handler(self._unary(call, lambda _request, _context: None))

    def _unary(self, call: _Call, behavior: Any) -> Any:
        def answer(request: Any, context: grpc.ServicerContext) -> Any:
            with call.observed(context) as observation:
                # A call that waited in the queue past its deadline is work for nobody.
                if (remaining := context.time_remaining()) is not None and remaining <= 0:
                    observation.failed(
                        errors.DeadlineExceeded("DEADLINE_EXCEEDED", "The deadline passed before work began.")
                    )
                else:
                    try:
                        observation.admit()
                        return behavior(request, context)
                    except Exception as error:
                        observation.failed(error)
            return observation.abort(context)

        return answer

    def _limited(self, call: _Call, behavior: Any) -> Any:
        def answer(request_iterator: Any, context: grpc.ServicerContext) -> Any:
            with call.observed(context) as observation:
                if self._enter_stream(call, observation):
                    try:
                        return behavior(request_iterator, context)
                    except Exception as error:
                        observation.failed(error)
                    finally:
                        self._leave_stream(call)
            return observation.abort(context)

        return answer

    def _streaming(self, call: _Call, behavior: Any) -> Any:
        def answer(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
            with call.observed(context) as observation:
                if self._enter_stream(call, observation):
                    end = time.monotonic() + self._max_stream_age_seconds
                    responses: Any = ()
                    try:
                        # Inside: a behaviour that is no generator fails here, not at its first response.
                        responses = behavior(request, context)
                        for response in responses:
                            yield response
                            # An abandoned or endless stream would hold its thread for ever.
                            if self._draining.is_set() or time.monotonic() > end:
                                break
                    except GeneratorExit:
                        raise
                    except Exception as error:
                        observation.failed(error)
                    finally:
                        if hasattr(responses, "close"):
                            responses.close()
                        self._leave_stream(call)
            if observation.error is not None:
                observation.abort(context)

        return answer

    def _enter_stream(self, call: _Call, observation: _Observation) -> bool:
        try:
            observation.admit()
        except Exception as error:
            observation.failed(error)
            return False
        if self._draining.is_set():
            observation.failed(errors.Unavailable("DRAINING", "This replica is stopping; connect again."))
            return False
        if not self._streams.acquire(blocking=False):
            observation.failed(
                errors.ResourceExhausted(
                    "TOO_MANY_STREAMS",
                    f"This replica serves its {self._max_streams} streams; try another, or raise SHOPKEEPER_WORKERS.",
                )
            )
            return False
        _OPEN_STREAMS.labels(call.service).inc()
        return True

    def _leave_stream(self, call: _Call) -> None:
        _OPEN_STREAMS.labels(call.service).dec()
        self._streams.release()


class _Call:
    """What is known of a method before anybody calls it."""

    def __init__(
        self,
        telemetry: Telemetry,
        service: str,
        method: str,
        kind: str,
        path: str,
        gatekeeper: Gatekeeper | None,
    ) -> None:
        self.telemetry = telemetry
        self.path = path
        self.gatekeeper = gatekeeper
        self.service = service
        self.method = method
        self.kind = kind
        self.seconds = _SECONDS.labels(service, method, kind)
        self._handled: dict[str, Any] = {}

    def handled(self, code: str) -> Any:
        counter = self._handled.get(code)
        if counter is None:
            counter = self._handled[code] = _HANDLED.labels(self.service, self.method, self.kind, code)
        return counter

    def observed(self, context: grpc.ServicerContext) -> _Observation:
        return _Observation(self, context)


class _Observation:
    """One call under way."""

    __slots__ = ("_attached", "_call", "_context", "_span", "_start", "caller", "error")

    def __init__(self, call: _Call, context: grpc.ServicerContext) -> None:
        self._call = call
        self._context = context
        self.error: Exception | None = None
        self.caller = ""
        self._span: Any = None
        self._attached: Any = None

    def __enter__(self) -> _Observation:
        self._start = time.perf_counter()
        remaining = self._context.time_remaining()
        # Without a deadline grpcio answers with a number of years.
        deadline.begin(None if remaining is None or remaining > 1e6 else remaining)
        if self._call.telemetry.traces_exported:
            carrier = {
                key: value for key, value in self._context.invocation_metadata() if key == "traceparent"
            }
            parent = propagate.extract(carrier)
            self._span = self._call.telemetry.tracer.start_span(
                f"{self._call.service}/{self._call.method}", context=parent, kind=trace.SpanKind.SERVER
            )
            self._attached = trace_context.attach(trace.set_span_in_context(self._span, parent))
        return self

    def admit(self) -> None:
        """Checks that the caller may call this, where there is a policy; fails as `Gatekeeper.admit` does."""
        if self._call.gatekeeper is not None:
            self.caller = self._call.gatekeeper.admit(self._context, self._call.path)
            if self._span is not None:
                self._span.set_attribute("shopkeeper.caller", self.caller)

    def failed(self, error: Exception) -> None:
        self.error = error

    def __exit__(self, *_exception: object) -> None:
        deadline.end()
        seconds = time.perf_counter() - self._start
        code = "OK" if self.error is None else self._code(self.error)
        if self.error is None and not self._context.is_active():
            code = "CANCELLED"
        self._call.seconds.observe(seconds)
        self._call.handled(code).inc()
        if self.error is not None:
            self._log(code, seconds)
        if self._span is not None:
            self._span.set_attribute("rpc.grpc.status_code", code)
            self._span.end()
            trace_context.detach(self._attached)

    def abort(self, context: grpc.ServicerContext) -> Any:
        """Ends the call with the error's status. `abort` raises: it must stand outside of any `except`."""
        error = self.error
        if error is None or _is_abort(error):
            raise error or AssertionError("nothing failed")
        if isinstance(error, errors.ShopkeeperError):
            status = grpc_status.to_status(error)
        else:
            status = grpc_status.internal_status(current_trace_id() or getattr(error, "trace_id", "none"))
        context.abort_with_status(rpc_status.to_status(status))

    def _code(self, error: Exception) -> str:
        if isinstance(error, errors.ShopkeeperError):
            return grpc_status.code_of(error).name
        return "ABORTED_BY_HANDLER" if _is_abort(error) else "INTERNAL"

    def _log(self, code: str, seconds: float) -> None:
        logger, error = self._call.telemetry.logger, self.error
        values = {
            "method": f"{self._call.service}/{self._call.method}",
            "code": code,
            "ms": round(seconds * 1e3, 1),
        }
        if self.caller:
            values["caller"] = self.caller
        if isinstance(error, errors.DataLoss):
            logger.error("call failed", reason=error.reason, message=error.message, **values)
        elif isinstance(error, errors.ShopkeeperError):
            logger.info("call failed", reason=error.reason, **values)
        elif error is not None and not _is_abort(error):
            # Without a trace the log line still needs a handle that the caller can quote.
            trace_id = current_trace_id() or uuid.uuid4().hex
            error.trace_id = trace_id  # type: ignore[attr-defined]
            logger.error("call failed", reason="INTERNAL", quoted_trace_id=trace_id, exc_info=error, **values)


def _is_abort(error: Exception) -> bool:
    # grpcio's synchronous `context.abort` raises a bare Exception; it has set the status already.
    return type(error) is Exception and not error.args
