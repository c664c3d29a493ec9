"""What one pod needs and carries: `make bench-pods`.

The four services run as they are deployed, over mutual TLS under the shipped policy, on a real PostgreSQL. After each phase the memory and the
processor time of every service, with the processes that it starts, are told: alone after the start; with a catalogue of 12,000 items and a log;
while a model is trained; and while calls come at a steady rate that no service is busy with. From these are the requests and limits of
deploy/k8s/base. Processor time is the sum of user's and system's, so that others on the machine change it little. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
import psycopg
from psycopg import sql
from shopkeeper.feedback.v1 import event_pb2
from shopkeeper.profile.v1 import catalog_service_pb2, item_pb2, profile_service_pb2
from shopkeeper.recommend.v1 import recommend_service_pb2
from shopkeeper.trainer.v1 import trainer_service_pb2, training_run_pb2

from shared import embedded_postgres
from shared.cli.certs import issue_certificates
from shared.database import ensure_database
from shared.keys import ensure_development_keys
from tests.integration.suite import SERVICES, Suite, eventually, view

BATCH = 500
SAMPLE_SECONDS = 0.2


@dataclass
class Usage:
    """Of one service in one phase: memory in MB (10**6 bytes), processor in cores."""

    resident_mb: float = 0.0
    peak_mb: float = 0.0
    cpu_seconds: float = 0.0
    seconds: float = 0.0

    def as_dict(self) -> dict[str, float]:
        return {
            "resident_mb": round(self.resident_mb), "peak_mb": round(self.peak_mb),
            "cores": round(self.cpu_seconds / self.seconds, 3),
        }  # fmt: skip


@dataclass
class Meter:
    """Looks at the processes of a suite while something is done."""

    suite: Suite
    phases: dict[str, dict[str, Usage]] = field(default_factory=dict)

    def processes(self, name: str) -> list[psutil.Process]:
        parent = psutil.Process(self.suite.processes[name].pid)
        return [parent, *parent.children(recursive=True)]

    def read(self, name: str) -> tuple[float, float]:
        """Returns resident MB and processor seconds of a service and of what it has started, ended ones included."""
        resident, cpu = 0.0, 0.0
        for process in self.processes(name):
            try:
                with process.oneshot():
                    times = process.cpu_times()
                    resident += process.memory_info().rss / 1e6
                    cpu += times.user + times.system
                    # Time of children that have ended is the parent's; that of the living is counted by themselves.
                    cpu += times.children_user + times.children_system
            except psutil.NoSuchProcess:
                continue
        return resident, cpu

    @contextmanager
    def phase(self, phase: str) -> Iterator[dict[str, Usage]]:
        usage = self.phases[phase] = {name: Usage() for name in SERVICES}
        before = {name: self.read(name)[1] for name in SERVICES}
        done, begin = threading.Event(), time.perf_counter()

        def look() -> None:
            while not done.wait(SAMPLE_SECONDS):
                for name in SERVICES:
                    usage[name].peak_mb = max(usage[name].peak_mb, self.read(name)[0])

        watcher = threading.Thread(target=look)
        watcher.start()
        try:
            yield usage
        finally:
            done.set()
            watcher.join()
            for name in SERVICES:
                resident, cpu = self.read(name)
                usage[name].resident_mb = resident
                usage[name].peak_mb = max(usage[name].peak_mb, resident)
                usage[name].cpu_seconds = cpu - before[name]
                usage[name].seconds = time.perf_counter() - begin
                print(f"{phase:10} {name:10} {usage[name].as_dict()}", flush=True)


def stock(suite: Suite, items: int) -> None:
    """Fills the catalogue."""
    for begin in range(0, items, BATCH):
        batch = [
            item_pb2.Item(
                item_id=f"i{number}", title=f"Thing {number} of brand {number % 97}", brand=f"brand-{number % 97}",
                category_path=["all", f"kind-{number % 60}"], price_micros=(1 + number % 300) * 100_000, currency_code="EUR",
                stock_quantity=100,
            )
            for number in range(begin, min(items, begin + BATCH))
        ]  # fmt: skip
        suite.catalog.UpsertItems(catalog_service_pb2.UpsertItemsRequest(items=batch), timeout=60)


def fill(suite: Suite, items: int, shoppers: int, views: int, rng: np.random.Generator) -> None:
    """Lets shoppers walk through the catalogue, from an item to one that stands near."""
    events: list[event_pb2.Event] = []
    for shopper in range(shoppers):
        place = int(rng.integers(items))
        for step in range(views):
            place = (place + int(rng.integers(1, 6))) % items
            events.append(view(f"shopper-{shopper}", f"i{place}", seconds_ago=60.0 * (views - step)))
    for begin in range(0, len(events), BATCH):
        suite.record(events[begin : begin + BATCH], timeout=60)


def train(suite: Suite, seconds: int) -> None:
    """Trains a model of the default size, and waits until it ends."""
    config = training_run_pb2.TrainingConfig(
        size=training_run_pb2.TrainingConfig.SIZE_SMALL, max_train_seconds=seconds
    )
    request = trainer_service_pb2.CreateTrainingRunRequest(request_id=uuid.uuid4().hex, config=config)
    run = suite.trainer.CreateTrainingRun(request, timeout=30)
    last = None
    for update in suite.trainer.WatchTrainingRun(
        trainer_service_pb2.WatchTrainingRunRequest(run_id=run.run_id), timeout=900
    ):
        last = update.training_run
    if last is None or last.state != training_run_pb2.TrainingRun.STATE_SUCCEEDED:
        raise SystemExit(f"the run did not succeed: {last}")


def paced(call: Callable[[int], object], rate: float, seconds: float) -> int:
    """Calls at a steady rate from one thread; returns how many calls were answered."""
    begin, done = time.perf_counter(), 0
    while (now := time.perf_counter() - begin) < seconds:
        if now < done / rate:
            time.sleep(done / rate - now)
        call(done)
        done += 1
    return done


def calls(suite: Suite, items: int, shoppers: int, rate: float, seconds: float) -> dict[str, int]:
    """Records, reads and asks at once; returns the number of each."""
    answered: dict[str, int] = {}

    def record(number: int) -> object:
        return suite.record([view(f"shopper-{number % shoppers}", f"i{number % items}")])

    def read(number: int) -> object:
        request = profile_service_pb2.GetProfileRequest(user_id=f"shopper-{number * 7 % shoppers}")
        return suite.profile.GetProfile(request, timeout=10)

    def ask(number: int) -> object:
        request = recommend_service_pb2.RecommendRequest(
            user_id=f"shopper-{number * 3 % shoppers}", page_size=20
        )
        return suite.recommend.Recommend(request, timeout=10)

    def loop(name: str, call: Callable[[int], object]) -> None:
        answered[name] = paced(call, rate, seconds)

    threads = [
        threading.Thread(target=loop, args=(name, call))
        for name, call in (("feedback", record), ("profile", read), ("recommend", ask))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answered


def main() -> None:
    """Measures, and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--items", type=int, default=12_000)
    parser.add_argument("--shoppers", type=int, default=8_000)
    parser.add_argument("--views", type=int, default=12, help="events of each shopper")
    parser.add_argument("--train-seconds", type=int, default=30)
    parser.add_argument("--rate", type=float, default=50.0, help="calls a second of each kind")
    parser.add_argument("--seconds", type=float, default=20.0, help="of steady calls")
    arguments = parser.parse_args()
    rng = np.random.default_rng(3)
    # A directory with a short name: sockets of PostgreSQL lie in it.
    with tempfile.TemporaryDirectory(prefix="pods") as directory:
        home = Path(directory)
        base = embedded_postgres.start(home)
        with psycopg.connect(base, autocommit=True) as connection:
            connection.execute(sql.SQL("CREATE DATABASE shop"))
        url = psycopg.conninfo.make_conninfo(base, dbname="shop")
        ensure_database(url)
        keys, certificates = home / "keys", home / "certs"
        ensure_development_keys(keys)
        issue_certificates(certificates)
        suite = Suite(home, url, keys, certificates)
        meter = Meter(suite)
        try:
            suite.start()
            with meter.phase("alone"):
                time.sleep(10)
            with meter.phase("filling"):
                stock(suite, arguments.items)
                fill(suite, arguments.items, arguments.shoppers, arguments.views, rng)
            with meter.phase("training"):
                train(suite, arguments.train_seconds)
            status = recommend_service_pb2.GetModelStatusRequest()
            eventually(
                "a model is in service", lambda: suite.recommend.GetModelStatus(status, timeout=5).models
            )
            with meter.phase("idle") as idle:
                time.sleep(10)
            with meter.phase("calls") as busy:
                answered = calls(
                    suite, arguments.items, arguments.shoppers, arguments.rate, arguments.seconds
                )
        finally:
            suite.stop()
            embedded_postgres.stop(home)
    # What a service does without calls is not the calls'.
    cost = {
        name: round(
            1e3
            * (busy[name].cpu_seconds - idle[name].cpu_seconds / idle[name].seconds * busy[name].seconds)
            / count,
            2,
        )
        for name, count in answered.items()
    }
    print("processor a call, ms (feedback: of one event; profile: folding and serving it too):", cost)
    phases = {
        phase: {name: each.as_dict() for name, each in usage.items()} for phase, usage in meter.phases.items()
    }
    print(json.dumps({"cpu_ms_a_call": cost, "phases": phases, "load_average": os.getloadavg()}))


if __name__ == "__main__":
    main()
