"""Whatever breaks, there is an answer, and it says what it went without."""

from __future__ import annotations

import os
import shutil
import threading
import time

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from shopkeeper.profile.v1 import profile_service_pb2
from shopkeeper.recommend.v1 import recommend_service_pb2 as pb
from shopkeeper.recommend.v1 import recommendation_pb2

from services.recommend.__main__ import main
from shared.bundle import Registry
from shared.event_kinds import EventKind
from tests.recommend.shop import Shop, causes, eventually, ids, item, point
from tests.recommend.test_service import IDS, VECTORS, MakeShop, recommend

VIEW = EventKind.ITEM_VIEW
# `make verify-swaps` makes 1,000.
SWAPS = int(os.environ.get("SHOPKEEPER_SWAPS", "100"))


@pytest.fixture
def shop(make_shop: MakeShop) -> Shop:
    shop = make_shop()
    shop.publish(IDS, VECTORS)
    shop.profile.upsert(*(item(item_id) for item_id in IDS))
    return shop.start()


class TestWithoutProfile:
    def test_known_histories_go_on_and_are_called_stale(self, shop: Shop) -> None:
        shop.profile.record(shop.user_key("ann"), ("shoe-1", VIEW))
        eventually(lambda: recommend(shop, user_id="ann").freshness.events_used == 1)
        shop.profile_server.kill()
        eventually(lambda: causes(recommend(shop, user_id="ann")) >= {"PROFILE_STALE", "CATALOG_STALE"})
        answer = recommend(shop, user_id="ann", page_size=2)
        assert all(item_id.startswith("shoe") for item_id in ids(answer))
        stranger = recommend(shop, user_id="bob", context_events=[{"item_id": "shoe-1"}], page_size=1)
        assert "PROFILE_UNAVAILABLE" in causes(stranger)
        assert ids(stranger)[0].startswith("shoe")

    def test_a_profile_that_cannot_read_the_log_is_stale_though_its_heart_beats(self, shop: Shop) -> None:
        shop.profile.record(shop.user_key("ann"), ("shoe-1", VIEW))
        eventually(lambda: recommend(shop, user_id="ann").freshness.events_used == 1)
        assert not causes(recommend(shop, user_id="ann"))
        shop.profile.log_read_at = time.time()
        eventually(lambda: causes(recommend(shop, user_id="ann")) == {"PROFILE_STALE"})
        shop.profile.log_read_at = None
        eventually(lambda: not causes(recommend(shop, user_id="ann")))

    def test_a_place_to_resume_from_that_is_refused_is_given_up(
        self, shop: Shop, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        refused: list[bytes] = []
        watch = shop.profile.WatchProfiles

        def refuse(
            request: profile_service_pb2.WatchProfilesRequest, context: grpc.ServicerContext
        ) -> object:
            if request.resume_watermark:
                refused.append(request.resume_watermark)
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, "of another log")
            return watch(request, context)

        monkeypatch.setattr(shop.profile, "WatchProfiles", refuse)
        shop.profile_server.kill()
        shop.profile_server.start()
        shop.profile.record(shop.user_key("ann"), ("shoe-1", VIEW))
        eventually(lambda: refused and not causes(recommend(shop, user_id="ann")))
        assert recommend(shop, user_id="ann").freshness.events_used == 1

    def test_what_a_lagging_replica_says_is_not_kept(self, make_shop: MakeShop) -> None:
        shop = make_shop()
        shop.publish(IDS, VECTORS)
        shop.profile.record(shop.user_key("ann"), ("shoe-1", VIEW))
        shop.profile.lags = True
        shop.start()
        assert recommend(shop, user_id="ann").freshness.events_used == 0
        shop.profile.lags = False
        assert recommend(shop, user_id="ann").freshness.events_used == 1

    def test_answers_stay_inside_the_deadline(self, shop: Shop) -> None:
        shop.profile_server.kill()
        eventually(lambda: not shop.service.profiles.state().connected)  # type: ignore[union-attr]
        for n in range(30):
            request = pb.RecommendRequest(user_id=f"u{n}", consistency_token=shop.token(999))
            assert shop.stub.Recommend(request, timeout=0.5).items

    def test_a_profile_that_hangs_does_not_hang_the_answer(self, shop: Shop) -> None:
        shop.profile.hold()
        shop.profile.hangs.set()
        for n in range(3):
            request = pb.RecommendRequest(user_id=f"u{n}", consistency_token=shop.token(999))
            answer = shop.stub.Recommend(request, timeout=1.0)
            assert answer.items
            assert causes(answer) == {"PROFILE_UNAVAILABLE", "CONSISTENCY_NOT_REACHED"}
        shop.profile.hangs.clear()

    def test_when_profile_comes_back_so_does_freshness(self, shop: Shop) -> None:
        shop.profile_server.kill()
        eventually(lambda: not shop.service.profiles.state().connected)  # type: ignore[union-attr]
        shop.profile.record(shop.user_key("ann"), ("shoe-1", VIEW))
        shop.profile.upsert(item("tea-1", withdrawn=True))
        shop.profile_server.start()
        eventually(lambda: not causes(recommend(shop, user_id="ann")))
        eventually(lambda: recommend(shop, user_id="ann").freshness.events_used == 1)
        eventually(lambda: "tea-1" not in ids(recommend(shop)))

    def test_a_service_that_never_saw_profile_answers_from_the_model(self, make_shop: MakeShop) -> None:
        shop = make_shop(catalog_grace_seconds=0.1)
        shop.publish(IDS, VECTORS)
        shop.profile_server.kill()
        shop.start()
        answer = recommend(shop, user_id="ann")
        assert ids(answer) == IDS
        assert causes(answer) == {"PROFILE_UNAVAILABLE", "CATALOG_UNAVAILABLE"}
        health = health_pb2_grpc.HealthStub(shop._channel)
        eventually(
            lambda: (
                health.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING
            )
        )


