"""What is told of a call: its span, its deadline, its status, its figures and its line in the log."""

from __future__ import annotations

import time
import uuid
from contextlib import nullcontext
from typing import Any

import grpc
from grpc_status import rpc_status
from opentelemetry import context as trace_context
from opentelemetry import propagate, trace
from prometheus_client import Counter, Histogram

from shared import deadline, errors, grpc_status
from shared.authorization import Gatekeeper
from shared.telemetry import Telemetry, current_trace_id

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


class Method:
    """What is known of a method before anybody calls it."""

    def __init__(
        self,
        telemetry: Telemetry,
        service: str,
        name: str,
        kind: str,
        path: str,
        gatekeeper: Gatekeeper | None,
    ) -> None:
        self.telemetry = telemetry
        self.path = path
        self.gatekeeper = gatekeeper
        self.service = service
        self.name = name
        self.kind = kind
        self.seconds = _SECONDS.labels(service, name, kind)
        self._handled: dict[str, Any] = {}

    def handled(self, code: str) -> Any:
        counter = self._handled.get(code)
        if counter is None:
            counter = self._handled[code] = _HANDLED.labels(self.service, self.name, self.kind, code)
        return counter

    def observed(self, context: grpc.ServicerContext) -> ObservedCall:
        return ObservedCall(self, context)


class ObservedCall:
    """One call under way."""

    __slots__ = ("_attached", "_context", "_method", "_span", "_start", "caller", "error")

    def __init__(self, method: Method, context: grpc.ServicerContext) -> None:
        self._method = method
        self._context = context
        self.error: Exception | None = None
        self.caller = ""
        self._span: Any = None
        self._attached: Any = None

    def __enter__(self) -> ObservedCall:
        self.begin()
        self.attach()
        return self

    def begin(self) -> None:
        """The call begins; `end` ends it, on whichever thread."""
        self._start = time.perf_counter()
        if self._method.telemetry.traces_exported:
            carrier = {
                key: value for key, value in self._context.invocation_metadata() if key == "traceparent"
            }
            parent = propagate.extract(carrier)
            self._span = self._method.telemetry.tracer.start_span(
                f"{self._method.service}/{self._method.name}", context=parent, kind=trace.SpanKind.SERVER
            )

    def attach(self) -> None:
        """What this thread does is done for the call, until `detach`."""
        deadline.begin(deadline.time_remaining_seconds(self._context, None))
        if self._span is not None:
            self._attached = trace_context.attach(trace.set_span_in_context(self._span))

    def detach(self) -> None:
        """The thread is done with the call."""
        deadline.end()
        if self._attached is not None:
            trace_context.detach(self._attached)
            self._attached = None

    @property
    def span_context(self) -> trace.SpanContext:
        """Names the call's span to those who link to it; not valid where the call is not traced."""
        return trace.INVALID_SPAN_CONTEXT if self._span is None else self._span.get_span_context()

    def admit(self) -> None:
        """Checks that the caller may call this, where there is a policy; fails as `Gatekeeper.admit` does."""
        if self._method.gatekeeper is not None:
            self.caller = self._method.gatekeeper.admit(self._context, self._method.path)
            if self._span is not None:
                self._span.set_attribute("shopkeeper.caller", self.caller)

    def failed(self, error: Exception) -> None:
        """Notes why the call fails."""
        self.error = error

    def __exit__(self, *_exception: object) -> None:
        self.end()
        self.detach()

    def end(self) -> None:
        """Counts and logs what became of the call. Before its answer is sent: an answered call is active no more."""
        seconds = time.perf_counter() - self._start
        code = "OK" if self.error is None else self._code(self.error)
        if self.error is None and not self._context.is_active():
            code = "CANCELLED"
        self._method.seconds.observe(seconds)
        self._method.handled(code).inc()
        if self.error is not None:
            with nullcontext() if self._span is None else trace.use_span(self._span, record_exception=False):
                self._log(code, seconds)
        if self._span is not None:
            self._span.set_attribute("rpc.grpc.status_code", code)
            self._span.end()

    def abort(self, context: grpc.ServicerContext) -> Any:
        """Ends the call with the error's status. `abort` raises: it must stand outside of any `except`."""
        if self.error is None or _is_abort(self.error):
            raise self.error or AssertionError("nothing failed")
        context.abort_with_status(self.status())

    def status(self) -> grpc.Status:
        """Returns what the caller of a failed call is told."""
        error = self.error
        if isinstance(error, errors.ShopkeeperError):
            status = grpc_status.to_status(error)
        else:
            status = grpc_status.internal_status(getattr(error, "trace_id", "none"))
        return rpc_status.to_status(status)

    def _code(self, error: Exception) -> str:
        if isinstance(error, errors.ShopkeeperError):
            return grpc_status.code_of(error).name
        return "ABORTED_BY_HANDLER" if _is_abort(error) else "INTERNAL"

    def _log(self, code: str, seconds: float) -> None:
        logger, error = self._method.telemetry.logger, self.error
        values = {
            "method": f"{self._method.service}/{self._method.name}",
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
