"""The promises once more, with the real feedback and profile services on a real PostgreSQL."""

from __future__ import annotations

import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from psycopg.conninfo import conninfo_to_dict
from shopkeeper.feedback.v1 import event_pb2, feedback_service_pb2, feedback_service_pb2_grpc
from shopkeeper.profile.v1 import (
    catalog_service_pb2,
    catalog_service_pb2_grpc,
    profile_service_pb2,
    profile_service_pb2_grpc,
    segment_pb2,
)
from shopkeeper.recommend.v1 import recommend_service_pb2 as pb
from shopkeeper.recommend.v1 import recommend_service_pb2_grpc

from services.feedback.__main__ import wire as wire_feedback
from services.feedback.servicer import SERVICE_NAME as FEEDBACK
from services.feedback.settings import FeedbackSettings
from services.profile.__main__ import SERVICE_NAMES, Profile
from services.profile.settings import ProfileSettings
from services.recommend.__main__ import RecommendService
from services.recommend.settings import RecommendSettings
from shared.channel import open_channel
from shared.server import GrpcServer
from shared.telemetry import Telemetry
from tests.own_postgres import OwnPostgres
from tests.recommend.chaos import Proxy, Wire
from tests.recommend.shop import causes, eventually, ids, item, publish
from tests.recommend.test_chaos import SECONDS
from tests.recommend.test_service import IDS, VECTORS


