"""What becomes of the log's goodput at twice its capacity: `make verify-overload`.

The feedback server and its PostgreSQL share one core, the load has another, so that offering more does not take
from those who serve. First the peak: as many events a second as are acknowledged to callers that wait for each
other. Then an open loop offers a multiple of it, which no caller's waiting slows down, with a deadline of a second
and a fifth of the calls marked as low priority; then both again. At last the same without admission control, as a
control: a measurement that cannot tell the two apart shows nothing.

The last line is JSON:

peak_events_per_second          acknowledged in a closed loop, the best of several numbers of callers
offered_events_per_second       by the open loop, --times the peak
goodput_events_per_second       acknowledged within the deadline meanwhile
goodput_ratio                   the one by the other
refused_share                   of all calls; low_refused_share, normal_refused_share by priority
refusals_without_retry_info     must be 0
other_failures                  by code
ack_p99_ms                      of what was acknowledged, from the moment at which it was due
refusal_p50_ms, refusal_p99_ms
ratio_without_admission         goodput_ratio where calls may queue for a minute
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import psycopg
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from shopkeeper.feedback.v1 import event_pb2, feedback_service_pb2

from shared import embedded_postgres
from shared.database import ensure_database, migrate
from shared.keys import ensure_development_keys
from shared.load_shedding import LOW_PRIORITY

REPOSITORY = Path(__file__).resolve().parents[2]
METHOD = "/shopkeeper.feedback.v1.FeedbackService/RecordEvents"
DEADLINE_SECONDS = 1.0
LOW_SHARE = 5  # One in so many.
CONNECTIONS = 4


class Requests:
    """Serialised batches with fresh ids, from a template that is cut at its ids."""

    def __init__(self, batch: int) -> None:
        placeholder = "00000000-0000-7000-8000-{:012x}"
        events = [
            event_pb2.Event(
                event_id=placeholder.format(row),
                user_id=f"customer-{row * 37 % 1000}",
                session_id=f"visit-{row}",
                item_view=event_pb2.ItemView(item_id=f"item-{row}", dwell_seconds=3),
            )
            for row in range(batch)
        ]
        whole = feedback_service_pb2.RecordEventsRequest(events=events).SerializeToString()
        self._parts: list[bytes] = []
        for row in range(batch):
            before, _, whole = whole.partition(placeholder.format(row).encode())
            self._parts.append(before)
        self._parts.append(whole)
        self._made = 0

    def next(self) -> bytes:
        """Returns one batch that nobody has sent before."""
        ms = f"{time.time_ns() // 1_000_000:012x}"
        start, self._made = self._made, self._made + len(self._parts) - 1
        head = f"{ms[:8]}-{ms[8:]}-7000-8000-"
        pieces = []
        for row, part in enumerate(self._parts[:-1]):
            pieces += (part, f"{head}{start + row:012x}".encode())
        pieces.append(self._parts[-1])
        return b"".join(pieces)


@dataclass(slots=True)
class Seen:
    """What came of the calls."""

    good: int = 0
    late: int = 0
    sent: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    without_retry_info: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    latencies: list[float] = field(default_factory=list)
    refusal_latencies: list[float] = field(default_factory=list)


class Load:
    """Callers over a few connections."""

    def __init__(self, port: int, batch: int) -> None:
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
        self._channels = [
            grpc.insecure_channel(f"127.0.0.1:{port}", options=options) for _ in range(CONNECTIONS)
        ]
        for channel in self._channels:
            grpc.channel_ready_future(channel).result(30)
        self._calls = [channel.unary_unary(METHOD) for channel in self._channels]
        self._requests = Requests(batch)
        self._lock = threading.Lock()

    def closed_loop(self, callers: int, seconds: float) -> float:
        """Returns calls/s that are answered to so many callers, each waiting for its answer."""
        good, end = 0, time.perf_counter() + seconds

        def caller(number: int) -> None:
            nonlocal good
            call = self._calls[number % CONNECTIONS]
            while time.perf_counter() < end:
                with self._lock:
                    request = self._requests.next()
                try:
                    call(request, timeout=DEADLINE_SECONDS)
                except grpc.RpcError:
                    continue
                with self._lock:
                    good += 1

        threads = [threading.Thread(target=caller, args=(number,)) for number in range(callers)]
        start = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return good / (time.perf_counter() - start)

    def open_loop(self, rate: float, seconds: float) -> Seen:
        """Sends calls at a rate, whatever becomes of them."""
        seen, outstanding = Seen(), threading.Semaphore(0)
        start, number = time.perf_counter() + 0.05, 0
        while (due := start + number / rate) < start + seconds:
            if (ahead := due - time.perf_counter()) > 0.0005:
                time.sleep(ahead)
            low = number % LOW_SHARE == 0
            future = self._calls[number % CONNECTIONS].future(
                self._requests.next(),
                timeout=DEADLINE_SECONDS,
                metadata=(LOW_PRIORITY,) if low else None,
            )
            name = "low" if low else "normal"
            seen.sent[name] += 1

            def done(future: Any, due: float = due, name: str = name) -> None:
                self._count(seen, future, time.perf_counter() - due, name)
                outstanding.release()

            future.add_done_callback(done)
            number += 1
        for _ in range(number):
            outstanding.acquire()
        return seen

    def _count(self, seen: Seen, future: Any, latency: float, name: str) -> None:
        code = future.code()
        with self._lock:
            if code is grpc.StatusCode.OK:
                if latency <= DEADLINE_SECONDS:
                    seen.good += 1
                    seen.latencies.append(latency)
                else:
                    seen.late += 1
            elif code is grpc.StatusCode.RESOURCE_EXHAUSTED:
                seen.refused[name] += 1
                seen.refusal_latencies.append(latency)
                # Reading a status costs the load more than sending a call: a sample of them is read.
                if sum(seen.refused.values()) % 20 == 1 and not _has_retry_info(future):
                    seen.without_retry_info += 1
            else:
                seen.failures[code.name] += 1

    def close(self) -> None:
        for channel in self._channels:
            channel.close()


def _has_retry_info(future: Any) -> bool:
    status = rpc_status.from_call(future)
    return status is not None and any(
        detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR) for detail in status.details
    )


def _pin(pid: int, core: int) -> None:
    """Keeps a process, its children and its threads on a core, where there are two."""
    if len(os.sched_getaffinity(0)) < 2 and core:
        return
    for task in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(task.name), {core})


@contextmanager
def served(home: Path, **settings: str) -> Iterator[int]:
    """Runs the server on one core; yields its port."""
    log = home / "server.log"
    environment = {
        **os.environ,
        "SHOPKEEPER_HOME": str(home),
        "SHOPKEEPER_LISTEN": "127.0.0.1:0",
        "SHOPKEEPER_BOT_VIEWS_PER_MINUTE": "1000000000",
        **settings,
    }
    with log.open("wb") as stream:
        server = subprocess.Popen(
            ["taskset", "-c", "0", sys.executable, "-m", "services.feedback"],
            cwd=REPOSITORY, env=environment, stderr=stream,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while "feedback ready on 127.0.0.1:" not in (text := log.read_text()):
            if server.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the server did not start:\n{text}")
            time.sleep(0.05)
        yield int(text.partition("feedback ready on 127.0.0.1:")[2].split('"')[0])
    finally:
        server.terminate()
        server.wait(30)


def measured(port: int, batch: int, seconds: float, times: float, rounds: int) -> tuple[float, float, Seen]:
    """Returns the peak and the goodput in calls/s, and what was seen under overload."""
    load = Load(port, batch)
    load.closed_loop(8, 1.0)
    best = max((16, 28, 40), key=lambda callers: load.closed_loop(callers, seconds / 3))
    peaks, goods, all_seen = [], [], Seen()
    for _ in range(rounds):
        peaks.append(load.closed_loop(best, seconds))
        seen = load.open_loop(times * statistics.mean(peaks), seconds)
        goods.append(seen.good / seconds)
        all_seen.good += seen.good
        all_seen.late += seen.late
        all_seen.sent += seen.sent
        all_seen.refused += seen.refused
        all_seen.without_retry_info += seen.without_retry_info
        all_seen.failures += seen.failures
        all_seen.latencies += seen.latencies
        all_seen.refusal_latencies += seen.refusal_latencies
        print(f"peak {peaks[-1]:8.0f} calls/s   goodput {goods[-1]:8.0f}   {dict(seen.refused)} refused")
        time.sleep(1.0)
    load.close()
    return statistics.mean(peaks), statistics.mean(goods), all_seen


def _ms(seconds: list[float], share: float) -> float:
    ordered = sorted(seconds)
    return round(1e3 * ordered[int(len(ordered) * share)], 1) if ordered else 0.0


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=100, help="events of a call")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--times", type=float, default=2.0, help="offered load by the peak")
    arguments = parser.parse_args()
    home = Path(tempfile.mkdtemp(prefix="shopkeeper-overload-"))
    if len(os.sched_getaffinity(0)) > 1:
        os.sched_setaffinity(0, {1})
    try:
        base = embedded_postgres.start(home)
        with psycopg.connect(base, autocommit=True) as connection:
            connection.execute("CREATE DATABASE overload")
        url = psycopg.conninfo.make_conninfo(base, dbname="overload")
        ensure_database(url)
        migrate(url, "feedback")
        ensure_development_keys(home / "keys")
        # Its children are born where it lives.
        _pin(int((home / "postgres" / "postmaster.pid").read_text().split()[0]), 0)
        with served(home, DATABASE_URL=url) as port:
            peak, good, seen = measured(
                port, arguments.batch, arguments.seconds, arguments.times, arguments.rounds
            )
        print("without admission control:")
        with served(home, DATABASE_URL=url, SHOPKEEPER_MAX_QUEUE_SECONDS="60") as port:
            bare_peak, bare_good, _ = measured(
                port, arguments.batch, arguments.seconds, arguments.times, max(1, arguments.rounds // 2)
            )
    finally:
        embedded_postgres.stop(home)
        shutil.rmtree(home, ignore_errors=True)
    sent, refused = sum(seen.sent.values()), sum(seen.refused.values())
    print(
        json.dumps(
            {
                "peak_events_per_second": round(peak * arguments.batch),
                "offered_events_per_second": round(
                    sent * arguments.batch / arguments.seconds / arguments.rounds
                ),
                "goodput_events_per_second": round(good * arguments.batch),
                "goodput_ratio": round(good / peak, 3),
                "refused_share": round(refused / sent, 3),
                "low_refused_share": round(seen.refused["low"] / seen.sent["low"], 3),
                "normal_refused_share": round(seen.refused["normal"] / seen.sent["normal"], 3),
                "refusals_without_retry_info": seen.without_retry_info,
                "late": seen.late,
                "other_failures": dict(seen.failures),
                "ack_p99_ms": _ms(seen.latencies, 0.99),
                "refusal_p50_ms": _ms(seen.refusal_latencies, 0.5),
                "refusal_p99_ms": _ms(seen.refusal_latencies, 0.99),
                "ratio_without_admission": round(bare_good / bare_peak, 3),
                "batch": arguments.batch,
            }
        )
    )


if __name__ == "__main__":
    main()
