"""How long until what a shopper did changes what they are shown: `make bench-freshness`.

feedback, profile and recommend run as processes over a real PostgreSQL, with a published model of 12,000 items. A
shopper who is known to recommend does something new; from the moment before `RecordEvents` is called, their page
is asked for again and again, without a consistency token, until it is made of the new event (and the order of its
items is another). Other shoppers' events come in all the while. Then the same with the token, where the first
answer must be made of it. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psycopg
from psycopg import sql
from shopkeeper.recommend.v1 import recommend_service_pb2 as pb

from shared import embedded_postgres
from shared.database import ensure_database
from shared.keys import ensure_development_keys
from tests.benchmarks import serve_shop
from tests.integration.suite import Suite, eventually, view

ITEMS = 12_000
SHOPPERS = 20
BACKGROUND_EVENTS_PER_SECOND = 50
PAUSE_SECONDS = 0.002
LONGEST_SECONDS = 10.0


def quantile(values: list[float], share: float) -> float:
    return round(float(np.quantile(values, share, method="higher")), 1)


class Freshness:
    """The suite, and shoppers who do one thing after the other."""

    def __init__(self, suite: Suite) -> None:
        self.suite = suite
        self.random = np.random.default_rng(5)
        self.done: dict[str, int] = {}
        self.unchanged = 0

    def item(self) -> str:
        return serve_shop.item_id(int(self.random.integers(ITEMS)))

    def page(self, shopper: str, token: str = "") -> pb.RecommendResponse:
        request = pb.RecommendRequest(user_id=shopper, page_size=20, consistency_token=token)
        return self.suite.recommend.Recommend(request, timeout=5)

    def introduce(self, shopper: str) -> None:
        """A first event, after which recommend holds the shopper's history."""
        self.suite.record([view(shopper, self.item())])
        self.done[shopper] = 1
        eventually("the first event is seen", lambda: self.page(shopper).freshness.events_used == 1)

    def without_token(self, shopper: str) -> tuple[float, float]:
        """Returns the milliseconds from the call of `RecordEvents`, and from its answer, to a changed page."""
        before = [entry.item_id for entry in self.page(shopper).items]
        event = view(shopper, self.item())
        called = time.perf_counter()
        self.suite.record([event])
        acknowledged = time.perf_counter()
        self.done[shopper] += 1
        while (answer := self.page(shopper)).freshness.events_used < self.done[shopper]:
            if time.perf_counter() - called > LONGEST_SECONDS:
                raise SystemExit(f"an event was not seen within {LONGEST_SECONDS:.0f} s")
            time.sleep(PAUSE_SECONDS)
        seen = time.perf_counter()
        self.unchanged += [entry.item_id for entry in answer.items] == before
        return 1e3 * (seen - called), 1e3 * (seen - acknowledged)

    def with_token(self, shopper: str) -> float:
        """Returns the milliseconds that the answer to the token took."""
        token = self.suite.record([view(shopper, self.item())]).consistency_token
        self.done[shopper] += 1
        asked = time.perf_counter()
        answer = self.page(shopper, token)
        took = 1e3 * (time.perf_counter() - asked)
        if answer.freshness.events_used != self.done[shopper] or answer.degraded:
            raise SystemExit(f"an answer to a token is not made of its event: {answer.degraded}")
        return took


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--events", type=int, default=300, help="events timed, without a token and with one")
    arguments = parser.parse_args()
    home = Path(tempfile.mkdtemp(prefix="shopkeeper-fresh-"))
    ended = threading.Event()
    suite = None
    try:
        url = embedded_postgres.start(home)
        ensure_development_keys(home / "keys")
        serve_shop.publish(home, ITEMS)
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(sql.SQL("CREATE DATABASE shop"))
        url = psycopg.conninfo.make_conninfo(url, dbname="shop")
        ensure_database(url)
        suite = Suite(home, url, home / "keys")
        suite.start("feedback", "profile", "recommend")
        freshness = Freshness(suite)

        def others() -> None:
            number = 0
            while not ended.wait(1 / BACKGROUND_EVENTS_PER_SECOND):
                number += 1
                suite.record([view(f"other-{number % 500}", serve_shop.item_id(number * 7919 % ITEMS))])

        background = threading.Thread(target=others)
        background.start()
        shoppers = [f"fresh-{number}" for number in range(SHOPPERS)]
        for shopper in shoppers:
            freshness.introduce(shopper)
        timed = [freshness.without_token(shoppers[n % SHOPPERS]) for n in range(arguments.events)]
        with_token = [freshness.with_token(shoppers[n % SHOPPERS]) for n in range(arguments.events)]
        ended.set()
        background.join()
        from_call, from_answer = [one for one, _ in timed], [one for _, one in timed]
        numbers = {
            "events": arguments.events,
            "background_events_per_second": BACKGROUND_EVENTS_PER_SECOND,
            "event_to_recommendation_p50_ms": quantile(from_call, 0.5),
            "event_to_recommendation_p99_ms": quantile(from_call, 0.99),
            "acknowledged_to_recommendation_p99_ms": quantile(from_answer, 0.99),
            "pages_in_the_same_order": freshness.unchanged,
            "with_token_p50_ms": quantile(with_token, 0.5),
            "with_token_p99_ms": quantile(with_token, 0.99),
            "load_average": [round(value, 1) for value in os.getloadavg()],
        }
        for name, value in numbers.items():
            print(f"{name:40} {value}")
        print(json.dumps(numbers), flush=True)
    finally:
        ended.set()
        if suite is not None:
            suite.stop()
        embedded_postgres.stop(home)
        shutil.rmtree(home, ignore_errors=True)


if __name__ == "__main__":
    main()
