"""A training in words and as the manifest holds it."""

from __future__ import annotations

import resource
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from services.trainer.pipeline.blend import PARTS, Blend
from services.trainer.pipeline.dataset import EventColumns, Histories
from services.trainer.pipeline.evaluation import BLEND
from services.trainer.pipeline.report import Comparison, Report


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
    if comparison is not None and comparison.same_people:
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


def resident_bytes() -> int:
    """Returns the memory of this process now; its largest so far where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return peak_resident_bytes()
    return pages * resource.getpagesize()


def is_simulated(histories: Histories, attributes_of: Mapping[str, Sequence[str]]) -> bool:
    """Returns whether any item comes from the simulated shop, which marks each with the attribute `simulated`."""
    return any("simulated=True" in attributes_of.get(item_id, ()) for item_id in histories.item_ids)


def last_seen_of(histories: Histories) -> npt.NDArray[np.int64]:
    last_I = np.zeros(histories.item_count, np.int64)
    np.maximum.at(last_I, histories.item_E, histories.time_E // 1_000_000)
    return last_I


def describe_data(histories: Histories, events: EventColumns, attribute_count: int) -> dict[str, Any]:
    def moment(microseconds: int) -> str:
        return datetime.fromtimestamp(microseconds / 1e6, UTC).isoformat()

    return {
        "watermark": events.watermark.hex(),
        **({"snapshot": events.snapshot} if events.snapshot else {}),
        "events": len(histories.item_E),
        "users": histories.user_count,
        "items": histories.item_count,
        "attributes": attribute_count,
        "first_event_at": moment(int(histories.time_E.min())),
        "last_event_at": moment(int(histories.time_E.max())),
    }


def for_card(data: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what is known of the data in words; what is not is left out."""
    return {
        name.replace("_", " "): f"{value:,}" if isinstance(value, int) else value
        for name, value in data.items()
        if value != ""
    }


def describe_blend(blend: Blend) -> list[str]:
    weights = ", ".join(f"{name} {weight:.2f}" for name, weight in blend.weights.items() if weight)
    others = ", ".join(f"{name} {value:.4f}" for name, value in blend.ndcg.items() if name != BLEND)
    judged = f"NDCG@10 on validation people that did not teach it {blend.ndcg[BLEND]:.4f}; {others}"
    if blend.served in PARTS:
        return [
            f"The blend learned from {blend.people} people is clearly beaten by one of its parts ({judged}): "
            f"{blend.served} alone is served."
        ]
    if blend.served != BLEND:
        return [
            f"The blend learned from {blend.people} people does not clearly beat popularity ({judged}): "
            f"{blend.served} is served."
        ]
    return [
        f"Blend weights learned from the validation events of {blend.people} people, under a prior of precision "
        f"{blend.precision:g}: {weights}.",
        judged + ".",
    ]


def describe_refit(before: int, after: int) -> str:
    if not before and not after:
        return (
            "The weights measured and served never saw a held-out event; the counts served know every event."
        )
    return (
        f"Passes that included the validation events, before measuring: {before}; that included every event, after it: {after}. "
        "The weights served are the latter: they know more than those measured."
    )


def _intervals(metrics: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    return {
        name: {"value": interval.value, "low": interval.low, "high": interval.high}
        for name, interval in metrics.items()
    }
