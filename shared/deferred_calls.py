"""Unary calls that no thread waits for: taken in by one thread, answered later by whichever has the answer.

grpcio's synchronous server keeps a thread for a call and wakes it three times: for the call, for its message, and
for what the handler waits for. Of calls that wait for others, such as for a shared commit, that is most of the cost:
some 300 µs of CPU a call, 95 without (see docs/decisions/0024-recording-calls-hold-no-thread.md); and calls that compute
(`shared.compute_pool`) come to their few threads whole, so that these never stop to wait for a message. Its public
interface has no other way. What is used of its inside is named in this module alone; where a release of grpcio has it
no more, AVAILABLE is false, and calls are answered by threads as ever.
"""

from __future__ import annotations

import inspect
import threading
import time
from collections.abc import Callable
from concurrent import futures
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from prometheus_client import Gauge

from shared.admission import Admission
from shared.errors import DeadlineExceeded, InvalidInput
from shared.observed_call import Method, ObservedCall

_inside: Any = None
_core: Any = None
try:
    from grpc import _server as _inside
    from grpc._cython import cygrpc as _core  # type: ignore[attr-defined, no-redef]
except ImportError:
    pass

_EXPECTED = {
    "_unary_response_in_pool": "rpc_event state behavior argument_thunk request_deserializer response_serializer",
    "_receive_message": "state call request_deserializer",
    "_status": "rpc_event state serialized_response",
    "_abort": "state call code details",
    "_Context": "rpc_event state request_deserializer",
}
_EXPECTED_OF_LOOP = {"_process_event_and_continue": "state event"}


def _has(functions: dict[str, str]) -> bool:
    for name, parameters in functions.items():
        found = getattr(_inside, name, None)
        if found is None or list(inspect.signature(found).parameters) != parameters.split():
            return False
    return True


def _is_as_expected() -> bool:
    if not _has(_EXPECTED):
        return False
    return hasattr(_inside, "_RECEIVE_MESSAGE_TOKEN") and hasattr(_core, "ReceiveMessageOperation")


AVAILABLE = _is_as_expected()
LOOP_AVAILABLE = AVAILABLE and _has(_EXPECTED_OF_LOOP) and hasattr(_core, "CompletionType")
# How much later than its deadline a call may be told that it has passed.
SWEEP_SECONDS = 0.05

_UNDER_WAY = Gauge(
    "shopkeeper_deferred_calls",
    "Calls taken in that hold no thread until their answer is there.",
    ["grpc_method"],
)


def _end(event: Any, state: Any, status: grpc.Status) -> None:
    with state.condition:
        state.code = status.code
        state.details = status.details.encode()
        state.trailing_metadata = status.trailing_metadata
        state.aborted = True
        _inside._abort(state, event.call, _core.StatusCode.unknown, b"")


class EndedCalls(futures.ThreadPoolExecutor):
    """Ends every call at once with one status, unread: a third cheaper than a handler that aborts."""

    def __init__(self, status: grpc.Status) -> None:
        super().__init__(max_workers=1)
        self._status = status

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Ends a call; what grpc would have had done for it is not done."""
        _, event, state, *_ = args
        _end(event, state, self._status)


class DeferredCall:
    """A call that was taken in. Exactly one of `answer` and `fail` has an effect, once, on any thread.

    Attributes:
        request: the message, as bytes.
        entered_at: as `Admission.enter` returned it; None before the message, and where nobody watches.
        expires_at: by the monotonic clock, when nobody waits any longer.
    """

    __slots__ = (
        "_context",
        "_event",
        "_observation",
        "_pool",
        "_state",
        "entered_at",
        "expires_at",
        "request",
    )

    def __init__(self, pool: DeferredCalls, event: Any, state: Any) -> None:
        self._pool = pool
        self._event = event
        self._state = state
        self._context = _inside._Context(event, state, None)
        self._observation = ObservedCall(pool.method, self._context)
        self.request: bytes | None = None
        self.entered_at: float | None = None
        self.expires_at = 0.0

    @property
    def observation(self) -> ObservedCall:
        """What is seen of the call."""
        return self._observation

    def admit(self) -> bool:
        """Returns whether the call is still worth its work, and allowed; where not, it has failed."""
        if self.expires_at <= time.monotonic():
            self.fail(DeadlineExceeded("DEADLINE_EXCEEDED", "The deadline passed before work began."))
            return False
        try:
            self._observation.admit()
        except Exception as error:
            self.fail(error)
            return False
        return True

    def serve(
        self,
        behavior: Callable[[Any, Any], Any],
        deserialize: Callable[[bytes], Any],
        serialize: Callable[[Any], bytes],
    ) -> None:
        """Answers the call on this thread, by a handler of grpc's and the functions that belong to it."""
        if not self._context.is_active():
            # Nobody waits for it any more: no work for nobody, least of all where others wait.
            if self._pool.ended(self):
                self._observation.end()
            return
        if not self.admit():
            return
        self._observation.attach()
        try:
            response = serialize(behavior(self._message(deserialize), self._context))
        except Exception as error:
            self.fail(error)
        else:
            self.answer(response)
        finally:
            self._observation.detach()

    def _message(self, deserialize: Callable[[bytes], Any]) -> Any:
        try:
            return deserialize(self.request or b"")
        except DecodeError as error:
            raise InvalidInput(
                "INVALID_REQUEST", f"The bytes are no message of this method: {error}."
            ) from error

    def answer(self, response: bytes) -> None:
        """Ends the call with its response."""
        if self._pool.ended(self):
            self._observation.end()
            _inside._status(self._event, self._state, response)

    def fail(self, error: Exception) -> None:
        """Ends the call with an error, as a handler does that raises it."""
        if self._pool.ended(self):
            self._observation.failed(error)
            self._observation.end()
            _end(self._event, self._state, self._observation.status())

    # On the thread that takes calls in

    def receive(self) -> None:
        """Begins to read the message."""
        state, call = self._state, self._event.call
        took = _inside._receive_message(state, call, self._took)

        def received(event: Any) -> Any:
            result = took(event)
            state.request = None
            if self.request is None and self._pool.ended(self):
                # The caller left, or ended the call without a message.
                with state.condition:
                    _inside._abort(
                        state,
                        call,
                        _core.StatusCode.unimplemented,
                        b"Exactly one request message is required.",
                    )
            return result

        call.start_server_batch((_core.ReceiveMessageOperation(0),), received)
        state.due.add(_inside._RECEIVE_MESSAGE_TOKEN)

    def _took(self, message: bytes) -> bytes:
        self.request = message
        self._pool.received(self)
        return message


