"""The one interceptor around every call: who may call, how many at once, for how long."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc
from grpc_health.v1 import health
from prometheus_client import Gauge

from shared import deferred_calls, errors
from shared.admission import Admission
from shared.authorization import Gatekeeper
from shared.compute_pool import ComputePool
from shared.deferred_calls import Deadlines, Deferral, DeferredCalls
from shared.load_shedding import LoadShedding
from shared.observed_call import Method, ObservedCall
from shared.serving_loop import ServingLoop, computed
from shared.telemetry import Telemetry

LONGEST_COMPUTING_SECONDS = 60.0
"""After which a call that computes fails, where its caller would wait for ever."""

_OPEN_STREAMS = Gauge("shopkeeper_grpc_open_streams", "Streams that occupy a thread.", ["grpc_service"])


class CallInterceptor(grpc.ServerInterceptor):
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
        loop: ServingLoop | None,
        computing_methods: frozenset[str],
        deferring: Admission,
        *,
        max_stream_age_seconds: float,
        max_streams: int,
    ) -> None:
        self._telemetry = telemetry
        self._draining = draining
        self._shedding = shedding
        self._computing = computing
        self._loop = loop
        self._computing_methods = computing_methods
        self._deferring = deferring
        self._deadlines = Deadlines()
        self._told_at = -math.inf
        self._gatekeeper = gatekeeper
        self._max_stream_age_seconds = max_stream_age_seconds
        self._max_streams = max_streams
        self._streams = threading.BoundedSemaphore(max_streams)
        self._wrapped: dict[str, grpc.RpcMethodHandler] = {}
        self._methods: dict[str, Method] = {}

    def close(self) -> None:
        """Ends what watches over calls."""
        self._deadlines.close()

    def intercept_service(self, continuation: Any, details: grpc.HandlerCallDetails) -> Any:
        path: str = details.method
        wrapped = self._wrapped.get(path)
        if wrapped is None:
            handler = continuation(details)
            # Unknown methods are not remembered: a caller must not be able to fill the memory with names.
            if handler is None:
                return self._unknown() if self._gatekeeper is not None else None
            wrapped = self._wrapped[path] = self._wrap(path, handler)
        method = self._methods.get(path)
        if method is None:
            return wrapped
        refusing = self._shedding.refusing_handler(method.service, method.name, details.invocation_metadata)
        if refusing is None:
            return wrapped
        self._count_refused(method)
        return refusing

    def _count_refused(self, method: Method) -> None:
        method.handled("RESOURCE_EXHAUSTED").inc()
        # One line a second: a flood of calls must not become a flood of lines.
        if (now := time.monotonic()) >= self._told_at + 1.0:
            self._told_at = now
            self._telemetry.logger.warning(
                "calls refused", reason="OVERLOADED", count=self._shedding.take_refused()
            )

    def _wrap(self, path: str, handler: Any) -> grpc.RpcMethodHandler:
        service, _, name = path.lstrip("/").rpartition("/")
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
        method = self._methods[path] = Method(self._telemetry, service, name, kind, path, self._gatekeeper)
        if handler.response_streaming:
            wrapped = self._streaming(method, behavior)
        elif handler.request_streaming:
            wrapped = self._limited(method, behavior)
        else:
            deferral = getattr(behavior, "deferral", None)
            computing = self._computing if name in self._computing_methods else None
            wrapped = self._unary(method, behavior if computing is None else computing.in_turn(behavior))
            # By this attribute grpc takes another pool for one method.
            if deferral is not None and deferred_calls.AVAILABLE:
                self._shedding.watch(self._deferring, [name])
                wrapped.experimental_thread_pool = DeferredCalls(
                    method, deferral, self._deadlines, self._deferring
                )
            elif self._loop is not None and computing is not None and deferred_calls.AVAILABLE:
                begin = computed(self._loop, behavior, handler)
                deferral = Deferral(begin, LONGEST_COMPUTING_SECONDS, _took_too_long)
                wrapped.experimental_thread_pool = DeferredCalls(method, deferral, self._deadlines)
            elif computing is not None:
                wrapped.experimental_thread_pool = computing
        return make(wrapped, handler.request_deserializer, handler.response_serializer)

    def _unknown(self) -> grpc.RpcMethodHandler:
        # Admitted by no policy, so refused in the words that forbidden methods are refused in.
        method = Method(self._telemetry, "unknown", "unknown", "unary", "", self._gatekeeper)
        return grpc.unary_unary_rpc_method_handler(self._unary(method, lambda _request, _context: None))

    def _unary(self, method: Method, behavior: Any) -> Any:
        def answer(request: Any, context: grpc.ServicerContext) -> Any:
            with method.observed(context) as observation:
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

    def _limited(self, method: Method, behavior: Any) -> Any:
        def answer(request_iterator: Any, context: grpc.ServicerContext) -> Any:
            with method.observed(context) as observation:
                if self._enter_stream(method, observation):
                    try:
                        return behavior(request_iterator, context)
                    except Exception as error:
                        observation.failed(error)
                    finally:
                        self._leave_stream(method)
            return observation.abort(context)

        return answer

    def _streaming(self, method: Method, behavior: Any) -> Any:
        def answer(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
            with method.observed(context) as observation:
                if self._enter_stream(method, observation):
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
                        self._leave_stream(method)
            if observation.error is not None:
                observation.abort(context)

        return answer

    def _enter_stream(self, method: Method, observation: ObservedCall) -> bool:
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
        _OPEN_STREAMS.labels(method.service).inc()
        return True

    def _leave_stream(self, method: Method) -> None:
        _OPEN_STREAMS.labels(method.service).dec()
        self._streams.release()


def _took_too_long() -> errors.ShopkeeperError:
    return errors.DeadlineExceeded("DEADLINE_EXCEEDED", "The deadline passed before there was an answer.")
