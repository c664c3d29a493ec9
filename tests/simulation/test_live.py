"""Live visits close the loop: what was shown comes back with the token of the page that showed it."""

from __future__ import annotations

import threading
from concurrent import futures

import grpc
import pytest
from shopkeeper.feedback.v1 import event_pb2, feedback_service_pb2, feedback_service_pb2_grpc
from shopkeeper.recommend.v1 import recommend_service_pb2, recommend_service_pb2_grpc

from shared.importing.upload import Uploader
from shared.simulation.history import Scale, make_history
from shared.simulation.live import ARMS, LiveShop, arm_of

SCALE = Scale(seed=3, shoppers=120, items=60, days=10, visits_per_shopper=2)


class Suite(
    feedback_service_pb2_grpc.FeedbackServiceServicer, recommend_service_pb2_grpc.RecommendServiceServicer
):
    """Remembers what it is asked and told; recommends the first items of the catalogue, turned by the request."""

    def __init__(self, item_ids: tuple[str, ...]) -> None:
        self.item_ids = item_ids
        self.events: list[event_pb2.Event] = []
        self.asked: dict[str, list[recommend_service_pb2.RecommendRequest]] = {}
        self.pages: dict[str, list[str]] = {}
        self.broken = False
        self._lock = threading.Lock()

    def Recommend(self, request, context):  # type: ignore[no-untyped-def]
        if self.broken:
            context.abort(grpc.StatusCode.INTERNAL, "out of order")
        with self._lock:
            asked = self.asked.setdefault(request.user_id, [])
            asked.append(request)
            start = 7 * len(asked) % len(self.item_ids)
            items = (self.item_ids + self.item_ids)[start : start + request.page_size]
            token = f"{request.user_id}/{len(asked)}/{request.serving_config}"
            self.pages[token] = list(items)
        answer = recommend_service_pb2.RecommendResponse(attribution_token=token)
        for item in items:
            answer.items.add(item_id=item)
        return answer

    def RecordEvents(self, request, context):  # type: ignore[no-untyped-def]
        self.events += request.events
        answer = feedback_service_pb2.RecordEventsResponse(consistency_token=f"token-{len(self.events)}")
        for _ in request.events:
            answer.results.add(status=event_pb2.EVENT_STATUS_STORED)
        return answer


def played(visits: int = 100, broken: bool = False) -> tuple[Suite, LiveShop]:
    world, _ = make_history(SCALE)
    suite = Suite(world.shop.item_ids)
    suite.broken = broken
    server = grpc.server(futures.ThreadPoolExecutor(4))
    feedback_service_pb2_grpc.add_FeedbackServiceServicer_to_server(suite, server)
    recommend_service_pb2_grpc.add_RecommendServiceServicer_to_server(suite, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        shop = LiveShop(world, channel, Uploader(channel, channel), clock=lambda: 1_800_000_000.0)
        assert list(shop.play(visits))[-1] == visits
    server.stop(None).wait()
    return suite, shop


@pytest.fixture(scope="module")
def evening() -> tuple[Suite, LiveShop]:
    return played()


def test_every_page_comes_back_as_impressions_in_its_order(evening: tuple[Suite, LiveShop]) -> None:
    suite, _ = evening
    views = [e for e in suite.events if e.HasField("page_view")]
    assert views
    for view in views:
        shown = [(i.item_id, i.position) for i in view.page_view.impressions]
        assert shown == [(item, n + 1) for n, item in enumerate(suite.pages[view.attribution_token])]


def test_every_click_cart_and_order_names_a_page_that_showed_its_items(
    evening: tuple[Suite, LiveShop],
) -> None:
    suite, shop = evening
    clicks = [e for e in suite.events if e.HasField("recommendation_click")]
    orders = [e for e in suite.events if e.HasField("purchase")]
    assert clicks
    assert orders
    for click in clicks:
        page = suite.pages[click.attribution_token]
        assert page[click.recommendation_click.position - 1] == click.recommendation_click.item_id
    for order in orders:
        assert {line.item_id for line in order.purchase.lines} <= set(suite.pages[order.attribution_token])
        assert order.purchase.currency_code
    assert sum(arm.clicks for arm in shop.report.arms.values()) == len(clicks)


def test_a_shopper_stays_in_one_arm_and_both_arms_are_used(evening: tuple[Suite, LiveShop]) -> None:
    suite, _ = evening
    used = {user: {request.serving_config for request in asked} for user, asked in suite.asked.items()}
    assert all(configs == {arm_of(user)} for user, configs in used.items())
    assert set.union(*used.values()) == set(ARMS)


def test_the_next_page_is_asked_for_with_the_token_of_the_last_events(
    evening: tuple[Suite, LiveShop],
) -> None:
    suite, _ = evening
    later = [request for asked in suite.asked.values() for request in asked[1:]]
    assert any(request.consistency_token.startswith("token-") for request in later)


def test_event_ids_of_live_visits_are_distinct(evening: tuple[Suite, LiveShop]) -> None:
    ids = [event.event_id for event in evening[0].events]
    assert len(set(ids)) == len(ids)
    assert all(1 <= len(event_id) <= 128 for event_id in ids)


def test_the_same_answers_give_the_same_visits() -> None:
    first, second = played(64)[0], played(64)[0]
    assert [e.SerializeToString() for e in first.events] == [e.SerializeToString() for e in second.events]


def test_pages_that_fail_are_counted_and_told() -> None:
    suite, shop = played(10, broken=True)
    assert shop.report.failed_pages == 10
    assert "out of order" in shop.report.last_error
    assert suite.events == []
