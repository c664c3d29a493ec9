"""What an answer costs beside what users would pick instead: `make bench-serve-peers`.

The same job, twenty items of 12,000 for one person a call, one after the other in one run:

  ours          the service as `bench_serve` loads it: RPC, history, encoder, rules, diversity, records, signed token
  implicit      ALS of 64 factors, `recommend` of a person whose factors are at hand, or follow from their events
  RecTools      SASRec of 2 blocks and 64 dimensions, `recommend` of a person with their 50 events
  features      what a feature store does before any ranking: the row of a person and of 500 items, 20 numbers each, by
                a prepared statement in PostgreSQL with binary rows

The peers are library calls in their own process and environment: no RPC, no filter, no record and no token is in their
figures. CPU is of the process that answers (for the fetch: its client, and the backend of PostgreSQL). The last line is
JSON; `ratio` is what a peer's call costs in calls of ours.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import psycopg

from shared import embedded_postgres
from tests.benchmarks.bench_serve import Bench, request_of

_FEATURES, _CANDIDATES = 20, 500


def ours(items: int, seconds: float) -> dict[str, float]:
    home = Path(tempfile.mkdtemp(prefix="shopkeeper-bench-"))
    bench = None
    try:
        bench = Bench(home, items)
        shortest = bench.warm()
        requests = [request_of(shopper) for shopper in range(4)]
        bench.measure(requests, 1.0, shortest)
        found = min(
            (bench.measure(requests, seconds, shortest) for _ in range(2)), key=lambda one: one["cpu_ms"]
        )
        return {"cpu_ms_per_request": found["cpu_ms"], "requests_per_second": found["rate"]}
    finally:
        if bench is not None:
            bench.close()
        shutil.rmtree(home, ignore_errors=True)


def feature_fetch(items: int, requests: int) -> dict[str, float]:
    home = Path(tempfile.mkdtemp(prefix="shopkeeper-bench-"))
    columns = ", ".join(f"f{n} float8 NOT NULL DEFAULT random()" for n in range(_FEATURES))
    try:
        with psycopg.connect(embedded_postgres.start(home), autocommit=True) as connection:
            for table, rows in (("items", items), ("people", 10_000)):
                connection.execute(f"CREATE TABLE {table} (id int PRIMARY KEY, {columns})")
                connection.execute(f"INSERT INTO {table} (id) SELECT generate_series(0, {rows - 1})")
            connection.execute("VACUUM ANALYZE")
            backend = psutil.Process(connection.info.backend_pid)
            random = np.random.default_rng(0)
            asked = [random.choice(items, _CANDIDATES, replace=False).tolist() for _ in range(50)]
            cursor = connection.cursor(binary=True)

            def fetch(n: int) -> None:
                cursor.execute("SELECT * FROM people WHERE id = %s", (n,), prepare=True).fetchall()
                cursor.execute(
                    "SELECT * FROM items WHERE id = ANY(%s)", (asked[n % 50],), prepare=True
                ).fetchall()

            for n in range(20):
                fetch(n)
            before, spent = sum(backend.cpu_times()[:2]), time.process_time()
            began = time.perf_counter()
            for n in range(requests):
                fetch(n)
            wall = time.perf_counter() - began
            client = time.process_time() - spent
            server = sum(backend.cpu_times()[:2]) - before
        return {
            "cpu_ms_per_request": round(1000 * (client + server) / requests, 3),
            "client_cpu_ms": round(1000 * client / requests, 3),
            "server_cpu_ms": round(1000 * server / requests, 3),
            "mean_ms": round(1000 * wall / requests, 3),
        }
    finally:
        embedded_postgres.stop(home)
        shutil.rmtree(home, ignore_errors=True)


def peers(python: Path, items: int, requests: int) -> dict[str, dict[str, Any]]:
    told = subprocess.run(
        [str(python), str(Path(__file__).with_name("serve_peers.py")), "--items", str(items), "--requests", str(requests)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )  # fmt: skip
    lines = [json.loads(line) for line in told.stdout.splitlines() if line.startswith("{")]
    return {line.pop("name"): line for line in lines}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--items", type=int, default=12_000)
    parser.add_argument("--requests", type=int, default=2_000)
    parser.add_argument("--seconds", type=float, default=4.0, help="length of each measurement of ours")
    parser.add_argument("--python", type=Path, required=True, help="of the peers' environment")
    options = parser.parse_args()
    found: dict[str, dict[str, Any]] = {"ours": ours(options.items, options.seconds)}
    found |= peers(options.python, options.items, options.requests)
    found["feature_fetch"] = feature_fetch(options.items, max(200, options.requests // 4))
    cost = found["ours"]["cpu_ms_per_request"]
    for name, figures in found.items():
        if "cpu_ms_per_request" in figures:
            figures["ratio"] = round(figures["cpu_ms_per_request"] / cost, 2)
        print(f"{name:24} {figures}", flush=True)
    print(json.dumps({"items": options.items, **found}))


if __name__ == "__main__":
    main()
