"""What no caller should send is refused by its field, and is no fault of the service."""

from __future__ import annotations

import pytest
from shopkeeper.trainer.v1 import training_run_pb2

from services.trainer.converters import comment, config_from_proto
from shared.errors import InvalidInput


@pytest.mark.parametrize("name", ["start_time", "end_time"])
@pytest.mark.parametrize(
    ("seconds", "nanos"), [(10**12, 0), (-(10**12), 0), (2**63 - 1, 0), (0, -1), (0, 2**31 - 1)]
)
def test_a_time_that_no_calendar_has_is_refused_by_its_field(name: str, seconds: int, nanos: int) -> None:
    config = training_run_pb2.TrainingConfig()
    moment = getattr(config.window, name)
    moment.seconds, moment.nanos = seconds, nanos
    with pytest.raises(InvalidInput) as caught:
        config_from_proto(config)
    assert [violation.field for violation in caught.value.violations] == [f"config.window.{name}"]


@pytest.mark.parametrize("words", ["a\0b", "x" * 1025])
def test_a_comment_that_no_database_keeps_is_refused(words: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        comment(words)
    assert [violation.field for violation in caught.value.violations] == ["comment"]
