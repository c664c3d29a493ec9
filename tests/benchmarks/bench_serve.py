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
import re
import shutil
import socket
import statistics
import struct
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
from shopkeeper.profile.v1 import catalog_service_pb2, item_pb2
from shopkeeper.recommend.v1 import recommend_service_pb2 as pb
from shopkeeper.recommend.v1 import recommend_service_pb2_grpc

from shared.bundle import Registry, load_bundle
from shared.bundle.arrays import encode_arrays
from shared.bundle.history import encoder_inputs, history_from_events
from shared.bundle.ranker import MAX_POSITION, RANKER, RANKER_FORMAT, TASKS, Ranker, RankerWeights
from shared.bundle.ranker_features import FEATURES, STATIC_FEATURES, ItemTable
from shared.bundle.scoring import blended_scores
from shared.bundle.sum_encoder import build_sum_encoder
from shared.bundle.writer import write_bundle
from shared.event_kinds import EventKind
from shared.keys import ensure_development_keys, read_signing_key, read_verifying_key
from shared.privacy import Pseudonymizer
from tests.recommend.shop import FakeProfile, ProfileServer, point

REPOSITORY = Path(__file__).resolve().parents[2]
METHOD = "/shopkeeper.recommend.v1.RecommendService/Recommend"
DIMENSION = 64
MAX_HISTORY = 64
NEIGHBOURS = 50
LARGE_NEIGHBOURS = 10
ATTRIBUTE_RANK = 64
MOST_ATTRIBUTED = 1_000_000
"""Items up to which the bundle has attribute factors, as wide as the trainer's."""
EVENTS = 40
PAGE_SIZE = 20
SHOPPERS = 200
HANDLED = "grpc_server_handled_total{"
OK = 'grpc_server_handled_total{grpc_code="OK",grpc_method="Recommend"'
CANCELLED = 'grpc_server_handled_total{grpc_code="CANCELLED",grpc_method="Recommend"'
SCORED = 'shopkeeper_recommend_seconds_sum{stage="score"}'
SWAPS = "shopkeeper_recommend_model_swaps_total"
STREAMS = 4
OPEN_LOOP_RATE = 500
LARGE = 50_000
"""Items beyond which the open loop asks 50 times a second, and 10 neighbours an item are counted."""
LARGE_OPEN_LOOP_RATE = 50
MOST_CATALOGUED = 1_000_000
"""Items beyond which the catalogue describes none: its records alone would be gigabytes."""

_TRANSFORMER = """
import sys
from services.trainer.domain.hyper_parameters import HyperParameters
from services.trainer.pipeline.export import convert
from services.trainer.pipeline.transformer import Encoder
import tensorflow as tf
size = HyperParameters(dimension={dimension}, max_history={length})
encoder = Encoder(size)
encoder(tf.zeros((1, size.max_history, size.dimension)), tf.zeros((1, size.max_history), tf.int32),
        tf.ones((1, size.max_history, size.max_history)))
open(sys.argv[1], "wb").write(convert(encoder))
"""


def encoder_of(home: Path) -> tuple[bytes, str]:
    """Returns the encoder's model and what it is."""
    path = home / "encoder.tflite"
    code = _TRANSFORMER.format(dimension=DIMENSION, length=MAX_HISTORY)
    made = subprocess.run(
        [sys.executable, "-c", code, str(path)], cwd=REPOSITORY, capture_output=True, check=False
    )
    if made.returncode == 0:
        return path.read_bytes(), "transformer"
    return build_sum_encoder(MAX_HISTORY, DIMENSION), "sum of the history"


def item_id(number: int) -> str:
    return f"item-{number:07d}"


def random_ranker(items: int) -> Ranker:
    """Returns a second stage of the size that training makes, with an opinion of its own."""
    random = np.random.default_rng(2)
    features, tasks = len(FEATURES), len(TASKS)

    def drawn(*shape: int) -> np.ndarray:
        return (0.1 * random.standard_normal(shape)).astype(np.float32)

    weights = RankerWeights(
        drawn(features), np.full(features, 3, np.float32), drawn(2, features, features), drawn(2, features),
        drawn(features, 32), drawn(32), drawn(32, 16), drawn(16), drawn(features + 16, tasks), drawn(tasks),
        np.zeros(MAX_POSITION, np.float32), np.array([[1, 0]] * tasks, np.float32),
    )  # fmt: skip
    groups_I = random.integers(0, 200, items).astype(np.int32)
    table = ItemTable.of(drawn(items, len(STATIC_FEATURES)), groups_I, groups_I, np.zeros(items, np.int64))
    return Ranker(weights, table)


