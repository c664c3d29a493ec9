"""A training from events to everything that a version is made of. One process, one model."""

from __future__ import annotations

import importlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from services.trainer.domain.hyper_parameters import HyperParameters
from services.trainer.pipeline import card, warm_start
from services.trainer.pipeline.answering import best_items
from services.trainer.pipeline.baselines import item_item_baselines
from services.trainer.pipeline.blend import FeatureMaker, Terms, learn_blend
from services.trainer.pipeline.budget import Budget
from services.trainer.pipeline.checkpoint import Checkpoints, fingerprint_of
from services.trainer.pipeline.comparing import COMPARED_USERS, compare_with_incumbent
from services.trainer.pipeline.content import ContentVectors, align
from services.trainer.pipeline.cooccurrence import PairCounts
from services.trainer.pipeline.dataset import (
    EventColumns,
    Histories,
    clean,
    encode_attributes,
    everyone,
    require_enough,
)
from services.trainer.pipeline.describing import (
    describe_blend,
    describe_data,
    describe_refit,
    describe_report,
    for_card,
    is_simulated,
    last_seen_of,
    peak_resident_bytes,
)
from services.trainer.pipeline.evaluation import (
    BLEND,
    FOUNDING,
    Contestants,
    choose_half_life,
    climb_ladder,
    ndcg_at_10,
    popularity,
    rank_by_blend,
    rank_by_query,
    sample_rows,
)
from services.trainer.pipeline.event_log import Scalars, no_scalars, scalars_of_leads, scalars_of_pass
from services.trainer.pipeline.gate import judge
from services.trainer.pipeline.plan import Plan, TrainedModel, split_of
from services.trainer.pipeline.report import report_of
from services.trainer.pipeline.warm_start import InitialWeights, begin_at, only_newer, shortened
from shared.bundle import Bundle
from shared.errors import Cancelled, FailedPrecondition

# Held-out events that early stopping looks at: enough for a stable NDCG, cheap beside a pass.
_VALIDATION_CELLS = 30_000_000
_VALIDATION_USERS = (500, 3_000)
_SECONDS_BETWEEN_STEPS = 5.0
_EXPORT_SECONDS = 6.0

Reporter = Callable[..., None]


