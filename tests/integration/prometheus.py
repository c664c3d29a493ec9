"""A real Prometheus beside a suite, scraping what deploy/observability/prometheus.yaml has it scrape."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.monitoring import OBSERVABILITY
from tests.integration.suite import Suite, eventually, free_port


@dataclass(frozen=True)
class Series:
    """One line of a panel: labels, times in seconds since 1970, and values of the same length."""

    labels: dict[str, str]
    times: list[float]
    values: list[float]


class Prometheus:
    """A server on a free port; skips where the program is missing.

    Args:
        suite: what is scraped, once a second.
        directory: of its configuration, its data and its log.
    """

    def __init__(self, suite: Suite, directory: Path) -> None:
        program = shutil.which("prometheus")
        if program is None:
            pytest.skip("prometheus is not here (deploy/tools.sh brings it): dashboards are not tested")
        config = yaml.safe_load((OBSERVABILITY / "prometheus.yaml").read_text())
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        config["rule_files"] = [str(OBSERVABILITY / "rules.yaml")]
        for job in config["scrape_configs"]:
            port = suite.metrics_ports[job["job_name"]]
            job["static_configs"] = [{"targets": [f"127.0.0.1:{port}"]}]
        (directory / "prometheus.yaml").write_text(yaml.safe_dump(config))
        self.url = f"http://127.0.0.1:{free_port()}"
        with (directory / "prometheus.log").open("wb") as log:
            self._process = subprocess.Popen(
                [
                    program, f"--config.file={directory / 'prometheus.yaml'}",
                    f"--storage.tsdb.path={directory / 'data'}",
                    f"--web.listen-address={self.url.removeprefix('http://')}",
                ],
                stdout=log, stderr=log,
            )  # fmt: skip
        eventually("every service is scraped", self._scrapes_all, 60)

    def _scrapes_all(self) -> bool:
        try:
            answer = self.ask("query", query="sum(up)")
        except OSError:
            return False
        return bool(answer and float(answer[0]["value"][1]) == 4)

    def ask(self, what: str, **parameters: str) -> list[dict[str, Any]]:
        """Returns the result of a call of Prometheus' HTTP API."""
        url = f"{self.url}/api/v1/{what}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=20) as answer:
            result: list[dict[str, Any]] = json.load(answer)["data"]["result"]
        return result

    def series(self, query: str, start: float, end: float, step: float = 1.0) -> list[Series]:
        """Returns what a panel would draw between two times; points that are no number are left out, as Grafana does."""
        found = []
        for each in self.ask("query_range", query=query, start=str(start), end=str(end), step=str(step)):
            points = [(at, float(value)) for at, value in each["values"] if math.isfinite(float(value))]
            if points:
                found.append(Series(each["metric"], [at for at, _ in points], [value for _, value in points]))
        return found

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(20)