class ServerEvents:
    """What happens to the calls of a server, for a thread that takes part in its loop."""

    def __init__(self, state: Any) -> None:
        self._state = state
        self._poll = state.completion_queue.poll
        self._timeout = _core.CompletionType.queue_timeout
        self._shutdown = _core.CompletionType.queue_shutdown
        self.ended = False

    @classmethod
    def of(cls, server: grpc.Server) -> ServerEvents | None:
        """Returns those of a server; None where this release of grpcio has no such inside."""
        state = getattr(server, "_state", None)
        if not LOOP_AVAILABLE or not hasattr(getattr(state, "completion_queue", None), "poll"):
            return None
        return cls(state)

    def take(self, until: float) -> bool:
        """Handles the next event, waiting for it until a time of the clock; returns whether there was one."""
        event = self._poll(until)
        if event.completion_type == self._timeout:
            return False
        if event.completion_type == self._shutdown or not _inside._process_event_and_continue(
            self._state, event
        ):
            self.ended = True
            return False
        return True


@dataclass(frozen=True, slots=True)
class Deferral:
    """How a method's calls are answered later; the attribute `deferral` of the function that would answer them.

    Attributes:
        begin: is given each call with its message, on the thread that takes calls in: it must return at once.
        longest_seconds: after which a call without a deadline fails.
        late: the error of a call whose time is up.
    """

    begin: Callable[[DeferredCall], None]
    longest_seconds: float
    late: Callable[[], Exception]


class DeferredCalls(futures.ThreadPoolExecutor):
    """Takes the calls of one method in. An executor only because grpc hands its calls to one.

    Args:
        method: what is known of it.
        deferral: what becomes of its calls.
        deadlines: ends calls whose time is up.
        admission: told of every call; a call waits, in its eyes, until it is answered. None: `deferral` sees to that.
    """

    def __init__(
        self, method: Method, deferral: Deferral, deadlines: Deadlines, admission: Admission | None = None
    ) -> None:
        super().__init__(max_workers=1)
        self.method = method
        self._deferral = deferral
        self._begin = deferral.begin
        self._admission = admission
        self._under_way: dict[DeferredCall, None] = {}
        _UNDER_WAY.labels(method.name).set_function(self._under_way.__len__)
        deadlines.watch(self)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Takes a call in; what grpc would have had done for it is not done."""
        _, event, state, *_ = args
        call = DeferredCall(self, event, state)
        remaining = event.call_details.deadline - time.time()
        # Without a deadline it is years away.
        call.expires_at = time.monotonic() + min(max(0.0, remaining), self._deferral.longest_seconds)
        self._under_way[call] = None
        call.observation.begin()
        call.receive()

    def received(self, call: DeferredCall) -> None:
        """The message of a call is there. Only now does it wait: a caller that stays silent is nobody's queue."""
        if self._admission is not None:
            call.entered_at = self._admission.enter()
        self._begin(call)

    def ended(self, call: DeferredCall) -> bool:
        """Returns whether the call is the asker's to end: whoever comes first."""
        try:
            del self._under_way[call]
        except KeyError:
            return False
        if self._admission is not None and call.entered_at is not None:
            self._admission.begin(call.entered_at)
            self._admission.end()
        return True

    def end_late(self, now: float) -> None:
        """Ends the calls whose time is up."""
        # A copy made in one step: calls come and go meanwhile.
        for call in list(self._under_way):
            if call.expires_at <= now:
                call.fail(self._deferral.late())


class Deadlines:
    """Ends calls whose time is up, of any number of methods, on one thread."""

    def __init__(self) -> None:
        self._watched: list[DeferredCalls] = []
        self._closed = threading.Event()

    def watch(self, calls: DeferredCalls) -> None:
        """Watches the calls of one method more."""
        self._watched.append(calls)
        if len(self._watched) == 1:
            threading.Thread(target=self._sweep, name="deferred-calls", daemon=True).start()

    def close(self) -> None:
        """Ends the watching."""
        self._closed.set()

    def _sweep(self) -> None:
        while not self._closed.wait(SWEEP_SECONDS):
            now = time.monotonic()
            for calls in tuple(self._watched):
                calls.end_late(now)
