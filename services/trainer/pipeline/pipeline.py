"""A training from events to everything that a version is made of. One process, one model."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import numpy.typing as npt

from services.trainer.domain.hyper_parameters import HyperParameters
from services.trainer.pipeline import card
from services.trainer.pipeline.cooccurrence import count_cooccurrence
from services.trainer.pipeline.dataset import (
    Cleaning,
    EventColumns,
    HeldOut,
    Histories,
    clean,
    encode_attributes,
    hold_out,
    require_enough,
)
from services.trainer.pipeline.evaluation import (
    BLEND,
    Contestants,
    Report,
    choose_half_life,
    choose_lambda,
    climb_ladder,
    ndcg_at_10,
    popularity,
    rank_by_query,
    report_of,
    sample_rows,
)
from services.trainer.pipeline.gate import Verdict, judge
from shared.bundle.manifest import ScoringParameters
from shared.errors import Cancelled, FailedPrecondition

# Held-out events that early stopping looks at: enough for a stable NDCG, cheap beside a pass.
_VALIDATION_CELLS = 30_000_000
_VALIDATION_USERS = (500, 3_000)
# After measuring, passes over everything: a part of those that training needed.
_REFIT_SHARE = 0.2

Reporter = Callable[..., None]


@dataclass(frozen=True, slots=True)
class Plan:
    """What a training is asked to do, beside its size.

    Attributes:
        cleaning: who and what takes part.
        exclude_seen: leave seen items out of rankings.
        refit: train on with the held-out events.
        force: promote whatever the gate says.
        max_test_users, resamples, confidence: of the evaluation.
        max_size_bytes: of the version.
    """

    cleaning: Cleaning = field(default_factory=Cleaning)
    exclude_seen: bool = True
    refit: bool = True
    force: bool = False
    max_test_users: int = 20_000
    resamples: int = 1000
    confidence: float = 0.95
    max_size_bytes: int = 4_000_000_000


@dataclass(frozen=True, slots=True, eq=False)
class TrainedModel:
    """Everything that `shared.bundle.write_bundle` needs, and what came of it.

    Attributes:
        best_B20: the blend's answers to the held-out events, item indices, -1 where there are fewer.
        tested: those events.
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
) -> TrainedModel:
    """Cleans, splits, trains, measures, judges and exports.

    Args:
        events: the log.
        attributes_of: values of each item id, such as "brand:acme".
        report: called with stage, message, and optionally step, epoch, loss, metrics, remaining_seconds.
        should_stop: asked often; true ends the run with Cancelled.

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
    training, before_test = histories.without_last(2), histories.without_last(1)
    validation, test = hold_out(histories, 2, exclude), hold_out(histories, 1, exclude)
    if min(len(validation), len(test)) < 5:
        raise FailedPrecondition(
            "TOO_LITTLE_DATA",
            f"Too little data: only {min(len(validation), len(test))} people end on an item that is new to them. "
            "Record more events, or set evaluation.exclude_seen to false if people here buy the same again.",
        )
    low, high = _VALIDATION_USERS
    limit = min(high, max(low, _VALIDATION_CELLS // histories.item_count))
    validation = validation.take(sample_rows(len(validation), limit, seed))
    test = test.take(sample_rows(len(test), plan.max_test_users, seed))
    attributes = encode_attributes(histories.item_ids, attributes_of)
    report(
        "PREPARING",
        f"{histories.user_count:,} people, {histories.item_count:,} items, {len(histories.item_E):,} events, "
        f"{attributes.attribute_count:,} attribute values.",
    )
    check()

    report("COUNTING", "Counting co-occurrence and popularity.")
    window = size.cooccurrence_window
    scoring = ScoringParameters(lambda_=1.0, window=window)
    counted = count_cooccurrence(training, window)
    half_life_days = choose_half_life(histories, validation, training, exclude)
    check()

    report("TRAINING", "Building the model.")
    # Imported here: too little data is found out without TensorFlow's seconds and memory.
    from services.trainer.pipeline.export import convert, measure_parity
    from services.trainer.pipeline.training import EpochReport, SequenceModel, train

    cpu_before, wall_before = time.process_time(), time.monotonic()
    model = SequenceModel(histories.item_count, attributes, size, seed)

    def validate() -> float:
        query_BD = model.encode(histories, validation)
        rank_B = rank_by_query(histories, validation, query_BD, model.item_vectors(), exclude)
        return float(ndcg_at_10(rank_B).mean())

    def on_epoch(epoch: EpochReport) -> None:
        left = size.max_train_seconds - epoch.elapsed_seconds
        report(
            "TRAINING",
            f"Pass {epoch.epoch}: loss {epoch.loss:.3f}, validation NDCG@10 {epoch.validation_ndcg:.4f}.",
            step=epoch.step,
            epoch=epoch.epoch,
            max_epochs=size.max_epochs,
            loss=epoch.loss,
            metrics={"ndcg@10": epoch.validation_ndcg},
            remaining_seconds=max(0.0, left) + 15.0,
        )

    best_epoch, epochs = train(model, training, validate, on_epoch, should_stop)
    check()
    query_BD = model.encode(histories, validation)
    zeros_I = np.zeros(histories.item_count, np.float32)
    contestants = Contestants(model.item_vectors(), counted, scoring, zeros_I, zeros_I)
    lambda_, tried = choose_lambda(histories, validation, query_BD, contestants, exclude)
    scoring = replace(scoring, lambda_=lambda_)

    refit_epochs = max(1, math.ceil(_REFIT_SHARE * best_epoch)) if plan.refit else 0
    generator = np.random.default_rng(seed + 2)
    # The measured model may know the validation events: they are older than what it must foretell.
    _refit(model, before_test, refit_epochs, generator, report, check, "the validation events")
    train_cpu_seconds = time.process_time() - cpu_before
    train_wall_seconds = time.monotonic() - wall_before

    report("EVALUATING", f"Ranking {histories.item_count:,} items for {len(test):,} people.")
    contestants = Contestants(
        model.item_vectors(),
        count_cooccurrence(before_test, window),
        scoring,
        popularity(before_test),
        popularity(before_test, half_life_days),
    )
    query_BD = model.encode(histories, test)
    ranks, coverage, best_B20 = climb_ladder(
        histories, test, query_BD, contestants, exclude, lambda _done, _all: check()
    )
    protocol = (
        "Leave one out: the last event of each person is the test, the one before chose passes and blend. "
        f"Every item competes, {'those seen before excluded' if exclude else 'those seen before included'}"
    )
    measured = report_of(
        histories, test, ranks, coverage,
        seed=seed, protocol=protocol, resamples=plan.resamples, confidence=plan.confidence,
    )  # fmt: skip
    blend = next(rung for rung in measured.ladder if rung.name == BLEND)
    report(
        "EVALUATING",
        f"Blend: HR@10 {blend.metrics['hr@10'].value:.4f}, NDCG@10 {blend.metrics['ndcg@10'].value:.4f}.",
        metrics={name: interval.value for name, interval in blend.metrics.items()},
    )
    _refit(model, histories, refit_epochs, generator, report, check, "every event")

    report("EXPORTING", "Converting the encoder and comparing it with training.")
    encoder_bytes = convert(model.encoder)
    parity, encoder_milliseconds = measure_parity(model, encoder_bytes, histories, test)
    everything = count_cooccurrence(histories, window)
    arrays: dict[str, npt.NDArray[Any]] = {
        "item_vectors": model.item_vectors(),
        "item_bias": zeros_I,
        "popularity": popularity(histories, half_life_days),
        "cooccurrence_indptr": everything.indptr_I1,
        "cooccurrence_indices": everything.indices_N,
        "cooccurrence_weights": everything.weights_N,
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
    )
    check()
    data = _describe_data(histories, events.watermark, attributes.attribute_count)
    notes = [
        f"{len(epochs)} passes in {epochs[-1].elapsed_seconds:.0f} s; the weights of pass {best_epoch} were kept.",
        f"Blend weight lambda {lambda_} of {sorted(tried)}, chosen on the validation events.",
        f"Half-life of popularity: {half_life_days:.0f} days, chosen on the validation events.",
        _describe_refit(refit_epochs),
        f"Training took {train_cpu_seconds:.0f} CPU seconds, {train_wall_seconds:.0f} s of wall time.",
    ]
    attachments = {
        card.CURVE: card.draw_curve(
            [e.epoch for e in epochs], [e.loss for e in epochs], [e.validation_ndcg for e in epochs], best_epoch
        ),
        card.LADDER: card.draw_ladder(measured),
        "card.md": card.write_card(
            model=model_name, report=measured, verdict=verdict, data=_for_card(data),
            hyper_parameters=size.to_json(), notes=notes,
        ).encode(),
    }  # fmt: skip
    manifest_fields = {
        "encoder": {"max_history": size.max_history, "dimension": size.dimension},
        "scoring": scoring.to_json(),
        "hyper_parameters": {
            **size.to_json(),
            "seed": seed,
            "best_epoch": best_epoch,
            "refit_epochs": refit_epochs,
        },
        "data": data,
        "metrics": _intervals(blend.metrics),
        "baselines": {rung.name: _intervals(rung.metrics) for rung in measured.ladder if rung.name != BLEND},
        "slices": [
            {"name": part.name, "users": part.user_count, "metrics": _intervals(part.metrics)}
            for part in measured.slices
        ],
        "evaluation": {
            "users": measured.user_count,
            "protocol": protocol,
            "confidence": measured.confidence,
            "tied_share": measured.tied_share,
            "exclude_seen": exclude,
        },
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
        best_B20, test, histories,
    )  # fmt: skip


def peak_resident_bytes() -> int:
    """Returns the largest memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _refit(
    model: Any,
    histories: Histories,
    epochs: int,
    generator: np.random.Generator,
    report: Reporter,
    check: Callable[[], None],
    what: str,
) -> None:
    for number in range(1, epochs + 1):
        loss = model.train_epoch(histories, generator)
        check()
        step = int(model.step_count.numpy())
        report("REFITTING", f"Pass {number} of {epochs} with {what} too.", step=step, loss=loss)


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


def _describe_refit(epochs: int) -> str:
    if not epochs:
        return "The weights served never saw the last two events of anybody."
    return (
        f"Before measuring, {epochs} more passes included the validation events; after measuring, {epochs} more "
        "included every event. The weights served are the latter: they know more than those measured."
    )


def _intervals(metrics: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    return {
        name: {"value": interval.value, "low": interval.low, "high": interval.high}
        for name, interval in metrics.items()
    }
