"""Callers of a gRPC method that cost next to nothing: a load that takes the machine from the server measures itself.

grpcio's client takes some 240 µs of CPU a call, as much as many a server. A unary call is two frames of HTTP/2
there and three back (https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md), so one thread and a
selector do. As with grpcio's own client, headers that repeat travel as indexes into HPACK's table (RFC 7541).
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import struct
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _GOAWAY, _WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
_END_STREAM, _ACK, _END_HEADERS = 1, 1, 4
_INITIAL_WINDOW_SIZE, _LARGEST_WINDOW = 4, 2**31 - 1
_DEFAULT_WINDOW, _LARGEST_FRAME = 65_535, 16_384


def _frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def _literal(name: bytes, value: bytes) -> bytes:
    # With incremental indexing: the next request names it by its place in the table.
    return b"\x40" + bytes([len(name)]) + name + bytes([len(value)]) + value


@dataclass(slots=True)
class LoadResult:
    """What a run took.

    Attributes:
        seconds: from the first call to the last answer.
        latencies: seconds of every call, in the order of their answers. Of paced calls since the moment for
            which they were planned, so that a stalled server cannot hide its stall by being called less.
        failures: calls that were answered without a message.
        responses: the last message of each caller.
    """

    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    failures: int = 0
    responses: list[bytes] = field(default_factory=list)


class _Caller:
    """One connection with at most one call under way."""

    def __init__(self, port: int, method: str) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setblocking(False)
        self._first_headers = (
            b"\x83\x86"  # :method POST and :scheme http, of the static table
            + _literal(b":path", method.encode())
            + _literal(b":authority", f"127.0.0.1:{port}".encode())
            + _literal(b"content-type", b"application/grpc")
            + _literal(b"te", b"trailers")
        )
        # The newest entry of the table is number 62.
        self._headers = b"\x83\x86" + bytes([0x80 | 65, 0x80 | 64, 0x80 | 63, 0x80 | 62])
        self._received = b""
        self._unsent = b""
        self._body = b""
        self._next_stream = 1
        self._connection_window = _DEFAULT_WINDOW
        self._stream_window = self._initial_window = _DEFAULT_WINDOW
        self._message = b""
        self.started = 0.0
        self.busy = False
        self._send(
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
            + _frame(_SETTINGS, 0, 0, struct.pack(">HI", _INITIAL_WINDOW_SIZE, _LARGEST_WINDOW))
            + _frame(_WINDOW_UPDATE, 0, 0, struct.pack(">I", _LARGEST_WINDOW - _DEFAULT_WINDOW))
        )

    def call(self, request: bytes, started: float) -> None:
        headers = self._headers if self._next_stream > 1 else self._first_headers
        self._body = b"\x00" + struct.pack(">I", len(request)) + request
        self._message = b""
        self._stream_window = self._initial_window
        self.started = started
        self.busy = True
        self._send(_frame(_HEADERS, _END_HEADERS, self._next_stream, headers) + self._data())

    def received(self) -> bytes | None:
        """Reads what has come; returns the message of a call that ended (empty where it failed), else None."""
        chunk = self.socket.recv(262_144)
        if not chunk:
            raise ConnectionError("the server closed a connection")
        self._received += chunk
        ended = None
        content, at = self._received, 0
        while len(content) - at >= 9:
            length = int.from_bytes(content[at : at + 3], "big")
            if len(content) - at < 9 + length:
                break
            kind, flags, stream = struct.unpack_from(">BBI", content, at + 3)
            payload = content[at + 9 : at + 9 + length]
            at += 9 + length
            if self._took(kind, flags, stream, payload):
                ended = self._message[5:]
                self.busy = False
                self._next_stream += 2
        self._received = content[at:]
        return ended

    def _took(self, kind: int, flags: int, stream: int, payload: bytes) -> bool:
        """Takes a frame; returns whether it ended the call."""
        if kind == _DATA:
            self._message += payload
        elif kind == _WINDOW_UPDATE:
            increment = int.from_bytes(payload, "big")
            if stream == 0:
                self._connection_window += increment
            elif stream == self._next_stream:
                self._stream_window += increment
            if self._body:
                self._send(self._data())
        elif kind == _SETTINGS and not flags & _ACK:
            for name, value in struct.iter_unpack(">HI", payload):
                if name == _INITIAL_WINDOW_SIZE:
                    self._stream_window += value - self._initial_window
                    self._initial_window = value
            self._send(_frame(_SETTINGS, _ACK, 0) + (self._data() if self._body else b""))
        elif kind == _PING and not flags & _ACK:
            self._send(_frame(_PING, _ACK, 0, payload))
        elif kind == _GOAWAY:
            raise ConnectionError("the server is going away")
        if kind == _RST_STREAM:
            self._message = b""
        return kind == _RST_STREAM or (kind in (_HEADERS, _DATA) and bool(flags & _END_STREAM))

    def _data(self) -> bytes:
        frames = []
        while self._body:
            size = min(len(self._body), _LARGEST_FRAME, self._connection_window, self._stream_window)
            if size <= 0:
                break
            part, self._body = self._body[:size], self._body[size:]
            self._connection_window -= size
            self._stream_window -= size
            frames.append(_frame(_DATA, 0 if self._body else _END_STREAM, self._next_stream, part))
        return b"".join(frames)

    def _send(self, content: bytes) -> None:
        self._unsent += content
        self.flush()

    def flush(self) -> bool:
        """Sends what can be sent; returns whether something is left."""
        if self._unsent:
            with contextlib.suppress(BlockingIOError):
                self._unsent = self._unsent[self.socket.send(self._unsent) :]
        return bool(self._unsent)


def send_all(
    port: int, method: str, requests: Sequence[bytes], callers: int, calls_per_second: float | None = None
) -> LoadResult:
    """Sends every request, `callers` of them at once, each over a connection of its own.

    Args:
        calls_per_second: the pace at which calls are begun; as fast as the answers come when None.
    """
    selector = selectors.DefaultSelector()
    everyone = [_Caller(port, method) for _ in range(callers)]
    for caller in everyone:
        selector.register(caller.socket, selectors.EVENT_READ, caller)
    result, waiting, idle = LoadResult(), deque(requests), deque(everyone)
    last: dict[_Caller, bytes] = {}
    begin = time.perf_counter()
    planned = 0
    while waiting or len(idle) < callers:
        now = time.perf_counter()
        while waiting and idle:
            moment = now
            if calls_per_second:
                moment = begin + planned / calls_per_second
                if moment > now:
                    break
            planned += 1
            idle.popleft().call(waiting.popleft(), moment)
        timeout = 30.0
        if calls_per_second and waiting and idle:
            timeout = max(0.0, begin + planned / calls_per_second - time.perf_counter())
        ready = selector.select(timeout)
        if not ready and timeout == 30.0:
            raise TimeoutError("no answer for 30 s")
        for key, events in ready:
            caller = key.data
            if events & selectors.EVENT_READ and (message := caller.received()) is not None:
                result.latencies.append(time.perf_counter() - caller.started)
                result.failures += not message
                last[caller] = message
                idle.append(caller)
            wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if caller.flush() else 0)
            if wanted != key.events:
                selector.modify(caller.socket, wanted, caller)
        for caller in everyone if len(ready) == 0 else ():
            caller.flush()
    result.seconds = time.perf_counter() - begin
    result.responses = list(last.values())
    selector.close()
    for caller in everyone:
        caller.socket.close()
    return result
