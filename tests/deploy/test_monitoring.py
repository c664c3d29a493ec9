"""Alerts fire when they should, every one has a runbook, and dashboards are what Grafana takes."""

from __future__ import annotations

import shutil
import subprocess
from itertools import combinations

import pytest
import yaml

from tests.deploy.kustomize import REPOSITORY, objects
from tests.deploy.monitoring import (
    DASHBOARDS,
    MONITORING,
    OBSERVABILITY,
    RUNBOOKS,
    alerts,
    dashboard,
    metrics_in,
)


def promtool(*arguments: str) -> None:
    program = shutil.which("promtool")
    if program is None:
        pytest.skip(
            "promtool is not installed (Debian: apt-get install prometheus): alerts are not tested here"
        )
    outcome = subprocess.run(
        [program, *arguments], capture_output=True, text=True, timeout=120, cwd=OBSERVABILITY
    )
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr


def test_alerts_fire_when_they_should_and_only_then() -> None:
    promtool("test", "rules", "rules_test.yaml")


def test_prometheus_takes_its_configuration() -> None:
    promtool("check", "config", "prometheus.yaml")


def test_every_alert_is_tested_both_ways() -> None:
    cases = [
        case for test in yaml.safe_load((OBSERVABILITY / "rules_test.yaml").read_text())["tests"] for case in test["alert_rule_test"]
    ]  # fmt: skip
    for fires in (True, False):
        tested = {case["alertname"] for case in cases if bool(case["exp_alerts"]) is fires}
        assert tested == {rule["alert"] for rule in alerts()}


def test_the_rules_are_the_same_with_an_operator_and_without() -> None:
    with_operator = yaml.safe_load((MONITORING / "prometheus-rule.yaml").read_text())["spec"]["groups"]
    assert yaml.safe_load((OBSERVABILITY / "rules.yaml").read_text())["groups"] == with_operator


def test_every_alert_has_a_runbook_and_every_runbook_of_an_alert_has_one() -> None:
    named = {rule["annotations"]["runbook"] for rule in alerts()}
    written = {str(path.relative_to(REPOSITORY)) for path in RUNBOOKS.glob("shopkeeper-*.md")}
    assert named == written
    for rule in alerts():
        text = (REPOSITORY / rule["annotations"]["runbook"]).read_text()
        assert text.startswith(f"# {rule['alert']}\n")
        for section in ("## What it means", "## How to see it", "## How to mend it"):
            assert section in text, (rule["alert"], section)


@pytest.mark.parametrize("name", DASHBOARDS)
def test_a_dashboard_is_what_grafana_takes(name: str) -> None:
    board = dashboard(name)
    assert board["uid"] == f"shopkeeper-{name}"
    assert board["schemaVersion"] >= 36
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len(set(ids))
    for panel in board["panels"]:
        assert panel["type"] in {"timeseries", "stat"}
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert panel["targets"]
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
    for one, other in combinations((panel["gridPos"] for panel in board["panels"]), 2):
        apart = (
            one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
            or one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        )  # fmt: skip
        assert apart, (one, other)


def test_every_dashboard_is_delivered() -> None:
    (config,) = [
        each for each in objects("components/monitoring")
        if each["kind"] == "ConfigMap" and each["metadata"]["name"] == "shopkeeper-dashboards"
    ]  # fmt: skip
    assert config["data"].keys() == {f"{name}.json" for name in DASHBOARDS}
    assert {"service-health", "the-loop", "model-quality", "business"} == set(DASHBOARDS)


@pytest.mark.parametrize(
    ("expression", "names"),
    [
        ('sum by (le, stage) (rate(a_bucket{grpc_method="x"}[5m])) > 1', {"a_bucket"}),
        ("time() - max by (model) (b) > 7 * 86400", {"b"}),
        ("count(up == 1) > 0 unless count(c) > 0", {"up", "c"}),
        ("increase(a[15m]) > 0 or (a unless a offset 15m) > 0", {"a"}),
        ("a / ignoring (cause) group_left sum(d)", {"a", "d"}),
    ],
)
def test_metrics_are_found_in_expressions(expression: str, names: set[str]) -> None:
    assert metrics_in(expression) == names
