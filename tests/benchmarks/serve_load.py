"""Load for `bench_serve`: h2load in C, or a lean client of grpcio where that is not installed."""

from __future__ import annotations

import math
import re
import struct
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import grpc
from shopkeeper.recommend.v1 import recommend_service_pb2 as pb

METHOD = "/shopkeeper.recommend.v1.RecommendService/Recommend"
STREAMS = 4
_PACED_RATE = 80
_MOST_PACED = 16
"""h2load paces by a timer of 10 ms at least: beyond 100 requests/s one process sends bunches of them, and waits for its own.
Where even so many processes would, as in overload, bunches are no matter, and processes would take the server's time."""


class H2Load:
    """h2load: one process a shopper, so that answers are not all the same."""

    name = "h2load"

    def __init__(self, port: int, home: Path) -> None:
        self.streams = STREAMS
        self._url = f"http://127.0.0.1:{port}{METHOD}"
        self._home = home

    def run(
        self, requests: list[pb.RecommendRequest], seconds: float, rate: float | None = None
    ) -> tuple[float, list[float], int]:
        """Returns requests/s, milliseconds of each request, and bytes of answers.

        Args:
            rate: requests/s altogether in an open loop; None: as fast as it goes.
        """
        running = []
        if rate is not None:
            processes = max(len(requests), math.ceil(rate / _PACED_RATE))
            if processes <= _MOST_PACED:
                requests = [requests[number % len(requests)] for number in range(processes)]
        for number, request in enumerate(requests):
            body = request.SerializeToString()
            data, log = self._home / f"body-{number}", self._home / f"log-{number}"
            data.write_bytes(struct.pack(">BI", 0, len(body)) + body)
            log.unlink(missing_ok=True)
            streams = self.streams if rate is None else 100
            options = ["-D", f"{round(seconds * 1e3)}ms", "-c1", "-m", str(streams)]
            if rate is not None:
                options += [f"--rps={rate / len(requests):g}"]
            headers = ["-H", "content-type: application/grpc", "-H", "te: trailers"]
            running.append(
                subprocess.Popen(
                    ["h2load", *options, *headers, "-d", str(data), f"--log-file={log}", self._url],
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
        traffic = 0
        for process in running:
            output, _ = process.communicate(timeout=seconds + 60)
            traffic += int(re.search(r"\((\d+)\) data", output)[1])  # type: ignore[index]
            if not (codes := re.search(r"(\d+) 2xx, 0 3xx, 0 4xx, 0 5xx", output)) or codes[1] == "0":
                raise SystemExit(f"calls failed:\n{output}")
        took = []
        for number in range(len(requests)):
            lines = (self._home / f"log-{number}").read_text().splitlines()
            took += [int(line.split("\t")[2]) / 1e3 for line in lines]
        return len(took) / seconds, took, traffic


class PythonLoad:
    """A lean client of grpcio in this process: threads, messages as bytes."""

    name = "python"

    def __init__(self, port: int, home: Path) -> None:
        self.streams = STREAMS
        self._address = f"127.0.0.1:{port}"

    def run(
        self, requests: list[pb.RecommendRequest], seconds: float, rate: float | None = None
    ) -> tuple[float, list[float], int]:
        """As `H2Load.run`; in the open loop a late start counts as waiting."""
        took: list[float] = []
        sizes: list[int] = []
        end = time.perf_counter() + seconds

        def call_on(body: bytes, pace: float | None, offset: float) -> None:
            with grpc.insecure_channel(self._address) as channel:
                call: Any = channel.unary_unary(METHOD)
                due = time.perf_counter() + offset
                while due < end and time.perf_counter() < end:
                    if pace is not None:
                        time.sleep(max(0.0, due - time.perf_counter()))
                    start = due if pace is not None else time.perf_counter()
                    sizes.append(len(call(body, timeout=10)))
                    took.append(1e3 * (time.perf_counter() - start))
                    due = due + pace if pace is not None else time.perf_counter()

        count = len(requests) * self.streams
        threads = [
            threading.Thread(
                target=call_on,
                args=(
                    requests[n % len(requests)].SerializeToString(),
                    rate and count / rate,
                    n / rate if rate else 0.0,
                ),
            )
            for n in range(count)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return len(took) / seconds, took, sum(sizes)
