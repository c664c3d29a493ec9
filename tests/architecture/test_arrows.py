"""Draws the dependency arrows of the design from the imports, and fails on any other."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SERVICES = ("feedback", "profile", "trainer", "recommend")

PURE_ROLES = {"domain", "use_cases", "ports"}
# What pure code may use beyond the standard library and NumPy: each of these is pure itself.
PURE_SHARED = {
    "shared.errors",
    "shared.event_kinds",
    "shared.experiments",
    "shared.identity",
    "shared.operations",
    "shared.ranking_metrics",
    "shared.tokens",
    "shared.bundle.history",
    "shared.bundle.scoring",
}
# SciPy is the special functions and the minimisers that NumPy lacks: pure as NumPy is.
PURE_PACKAGES = {"numpy", "scipy"}

# role → roles of the same service that it may import
ARROWS = {
    "domain": set(),
    "ports": {"domain"},
    "use_cases": {"domain", "ports"},
    "converters": {"domain"},
    "servicer": {"converters", "use_cases", "domain"},
    "storage": {"domain", "ports"},
    "clients": {"domain", "ports"},
    "settings": set(),
}
# Modules with a role of their own, and what they may import. Whatever stands in no list is wrong.
EXTRA_ROLES: dict[str, dict[str, set[str]]] = {
    # What runs in a training process of its own: the only code that imports TensorFlow.
    "trainer": {
        "pipeline": {"domain"},
        "run": {
            "pipeline",
            "privacy",
            "ranker",
            "domain",
            "ports",
            "storage",
            "clients",
            "supervisor",
            "settings",
        },
        # Differential privacy: the part of a run that knows of it, and its ledger.
        "privacy": {"pipeline", "domain", "ports"},
        # The second stage, trained on what was shown.
        "ranker": {"pipeline", "domain"},
        # Starts and watches those processes.
        "supervisor": {"domain", "ports", "settings", "storage"},
        # Starts runs by the clock and on drift.
        "scheduler": {"clock", "domain", "ports", "storage"},
        # Lets the day files forget while nothing trains.
        "snapshot_upkeep": {"settings"},
        # Removes versions that are old, from the registry alone.
        "retirement": set(),
        "clock": set(),
        "drift": {"domain"},
        # Told to Prometheus, from the ports.
        "metrics": {"ports"},
        "bench_quality": {"pipeline", "domain"},
    },
    "profile": {"metrics": set()},
    # Part of the servicer: RecordEvents for many callers at once.
    "feedback": {
        "recording": {"converters", "use_cases", "domain", "ports"},
        "servicer": {"recording"},
    },
}


def imports_of(path: Path) -> set[str]:
    """Returns the modules that a file imports anywhere, also inside of functions."""
    package = ".".join(path.relative_to(REPOSITORY).with_suffix("").parts[:-1])
    return imports_of_source(path.read_text(), package)


def imports_of_source(source: str, package: str) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *filter(None, [base])])
            # `from shared import errors` imports the module shared.errors.
            names = (f"{base}.{alias.name}" for alias in node.names)
            found.update(name if is_module(name) else base for name in names)
    return found


def is_module(dotted: str) -> bool:
    path = REPOSITORY.joinpath(*dotted.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def python_files(*parts: str) -> list[Path]:
    return sorted(
        p
        for p in REPOSITORY.joinpath(*parts).rglob("*.py")
        if "__pycache__" not in p.parts and "migrations" not in p.parts
    )


def role_of(path: Path, service: str) -> str:
    """Returns the module directly under the service: `domain` for domain.py and for domain/*.py."""
    return path.relative_to(REPOSITORY / "services" / service).with_suffix("").parts[0]


def roles_of(imported: set[str], service: str) -> set[str]:
    prefix = f"services.{service}."
    return {name.removeprefix(prefix).split(".")[0] for name in imported if name.startswith(prefix)}


def test_the_top_level_is_the_one_that_was_designed() -> None:
    assert {"protos", "services", "shared", "tests"} <= {p.name for p in REPOSITORY.iterdir()}
    assert {p.name for p in (REPOSITORY / "services").iterdir() if (p / "__init__.py").exists()} == set(
        SERVICES
    )


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_imports_no_other_service(service: str) -> None:
    for path in python_files("services", service):
        others = {
            name
            for name in imports_of(path)
            if name.startswith("services.") and name.split(".")[1] != service
        }
        assert not others, f"{path.relative_to(REPOSITORY)} imports {others}"


def test_shared_imports_no_service() -> None:
    for path in python_files("shared"):
        services = {name for name in imports_of(path) if name == "services" or name.startswith("services.")}
        assert not services, f"{path.relative_to(REPOSITORY)} imports {services}"


def test_only_the_trainer_imports_tensorflow() -> None:
    for path in [*python_files("services"), *python_files("shared")]:
        heavy = {name for name in imports_of(path) if name.split(".")[0] in {"tensorflow", "keras"}}
        if "trainer" not in path.relative_to(REPOSITORY).parts:
            assert not heavy, f"{path.relative_to(REPOSITORY)} imports {heavy}"


@pytest.mark.parametrize("service", SERVICES)
def test_pure_modules_import_only_pure_ones(service: str) -> None:
    for path in python_files("services", service):
        role = role_of(path, service)
        if role not in PURE_ROLES:
            continue
        for name in imports_of(path):
            top = name.split(".")[0]
            own = name.startswith(f"services.{service}.") or name == f"services.{service}"
            allowed = top in sys.stdlib_module_names or top in PURE_PACKAGES or name in PURE_SHARED or own
            assert allowed, f"{path.relative_to(REPOSITORY)} imports {name}"


@pytest.mark.parametrize("service", SERVICES)
def test_arrows_point_inwards(service: str) -> None:
    extra = EXTRA_ROLES.get(service, {})
    for path in python_files("services", service):
        role = role_of(path, service)
        if role in {"__main__", "__init__"}:
            continue
        assert role in ARROWS or role in extra, f"{path.relative_to(REPOSITORY)} has no place in the design"
        allowed = ARROWS.get(role, set()) | extra.get(role, set()) | {role}
        wrong = roles_of(imports_of(path), service) - allowed
        assert not wrong, f"{path.relative_to(REPOSITORY)} imports {sorted(wrong)}"


@pytest.mark.parametrize("service", SERVICES)
def test_only_the_outer_modules_speak_grpc_or_sql(service: str) -> None:
    outer = {"servicer", "converters", "storage", "clients", "__main__", *EXTRA_ROLES.get(service, {})}
    for path in python_files("services", service):
        if role_of(path, service) in outer:
            continue
        spoken = {
            n for n in imports_of(path) if n.split(".")[0] in {"grpc", "sqlalchemy", "psycopg", "shopkeeper"}
        }
        assert not spoken, f"{path.relative_to(REPOSITORY)} imports {spoken}"


def test_the_drawing_sees_late_relative_and_submodule_imports() -> None:
    source = "from shared import errors\nfrom . import ports\ndef late():\n    import tensorflow.nn"
    assert imports_of_source(source, "services.feedback") == {
        "shared.errors",
        "services.feedback.ports",
        "tensorflow.nn",
    }
