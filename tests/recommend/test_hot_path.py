"""What was made cheap still says the same."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from shopkeeper.profile.v1 import item_pb2
from shopkeeper.recommend.v1 import recommendation_pb2

from services.recommend.clients.catalog import wire_record_of
from services.recommend.clients.metrics import StageSeconds
from services.recommend.domain.history import History
from services.recommend.domain.ranking import top_rows


@settings(deadline=None, max_examples=150)
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.integers(1, 5000),
    count=st.integers(1, 150),
    levels=st.sampled_from([2, 30, 10_000]),
    missing=st.floats(0, 1),
)
def test_the_best_rows_are_those_of_a_full_sort(
    seed: int, size: int, count: int, levels: int, missing: float
) -> None:
    random = np.random.default_rng(seed)
    score_R = random.integers(0, levels, size).astype(np.float32)
    score_R[random.random(size) < missing] = -np.inf
    eligible_R = random.random(size) < 0.8
    rows = [r for r in range(size) if eligible_R[r] and score_R[r] > -np.inf]
    expected = sorted(rows, key=lambda r: (-score_R[r], r))[:count]
    assert top_rows(score_R, eligible_R, count).tolist() == expected


def test_a_record_goes_out_without_margin_and_pictures() -> None:
    item = item_pb2.Item(item_id="tea", title="Tea", margin_micros=5, image_bytes=b"\x00" * 9)
    wire = wire_record_of(item)
    entry = recommendation_pb2.RecommendedItem.FromString(wire)
    assert entry.item_id == "tea"
    assert entry.item == item_pb2.Item(item_id="tea", title="Tea")


def test_what_follows_from_a_history_is_made_once_a_version() -> None:
    history = History(np.array([3], np.int32), np.array([3], np.int32), np.array([1.0]))
    made: list[str] = []

    def make(version: str) -> str:
        made.append(version)
        return version

    for version in ("a", "a", "b", "b", "a"):
        assert history.derived("read", version, lambda version=version: make(version)) == version  # type: ignore[misc]
    assert made == ["a", "b", "a"]


def test_stage_times_are_a_histogram_of_prometheus() -> None:
    seconds, registry = StageSeconds(), CollectorRegistry()
    registry.register(seconds)
    for took in (0.0001, 0.00011, 0.3, 2.0):
        seconds.observe([("score", took)])
    lines = generate_latest(registry).decode().splitlines()
    name = "shopkeeper_recommend_seconds"
    assert f'{name}_bucket{{le="0.0001",stage="score"}} 1.0' in lines
    assert f'{name}_bucket{{le="0.0002",stage="score"}} 2.0' in lines
    assert f'{name}_bucket{{le="0.5",stage="score"}} 3.0' in lines
    assert f'{name}_bucket{{le="+Inf",stage="score"}} 4.0' in lines
    assert f'{name}_count{{stage="score"}} 4.0' in lines
    assert f'{name}_sum{{stage="score"}} 2.30021' in lines
