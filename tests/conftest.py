"""Fixtures that every test may use: a real PostgreSQL, keys, servers on a socket."""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import psycopg
import pytest
from psycopg import sql

from shared import embedded_postgres
from shared.channel import open_channel
from shared.database import ensure_database, migrate
from shared.keys import ensure_development_keys
from shared.server import GrpcServer
from shared.settings import ServiceSettings
from shared.telemetry import Telemetry

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The directory of real data sets; a test that needs it skips where it is absent."""
    path = Path(os.environ.get("SHOPKEEPER_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"real data are not here; set SHOPKEEPER_TEST_DATA (looked in {path})")
    return path


@pytest.fixture(scope="session")
def postgres_homes() -> Iterator[Callable[[], Path]]:
    """Returns a function that makes a home for an embedded PostgreSQL, stopped and removed at the end.

    Not below pytest's own temporary directory: as root the server runs as another user, and every
    pytest that starts closes that directory to others.
    """
    homes: list[Path] = []

    def make() -> Path:
        homes.append(Path(tempfile.mkdtemp(prefix="shopkeeper-test-")))
        return homes[-1]

    yield make
    for home in homes:
        embedded_postgres.stop(home)
        shutil.rmtree(home, ignore_errors=True)


@pytest.fixture(scope="session")
def postgres_server(postgres_homes: Callable[[], Path]) -> str:
    """URL of a PostgreSQL for this test process: SHOPKEEPER_TEST_DATABASE_URL, or an embedded one."""
    url = os.environ.get("SHOPKEEPER_TEST_DATABASE_URL") or embedded_postgres.start(postgres_homes())
    ensure_database(url)
    return url


@pytest.fixture
def database_url(postgres_server: str) -> Iterator[str]:
    """URL of a fresh database with the roles and schemas of the suite."""
    name = f"test_{uuid.uuid4().hex}"
    with psycopg.connect(postgres_server, autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    url = psycopg.conninfo.make_conninfo(postgres_server, dbname=name)
    ensure_database(url)
    yield url
    with psycopg.connect(postgres_server, autocommit=True) as connection:
        connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


@pytest.fixture
def migrate_services(database_url: str) -> Callable[..., str]:
    """Returns a function that migrates the named services and returns the database's URL."""

    def apply(*services: str) -> str:
        for service in services:
            migrate(database_url, service)
        return database_url

    return apply


@pytest.fixture(scope="session")
def keys_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of freshly made keys."""
    keys = tmp_path_factory.mktemp("keys")
    ensure_development_keys(keys)
    return keys


@pytest.fixture
def serve() -> Iterator[Callable[..., grpc.Channel]]:
    """Returns a function that serves servicers on a socket and returns a channel to it."""
    servers: list[GrpcServer] = []
    channels: list[grpc.Channel] = []

    def start(
        *register: Callable[[grpc.Server], None],
        service_names: tuple[str, ...] = (),
        settings: ServiceSettings | None = None,
    ) -> grpc.Channel:
        settings = settings or ServiceSettings(listen="127.0.0.1:0", log_level="error")
        server = GrpcServer(
            "test", settings, Telemetry("test", settings), register=register, service_names=service_names
        )
        server.start()
        server.set_ready(True)
        servers.append(server)
        channel = open_channel(f"127.0.0.1:{server.port}")
        channels.append(channel)
        return channel

    yield start
    for channel in channels:
        channel.close()
    for server in servers:
        server.stop(0)
