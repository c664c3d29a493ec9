"""One suite for all of these tests: starting and training it costs most of their time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

from shared.database import ensure_database
from shared.embedded_postgres import start as start_postgres
from tests.integration.shop import stock, train
from tests.integration.suite import SERVICES, Suite


@pytest.fixture(scope="session")
def postgres_home(postgres_homes: Callable[[], Path]) -> Path:
    """A PostgreSQL of the suite's own: some tests take it down."""
    return postgres_homes()


@pytest.fixture(scope="session")
def suite(postgres_home: Path, keys_dir: Path) -> Iterator[Suite]:
    url = start_postgres(postgres_home)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE shop"))
    url = psycopg.conninfo.make_conninfo(url, dbname="shop")
    ensure_database(url)
    suite = Suite(postgres_home, url, keys_dir)
    try:
        suite.start()
        yield suite
    finally:
        suite.stop()
        for name in SERVICES:
            print(f"--- {name}\n{suite.log(name).read_text()[-3000:]}")


@pytest.fixture(scope="session")
def stocked(suite: Suite) -> Suite:
    """A shop with a catalogue, and shoppers who walk through a category item by item."""
    stock(suite)
    return suite


@pytest.fixture(scope="session")
def trained(stocked: Suite) -> Suite:
    """The same shop with a model in service."""
    train(stocked)
    return stocked
