"""`shopkeeper doctor`: what is wrong, and how to mend it. Changes nothing."""

from __future__ import annotations

import os
import platform
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import psycopg

from shared.cli.clients import health_of
from shared.cli.installation import SERVICES, Installation, port_is_free
from shared.cli.output import EXIT_OK, EXIT_PROBLEMS, say, show_json, show_table
from shared.database import MINIMUM_SERVER_VERSION, OWNERS
from shared.errors import ShopkeeperError
from shared.keys import read_secret, read_signing_key, read_user_keys, read_verifying_key
from shared.settings import ServiceSettings, load_settings

MIN_FREE_BYTES = 2 << 30
MAX_CLOCK_SKEW_SECONDS = 2.0
FIRST_BELIEVABLE_YEAR = 2025
OK, WARNING, WRONG = "ok", "warning", "wrong"


@dataclass(frozen=True, slots=True)
class Finding:
    """One check: its verdict, what was found, and the remedy where it is not ok."""

    check: str
    verdict: str
    finding: str
    remedy: str = ""


def examine(installation: Installation) -> list[Finding]:
    """Returns every finding. A check that fails itself is a finding, not an end."""
    running = installation.running()
    checks: tuple[tuple[str, Callable[[], Iterator[Finding]]], ...] = (
        ("python", _python),
        ("packages", _packages),
        ("home", lambda: _home(installation)),
        ("disk", lambda: _disk(installation)),
        ("keys", lambda: _keys(installation)),
        ("services", lambda: _services(installation, running is not None)),
        ("database", lambda: _database(installation)),
        ("registry", lambda: _registry(installation)),
        ("clock", _clock),
    )
    findings: list[Finding] = []
    for name, check in checks:
        try:
            findings += check()
        except Exception as error:
            findings.append(
                Finding(name, WRONG, f"the check failed: {type(error).__name__}: {error}", "Report this.")
            )
    return findings


def show_findings(findings: list[Finding], *, as_json: bool) -> int:
    """Prints findings; returns 1 when anything is wrong."""
    if as_json:
        show_json(
            [
                {"check": f.check, "verdict": f.verdict, "finding": f.finding, "remedy": f.remedy}
                for f in findings
            ]
        )
    else:
        show_table("shopkeeper doctor", ("check", "verdict", "finding", "remedy"),
                   [(f.check, f.verdict, f.finding, f.remedy) for f in findings])  # fmt: skip
        wrong = sum(f.verdict == WRONG for f in findings)
        say(
            "All is well."
            if not wrong
            else f"{wrong} thing{'s are' if wrong > 1 else ' is'} wrong; see the remedies."
        )
    return EXIT_PROBLEMS if any(f.verdict == WRONG for f in findings) else EXIT_OK


def _python() -> Iterator[Finding]:
    version = platform.python_version()
    if sys.version_info[:2] == (3, 11):
        yield Finding("python", OK, version)
    else:
        yield Finding(
            "python", WARNING, version, "The pinned requirements are for Python 3.11: make PYTHON=python3.11"
        )


def _packages() -> Iterator[Finding]:
    from importlib.metadata import PackageNotFoundError, version

    missing = []
    for package in ("grpcio", "protobuf", "psycopg", "pyarrow", "ai-edge-litert", "tensorflow"):
        try:
            version(package)
        except PackageNotFoundError:
            missing.append(package)
    if missing:
        yield Finding("packages", WRONG, f"missing: {', '.join(missing)}", "make install")
    else:
        yield Finding("packages", OK, "gRPC, PostgreSQL client, LiteRT and TensorFlow are installed")


def _home(installation: Installation) -> Iterator[Finding]:
    home = installation.home
    if not home.exists():
        yield Finding("home", WARNING, f"{home} does not exist yet", "`shopkeeper up` creates it")
    elif not os.access(home, os.W_OK | os.X_OK):
        yield Finding(
            "home", WRONG, f"{home} cannot be written", f"chown it to {_user()}, or set SHOPKEEPER_HOME"
        )
    else:
        yield Finding("home", OK, str(home))


def _disk(installation: Installation) -> Iterator[Finding]:
    place = installation.home
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    text = f"{free / (1 << 30):.1f} GiB free at {place}"
    if free < MIN_FREE_BYTES:
        yield Finding("disk", WRONG, text, "Free 2 GiB, or move SHOPKEEPER_HOME")
    else:
        yield Finding("disk", OK, text)


