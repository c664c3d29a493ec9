"""A server stream that is opened again whenever it ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import grpc

from shared.errors import InvalidInput
from shared.grpc_status import from_rpc_error
from shared.telemetry import get_logger

_LOGGER = get_logger("recommend.streams")
_FIRST_BACKOFF_SECONDS = 0.1
_LAST_BACKOFF_SECONDS = 2.0
_SILENCE_SECONDS = 10.0


class ReconnectingStream:
    """A server stream that is opened again whenever it ends, from a thread of its own.

    Args:
        open_call: opens the stream; a call that can be iterated and cancelled.
        consume: takes one message.
        begin_anew: forgets where to resume: the other side does not know that place.
    """

    def __init__(
        self,
        name: str,
        open_call: Callable[[], Any],
        consume: Callable[[Any], None],
        begin_anew: Callable[[], None],
    ) -> None:
        self._name = name
        self._open_call = open_call
        self._consume = consume
        self._begin_anew = begin_anew
        self._stop = threading.Event()
        self._call: Any = None
        self._thread = threading.Thread(target=self._run, name=f"{name}-stream", daemon=True)
        self.connected = False
        self.last_message_time: float | None = None
        self.last_error = ""

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        call = self._call
        if call is not None:
            call.cancel()
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    def _run(self) -> None:
        backoff = _FIRST_BACKOFF_SECONDS
        while not self._stop.is_set():
            error = ""
            try:
                call = self._call = self._open_call()
                watchdog = Watchdog(call, _SILENCE_SECONDS)
                try:
                    for message in call:
                        watchdog.touch()
                        self._consume(message)
                        self.last_message_time = time.time()
                        self.connected, backoff = True, _FIRST_BACKOFF_SECONDS
                finally:
                    watchdog.stop()
            except grpc.RpcError as rpc_error:
                failure = from_rpc_error(rpc_error)
                error = f"{failure.reason}: {failure.message}"
                if isinstance(failure, InvalidInput):
                    self._begin_anew()
            except Exception as failure:
                # A message that cannot be taken in must not end the stream for good.
                error = f"{type(failure).__name__}: {failure}"
                _LOGGER.exception("message not taken in", stream=self._name)
                if self._call is not None:
                    self._call.cancel()
            if self._stop.is_set():
                return
            if error and (self.connected or not self.last_error):
                _LOGGER.warning("stream interrupted", stream=self._name, error=error)
            if error:
                self.last_error = error
                self.connected = False
                self._stop.wait(backoff)
                backoff = min(_LAST_BACKOFF_SECONDS, backoff * 2)
            else:
                # It reached its age limit: resumed at once, but never in a busy loop.
                self._stop.wait(0.01)


class Watchdog:
    """Cancels a call that has been silent for too long: a half-open connection looks like that."""

    def __init__(self, call: Any, seconds: float) -> None:
        self._call = call
        self._seconds = seconds
        self._touched = time.monotonic()
        self._done = threading.Event()
        threading.Thread(target=self._run, name="stream-watchdog", daemon=True).start()

    def touch(self) -> None:
        self._touched = time.monotonic()

    def stop(self) -> None:
        self._done.set()

    def _run(self) -> None:
        while not self._done.wait(1.0):
            if time.monotonic() - self._touched > self._seconds:
                self._call.cancel()
                return
