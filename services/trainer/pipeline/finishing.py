"""From a measured model to everything that a version is made of: arrays, encoder, verdict, card, manifest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from services.trainer.pipeline import card, warm_start
from services.trainer.pipeline.blend import Blend
from services.trainer.pipeline.dataset import EventColumns
from services.trainer.pipeline.describing import (
    describe_blend,
    describe_data,
    describe_refit,
    describe_report,
    for_card,
    last_seen_of,
    peak_resident_bytes,
)
from services.trainer.pipeline.event_log import scalars_of_leads
from services.trainer.pipeline.gate import judge
from services.trainer.pipeline.measuring import Measured
from services.trainer.pipeline.plan import Plan, TrainedModel
from services.trainer.pipeline.preparing import Counted, Prepared
from services.trainer.pipeline.progress import Progress
from services.trainer.pipeline.warm_start import InitialWeights
from shared.errors import FailedPrecondition

if TYPE_CHECKING:
    from services.trainer.pipeline.sequence_model import SequenceModel
    from services.trainer.pipeline.training import EpochReport


@dataclass(frozen=True, slots=True, eq=False)
class Fitted:
    """How the fitting went.

    Attributes:
        best_epoch: the pass whose weights were kept, 1-based.
        epochs: reports of all passes.
        passes_before, passes_after: of refitting, before measuring and after it.
        cpu_seconds, wall_seconds: until it was measured.
    """

    best_epoch: int
    epochs: Sequence[EpochReport]
    passes_before: int
    passes_after: int
    cpu_seconds: float
    wall_seconds: float


def finish(
    model: SequenceModel,
    blend: Blend,
    counted: Counted,
    prepared: Prepared,
    measured: Measured,
    fitted: Fitted,
    events: EventColumns,
    plan: Plan,
    initial: InitialWeights | None,
    progress: Progress,
    *,
    model_name: str,
    seed: int,
    code_version: str,
) -> TrainedModel:
    """Converts the encoder, holds it to what was trained, judges and describes.

    Raises:
        FailedPrecondition: DIVERGED: a weight is not a number.
    """
    from services.trainer.pipeline.export import convert, measure_parity

    histories, size, report, comparison = (
        prepared.histories,
        prepared.size,
        measured.report,
        measured.comparison,
    )
    encoder_bytes = convert(model.encoder)
    parity, encoder_milliseconds = measure_parity(model, encoder_bytes, histories, prepared.test)
    terms = counted.with_everything()
    companion = blend.companion(terms)
    arrays: dict[str, npt.NDArray[Any]] = {
        "item_vectors": model.item_vectors(),
        "item_bias": blend.item_bias(terms),
        "popularity": terms.popularity_I,
        **companion.to_arrays(),
        "last_seen": last_seen_of(histories),
    }
    del terms
    finite = all(bool(np.isfinite(array).all()) for array in [*arrays.values(), *model.weights()])
    if not finite:
        raise FailedPrecondition("DIVERGED", "A weight is no longer a number; lower the learning rate.")
    verdict = judge(
        report,
        weights_finite=finite,
        parity=parity,
        encoder_milliseconds=encoder_milliseconds,
        size_bytes=len(encoder_bytes) + sum(array.nbytes for array in arrays.values()),
        max_size_bytes=plan.max_size_bytes,
        force=plan.force,
        comparison=comparison,
    )
    progress.scalars(int(model.step_count.numpy()), scalars_of_leads(report, comparison))
    progress.check()
    data = describe_data(histories, events, prepared.attributes.attribute_count)
    epochs, best_epoch, label = fitted.epochs, fitted.best_epoch, measured.label
    notes = [
        f"{len(epochs)} {'passes' if len(epochs) > 1 else 'pass'} in {epochs[-1].elapsed_seconds:.0f} s; the weights of pass {best_epoch} were kept.",
        *describe_blend(blend),
        f"Half-life of popularity: {counted.half_life_days:.0f} days, chosen on the validation events.",
        describe_refit(fitted.passes_before, fitted.passes_after),
        f"Training took {fitted.cpu_seconds:.0f} CPU seconds, {fitted.wall_seconds:.0f} s of wall time.",
    ]
    attachments = {
        warm_start.FILE: warm_start.weights_to_bytes(model, prepared.attributes),
        card.CURVE: card.draw_curve(
            [e.epoch for e in epochs], [e.loss for e in epochs], [e.validation_ndcg for e in epochs], best_epoch, label
        ),
        card.LADDER: card.draw_ladder(report, label),
        card.SLICES: card.draw_slices(report, comparison, label),
        card.RELIABILITY: card.draw_reliability(report.calibration, label),
        "card.md": card.write_card(
            model=model_name, report=report, verdict=verdict, comparison=comparison, data=for_card(data),
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
            "refit_epochs": fitted.passes_after,
            **{f"weight_{name}": weight for name, weight in blend.weights.items()},
        },
        "data": data,
        **({"lineage": [dict(ancestor) for ancestor in initial.lineage]} if initial is not None else {}),
        **describe_report(report, plan.exclude_seen, comparison, plan.split),
        "gate": {
            "verdict": verdict.verdict,
            "reasons": [f"{c.name}: {c.reason}" for c in verdict.checks if not c.passed],
            "checks": [{"name": c.name, "passed": c.passed, "reason": c.reason} for c in verdict.checks],
        },
        "training": {
            "cpu_seconds": fitted.cpu_seconds,
            "wall_seconds": fitted.wall_seconds,
            "peak_resident_bytes": peak_resident_bytes(),
            "parity": parity,
            "encoder_milliseconds": encoder_milliseconds,
        },
        "code_version": code_version,
    }
    return TrainedModel(
        arrays, histories.item_ids, encoder_bytes, manifest_fields, attachments, verdict, report,
        measured.best_B20, measured.answered, histories, measured.frozen_rank_B,
    )  # fmt: skip
