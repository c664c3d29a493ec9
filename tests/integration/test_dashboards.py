"""Every panel of every dashboard shows something of a shop that is busy, and in which something goes wrong.

A real Prometheus scrapes the four services, over TLS among themselves. `make dashboards` does it for longer and draws the panels.
"""

from __future__ import annotations

import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import grpc
import psycopg
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from psycopg import sql
from shopkeeper.feedback.v1 import event_pb2, feedback_service_pb2, feedback_service_pb2_grpc
from shopkeeper.profile.v1 import profile_service_pb2
from shopkeeper.recommend.v1 import recommend_service_pb2
from shopkeeper.trainer.v1 import schedule_pb2, trainer_service_pb2

from shared.bundle.manifest import MANIFEST
from shared.bundle.registry import PRODUCTION, Registry
from shared.cli.certs import issue_certificates
from shared.database import ensure_database
from shared.embedded_postgres import start as start_postgres
from tests.deploy.monitoring import DASHBOARDS, dashboard
from tests.integration.panels import draw
from tests.integration.prometheus import Prometheus, Series
from tests.integration.shop import stock, train
from tests.integration.suite import SERVICES, Suite, item_id, view

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

# `make dashboards` sets both.
BUSY_SECONDS = float(os.environ.get("SHOPKEEPER_DASHBOARD_SECONDS", "12"))
PICTURES = os.environ.get("SHOPKEEPER_DASHBOARD_PICTURES")


def purchase(user_id: str, item: str) -> event_pb2.Event:
    occurred_at = Timestamp()
    occurred_at.FromNanoseconds(int(time.time() * 1e3) * 1_000_000)
    line = event_pb2.OrderLine(item_id=item, quantity=1, price_micros=1_000_000)
    return event_pb2.Event(
        event_id=uuid.uuid4().hex, user_id=user_id, occurred_at=occurred_at,
        purchase=event_pb2.Purchase(order_id=uuid.uuid4().hex, lines=[line], currency_code="EUR"),
    )  # fmt: skip


def shop_until(suite: Suite, end: float, shopper_from: int) -> None:
    """Shoppers look, are shown recommendations, buy now and then; and some callers make mistakes."""
    step = shopper_from
    storefront = feedback_service_pb2_grpc.FeedbackServiceStub(suite.channel("feedback", "storefront"))
    while time.time() < end:
        step += 1
        person = f"shopper-{step % 240}"
        with suppress(grpc.RpcError):
            token = suite.record([view(person, item_id(step % 5, step))], timeout=5).consistency_token
            request = recommend_service_pb2.RecommendRequest(
                user_id=person, page_size=5, consistency_token=token
            )
            suite.recommend.Recommend(request, timeout=5)
            if step % 4 == 0:
                suite.record([purchase(person, item_id(step % 5, step))], timeout=5)
                suite.profile.GetProfile(profile_service_pb2.GetProfileRequest(user_id=person), timeout=5)
            if step % 16 == 0:
                suite.record([view(person, "")], timeout=5)  # A row that is refused.
        if step % 16 == 1:
            with suppress(grpc.RpcError):
                suite.recommend.Recommend(recommend_service_pb2.RecommendRequest(page_size=-1), timeout=5)
            with suppress(grpc.RpcError):
                storefront.PurgeEvents(feedback_service_pb2.PurgeEventsRequest(), timeout=5)
        time.sleep(0.02)


def flood(suite: Suite) -> None:
    """More calls at once than recommend takes: some are refused."""
    request = recommend_service_pb2.RecommendRequest(user_id="shopper-1", page_size=100)

    def ask(_: int) -> None:
        with suppress(grpc.RpcError):
            suite.recommend.Recommend(request, timeout=2)

    with ThreadPoolExecutor(200) as pool:
        list(pool.map(ask, range(1_000)))


