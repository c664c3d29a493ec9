"""The model card: what the model is, how good, and whether to believe it. For people."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from services.trainer.pipeline.gate import Verdict
from services.trainer.pipeline.report import MEASURES, Calibration, Comparison, Report

CURVE, LADDER = "training_curve.png", "ladder.png"
SLICES, RELIABILITY = "slices.png", "reliability.png"
SIMULATION = "SIMULATION"
_RUNGS = {
    "blend": "what is served",
    "transformer": "its sequence model alone",
    "cooccurrence": "its counts of what follows what alone",
    "item_knn": "item-kNN, cosine",
    "ease": "EASE (Steck, 2019)",
    "founding": "dot product of person and item, binary cross-entropy",
    "popularity_decayed": "recent popularity, the same for all",
    "popularity": "popularity, the same for all",
}
_BEYOND = ("coverage@10", "novelty@10", "diversity@10", "popularity_bias@10")


def gate_table(verdict: Verdict) -> list[str]:
    """Returns the lines of a table in Markdown: each check of the gate, whether it passed, and why."""
    return [
        "| check | passed | finding |",
        "|---|---|---|",
        *(f"| {c.name} | {'yes' if c.passed else '**no**'} | {c.reason} |" for c in verdict.checks),
    ]


def draw_curve(
    epochs: Sequence[int], losses: Sequence[float], ndcgs: Sequence[float], best_epoch: int, label: str = ""
) -> bytes:
    """Returns a PNG of loss and validation NDCG@10 by pass."""
    plt = pyplot()
    figure, left = plt.subplots(figsize=(6, 3.6), dpi=110)
    # Marked, so that a training of one pass shows too.
    left.plot(epochs, losses, color="tab:grey", marker=".", label="training loss")
    left.set_xlabel("pass over the data")
    left.set_xlim(0.5, max(epochs, default=1) + 0.5)
    left.xaxis.get_major_locator().set_params(integer=True)
    left.set_ylabel("training loss (nats an event)")
    right = left.twinx()
    # Not every pass is measured.
    measured = [(epoch, ndcg) for epoch, ndcg in zip(epochs, ndcgs, strict=True) if math.isfinite(ndcg)]
    right.plot(*zip(*measured, strict=True), color="tab:blue", marker=".", label="validation NDCG@10")
    right.axvline(best_epoch, color="tab:blue", linestyle=":", label=f"best pass: {best_epoch}")
    right.set_ylabel("validation NDCG@10")
    right.set_ylim(bottom=0)
    handles = [*left.get_legend_handles_labels()[0], *right.get_legend_handles_labels()[0]]
    right.legend(handles, [handle.get_label() for handle in handles], loc="center right")
    return png(figure, label)


def draw_ladder(report: Report, label: str = "") -> bytes:
    """Returns a PNG of NDCG@10 of each contestant with its interval."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(6, 3), dpi=110)
    rungs = list(reversed(report.ladder))
    values = [rung.metrics["ndcg@10"] for rung in rungs]
    errors = [[v.value - v.low for v in values], [v.high - v.value for v in values]]
    colours = ["tab:blue" if rung.name == "blend" else "tab:grey" for rung in rungs]
    axes.barh([rung.name for rung in rungs], [v.value for v in values], xerr=errors, color=colours, capsize=3)
    axes.set_xlabel(f"NDCG@10, {report.confidence:.0%} interval")
    return png(figure, label)


def draw_slices(report: Report, comparison: Comparison | None = None, label: str = "") -> bytes:
    """Returns a PNG of the blend's NDCG@10 by part of the people, beside the incumbent's where both were asked."""
    plt = pyplot()
    parts = comparison.slices if comparison is not None and comparison.slices else report.slices
    parts = tuple(reversed(parts))
    figure, axes = plt.subplots(figsize=(7, 0.7 + 0.5 * max(len(parts), 1)), dpi=110)
    found = [part.metrics["ndcg@10"] for part in parts]
    errors = [[v.value - v.low for v in found], [v.high - v.value for v in found]]
    places = list(range(len(parts)))
    axes.barh(places, [v.value for v in found], 0.4, xerr=errors, color="tab:blue", capsize=3, label="blend")
    old = [part.incumbent_metrics["ndcg@10"] for part in parts if part.incumbent_metrics]
    if len(old) == len(parts) and old:
        axes.barh(
            [p - 0.4 for p in places],
            [v.value for v in old],
            0.4,
            color="tab:grey",
            label="version in service"
            + ("" if comparison is not None and comparison.same_people else ", as published"),
        )
        axes.legend()
    axes.set_yticks(places, [f"{part.name} ({part.user_count:,})" for part in parts])
    axes.set_xlabel(f"NDCG@10, {report.confidence:.0%} interval")
    return png(figure, label)


