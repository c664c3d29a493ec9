"""How fast portraits and the catalogue are: `make bench-profile` (EVENTS=1000000).

The profile service runs as it is deployed, in a process of its own, over an embedded PostgreSQL whose log is
filled beforehand: shoppers with 20 events on average, a few with very many. Reads are an open loop: latency
counts from when a call was due, so that a slow server cannot slow the load down. The fold and the memory are
measured inside of this process. The last line is JSON:

get_p50_ms, get_p99_ms      GetProfile, full view, of shoppers in memory, --rate a second
get_refused                 calls that were refused, of all; they count as endless
get_cpu_ms                  CPU of the server for one of them
cold_p50_ms, cold_p99_ms    the same of shoppers that must be read from PostgreSQL, one after another
fold_events_per_second      from rows of the log to portraits, on one core (CPU time)
tail_events_per_second      new events into shoppers in memory, on one core (CPU time)
rebuild_seconds             RebuildProfiles over the whole log
hot_users, hot_rss_mb       shoppers in memory at once (USERS), and the resident memory of the process that holds them
bytes_per_hot_user          resident memory of one shopper of 20 events on average
item_upserts_per_second     UpsertItems, 1,000 rows a call, 4 callers; of new items
item_change_ms              from the answer of a write until WatchItems tells it: median, and the worst of 30
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import psycopg
from shopkeeper.profile.v1 import (
    catalog_service_pb2,
    catalog_service_pb2_grpc,
    item_pb2,
    profile_service_pb2,
    profile_service_pb2_grpc,
    rebuild_pb2,
)

from services.profile.domain.events import (
    EMPTY_WINDOW,
    EVENT,
    HAS_PRICE,
    PERSONALISATION,
    EventBatch,
    EventWindow,
    Vocabulary,
    group_by_user,
)
from services.profile.domain.portrait import ItemFacts
from services.profile.domain.portrait_fold import fold_portrait
from services.profile.ports import EventLog
from services.profile.use_cases.live_histories import LiveHistories
from shared import embedded_postgres
from shared.database import migrate
from shared.event_kinds import EventKind
from shared.identity import UserKey
from shared.keys import ensure_development_keys
from tests.benchmarks.bench_ingest import environment

REPOSITORY = Path(__file__).resolve().parents[2]
EVENTS_OF_A_SHOPPER = 20
ITEMS = 10_000
HOT, COLD = 2_000, 300
_KINDS = (EventKind.ITEM_VIEW, EventKind.ADD_TO_CART, EventKind.PURCHASE, EventKind.SEARCH)
_KIND_SHARES = (0.8, 0.08, 0.07, 0.05)

# Shoppers are numbers: how often one comes falls with the square of a uniform number. Times spread over 90 days.
_FILL = """
    INSERT INTO feedback.events (event_key, payload_digest, occurred_at, kind, device, channel, consent, user_key,
        item_id, quantity, price_micros, currency_code)
    SELECT (lpad(to_hex(1760000000000 + (n * 7776000000 / %(events)s)::bigint), 12, '0') || '7' || lpad(to_hex(n %% 4096), 3, '0')
            || '8' || lpad(to_hex(n), 15, '0'))::uuid, 0,
        to_timestamp(1760000000 + n * 7776000.0 / %(events)s),
        (ARRAY[3,3,3,3,3,3,3,3,3,3,3,4,6,1])[1 + n %% 14], n %% 3, n %% 4, 0,
        decode(md5(((%(shoppers)s * pow(random(), 2))::int)::text), 'hex'),
        CASE WHEN n %% 14 = 13 THEN NULL ELSE 'item-' || (%(items)s * pow(random(), 2))::int END,
        CASE WHEN n %% 14 = 12 THEN 1 END, CASE WHEN n %% 14 = 12 THEN 1000000 * (1 + n %% 50) END,
        CASE WHEN n %% 14 = 12 THEN 'EUR' END
    FROM generate_series(%(first)s::bigint, %(last)s::bigint) AS n
