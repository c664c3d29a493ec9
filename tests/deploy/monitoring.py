"""Dashboards and alerts, and the metrics that they ask for."""

from __future__ import annotations

import json
import re
from typing import Any

import yaml

from tests.deploy.kustomize import K8S, REPOSITORY

MONITORING = K8S / "components" / "monitoring"
OBSERVABILITY = REPOSITORY / "deploy" / "observability"
RUNBOOKS = REPOSITORY / "docs" / "runbooks"
DASHBOARDS = sorted(path.stem for path in (MONITORING / "dashboards").glob("*.json"))


def dashboard(name: str) -> dict[str, Any]:
    """Returns a dashboard."""
    document: dict[str, Any] = json.loads((MONITORING / "dashboards" / f"{name}.json").read_text())
    return document


def alerts() -> list[dict[str, Any]]:
    """Returns the alerting rules."""
    document = yaml.safe_load((MONITORING / "prometheus-rule.yaml").read_text())
    return [rule for group in document["spec"]["groups"] for rule in group["rules"]]


def queries() -> dict[str, str]:
    """Returns every PromQL expression, by where it stands."""
    found = {f"alert {rule['alert']}": rule["expr"] for rule in alerts()}
    for name in DASHBOARDS:
        for panel in dashboard(name)["panels"]:
            for target in panel["targets"]:
                found[f"{name} / {panel['title']} / {target['refId']}"] = target["expr"]
        for annotation in dashboard(name)["annotations"]["list"]:
            found[f"{name} / {annotation['name']}"] = annotation["expr"]
    return found


def metrics_in(expression: str) -> set[str]:
    """Returns the names of the metrics in a PromQL expression."""
    bare = re.sub(r"\{[^}]*\}", "", expression)
    bare = re.sub(r"\b(by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)", "", bare)
    bare = re.sub(r"\[[^\]]*\]", "", bare)
    words = re.findall(r"(?<![\w:])[a-zA-Z_:][a-zA-Z0-9_:]*\b(?!\s*\()", bare)
    return set(words) - {"and", "or", "unless", "bool", "group_left", "group_right", "by", "offset"}