def _keys(installation: Installation) -> Iterator[Finding]:
    keys = installation.keys
    if not keys.exists():
        yield Finding(
            "keys", WARNING, f"{keys} does not exist yet",
            "`shopkeeper up` creates development keys; in production mount a secret and set SHOPKEEPER_KEYS",
        )  # fmt: skip
        return
    readers: dict[str, Callable[[], object]] = {
        "user_key": lambda: read_user_keys(keys),
        **{name: partial(read_secret, keys, name) for name in ("tombstone_key", "master_key", "token_key")},
        "signing_key": lambda: read_signing_key(keys),
        "signing_key.pub": lambda: read_verifying_key(keys),
    }
    wrong = 0
    for name, reader in readers.items():
        try:
            reader()
        except ShopkeeperError as error:
            wrong += 1
            yield Finding(
                f"key {name}", WRONG, error.message.split(" `shopkeeper doctor`")[0],
                "Restore it from your backup. Only where nothing is stored yet: delete the directory, and "
                "`shopkeeper up` makes new ones (new keys make stored pseudonyms and texts unreadable)",
            )  # fmt: skip
    for path in sorted(keys.iterdir()):
        if (
            path.is_file()
            and not path.name.endswith(".pub.pem")
            and path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO)
        ):
            wrong += 1
            yield Finding(
                f"key {path.name}", WRONG, f"others may read it (mode {stat.S_IMODE(path.stat().st_mode):o})",
                f"chmod 600 {path}",
            )  # fmt: skip
    if not wrong:
        yield Finding("keys", OK, f"all present in {keys}, private")


def _services(installation: Installation, running: bool) -> Iterator[Finding]:
    for name in SERVICES:
        address = installation.addresses()[name]
        health = health_of(address)
        if health == "SERVING":
            yield Finding(name, OK, f"serving at {address}")
        elif health == "UNAVAILABLE" and port_is_free(address):
            remedy = (
                f"See {installation.logs / (name + '.log')}"
                if running
                else "`shopkeeper up` starts the suite"
            )
            yield Finding(name, WRONG, f"nothing listens at {address}", remedy)
        elif health in ("UNAVAILABLE", "UNIMPLEMENTED"):
            yield Finding(
                name, WRONG, f"another program listens at {address}",
                "End it, or move Shopkeeper: `shopkeeper up --first-port 7401`",
            )  # fmt: skip
        else:
            yield Finding(
                name,
                WRONG,
                f"answers {health} at {address}",
                f"See {installation.logs / (name + '.log')} for the reason",
            )


def _database(installation: Installation) -> Iterator[Finding]:
    url = load_settings(ServiceSettings).database_url
    if url is None:
        if not (installation.home / "postgres" / "PG_VERSION").exists():
            yield Finding(
                "database", WARNING, "the embedded PostgreSQL was never started", "`shopkeeper up` starts it"
            )
            return
        found = _embedded_url(installation)
        if found is None:
            yield Finding(
                "database", WRONG, "the embedded PostgreSQL is not running", "`shopkeeper up` starts it"
            )
            return
        url = found
    try:
        with psycopg.connect(url, connect_timeout=5) as connection:
            yield from _inspect_database(connection)
    except psycopg.OperationalError as error:
        yield Finding(
            "database", WRONG, f"cannot be reached: {str(error).splitlines()[0]}",
            "Check DATABASE_URL (postgresql://user:password@host:port/database) and that the server runs",
        )  # fmt: skip


def _embedded_url(installation: Installation) -> str | None:
    # The server tells where it listens; asking the package would start it.
    data = installation.home / "postgres"
    try:
        lines = (data / "postmaster.pid").read_text().splitlines()
        socket_directory, port = lines[4].strip(), lines[3].strip()
    except (OSError, IndexError):
        return None
    host = socket_directory or lines[5].strip()
    return f"postgresql://postgres@/postgres?host={host}&port={port}"