def publish(home: Path, items: int, ranked: bool = False) -> str:
    """Publishes the bundle; returns what its encoder is."""
    random = np.random.default_rng(1)
    centres = random.normal(size=(max(20, items // 100), DIMENSION)).astype(np.float32)
    vectors_ID = np.empty((items, DIMENSION), np.float32)
    # In pieces: the random numbers of ten million items would take more memory than the items.
    for start in range(0, items, 500_000):
        piece_ND = vectors_ID[start : start + 500_000]
        piece_ND[:] = 0.7 * random.standard_normal(piece_ND.shape, dtype=np.float32)
        piece_ND += centres[random.integers(0, len(centres), len(piece_ND))]
        piece_ND /= 4
    neighbours = NEIGHBOURS if items <= LARGE else LARGE_NEIGHBOURS
    arrays = {
        "item_vectors": vectors_ID,
        "item_bias": np.zeros(items, np.float32),
        "popularity": (1e4 / np.arange(1, items + 1)).astype(np.float32),
    }
    for matrix in ("cooccurrence", "backward"):
        columns_IN = random.integers(0, items, (items, neighbours), dtype=np.int32)
        columns_IN.sort(axis=1)
        arrays[f"{matrix}_indptr"] = np.arange(items + 1, dtype=np.int64) * neighbours
        arrays[f"{matrix}_indices"] = columns_IN.ravel()
        arrays[f"{matrix}_weights"] = random.random(items * neighbours, dtype=np.float32) / neighbours
    if items <= MOST_ATTRIBUTED:
        for factors in ("attribute_queries", "attribute_keys"):
            arrays[factors] = 0.3 * random.standard_normal((items, ATTRIBUTE_RANK), dtype=np.float32)
    encoder_bytes, name = encoder_of(home)
    version = write_bundle(
        Registry(home / "registry"),
        "main",
        arrays=arrays,
        vocabulary=[item_id(number) for number in range(items)],
        encoder_bytes=encoder_bytes,
        manifest_fields={
            "encoder": {"max_history": MAX_HISTORY, "dimension": DIMENSION},
            "scoring": {
                "lambda": 0.5,
                "scale": 30.0,
                "query_decay": 0.6065,
                "window": 50,
                "sequence": 0.9,
                "backward": 0.3,
                "repeat": -0.4,
            },
            "ranker": {"format": RANKER_FORMAT, "features": list(FEATURES), "tasks": list(TASKS)},
        },
        attachments={RANKER: encode_arrays(random_ranker(items).to_arrays())} if ranked else {},
        signing_key=read_signing_key(home / "keys"),
    )
    point(home / "registry", version)
    return name


class BenchProfile(FakeProfile):
    """The stand-in with a catalogue that arrives in parts: one message would be too large."""

    def __init__(self, items: int) -> None:
        super().__init__()
        self._count = items

    def WatchItems(self, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        if not request.resume_token:
            catalogued = self._count if self._count <= MOST_CATALOGUED else 0
            for start in range(0, catalogued, 1000):
                yield catalog_service_pb2.WatchItemsResponse(
                    reset=start == 0,
                    upserted=[record(n) for n in range(start, min(catalogued, start + 1000))],
                )
        while context.is_active() and self._running:
            yield catalog_service_pb2.WatchItemsResponse(snapshot_complete=True, watermark=b"1")
            time.sleep(0.25)


def record(number: int) -> item_pb2.Item:
    """Returns a record of some 350 bytes, as shops have them."""
    item = item_pb2.Item(
        item_id=item_id(number),
        title=f"A thing that people buy, model {number}",
        description="Made of what such things are made of, and described at the length that is usual. " * 2,
        brand=f"brand-{number % 200}",
        category_path=["everything", f"shelf-{number % 30}", f"board-{number % 300}"],
        price_micros=(number % 500 + 1) * 990_000,
        currency_code="EUR",
        stock_quantity=number % 50 + 1,
        rating_mean=4.2,
        rating_count=17,
    )
    item.attributes.add(key="colour", text=("red", "green", "blue")[number % 3])
    item.update_time.FromSeconds(1_750_000_000 + number)
    return item


def history_of(shopper: int, items: int) -> list[tuple[str, EventKind]]:
    """Returns a shopper's events, oldest first."""
    random = np.random.default_rng(1000 + shopper)
    kinds = [EventKind.ITEM_VIEW] * 8 + [EventKind.ADD_TO_CART, EventKind.PURCHASE]
    return [(item_id(int(n)), kinds[k % 10]) for k, n in enumerate(random.zipf(1.3, EVENTS) * 7919 % items)]


def serve_profile(home: Path, items: int) -> None:
    """Serves the stand-in until standard input ends."""
    pseudonymizer = Pseudonymizer.from_directory(home / "keys")
    profile = BenchProfile(items)
    now = time.time()
    for shopper in range(SHOPPERS):
        key = bytes(pseudonymizer.user_key(f"shopper-{shopper}"))
        for age, event in enumerate(history_of(shopper, items)):
            profile.record(key, event, at=now - 3600 + age)
    server = ProfileServer(profile)
    print(server.port, flush=True)
    sys.stdin.read()
    server.kill()


def request_of(shopper: int, **fields: Any) -> pb.RecommendRequest:
    return pb.RecommendRequest(user_id=f"shopper-{shopper}", page_size=PAGE_SIZE, **fields)


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
    ids_only = [request_of(shopper, item_view=pb.ITEM_VIEW_ID) for shopper in range(4)]
    yield "cpu_ms_per_request_ids_only", bench.measure(ids_only, seconds / 2, 0)["cpu_ms"]
    explained = [request_of(shopper, include_explanations=True) for shopper in range(4)]
    yield "cpu_ms_per_request_with_reasons", bench.measure(explained, seconds / 2, shortest)["cpu_ms"]
    rate = OPEN_LOOP_RATE if bench.items <= LARGE else LARGE_OPEN_LOOP_RATE
    opened = bench.measure(requests, seconds, shortest, rate)
    yield "open_loop_requests_per_second", opened["rate"]
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
