"""Dashboards and alerts ask for metrics that a running suite exposes."""

from __future__ import annotations

import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families
from shopkeeper.recommend.v1 import recommend_service_pb2

from tests.deploy.monitoring import metrics_in, queries
from tests.integration.suite import SERVICES, Suite

pytestmark = pytest.mark.slow

# By Prometheus itself.
SCRAPED = {"up"}


def exposed(suite: Suite) -> dict[str, set[str]]:
    """Returns the names of series of each service, as queries name them."""
    names: dict[str, set[str]] = {}
    for service in SERVICES:
        with urllib.request.urlopen(
            f"http://127.0.0.1:{suite.metrics_ports[service]}/metrics", timeout=10
        ) as answer:
            families = list(text_string_to_metric_families(answer.read().decode()))
        names[service] = set()
        for family in families:
            endings = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}.get(
                family.type, [""]
            )
            names[service] |= {family.name + ending for ending in endings}
    return names


def test_every_query_names_metrics_that_exist(trained: Suite) -> None:
    trained.recommend.Recommend(recommend_service_pb2.RecommendRequest(user_id="shopper-1"), timeout=10)
    known = set.union(*exposed(trained).values()) | SCRAPED
    missing = {where: metrics_in(query) - known for where, query in queries().items()}
    assert {where: names for where, names in missing.items() if names} == {}


def test_calls_carry_the_names_that_dashboards_of_others_know(trained: Suite) -> None:
    for service, names in exposed(trained).items():
        assert {"grpc_server_handled_total", "grpc_server_handling_seconds_bucket"} <= names, service


def test_the_trainer_tells_what_became_of_its_runs(trained: Suite) -> None:
    with urllib.request.urlopen(
        f"http://127.0.0.1:{trained.metrics_ports['trainer']}/metrics", timeout=10
    ) as answer:
        samples = {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(answer.read().decode())
            for sample in family.samples
        }
    assert samples["shopkeeper_trainer_runs_ended_total", (("model", "main"), ("state", "succeeded"))] >= 1
    assert samples["shopkeeper_trainer_gate_verdicts_total", (("model", "main"), ("verdict", "passed"))] >= 1
    # Before the first of them: a counter that is born with a one has not increased, and no alert would see it.
    assert samples["shopkeeper_trainer_runs_ended_total", (("model", "main"), ("state", "failed"))] == 0
    assert samples["shopkeeper_trainer_gate_verdicts_total", (("model", "main"), ("verdict", "failed"))] == 0
    assert samples["shopkeeper_trainer_privacy_epsilon_limit", ()] > 0


def test_no_metric_names_a_person(trained: Suite) -> None:
    trained.recommend.Recommend(recommend_service_pb2.RecommendRequest(user_id="shopper-1"), timeout=10)
    for service in SERVICES:
        with urllib.request.urlopen(
            f"http://127.0.0.1:{trained.metrics_ports[service]}/metrics", timeout=10
        ) as answer:
            assert "shopper-1" not in answer.read().decode()