def _inspect_database(connection: psycopg.Connection[tuple[object, ...]]) -> Iterator[Finding]:
    version = connection.info.server_version
    if version < MINIMUM_SERVER_VERSION:
        yield Finding("database", WRONG, f"version {version // 10_000}", "PostgreSQL 16 or later is needed")
    else:
        yield Finding("database", OK, f"PostgreSQL {version // 10_000} answers")
    row = connection.execute("SHOW synchronous_commit").fetchone()
    commit = str(row[0]) if row else "?"
    if commit in ("off", "local"):
        yield Finding("database commits", WRONG, f"synchronous_commit is {commit}: acknowledged events can be lost",
                      "ALTER SYSTEM SET synchronous_commit = on; SELECT pg_reload_conf();")  # fmt: skip
    else:
        yield Finding("database commits", OK, f"synchronous_commit is {commit}")
    row = connection.execute("SHOW fsync").fetchone()
    if row and row[0] == "off":
        yield Finding(
            "database fsync", WRONG, "fsync is off", "ALTER SYSTEM SET fsync = on; SELECT pg_reload_conf();"
        )
    for schema in OWNERS:
        query = "SELECT table_name FROM information_schema.tables WHERE table_schema = %s AND table_name LIKE 'alembic%%'"
        found = connection.execute(query, (schema,)).fetchone()
        if found is None:
            yield Finding(f"schema {schema}", WRONG, "not migrated", f"python -m services.{schema} migrate")
            continue
        version_row = connection.execute(f'SELECT version_num FROM "{schema}"."{found[0]}"').fetchone()  # noqa: S608
        head = _newest_migration(schema)
        current = str(version_row[0]) if version_row else "none"
        if head is not None and current != head:
            yield Finding(f"schema {schema}", WRONG, f"is at {current}, the code expects {head}",
                          f"python -m services.{schema} migrate")  # fmt: skip
        else:
            yield Finding(f"schema {schema}", OK, f"migrated to {current}")


def _newest_migration(schema: str) -> str | None:
    # Read from the files: the command line does not import services.
    from importlib.util import find_spec

    spec = find_spec("services")
    if spec is None or not spec.submodule_search_locations:
        return None
    versions = Path(next(iter(spec.submodule_search_locations))) / schema / "migrations" / "versions"
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    if not versions.is_dir():
        return None
    config = Config()
    config.set_main_option("script_location", str(versions.parent))
    return ScriptDirectory.from_config(config).get_current_head()


def _registry(installation: Installation) -> Iterator[Finding]:
    registry = installation.registry
    if not registry.exists():
        yield Finding(
            "registry", WARNING, f"{registry} does not exist yet", "`shopkeeper train --watch` makes a model"
        )
        return
    if not os.access(registry, os.W_OK | os.X_OK):
        yield Finding("registry", WRONG, f"{registry} cannot be written", f"chown it to {_user()}")
    from shared.bundle import Registry, load_bundle

    store = Registry(registry)
    try:
        public_key = read_verifying_key(installation.keys)
    except ShopkeeperError:
        return
    for model in store.list_models():
        alias = store.alias(model, "production")
        if alias is None:
            yield Finding(
                f"model {model}", WARNING, "no version is in production", "`shopkeeper promote VERSION`"
            )
            continue
        try:
            load_bundle(registry / model / alias.version, public_key)
        except ShopkeeperError as error:
            yield Finding(f"model {model}", WRONG, f"{alias.version}: {error.message}",
                          "`shopkeeper rollback`, or `shopkeeper train --watch`")  # fmt: skip
        else:
            yield Finding(f"model {model}", OK, f"{alias.version} verifies: digests, shapes and signature")


def _clock() -> Iterator[Finding]:
    now = datetime.now(UTC)
    if now.year < FIRST_BELIEVABLE_YEAR:
        yield Finding(
            "clock",
            WRONG,
            f"it is {now:%Y-%m-%d}, says the clock",
            "Set the clock (timedatectl set-ntp true)",
        )
        return
    before = time.time() - time.monotonic()
    time.sleep(0.05)
    step = abs((time.time() - time.monotonic()) - before)
    if step > MAX_CLOCK_SKEW_SECONDS:
        yield Finding(
            "clock", WARNING, f"it jumped by {step:.1f} s", "Let NTP slew it: timedatectl set-ntp true"
        )
    else:
        yield Finding("clock", OK, f"{now:%Y-%m-%d %H:%M:%S} UTC")


def _user() -> str:
    try:
        import getpass

        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())
