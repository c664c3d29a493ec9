"""Mail-outs that can be resumed, and rules that are tried before they go live."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from shopkeeper.recommend.v1 import recommend_service_pb2 as pb

from services.recommend.domain.recommendation import ListKind, Query
from services.recommend.use_cases.rehearsal import RequestRecorder, ratio_change
from shared.errors import InvalidInput
from shared.event_kinds import EventKind
from shared.identity import UserKey
from tests.recommend.shop import Shop, causes, eventually, ids
from tests.recommend.test_rules import IDS, VECTORS, record
from tests.recommend.test_service import failure, recommend


@pytest.fixture
def shop(make_shop: Callable[..., Shop]) -> Shop:
    shop = make_shop()
    shop.publish(IDS, VECTORS)
    shop.profile.upsert(*(record(n) for n in range(12)))
    return shop.start()


def batch(shop: Shop, users: list[dict[str, Any]], **fields: Any) -> list[pb.BatchRecommendResponse]:
    template = {"page_size": 3, **fields.pop("template", {})}
    request = pb.BatchRecommendRequest(template=template, users=users, **fields)
    return list(shop.stub.BatchRecommend(request, timeout=10))


class TestBatch:
    def test_everybody_gets_what_recommend_would_give(self, shop: Shop) -> None:
        shop.profile.record(shop.user_key("ann"), ("i0", EventKind.PURCHASE))
        eventually(lambda: recommend(shop, user_id="ann").freshness.events_used == 1)
        answers = batch(shop, [{"user_id": "ann"}, {"user_key": shop.user_key("bob")}])
        assert [answer.index for answer in answers] == [0, 1]
        assert ids(answers[0].response) == ids(recommend(shop, user_id="ann", page_size=3))
        assert ids(answers[1].response) == ["i0", "i1", "i2"]
        assert answers[0].response.attribution_token != answers[1].response.attribution_token

    def test_one_bad_shopper_harms_no_other(self, shop: Shop) -> None:
        answers = batch(shop, [{"user_id": "ann"}, {"user_key": b"short"}, {}, {"user_id": "bob"}])
        assert [answer.WhichOneof("outcome") for answer in answers] == [
            "response",
            "error",
            "error",
            "response",
        ]
        assert "users[1].user_key" in answers[1].error.message
        assert "users[2].user" in answers[2].error.message

    def test_it_goes_on_after_the_last_answer_received(self, shop: Shop) -> None:
        users = [{"user_id": f"u{n}"} for n in range(5)]
        first = batch(shop, users)
        rest = batch(shop, users, resume_token=first[1].resume_token)
        assert [answer.index for answer in rest] == [2, 3, 4]
        assert not rest[0].response.degraded
        assert batch(shop, users, resume_token=first[4].resume_token) == []
        for spoilt in ("forged", first[1].resume_token[:-2]):
            assert (
                failure(lambda spoilt=spoilt: batch(shop, users, resume_token=spoilt)).reason
                == "INVALID_TOKEN"
            )
        other = [*users[:4], {"user_id": "else"}]
        assert (
            failure(lambda: batch(shop, other, resume_token=first[1].resume_token)).reason == "INVALID_TOKEN"
        )

    def test_a_new_model_between_two_parts_is_said(self, shop: Shop) -> None:
        users = [{"user_id": f"u{n}"} for n in range(3)]
        token = batch(shop, users)[0].resume_token
        shop.publish(IDS, VECTORS, popularity=list(range(1, 13)))
        rest = batch(shop, users, resume_token=token)
        assert [causes(answer.response) for answer in rest] == [{"SNAPSHOT_CHANGED"}] * 2

    def test_all_answers_are_of_one_model_though_it_is_swapped_meanwhile(self, shop: Shop) -> None:
        users = [{"user_id": f"u{n}"} for n in range(600)]
        request = pb.BatchRecommendRequest(template={"page_size": 3}, users=users)
        call = shop.stub.BatchRecommend(request, timeout=60)
        versions = {next(call).response.model.version}
        new = shop.publish(IDS, VECTORS, popularity=list(range(1, 13)))
        versions |= {answer.response.model.version for answer in call}
        assert len(versions) == 1
        assert new not in versions

    def test_what_is_wrong_with_the_template_is_said_at_once(self, shop: Shop) -> None:
        wrong = {"user_id": "x", "page_token": "t", "consistency_token": "c"}
        error = failure(lambda: batch(shop, [], template=wrong))
        assert isinstance(error, InvalidInput)
        assert {violation.field for violation in error.violations} == {
            "template.user",
            "template.page_token",
            "template.consistency_token",
            "users",
        }
        nobody = {"serving_config": "nobody"}
        assert failure(lambda: batch(shop, [{}], template=nobody)).reason == "SERVING_CONFIG_NOT_FOUND"


class TestRehearsal:
    def rehearse(self, shop: Shop, rule: dict[str, Any], **fields: Any) -> pb.RehearseRuleResponse:
        return shop.stub.RehearseRule(pb.RehearseRuleRequest(rule=rule, **fields), timeout=20)

    def test_a_draft_says_what_it_displaces_and_costs(self, shop: Shop) -> None:
        for n in range(4):
            recommend(shop, user_id=f"u{n}", page_size=2)
        recommend(shop, user_id="u0", page_size=2, filter="price > 100")
        draft = {"pin": {"pins": [{"item_id": "i11", "position": 1}]}, "disabled": True}
        found = self.rehearse(shop, draft)
        assert (found.requests_replayed, found.requests_changed) == (5, 4)
        assert [(d.item_id, d.shown_before, d.shown_after) for d in found.displacements] == [
            ("i1", 4, 0),
            ("i11", 0, 4),
        ]
        # Popularity is 12 for i0, 11 for i1 and 1 for i11; places count 1 and 1 / log2(3).
        second = 1 / np.log2(3)
        clicks = (1 + 12 * second) / (12 + 11 * second) - 1
        assert found.clicks.change == pytest.approx(clicks)
        assert found.clicks.low <= found.clicks.change <= found.clicks.high
        revenue = (1 * 12 + 12 * 1 * second) / (12 * 1 + 11 * 2 * second) - 1
        assert found.revenue.change == pytest.approx(revenue)
        # It is a draft: nothing was stored, and nothing recorded.
        assert not shop.stub.ListRules(pb.ListRulesRequest()).rules
        assert self.rehearse(shop, draft).requests_replayed == 5
        assert self.rehearse(shop, draft, request_limit=2).requests_replayed == 2

    def test_a_draft_that_moves_nothing_changes_nothing(self, shop: Shop) -> None:
        recommend(shop, user_id="a", page_size=2)
        recommend(shop, user_id="b", page_size=2)
        found = self.rehearse(shop, {"exclude": {"filter": "price > 1000"}})
        assert (found.requests_replayed, found.requests_changed) == (2, 0)
        assert (found.clicks.change, found.clicks.low, found.clicks.high) == (0, 0, 0)

    def test_only_the_newest_are_kept_and_the_erased_are_forgotten(self) -> None:
        recorder = RequestRecorder(3)
        keys = [UserKey(bytes([n]) * 16) for n in range(5)]
        for key in keys:
            recorder.record(Query(ListKind.RECOMMEND, user_key=key))
        recorder.record(Query(ListKind.TRENDING))
        assert [query.user_key for query in recorder.newest(9)] == [keys[4], keys[3], keys[2]]
        recorder.forget(keys[3])
        assert [query.user_key for query in recorder.newest(1)] == [keys[4]]
        assert [query.user_key for query in recorder.newest(9)] == [keys[4], keys[2]]

    def test_the_interval_covers_the_truth_as_often_as_it_says(self) -> None:
        random, covered, runs = np.random.default_rng(3), 0, 1000
        for _ in range(runs):
            before_N = random.exponential(1.0, 200)
            after_N = before_N * random.choice([1.0, 1.3], 200)
            estimate = ratio_change(before_N, after_N)
            covered += estimate.low <= 0.15 <= estimate.high
        assert covered / runs == pytest.approx(0.95, abs=0.025)
