"""The suite, as a team that knows nothing but its stubs and its certificate finds it."""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from shopkeeper.feedback.v1 import event_pb2, feedback_service_pb2, feedback_service_pb2_grpc
from shopkeeper.profile.v1 import (
    catalog_service_pb2,
    catalog_service_pb2_grpc,
    item_pb2,
    profile_service_pb2,
    profile_service_pb2_grpc,
)
from shopkeeper.recommend.v1 import recommend_service_pb2, recommend_service_pb2_grpc
from shopkeeper.trainer.v1 import trainer_service_pb2, trainer_service_pb2_grpc, training_run_pb2

CERTIFICATES = Path(os.environ["CERTIFICATES"])
RUN = uuid.uuid4().hex[:8]
ITEMS, SHOPPERS, VIEWS = 40, 160, 12
RETRY = {
    "methodConfig": [
        {
            "name": [{}],
            "retryPolicy": {
                "maxAttempts": 5, "initialBackoff": "0.1s", "maxBackoff": "2s", "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ]
}  # fmt: skip


@pytest.fixture(scope="session")
def channel() -> Iterator[Callable[..., grpc.Channel]]:
    """Returns a function that opens a channel to a service, as somebody."""
    opened: dict[tuple[str, str], grpc.Channel] = {}

    def of(address: str, identity: str = "storefront") -> grpc.Channel:
        if (address, identity) not in opened:
            directory = CERTIFICATES / identity
            credentials = grpc.ssl_channel_credentials(
                *((directory / name).read_bytes() for name in ("ca.crt", "tls.key", "tls.crt"))
            )
            opened[address, identity] = grpc.secure_channel(
                address, credentials, options=[("grpc.service_config", json.dumps(RETRY))]
            )
        return opened[address, identity]

    yield of
    for each in opened.values():
        each.close()


def item_id(index: int) -> str:
    return f"{RUN}-item-{index % ITEMS}"


def view(user_id: str, item: str, seconds_ago: float = 0.0) -> event_pb2.Event:
    occurred_at = Timestamp()
    occurred_at.FromNanoseconds(int((time.time() - seconds_ago) * 1e3) * 1_000_000)
    return event_pb2.Event(
        event_id=uuid.uuid4().hex,
        user_id=user_id,
        occurred_at=occurred_at,
        item_view=event_pb2.ItemView(item_id=item),
    )


@pytest.fixture(scope="session")
def stocked(channel: Callable[..., grpc.Channel]) -> None:
    """A catalogue, and shoppers who walk through it item by item."""
    catalogue = catalog_service_pb2_grpc.CatalogServiceStub(channel("profile:7002", "catalogue"))
    items = [
        item_pb2.Item(
            item_id=item_id(index), title=f"Thing {index}", category_path=["all", f"kind-{index % 4}"],
            price_micros=(index + 1) * 1_000_000, currency_code="EUR", stock_quantity=100,
        )
        for index in range(ITEMS)
    ]  # fmt: skip
    written = catalogue.UpsertItems(catalog_service_pb2.UpsertItemsRequest(items=items), timeout=30)
    assert {result.status for result in written.results} == {catalog_service_pb2.ITEM_WRITE_STATUS_STORED}
    feedback = feedback_service_pb2_grpc.FeedbackServiceStub(channel("feedback:7001"))
    for shopper in range(SHOPPERS):
        events = [
            view(f"{RUN}-shopper-{shopper}", item_id(shopper + step), 60.0 * (VIEWS - step))
            for step in range(VIEWS)
        ]
        answer = feedback.RecordEvents(feedback_service_pb2.RecordEventsRequest(events=events), timeout=30)
        assert {result.status for result in answer.results} == {event_pb2.EVENT_STATUS_STORED}


def test_what_was_just_recorded_is_recommended_from(
    stocked: None, channel: Callable[..., grpc.Channel]
) -> None:
    feedback = feedback_service_pb2_grpc.FeedbackServiceStub(channel("feedback:7001"))
    recommend = recommend_service_pb2_grpc.RecommendServiceStub(channel("recommend:7004"))
    person = f"{RUN}-newcomer"
    recorded = feedback.RecordEvents(
        feedback_service_pb2.RecordEventsRequest(events=[view(person, item_id(3))]), timeout=30
    )
    answer = recommend.Recommend(
        recommend_service_pb2.RecommendRequest(
            user_id=person, page_size=5, consistency_token=recorded.consistency_token
        ),
        timeout=30,
    )
    assert answer.items
    profile = profile_service_pb2_grpc.ProfileServiceStub(channel("profile:7002"))
    assert profile.GetProfile(profile_service_pb2.GetProfileRequest(user_id=person), timeout=30)


def test_a_model_is_trained_and_goes_into_service(
    stocked: None, channel: Callable[..., grpc.Channel]
) -> None:
    trainer = trainer_service_pb2_grpc.TrainerServiceStub(channel("trainer:7003", "operator"))
    run = trainer.CreateTrainingRun(
        trainer_service_pb2.CreateTrainingRunRequest(
            request_id=uuid.uuid4().hex,
            config=training_run_pb2.TrainingConfig(
                size=training_run_pb2.TrainingConfig.SIZE_TINY, max_train_seconds=30
            ),
        ),
        timeout=30,
    )
    last: Any = None
    for update in trainer.WatchTrainingRun(
        trainer_service_pb2.WatchTrainingRunRequest(run_id=run.run_id), timeout=400
    ):
        last = update.training_run
    assert last.state == training_run_pb2.TrainingRun.STATE_SUCCEEDED, last
    if not last.promoted:
        pytest.skip(f"the gate kept the version back: {last.gate}")
    recommend = recommend_service_pb2_grpc.RecommendServiceStub(channel("recommend:7004", "operator"))
    deadline = time.monotonic() + 30
    while True:
        status = recommend.GetModelStatus(recommend_service_pb2.GetModelStatusRequest(), timeout=10)
        if any(model.version == last.version for model in status.models):
            return
        assert time.monotonic() < deadline, status
        time.sleep(0.2)


@pytest.mark.parametrize("identity", ["storefront", "recommend", "analyst"])
def test_nobody_does_what_the_policy_does_not_say(
    channel: Callable[..., grpc.Channel], identity: str
) -> None:
    feedback = feedback_service_pb2_grpc.FeedbackServiceStub(channel("feedback:7001", identity))
    with pytest.raises(grpc.RpcError) as caught:
        feedback.PurgeEvents(feedback_service_pb2.PurgeEventsRequest(), timeout=10)
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED


def test_a_caller_without_a_certificate_is_not_let_in() -> None:
    authority = (CERTIFICATES / "storefront" / "ca.crt").read_bytes()
    for channel in (
        grpc.insecure_channel("feedback:7001"),
        grpc.secure_channel("feedback:7001", grpc.ssl_channel_credentials(authority)),
    ):
        with channel, pytest.raises(grpc.RpcError) as caught:
            feedback_service_pb2_grpc.FeedbackServiceStub(channel).GetMetrics(
                feedback_service_pb2.GetMetricsRequest(), timeout=5
            )
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
