"""A training from events to everything that a version is made of. One process, one model."""

from __future__ import annotations

import importlib
import resource
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
import numpy.typing as npt

from services.trainer.domain.hyper_parameters import HyperParameters
from services.trainer.pipeline import card
from services.trainer.pipeline.baselines import item_item_baselines
from services.trainer.pipeline.blend import Blend, FeatureMaker, Terms, learn_blend
from services.trainer.pipeline.budget import Budget
from services.trainer.pipeline.checkpoint import Checkpoints, fingerprint_of
from services.trainer.pipeline.cooccurrence import PairCounts
from services.trainer.pipeline.dataset import (
    MIN_USERS,
    Cleaning,
    EventColumns,
    HeldOut,
    Histories,
    Split,
    clean,
    encode_attributes,
    everyone,
    leave_one_out,
    require_enough,
    split_by_time,
)
from services.trainer.pipeline.evaluation import (
    BLEND,
    FOUNDING,
    Contestants,
    best_items,
    choose_half_life,
    climb_ladder,
    ndcg_at_10,
    popularity,
    rank_by_blend,
    rank_by_query,
    sample_rows,
)
from services.trainer.pipeline.gate import Verdict, judge
from services.trainer.pipeline.published import (
    contestants_of,
    encode_published,
    newer_than,
    published_ndcg,
)
from services.trainer.pipeline.report import Comparison, Report, compare, compare_published, report_of
from shared.bundle import Bundle
from shared.errors import Cancelled, FailedPrecondition
from shared.ranking_metrics import Interval

# Held-out events that early stopping looks at: enough for a stable NDCG, cheap beside a pass.
_VALIDATION_CELLS = 30_000_000
_VALIDATION_USERS = (500, 3_000)
# A version in service is encoded person by person, as it serves: so many are enough to compare.
_COMPARED_USERS = 3_000
_SECONDS_BETWEEN_STEPS = 5.0
_EXPORT_SECONDS = 6.0
_NO_LEAD = Interval(0.0, 0.0, 0.0)

Reporter = Callable[..., None]


@dataclass(frozen=True, slots=True)
class Plan:
    """What a training is asked to do, beside its size.

    Attributes:
        cleaning: who and what takes part.
        exclude_seen: leave seen items out of rankings.
        refit: train on with the held-out events: with those of validation before measuring, with all before
            serving. Without it no weight ever learned from a held-out event.
        force: promote whatever the gate says.
        max_test_users, resamples, confidence: of the evaluation.
        max_size_bytes: of the version.
        split: "leave_one_out" or "global_time".
        full_ladder: measure every baseline; else those that take about a second.
        answer_everyone: rank also for those whose last event is no fair test or was not drawn for it.
    """

    cleaning: Cleaning = field(default_factory=Cleaning)
    exclude_seen: bool = True
    refit: bool = True
    force: bool = False
    max_test_users: int = 20_000
    resamples: int = 1000
    confidence: float = 0.95
    max_size_bytes: int = 4_000_000_000
    split: str = "leave_one_out"
    full_ladder: bool = False
    answer_everyone: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class TrainedModel:
    """Everything that `shared.bundle.write_bundle` needs, and what came of it.

    Attributes:
        best_B20: the blend's answers to the held-out events, item indices, -1 where there are fewer.
        tested: those events; of everybody, where everyone is answered.
        frozen_rank_B: ranks of the test by the blend with the counts of the training events alone; of a full ladder.
        histories: all of the data.
    """

    arrays: dict[str, npt.NDArray[Any]]
    vocabulary: Sequence[str]
    encoder_bytes: bytes
    manifest_fields: dict[str, Any]
    attachments: dict[str, bytes]
    verdict: Verdict
    report: Report
    best_B20: npt.NDArray[np.int32]
    tested: HeldOut
    histories: Histories
    frozen_rank_B: npt.NDArray[np.int64] | None = None


