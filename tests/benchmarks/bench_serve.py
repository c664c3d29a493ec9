"""How fast recommendations are served, and what one costs: `make bench-serve ITEMS=12000`.

The real process, started as in production, follows a stand-in of the profile service in a process of its own
and reads a published bundle: random vectors in clusters, an untrained Transformer of the trainer's own
architecture (where TensorFlow is installed; else the sum of the history), counted neighbours. Every request
takes the whole way: history from memory, encoder, exact scores over the catalogue, filters, diversity, reasons
(in a run of their own), records, signed token, 20 items.

The load comes from h2load, in C (Debian: nghttp2-client), one process for each of several shoppers; without it
from a Python client, which costs as much as the server and is said to be the generator. CPU a request is the
server's own, from the kernel's account of its process. What was answered OK comes from the server's own metrics.

Beside the load of one process: a version that is swapped in under load, twice the load that one process can take,
and two processes on one port. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
from shopkeeper.recommend.v1 import recommend_service_pb2 as pb
from shopkeeper.recommend.v1 import recommend_service_pb2_grpc

from shared.bundle import Registry, load_bundle
from shared.bundle.history import encoder_inputs, history_from_events
from shared.bundle.scoring import blended_scores
from shared.keys import ensure_development_keys, read_verifying_key
from tests.benchmarks.serve_load import METHOD, H2Load, PythonLoad
from tests.benchmarks.serve_shop import (
    LARGE,
    MAX_HISTORY,
    MOST_CATALOGUED,
    REPOSITORY,
    SHOPPERS,
    history_of,
    item_id,
    publish,
    serve_profile,
)
from tests.recommend.shop import point

PAGE_SIZE = 20
HANDLED = "grpc_server_handled_total{"
OK = 'grpc_server_handled_total{grpc_code="OK",grpc_method="Recommend"'
CANCELLED = 'grpc_server_handled_total{grpc_code="CANCELLED",grpc_method="Recommend"'
SCORED = 'shopkeeper_recommend_seconds_sum{stage="score"}'
SWAPS = "shopkeeper_recommend_model_swaps_total"
OPEN_LOOP_RATE = 500
LARGE_OPEN_LOOP_RATE = 50
HUGE = 1_000_000
HUGE_OPEN_LOOP_RATE = 5
"""Requests a second beyond LARGE and beyond HUGE items: one takes milliseconds there, and tens of them."""


def request_of(shopper: int, **fields: Any) -> pb.RecommendRequest:
    return pb.RecommendRequest(user_id=f"shopper-{shopper}", page_size=PAGE_SIZE, **fields)


class Bench:
    """The stand-in, the service, and the shoppers' requests."""

    def __init__(self, home: Path, items: int, ranked: bool = False) -> None:
        self.home, self.items = home, items
        ensure_development_keys(home / "keys")
        self.encoder = publish(home, items, ranked)
        self.profile = subprocess.Popen(
            [sys.executable, "-m", "tests.benchmarks.bench_serve", "--serve-profile", str(home), "--items", str(items)],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        assert self.profile.stdout is not None
        profile_port = int(self.profile.stdout.readline())
        self.environment = {
            **os.environ,
            "SHOPKEEPER_HOME": str(home),
            "SHOPKEEPER_PROFILE_ADDRESS": f"127.0.0.1:{profile_port}",
            "SHOPKEEPER_SHARED_PORT": "true",
        }
        self.port, self.servers, self.metrics_ports = free_port(), [], []
        started = time.perf_counter()
        self.add_server()
        self.server = self.servers[0]
        self.channel = grpc.insecure_channel(f"127.0.0.1:{self.port}")
        self.stub = recommend_service_pb2_grpc.RecommendServiceStub(self.channel)
        self.stub.Recommend(request_of(0), timeout=30, wait_for_ready=True)
        self.start_seconds = time.perf_counter() - started
        while self.stub.Recommend(request_of(0), timeout=30).degraded:
            time.sleep(0.05 if items <= LARGE else 1.0)
        self.complete_seconds = time.perf_counter() - started
        self.load = (H2Load if shutil.which("h2load") else PythonLoad)(self.port, home)

    def add_server(self) -> None:
        """Starts one more process on the port, and waits until it listens."""
        metrics_port, started = free_port(), time.perf_counter()
        log = self.home / f"server-{len(self.servers)}.log"
        environment = {
            **self.environment,
            "SHOPKEEPER_LISTEN": f"127.0.0.1:{self.port}",
            "SHOPKEEPER_METRICS_PORT": str(metrics_port),
        }
        with log.open("wb") as stream:
            server = subprocess.Popen(
                [sys.executable, "-m", "services.recommend"], cwd=REPOSITORY, env=environment, stderr=stream
            )
        self.servers.append(server)
        self.metrics_ports.append(metrics_port)
        while "recommend ready on 127.0.0.1:" not in (text := log.read_text()):
            if server.poll() is not None or time.perf_counter() - started > 900:
                raise SystemExit(f"the server did not start:\n{text}")
            time.sleep(0.01)

    def metric(self, name: str) -> float:
        """Returns the sum of a metric over the servers, its labels written as Prometheus writes them."""
        total = 0.0
        for port in self.metrics_ports:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
                for line in page.read().decode().splitlines():
                    if line.startswith(name):
                        total += float(line.rpartition(" ")[2])
        return total

    def failed_calls(self) -> float:
        """Returns the calls that were not answered OK, without those that the generator itself drops as its time ends."""
        return self.metric(HANDLED) - self.metric(OK) - self.metric(CANCELLED)

    def cpu_seconds(self) -> float:
        times = [psutil.Process(server.pid).cpu_times() for server in self.servers]
        return sum(one.user + one.system for one in times)

    def warm(self) -> int:
        """Asks once for every shopper; returns the bytes of the shortest answer."""
        shortest = 1 << 30
        for shopper in range(SHOPPERS):
            answer = self.stub.Recommend(request_of(shopper), timeout=10)
            if answer.degraded:
                # The first pass over ten million items may outlast the budget of an answer.
                answer = self.stub.Recommend(request_of(shopper), timeout=10)
            described = self.items > MOST_CATALOGUED or bool(answer.items[0].item.title)
            if len(answer.items) != PAGE_SIZE or answer.degraded or not described:
                raise SystemExit(f"an answer is not whole: {answer}")
            shortest = min(shortest, answer.ByteSize())
        return shortest

    def measure(
        self, requests: list[pb.RecommendRequest], seconds: float, shortest: int, rate: float | None = None
    ) -> dict[str, float]:
        before, answered, scored = self.cpu_seconds(), self.metric(OK), self.metric(SCORED)
        achieved, took, traffic = self.load.run(requests, seconds, rate)
        used, answered = self.cpu_seconds() - before, self.metric(OK) - answered
        if shortest and traffic < 0.9 * shortest * len(took):
            raise SystemExit("answers are missing: some calls failed")
        took.sort()
        return {
            "rate": round(achieved, 1),
            "good_rate": round(answered / seconds, 1),
            "cpu_ms": round(1e3 * used / len(took), 3),
            "score_ms": round(1e3 * (self.metric(SCORED) - scored) / max(1.0, answered), 3),
            "p50_ms": round(statistics.median(took), 2),
            "p99_ms": round(took[int(len(took) * 0.99)], 2),
        }

    def while_swapping(self, requests: list[pb.RecommendRequest], rate: float) -> dict[str, float]:
        """As `measure`, with two versions that take turns once a second."""
        registry = Registry(self.home / "registry")
        first = registry.alias("main", "production").version  # type: ignore[union-attr]
        publish(self.home, self.items)
        second = registry.alias("main", "production").version  # type: ignore[union-attr]
        swaps, seconds = self.metric(SWAPS), 6.0
        failed = self.failed_calls()

        def swap() -> None:
            for n in range(5):
                time.sleep(1.0)
                point(self.home / "registry", (first, second)[n % 2])

        swapper = threading.Thread(target=swap)
        swapper.start()
        measured = self.measure(requests, seconds, 0, rate)
        swapper.join()
        measured["swaps"] = self.metric(SWAPS) - swaps
        measured["failed"] = self.failed_calls() - failed
        return measured

    def recall_at_100(self, shoppers: int = 20) -> float:
        """Returns the share of the 100 best items, by the formula over the whole catalogue, that are found."""
        registry = Registry(self.home / "registry")
        version = registry.alias("main", "production").version  # type: ignore[union-attr]
        bundle = load_bundle(registry.version_path("main", version), read_verifying_key(self.home / "keys"))
        found = 0
        for shopper in range(shoppers):
            events = history_of(shopper, self.items)
            read = history_from_events([i for i, _ in events], [int(k) for _, k in events], bundle.index_of)
            query_D = bundle.encoder.encode(*encoder_inputs(read, bundle.item_vectors, MAX_HISTORY))
            scores_I = blended_scores(
                bundle.scoring.sequence * (bundle.item_vectors @ query_D) + bundle.item_bias,
                bundle.companion.added(read.indices_H),
            )
            best = {item_id(int(n)) for n in np.argsort(-scores_I, kind="stable")[:100]}
            # A search leaves nothing out that the shopper knows already.
            request = pb.RecommendRequest(user_id=f"shopper-{shopper}", page_size=100, placement="search")
            answer = self.stub.Recommend(request, timeout=10)
            found += len(best & {entry.item_id for entry in answer.items})
        return found / (100 * shoppers)

    def close(self) -> None:
        self.channel.close()
        for server in self.servers:
            server.terminate()
        assert self.profile.stdin is not None
        self.profile.stdin.close()
        for process in (*self.servers, self.profile):
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


def free_port() -> int:
    """Returns a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def peak_rss_mb(pid: int) -> int:
    """Returns the most memory that a process has had resident, MB: what loading took too."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return round(int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024 / 1e6)


def environment() -> dict[str, Any]:
    """Returns what the numbers depend on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return {
        "cpu": model or platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "load_average": [round(value, 1) for value in os.getloadavg()],
    }


def serve_floor(size: int) -> None:
    """Serves answers of one size from grpcio's synchronous server, with nothing behind it, until input ends."""
    answer = bytes(size)
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=2))
    handler = grpc.unary_unary_rpc_method_handler(lambda _request, _context: answer)
    service, method = METHOD.strip("/").split("/")
    server.add_registered_method_handlers(service, {method: handler})
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    server.start()
    sys.stdin.read()


