"""Popular with whom: counted by segment, named in the trace, and true of the score."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shopkeeper.profile.v1 import user_portrait_pb2
from shopkeeper.recommend.v1 import recommend_service_pb2 as pb
from shopkeeper.recommend.v1 import recommendation_pb2

from services.recommend.domain.live_counts import HALF_LIFE_SECONDS, LiveCounts
from services.recommend.domain.segment_counts import MAX_SEGMENTS, MIN_EVENTS, SegmentCounts
from services.recommend.use_cases.scoring import SEGMENT_PRIOR_EVENTS
from shared.event_kinds import EventKind
from tests.recommend.shop import Shop, eventually, ids, item
from tests.recommend.test_rules import create, explain, mine
from tests.recommend.test_service import IDS, VECTORS, recommend
from tests.recommend.test_weighted_sum import SUM, sources

VIEW = int(EventKind.ITEM_VIEW)
Reason = recommendation_pb2.Reason
SOURCE = recommendation_pb2.CANDIDATE_SOURCE_POPULAR_IN_SEGMENT


@pytest.fixture
def shop(make_shop: Callable[..., Shop]) -> Shop:
    """Tea is popular with all; hikers want the hat, and runners, who are few, shoes."""
    shop = make_shop()
    shop.publish(IDS, VECTORS)
    shop.profile.upsert(*(item(item_id) for item_id in IDS))
    shop.start()
    for n in range(80):
        walks(shop, f"hiker-{n}", "hat", "hikers")
    for n in range(60):
        walks(shop, f"runner-{n}", "shoe-2", "hikers", "runners")
    counts = shop.service._servicer._recommender._scoring._counts  # type: ignore[union-attr]
    eventually(lambda: counts.event_count == 140)
    return shop


def walks(shop: Shop, user_id: str, item_id: str, *segments: str) -> None:
    shop.profile.segments[shop.user_key(user_id)] = list(segments)
    shop.profile.record(shop.user_key(user_id), (item_id, EventKind.ITEM_VIEW))


def arrives(shop: Shop, user_id: str, *segments: str) -> str:
    """A person of whom nothing but their segments is known."""
    shop.profile.segments[shop.user_key(user_id)] = list(segments)
    return user_id


def test_a_new_person_gets_what_is_popular_in_the_narrowest_of_their_segments(shop: Shop) -> None:
    assert ids(recommend(shop, page_size=1)) == ["tea-1"], "nobody in particular"
    assert ids(recommend(shop, user_id=arrives(shop, "new-1", "hikers"), page_size=1)) == ["hat"]
    both = recommend(
        shop, user_id=arrives(shop, "new-2", "hikers", "runners"), page_size=7, include_explanations=True
    )
    assert ids(both)[0] == "shoe-2"
    assert sorted(ids(both)) == sorted(IDS), "what the segment has not touched follows by popularity"
    reason = both.items[0].reasons[0]
    assert (reason.kind, reason.segment_id, reason.text) == (
        Reason.KIND_POPULAR_IN_SEGMENT,
        "runners",
        "Popular in runners",
    )
    assert both.items[1].reasons[0].kind == Reason.KIND_POPULAR
    # What the request itself says comes before any segment.
    told = recommend(shop, user_id="new-2", context_events=[{"item_id": "tea-2"}], page_size=1)
    assert ids(told)[0].startswith("tea")


def test_a_segment_of_which_little_is_known_is_passed_over(shop: Shop) -> None:
    walks(shop, "loner", "shoe-3", "hermits")
    found = recommend(shop, user_id=arrives(shop, "new-3", "hermits"), include_explanations=True)
    reason = found.items[0].reasons[0]
    # Everybody here has yet to buy, as has who is new.
    assert (ids(found)[0], reason.segment_id) == ("hat", "stage:prospect")
    assert reason.text == "Popular with newcomers"


def test_the_stage_of_life_is_a_segment_that_everybody_has(shop: Shop) -> None:
    stage = user_portrait_pb2.LIFE_CYCLE_STAGE_LOYAL
    for n in range(60):
        shop.profile.stages[shop.user_key(f"loyal-{n}")] = stage
        shop.profile.record(shop.user_key(f"loyal-{n}"), ("shoe-3", EventKind.ITEM_VIEW))
    shop.profile.stages[shop.user_key("new-4")] = stage

    def reason() -> recommendation_pb2.Reason:
        return recommend(shop, user_id="new-4", include_explanations=True).items[0].reasons[0]

    eventually(lambda: reason().segment_id == "stage:loyal")
    assert reason().text == "Popular with loyal customers"


def test_who_does_not_consent_is_in_no_segment(shop: Shop) -> None:
    arrives(shop, "private", "hikers")
    shop.profile.consents[shop.user_key("private")] = False
    assert ids(recommend(shop, user_id="private", page_size=1)) == ["tea-1"]


def test_the_control_arm_knows_no_segment(shop: Shop) -> None:
    found = recommend(shop, user_id=arrives(shop, "new-5", "hikers"), serving_config="popular", page_size=1)
    assert ids(found) == ["tea-1"]


def test_a_serving_config_weighs_it_and_the_trace_names_it(shop: Shop) -> None:
    create(shop, {}, scorer=SUM, sources=sources(popular=1.0, popular_in_segment=3.0))
    found = mine(shop, user_id=arrives(shop, "new-6", "hikers"), page_size=2, include_explanations=True)
    assert ids(found)[0] == "hat"
    reason = found.items[0].reasons[0]
    assert (reason.kind, reason.segment_id) == (Reason.KIND_POPULAR_IN_SEGMENT, "hikers")
    assert reason.contribution == pytest.approx(3.0)
    why = explain(shop, "hat", user_id="new-6")
    score = next(entry for entry in why.source_scores if entry.source == SOURCE)
    assert score.rank == 1
    assert score.score == pytest.approx(80, rel=0.01)
    assert "popular_in_segment 3 x 2 candidates in hikers" in " ".join(
        stage.detail for stage in why.trace.stages
    )


def test_the_score_is_the_documented_mean_and_explain_takes_it_apart(shop: Shop) -> None:
    """Popularity is 7, 6, … 1 of 28: hat has one twenty-eighth of the prior, and 80 events."""
    arrives(shop, "new-7", "hikers")
    explanation = shop.stub.Explain(
        pb.ExplainRequest(request=pb.RecommendRequest(user_id="new-7"), item_id="hat"), timeout=5
    )
    prior = SEGMENT_PRIOR_EVENTS * 1 / 28
    assert explanation.score == pytest.approx(80 + prior, rel=0.01)
    parts = {entry.source: entry.contribution for entry in explanation.source_scores}
    assert parts[SOURCE] == pytest.approx(80, rel=0.01)
    assert parts[recommendation_pb2.CANDIDATE_SOURCE_POPULAR] == pytest.approx(prior, rel=0.01)
    assert sum(parts.values()) == pytest.approx(explanation.score)


EVENTS = st.lists(
    st.tuples(
        st.integers(0, 5),  # the shopper
        st.integers(0, 4),  # the item
        st.floats(0, 200).map(lambda days: days * 86_400.0),
    ),
    max_size=60,
)
SEGMENTS_OF = {0: ("a",), 1: ("a", "b"), 2: ("b",), 3: (), 4: ("c",), 5: ("a", "b", "c")}


@settings(max_examples=150, deadline=None)
@given(events=EVENTS)
def test_counts_by_segment_agree_with_adding_up_event_by_event(events: list[tuple[int, int, float]]) -> None:
    events = sorted(events, key=lambda event: event[2])
    counts = LiveCounts()
    counted: list[tuple[int, int, float]] = []
    newest_of: dict[int, float] = {}
    for user, row, time in events:
        counts.record(
            bytes([user]), np.array([row], np.int32), np.array([VIEW]), np.array([time]), SEGMENTS_OF[user]
        )
        # Not later than what was counted before: it is taken for a repetition.
        if time > newest_of.get(user, -np.inf):
            newest_of[user] = time
            counted.append((user, row, time))
    now = 200 * 86_400.0
    for segment in "abc":
        naive: dict[int, float] = {}
        for user, row, time in counted:
            if segment in SEGMENTS_OF[user]:
                naive[row] = naive.get(row, 0.0) + 2.0 ** ((time - now) / HALF_LIFE_SECONDS)
        found = counts.popularity_in([segment], now)
        if sum(naive.values()) < MIN_EVENTS:
            assert found is None
    # Below the threshold of the service: the sums themselves.
    segments = counts._segments
    for segment in "abc":
        naive = {}
        for user, row, time in counted:
            if segment in SEGMENTS_OF[user]:
                naive[row] = naive.get(row, 0.0) + 2.0 ** ((time - now) / HALF_LIFE_SECONDS)
        if naive:
            assert counts._landmark is not None
            scale = 2.0 ** (-(now - counts._landmark) / HALF_LIFE_SECONDS)
            weight_of = segments._segments[segment].weight_of
            assert {row: weight * scale for row, weight in weight_of.items()} == pytest.approx(naive)


def test_arrays_are_never_more_than_one_in_a_hundred_behind() -> None:
    counts = SegmentCounts()
    one = np.ones(1)
    for n in range(1_000):
        counts.add(["s"], np.array([n % 7], np.int32), one)
        found = counts.narrowest(["s"], 1.0)
        if n + 1 >= MIN_EVENTS:
            assert found is not None
            assert n + 1 - found.counts.sum() <= 0.01 * (n + 1)


def test_the_segment_that_was_silent_longest_gives_way() -> None:
    counts = SegmentCounts()
    row, weight = np.zeros(1, np.int32), np.full(1, 100.0)
    for n in range(MAX_SEGMENTS):
        counts.add([f"s{n}"], row, weight)
    counts.add(["s0"], row, weight)
    counts.add(["new"], row, weight)
    assert counts.narrowest(["s1"], 1.0) is None
    assert counts.narrowest(["s0"], 1.0) is not None