def split_of(histories: Histories, plan: Plan) -> Split:
    """Returns the split of the plan.

    Raises:
        FailedPrecondition: TOO_LITTLE_DATA: it holds out next to nothing.
    """
    make = split_by_time if plan.split == "global_time" else leave_one_out
    split = make(histories, plan.exclude_seen)
    fewest = min(len(split.validation), len(split.test))
    if fewest < 5:
        raise FailedPrecondition(
            "TOO_LITTLE_DATA",
            f"Too little data: only {fewest} events can be held out, one a person, on items that are new to them. "
            "Record more events, or set evaluation.exclude_seen to false if people here buy the same again.",
        )
    return split


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
    model_name: str,
    seed: int,
    report: Reporter,
    should_stop: Callable[[], bool] = lambda: False,
    code_version: str = "",
    incumbent: Bundle | None = None,
    checkpoints: Checkpoints | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> TrainedModel:
    """Cleans, splits, trains, measures, judges and exports.

    Args:
        events: the log.
        attributes_of: values of each item id, such as "brand:acme".
        report: called with stage, message, and optionally step, epoch, loss, metrics, remaining_seconds.
        should_stop: asked often; true ends the run with Cancelled.
        clock: monotonic seconds that the time for training is measured with.
        incumbent: the version in service, which the new one must beat.
        checkpoints: of the run; training goes on from there, and notes its passes.

    Raises:
        FailedPrecondition: TOO_LITTLE_DATA, DIVERGED or PARITY_BROKEN.
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
    # TensorFlow takes seconds to import: it does so beside the counting, but only where there is enough data.
    importing = threading.Thread(target=_import_tensorflow, name="import", daemon=True)
    importing.start()
    try:
        training, before_test = histories.first(split.training_U), histories.first(split.before_test_U)
        low, high = _VALIDATION_USERS
        limit = min(high, max(low, _VALIDATION_CELLS // histories.item_count))
        validation = split.validation.take(sample_rows(len(split.validation), limit, seed))
        test = split.test.take(sample_rows(len(split.test), plan.max_test_users, seed))
        attributes = encode_attributes(histories.item_ids, attributes_of)
        budget = Budget(size.max_train_seconds, 2 if plan.refit else 0, clock)
        compared = min(len(test), _COMPARED_USERS) if incumbent else 0
        rest = _Rest(budget, len(test) * histories.item_count, 1e-3 * compared)
        report(
            "PREPARING",
            f"{histories.user_count:,} people, {histories.item_count:,} items, {len(histories.item_E):,} events, "
            f"{attributes.attribute_count:,} attribute values.",
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
    from services.trainer.pipeline.training import EpochReport, SequenceModel, refit, train

    cpu_before, wall_before = time.process_time(), time.monotonic()
    budget.resume()
    model = SequenceModel(histories.item_count, attributes, size, seed)

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
        measured = np.isfinite(epoch.validation_ndcg)
        found = f", validation NDCG@10 {epoch.validation_ndcg:.4f}" if measured else ""
        report(
            "TRAINING",
            f"Pass {epoch.epoch}: loss {epoch.loss:.3f}{found}.",
            step=epoch.step,
            epoch=epoch.epoch,
            max_epochs=size.max_epochs,
            loss=epoch.loss,
            metrics={"ndcg@10": epoch.validation_ndcg} if measured else {},
            remaining_seconds=rest.while_fitting(),
        )

    if checkpoints is not None:
        checkpoints.belong_to(fingerprint_of(training, attributes, size.to_json(), seed, code_version))
    best_epoch, epochs = train(model, training, validate, on_epoch, budget, should_stop, on_step, checkpoints)
    budget.pause()
    check()
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
    if plan.full_ladder:
        frozen_B = rank_by_blend(histories, test, query_BD, contestants_with(terms), exclude)
    # Counts are no weights: like the histories, they are up to date when the test is taken.
    counts.add(histories, split.training_U, split.before_test_U)
    terms = terms_of(before_test)
    contestants = contestants_with(terms)
    climb = climb_ladder(histories, test, query_BD, contestants, exclude, lambda _done, _all: check())
    best_B20, answered = climb.best_B20, test
    if plan.answer_everyone:
        answered = everyone(histories)
        best_B20 = best_items(histories, answered, model.encode(histories, answered), contestants, exclude)
    check()
    label = card.SIMULATION if _is_simulated(histories, attributes_of) else ""
    protocol = f"{label + ': ' if label else ''}{split.words}. Every item competes, {'those seen before excluded' if exclude else 'those seen before included'}"
    measured = report_of(
        histories, test, climb, contestants.item_vectors_ID,
        seed=seed, protocol=protocol, resamples=plan.resamples, confidence=plan.confidence,
    )  # fmt: skip
    measured_blend = measured.ladder[0]
    comparison = None
    if incumbent is not None:
        comparison = _compare(
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
        "last_seen": _last_seen(histories),
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
    check()
    data = _describe_data(histories, events.watermark, attributes.attribute_count)
    notes = [
        f"{len(epochs)} passes in {epochs[-1].elapsed_seconds:.0f} s; the weights of pass {best_epoch} were kept.",
        *_describe_blend(blend),
        f"Half-life of popularity: {half_life_days:.0f} days, chosen on the validation events.",
        _describe_refit(passes_before, passes_after),
        f"Training took {train_cpu_seconds:.0f} CPU seconds, {train_wall_seconds:.0f} s of wall time.",
    ]
    attachments = {
        card.CURVE: card.draw_curve(
            [e.epoch for e in epochs], [e.loss for e in epochs], [e.validation_ndcg for e in epochs], best_epoch, label
        ),
        card.LADDER: card.draw_ladder(measured, label),
        card.SLICES: card.draw_slices(measured, comparison, label),
        card.RELIABILITY: card.draw_reliability(measured.calibration, label),
        "card.md": card.write_card(
            model=model_name, report=measured, verdict=verdict, comparison=comparison, data=_for_card(data),
            hyper_parameters=size.to_json(), notes=notes, label=label,
        ).encode(),
    }  # fmt: skip
    manifest_fields = {
        "encoder": {"max_history": size.max_history, "dimension": size.dimension},
        "scoring": companion.scoring.to_json(),
        "hyper_parameters": {
            **size.to_json(),
            "seed": seed,
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


def _compare(
    incumbent: Bundle,
    histories: Histories,
    test: HeldOut,
    rank_B: npt.NDArray[np.int64],
    measures: Mapping[str, Interval],
    contestants: Contestants,
    plan: Plan,
    seed: int,
    check: Callable[[], None],
) -> Comparison:
    """Returns how the new version does against the one in service.

    The one in service was trained on every event of its day. Only events after those are a fair question to
    it; where there are too few, what both were measured at before they saw their test is compared.
    """
    fresh = newer_than(incumbent, histories, test)
    fresh = fresh[sample_rows(len(fresh), _COMPARED_USERS, seed)]
    if len(fresh) < MIN_USERS:
        old_interval, why_none = published_ndcg(incumbent, plan.split, plan.exclude_seen)
        if old_interval is None:
            return Comparison(incumbent.version, _NO_LEAD, len(test), False, why_none=why_none)
        return compare_published(incumbent.version, measures["ndcg@10"], old_interval, len(test))
    asked = test.take(fresh)
    served = contestants_of(incumbent, histories, contestants.popularity_I, contestants.popularity_decayed_I)
    query_BD = encode_published(incumbent, histories, asked, check)
    old_rank_B = rank_by_blend(histories, asked, query_BD, served, plan.exclude_seen)
    return compare(
        histories, asked, rank_B[fresh], old_rank_B, incumbent.version,
        seed=seed, resamples=plan.resamples, confidence=plan.confidence, min_slice=MIN_USERS,
    )  # fmt: skip


def describe_report(
    measured: Report,
    exclude_seen: bool,
    comparison: Comparison | None = None,
    split: str = "leave_one_out",
) -> dict[str, Any]:
    """Returns the measures as the manifest holds them."""
    blend = measured.ladder[0]
    slices: list[dict[str, Any]] = [
        {"name": part.name, "users": part.user_count, "metrics": _intervals(part.metrics)}
        for part in measured.slices
    ]
    if comparison is not None:
        # Other people than above: those whose event is newer than the incumbent.
        slices += [
            {
                "name": f"{part.name}; newer than the incumbent",
                "users": part.user_count,
                "metrics": _intervals(part.metrics),
                "incumbent_metrics": _intervals(part.incumbent_metrics or {}),
            }
            for part in comparison.slices
        ]
    return {
        "metrics": _intervals(blend.metrics),
        "baselines": {rung.name: _intervals(rung.metrics) for rung in measured.ladder if rung.name != BLEND},
        "slices": slices,
        "evaluation": {
            "users": measured.user_count,
            "protocol": measured.protocol,
            "confidence": measured.confidence,
            "tied_share": measured.tied_share,
            "exclude_seen": exclude_seen,
            "split": split,
        },
    }


def peak_resident_bytes() -> int:
    """Returns the largest memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _is_simulated(histories: Histories, attributes_of: Mapping[str, Sequence[str]]) -> bool:
    """Returns whether any item comes from the simulated shop, which marks each with the attribute `simulated`."""
    return any("simulated=True" in attributes_of.get(item_id, ()) for item_id in histories.item_ids)