"""


def fill_log(url: str, events: int) -> None:
    """Fills a migrated log with events of shoppers, EVENTS_OF_A_SHOPPER each on average."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("SELECT setseed(0.5)")
        parameters = {"events": events, "shoppers": max(1, events // EVENTS_OF_A_SHOPPER), "items": ITEMS}
        for first in range(0, events, 250_000):
            last = min(events, first + 250_000) - 1
            connection.execute(_FILL, parameters | {"first": first, "last": last})
        connection.execute("VACUUM ANALYZE feedback.events")


class Bench:
    """The database, the server and the channels to it."""

    def __init__(self, home: Path, events: int) -> None:
        self.events = events
        self.home = home
        ensure_development_keys(home / "keys")
        self.url = embedded_postgres.start(home)
        for service in ("feedback", "profile"):
            migrate(self.url, service)
        self.shoppers = self._fill()
        self.server, self.port = self._start_server()
        self.process = psutil.Process(self.server.pid)
        self.channel = grpc.insecure_channel(f"127.0.0.1:{self.port}")
        self.profiles = profile_service_pb2_grpc.ProfileServiceStub(self.channel)
        self.catalog = catalog_service_pb2_grpc.CatalogServiceStub(self.channel)

    def _fill(self) -> list[bytes]:
        fill_log(self.url, self.events)
        with psycopg.connect(self.url) as connection:
            rows = connection.execute("SELECT DISTINCT user_key FROM feedback.events").fetchall()
        keys = sorted(bytes(key) for (key,) in rows)
        np.random.default_rng(3).shuffle(keys)
        return keys

    def _start_server(self) -> tuple[subprocess.Popen[bytes], int]:
        log = self.home / "server.log"
        settings = {
            **os.environ,
            "DATABASE_URL": self.url,
            "SHOPKEEPER_HOME": str(self.home),
            "SHOPKEEPER_LISTEN": "127.0.0.1:0",
        }
        with log.open("wb") as stream:
            server = subprocess.Popen(
                [sys.executable, "-m", "services.profile"], cwd=REPOSITORY, env=settings, stderr=stream
            )
        deadline = time.monotonic() + 60
        while "profile ready on 127.0.0.1:" not in (text := log.read_text()):
            if server.poll() is not None or time.monotonic() > deadline:
                server.kill()
                raise SystemExit(f"the server did not start:\n{text}")
            time.sleep(0.05)
        return server, int(text.partition("profile ready on 127.0.0.1:")[2].split('"')[0])

    def stop(self) -> None:
        """Ends the server and the database."""
        self.channel.close()
        self.server.terminate()
        self.server.wait(20)
        embedded_postgres.stop(self.home)

    def upserts(self, rows: int) -> float:
        """Returns new items a second."""
        batches = [
            catalog_service_pb2.UpsertItemsRequest(
                items=[catalogue_item(n) for n in range(first, first + 1000)]
            )
            for first in range(0, rows, 1000)
        ]
        begun = time.perf_counter()
        with ThreadPoolExecutor(4) as callers:
            for answer in callers.map(lambda batch: self.catalog.UpsertItems(batch, timeout=60), batches):
                assert all(r.status == catalog_service_pb2.ITEM_WRITE_STATUS_STORED for r in answer.results)
        return len(batches) * 1000 / (time.perf_counter() - begun)

    def changes(self) -> tuple[float, float]:
        """Returns the median and the worst time until a watcher hears of a write, in ms."""
        told: dict[str, float] = {}
        complete = threading.Event()
        stream = self.catalog.WatchItems(catalog_service_pb2.WatchItemsRequest())

        def listen() -> None:
            try:
                for message in stream:
                    now = time.perf_counter()
                    if complete.is_set():
                        told.update((item.title, now) for item in message.upserted)
                    elif message.snapshot_complete:
                        complete.set()
            except grpc.RpcError:
                return

        listener = threading.Thread(target=listen, daemon=True)
        listener.start()
        complete.wait(60)
        lags = []
        for number in range(30):
            title = f"changed {number}"
            item = item_pb2.Item(item_id=f"item-{number}", title=title)
            self.catalog.UpsertItems(catalog_service_pb2.UpsertItemsRequest(items=[item]), timeout=20)
            answered = time.perf_counter()
            while title not in told:
                time.sleep(0.0005)
            lags.append(1e3 * (told[title] - answered))
        stream.cancel()
        listener.join(5)
        return float(np.median(lags)), max(lags)

    def warm(self, keys: Sequence[bytes]) -> None:
        """Reads shoppers into the server's memory."""
        for first in range(0, len(keys), 500):
            users = [profile_service_pb2.UserReference(user_key=key) for key in keys[first : first + 500]]
            self.profiles.BatchGetProfiles(
                profile_service_pb2.BatchGetProfilesRequest(users=users), timeout=60
            )

    def open_loop(self, keys: Sequence[bytes], rate: float, seconds: float) -> tuple[np.ndarray, float]:
        """Returns the latency of every call in ms, from when it was due, and the server's CPU ms a call.

        A call that was refused took for ever: infinity.
        """
        requests = [profile_service_pb2.GetProfileRequest(user_key=key) for key in keys]
        count = int(rate * seconds)
        latency = np.full(count, np.inf)
        left = threading.Semaphore(0)
        cpu = self.process.cpu_times()
        begun = time.perf_counter() + 0.1
        for number in range(count):
            due = begun + number / rate
            while (wait := due - time.perf_counter()) > 0:
                time.sleep(wait)
            call = self.profiles.GetProfile.future(requests[number % len(requests)], timeout=10)

            def done(call: Any, number: int = number, due: float = due) -> None:
                if call.exception() is None:
                    latency[number] = 1e3 * (time.perf_counter() - due)
                left.release()

            call.add_done_callback(done)
        for _ in range(count):
            left.acquire()
        after = self.process.cpu_times()
        spent = (after.user + after.system) - (cpu.user + cpu.system)
        return latency, 1e3 * spent / count

    def cold(self, keys: Sequence[bytes]) -> np.ndarray:
        """Returns the latency of calls for shoppers that are not in memory, in ms."""
        latency = []
        for key in keys:
            request = profile_service_pb2.GetProfileRequest(user_key=key)
            begun = time.perf_counter()
            self.profiles.GetProfile(request, timeout=20)
            latency.append(1e3 * (time.perf_counter() - begun))
        return np.array(latency)

    def rebuild(self) -> tuple[float, int]:
        """Returns the seconds of a rebuild, and the events that it folded."""
        begun = time.perf_counter()
        started = self.profiles.RebuildProfiles(profile_service_pb2.RebuildProfilesRequest(), timeout=20)
        request = profile_service_pb2.WatchRebuildRequest(rebuild_id=started.rebuild_id)
        *_, last = self.profiles.WatchRebuild(request)
        if last.state != rebuild_pb2.REBUILD_STATE_SUCCEEDED:
            raise SystemExit(f"the rebuild ended as {last}")
        return time.perf_counter() - begun, last.folded_event_count


def percentile(latency: np.ndarray, share: float) -> float:
    """Returns the value that so many per cent do not exceed; infinity where too many calls were refused."""
    return float(np.percentile(latency, share, method="higher"))


def catalogue_item(number: int) -> item_pb2.Item:
    """Returns an item as shops have them."""
    return item_pb2.Item(
        item_id=f"item-{number}",
        title=f"Item {number}, in the size that fits",
        description="What one says of such a thing, in two sentences. This is the second of them." * 2,
        brand=f"Brand {number % 200}",
        category_path=[f"Top {number % 12}", f"Middle {number % 60}", f"Low {number % 300}"],
        attributes=[item_pb2.Attribute(key="colour", text=("red", "green", "blue", "black")[number % 4])],
        price_micros=1_000_000 * (1 + number % 97),
        list_price_micros=1_000_000 * (2 + number % 97),
        currency_code="EUR",
        stock_quantity=number % 50,
        tags=["new"] if number % 5 == 0 else [],
    )


# Inside of this process


def random_events(count: int, shoppers: int, rng: np.random.Generator) -> EventBatch:
    """Returns events as they come from the log."""
    events = np.zeros(count, EVENT)
    ms = np.sort(rng.integers(1_760_000_000_000, 1_767_776_000_000, count))
    events["key_high"] = (ms.astype(np.uint64) << np.uint64(16)) | rng.integers(0, 4096, count).astype(
        np.uint64
    )
    events["key_low"] = rng.integers(0, 2**63, count).astype(np.uint64)
    events["occurred_at_us"] = ms * 1000
    events["kind"] = rng.choice([int(kind) for kind in _KINDS], count, p=_KIND_SHARES)
    events["item"] = (ITEMS * rng.random(count) ** 2).astype(np.int32)
    bought = events["kind"] == int(EventKind.PURCHASE)
    events["quantity"] = np.where(bought, 1.0, np.nan)
    events["value"] = np.nan
    events["price_micros"] = np.where(bought, 1_000_000 * rng.integers(1, 50, count), 0)
    events["currency"] = np.where(bought, 0, -1)
    events["flags"] = PERSONALISATION + bought * HAS_PRICE
    high = (shoppers * rng.random(count) ** 2).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return group_by_user(high, np.zeros_like(high), events)


def fold_rate(rng: np.random.Generator) -> float:
    """Returns events a second of CPU, from rows to portraits of shoppers."""
    items, currencies = Vocabulary(), Vocabulary()
    items.encode([f"item-{n}" for n in range(ITEMS)])
    currencies.encode(["EUR"])
    facts = [
        ItemFacts((f"Top {n % 12}", f"Middle {n % 60}", f"Low {n % 300}"), f"Brand {n % 200}", n % 97 / 97,
                  (("colour", ["red", "green", "blue", "black"][n % 4]),), 1_000_000 * (2 + n % 97), "EUR", 0.5)
        for n in range(ITEMS)
    ]  # fmt: skip
    by_id = {f"item-{n}": one for n, one in enumerate(facts)}
    count = 100_000
    batch = random_events(count, count // EVENTS_OF_A_SHOPPER, rng)
    begun = time.process_time()
    for _, events in batch:
        fold_portrait(EMPTY_WINDOW.merge(events), items, currencies, by_id.__getitem__, 1_770_000_000_000_000)
    return count / (time.process_time() - begun)


class _NoMetrics:
    def polled(self, event_count: int, seconds: float) -> None: ...
    def hot(self, user_count: int) -> None: ...
    def missed(self, user_count: int) -> None: ...
    def watchers(self, stream: str, count: int) -> None: ...


class _NoLog:
    def load(self, user_keys: Sequence[UserKey]) -> dict[UserKey, EventWindow]:
        raise AssertionError("everybody is in memory")


def memory_and_tail(rng: np.random.Generator, shoppers: int) -> tuple[int, float, float, float]:
    """Returns shoppers in memory, MB resident with them, bytes a shopper, and events a second of CPU into them."""
    log: EventLog = _NoLog()  # type: ignore[assignment]
    histories = LiveHistories(log, shoppers, _NoMetrics())
    known: list[UserKey] = []
    gc.collect()
    before = psutil.Process().memory_info().rss
    # A part at a time, so that what the generator needs is small beside what stays.
    for part in range(20):
        batch = random_events(shoppers * EVENTS_OF_A_SHOPPER // 20, shoppers // 20, rng)
        for user_key, events in batch:
            key = UserKey(part.to_bytes(2, "big") + user_key[:14])
            histories.warm(key, EMPTY_WINDOW.merge(events))
            if part == 0:
                known.append(key)
        del batch
    gc.collect()
    resident = psutil.Process().memory_info().rss
    size = (resident - before) / len(histories)
    fresh = [random_events(20_000, shoppers // 20, rng) for _ in range(5)]
    named = {key[2:]: key for key in known}
    batches = [
        EventBatch([named.get(key[:14], key) for key in one.user_keys], one.bounds, one.events)
        for one in fresh
    ]
    begun = time.process_time()
    for one in batches:
        histories.apply(one)
    rate = sum(len(one) for one in batches) / (time.process_time() - begun)
    return len(histories), resident / 2**20, size, rate


def run(bench: Bench, arguments: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """Yields each figure as it is known."""
    yield "events", arguments.events
    yield "shoppers", len(bench.shoppers)
    yield "item_upserts_per_second", round(bench.upserts(arguments.items))
    median, worst = bench.changes()
    yield "item_change_ms", [round(median, 1), round(worst, 1)]
    hot, cold = bench.shoppers[:HOT], bench.shoppers[HOT : HOT + COLD]
    bench.warm(hot)
    bench.open_loop(hot, arguments.rate / 2, 4.0)
    latency, cpu_ms = bench.open_loop(hot, arguments.rate, arguments.seconds)
    yield "get_p50_ms", round(percentile(latency, 50), 2)
    yield "get_p99_ms", round(percentile(latency, 99), 2)
    yield "get_cpu_ms", round(cpu_ms, 3)
    yield "get_refused", int(np.isinf(latency).sum())
    latency = bench.cold(cold)
    yield "cold_p50_ms", round(percentile(latency, 50), 2)
    yield "cold_p99_ms", round(percentile(latency, 99), 2)
    seconds, folded = bench.rebuild()
    yield "rebuild_seconds", round(seconds, 1)
    yield "rebuilt_events", folded
    yield "server_rss_mb", round(bench.process.memory_info().rss / 2**20)
    yield "environment", environment(bench.url)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--events", type=int, default=1_000_000, help="events in the log")
    parser.add_argument("--items", type=int, default=ITEMS, help="items that are written, by thousands")
    parser.add_argument("--rate", type=float, default=500.0, help="reads a second")
    parser.add_argument("--seconds", type=float, default=10.0, help="how long they last")
    parser.add_argument("--hot", type=int, default=50_000, help="shoppers in memory, for what one takes")
    arguments = parser.parse_args()
    rng = np.random.default_rng(1)
    results: dict[str, Any] = {}

    def tell(name: str, value: Any) -> None:
        results[name] = value
        print(f"{name:26} {value}", flush=True)

    hot, resident_mb, size, tail = memory_and_tail(rng, arguments.hot)
    tell("hot_users", hot)
    tell("hot_rss_mb", round(resident_mb))
    tell("bytes_per_hot_user", round(size))
    tell("tail_events_per_second", round(tail))
    tell("fold_events_per_second", round(fold_rate(rng)))
    home = Path(tempfile.mkdtemp(prefix="bench-profile-"))
    bench = Bench(home, arguments.events)
    try:
        for name, value in run(bench, arguments):
            tell(name, value)
    finally:
        bench.stop()
        shutil.rmtree(home, ignore_errors=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
