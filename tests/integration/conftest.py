"""One suite for all of these tests: starting and training it costs most of their time."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg import sql
from shopkeeper.feedback.v1 import event_pb2
from shopkeeper.profile.v1 import catalog_service_pb2, item_pb2
from shopkeeper.recommend.v1 import recommend_service_pb2
from shopkeeper.trainer.v1 import model_pb2, trainer_service_pb2, training_run_pb2

from shared.database import ensure_database
from shared.embedded_postgres import start as start_postgres
from tests.integration.suite import (
    CATEGORIES,
    ITEMS_PER_CATEGORY,
    SERVICES,
    SHOPPERS,
    VIEWS,
    Suite,
    eventually,
    item_id,
    view,
)


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
    items = [
        item_pb2.Item(
            item_id=item_id(category, index),
            title=f"Thing {index} of kind {category}",
            brand=f"brand-{category}",
            category_path=["all", f"kind-{category}"],
            price_micros=(index + 1) * 1_000_000,
            currency_code="EUR",
            stock_quantity=100,
        )
        for category in range(CATEGORIES)
        for index in range(ITEMS_PER_CATEGORY)
    ]
    written = suite.catalog.UpsertItems(catalog_service_pb2.UpsertItemsRequest(items=items), timeout=20)
    assert {result.status for result in written.results} == {catalog_service_pb2.ITEM_WRITE_STATUS_STORED}

    events = [
        view(
            f"shopper-{shopper}",
            item_id(shopper % CATEGORIES, shopper // CATEGORIES + step),
            seconds_ago=60 * (VIEWS - step),
        )
        for shopper in range(SHOPPERS)
        for step in range(VIEWS)
    ]
    for begin in range(0, len(events), 500):
        response = suite.record(events[begin : begin + 500])
        assert {result.status for result in response.results} == {event_pb2.EVENT_STATUS_STORED}
    return suite


@pytest.fixture(scope="session")
def trained(stocked: Suite) -> Suite:
    """The same shop with a model in service."""
    suite = stocked
    run = suite.trainer.CreateTrainingRun(
        trainer_service_pb2.CreateTrainingRunRequest(
            request_id=uuid.uuid4().hex,
            config=training_run_pb2.TrainingConfig(
                size=training_run_pb2.TrainingConfig.SIZE_TINY, max_train_seconds=30
            ),
        ),
        timeout=20,
    )
    last = None
    for update in suite.trainer.WatchTrainingRun(
        trainer_service_pb2.WatchTrainingRunRequest(run_id=run.run_id), timeout=150
    ):
        last = update.training_run
    assert last is not None
    assert last.state == training_run_pb2.TrainingRun.STATE_SUCCEEDED, last
    assert last.gate.verdict == model_pb2.Gate.VERDICT_PASSED, last.gate
    assert last.promoted

    def in_service() -> bool:
        status = suite.recommend.GetModelStatus(recommend_service_pb2.GetModelStatusRequest(), timeout=5)
        return any(model.version == last.version for model in status.models)

    eventually("the new version is in service", in_service)
    return suite