def draw_reliability(calibration: Calibration, label: str = "") -> bytes:
    """Returns a PNG of how often items were wanted against how probable the blend held that."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(4, 3.6), dpi=110)
    top = max(*calibration.expected, *calibration.observed, 1e-3) * 1.05
    axes.plot([0, top], [0, top], color="tab:grey", linestyle=":", label="as it says")
    axes.plot(calibration.expected, calibration.observed, "o-", color="tab:blue", label="blend, best 20")
    axes.set_xlabel("mean probability")
    axes.set_ylabel("share wanted")
    axes.set_title(f"expected calibration error {calibration.error:.4f}", fontsize=9)
    axes.legend()
    return png(figure, label)


def write_card(
    *,
    model: str,
    report: Report,
    verdict: Verdict,
    comparison: Comparison | None,
    data: Mapping[str, Any],
    hyper_parameters: Mapping[str, Any],
    notes: Sequence[str],
    label: str = "",
) -> str:
    """Returns the card in Markdown; a label, such as SIMULATION, stands above everything."""
    lines = [
        f"# Model card: {model}",
        "",
        *(
            [f"**{label}: the shoppers are made up. The numbers say nothing about people.**", ""]
            if label
            else []
        ),
        f"**Gate: {verdict.verdict}.** A causal Transformer over item histories, blended with directed "
        "co-occurrence. Input: pseudonymous histories of people who consented to training; no raw user id was read.",
        "",
        "## Gate",
        "",
        *gate_table(verdict),
        "",
        "## Quality",
        "",
        f"{report.protocol}. {report.user_count:,} people; {report.confidence:.0%} bootstrap intervals. "
        f"{report.tied_share:.0%} of the held-out events share their time with the event before (a basket): "
        "their order is arbitrary, and part of every number here.",
        "",
        "| | " + " | ".join(MEASURES) + " |",
        "|---|" + "---|" * len(MEASURES),
    ]
    for rung in report.ladder:
        cells = [_cell(rung.metrics[name]) for name in MEASURES]
        lines.append(f"| {rung.name} | {' | '.join(cells)} |")
    known = [f"{rung.name}: {_RUNGS[rung.name]}" for rung in report.ladder if rung.name in _RUNGS]
    lines += [
        "",
        "; ".join(known) + ". One item is wanted of each person, so that recall is the hit rate.",
        "",
        f"![ladder]({LADDER})",
        "",
        "### Beyond being right",
        "",
        "Coverage: share of the catalogue that somebody is shown. Novelty: mean rarity of a shown item, bits. "
        "Diversity: one less the mean cosine within a list. Popularity bias: how much more popular shown items are "
        "than wanted ones, in percentiles; 0 is none.",
        "",
        "| | " + " | ".join(_BEYOND) + " |",
        "|---|" + "---|" * len(_BEYOND),
        *(
            f"| {rung.name} | {' | '.join(f'{rung.metrics[name].value:.3f}' for name in _BEYOND)} |"
            for rung in report.ladder
        ),
        "",
        f"Calibration: the blend's probabilities for its best 20 are off by {report.calibration.error:.4f} on average "
        "(expected calibration error).",
        "",
        f"![reliability]({RELIABILITY})",
        "",
        "### Slices of the blend",
        "",
        "New people are those with few events, new items those with few. Segments are of the moment before the held-out "
        "event; those are left out that the log cannot tell apart.",
        "",
        "| people | number | hr@10 | ndcg@10 |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {part.name} | {part.user_count:,} | {_cell(part.metrics['hr@10'])} | {_cell(part.metrics['ndcg@10'])} |"
        for part in report.slices
    ]
    lines += ["", f"![slices]({SLICES})", *_versus(comparison)]
    lines += ["", "## Training", "", f"![training curve]({CURVE})", "", *(f"- {note}" for note in notes), ""]
    lines += ["## Data", "", "| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in data.items()), ""]
    lines += ["## Hyper-parameters", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in hyper_parameters.items()]
    lines += [
        "",
        "## Limits",
        "",
        "Offline numbers say how well the model foretells what people did without it, not what they would do with "
        "it; an experiment says that. Items without any event are unknown to it. Trained without differential "
        "privacy: rare histories may leave traces in the weights.",
        "",
    ]
    return "\n".join(lines)


def _versus(comparison: Comparison | None) -> list[str]:
    if comparison is None:
        return ["", "No version was in service to compare with."]
    if comparison.why_none:
        return ["", f"Not compared with the version in service, {comparison.version}: {comparison.why_none}."]
    lead = comparison.lead
    how = (
        f"on {comparison.user_count:,} people whose held-out event is newer than anything it was trained on"
        if comparison.same_people
        else "between the measures at publication of each: too few events are newer than it"
    )
    return [
        "",
        f"Against the version in service, {comparison.version}: NDCG@10 {lead.value:+.4f} "
        f"[{lead.low:.4f}, {lead.high:.4f}], {how}.",
    ]


def _cell(interval: Any) -> str:
    return f"{interval.value:.4f} [{interval.low:.4f}, {interval.high:.4f}]"


def pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def png(figure: Any, label: str) -> bytes:
    # A picture travels without its card: what is made up says so by itself.
    if label:
        figure.suptitle(label, color="tab:red", fontsize=9)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    pyplot().close(figure)
    return buffer.getvalue()