class _Rest:
    """Guesses how long the run still takes: training's own budget, and what comes after it."""

    def __init__(self, budget: Budget, cells: int, extra_seconds: float) -> None:
        # Ranking with every contestant, scores and sorting, on one core.
        self._evaluation_seconds = 2.0 + 2.5e-7 * cells + extra_seconds
        self._budget = budget
        self.steps_per_pass = 0

    def while_fitting(self) -> float:
        return self._budget.left + self._evaluation_seconds + _EXPORT_SECONDS

    def while_refitting(self, passes: int, evaluated: bool) -> float:
        return (
            min(self._budget.seconds_of(passes * self.steps_per_pass), self._budget.left)
            + _EXPORT_SECONDS
            + (0.0 if evaluated else self._evaluation_seconds)
        )


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

    def check() -> None:
        if should_stop():
            raise Cancelled("CANCELLED", "The run was cancelled.")

    report("PREPARING", f"Cleaning {len(events):,} events.")
    histories = clean(events, plan.cleaning)
    require_enough(histories)
    exclude = plan.exclude_seen
    split = split_of(histories, plan)
    if initial is not None:
        newer_than_microseconds, size = initial.last_event_microseconds, shortened(size)
    if newer_than_microseconds is not None:
        split = only_newer(newer_than_microseconds, histories, split)
    # TensorFlow takes seconds to import: it does so beside the counting, but only where there is enough data.
    importing = threading.Thread(target=_import_tensorflow, name="import", daemon=True)
    importing.start()
    try:
        training, before_test = histories.first(split.training_U), histories.first(split.before_test_U)
        low, high = _VALIDATION_USERS
        limit = min(high, max(low, _VALIDATION_CELLS // histories.item_count))
        validation = split.validation.take(sample_rows(len(split.validation), limit, seed))
        answered_after_all_U = np.isin(histories.user_U, list(plan.answered_after_all))
        test = split.test.take(np.flatnonzero(~answered_after_all_U[split.test.user_B]))
        test = test.take(sample_rows(len(test), plan.max_test_users, seed))
        attributes = replace(
            encode_attributes(histories.item_ids, attributes_of),
            content_IC=align(histories.item_ids, content),
        )
        budget = Budget(size.max_train_seconds, 2 if plan.refit else 0, clock)
        compared = min(len(test), COMPARED_USERS) if incumbent else 0
        rest = _Rest(budget, len(test) * histories.item_count, 1e-3 * compared)
        report(
            "PREPARING",
            f"{histories.user_count:,} people, {histories.item_count:,} items, {len(histories.item_E):,} events, "
            f"{attributes.attribute_count:,} attribute values"
            f"{'' if attributes.content_IC is None else ', content vectors'}.",
            remaining_seconds=rest.while_fitting() + 10.0,
        )
        check()

        report(
            "COUNTING",
            "Counting co-occurrence and popularity.",
            remaining_seconds=rest.while_fitting() + 8.0,
        )
        counts = PairCounts(histories.item_count, size.cooccurrence_window, len(histories.item_E))
        counts.add(histories, 0, split.training_U)
        half_life_days = choose_half_life(histories, validation, training, exclude)

        def terms_of(known: Histories) -> Terms:
            return Terms.of(counts, attributes, popularity(known, half_life_days))

        terms = terms_of(training)
        check()
    finally:
        importing.join()

    report("TRAINING", "Building the model.", remaining_seconds=rest.while_fitting())
    # Imported here: too little data is found out without TensorFlow's seconds and memory.
    from services.trainer.pipeline.export import convert, measure_parity
    from services.trainer.pipeline.sequence_model import SequenceModel
    from services.trainer.pipeline.training import EpochReport, refit, train

    cpu_before, wall_before = time.process_time(), time.monotonic()
    budget.resume()
    model = SequenceModel(histories.item_count, attributes, size, seed)
    if initial is not None:
        known = begin_at(initial, model, histories.item_ids, attributes)
        report(
            "TRAINING",
            f"Beginning at the weights of version {initial.version}, which knows {known:,} of {histories.item_count:,} items.",
            remaining_seconds=rest.while_fitting(),
        )

    def validate() -> float:
        query_BD = model.encode(histories, validation)
        rank_B = rank_by_query(histories, validation, query_BD, model.item_vectors(), exclude)
        return float(ndcg_at_10(rank_B).mean())

    told_at = time.monotonic()

    def on_step(done: int, steps: int) -> None:
        nonlocal told_at
        if done < steps and time.monotonic() - told_at >= _SECONDS_BETWEEN_STEPS:
            told_at = time.monotonic()
            fitting = min(budget.seconds_of(steps - done), budget.fitting_left) or budget.fitting_left
            report(
                "TRAINING",
                f"Step {done} of {steps}.",
                remaining_seconds=rest.while_fitting() - budget.fitting_left + fitting,
            )

    def on_epoch(epoch: EpochReport) -> None:
        nonlocal told_at
        told_at = time.monotonic()
        rest.steps_per_pass = epoch.steps_per_epoch
        measured = bool(np.isfinite(epoch.validation_ndcg))
        metrics = {"ndcg@10": epoch.validation_ndcg} if measured else {}
        scalars(
            epoch.step, {"pass/loss": epoch.loss, **{f"pass/validation {k}": v for k, v in metrics.items()}}
        )
        found = f", validation NDCG@10 {epoch.validation_ndcg:.4f}" if measured else ""
        report(
            "TRAINING",
            f"Pass {epoch.epoch}: loss {epoch.loss:.3f}{found}.",
            step=epoch.step,
            epoch=epoch.epoch,
            max_epochs=size.max_epochs,
            loss=epoch.loss,
            metrics=metrics,
            remaining_seconds=rest.while_fitting(),
        )

    begun_at = code_version + (f" from {initial.version}" if initial is not None else "")
    if checkpoints is not None:
        checkpoints.belong_to(fingerprint_of(training, attributes, size.to_json(), seed, begun_at))
    best_epoch, epochs = train(
        model, training, validate, on_epoch, budget, should_stop, on_step, checkpoints,
        lambda step, curve: scalars_of_pass(scalars, step, curve),
    )  # fmt: skip
    budget.pause()
    check()
    if not plan.refit:
        model.end_training()
    report("TRAINING", "Learning the weights of the blend.", remaining_seconds=rest.while_fitting())
    blend = learn_blend(
        histories,
        split.validation,
        model.encode(histories, split.validation),
        FeatureMaker(model.item_vectors(), terms),
        popularity(training),
        exclude,
        seed,
    )
    check()

    refit_passes = budget.refit_passes(best_epoch)
    generator = np.random.default_rng(seed + 2)

    def on_refit(what: str, evaluated: bool) -> Callable[[int, float], None]:
        def on_pass(made: int, loss: float) -> None:
            check()
            scalars(int(model.step_count.numpy()), {"refit/loss": loss})
            report(
                "REFITTING",
                f"Pass {made} of {refit_passes} with {what} too.",
                step=int(model.step_count.numpy()),
                loss=loss,
                remaining_seconds=rest.while_refitting(
                    refit_passes - made + (0 if evaluated else refit_passes), evaluated
                ),
            )

        return on_pass

    def refit_with(known: Histories, number: int, what: str, evaluated: bool) -> int:
        budget.resume()
        allowed = budget.spent + budget.share_of_left(number)
        made = refit(
            model,
            known,
            refit_passes,
            generator,
            lambda: should_stop() or budget.spent >= allowed,
            on_refit(what, evaluated),
        )
        budget.pause()
        return made

    # The measured model may know the validation events: they are older than what it must foretell.
    passes_before = refit_with(before_test, 0, "the validation events", False)

    report(
        "EVALUATING",
        f"Ranking {histories.item_count:,} items for {len(test):,} people.",
        remaining_seconds=rest.while_refitting(refit_passes, False),
    )
    train_cpu_seconds = time.process_time() - cpu_before
    train_wall_seconds = time.monotonic() - wall_before
    neighbours = item_item_baselines(
        histories, training, before_test, validation, size.cooccurrence_window, exclude, plan.full_ladder
    )
    check()
    factors = {}
    if plan.full_ladder:
        from services.trainer.pipeline.founding_model import train_founding_model

        factors[FOUNDING] = train_founding_model(
            training, before_test, histories, validation, test, exclude, seed, check
        )
    query_BD = model.encode(histories, test)

    def contestants_with(terms: Terms) -> Contestants:
        return Contestants(
            model.item_vectors(),
            blend.item_bias(terms),
            blend.companion(terms),
            popularity(before_test),
            terms.popularity_I,
            neighbours,
            factors,
        )

    frozen_B = None
    if plan.frozen_counts:
        frozen_B = rank_by_blend(histories, test, query_BD, contestants_with(terms), exclude)
    # Counts are no weights: like the histories, they are up to date when the test is taken.
    counts.add(histories, split.training_U, split.before_test_U)
    terms = terms_of(before_test)
    contestants = contestants_with(terms)
    climb = climb_ladder(histories, test, query_BD, contestants, exclude, lambda _done, _all: check())
    best_B20, answered = climb.best_B20, test
    if plan.answer_everyone:
        answered = everyone(histories, answered_after_all_U)
        best_B20 = best_items(histories, answered, model.encode(histories, answered), contestants, exclude)
    check()
    label = card.SIMULATION if is_simulated(histories, attributes_of) else ""
    protocol = f"{label + ': ' if label else ''}{split.words}. Every item competes, {'those seen before excluded' if exclude else 'those seen before included'}"
    measured = report_of(
        histories, test, climb, contestants.item_vectors_ID,
        seed=seed, protocol=protocol, resamples=plan.resamples, confidence=plan.confidence,
    )  # fmt: skip
    measured_blend = measured.ladder[0]
    comparison = None
    if incumbent is not None:
        comparison = compare_with_incumbent(
            incumbent,
            histories,
            test,
            climb.ranks[BLEND],
            measured_blend.metrics,
            contestants,
            plan,
            seed,
            check,
        )
    report(
        "EVALUATING",
        f"Blend: HR@10 {measured_blend.metrics['hr@10'].value:.4f}, NDCG@10 {measured_blend.metrics['ndcg@10'].value:.4f}.",
        metrics={name: interval.value for name, interval in measured_blend.metrics.items()},
        remaining_seconds=rest.while_refitting(refit_passes, True),
    )
    passes_after = refit_with(histories, 1, "every event", True)

    report(
        "EXPORTING",
        "Converting the encoder and comparing it with training.",
        remaining_seconds=_EXPORT_SECONDS,
    )
    encoder_bytes = convert(model.encoder)
    parity, encoder_milliseconds = measure_parity(model, encoder_bytes, histories, test)
    counts.add(histories, split.before_test_U)
    terms = terms_of(histories)
    companion = blend.companion(terms)
    arrays: dict[str, npt.NDArray[Any]] = {
        "item_vectors": model.item_vectors(),
        "item_bias": blend.item_bias(terms),
        "popularity": terms.popularity_I,
        **companion.to_arrays(),
        "last_seen": last_seen_of(histories),
    }
    finite = all(bool(np.isfinite(array).all()) for array in [*arrays.values(), *model.weights()])
    if not finite:
        raise FailedPrecondition("DIVERGED", "A weight is no longer a number; lower the learning rate.")
    verdict = judge(
        measured,
        weights_finite=finite,
        parity=parity,
        encoder_milliseconds=encoder_milliseconds,
        size_bytes=len(encoder_bytes) + sum(array.nbytes for array in arrays.values()),
        max_size_bytes=plan.max_size_bytes,
        force=plan.force,
        comparison=comparison,
    )
    scalars(int(model.step_count.numpy()), scalars_of_leads(measured, comparison))
    check()
    data = describe_data(histories, events, attributes.attribute_count)
    notes = [
        f"{len(epochs)} passes in {epochs[-1].elapsed_seconds:.0f} s; the weights of pass {best_epoch} were kept.",
        *describe_blend(blend),
        f"Half-life of popularity: {half_life_days:.0f} days, chosen on the validation events.",
        describe_refit(passes_before, passes_after),
        f"Training took {train_cpu_seconds:.0f} CPU seconds, {train_wall_seconds:.0f} s of wall time.",
    ]
    attachments = {
        warm_start.FILE: warm_start.weights_to_bytes(model, attributes),
        card.CURVE: card.draw_curve(
            [e.epoch for e in epochs], [e.loss for e in epochs], [e.validation_ndcg for e in epochs], best_epoch, label
        ),
        card.LADDER: card.draw_ladder(measured, label),
        card.SLICES: card.draw_slices(measured, comparison, label),
        card.RELIABILITY: card.draw_reliability(measured.calibration, label),
        "card.md": card.write_card(
            model=model_name, report=measured, verdict=verdict, comparison=comparison, data=for_card(data),
            hyper_parameters=size.to_json(), notes=notes, label=label,
        ).encode(),
    }  # fmt: skip
    manifest_fields = {
        "encoder": {"max_history": size.max_history, "dimension": size.dimension},
        "scoring": companion.scoring.to_json(),
        "hyper_parameters": {
            **size.to_json(),
            "seed": seed,
            **({"initial_version": initial.version} if initial is not None else {}),
            "best_epoch": best_epoch,
            "refit_epochs": passes_after,
            **{f"weight_{name}": weight for name, weight in blend.weights.items()},
        },
        "data": data,
        **describe_report(measured, exclude, comparison, plan.split),
        "gate": {
            "verdict": verdict.verdict,
            "reasons": [f"{c.name}: {c.reason}" for c in verdict.checks if not c.passed],
            "checks": [{"name": c.name, "passed": c.passed, "reason": c.reason} for c in verdict.checks],
        },
        "training": {
            "cpu_seconds": train_cpu_seconds,
            "wall_seconds": train_wall_seconds,
            "peak_resident_bytes": peak_resident_bytes(),
            "parity": parity,
            "encoder_milliseconds": encoder_milliseconds,
        },
        "code_version": code_version,
    }
    return TrainedModel(
        arrays, histories.item_ids, encoder_bytes, manifest_fields, attachments, verdict, measured,
        best_B20, answered, histories, frozen_B,
    )  # fmt: skip


def _import_tensorflow() -> None:
    importlib.import_module("services.trainer.pipeline.export")
