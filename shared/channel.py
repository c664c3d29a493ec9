"""Channels to other services: retries, keepalive, load balancing, TLS and the caller's trace."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from typing import Any

import grpc
from opentelemetry import propagate, trace

from shared.server import MAX_MESSAGE_BYTES
from shared.settings import ServiceSettings
from shared.tls import TlsDirectory, refuse_plain_text

# A connection outlives the certificate that opened it, for as long as a stream may.
OLD_CHANNEL_SECONDS = 3_600.0


def tls_of(settings: ServiceSettings) -> TlsDirectory | None:
    """Returns the certificates of the settings, or None where none are configured.

    Raises:
        FailedPrecondition: TLS_UNUSABLE.
    """
    return TlsDirectory(settings.tls) if settings.tls is not None else None


def open_channel(
    address: str, *, service: str = "", traced: bool = True, tls: TlsDirectory | None = None
) -> grpc.Channel:
    """Returns a channel to `host:port`; it connects when it is first used, and again after a loss.

    Args:
        address: a name that resolves to several addresses is balanced round robin.
        service: full name of the gRPC service whose calls are retried; empty for all.
        traced: hand the caller's trace context on.
        tls: own certificate and trusted authority; new files are used by new connections.

    Raises:
        FailedPrecondition: PLAIN_TEXT_REFUSED: without `tls` only this machine is called.
    """

    def connect(credentials: grpc.ChannelCredentials | None) -> grpc.Channel:
        options = _options(service)
        channel = (
            grpc.insecure_channel(address, options)
            if credentials is None
            else grpc.secure_channel(address, credentials, options)
        )
        return grpc.intercept_channel(channel, _TraceInterceptor()) if traced else channel

    if tls is not None:
        return _FollowingChannel(tls, connect)
    refuse_plain_text(address, insecure=True)
    return connect(None)


def _options(service: str) -> list[tuple[str, Any]]:
    return [
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
    ]


class _FollowingChannel(grpc.Channel):
    """A channel that begins anew when the certificate's files change; calls under way end on the old one.

    gRPC's Python channels keep the certificate that they were opened with.
    """

    def __init__(self, tls: TlsDirectory, connect: Callable[[grpc.ChannelCredentials], grpc.Channel]) -> None:
        self._tls, self._connect = tls, connect
        self._lock = threading.Lock()
        self._pair = tls.pair()
        self._channel = connect(tls.channel_credentials())
        self._old: list[tuple[float, grpc.Channel]] = []
        self._subscribed: dict[Any, bool] = {}

    def current(self) -> grpc.Channel:
        """Returns the channel of the files as they are now."""
        if self._tls.pair() is not self._pair:
            self._renew()
        return self._channel

    def _renew(self) -> None:
        with self._lock:
            pair = self._tls.pair()
            if pair is self._pair:
                return
            old, now = self._channel, time.monotonic()
            channel = self._connect(self._tls.channel_credentials())
            for callback, try_to_connect in self._subscribed.items():
                old.unsubscribe(callback)
                channel.subscribe(callback, try_to_connect)
            self._channel, self._pair = channel, pair
            self._old.append((now + OLD_CHANNEL_SECONDS, old))
            for _, expired in [entry for entry in self._old if entry[0] <= now]:
                expired.close()
            self._old = [entry for entry in self._old if entry[0] > now]

    def unary_unary(self, *arguments: Any, **options: Any) -> Any:
        return _FollowingCall(self, "unary_unary", arguments, options)

    def unary_stream(self, *arguments: Any, **options: Any) -> Any:
        return _FollowingCall(self, "unary_stream", arguments, options)

    def stream_unary(self, *arguments: Any, **options: Any) -> Any:
        return _FollowingCall(self, "stream_unary", arguments, options)

    def stream_stream(self, *arguments: Any, **options: Any) -> Any:
        return _FollowingCall(self, "stream_stream", arguments, options)

    def subscribe(self, callback: Any, try_to_connect: bool | None = False) -> None:
        with self._lock:
            self._subscribed[callback] = bool(try_to_connect)
            self._channel.subscribe(callback, bool(try_to_connect))

    def unsubscribe(self, callback: Any) -> None:
        with self._lock:
            self._subscribed.pop(callback, None)
            self._channel.unsubscribe(callback)

    def close(self) -> None:
        with self._lock:
            for channel in (self._channel, *(channel for _, channel in self._old)):
                channel.close()
            self._old = []

    def __enter__(self) -> _FollowingChannel:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()


class _FollowingCall:
    """A method of a `_FollowingChannel`: made once for each channel that it is called on."""

    def __init__(
        self, channel: _FollowingChannel, kind: str, arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        self._channel, self._kind, self._arguments, self._options = channel, kind, arguments, options
        self._made: tuple[grpc.Channel | None, Any] = (None, None)

    def _callable(self) -> Any:
        channel = self._channel.current()
        made_for, made = self._made
        if made_for is not channel:
            made = getattr(channel, self._kind)(*self._arguments, **self._options)
            self._made = (channel, made)
        return made

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self._callable()(*arguments, **options)

    def with_call(self, *arguments: Any, **options: Any) -> Any:
        return self._callable().with_call(*arguments, **options)

    def future(self, *arguments: Any, **options: Any) -> Any:
        return self._callable().future(*arguments, **options)


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