class TestWithoutModel:
    def test_items_that_sell_now_stand_in(self, make_shop: MakeShop) -> None:
        shop = make_shop().start()
        shop.profile.upsert(*(item(item_id) for item_id in IDS))
        for n in range(3):
            shop.profile.record(shop.user_key(f"u{n}"), ("hat", VIEW))
        shop.profile.record(shop.user_key("u9"), ("shoe-1", VIEW))
        eventually(lambda: ids(recommend(shop))[:2] == ["hat", "shoe-1"])
        answer = recommend(shop, page_size=100, include_explanations=True)
        assert causes(answer) == {"NO_MODEL"}
        assert answer.model.version == ""
        assert answer.items[0].reasons[0].kind == recommendation_pb2.Reason.KIND_POPULAR
        assert sorted(ids(answer)) == sorted(IDS)

    def test_events_alone_are_enough(self, make_shop: MakeShop) -> None:
        shop = make_shop().start()
        shop.profile.record(shop.user_key("u"), ("never-described", VIEW))
        eventually(lambda: ids(recommend(shop)) == ["never-described"])

    def test_without_events_the_newest_items_stand_in(self, make_shop: MakeShop) -> None:
        shop = make_shop().start()
        shop.profile.upsert(item("old"))
        shop.profile.upsert(item("new"))
        eventually(lambda: len(recommend(shop).items) == 2)
        assert causes(recommend(shop)) == {"NO_MODEL", "NO_POPULARITY"}

    def test_with_nothing_at_all_the_answer_is_empty_and_no_error(self, make_shop: MakeShop) -> None:
        shop = make_shop().start()
        answer = recommend(shop, user_id="ann")
        assert not answer.items
        assert {"NO_MODEL", "NO_POPULARITY", "NO_ITEMS"} <= causes(answer)
        together = shop.stub.FrequentlyBoughtTogether(pb.FrequentlyBoughtTogetherRequest(item_ids=["x"]))
        assert "NO_MODEL" in causes(together)

    def test_the_first_model_comes_into_service_by_itself(self, make_shop: MakeShop) -> None:
        shop = make_shop().start()
        assert recommend(shop).model.version == ""
        version = shop.publish(IDS, VECTORS)
        assert recommend(shop).model.version == version


