"""How fast events come in: `python -m tests.benchmarks.bench_ingest` (or `make bench-ingest`).

Three processes over loopback: an embedded PostgreSQL, the feedback server as it is deployed, and a load
process that sends requests made before the clock starts. In the same run the rows that the server stored go
by bare COPY into a twin of its table: same columns, partitions, primary key and indexes. On a shared machine
rates say little; the CPU seconds of an event, which are told for each process, say more.

The last line is JSON:

events_per_second               through gRPC in batches of --batch by --callers at once, durable and de-duplicated
copy_events_per_second          COPY of --batch rows, each committed, over one connection
copy_ratio                      the one by the other
copy_at_commit_size             COPY of as many rows as the server's group commits had on average
single_calls_per_second         one event a call, 64 callers that call again at once; ack_p50_ms, ack_p99_ms of these: the
                                server is saturated, so they tell the length of its queue
paced_calls_per_second          the same calls planned at --pace of that rate, at most 3,000/s; paced_ack_p50_ms, paced_ack_p99_ms since the
                                moment for which each was planned
paced_fsync_ms                  as fsync_ms, measured right after
ack_asked_ms                    4 fsyncs + 10 ms
fsync_ms, fsync_p99_ms          one 8 kB write with fdatasync beside the database
duplicate_cost                  share of throughput (and _cpu: of CPU) that 10 % duplicates cost
cost_growth                     CPU of an event in the larger table by that in the smaller one, less one
rss_mb                          the server's peak resident memory
rss_growth_mb                   with --minutes: its median in the last fifth of the time less that in the second fifth
cpu_us_per_event                of server, postgres and client, in the batches
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import psycopg
from shopkeeper.feedback.v1 import event_pb2, feedback_service_pb2

from shared import embedded_postgres
from shared.database import ensure_database, migrate
from shared.keys import ensure_development_keys
from tests.benchmarks.grpc_load import send_all

REPOSITORY = Path(__file__).resolve().parents[2]
METHOD = "/shopkeeper.feedback.v1.FeedbackService/RecordEvents"
PEOPLE, ITEMS, VISITS = 5_000, 10_000, 20_000
SINGLE_CALLERS = 64
ASKED_CALLS_PER_SECOND = 3_000


# The load process


def uuid7(rng: random.Random, ms: int) -> str:
    """Returns a UUIDv7 of a millisecond."""
    return str(
        uuid.UUID(
            int=(ms << 80) | (0x7 << 76) | (rng.getrandbits(12) << 64) | (0b10 << 62) | rng.getrandbits(62)
        )
    )


def random_event(rng: random.Random, ms: int) -> event_pb2.Event:
    """Returns what shops send: views for the most part, with carts and purchases among them."""
    event = event_pb2.Event(
        event_id=uuid7(rng, ms),
        user_id=f"customer-{rng.randrange(PEOPLE)}",
        session_id=f"visit-{rng.randrange(VISITS)}",
        device=2,
        channel=1,
    )
    item, dice = f"item-{rng.randrange(ITEMS)}", rng.random()
    if dice < 0.85:
        event.item_view.MergeFrom(
            event_pb2.ItemView(item_id=item, dwell_seconds=3, price_micros=9_990_000, currency_code="EUR")
        )
    elif dice < 0.95:
        event.add_to_cart.MergeFrom(
            event_pb2.AddToCart(item_id=item, quantity=1, price_micros=9_990_000, currency_code="EUR")
        )
    else:
        line = event_pb2.OrderLine(item_id=item, quantity=1, price_micros=9_990_000)
        event.purchase.MergeFrom(event_pb2.Purchase(order_id="o", lines=[line, line], currency_code="EUR"))
    return event


class Load:
    """Makes requests, and sends them."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._rng = random.Random(0)
        self._sent: list[event_pb2.Event] = []

    def requests(self, count: int, batch: int, duplicates: float) -> list[bytes]:
        """Returns serialised requests; a share of the events repeats earlier ones."""
        rng, ms = self._rng, time.time_ns() // 1_000_000
        made = []
        for _ in range(count):
            repeated = round(batch * duplicates) if self._sent else 0
            events = [random_event(rng, ms) for _ in range(batch - repeated)]
            if len(self._sent) < 20_000:
                self._sent += events
            events += rng.sample(self._sent[:10_000], repeated)
            made.append(feedback_service_pb2.RecordEventsRequest(events=events).SerializeToString())
        return made

    def run(
        self, requests: list[bytes], callers: int, calls_per_second: float | None = None
    ) -> dict[str, Any]:
        """Sends the requests; returns seconds and latencies."""
        cpu = time.process_time()
        result = send_all(self._port, METHOD, requests, callers, calls_per_second)
        cpu = time.process_time() - cpu
        latencies = sorted(result.latencies)
        answers = map(feedback_service_pb2.RecordEventsResponse.FromString, result.responses)
        statuses = {
            event_pb2.EventStatus.Name(row.status).removeprefix("EVENT_STATUS_")
            for answer in answers
            for row in answer.results
        }
        return {
            "seconds": result.seconds,
            "cpu": cpu,
            "p50_ms": 1e3 * latencies[len(latencies) // 2],
            "p99_ms": 1e3 * latencies[int(len(latencies) * 0.99)],
            "failures": result.failures,
            "statuses": sorted(statuses),
        }


def serve_load(port: int) -> None:
    """Reads orders, one JSON a line, from stdin: `make` prepares requests, `run` sends them."""
    load = Load(port)
    made: list[bytes] = []
    for line in sys.stdin:
        order = json.loads(line)
        if order["do"] == "make":
            made = load.requests(order["count"], order["batch"], order["duplicates"])
            answer: dict[str, Any] = {"bytes": sum(map(len, made))}
        else:
            answer = load.run(made, order["callers"], order.get("calls_per_second"))
        print(json.dumps(answer), flush=True)


# The bench


class Bench:
    """Owns the three processes."""

    def __init__(self, home: Path) -> None:
        self.home = home
        base = embedded_postgres.start(home)
        name = "bench"
        with psycopg.connect(base, autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        self.url = psycopg.conninfo.make_conninfo(base, dbname=name)
        ensure_database(self.url)
        migrate(self.url, "feedback")
        ensure_development_keys(home / "keys")
        self.postmaster = int((home / "postgres" / "postmaster.pid").read_text().split()[0])
        self.server, self.port = self._start_server()
        self.load = subprocess.Popen(
            [sys.executable, "-m", "tests.benchmarks.bench_ingest", "--load", str(self.port)],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.peak_rss = 0.0

    def _start_server(self) -> tuple[subprocess.Popen[bytes], int]:
        log = self.home / "server.log"
        environment = {
            **os.environ,
            "DATABASE_URL": self.url,
            "SHOPKEEPER_HOME": str(self.home),
            "SHOPKEEPER_LISTEN": "127.0.0.1:0",
            # The load is random people's: none of them is a bot.
            "SHOPKEEPER_BOT_VIEWS_PER_MINUTE": "1000000000",
            # The callers are as many as the bench says, so that a neighbour's burst of work is no overload.
            "SHOPKEEPER_MAX_QUEUE_SECONDS": "5",
        }
        with log.open("wb") as stream:
            server = subprocess.Popen(
                [sys.executable, "-m", "services.feedback"], cwd=REPOSITORY, env=environment, stderr=stream
            )
        deadline = time.monotonic() + 60
        while "feedback ready on 127.0.0.1:" not in (text := log.read_text()):
            if server.poll() is not None or time.monotonic() > deadline:
                server.kill()
                raise SystemExit(f"the server did not start:\n{text}")
            time.sleep(0.05)
        return server, int(text.partition("feedback ready on 127.0.0.1:")[2].split('"')[0])

    def ask(self, **order: Any) -> dict[str, Any]:
        """Gives the load process an order; returns its answer."""
        assert self.load.stdin is not None
        assert self.load.stdout is not None
        self.load.stdin.write(json.dumps(order) + "\n")
        self.load.stdin.flush()
        answer: dict[str, Any] = json.loads(self.load.stdout.readline())
        return answer

    def cpu(self) -> tuple[float, float]:
        """Returns CPU seconds of the server and of PostgreSQL so far."""
        own = psutil.Process(self.server.pid)
        self.peak_rss = max(self.peak_rss, own.memory_info().rss / 1e6)
        postgres = 0.0
        for process in [(main := psutil.Process(self.postmaster)), *main.children()]:
            try:
                # Of the main process: children that have ended are in its account.
                times = process.cpu_times()
                postgres += times.user + times.system
                if process is main:
                    postgres += times.children_user + times.children_system
            except psutil.NoSuchProcess:
                continue
        times = own.cpu_times()
        return times.user + times.system, postgres

    def measure(
        self,
        events: int,
        batch: int,
        callers: int,
        duplicates: float = 0.0,
        calls_per_second: float | None = None,
    ) -> dict[str, Any]:
        """Sends so many events; returns rate, latencies and microseconds of CPU an event."""
        count = max(1, events // batch)
        self.ask(do="make", count=count, batch=batch, duplicates=duplicates)
        server, postgres = self.cpu()
        answer = self.ask(do="run", callers=callers, calls_per_second=calls_per_second)
        if answer["failures"] or not set(answer["statuses"]) <= {"STORED", "DUPLICATE"}:
            raise SystemExit(f"calls failed: {answer}; log: {(self.home / 'server.log').read_text()[-2000:]}")
        server_after, postgres_after = self.cpu()
        sent = count * batch
        return {
            "rate": sent / answer["seconds"],
            "p50_ms": answer["p50_ms"],
            "p99_ms": answer["p99_ms"],
            "cpu_us": {
                "server": (server_after - server) / sent * 1e6,
                "postgres": (postgres_after - postgres) / sent * 1e6,
                "client": answer["cpu"] / sent * 1e6,
            },
        }

    def rows(self) -> int:
        with psycopg.connect(self.url) as connection:
            row = connection.execute("SELECT count(*) FROM feedback.events").fetchone()
        assert row is not None
        return int(row[0])

    def rows_per_commit(self) -> float:
        """Returns how many events the transactions of the newest rows had on average."""
        with psycopg.connect(self.url) as connection:
            row = connection.execute(
                "SELECT count(*)::float / count(DISTINCT xid) FROM "
                "(SELECT xid FROM feedback.events ORDER BY xid DESC LIMIT 20000) AS newest"
            ).fetchone()
        assert row is not None
        return float(row[0])

    def copy(self, batch: int, limit: int) -> tuple[float, float]:
        """Copies stored rows into a twin table; returns events/s and PostgreSQL's CPU an event."""
        with (
            psycopg.connect(self.url) as marking,
            psycopg.connect(self.url, autocommit=True) as connection,
        ):
            # A page of the log that is being looked through for bots is waited for, and the next one begins behind this.
            marking.execute("SELECT FROM feedback.bot_watermark FOR UPDATE")
            connection.execute("SET role shopkeeper_feedback")
            connection.execute("DROP TABLE IF EXISTS feedback.twin")
            connection.execute(
                "CREATE TABLE feedback.twin (LIKE feedback.events INCLUDING ALL) PARTITION BY RANGE (event_key)"
            )
            connection.execute("CREATE TABLE feedback.twin_default PARTITION OF feedback.twin DEFAULT")
            with connection.cursor().copy(
                f"COPY (SELECT * FROM feedback.events ORDER BY event_key DESC LIMIT {limit}) TO STDOUT"
            ) as lines:
                rows = [bytes(line) for line in lines]
            parts = [b"".join(rows[start : start + batch]) for start in range(0, len(rows), batch)]
            _, before = self.cpu()
            start = time.perf_counter()
            for part in parts:
                with connection.cursor().copy("COPY feedback.twin FROM STDIN") as copy:
                    copy.write(part)
            seconds = time.perf_counter() - start
            _, after = self.cpu()
            connection.execute("DROP TABLE feedback.twin")
        return len(rows) / seconds, (after - before) / len(rows) * 1e6

    def grow_to(self, rows: int) -> None:
        """Fills the table with synthetic rows of this month."""
        missing = rows - self.rows()
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute("SET role shopkeeper_feedback")
            for start in range(0, missing, 200_000):
                connection.execute(
                    """
                    INSERT INTO feedback.events (event_key, payload_digest, occurred_at, kind, device, channel,
                        consent, user_key, session_key, item_id, price_micros, currency_code, value)
                    SELECT (lpad(to_hex((extract(epoch FROM now()) * 1000)::bigint - (random() * 6e5)::bigint), 12, '0')
                            || '7' || substr(md5(i::text || random()::text), 1, 3) || '8'
                            || substr(md5(random()::text || i::text), 1, 15))::uuid,
                        i, now(), 3, 2, 1, 0, substr(sha256((i %% 50000)::text::bytea), 1, 16),
                        substr(sha256((i / 7)::text::bytea), 1, 16), 'item-' || i %% 10000, 9990000, 'EUR', 3
                    FROM generate_series(%s::bigint, %s::bigint) AS i ON CONFLICT DO NOTHING
                    """,
                    (start, min(missing, start + 200_000) - 1),
                )
            # Nobody's bots: marking them would be measured beside the events that follow.
            connection.execute(
                "UPDATE feedback.bot_watermark SET xid = pg_snapshot_xmin(pg_current_snapshot())"
            )
            connection.execute("CHECKPOINT") if _is_superuser(connection) else None

    def close(self) -> None:
        if self.load.stdin is not None:
            self.load.stdin.close()
        self.load.wait(10)
        self.server.terminate()
        self.server.wait(30)
        embedded_postgres.stop(self.home)


def _is_superuser(connection: psycopg.Connection[Any]) -> bool:
    connection.execute("RESET role")
    row = connection.execute("SELECT rolsuper FROM pg_roles WHERE rolname = current_user").fetchone()
    return bool(row and row[0])


def fsync_ms(directory: Path, count: int = 60) -> tuple[float, float]:
    """Returns median and 99th percentile of an 8 kB write with fdatasync, in milliseconds."""
    path = directory / "fsync-probe"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
    took = []
    try:
        os.write(descriptor, bytes(8192 * 64))
        os.fsync(descriptor)
        for number in range(count):
            start = time.perf_counter()
            os.pwrite(descriptor, os.urandom(8192), 8192 * (number % 64))
            os.fdatasync(descriptor)
            took.append(1e3 * (time.perf_counter() - start))
    finally:
        os.close(descriptor)
        path.unlink()
    took.sort()
    return statistics.median(took), took[int(len(took) * 0.99)]


def environment(url: str) -> dict[str, Any]:
    """Returns what the numbers depend on."""
    with psycopg.connect(url) as connection:
        row = connection.execute("SHOW server_version").fetchone()
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "postgres": row[0] if row else "",
        "load_average": [round(value, 1) for value in os.getloadavg()],
    }


def measured(bench: Bench, arguments: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """Yields each number with its name, as soon as it is known."""
    batch, events, callers = arguments.batch, arguments.events, arguments.callers
    yield "batch", batch
    yield "fsync_ms", round((probe := fsync_ms(bench.home))[0], 2)
    yield "fsync_p99_ms", round(probe[1], 2)
    bench.measure(events // 10, batch, callers)
    # In turns, so that a neighbour's burst of work hits all alike.
    plain, doubled = [], []
    for _ in range(arguments.rounds):
        plain.append(bench.measure(events // arguments.rounds, batch, callers))
        doubled.append(bench.measure(events // arguments.rounds, batch, callers, duplicates=0.1))
    best = max(plain, key=lambda one: one["rate"])
    yield "events_per_second", round(best["rate"])
    yield "events_per_second_rounds", [round(one["rate"]) for one in plain]
    yield "batch_p99_ms", round(best["p99_ms"], 1)
    cpu = {name: min(one["cpu_us"][name] for one in plain) for name in ("server", "postgres", "client")}
    yield "cpu_us_per_event", {name: round(value, 1) for name, value in cpu.items()}
    rows_per_commit = bench.rows_per_commit()
    yield "rows_per_commit", round(rows_per_commit)
    copies = [bench.copy(batch, min(events // 2, 20_000)) for _ in range(arguments.rounds)]
    copy_rate = max(rate for rate, _ in copies)
    yield "copy_events_per_second", round(copy_rate)
    yield "copy_cpu_us_per_event", round(min(used for _, used in copies), 1)
    yield "copy_ratio", round(best["rate"] / copy_rate, 3)
    yield (
        "copy_at_commit_size",
        round(bench.copy(max(1, round(rows_per_commit)), min(events // 2, 20_000))[0]),
    )
    plain_rate = statistics.mean(one["rate"] for one in plain)
    yield "duplicate_cost", round(1 - statistics.mean(one["rate"] for one in doubled) / plain_rate, 3)

    def used(rounds: list[dict[str, Any]]) -> float:
        return min(one["cpu_us"]["server"] + one["cpu_us"]["postgres"] for one in rounds)

    yield "duplicate_cost_cpu", round(used(doubled) / used(plain) - 1, 3)
    single = bench.measure(arguments.calls, 1, SINGLE_CALLERS)
    yield "single_calls_per_second", round(single["rate"])
    yield "ack_p50_ms", round(single["p50_ms"], 1)
    yield "ack_p99_ms", round(single["p99_ms"], 1)
    yield "single_cpu_us_per_call", {name: round(value) for name, value in single["cpu_us"].items()}
    pace = min(arguments.pace * single["rate"], ASKED_CALLS_PER_SECOND)
    paced = bench.measure(arguments.calls, 1, SINGLE_CALLERS, calls_per_second=pace)
    yield "paced_calls_per_second", round(paced["rate"])
    yield "paced_ack_p50_ms", round(paced["p50_ms"], 1)
    yield "paced_ack_p99_ms", round(paced["p99_ms"], 1)
    fsync = fsync_ms(bench.home)[0]
    yield "paced_fsync_ms", round(fsync, 2)
    yield "ack_asked_ms", round(4 * fsync + 10, 1)
    if arguments.minutes:
        resident = soaked(bench, arguments)
        yield "rss_mb_by_time", [round(resident[len(resident) * tenth // 10]) for tenth in range(10)]
        fifth = max(1, len(resident) // 5)
        growth = statistics.median(resident[-fifth:]) - statistics.median(resident[fifth : 2 * fifth])
        yield "rss_growth_mb", round(growth, 1)
    costs = []
    for rows in arguments.sizes:
        bench.grow_to(rows)
        bench.measure(events // 10, batch, callers)
        costs.append(used([bench.measure(events // 2, batch, callers) for _ in range(2)]))
        yield f"cpu_us_per_event_at_{rows}_rows", round(costs[-1], 1)
    if len(costs) > 1:
        yield "cost_growth", round(costs[-1] / costs[0] - 1, 3)
    yield "rows", bench.rows()
    bench.cpu()
    yield "rss_mb", round(bench.peak_rss)
    yield "environment", environment(bench.url)


def soaked(bench: Bench, arguments: argparse.Namespace) -> list[float]:
    """Returns the server's resident megabytes after each round of a load that lasts --minutes."""
    resident = []
    end = time.monotonic() + 60 * arguments.minutes
    while time.monotonic() < end:
        bench.measure(arguments.events // 2, arguments.batch, arguments.callers)
        resident.append(psutil.Process(bench.server.pid).memory_info().rss / 1e6)
    return resident


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=100, help="events a call")
    parser.add_argument("--callers", type=int, default=64, help="concurrent callers of the batches")
    parser.add_argument("--events", type=int, default=150_000, help="events of the main measurement")
    parser.add_argument("--rounds", type=int, default=3, help="rounds into which they are divided")
    parser.add_argument("--calls", type=int, default=6_000, help="calls with one event each")
    parser.add_argument(
        "--pace",
        type=float,
        default=2 / 3,
        help="of the paced calls, by the saturated rate; at most 3,000 calls/s",
    )
    parser.add_argument(
        "--minutes", type=float, default=0.0, help="of batches, after which the memory is looked at; 0: none"
    )
    parser.add_argument(
        "--sizes", type=lambda text: [int(size) for size in text.split(",")], default=[100_000, 500_000],
        help="table sizes between which the cost of an event may grow, such as 1000000,20000000",
    )  # fmt: skip
    parser.add_argument("--load", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load is not None:
        serve_load(arguments.load)
        return
    home = Path(tempfile.mkdtemp(prefix="shopkeeper-bench-"))
    start = time.perf_counter()
    bench = None
    try:
        bench = Bench(home)
        numbers: dict[str, Any] = {}
        for name, value in measured(bench, arguments):
            numbers[name] = value
            print(f"{name:32} {value}", flush=True)
        numbers["seconds"] = round(time.perf_counter() - start, 1)
        print(json.dumps(numbers), flush=True)
    finally:
        if bench is not None:
            bench.close()
        shutil.rmtree(home, ignore_errors=True)


if __name__ == "__main__":
    main()
