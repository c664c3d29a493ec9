"""How long a training is, and how fast it learns."""

from __future__ import annotations

import pytest

from services.trainer.domain.hyper_parameters import resolve
from services.trainer.pipeline.budget import Budget
from services.trainer.pipeline.schedule import Schedule, rows_of_step


class Clock:
    """A clock that is told how late it is."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


SMALL = resolve("small", {})


def test_a_large_log_is_passed_over_twenty_times_and_a_small_one_until_it_was_steps_enough() -> None:
    assert Schedule.of(SMALL, 400).passes == 20
    assert Schedule.of(SMALL, 30).passes == 40
    # Never more often than the configuration allows.
    assert Schedule.of(SMALL, 1).passes == SMALL.max_epochs
    assert Schedule.of(resolve("small", {"max_epochs": 3}), 400).steps == 1200


def test_the_rate_rises_in_the_warm_up_and_then_falls_to_a_fiftieth() -> None:
    schedule = Schedule.of(SMALL, 100)
    rates = [schedule.rate(step) for step in range(schedule.steps + 1)]
    peak = rates.index(max(rates))
    assert peak == SMALL.warmup_steps - 1
    assert max(rates) == 1.0
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] == pytest.approx(0.02)


def test_a_shortened_schedule_falls_as_far_in_fewer_steps_and_warms_up_in_a_tenth_of_them() -> None:
    short = Schedule.of(SMALL, 100).shortened(200)
    assert short.steps == 200
    assert short.warmup_steps == 20
    assert short.rate(200) == pytest.approx(0.02)
    assert Schedule.of(SMALL, 100).shortened(10**9).steps == 2000


def test_a_small_log_makes_smaller_steps() -> None:
    assert rows_of_step(SMALL, 10_000) == SMALL.rows_per_step
    assert rows_of_step(SMALL, 160) == 10
    assert rows_of_step(SMALL, 1) == 4


def test_the_budget_keeps_what_the_refits_need_and_does_not_count_while_paused() -> None:
    clock = Clock()
    budget = Budget(140.0, 2, clock)
    budget.resume()
    assert budget.fitting_left == pytest.approx(100.0)
    clock.seconds = 40.0
    budget.pause()
    clock.seconds = 1000.0
    assert budget.left == pytest.approx(100.0)
    assert budget.affordable_steps(0.5) == 108
    budget.resume()
    clock.seconds = 1060.0
    assert budget.fitting_must_end()
    assert budget.share_of_left(0) == pytest.approx(20.0)
    assert budget.share_of_left(1) == pytest.approx(40.0)
    assert (budget.refit_passes(20), Budget(1.0, 0, clock).refit_passes(20)) == (4, 0)


def test_a_clock_that_stands_still_never_shortens_a_training() -> None:
    budget = Budget(1.0, 0, lambda: 0.0)
    budget.resume()
    assert budget.affordable_steps(0.0) is None
    assert not budget.fitting_must_end()


def test_large_holds_more_than_a_hundred_million_weights_beside_its_tables_and_its_code_runs_when_made_narrow() -> (
    None
):
    import numpy as np

    from services.trainer.pipeline.dataset import Cleaning, ItemAttributes, clean
    from services.trainer.pipeline.sequence_model import SequenceModel
    from services.trainer.pipeline.training import train
    from tests.trainer.conftest import columns_of, walk

    large = resolve("large", {})
    narrow = resolve("large", {"dimension": 32, "max_history": 16, "batch_tokens": 64, "max_epochs": 1})
    histories = clean(columns_of(walk(users=12, items=10)), Cleaning())
    model = SequenceModel(
        histories.item_count, ItemAttributes(np.zeros((10, 0), np.int32), 0), narrow, seed=0
    )
    budget = Budget(60.0, 0, lambda: 0.0)
    budget.resume()
    _, reports = train(model, histories, lambda: 0.5, lambda _: None, budget)
    assert len(reports) == 1
    assert np.isfinite(reports[0].loss)

    def matrices(size) -> int:
        return size.blocks * 12 * size.dimension**2

    # Matrices of 12 D^2 a block, beside vectors.
    weights = sum(int(np.prod(variable.shape)) for variable in model.dense)
    assert matrices(narrow) < weights < 1.2 * matrices(narrow)
    assert matrices(large) > 100e6


def tiny_training(clock: Clock, seconds: float):  # type: ignore[no-untyped-def]
    """Returns a model, histories and a budget of 20 passes, of which every second is measured."""
    import numpy as np

    from services.trainer.pipeline.dataset import Cleaning, ItemAttributes, clean
    from services.trainer.pipeline.sequence_model import SequenceModel
    from tests.trainer.conftest import columns_of, walk

    size = resolve("tiny", {"max_epochs": 20, "negatives": 8, "patience": 100})
    histories = clean(columns_of(walk(users=40, items=30)), Cleaning())
    attributes = ItemAttributes(np.zeros((histories.item_count, 0), np.int32), 0)
    budget = Budget(seconds, 0, clock)
    budget.resume()
    return SequenceModel(histories.item_count, attributes, size, seed=0), histories, budget


@pytest.mark.parametrize(
    "out_of_time", ["before_the_first_step", "after_an_unmeasured_pass", "while_measuring"]
)
def test_every_pass_that_is_reported_made_steps_and_the_last_is_measured_whenever_time_runs_out(
    out_of_time: str,
) -> None:
    import numpy as np

    from services.trainer.pipeline.training import EpochReport, PassCurve, train

    clock = Clock()
    model, histories, budget = tiny_training(clock, 100.0)
    told: list[EpochReport] = []
    curves: list[tuple[int, PassCurve]] = []
    if out_of_time == "before_the_first_step":
        clock.seconds = 1000.0

    def validate() -> float:
        if out_of_time == "while_measuring":
            clock.seconds = 1000.0
        return 0.5

    def on_epoch(report: EpochReport) -> None:
        told.append(report)
        if out_of_time == "after_an_unmeasured_pass":
            clock.seconds = 1000.0

    _, reports = train(
        model,
        histories,
        validate,
        on_epoch,
        budget,
        on_curve=lambda step, curve: curves.append((step, curve)),
    )

    assert reports == told
    a_pass = reports[0].steps_per_epoch
    assert a_pass > 1
    # A pass for which there is no time is not begun, or makes the one step that lets it be measured.
    assert [report.step for report in reports] == {
        "before_the_first_step": [1],
        "after_an_unmeasured_pass": [a_pass, a_pass + 1],
        "while_measuring": [a_pass, 2 * a_pass],
    }[out_of_time]
    assert all(report.loss > 0 for report in reports)
    assert reports[-1].validation_ndcg == 0.5
    assert [step for step, _ in curves] == [report.step for report in reports]
    assert sum(len(curve.loss_S) for _, curve in curves) == reports[-1].step
    for (_, curve), report in zip(curves, reports, strict=True):
        assert curve.loss_S.min() <= report.loss <= curve.loss_S.max()
        assert np.all(curve.rate_S > 0)


def test_a_refit_whose_time_is_over_before_its_first_step_has_made_no_pass() -> None:
    import numpy as np

    from services.trainer.pipeline.training import refit

    model, histories, _ = tiny_training(Clock(), 1.0)
    told: list[float] = []
    asked = iter([False, True])
    passes = refit(
        model, histories, 3, np.random.default_rng(0), lambda: next(asked, True),
        lambda _made, loss: told.append(loss),
    )  # fmt: skip
    assert (passes, told) == (0, [])
    assert model.step_count.numpy() == 0
