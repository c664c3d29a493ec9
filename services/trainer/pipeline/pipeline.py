"""A training from events to everything that a version is made of. One process, one model."""

from __future__ import annotations

import importlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from services.trainer.domain.hyper_parameters import HyperParameters
from services.trainer.pipeline.blend import FeatureMaker, learn_blend
from services.trainer.pipeline.budget import Budget
from services.trainer.pipeline.checkpoint import Checkpoints, fingerprint_of
from services.trainer.pipeline.comparing import COMPARED_USERS
from services.trainer.pipeline.content import ContentVectors
from services.trainer.pipeline.dataset import EventColumns, Histories
from services.trainer.pipeline.evaluation import ndcg_at_10, popularity, rank_by_query
from services.trainer.pipeline.event_log import Scalars, no_scalars, scalars_of_pass
from services.trainer.pipeline.finishing import Fitted, finish
from services.trainer.pipeline.measuring import measure
from services.trainer.pipeline.memory import trim
from services.trainer.pipeline.plan import Plan, TrainedModel
from services.trainer.pipeline.preparing import Counted, prepare, split_events
from services.trainer.pipeline.progress import Progress, Reporter
from services.trainer.pipeline.warm_start import InitialWeights, begin_at
from shared.bundle import Bundle


def train_model(
    events: EventColumns,
    attributes_of: Mapping[str, Sequence[str]],
    size: HyperParameters,
    plan: Plan,
    *,
    content: ContentVectors | None = None,
    model_name: str,
    seed: int,
    report: Reporter,
    should_stop: Callable[[], bool] = lambda: False,
    code_version: str = "",
    incumbent: Bundle | None = None,
    initial: InitialWeights | None = None,
    newer_than_microseconds: int | None = None,
    checkpoints: Checkpoints | None = None,
    clock: Callable[[], float] = time.monotonic,
    scalars: Scalars = no_scalars,
) -> TrainedModel:
    """Cleans, splits, trains, measures, judges and exports.

    Args:
        events: the log.
        attributes_of: values of each item id, such as "brand:acme".
        content: what encoders made of items' text and pictures.
        report: called with stage, message, and optionally step, epoch, loss, metrics, remaining_seconds.
        should_stop: asked often; true ends the run with Cancelled.
        clock: monotonic seconds that the time for training is measured with.
        incumbent: the version in service, which the new one must beat.
        initial: weights to begin with, in fewer passes; at random without.
        newer_than_microseconds: since 1970; only later events are held out. With `initial`, what that knows.
        checkpoints: of the run; training goes on from there, and notes its passes.
        scalars: is told the curves of training and refitting, and by how much the blend leads.

    Raises:
        FailedPrecondition: TOO_LITTLE_DATA, INITIAL_VERSION_UNFIT, DIVERGED or PARITY_BROKEN.
        Cancelled: `should_stop` said so.
    """
    report("PREPARING", f"Cleaning {len(events):,} events.")
    histories, split, size = split_events(events, size, plan, initial, newer_than_microseconds)
    # TensorFlow takes seconds to import: it does so beside the counting, but only where there is enough data.
    importing = threading.Thread(target=_import_tensorflow, name="import", daemon=True)
    importing.start()
    try:
        prepared = prepare(histories, split, size, attributes_of, content, plan, seed)
        budget = Budget(size.max_train_seconds, 2 if plan.refit else 0, clock)
        compared = min(len(prepared.test), COMPARED_USERS) if incumbent else 0
        cells = len(prepared.test) * histories.item_count
        progress = Progress(report, should_stop, scalars, budget, cells, 1e-3 * compared)
        progress.fitting("PREPARING", prepared.describe(), 10.0)
        progress.check()
        progress.fitting("COUNTING", "Counting co-occurrence and popularity.", 8.0)
        counted = Counted(prepared, plan.exclude_seen)
        terms = [counted.of_training()]
        progress.check()
    finally:
        importing.join()

    trim()
    progress.fitting("TRAINING", "Building the model.")
    # Imported here: too little data is found out without TensorFlow's seconds and memory.
    from services.trainer.pipeline.sequence_model import SequenceModel
    from services.trainer.pipeline.training import refit, train

    cpu_before, wall_before = time.process_time(), time.monotonic()
    budget.resume()
    model = SequenceModel(histories.item_count, prepared.attributes, size, seed)
    begun_at = code_version
    if initial is not None:
        begun_at += f" from {initial.version}"
        known = begin_at(initial, model, histories.item_ids, prepared.attributes)
        progress.fitting(
            "TRAINING",
            f"Beginning at the weights of version {initial.version}, which knows {known:,} of {histories.item_count:,} items.",
        )

    def validate() -> float:
        query_BD = model.encode(histories, prepared.validation)
        rank_B = rank_by_query(
            histories, prepared.validation, query_BD, model.item_vectors(), plan.exclude_seen
        )
        return float(ndcg_at_10(rank_B).mean())

    if checkpoints is not None:
        fingerprint = fingerprint_of(prepared.training, prepared.attributes, size.to_json(), seed, begun_at)
        checkpoints.belong_to(fingerprint)
    best_epoch, epochs = train(
        model, prepared.training, validate, lambda epoch: progress.on_epoch(epoch, size.max_epochs), budget, should_stop,
        progress.on_step, checkpoints, lambda step, curve: scalars_of_pass(scalars, step, curve),
    )  # fmt: skip
    budget.pause()
    progress.check()
    if not plan.refit:
        model.end_training()
    progress.fitting("TRAINING", "Learning the weights of the blend.")
    blend = learn_blend(
        histories,
        split.validation,
        lambda people: model.encode(histories, people),
        FeatureMaker(model.item_vectors(), terms[0]),
        popularity(prepared.training),
        plan.exclude_seen,
        seed,
    )
    progress.check()
    passes = budget.refit_passes(best_epoch)
    generator = np.random.default_rng(seed + 2)

    def refit_with(known: Histories, number: int, what: str, evaluated: bool) -> int:
        budget.resume()
        allowed = budget.spent + budget.share_of_left(number)
        made = refit(
            model,
            known,
            passes,
            generator,
            lambda: should_stop() or budget.spent >= allowed,
            lambda made, loss: progress.on_refit(
                what, int(model.step_count.numpy()), loss, made, passes, evaluated
            ),
        )
        budget.pause()
        return made

    # The measured model may know the validation events: they are older than what it must foretell.
    passes_before = refit_with(prepared.before_test, 0, "the validation events", False)

    def evaluating(what: str) -> None:
        report("EVALUATING", what, remaining_seconds=progress.seconds_left_refitting(passes, False))

    evaluating("Ranking by what is served.")
    cpu_seconds, wall_seconds = time.process_time() - cpu_before, time.monotonic() - wall_before
    measured = measure(
        model,
        blend,
        terms,
        counted,
        prepared,
        plan,
        attributes_of,
        incumbent,
        seed,
        progress.check,
        evaluating,
    )
    reached = measured.report.ladder[0].metrics
    report(
        "EVALUATING",
        f"Blend: HR@10 {reached['hr@10'].value:.4f}, NDCG@10 {reached['ndcg@10'].value:.4f}.",
        metrics={name: interval.value for name, interval in reached.items()},
        remaining_seconds=progress.seconds_left_refitting(passes, True),
    )
    passes_after = refit_with(histories, 1, "every event", True)
    if plan.refit:
        model.end_training()
    report(
        "EXPORTING",
        "Converting the encoder and comparing it with training.",
        remaining_seconds=progress.seconds_left_refitting(0, True),
    )
    fitted = Fitted(best_epoch, epochs, passes_before, passes_after, cpu_seconds, wall_seconds)
    return finish(
        model, blend, counted, prepared, measured, fitted, events, plan, initial, progress,
        model_name=model_name, seed=seed, code_version=code_version,
    )  # fmt: skip


def _import_tensorflow() -> None:
    importlib.import_module("services.trainer.pipeline.export")
