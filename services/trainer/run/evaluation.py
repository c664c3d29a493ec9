"""An evaluation run: a published version on a split of today's log."""

from __future__ import annotations

from services.trainer.pipeline.evaluate import evaluate_version
from services.trainer.run.work import Work, plan_of
from shared.bundle import Registry, load_bundle
from shared.errors import Cancelled
from shared.keys import read_verifying_key


def evaluate(work: Work) -> None:
    """Measures the version that the run names, and keeps the measures with the run.

    Raises:
        ShopkeeperError: with a reason of the contract.
    """
    run = work.run
    _, plan = plan_of(run.config)
    registry = Registry(work.settings.registry_path)
    alias = registry.alias(run.model, run.task.version)
    version = alias.version if alias else run.task.version
    bundle = load_bundle(
        registry.version_path(run.model, version), read_verifying_key(work.settings.keys_path)
    )
    work.report("STARTING", f"Measuring version {version}.")
    events = work.read_log()
    measures = evaluate_version(
        bundle, events, plan, seed=run.config.seed, report=work.report, check=work.check
    )
    if not work.store.finish_evaluation(run.run_id, run.attempt, measures):
        raise Cancelled("CANCELLED", "The run was cancelled.")
