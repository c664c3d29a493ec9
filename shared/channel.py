"""Channels to other services: retries, keepalive, load balancing and the caller's trace."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import grpc
from opentelemetry import propagate, trace

from shared.server import MAX_MESSAGE_BYTES


def open_channel(address: str, *, service: str = "", traced: bool = True) -> grpc.Channel:
    """Returns a channel to `host:port`; it connects when it is first used, and again after a loss.

    Args:
        address: a name that resolves to several addresses is balanced round robin.
        service: full name of the gRPC service whose calls are retried; empty for all.
        traced: hand the caller's trace context on.
    """
    channel = grpc.insecure_channel(
        address,
        options=[
            ("grpc.service_config", json.dumps(_service_config(service))),
            ("grpc.enable_retries", 1),
            ("grpc.keepalive_time_ms", 20_000),
            ("grpc.keepalive_timeout_ms", 5_000),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.max_pings_without_data", 0),
            # After an outage the next attempt comes soon: streams carry the freshness guarantee.
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.min_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 2_000),
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ],
    )
    return grpc.intercept_channel(channel, _TraceInterceptor()) if traced else channel


def _service_config(service: str) -> dict[str, Any]:
    return {
        "loadBalancingConfig": [{"round_robin": {}}],
        "methodConfig": [
            {
                "name": [{"service": service} if service else {}],
                # Below 10 ms of initial back-off grpcio 1.85 stalls.
                "retryPolicy": {
                    "maxAttempts": 4,
                    "initialBackoff": "0.05s",
                    "maxBackoff": "1s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            }
        ],
    }


class _ClientCallDetails(grpc.ClientCallDetails):
    def __init__(self, details: grpc.ClientCallDetails, metadata: list[tuple[str, str]]) -> None:
        self.method = details.method
        self.timeout = details.timeout
        self.metadata = tuple(metadata)
        self.credentials = details.credentials
        self.wait_for_ready = getattr(details, "wait_for_ready", None)
        self.compression = getattr(details, "compression", None)


class _TraceInterceptor(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamUnaryClientInterceptor,
    grpc.StreamStreamClientInterceptor,
):
    """Sends W3C `traceparent` with every call made inside a span."""

    def _intercept(self, continuation: Callable[..., Any], details: Any, request: Any) -> Any:
        if trace.get_current_span().get_span_context().is_valid:
            carrier: dict[str, str] = {}
            propagate.inject(carrier)
            details = _ClientCallDetails(details, [*(details.metadata or ()), *carrier.items()])
        return continuation(details, request)

    intercept_unary_unary = _intercept  # type: ignore[assignment]
    intercept_unary_stream = _intercept  # type: ignore[assignment]
    intercept_stream_unary = _intercept  # type: ignore[assignment]
    intercept_stream_stream = _intercept  # type: ignore[assignment]
