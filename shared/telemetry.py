"""Logs, traces and metrics: structured, correlated, and free of personal data."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Any

import structlog
from opentelemetry import propagate, trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from prometheus_client import start_http_server

if TYPE_CHECKING:
    from shared.settings import ServiceSettings


def get_logger(name: str) -> Any:
    """Returns a structured logger; its first positional argument is the event, the rest are key-values."""
    return structlog.get_logger(name)


class Telemetry:
    """Configures the process once: logging, the tracer, and the metrics port.

    Args:
        service_name: `feedback`, `profile`, `trainer` or `recommend`.
        settings: level and format of logs, collector, metrics port.
    """

    def __init__(self, service_name: str, settings: ServiceSettings) -> None:
        self.service_name = service_name
        self._settings = settings
        configure_logging(service_name, settings.log_level, settings.log_format)
        self.logger = get_logger(service_name)
        # Without a collector nothing would read the spans, so none are made.
        self.traces_exported = settings.otlp_endpoint is not None
        if settings.otlp_endpoint is not None:
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

            provider = TracerProvider(resource=Resource.create({"service.name": service_name}))
            exporter = OTLPSpanExporter(
                endpoint=settings.otlp_endpoint, insecure=not settings.otlp_endpoint.startswith("https://")
            )
            provider.add_span_processor(BatchSpanProcessor(exporter))
            trace.set_tracer_provider(provider)
            self._provider: TracerProvider | None = provider
        else:
            self._provider = None
        propagate.set_global_textmap(TraceContextTextMapPropagator())
        self.tracer = trace.get_tracer("shopkeeper")

    def serve_metrics(self) -> None:
        """Starts the Prometheus endpoint where one is configured.

        Raises:
            OSError: the port is taken.
        """
        if self._settings.metrics_port:
            host = self._settings.listen.rpartition(":")[0].strip("[]") or "127.0.0.1"
            start_http_server(self._settings.metrics_port, addr=host)

    def close(self) -> None:
        """Sends what is still held back."""
        if self._provider is not None:
            self._provider.shutdown()


def configure_logging(service_name: str, level: str = "info", log_format: str = "json") -> None:
    """Makes structlog and the standard library write one line an event to stderr."""
    severity = logging.getLevelNamesMapping()[level.upper()]
    renderer: Any = (
        structlog.processors.JSONRenderer()
        if log_format == "json"
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    )
    processors: list[Any] = [
        structlog.contextvars.merge_contextvars,
        _add_trace_id,
        lambda _logger, _method, event: {**event, "service": service_name},
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
        renderer,
    ]
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(severity),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
    logging.basicConfig(level=max(severity, logging.WARNING), stream=sys.stderr, force=True)


def current_trace_id() -> str:
    """Returns the trace id of the call under way, 32 hexadecimal digits, or an empty text."""
    context = trace.get_current_span().get_span_context()
    return f"{context.trace_id:032x}" if context.is_valid else ""


def _add_trace_id(_logger: Any, _method: str, event: dict[str, Any]) -> dict[str, Any]:
    if trace_id := current_trace_id():
        event["trace_id"] = trace_id
    return event