class Suite:
    """Feedback, profile and recommend in one process, each behind its own socket."""

    def __init__(self, url: str, keys: Path, home: Path) -> None:
        self.servers: list[GrpcServer] = []
        common = {"home": home, "keys": keys, "listen": "127.0.0.1:0", "log_level": "error"}
        feedback_settings = FeedbackSettings(**common)  # type: ignore[arg-type]
        self.feedback = wire_feedback(feedback_settings, url)
        feedback = self._serve("feedback", feedback_settings, self.feedback.register, (FEEDBACK,))
        profile_settings = ProfileSettings(**common)  # type: ignore[arg-type]
        self.profile = Profile.wire(profile_settings, url)
        profile = self._serve("profile", profile_settings, self.profile.register, SERVICE_NAMES)
        self.profile.start()
        eventually(lambda: self.profile.readiness()[0])
        publish(home / "registry", keys, IDS, VECTORS)
        settings = RecommendSettings(profile_address=f"127.0.0.1:{profile}", **common)  # type: ignore[arg-type]
        self.recommend = RecommendService(settings, Telemetry("recommend", settings))
        recommend = self.recommend.start()
        self.channels = [open_channel(f"127.0.0.1:{port}") for port in (feedback, profile, recommend)]
        self.log = feedback_service_pb2_grpc.FeedbackServiceStub(self.channels[0])
        self.catalog = catalog_service_pb2_grpc.CatalogServiceStub(self.channels[1])
        self.stub = recommend_service_pb2_grpc.RecommendServiceStub(self.channels[2])
        eventually(lambda: self.recommend.profiles.state().connected)
        eventually(lambda: self.recommend.catalog.state().complete)

    def _serve(
        self,
        name: str,
        settings: FeedbackSettings | ProfileSettings,
        register: Callable[[grpc.Server], None],
        names: tuple[str, ...],
    ) -> int:
        server = GrpcServer(
            name, settings, Telemetry(name, settings), register=[register], service_names=names
        )
        self.servers.append(server)
        return server.start()

    def view(self, user_id: str, item_id: str) -> str:
        """Records a view and returns the consistency token."""
        event = event_pb2.Event(
            event_id=uuid.uuid4().hex, user_id=user_id, item_view=event_pb2.ItemView(item_id=item_id)
        )
        event.occurred_at.FromNanoseconds(time.time_ns() // 1_000_000 * 1_000_000)
        answer = self.log.RecordEvents(feedback_service_pb2.RecordEventsRequest(events=[event]), timeout=20)
        assert answer.results[0].status == event_pb2.EVENT_STATUS_STORED
        return answer.consistency_token

    def recommend_to(self, user_id: str, **fields: object) -> pb.RecommendResponse:
        return self.stub.Recommend(pb.RecommendRequest(user_id=user_id, **fields), timeout=5)  # type: ignore[arg-type]

    def close(self) -> None:
        for channel in self.channels:
            channel.close()
        self.recommend.stop()
        self.profile.drain()
        for server in self.servers:
            server.stop(0)
        self.profile.close()
        self.feedback.close()


@pytest.fixture
def suite(migrate_services: Callable[..., str], keys_dir: Path, tmp_path: Path) -> Iterator[Suite]:
    suite = Suite(migrate_services("feedback", "profile"), keys_dir, tmp_path)
    yield suite
    suite.close()


def test_a_click_that_was_acknowledged_is_in_the_next_answer_with_its_token(suite: Suite) -> None:
    for n in range(1, 20):
        token = suite.view("ann", ("tea-1", "shoe-1")[n % 2])
        answer = suite.recommend_to("ann", consistency_token=token)
        assert answer.freshness.events_used == n
        assert not causes(answer)


def test_concurrent_shoppers_each_see_their_own_clicks(suite: Suite) -> None:
    short: list[tuple[str, int, int]] = []

    def shopper(name: str) -> None:
        for n in range(1, 11):
            token = suite.view(name, "shoe-1")
            used = suite.recommend_to(name, consistency_token=token).freshness.events_used
            if used != n:
                short.append((name, n, used))

    threads = [threading.Thread(target=shopper, args=(f"shopper-{n}",)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert short == []


def test_a_click_changes_the_answer_without_a_token_too(suite: Suite) -> None:
    suite.recommend_to("bob")
    suite.view("bob", "shoe-2")
    eventually(lambda: ids(suite.recommend_to("bob", page_size=1))[0].startswith("shoe"))


def test_a_withdrawn_item_is_gone(suite: Suite) -> None:
    suite.catalog.UpsertItems(
        catalog_service_pb2.UpsertItemsRequest(items=[item(item_id, price=2.0) for item_id in IDS])
    )
    eventually(lambda: suite.recommend_to("cai", page_size=1).items[0].item.title == "Title of tea-1")
    suite.catalog.UpsertItems(catalog_service_pb2.UpsertItemsRequest(items=[item("tea-1", withdrawn=True)]))
    eventually(lambda: "tea-1" not in ids(suite.recommend_to("cai")))


def test_a_new_item_is_a_candidate_by_what_it_is(suite: Suite) -> None:
    """From the write at profile, over its vectors and stream, to the lists of recommend; bench_new_items times it."""
    words = {
        "tea": "green tea leaves from the mountain",
        "shoe": "leather running shoe with laces",
        "hat": "hat",
    }

    def write(item_id: str, **fields: Any) -> None:
        written = item(item_id, title=f"{words[item_id.split('-')[0]]} {item_id[-1]}", **fields)
        suite.catalog.UpsertItems(catalog_service_pb2.UpsertItemsRequest(items=[written]), timeout=20)

    def similar(item_id: str) -> list[str]:
        return ids(suite.stub.SimilarItems(pb.SimilarItemsRequest(item_id=item_id), timeout=5))

    for item_id in IDS:
        write(item_id)
    vectors = suite.recommend.catalog_store.vectors
    # The first space is fitted in the background; from then on a vector takes no longer than its item.
    eventually(lambda: vectors.current.count == len(IDS), 30.0)
    write("tea-9")
    eventually(lambda: "tea-9" in similar("tea-1"))
    # Nothing was learnt of it: it resembles tea by its words, and is not offered beside shoes before tea is.
    eventually(lambda: similar("tea-9")[:1] and similar("tea-9")[0].startswith("tea"))
    suite.view("fay", "tea-1")
    eventually(lambda: "tea-9" in ids(suite.recommend_to("fay")))
    write("tea-9", withdrawn=True)
    eventually(lambda: "tea-9" not in similar("tea-1") and "tea-9" not in ids(suite.recommend_to("fay")))


def test_a_new_person_gets_what_is_popular_in_their_segment(suite: Suite) -> None:
    """A segment that is created at profile, events at feedback, and the answer to somebody who has done nothing."""
    profiles = profile_service_pb2_grpc.ProfileServiceStub(suite.channels[1])
    segment = segment_pb2.Segment(segment_id="lookers", filter="rfm.order_count = 0")
    profiles.CreateSegment(profile_service_pb2.CreateSegmentRequest(segment=segment), timeout=20)

    def segments_of_a_stranger() -> list[str]:
        request = profile_service_pb2.GetProfileRequest(
            user_id="gus", view=profile_service_pb2.PROFILE_VIEW_LIVE
        )
        return list(profiles.GetProfile(request, timeout=20).live.summary.segment_ids)

    eventually(lambda: segments_of_a_stranger() == ["lookers"], 20.0)
    assert ids(suite.recommend_to("hal", page_size=1)) == ["tea-1"]
    for number in range(60):
        suite.view(f"looker-{number}", "hat")
    eventually(lambda: ids(suite.recommend_to("ian", page_size=1)) == ["hat"])
    reason = suite.recommend_to("jon", include_explanations=True).items[0].reasons[0]
    assert (reason.text, reason.segment_id) == ("Popular in lookers", "lookers")


def test_a_forgotten_shopper_is_a_stranger(suite: Suite) -> None:
    suite.view("dee", "shoe-1")
    eventually(lambda: suite.recommend_to("dee").freshness.events_used == 1)
    suite.log.ForgetUser(feedback_service_pb2.ForgetUserRequest(user_id="dee"), timeout=20)
    eventually(lambda: suite.recommend_to("dee").freshness.events_used == 0)


def test_with_profile_gone_the_last_known_history_serves(suite: Suite) -> None:
    suite.view("eve", "shoe-1")
    eventually(lambda: suite.recommend_to("eve").freshness.events_used == 1)
    suite.profile.drain()
    suite.servers[1].stop(0)
    eventually(lambda: "PROFILE_STALE" in causes(suite.recommend_to("eve")))
    assert ids(suite.recommend_to("eve", page_size=1))[0].startswith("shoe")


def is_recorded(suite: Suite, user_id: str, item_id: str) -> bool:
    try:
        return bool(suite.view(user_id, item_id))
    except grpc.RpcError:
        return False


def every_call_is_answered(suite: Suite) -> None:
    """Asks for who is known and for strangers, over and over, each time within a second."""
    end, number = time.monotonic() + SECONDS, 0
    while time.monotonic() < end:
        number += 1
        for user_id in ("ann", f"stranger-{number}"):
            request = pb.RecommendRequest(user_id=user_id, page_size=3)
            answer = suite.stub.Recommend(request, timeout=1)
            assert len(answer.items) == 3
    # What was known is known, whatever is gone.
    assert suite.recommend_to("ann").freshness.events_used == 1


@pytest.mark.parametrize("wire", [Wire.SLOW, Wire.CUT, Wire.HALF_OPEN], ids=lambda wire: wire.value)
def test_every_call_is_answered_while_postgres_fails(
    migrate_services: Callable[..., str], keys_dir: Path, tmp_path: Path, wire: Wire
) -> None:
    told = conninfo_to_dict(migrate_services("feedback", "profile"))
    host, port = str(told.get("host", "127.0.0.1")), int(told.get("port") or 5432)
    database = Proxy(f"{host}/.s.PGSQL.{port}" if host.startswith("/") else port)
    credentials = f"{told.get('user', 'postgres')}:{told.get('password', '')}"
    behind = f"postgresql://{credentials}@127.0.0.1:{database.port}/{told['dbname']}"
    suite = Suite(behind, keys_dir, tmp_path)
    try:
        token = suite.view("ann", "tea-1")
        assert suite.recommend_to("ann", consistency_token=token).freshness.events_used == 1
        database.become(wire)
        every_call_is_answered(suite)
        database.become(Wire.GOOD)
    finally:
        suite.close()
        database.close()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_every_call_is_answered_while_the_process_of_postgres_fails(
    postgres_homes: Callable[[], Path], keys_dir: Path, tmp_path: Path, number: signal.Signals
) -> None:
    database = OwnPostgres(postgres_homes(), "feedback", "profile")
    suite = Suite(database.url, keys_dir, tmp_path)
    try:
        token = suite.view("ann", "tea-1")
        assert suite.recommend_to("ann", consistency_token=token).freshness.events_used == 1
        database.signal(number)
        try:
            every_call_is_answered(suite)
        finally:
            if number is signal.SIGSTOP:
                database.signal(signal.SIGCONT)
        if number is signal.SIGKILL:
            database.start_again()
        # The way back needs nobody's help.
        eventually(lambda: is_recorded(suite, "ann", "shoe-1"), 90.0)
        eventually(lambda: suite.recommend_to("ann").freshness.events_used >= 2, 60.0)
    finally:
        suite.close()
