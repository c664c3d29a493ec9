"""Each image carries what its service imports, and nothing that weighs without being used."""

from __future__ import annotations

import re
import sys
from importlib import metadata
from pathlib import Path

import pytest

from tests.architecture.test_arrows import REPOSITORY, SERVICES, imports_of, is_module

# On a developer's machine alone; an image is told a DATABASE_URL.
ELSEWHERE = REPOSITORY / "shared" / "embedded_postgres.py"
# profile publishes and reads bundles of arrays, and never runs an encoder: the import is inside of the function.
UNUSED = {("profile", "ai_edge_litert")}
# What an image has where it is built with it.
EXTRAS = {"profile": "encoders"}
LIGHT = {"feedback", "profile", "recommend"}


def modules_of(service: str) -> set[Path]:
    """Returns the service's files and those of `shared` that they reach, whenever they import them."""
    waiting = list((REPOSITORY / "services" / service).rglob("*.py"))
    reached: set[Path] = set()
    while waiting:
        path = waiting.pop()
        if path in reached or path == ELSEWHERE or "__pycache__" in path.parts:
            continue
        reached.add(path)
        for name in imports_of(path):
            if name.split(".")[0] == "shared" and is_module(name):
                base = REPOSITORY.joinpath(*name.split("."))
                waiting.append(base / "__init__.py" if base.is_dir() else base.with_suffix(".py"))
    return reached


def packages_of(service: str) -> set[str]:
    text = (REPOSITORY / "requirements" / f"{service}.txt").read_text()
    return {
        name.lower().replace("_", "-")
        for name in re.findall(r"^([A-Za-z0-9._-]+)(?:\[[^\]]*\])?==", text, re.M)
    }


@pytest.mark.parametrize("service", SERVICES)
def test_an_image_carries_every_package_that_its_service_imports(service: str) -> None:
    distributions = metadata.packages_distributions()
    installed = packages_of(service) | packages_of(EXTRAS.get(service, service))
    missing: dict[str, set[str]] = {}
    for path in modules_of(service):
        for name in imports_of(path):
            top = name.split(".")[0]
            if top in sys.stdlib_module_names or top in {"services", "shared", "shopkeeper"}:
                continue
            if (service, top) in UNUSED:
                continue
            candidates = {d.lower().replace("_", "-") for d in distributions.get(top, [top])}
            if not candidates & installed:
                missing.setdefault(top, set()).add(str(path.relative_to(REPOSITORY)))
    assert missing == {}


@pytest.mark.parametrize("service", sorted(LIGHT))
def test_no_serving_image_carries_tensorflow(service: str) -> None:
    assert not packages_of(service) & {"tensorflow", "keras", "matplotlib", "torch"}


def test_recommend_carries_no_database_driver() -> None:
    assert not packages_of("recommend") & {"psycopg", "psycopg-binary", "sqlalchemy", "alembic"}


@pytest.mark.parametrize("path", sorted(REPOSITORY.glob("requirements/*.txt")), ids=lambda path: path.name)
def test_every_package_is_pinned_by_version_and_digest(path: Path) -> None:
    for requirement in re.split(r"^(?=\S)", path.read_text(), flags=re.M):
        if requirement.strip():
            assert re.match(r"\S+==\S+ \\\n(\s+--hash=sha256:[0-9a-f]{64}( \\)?\n?)+$", requirement), (
                requirement
            )


def test_the_walk_follows_imports_into_shared() -> None:
    reached = {str(path.relative_to(REPOSITORY)) for path in modules_of("recommend")}
    assert "shared/server.py" in reached
    assert "shared/bundle/reader.py" in reached
