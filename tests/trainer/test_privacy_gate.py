"""The gate of a private run: every clause, from noisy measures alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from services.trainer.pipeline.dataset import Cleaning
from services.trainer.pipeline.evaluation import Contestants
from services.trainer.pipeline.gate import MIN_TEST_USERS, Verdict
from services.trainer.pipeline.plan import Plan
from services.trainer.privacy.measuring import NoisyMeasures
from services.trainer.privacy.training import Served, judge_privately
from shared.bundle.manifest import ScoringParameters
from shared.bundle.scoring import Companion, CooccurrenceMatrix
from shared.ranking_metrics import Interval

MEASURED = NoisyMeasures(500.0, {}, {}, Interval(0.02, 0.01, 0.03), 4.0)
EMPTY = CooccurrenceMatrix(np.zeros(2, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32))
ZERO = np.zeros(1, np.float32)
SERVED = Served(
    Contestants(np.zeros((1, 2), np.float32), ZERO, Companion(ScoringParameters(0.0), EMPTY), ZERO, ZERO),
    b"", 4, 1e-6, 0.2, {},
)  # fmt: skip
PLAN = Plan(Cleaning(), max_size_bytes=100)


def failed(verdict: Verdict) -> list[str]:
    assert (verdict.verdict == "PASSED") == all(check.passed for check in verdict.checks)
    return [check.name for check in verdict.checks if not check.passed]


def test_good_noisy_measures_pass() -> None:
    assert failed(judge_privately(MEASURED, SERVED, 100, PLAN)) == []


@pytest.mark.parametrize(
    ("measured", "served", "size_bytes", "name"),
    [
        ({"people": MIN_TEST_USERS - 1.0}, {}, 100, "enough_people"),
        ({"lead": Interval(0.02, -0.001, 0.04)}, {}, 100, "beats_popularity"),
        ({}, {"parity": 1.1e-5}, 100, "parity"),
        ({}, {"parity": float("nan")}, 100, "parity"),
        ({}, {"encoder_milliseconds": 26.0}, 100, "latency"),
        ({}, {}, 101, "size"),
    ],
)
def test_each_clause_fails_by_its_name(
    measured: dict[str, object], served: dict[str, object], size_bytes: int, name: str
) -> None:
    verdict = judge_privately(
        replace(MEASURED, **measured),  # type: ignore[arg-type]
        replace(SERVED, **served),  # type: ignore[arg-type]
        size_bytes,
        PLAN,
    )
    assert failed(verdict) == [name]
    assert verdict.verdict == "FAILED"


def test_force_is_recorded_and_hides_no_finding() -> None:
    unsure = replace(MEASURED, lead=Interval(0.02, -0.001, 0.04))
    verdict = judge_privately(unsure, SERVED, 100, replace(PLAN, force=True))
    assert verdict.verdict == "FORCED"
    assert verdict.may_serve
    assert failed(verdict) == ["beats_popularity"]
