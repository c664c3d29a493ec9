"""What a shop is promised, over a real socket, with a real bundle."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import grpc
import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from shopkeeper.profile.v1 import item_pb2
from shopkeeper.recommend.v1 import recommend_service_pb2 as pb
from shopkeeper.recommend.v1 import recommendation_pb2

from shared.errors import InvalidInput, NotFound, ShopkeeperError
from shared.event_kinds import EventKind
from shared.grpc_status import from_rpc_error
from shared.tokens import AttributionToken
from tests.recommend.shop import Shop, causes, eventually, ids, item

VIEW, CART, BUY = EventKind.ITEM_VIEW, EventKind.ADD_TO_CART, EventKind.PURCHASE
Reason = recommendation_pb2.Reason
Verdict = recommendation_pb2.FilterVerdict

# Two tastes, at right angles: whoever looks at shoes gets shoes. Popularity falls with the place in the list.
IDS = ["tea-1", "tea-2", "tea-3", "shoe-1", "shoe-2", "shoe-3", "hat"]
VECTORS = np.array([[3, 0], [2.5, 0], [2, 0], [0, 3], [0, 2.5], [0, 2], [0.1, 0.1]], np.float32)
MakeShop = Callable[..., Shop]


@pytest.fixture
def shop(make_shop: MakeShop) -> Shop:
    shop = make_shop()
    shop.publish(IDS, VECTORS, pairs={("shoe-1", "hat"): 0.9, ("tea-1", "tea-3"): 0.02})
    shop.profile.upsert(*(item(item_id, price=float(n + 1)) for n, item_id in enumerate(IDS)))
    return shop.start()


def recommend(shop: Shop, **fields: object) -> pb.RecommendResponse:
    return shop.stub.Recommend(pb.RecommendRequest(**fields), timeout=5)  # type: ignore[arg-type]


def failure(call: Callable[[], object]) -> ShopkeeperError:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return from_rpc_error(caught.value)


class TestWhatIsRecommended:
    def test_a_stranger_gets_what_is_popular(self, shop: Shop) -> None:
        answer = recommend(shop, page_size=3, include_explanations=True)
        assert ids(answer) == ["tea-1", "tea-2", "tea-3"]
        assert [entry.reasons[0].kind for entry in answer.items] == [Reason.KIND_POPULAR] * 3
        assert answer.items[0].reasons[0].contribution == 7
        assert not answer.degraded

    def test_a_click_changes_the_answer(self, shop: Shop) -> None:
        before = recommend(shop, user_id="ann", page_size=3)
        assert ids(before) == ["tea-1", "tea-2", "tea-3"]
        shop.profile.record(shop.user_key("ann"), ("shoe-2", VIEW))
        eventually(lambda: ids(recommend(shop, user_id="ann", page_size=3))[0].startswith("shoe"))

    def test_a_shopper_as_a_vector_is_what_the_version_in_service_sees_now(self, shop: Shop) -> None:
        key, stranger = shop.user_key("ann"), shop.user_key("nobody")
        shop.profile.record(key, ("shoe-2", VIEW))
        eventually(lambda: recommend(shop, user_id="ann").freshness.events_used == 1)
        answer = shop.stub.EmbedUsers(pb.EmbedUsersRequest(user_keys=[stranger, key]), timeout=5)
        assert answer.model_version
        assert list(answer.embeddings[0].values) == []
        # The encoder of this bundle adds up the history's vectors.
        assert answer.embeddings[1].values == pytest.approx([0.0, 2.5], abs=1e-5)
        assert [one.event_count for one in answer.embeddings] == [0, 1]
        shop.profile.record(key, ("tea-1", VIEW))
        eventually(
            lambda: (
                shop.stub.EmbedUsers(pb.EmbedUsersRequest(user_keys=[key]), timeout=5)
                .embeddings[0]
                .event_count
                == 2
            )
        )

    def test_a_question_for_vectors_of_nobody_or_of_what_is_no_key_is_refused(self, shop: Shop) -> None:
        for user_keys in ([], [b"short"], [bytes(16)] * 101):
            error = failure(lambda keys=user_keys: shop.stub.EmbedUsers(pb.EmbedUsersRequest(user_keys=keys)))
            assert isinstance(error, InvalidInput)

    def test_a_context_event_counts_at_once(self, shop: Shop) -> None:
        answer = recommend(shop, context_events=[{"item_id": "shoe-2"}], page_size=1)
        assert ids(answer)[0].startswith("shoe")
        assert answer.freshness.events_used == 1

    def test_a_consistency_token_makes_its_events_count(self, shop: Shop) -> None:
        key = shop.user_key("bob")
        shop.profile.record(key, ("tea-1", VIEW))
        eventually(lambda: recommend(shop, user_id="bob").freshness.events_used == 1)
        shop.profile.hold()
        for expected in range(2, 6):
            token = shop.token(shop.profile.record(key, ("shoe-1", VIEW)))
            # The stream does not bring it: only the token does.
            answer = recommend(shop, user_id="bob", consistency_token=token)
            assert answer.freshness.events_used == expected
            assert not answer.degraded

    def test_a_token_is_waited_for_on_the_stream(self, shop: Shop) -> None:
        key = shop.user_key("bea")
        shop.profile.record(key, ("tea-1", VIEW))
        eventually(lambda: recommend(shop, user_id="bea").freshness.events_used == 1)
        shop.profile.hold()
        calls = shop.profile.get_profile_calls
        token = shop.token(shop.profile.record(key, ("shoe-1", VIEW)))
        threading.Timer(0.1, shop.profile.release).start()
        assert recommend(shop, user_id="bea", consistency_token=token).freshness.events_used == 2
        assert shop.profile.get_profile_calls == calls

    def test_a_token_that_cannot_be_reached_is_said_to_be(self, shop: Shop) -> None:
        shop.profile.hold()
        shop.profile.answers_calls = False
        token = shop.token(shop.profile.record(shop.user_key("cai"), ("shoe-1", VIEW)))
        request = pb.RecommendRequest(user_id="cai", consistency_token=token)
        answer = shop.stub.Recommend(request, timeout=1.5)
        assert "CONSISTENCY_NOT_REACHED" in causes(answer)
        assert ids(answer)

    def test_many_misses_of_one_shopper_make_one_call(self, shop: Shop) -> None:
        shop.profile.record(shop.user_key("dan"), ("shoe-1", VIEW))
        eventually(lambda: shop.service.profiles.state().entries == 1)  # type: ignore[union-attr]
        calls = shop.profile.get_profile_calls
        futures = [
            shop.stub.Recommend.future(pb.RecommendRequest(user_id="nobody"), timeout=5) for _ in range(20)
        ]
        for future in futures:
            future.result()
        assert shop.profile.get_profile_calls - calls <= 2
        assert recommend(shop, user_id="dan").freshness.events_used == 1
        assert shop.profile.get_profile_calls - calls <= 2

    def test_bought_and_carted_items_are_left_out_but_not_of_a_search(self, shop: Shop) -> None:
        shop.profile.record(shop.user_key("eve"), ("shoe-1", BUY))
        eventually(lambda: recommend(shop, user_id="eve").freshness.events_used == 1)
        home = ids(recommend(shop, user_id="eve", cart_item_ids=["shoe-2"], exclude_item_ids=["hat"]))
        assert not {"shoe-1", "shoe-2", "hat"} & set(home)
        assert "shoe-1" in ids(recommend(shop, user_id="eve", placement="search"))

    def test_without_consent_the_history_is_not_used(self, shop: Shop) -> None:
        shop.profile.consents[shop.user_key("fay")] = False
        shop.profile.record(shop.user_key("fay"), ("shoe-1", VIEW))
        answer = recommend(shop, user_id="fay", page_size=1)
        assert ids(answer) == ["tea-1"]
        assert causes(answer) == {"NO_PERSONALISATION_CONSENT"}

    def test_the_control_arm_knows_popularity_alone(self, shop: Shop) -> None:
        answer = recommend(
            shop, context_events=[{"item_id": "shoe-1"}], serving_config="popular", page_size=2
        )
        assert ids(answer) == ["tea-1", "tea-2"]
        assert [entry.score for entry in answer.items] == [7, 6]
        assert answer.model.serving_config == "popular"

    def test_the_score_is_the_documented_formula(self, shop: Shop) -> None:
        answer = recommend(shop, placement="search", context_events=[{"item_id": "shoe-1"}], page_size=100)
        logits = VECTORS.astype(np.float64) @ np.array([0, 3.0])
        log_softmax = logits - np.log(np.exp(logits).sum())
        expected = dict(zip(IDS, log_softmax, strict=True))
        expected["hat"] += np.log1p(30 * 0.9)
        assert {entry.item_id: entry.score for entry in answer.items} == pytest.approx(expected, abs=1e-5)


class TestWhatMayNotBeShown:
    def test_a_withdrawn_item_is_gone_and_never_comes_back(self, shop: Shop) -> None:
        assert "tea-1" in ids(recommend(shop))
        shop.profile.upsert(item("tea-1", withdrawn=True))
        eventually(lambda: "tea-1" not in ids(recommend(shop)))
        for fields in ({"filter_mode": pb.FILTER_MODE_FALLBACK, "filter": 'brand: ANY("none")'}, {}):
            assert "tea-1" not in ids(recommend(shop, page_size=100, **fields))
        similar = shop.stub.SimilarItems(pb.SimilarItemsRequest(item_id="tea-2"))
        assert "tea-1" not in ids(similar)
        # The stream breaks and starts anew: still not.
        shop.profile_server.kill()
        shop.profile_server.start()
        for _ in range(50):
            assert "tea-1" not in ids(recommend(shop))
            time.sleep(0.01)

    @pytest.mark.parametrize(
        ("change", "verdict"),
        [
            ({"stock_quantity": 0}, Verdict.FILTER_VERDICT_OUT_OF_STOCK),
            ({"withdrawn": True}, Verdict.FILTER_VERDICT_WITHDRAWN),
            ({"available_from": Timestamp(seconds=32503680000)}, Verdict.FILTER_VERDICT_NOT_AVAILABLE_NOW),
            ({"available_until": Timestamp(seconds=1)}, Verdict.FILTER_VERDICT_NOT_AVAILABLE_NOW),
        ],
    )
    def test_what_is_not_for_sale_is_not_shown(self, shop: Shop, change: dict, verdict: int) -> None:
        shop.profile.upsert(item("tea-1", **change))
        eventually(lambda: "tea-1" not in ids(recommend(shop)))
        explained = shop.stub.Explain(pb.ExplainRequest(item_id="tea-1"))
        assert list(explained.verdicts) == [verdict]
        shop.profile.upsert(item("tea-1"))
        eventually(lambda: "tea-1" in ids(recommend(shop)))

    def test_a_deleted_item_is_gone(self, shop: Shop) -> None:
        shop.profile.delete("tea-1")
        eventually(lambda: "tea-1" not in ids(recommend(shop)))

    def test_an_item_that_the_catalogue_does_not_describe_is_not_shown(self, make_shop: MakeShop) -> None:
        shop = make_shop()
        shop.publish(IDS, VECTORS)
        shop.profile.upsert(item("tea-2"), item_pb2.Item(item_id="tea-3", placeholder=True))
        assert ids(recommend(shop.start())) == ["tea-2"]

    def test_a_shop_without_a_catalogue_gets_all_that_the_model_knows(self, make_shop: MakeShop) -> None:
        shop = make_shop()
        shop.publish(IDS, VECTORS)
        answer = recommend(shop.start())
        assert ids(answer) == IDS
        assert not answer.items[0].HasField("item")

    def test_an_item_that_the_model_has_not_learnt_comes_last_but_comes(self, shop: Shop) -> None:
        shop.profile.upsert(item("brand-new"))
        eventually(lambda: "brand-new" in ids(recommend(shop)))
        answer = recommend(shop, context_events=[{"item_id": "tea-1"}], include_explanations=True)
        # Behind all that the model scores, before what the shopper has seen.
        assert ids(answer)[-2:] == ["brand-new", "tea-1"]
        assert answer.items[-2].reasons[0].kind == Reason.KIND_NEW_ITEM
        assert answer.items[-2].score < min(entry.score for entry in answer.items[:-2])

    def test_what_the_shopper_has_seen_comes_after_all_else(self, shop: Shop) -> None:
        clicks = [{"item_id": "shoe-1"}, {"item_id": "shoe-2"}]
        at_home = ids(recommend(shop, context_events=clicks))
        assert set(at_home[-2:]) == {"shoe-1", "shoe-2"}
        assert set(at_home) == set(IDS)
        assert set(ids(recommend(shop, placement="cart", context_events=clicks))[-2:]) != {"shoe-1", "shoe-2"}

    def test_what_the_shop_earns_is_not_in_the_answer(self, shop: Shop) -> None:
        shop.profile.upsert(item("tea-1", price=2.0, margin_micros=5, image_bytes=b"jpeg", brand="B"))
        eventually(lambda: recommend(shop, page_size=1).items[0].item.brand == "B")
        record = recommend(shop, page_size=1).items[0].item
        assert not record.HasField("margin_micros")
        assert not record.HasField("image_bytes")
        assert record.price_micros == 2_000_000


class TestFilters:
    def test_only_what_the_filter_allows_is_shown(self, shop: Shop) -> None:
        answer = recommend(shop, filter='price >= 4 AND NOT item_id: ANY("hat")')
        assert ids(answer) == ["shoe-1", "shoe-2", "shoe-3"]

    def test_fallback_fills_the_page_and_says_so(self, shop: Shop) -> None:
        strict = recommend(shop, filter="price >= 7", page_size=3)
        assert ids(strict) == ["hat"]
        assert not strict.degraded
        filled = recommend(shop, filter="price >= 7", filter_mode=pb.FILTER_MODE_FALLBACK, page_size=3)
        assert ids(filled) == ["hat", "tea-1", "tea-2"]
        assert causes(filled) == {"FILTER_FALLBACK"}

    def test_a_mistake_names_the_place(self, shop: Shop) -> None:
        error = failure(lambda: recommend(shop, filter="price <"))
        assert isinstance(error, InvalidInput)
        assert (error.reason, error.metadata) == ("INVALID_FILTER", {"line": "1", "column": "8"})
        assert error.violations[0].field == "filter"


class TestPages:
    def test_pages_follow_each_other_without_repeats_or_gaps(self, shop: Shop) -> None:
        seen: list[str] = []
        token, positions = "", []
        while True:
            answer = recommend(shop, context_events=[{"item_id": "shoe-1"}], page_size=2, page_token=token)
            seen += ids(answer)
            positions += [entry.position for entry in answer.items]
            token = answer.next_page_token
            if not token:
                break
        assert sorted(seen) == sorted(IDS)
        assert positions == list(range(1, len(IDS) + 1))

    def test_a_page_of_a_new_model_says_so_and_repeats_nothing(self, shop: Shop) -> None:
        first = recommend(shop, page_size=3)
        shop.publish(IDS, VECTORS, popularity=[1, 2, 3, 4, 5, 6, 7])
        second = recommend(shop, page_size=100, page_token=first.next_page_token)
        assert "SNAPSHOT_CHANGED" in causes(second)
        assert sorted(ids(first) + ids(second)) == sorted(IDS)

    @pytest.mark.parametrize("spoil", [lambda t: "x" + t[1:], lambda t: t[:-2], lambda t: "forged"])
    def test_a_forged_page_token_is_refused(self, shop: Shop, spoil: Callable[[str], str]) -> None:
        token = recommend(shop, page_size=2).next_page_token
        error = failure(lambda: recommend(shop, page_size=2, page_token=spoil(token)))
        assert isinstance(error, InvalidInput)
        assert error.reason == "INVALID_TOKEN"
        assert error.violations[0].field == "page_token"

    def test_a_page_token_belongs_to_its_request(self, shop: Shop) -> None:
        token = recommend(shop, page_size=2).next_page_token
        error = failure(lambda: recommend(shop, page_size=2, page_token=token, filter="price > 0"))
        assert error.reason == "INVALID_TOKEN"

    def test_a_forged_consistency_token_is_refused(self, shop: Shop) -> None:
        page_token = recommend(shop, page_size=2).next_page_token
        for token in ("forged", page_token):
            error = failure(lambda token=token: recommend(shop, user_id="a", consistency_token=token))
            assert isinstance(error, InvalidInput)
            assert error.violations[0].field == "consistency_token"


class TestReasons:
    def test_co_occurrence_is_named_with_its_item(self, shop: Shop) -> None:
        shop.profile.record(shop.user_key("gil"), ("tea-1", VIEW), at=time.time() - 60)
        shop.profile.record(shop.user_key("gil"), ("shoe-1", BUY), at=time.time() - 30)
        eventually(lambda: recommend(shop, user_id="gil").freshness.events_used == 2)
        answer = recommend(shop, user_id="gil", include_explanations=True)
        hat = next(entry for entry in answer.items if entry.item_id == "hat").reasons[0]
        assert hat.kind == Reason.KIND_BECAUSE_YOU_BOUGHT
        assert hat.source_item_id == "shoe-1"
        assert hat.text == "Because you bought Title of shoe-1"
        assert hat.contribution == pytest.approx(np.log1p(30 * 0.9), abs=1e-4)
        assert abs(hat.source_event_time.seconds - (time.time() - 30)) < 5

    def test_the_sequence_reason_is_the_event_whose_absence_costs_most(self, shop: Shop) -> None:
        events = [{"item_id": "tea-2"}, {"item_id": "shoe-3"}, {"item_id": "hat"}]
        answer = recommend(shop, context_events=events, include_explanations=True)
        by_id = {entry.item_id: entry.reasons[0] for entry in answer.items}
        assert by_id["tea-1"].kind == by_id["shoe-1"].kind == Reason.KIND_SEQUENCE
        assert by_id["tea-1"].source_item_id == "tea-2"
        assert by_id["shoe-1"].source_item_id == "shoe-3"
        # The claim is checked: the score without the event is lower by what was said.
        without = recommend(shop, context_events=[{"item_id": "tea-2"}, {"item_id": "hat"}])
        scores = {entry.item_id: entry.score for entry in answer.items}
        fallen = scores["shoe-1"] - {entry.item_id: entry.score for entry in without.items}["shoe-1"]
        assert by_id["shoe-1"].contribution == pytest.approx(fallen, abs=1e-4)

    def test_a_weak_co_occurrence_is_no_reason(self, shop: Shop) -> None:
        # tea-3 follows tea-1 with 0.02: log(1 + 30 * 0.02) = 0.47; behind four newer events, 0.13 of it.
        events = [{"item_id": i} for i in ("tea-1", "hat", "tea-2", "hat", "tea-2")]
        answer = recommend(shop, context_events=events, include_explanations=True)
        tea = next(entry for entry in answer.items if entry.item_id == "tea-3").reasons[0]
        assert tea.kind == Reason.KIND_SEQUENCE

    def test_reasons_are_made_only_when_asked_for(self, shop: Shop) -> None:
        assert not recommend(shop).items[0].reasons


class TestExplain:
    def explain(self, shop: Shop, item_id: str, **fields: object) -> pb.ExplainResponse:
        request = pb.RecommendRequest(**fields)  # type: ignore[arg-type]
        return shop.stub.Explain(pb.ExplainRequest(request=request, item_id=item_id))

    def test_why(self, shop: Shop) -> None:
        fields = {"context_events": [{"item_id": "shoe-1"}], "page_size": 4}
        answer = recommend(shop, **fields)
        explained = self.explain(shop, "hat", **fields)
        assert explained.recommended
        assert explained.position == ids(answer).index("hat") + 1
        assert list(explained.verdicts) == [Verdict.FILTER_VERDICT_PASSED]
        assert explained.reasons[0].kind == Reason.KIND_BECAUSE_YOU_VIEWED
        by_source = {entry.source: entry for entry in explained.source_scores}
        cooccurrence = by_source[recommendation_pb2.CANDIDATE_SOURCE_COOCCURRENCE]
        sequence = by_source[recommendation_pb2.CANDIDATE_SOURCE_SEQUENCE]
        assert cooccurrence.score == pytest.approx(0.9)
        assert cooccurrence.rank == 1
        assert sequence.contribution + cooccurrence.contribution == pytest.approx(explained.score, abs=1e-4)
        assert [stage.name for stage in explained.trace.stages] == [
            "profile",
            "filter",
            "score",
            "rank",
            "reasons",
            "token",
        ]

    def test_why_not_for_lack_of_score(self, shop: Shop) -> None:
        explained = self.explain(shop, "hat", page_size=2)
        assert not explained.recommended
        assert explained.position == explained.position_by_score == 7
        assert explained.score < explained.page_threshold_score
        assert "position 7" in explained.findings[0]

    def test_why_not_for_having_seen_it(self, shop: Shop) -> None:
        explained = self.explain(shop, "tea-1", context_events=[{"item_id": "tea-1"}], page_size=2)
        assert not explained.recommended
        assert list(explained.verdicts) == [Verdict.FILTER_VERDICT_SEEN]
        assert explained.position == len(IDS)
        assert explained.position_by_score < explained.position

    def test_why_not_for_a_rule(self, shop: Shop) -> None:
        explained = self.explain(
            shop, "tea-1", cart_item_ids=["tea-1"], exclude_item_ids=["tea-1"], filter="price > 1"
        )
        assert list(explained.verdicts) == [
            Verdict.FILTER_VERDICT_EXCLUDED,
            Verdict.FILTER_VERDICT_IN_CART,
            Verdict.FILTER_VERDICT_FILTER_EXPRESSION,
        ]
        assert explained.position == explained.position_by_score == 0
        assert "excludes it" in explained.findings[0]
        assert explained.score == 7

    def test_an_item_that_nobody_knows_is_not_found(self, shop: Shop) -> None:
        error = failure(lambda: self.explain(shop, "unheard-of"))
        assert isinstance(error, NotFound)
        assert (error.reason, error.metadata) == ("ITEM_NOT_FOUND", {"itemId": "unheard-of"})


class TestOtherQuestions:
    def test_similar_items_are_alike_or_chosen_after(self, shop: Shop) -> None:
        answer = shop.stub.SimilarItems(
            pb.SimilarItemsRequest(item_id="shoe-1", include_explanations=True, page_size=3)
        )
        assert ids(answer) == ["hat", "shoe-2", "shoe-3"]
        # cosine 0.707 + 0.5 * log(1 + 30 * 0.9)
        assert answer.items[0].score == pytest.approx(np.sqrt(0.5) + 0.5 * np.log1p(27), abs=1e-4)
        assert answer.items[1].score == pytest.approx(1.0)
        assert [reason.kind for reason in answer.items[0].reasons] == [
            Reason.KIND_BOUGHT_TOGETHER,
            Reason.KIND_SIMILAR_TO,
        ]
        assert failure(lambda: shop.stub.SimilarItems(pb.SimilarItemsRequest(item_id="no"))).reason == (
            "ITEM_NOT_FOUND"
        )

    def test_an_item_newer_than_the_model_gets_its_category(self, shop: Shop) -> None:
        shop.profile.upsert(
            item("fresh", category_path=["shoes"]),
            *(item(f"shoe-{n}", category_path=["shoes"]) for n in (1, 2)),
        )
        eventually(lambda: "fresh" in ids(recommend(shop)))
        answer = shop.stub.SimilarItems(pb.SimilarItemsRequest(item_id="fresh"))
        assert ids(answer) == ["shoe-1", "shoe-2"]
        assert causes(answer) == {"ITEM_UNKNOWN_TO_MODEL"}

    def test_together_is_co_occurrence_alone(self, shop: Shop) -> None:
        request = pb.FrequentlyBoughtTogetherRequest(item_ids=["tea-1", "shoe-1"], include_explanations=True)
        answer = shop.stub.FrequentlyBoughtTogether(request)
        assert ids(answer) == ["hat", "tea-3"]
        assert answer.items[1].reasons[0].source_item_id == "tea-1"
        alone = shop.stub.FrequentlyBoughtTogether(pb.FrequentlyBoughtTogetherRequest(item_ids=["hat"]))
        assert not alone.items

    def test_a_cart_is_completed(self, shop: Shop) -> None:
        answer = shop.stub.RecommendForCart(
            pb.RecommendForCartRequest(cart_item_ids=["shoe-1"], include_explanations=True)
        )
        assert "shoe-1" not in ids(answer)
        hat = next(entry for entry in answer.items if entry.item_id == "hat")
        assert hat.reasons[0].text == "Because Title of shoe-1 is in your cart"

    def test_what_was_bought_twice_comes_before_what_was_bought_once(self, shop: Shop) -> None:
        key, day = shop.user_key("hal"), 86_400
        now = time.time()
        for days_ago in (60, 30):
            shop.profile.record(key, ("tea-1", BUY), at=now - days_ago * day)
        shop.profile.record(key, ("hat", BUY), at=now - 30 * day)
        shop.profile.record(key, ("shoe-1", VIEW), at=now)
        request = pb.BuyItAgainRequest(user_id="hal", include_explanations=True)
        eventually(lambda: len(shop.stub.BuyItAgain(request).items) == 2)
        answer = shop.stub.BuyItAgain(request)
        assert ids(answer) == ["tea-1", "hat"]
        assert [entry.purchase_count for entry in answer.items] == [2, 1]
        assert abs(answer.items[0].expected_time.seconds - now) < 5
        assert not answer.items[1].HasField("expected_time")
        assert answer.items[0].reasons[0].text == "You have bought Title of tea-1 2 times"
        assert failure(lambda: shop.stub.BuyItAgain(pb.BuyItAgainRequest())).reason == "INVALID_REQUEST"

    def test_trending_counts_the_window(self, shop: Shop) -> None:
        for n in range(3):
            shop.profile.record(shop.user_key(f"u{n}"), ("shoe-3", VIEW))
        shop.profile.record(shop.user_key("old"), *([("hat", VIEW)] * 4), at=time.time() - 3 * 86_400)
        shop.profile.record(shop.user_key("u9"), ("hat", VIEW))
        eventually(lambda: len(shop.stub.Trending(pb.TrendingRequest()).items) == 2)
        eventually(lambda: ids(shop.stub.Trending(pb.TrendingRequest())) == ["shoe-3", "hat"])
        week = pb.TrendingRequest(window=Duration(seconds=7 * 86_400), include_explanations=True)
        eventually(lambda: ids(shop.stub.Trending(week)) == ["hat", "shoe-3"])
        assert shop.stub.Trending(week).items[0].reasons[0].contribution >= 2

    def test_the_attribution_token_knows_the_page(self, shop: Shop) -> None:
        answer = recommend(shop, placement="email", variant="b", page_size=3)
        token = AttributionToken.verify(shop.signer, answer.attribution_token)
        assert token.placement == "email"
        assert token.variant == "b"
        assert token.serving_config == "default"
        assert token.model_version == answer.model.version != ""
        assert [token.position_of(item_id) for item_id in ids(answer)] == [1, 2, 3]
        assert token.propensities_K.tolist() == [1, 1, 1]

    def test_built_in_configs_are_listed_and_read(self, shop: Shop) -> None:
        listed = shop.stub.ListServingConfigs(pb.ListServingConfigsRequest(page_size=2))
        assert [config.serving_config_id for config in listed.serving_configs] == ["default", "popular"]
        rest = shop.stub.ListServingConfigs(pb.ListServingConfigsRequest(page_token=listed.next_page_token))
        assert [config.serving_config_id for config in rest.serving_configs] == ["similar"]
        assert not rest.next_page_token
        got = shop.stub.GetServingConfig(pb.GetServingConfigRequest(serving_config_id="popular"))
        assert got.built_in
        error = failure(lambda: recommend(shop, serving_config="nope"))
        assert (error.reason, error.metadata) == ("SERVING_CONFIG_NOT_FOUND", {"servingConfigId": "nope"})

    def test_every_wrong_field_is_named_at_once(self, shop: Shop) -> None:
        error = failure(
            lambda: recommend(
                shop,
                user_key=b"short",
                placement="No Spaces",
                page_size=-1,
                exclude_item_ids=["ok", ""],
                context_events=[{"item_id": "x", "kind": 99}],
                variant="ü" * 100,
            )
        )
        assert isinstance(error, InvalidInput)
        assert {violation.field for violation in error.violations} == {
            "user_key",
            "placement",
            "page_size",
            "exclude_item_ids[1]",
            "context_events[0].kind",
            "variant",
        }

    def test_the_status_tells_model_and_streams(self, shop: Shop) -> None:
        status = shop.stub.GetModelStatus(pb.GetModelStatusRequest())
        assert status.models[0].version == recommend(shop).model.version
        assert (status.models[0].item_count, status.models[0].dimension) == (7, 2)
        assert {stream.name: stream.connected for stream in status.streams} == {
            "profiles": True,
            "items": True,
        }
        assert not status.degraded
