"""What makes a shop of a suite: a catalogue, shoppers, and a model in service."""

from __future__ import annotations

import uuid

from shopkeeper.feedback.v1 import event_pb2
from shopkeeper.profile.v1 import catalog_service_pb2, item_pb2
from shopkeeper.recommend.v1 import recommend_service_pb2
from shopkeeper.trainer.v1 import model_pb2, trainer_service_pb2, training_run_pb2

from tests.integration.suite import (
    CATEGORIES,
    ITEMS_PER_CATEGORY,
    SHOPPERS,
    VIEWS,
    Suite,
    eventually,
    item_id,
    view,
)


def stock(suite: Suite) -> None:
    """Fills a catalogue, and lets shoppers walk through a category item by item."""
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


def train(suite: Suite) -> None:
    """Trains a model, and waits until it is in service."""
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
