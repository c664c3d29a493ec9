"""docs/serving.md says what the service does."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shopkeeper.recommend.v1 import recommend_service_pb2, recommendation_pb2, rule_pb2
from shopkeeper.recommend.v1.serving_config_pb2 import ServingConfig

from services.recommend.domain.source import Source
from services.recommend.settings import RecommendSettings
from shared.settings import ServiceSettings
from tests.recommend.shop import Shop, eventually
from tests.recommend.test_rules import IDS, VECTORS, record

MANUAL = Path(__file__).resolve().parents[2] / "docs" / "serving.md"


def test_every_setting_of_the_service_is_in_the_manual_with_its_default() -> None:
    rows = dict(re.findall(r"^\| `SHOPKEEPER_([A-Z_]+)` \| ([^|]+) \|", MANUAL.read_text(), re.MULTILINE))
    own = {
        name: field
        for name, field in RecommendSettings.model_fields.items()
        if name not in ServiceSettings.model_fields
    }
    assert {name.lower() for name in rows} == set(own)
    for name, field in own.items():
        told = rows[name.upper()].strip()
        expected = "`<registry>/../configuration`" if field.default is None else str(field.default)
        assert told == expected, name


def test_every_source_that_can_be_weighed_is_in_the_manual() -> None:
    table = MANUAL.read_text().partition("source of a weighted sum")[2].partition("\n\n")[0]
    named = set(re.findall(r"^\| `([A-Z_]+)` \|", table, re.MULTILINE))
    assert named == {source.name for source in Source} - {"RULE"}


def test_the_examples_run(make_shop: Callable[..., Shop]) -> None:
    shop = make_shop()
    shop.publish(IDS, VECTORS)
    shop.profile.upsert(*(record(n, stock_quantity=5) for n in range(12)))
    shop.start()
    names: dict[str, Any] = {
        "recommend": shop.stub,
        "pb": recommend_service_pb2,
        "recommendation_pb2": recommendation_pb2,
        "rule_pb2": rule_pb2,
        "ServingConfig": ServingConfig,
    }
    examples = re.findall(r"^```python\n(.*?)^```", MANUAL.read_text(), re.MULTILINE | re.DOTALL)
    assert len(examples) == 2
    for example in examples:
        exec(example, names)
    assert {entry.item_id for entry in names["answer"].items} == {f"i{n}" for n in range(6)}
    request = recommend_service_pb2.RecommendRequest(
        serving_config="spring", context_events=[{"item_id": "i5"}], include_trace=True
    )
    eventually(lambda: shop.stub.Recommend(request).model.serving_config == "spring")
    stages = {stage.name: stage.detail for stage in shop.stub.Recommend(request).trace.stages}
    assert stages["score"].startswith("sequence 1 x ")