def _last_seen(histories: Histories) -> npt.NDArray[np.int64]:
    last_I = np.zeros(histories.item_count, np.int64)
    np.maximum.at(last_I, histories.item_E, histories.time_E // 1_000_000)
    return last_I


def _describe_data(histories: Histories, watermark: bytes, attribute_count: int) -> dict[str, Any]:
    def moment(microseconds: int) -> str:
        return datetime.fromtimestamp(microseconds / 1e6, UTC).isoformat()

    return {
        "watermark": watermark.hex(),
        "events": len(histories.item_E),
        "users": histories.user_count,
        "items": histories.item_count,
        "attributes": attribute_count,
        "first_event_at": moment(int(histories.time_E.min())),
        "last_event_at": moment(int(histories.time_E.max())),
    }


def _for_card(data: Mapping[str, Any]) -> dict[str, Any]:
    return {name: f"{value:,}" if isinstance(value, int) else value for name, value in data.items()}


def _describe_blend(blend: Blend) -> list[str]:
    weights = ", ".join(f"{name} {weight:.2f}" for name, weight in blend.weights.items() if weight)
    judged = (
        f"NDCG@10 on validation people that did not teach it {blend.ndcg['blend']:.4f}, "
        f"of popularity {blend.ndcg['popularity']:.4f}"
    )
    if blend.fell_back:
        return [
            f"The blend learned from {blend.people} people does not clearly beat popularity ({judged}): popularity is served."
        ]
    return [
        f"Blend weights learned from the validation events of {blend.people} people: {weights}.",
        judged + ".",
    ]


def _describe_refit(before: int, after: int) -> str:
    if not before and not after:
        return (
            "The weights measured and served never saw a held-out event; the counts served know every event."
        )
    return (
        f"Before measuring, {before} more passes included the validation events; after measuring, {after} more "
        "included every event. The weights served are the latter: they know more than those measured."
    )


def _intervals(metrics: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    return {
        name: {"value": interval.value, "low": interval.low, "high": interval.high}
        for name, interval in metrics.items()
    }