def floor_cpu_ms(bench: Bench, requests: list[pb.RecommendRequest], seconds: float, size: int) -> float:
    """Returns the CPU a request of grpcio itself, under the same load."""
    command = [sys.executable, "-m", "tests.benchmarks.bench_serve", "--serve-floor", str(size)]
    with subprocess.Popen(
        command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        assert server.stdin is not None
        load = type(bench.load)(int(server.stdout.readline()), bench.home)
        load.run(requests, 0.5)
        before = sum(psutil.Process(server.pid).cpu_times()[:2])
        _, took, _ = load.run(requests, seconds)
        used = sum(psutil.Process(server.pid).cpu_times()[:2]) - before
        server.stdin.close()
    return round(1e3 * used / len(took), 3)


def measured(bench: Bench, seconds: float, numbers: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields each number with its name, as soon as it is known.

    Args:
        numbers: those that were yielded before.
    """
    yield "items", bench.items
    yield "encoder", bench.encoder
    yield "load_generator", bench.load.name
    yield "start_seconds", round(bench.start_seconds, 2)
    yield "catalogue_seconds", round(bench.complete_seconds, 2)
    shortest = bench.warm()
    requests = [request_of(shopper) for shopper in range(4)]
    if bench.items > LARGE:
        # Two at a time keep both cores busy; sixteen would wait longer than the server lets anybody wait.
        requests = requests[:2]
        bench.load.streams = 1
    bench.measure(requests, 1.0, shortest)
    closed = [bench.measure(requests, seconds, shortest) for _ in range(2)]
    yield "requests_per_second", max(one["rate"] for one in closed)
    yield "cpu_ms_per_request", min(one["cpu_ms"] for one in closed)
    ids_only = [request_of(shopper, item_view=pb.ITEM_VIEW_ID) for shopper in range(len(requests))]
    yield "cpu_ms_per_request_ids_only", bench.measure(ids_only, seconds / 2, 0)["cpu_ms"]
    explained = [request_of(shopper, include_explanations=True) for shopper in range(len(requests))]
    yield "cpu_ms_per_request_with_reasons", bench.measure(explained, seconds / 2, shortest)["cpu_ms"]
    rate = OPEN_LOOP_RATE if bench.items <= LARGE else LARGE_OPEN_LOOP_RATE
    if bench.items > HUGE:
        # A search of tens of milliseconds is refused where another process has the core: said, and no reason to end.
        rate = HUGE_OPEN_LOOP_RATE
    opened = bench.measure(requests, seconds, shortest if bench.items <= HUGE else 0, rate)
    yield "open_loop_requests_per_second", opened["rate"]
    yield "open_loop_answered_per_second", opened["good_rate"]
    yield "open_loop_cpu_ms_per_request", opened["cpu_ms"]
    yield "p50_ms", opened["p50_ms"]
    yield "p99_ms", opened["p99_ms"]
    yield "encode_and_search_ms", opened["score_ms"]
    yield "grpcio_floor_cpu_ms", floor_cpu_ms(bench, requests, seconds / 2, shortest)
    yield "recall_at_100", round(bench.recall_at_100(), 4)
    yield "rss_mb", round(psutil.Process(bench.server.pid).memory_info().rss / 1e6)
    yield "peak_rss_mb", peak_rss_mb(bench.server.pid)
    if bench.items <= LARGE:
        swapping = bench.while_swapping(requests, rate)
        yield "swaps", int(swapping["swaps"])
        yield "swap_failed_calls", int(swapping["failed"])
        yield "swap_p99_ms", swapping["p99_ms"]
        yield "swap_p99_ratio", round(swapping["p99_ms"] / opened["p99_ms"], 2)
        peak = max(one["good_rate"] for one in closed)
        twice = bench.measure(requests, seconds, 0, 2 * peak)
        yield "overload_offered_per_second", 2 * peak
        yield "overload_goodput_share_of_peak", round(twice["good_rate"] / peak, 3)
        refused = twice["rate"] - twice["good_rate"]
        spent = twice["cpu_ms"] * twice["rate"] - numbers["cpu_ms_per_request"] * twice["good_rate"]
        yield "overload_refused_per_second", round(refused, 1)
        yield "cpu_ms_per_refusal", round(spent / max(1.0, refused), 3)
        bench.add_server()
        bench.measure(requests * 2, 1.0, 0)
        double = max((bench.measure(requests * 2, seconds, 0) for _ in range(2)), key=lambda one: one["rate"])
        yield "two_processes_requests_per_second", double["rate"]
        yield "two_processes_cpu_ms_per_request", double["cpu_ms"]
    yield "environment", environment()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--items", type=int, default=12_000, help="items of catalogue and model")
    parser.add_argument("--seconds", type=float, default=5.0, help="length of each measurement")
    parser.add_argument("--ranked", action="store_true", help="a model with a second stage")
    parser.add_argument("--serve-profile", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--serve-floor", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve_floor is not None:
        serve_floor(arguments.serve_floor)
        return
    if arguments.serve_profile is not None:
        serve_profile(arguments.serve_profile, arguments.items)
        return
    home = Path(tempfile.mkdtemp(prefix="shopkeeper-bench-"))
    began = time.perf_counter()
    bench = None
    try:
        bench = Bench(home, arguments.items, arguments.ranked)
        numbers: dict[str, Any] = {}
        for name, value in measured(bench, arguments.seconds, numbers):
            numbers[name] = value
            print(f"{name:32} {value}", flush=True)
        numbers["seconds"] = round(time.perf_counter() - began, 1)
        print(json.dumps(numbers), flush=True)
    finally:
        if bench is not None:
            bench.close()
        shutil.rmtree(home, ignore_errors=True)


if __name__ == "__main__":
    main()
