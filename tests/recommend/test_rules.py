"""What a shop wants is done, at run time, on every replica, and said."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from shopkeeper.recommend.v1 import recommend_service_pb2 as pb
from shopkeeper.recommend.v1 import recommendation_pb2, rule_pb2
from shopkeeper.recommend.v1.serving_config_pb2 import ServingConfig

from shared.errors import Aborted, AlreadyExists, FailedPrecondition, InvalidInput, NotFound
from tests.recommend.shop import Shop, eventually, ids, item
from tests.recommend.test_service import failure, recommend

# Popularity falls with the place in the list; three brands, two shelves.
IDS = [f"i{n}" for n in range(12)]
VECTORS = np.array([[3 - n / 10, 1 + n / 20] for n in range(12)], np.float32)
Reason = recommendation_pb2.Reason
Verdict = recommendation_pb2.FilterVerdict
Scorer = ServingConfig.Scorer


def record(n: int, **more: Any) -> Any:
    return item(
        f"i{n}",
        price=float(n + 1),
        brand=f"b{n % 3}",
        category_path=["all", "tea" if n < 6 else "shoes"],
        **more,
    )


@pytest.fixture
def shop(make_shop: Callable[..., Shop]) -> Shop:
    shop = make_shop(configuration_poll_seconds=0.02)
    shop.publish(IDS, VECTORS)
    shop.profile.upsert(*(record(n) for n in range(12)))
    return shop.start()


def create(shop: Shop, rules: dict[str, dict[str, Any]], **config: Any) -> None:
    """Creates rules and a serving config "mine" that names them in order."""
    for rule_id, fields in rules.items():
        shop.stub.CreateRule(pb.CreateRuleRequest(rule_id=rule_id, rule=rule_pb2.Rule(**fields)))
    config.setdefault("scorer", Scorer.SCORER_POPULARITY)
    shop.stub.CreateServingConfig(
        pb.CreateServingConfigRequest(
            serving_config_id="mine", serving_config=ServingConfig(rule_ids=list(rules), **config)
        )
    )


def mine(shop: Shop, **fields: Any) -> pb.RecommendResponse:
    return recommend(shop, serving_config="mine", **fields)


def rule_reasons(answer: pb.RecommendResponse) -> dict[str, list[str]]:
    found = {
        entry.item_id: [reason.rule_id for reason in entry.reasons if reason.kind == Reason.KIND_RULE]
        for entry in answer.items
    }
    return {item_id: rule_ids for item_id, rule_ids in found.items() if rule_ids}


def explain(shop: Shop, item_id: str, **fields: Any) -> pb.ExplainResponse:
    request = pb.RecommendRequest(serving_config="mine", **fields)
    return shop.stub.Explain(pb.ExplainRequest(request=request, item_id=item_id))


class TestWhatRulesDo:
    def test_a_pin_puts_an_item_in_its_place_and_says_so(self, shop: Shop) -> None:
        create(shop, {"p": {"pin": {"pins": [{"item_id": "i9", "position": 2}]}}})
        answer = mine(shop, page_size=4, include_explanations=True)
        assert ids(answer) == ["i0", "i9", "i1", "i2"]
        assert rule_reasons(answer) == {"i9": ["p"]}
        assert [entry.position for entry in answer.items] == [1, 2, 3, 4]

    def test_a_pin_for_a_later_page_waits_there_and_nothing_repeats(self, shop: Shop) -> None:
        create(shop, {"p": {"pin": {"pins": [{"item_id": "i0", "position": 6}]}}})
        seen: list[str] = []
        token = ""
        while True:
            answer = mine(shop, page_size=4, page_token=token)
            seen += ids(answer)
            if not (token := answer.next_page_token):
                break
        assert seen.index("i0") == 5
        assert sorted(seen) == sorted(IDS)

    def test_no_pin_brings_back_what_is_sold_out_or_excluded(self, shop: Shop) -> None:
        create(
            shop,
            {
                "p": {"pin": {"pins": [{"item_id": "i9", "position": 1}, {"item_id": "i8", "position": 2}]}},
                "x": {"exclude": {"filter": 'item_id: ANY("i8")'}},
            },
        )
        shop.profile.upsert(record(9, stock_quantity=0))
        eventually(lambda: "i9" not in ids(mine(shop, page_size=12)))
        assert ids(mine(shop, page_size=2)) == ["i0", "i1"]

    def test_a_boost_raises_by_standard_deviations_before_the_cut(self, shop: Shop) -> None:
        create(shop, {"b": {"boost": {"filter": 'brand: ANY("b2")', "amount": 10}}})
        answer = mine(shop, page_size=5, include_explanations=True)
        assert ids(answer) == ["i2", "i5", "i8", "i11", "i0"]
        assert set(rule_reasons(answer)) == {"i2", "i5", "i8", "i11"}
        boosted = next(r for r in answer.items[0].reasons if r.kind == Reason.KIND_RULE)
        # Popularity is 12, 11, ..., 1.
        assert boosted.contribution == pytest.approx(10 * np.arange(1, 13).std(), rel=1e-5)
        # The score stays that of the model: rules act on the order.
        assert answer.items[0].score == 10
        assert answer.items[0].reasons[-1].kind == Reason.KIND_POPULAR

    def test_a_bury_lowers(self, shop: Shop) -> None:
        create(shop, {"b": {"bury": {"filter": 'category: ANY("tea")', "amount": 10}}})
        assert ids(mine(shop, page_size=7)) == ["i6", "i7", "i8", "i9", "i10", "i11", "i0"]

    def test_an_exclusion_has_a_verdict(self, shop: Shop) -> None:
        create(shop, {"x": {"exclude": {"filter": "price < 3"}}})
        answer = mine(shop, page_size=12, include_trace=True)
        assert not {"i0", "i1"} & set(ids(answer))
        counts = {entry.verdict: entry.items for entry in answer.trace.verdicts}
        assert counts[Verdict.FILTER_VERDICT_RULE] == 2
        why_not = explain(shop, "i0")
        assert list(why_not.verdicts) == [Verdict.FILTER_VERDICT_RULE]
        assert list(why_not.rule_ids) == ["x"]
        assert "merchandising rule" in why_not.findings[0]

    def test_a_cap_limits_each_kind_and_pins_count(self, shop: Shop) -> None:
        create(
            shop,
            {
                "p": {"pin": {"pins": [{"item_id": "i9", "position": 1}]}},
                "c": {"cap": {"group_by": rule_pb2.GROUP_BY_BRAND, "limit": 2}},
            },
        )
        # i9 and i0 are of brand b0: i3 is the third.
        assert ids(mine(shop, page_size=6)) == ["i9", "i0", "i1", "i2", "i4", "i5"]
        assert list(explain(shop, "i3", page_size=6).rule_ids) == ["c"]

    def test_a_minimum_share_is_met_with_as_little_moved_as_possible(self, shop: Shop) -> None:
        create(shop, {"s": {"minimum_share": {"filter": 'category: ANY("shoes")', "share": 0.5}}})
        answer = mine(shop, page_size=4, include_explanations=True)
        assert ids(answer) == ["i0", "i1", "i6", "i7"]
        assert rule_reasons(answer) == {"i6": ["s"], "i7": ["s"]}
        assert list(explain(shop, "i2", page_size=4).rule_ids) == ["s"]

    def test_a_share_of_what_there_is_not_leaves_the_page_whole(self, shop: Shop) -> None:
        create(shop, {"s": {"minimum_share": {"filter": 'brand: ANY("none")', "share": 1.0}}})
        assert ids(mine(shop, page_size=4)) == ["i0", "i1", "i2", "i3"]

    def test_a_rule_acts_in_its_time_and_placement_alone(self, shop: Shop) -> None:
        now = int(time.time())
        pin = {"pins": [{"item_id": "i9", "position": 1}]}
        spans = {
            "past": [{"end_time": {"seconds": now - 5}}],
            "future": [{"start_time": {"seconds": now + 3600}}],
        }
        create(
            shop,
            {
                **{name: {"pin": pin, "active_time_ranges": span} for name, span in spans.items()},
                "off": {"pin": pin, "disabled": True},
                "mail": {"pin": pin, "placements": ["email"]},
            },
        )
        assert ids(mine(shop, page_size=1)) == ["i0"]
        assert ids(mine(shop, page_size=1, placement="email")) == ["i9"]
        span = rule_pb2.TimeRange(start_time={"seconds": now - 5}, end_time={"seconds": now + 3600})
        changed = rule_pb2.Rule(rule_id="past", active_time_ranges=[span])
        shop.stub.UpdateRule(pb.UpdateRuleRequest(rule=changed))
        assert ids(mine(shop, page_size=1)) == ["i9"]

    def test_rules_act_on_what_is_personal_too(self, shop: Shop) -> None:
        create(
            shop,
            {"b": {"boost": {"filter": 'item_id: ANY("i11")', "amount": 10}}},
            scorer=Scorer.SCORER_BLENDED,
            diversity={"strength": 0.1},
        )
        answer = mine(shop, context_events=[{"item_id": "i0"}], page_size=3, include_explanations=True)
        assert ids(answer)[0] == "i11"
        assert [reason.kind for reason in answer.items[0].reasons] == [Reason.KIND_RULE, Reason.KIND_SEQUENCE]

    def test_a_policy_has_a_filter_of_its_own(self, shop: Shop) -> None:
        create(shop, {}, placement_policies=[{"placement": "home", "filter": "price > 10"}])
        assert ids(mine(shop)) == ["i10", "i11"]
        assert ids(mine(shop, filter="price < 12", filter_mode=pb.FILTER_MODE_FALLBACK)) == ["i10", "i11"]
        assert len(ids(mine(shop, placement="search", page_size=12))) == 12


class TestChangesAtRunTime:
    def test_what_was_created_is_read_listed_changed_and_deleted(self, shop: Shop) -> None:
        created = shop.stub.CreateRule(
            pb.CreateRuleRequest(rule_id="r", rule={"display_name": "R", "exclude": {"filter": "price < 2"}})
        )
        assert created.etag
        assert created.HasField("create_time")
        assert shop.stub.GetRule(pb.GetRuleRequest(rule_id="r")) == created
        assert list(shop.stub.ListRules(pb.ListRulesRequest()).rules) == [created]
        request = pb.CreateRuleRequest(rule_id="r", rule={"exclude": {"filter": "price < 2"}})
        assert isinstance(failure(lambda: shop.stub.CreateRule(request)), AlreadyExists)
        changed = shop.stub.UpdateRule(
            pb.UpdateRuleRequest(
                rule={"rule_id": "r", "bury": {"filter": "price < 2", "amount": 1}, "etag": created.etag},
                update_mask=FieldMask(paths=["bury"]),
            )
        )
        assert changed.WhichOneof("action") == "bury"
        assert changed.display_name == "R"
        assert changed.create_time == created.create_time
        assert changed.etag != created.etag
        stale = pb.UpdateRuleRequest(rule={"rule_id": "r", "display_name": "S", "etag": created.etag})
        error = failure(lambda: shop.stub.UpdateRule(stale))
        assert isinstance(error, Aborted)
        assert error.reason == "ETAG_MISMATCH"
        gone = pb.DeleteRuleRequest(rule_id="r", etag=changed.etag)
        shop.stub.DeleteRule(gone)
        assert isinstance(failure(lambda: shop.stub.DeleteRule(gone)), NotFound)

    def test_a_serving_config_is_versioned(self, shop: Shop) -> None:
        create(shop, {})
        got = shop.stub.GetServingConfig(pb.GetServingConfigRequest(serving_config_id="mine"))
        assert (got.version, got.built_in) == (1, False)
        update = ServingConfig(serving_config_id="mine", display_name="New", etag=got.etag)
        changed = shop.stub.UpdateServingConfig(pb.UpdateServingConfigRequest(serving_config=update))
        assert (changed.version, changed.display_name, changed.scorer) == (2, "New", got.scorer)
        error = failure(
            lambda: shop.stub.UpdateServingConfig(pb.UpdateServingConfigRequest(serving_config=update))
        )
        assert error.reason == "ETAG_MISMATCH"
        shop.stub.DeleteServingConfig(pb.DeleteServingConfigRequest(serving_config_id="mine"))
        assert failure(lambda: mine(shop)).reason == "SERVING_CONFIG_NOT_FOUND"

    def test_what_is_built_in_stays(self, shop: Shop) -> None:
        update = pb.UpdateServingConfigRequest(serving_config=ServingConfig(serving_config_id="default"))
        error = failure(lambda: shop.stub.UpdateServingConfig(update))
        assert isinstance(error, FailedPrecondition)
        assert error.reason == "SERVING_CONFIG_BUILT_IN"

    def test_every_wrong_field_is_named(self, shop: Shop) -> None:
        rule = rule_pb2.Rule(
            display_name="x" * 300, boost={"filter": "price <", "amount": 11}, placements=["No"]
        )
        error = failure(lambda: shop.stub.CreateRule(pb.CreateRuleRequest(rule_id="r", rule=rule)))
        assert isinstance(error, InvalidInput)
        assert {violation.field for violation in error.violations} == {
            "rule.display_name",
            "rule.boost.filter",
            "rule.boost.amount",
            "rule.placements[0]",
        }
        config = ServingConfig(rule_ids=["nobody"])
        request = pb.CreateServingConfigRequest(serving_config_id="c", serving_config=config)
        assert failure(lambda: shop.stub.CreateServingConfig(request)).reason == "RULE_NOT_FOUND"
        request.serving_config.CopyFrom(ServingConfig(shadow_model_alias="No Alias"))
        error = failure(lambda: shop.stub.CreateServingConfig(request))
        assert [violation.field for violation in error.violations] == ["serving_config.shadow_model_alias"]

    def test_other_replicas_follow_and_a_restart_remembers(
        self, shop: Shop, make_shop: Callable[..., Shop], tmp_path: Path
    ) -> None:
        other = make_shop(
            configuration_poll_seconds=0.02, recommend_configuration=shop.settings.configuration_path
        )
        other.publish(IDS, VECTORS)
        other.profile.upsert(*(record(n) for n in range(12)))
        other.start()
        create(shop, {"x": {"exclude": {"filter": "price < 2"}}})
        eventually(
            lambda: (
                "mine"
                in [
                    config.serving_config_id
                    for config in other.stub.ListServingConfigs(
                        pb.ListServingConfigsRequest()
                    ).serving_configs
                ]
            )
        )
        eventually(lambda: "i0" not in ids(mine(other)))
        etag = other.stub.GetRule(pb.GetRuleRequest(rule_id="x")).etag
        changed = {"rule_id": "x", "exclude": {"filter": "price < 3"}, "etag": etag}
        shop.stub.UpdateRule(pb.UpdateRuleRequest(rule=changed))
        # The other replica's writers see the newest version, though its poll may not have come yet.
        assert (
            failure(lambda: other.stub.UpdateRule(pb.UpdateRuleRequest(rule=changed))).reason
            == "ETAG_MISMATCH"
        )
        eventually(lambda: "i1" not in ids(mine(other)))

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"{",
            b"\xff\xfe",
            b"[]",
            b'{"schema": 2, "content": {}}',
            b'{"schema": 1, "version": 1, "content": {"rule_id": "other", "exclude": {"filter": "price < 2"}}}',
            b'{"schema": 1, "version": 1, "content": {"rule_id": "x", "exclude": {"filter": "price <"}}}',
            b'{"schema": 1, "version": 1, "content": {"rule_id": "x", "unheard_of": 1}}',
        ],
    )
    def test_a_bad_file_leaves_the_last_good_content_in_service(self, shop: Shop, content: bytes) -> None:
        create(shop, {"x": {"exclude": {"filter": "price < 2"}}})
        path = shop.settings.configuration_path / "rules" / "x.json"
        path.write_bytes(content)
        (path.parent / "new.json").write_bytes(content)
        marker = path.parent / "marker.json"
        document = json.loads(
            (shop.settings.configuration_path / "serving_configs" / "mine.json").read_text()
        )
        document["content"] = {"rule_id": "marker", "exclude": {"filter": "price < 1"}}
        marker.write_text(json.dumps({**document, "version": 1}))
        # Once the marker is here the bad ones have been looked at.
        eventually(
            lambda: "marker" in [rule.rule_id for rule in shop.stub.ListRules(pb.ListRulesRequest()).rules]
        )
        assert "i0" not in ids(mine(shop))
        assert isinstance(failure(lambda: shop.stub.GetRule(pb.GetRuleRequest(rule_id="new"))), NotFound)
