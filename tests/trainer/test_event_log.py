"""Curves for TensorBoard: what is written is read back; what cannot be written costs no run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from services.trainer.pipeline.card import draw_curve
from services.trainer.pipeline.event_log import EventLog, scalars_of, scalars_of_pass
from tests.trainer.event_files import events_in

HALF = {"value": 0.5, "low": 0.4, "high": 0.6}
MANIFEST = {
    "gate": {
        "verdict": "FAILED",
        "checks": [
            {"name": "beats_popularity", "passed": True},
            {"name": "slice_no_worse", "passed": False},
            {"name": "slice_no_worse", "passed": True},
        ],
    },
    "metrics": {"ndcg@10": HALF},
    "baselines": {"popularity": {"ndcg@10": {"value": 0.1, "low": 0.1, "high": 0.1}}},
    "slices": [{"name": "new people", "users": 7, "metrics": {"ndcg@10": HALF}}],
}


def test_curves_and_outcome_are_read_back_by_name_and_step(tmp_path: Path) -> None:
    from services.trainer.pipeline.training import PassCurve

    log = EventLog(tmp_path / "run" / "tensorboard")
    loss_S, rate_S = np.linspace(4, 2, 950), np.full(950, 1e-3)
    scalars_of_pass(log.scalars, 1000, PassCurve(3.0, loss_S, rate_S))
    picture = draw_curve([1, 2], [3.0, 2.0], [0.1, 0.2], 2)
    card = b"# Model card\n\n**Gate: FAILED.**"
    log.outcome(MANIFEST, {"card.md": card, "training_curve.png": picture, "weights.safetensors": b"no"})
    log.close()

    found = events_in(tmp_path / "run" / "tensorboard")
    losses = found.scalars["train/loss"]
    # A long pass is a hundred points, which together are its mean.
    assert len(losses) == 100
    assert losses[-1][0] == 1000
    assert losses[0] == (60, pytest.approx(loss_S[:10].mean()))
    assert found.scalars["train/learning_rate"][0] == (60, pytest.approx(1e-3))
    assert found.texts == {"card": "# Model card\n\n**Gate: FAILED.**"}
    # What is told of a picture is what it measures.
    assert found.pictures == {"card/training_curve": (660, 396, picture)}
    outcome = {name: values for name, values in found.scalars.items() if not name.startswith("train/")}
    assert outcome == {
        name: [(1000, pytest.approx(value))]
        for name, value in {
            "gate/passed": 0,
            "gate/checks/beats_popularity": 1,
            "gate/checks/slice_no_worse": 0,
            "ladder/blend/ndcg@10": 0.5,
            "ladder/blend/ndcg@10/low": 0.4,
            "ladder/blend/ndcg@10/high": 0.6,
            "ladder/popularity/ndcg@10": 0.1,
            "slices/new people/people": 7,
            "slices/new people/ndcg@10": 0.5,
            "slices/new people/ndcg@10/low": 0.4,
            "slices/new people/ndcg@10/high": 0.6,
        }.items()
    }


def test_a_short_pass_keeps_every_step() -> None:
    from services.trainer.pipeline.training import PassCurve

    told: list[tuple[int, float]] = []
    curve = PassCurve(2.0, np.array([3.0, 2.0, 1.0]), np.array([1e-3, 2e-3, 3e-3]))
    scalars_of_pass(lambda step, values: told.append((step, values["train/loss"])), 8, curve)
    assert told == [(6, 3.0), (7, 2.0), (8, 1.0)]


def test_a_directory_that_cannot_be_written_is_told_once_and_ends_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said: list[str] = []
    log = EventLog(tmp_path / "file" / "tensorboard", said.append)
    log.scalars(1, {"train/loss": 1.0})
    log.scalars(2, scalars_of(MANIFEST))
    log.text("card", "#")
    log.close()
    assert len(said) == 1
    assert "the run goes on without" in said[0]