class TestModels:
    def test_swaps_under_load_fail_nothing_and_mix_nothing(self, shop: Shop) -> None:
        """Each version has scores of its own: a reply that mixes versions cannot have its version's scores."""
        powers = (1.0, 2.0, 3.0)
        versions = {
            shop.publish(IDS, VECTORS, popularity=[power * n for n in range(7, 0, -1)], alias=False): power
            for power in powers
        }
        order = list(versions)
        point(shop.registry, order[0])
        eventually(lambda: recommend(shop).model.version == order[0])
        done = threading.Event()
        failed: list[str] = []
        mixed: list[str] = []
        answered = [0] * 4

        def ask(worker: int) -> None:
            while not done.is_set():
                try:
                    answer = recommend(shop, page_size=7)
                except grpc.RpcError as error:
                    failed.append(str(error))
                    continue
                answered[worker] += 1
                power = versions[answer.model.version]
                if [entry.score for entry in answer.items] != [power * n for n in range(7, 0, -1)]:
                    mixed.append(answer.model.version)

        threads = [threading.Thread(target=ask, args=(worker,)) for worker in range(4)]
        for thread in threads:
            thread.start()
        state = shop.service.models.state  # type: ignore[union-attr]
        before = state().swap_count
        for swap in range(SWAPS):
            version = order[(swap + 1) % len(order)]
            point(shop.registry, version)
            eventually(lambda version=version: state().version == version)
        done.set()
        for thread in threads:
            thread.join()
        assert state().swap_count - before == SWAPS
        assert all(count > 0 for count in answered)
        assert failed == []
        assert mixed == []

    @pytest.mark.parametrize(
        "file", ["weights.safetensors", "encoder.tflite", "vocabulary.safetensors", "manifest.json"]
    )
    def test_a_damaged_version_is_refused_and_the_old_one_serves_on(self, shop: Shop, file: str) -> None:
        old = recommend(shop).model.version
        version = shop.publish(IDS, VECTORS * 2, alias=False)
        path = Registry(shop.registry).version_path("main", version) / file
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 0x55
        path.write_bytes(content)
        point(shop.registry, version)
        status = pb.GetModelStatusRequest()
        eventually(lambda: shop.stub.GetModelStatus(status).refused)
        refused = shop.stub.GetModelStatus(status).refused[0]
        assert (refused.version, refused.reason) == (version, "BUNDLE_DAMAGED")
        assert file in refused.text
        assert recommend(shop).model.version == old
        newer = shop.publish(IDS, VECTORS)
        assert recommend(shop).model.version == newer

    def test_a_version_that_is_not_there_yet_is_taken_when_it_is(
        self, shop: Shop, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("services.recommend.storage.models._PENDING_RETRY_SECONDS", 0.05)
        version = shop.publish(IDS, VECTORS, alias=False)
        path = Registry(shop.registry).version_path("main", version)
        away = path.with_name("away")
        path.rename(away)
        point(shop.registry, version)
        eventually(lambda: shop.stub.GetModelStatus(pb.GetModelStatusRequest()).refused)
        shutil.move(away, path)
        eventually(lambda: recommend(shop).model.version == version)

    def test_a_rollback_needs_nothing_but_the_alias(self, shop: Shop) -> None:
        """The version before is still in memory, and serves though its files are gone."""
        first = recommend(shop).model.version
        before = [entry.score for entry in recommend(shop, page_size=7).items]
        shop.publish(IDS, VECTORS, popularity=[9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0])
        shutil.rmtree(Registry(shop.registry).version_path("main", first))
        point(shop.registry, first)
        eventually(lambda: recommend(shop).model.version == first, 1.0)
        assert [entry.score for entry in recommend(shop, page_size=7).items] == before

    def test_a_rollback_takes_effect(self, shop: Shop) -> None:
        first = recommend(shop).model.version
        shop.publish(IDS, VECTORS)
        point(shop.registry, first)
        eventually(lambda: recommend(shop).model.version == first)

    def test_models_of_other_items_share_the_catalogue(self, shop: Shop) -> None:
        shop.profile.upsert(item("kite"))
        shop.publish(["hat", "kite", "tea-1"], np.array([[0, 1], [1, 0], [2, 0]], np.float32))
        answer = recommend(shop, context_events=[{"item_id": "kite"}])
        assert ids(answer)[0] == "tea-1"
        assert ids(answer)[1] == "hat"
        assert ids(answer)[-1] == "kite"
        similar = shop.stub.SimilarItems(pb.SimilarItemsRequest(item_id="kite"))
        assert ids(similar) == ["tea-1", "hat"]


def test_a_deadline_that_is_nearly_over_still_gets_an_answer(shop: Shop) -> None:
    request = pb.RecommendRequest(user_id="new", include_explanations=True)
    for _ in range(20):
        assert shop.stub.Recommend(request, timeout=0.1).items


def test_a_missing_key_is_one_line_and_no_traceback(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object, capsys: pytest.CaptureFixture[str]
) -> None:
    from shared.server import run_service

    monkeypatch.setenv("SHOPKEEPER_KEYS", f"{tmp_path}/nowhere")
    monkeypatch.setattr("sys.argv", ["recommend"])
    with pytest.raises(SystemExit) as caught:
        run_service(main)
    assert caught.value.code == 2
    assert "token_key.hex" in capsys.readouterr().err
