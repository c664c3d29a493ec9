"""Ways in which what a service depends on fails: a process that is killed or stopped, a wire that is bad."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent import futures
from enum import Enum
from pathlib import Path
from typing import Any

import grpc
from shopkeeper.feedback.v1 import experiment_pb2, feedback_service_pb2, feedback_service_pb2_grpc

REPOSITORY = Path(__file__).resolve().parents[2]


class Wire(Enum):
    """What a wire does with what it is given."""

    GOOD = "good"
    SLOW = "slow"
    CUT = "cut"
    HALF_OPEN = "half_open"


class Proxy:
    """A wire to a port, or to the path of a Unix socket, whose behaviour changes at any time.

    SLOW holds every piece back; CUT resets connections and refuses new ones; HALF_OPEN takes everything, also
    new connections, and hands nothing on: what a dead router or a powered-off host looks like.
    """

    SLOW_SECONDS = 0.4

    def __init__(self, target: int | str) -> None:
        self._target = target
        self.wire = Wire.GOOD
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._closed = False
        threading.Thread(target=self._accept, daemon=True).start()

    def become(self, wire: Wire) -> None:
        self.wire = wire
        if wire is Wire.CUT:
            self._reset_all()

    def close(self) -> None:
        self._closed = True
        self._listener.close()
        self._reset_all()

    def _reset_all(self) -> None:
        with self._lock:
            for one in self._open:
                with contextlib.suppress(OSError):
                    # A reset, not an orderly end.
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
                    one.shutdown(socket.SHUT_RDWR)
                    one.close()
            self._open.clear()

    def _accept(self) -> None:
        while not self._closed:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if self.wire is Wire.CUT:
                near.close()
                continue
            try:
                far = self._connect()
            except OSError:
                near.close()
                continue
            with self._lock:
                self._open |= {near, far}
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    def _connect(self) -> socket.socket:
        if isinstance(self._target, str):
            far = socket.socket(socket.AF_UNIX)
            far.connect(self._target)
            return far
        far = socket.create_connection(("127.0.0.1", self._target), timeout=5)
        far.settimeout(None)
        return far

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while piece := source.recv(65_536):
                if self.wire is Wire.SLOW:
                    time.sleep(self.SLOW_SECONDS)
                if self.wire is Wire.HALF_OPEN:
                    # Swallowed, and the stream is broken for good: nothing of this connection may follow.
                    while source.recv(65_536):
                        pass
                    return
                sink.sendall(piece)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)


class Neighbour:
    """The stand-in of profile and feedback in a process of its own, so that it can be killed and stopped.

    Feedback knows one experiment: everybody on "home" is in its one variant.

    Args:
        items: ids of the catalogue.
        histories: item ids that a user key, in hexadecimal, has looked at.
    """

    def __init__(self, items: list[str], histories: dict[str, list[str]]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.recommend.chaos"],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"items": items, "histories": histories}) + "\n")
        self._process.stdin.flush()
        self.port, self.feedback_port = map(int, self._process.stdout.readline().split())

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(10)

    def halt(self) -> None:
        os.kill(self._process.pid, signal.SIGSTOP)

    def close(self) -> None:
        if self._process.poll() is None:
            self.kill()


class FakeFeedback(feedback_service_pb2_grpc.FeedbackServiceServicer):
    """One running experiment."""

    def ListExperiments(self, request: Any, context: Any) -> feedback_service_pb2.ListExperimentsResponse:
        experiment = experiment_pb2.Experiment(experiment_id="split", placement="home")
        experiment.variants.add(variant_id="all", weight=1, serving_config="popular")
        return feedback_service_pb2.ListExperimentsResponse(experiments=[experiment])


def main() -> None:
    from shared.event_kinds import EventKind
    from tests.recommend.shop import FakeProfile, ProfileServer, item

    told: dict[str, Any] = json.loads(sys.stdin.readline())
    profile = FakeProfile()
    profile.upsert(*(item(item_id) for item_id in told["items"]))
    server = ProfileServer(profile)
    feedback = grpc.server(futures.ThreadPoolExecutor(2))
    feedback_service_pb2_grpc.add_FeedbackServiceServicer_to_server(FakeFeedback(), feedback)
    feedback_port = feedback.add_insecure_port("127.0.0.1:0")
    feedback.start()
    print(server.port, feedback_port, flush=True)
    # After somebody follows: what the stream carries is held in memory, and what it began with is asked for.
    for user_key, seen in told["histories"].items():
        profile.record(bytes.fromhex(user_key), *((item_id, EventKind.ITEM_VIEW) for item_id in seen))
    sys.stdin.read()


if __name__ == "__main__":
    main()