def damage_a_version(suite: Suite) -> None:
    """Points the alias at a version that is not whole, and back: it is refused, and the one before stays."""
    registry = Registry(suite.home / "registry")
    before = registry.alias("main", PRODUCTION)
    assert before is not None
    broken = registry.version_path("main", "broken")
    broken.mkdir()
    (broken / MANIFEST).write_text("{}")
    for version in ("broken", before.version):
        registry.set_alias("main", PRODUCTION, version, reason="FORCED")
        time.sleep(3)


def watch_drift(suite: Suite) -> None:
    """Has drift measured; it is never so great that a run starts."""
    trigger = schedule_pb2.DriftTrigger(max_population_stability_index=1e6, min_new_events=1)
    suite.trainer.CreateSchedule(
        trainer_service_pb2.CreateScheduleRequest(
            schedule_id="on-drift", schedule=schedule_pb2.Schedule(drift=trigger)
        ),
        timeout=10,
    )


@dataclass(frozen=True)
class Watched:
    """A shop, a Prometheus that has watched it, and from when until when."""

    suite: Suite
    prometheus: Prometheus
    start: float
    end: float

    def series(self, query: str) -> list[Series]:
        return self.prometheus.series(query, self.start, self.end)


@pytest.fixture(scope="module")
def watched(
    postgres_homes: Callable[[], Path], keys_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Watched]:
    home = postgres_homes()
    url = start_postgres(home)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE shop"))
    url = psycopg.conninfo.make_conninfo(url, dbname="shop")
    ensure_database(url)
    certificates = home / "certs"
    issue_certificates(certificates)
    suite = Suite(home, url, keys_dir, certificates, {"SHOPKEEPER_DRIFT_CHECK_SECONDS": "2"})
    prometheus = None
    try:
        suite.start()
        prometheus = Prometheus(suite, tmp_path_factory.mktemp("prometheus"))
        start = time.time()
        stock(suite)
        train(suite)
        watch_drift(suite)
        end = time.time() + BUSY_SECONDS
        shoppers = [threading.Thread(target=shop_until, args=(suite, end, 1_000 * n)) for n in range(2)]
        for shopper in shoppers:
            shopper.start()
        flood(suite)
        suite.kill("profile")  # Answers are degraded for a while.
        time.sleep(2)
        suite.start("profile")
        damage_a_version(suite)
        for shopper in shoppers:
            shopper.join()
        time.sleep(2)
        yield Watched(suite, prometheus, start, time.time())
    finally:
        if prometheus is not None:
            prometheus.stop()
        suite.stop()


@pytest.mark.parametrize("name", DASHBOARDS)
def test_every_query_of_a_dashboard_shows_something(watched: Watched, name: str) -> None:
    shown: dict[int, list[tuple[dict[str, str], list[Series]]]] = {}
    empty = []
    for panel in dashboard(name)["panels"]:
        for target in panel["targets"]:
            series = watched.series(target["expr"])
            shown.setdefault(panel["id"], []).append((target, series))
            if not series:
                empty.append(f"{panel['title']}: {target['expr']}")
    if PICTURES:
        draw(dashboard(name), shown, Path(PICTURES) / f"{name}.png")
    assert empty == []


def test_a_query_of_nothing_shows_nothing(watched: Watched) -> None:
    assert watched.series("sum(shopkeeper_misspelt_total)") == []


def test_the_first_refusal_of_a_version_is_an_increase(watched: Watched) -> None:
    (refused,) = watched.series(
        'increase(shopkeeper_recommend_bundle_refused_total{reason="BUNDLE_DAMAGED"}[1h])'
    )
    assert refused.values[-1] > 0


def test_services_ask_each_other_for_nothing_that_the_policy_refuses_them(watched: Watched) -> None:
    refused = set()
    for name in SERVICES:
        for line in watched.suite.log(name).read_text().splitlines():
            with suppress(ValueError):
                entry = json.loads(line)
                if entry.get("code") == "PERMISSION_DENIED":
                    refused.add(entry["method"].rpartition("/")[2])
    # What the shop's back end asks for above, and nothing else.
    assert refused == {"PurgeEvents"}
