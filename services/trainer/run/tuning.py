"""A tuning run: a search for better hyper-parameters within a budget."""

from __future__ import annotations

import time

from services.trainer.domain.runs import Trial
from services.trainer.run.work import Work, plan_of
from shared.errors import Cancelled


def tune(work: Work) -> None:
    """Tries configurations until the budget is spent; every trial is kept as soon as it ends.

    Raises:
        ShopkeeperError: with a reason of the contract; the trials made so far are kept.
    """
    # Imported here: no other kind of run needs Optuna.
    from services.trainer.pipeline.tune import Search, TuningData

    run, task = work.run, work.run.task
    size, plan = plan_of(run.config)
    resumed = work.store.get(task.resume_run_id) if task.resume_run_id else None
    inherited = resumed.trials if resumed else ()
    known = run.trials
    if inherited and not known:
        for trial in sorted(inherited, key=lambda trial: trial.trial_number):
            work.store.add_trial(run.run_id, run.attempt, trial)
        known = inherited
    before = {trial.trial_number for trial in inherited}
    own = [trial for trial in known if trial.trial_number not in before]
    # An attempt that was cut short has spent its part of the budget.
    spent = sum(trial.elapsed_seconds for trial in own)
    work.check()
    events = work.read_log()
    attributes = work.read_catalogue(events).attributes
    search = Search(size, known, seed=run.config.seed)
    data = TuningData.of(events, attributes, size, plan, seed=run.config.seed, report=work.report)
    deadline = time.monotonic() + task.max_seconds - spent
    made = len(own)
    number = max((trial.trial_number for trial in known), default=0)
    while made < task.max_trials and time.monotonic() < deadline:
        work.check()
        number += 1
        began = time.monotonic()
        overrides = search.ask()
        departures = ", ".join(f"{name} {value:g}" for name, value in overrides.items()) or "the size itself"
        left = deadline - began
        work.report("TRAINING", f"Trial {number}: {departures}.", remaining_seconds=left)
        quality = data.quality(overrides, search, left, work.heart.should_stop)
        work.check()
        trial = Trial(number, overrides, quality, time.monotonic() - began)
        search.tell(trial)
        work.store.add_trial(run.run_id, run.attempt, trial)
        made += 1
        work.report(
            "EVALUATING",
            f"Trial {number}: validation NDCG@10 {quality:.4f}; the best so far is {search.best:.4f}.",
            metrics={"ndcg@10": quality},
            remaining_seconds=deadline - time.monotonic(),
        )
    if not work.store.finish(run.run_id, run.attempt):
        raise Cancelled("CANCELLED", "The run was cancelled.")
