"""Draws the panels of a dashboard where Grafana would put them, from what a Prometheus answered."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.integration.prometheus import Series

COLUMNS = 24
WIDTH_INCHES, ROW_INCHES, TITLE_INCHES, MARGIN = 16.0, 0.36, 0.5, 0.05
UNITS = {"s": "s", "bytes": "MiB", "percentunit": "%", "reqps": "/s", "d": "days", "none": ""}
SCALES = {"bytes": 1 / 2**20, "percentunit": 100.0}


def legend(target: dict[str, str], series: Series) -> str:
    """Returns the name of a line: the target's pattern, filled with the labels."""
    pattern = target.get("legendFormat") or ""
    filled = re.sub(r"\{\{(\w+)\}\}", lambda match: series.labels.get(match.group(1), ""), pattern)
    return filled.strip()


def draw(
    board: dict[str, Any], shown: dict[int, list[tuple[dict[str, str], list[Series]]]], path: Path
) -> None:
    """Writes a dashboard as a PNG.

    Args:
        board: the dashboard.
        shown: panel's id → its targets with what they show.
        path: of the picture.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Rectangle

    rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in board["panels"])
    height = rows * ROW_INCHES + TITLE_INCHES
    figure = pyplot.figure(figsize=(WIDTH_INCHES, height), facecolor="#f4f5f5")
    figure.text(
        0.01, 1 - 0.5 * TITLE_INCHES / height, board["title"], fontsize=14, va="center", weight="bold"
    )
    figure.text(
        0.99, 1 - 0.5 * TITLE_INCHES / height, "drawn from a Prometheus' answers, not by Grafana",
        fontsize=9, va="center", ha="right", color="#606060",
    )  # fmt: skip
    seconds = [each.times for panel in shown.values() for _, series in panel for each in series]
    span = tuple(datetime.fromtimestamp(at, UTC) for at in (min(map(min, seconds)), max(map(max, seconds))))
    for panel in board["panels"]:
        place = panel["gridPos"]
        # The panel's box in inches from the lower left corner, with a margin all around.
        left, width = (WIDTH_INCHES * place[side] / COLUMNS for side in ("x", "w"))
        bottom = (rows - place["y"] - place["h"]) * ROW_INCHES
        box = (left + MARGIN, bottom + MARGIN, width - 2 * MARGIN, place["h"] * ROW_INCHES - 2 * MARGIN)
        figure.add_artist(
            Rectangle(
                (box[0] / WIDTH_INCHES, box[1] / height), box[2] / WIDTH_INCHES, box[3] / height,
                facecolor="white", edgecolor="#d0d2d3", transform=figure.transFigure, zorder=-1,
            )
        )  # fmt: skip
        _draw_panel(figure, panel, shown[panel["id"]], box, (WIDTH_INCHES, height), span)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=75, metadata={"Software": None})
    pyplot.close(figure)


def _draw_panel(
    figure: Any,
    panel: dict[str, Any],
    shown: list[tuple[dict[str, str], list[Series]]],
    box: tuple[float, float, float, float],
    size: tuple[float, float],
    span: tuple[datetime, ...],
) -> None:
    """Draws one panel of the times `span` into `box` (left, bottom, width, height) of a figure of `size`, all in inches."""
    from matplotlib.dates import AutoDateLocator, DateFormatter

    left, bottom, width, height = box
    unit = panel["fieldConfig"]["defaults"].get("unit", "none")
    scale, suffix = SCALES.get(unit, 1.0), UNITS.get(unit, unit)
    lines = [(legend(target, each), each) for target, series in shown for each in series]
    figure.text(
        (left + 0.12) / size[0], (bottom + height - 0.16) / size[1], panel["title"], fontsize=9, va="center"
    )
    if panel["type"] == "stat":
        says = [f"{name} {scale * each.values[-1]:.4g} {suffix}".strip() for name, each in lines]
        figure.text(
            (left + width / 2) / size[0], (bottom + 0.43 * height) / size[1], "\n".join(says) or "No data",
            fontsize=24 if len(says) < 2 else 12, ha="center", va="center", color="#1f60c4",
        )  # fmt: skip
        return
    named = [name for name, _ in lines if name]
    columns = 1 if max(map(len, named), default=0) > width * 7 else 2 if width < 6 else 3
    legend_inches = 0.17 * -(-len(named) // columns) + 0.02
    axes = figure.add_axes(
        (
            (left + 0.55) / size[0], (bottom + 0.32 + legend_inches) / size[1],
            (width - 0.7) / size[0], (height - 0.67 - legend_inches) / size[1],
        )
    )  # fmt: skip
    for name, each in lines:
        at = [datetime.fromtimestamp(second, UTC) for second in each.times]
        axes.plot(at, [scale * value for value in each.values], label=name or None, linewidth=1.4)
    if not lines:
        axes.text(0.5, 0.5, "No data", ha="center", transform=axes.transAxes)
    highest = max((scale * max(each.values) for _, each in lines), default=0.0)
    lowest = min((scale * min(each.values) for _, each in lines), default=0.0)
    axes.set_ylim(min(0.0, 1.1 * lowest), 1.1 * highest if highest > 0 else 1.0)
    axes.set_xlim(*span)
    axes.set_ylabel(suffix, fontsize=7)
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(AutoDateLocator(minticks=4, maxticks=8))
    axes.xaxis.set_major_formatter(DateFormatter("%H:%M:%S"))
    axes.grid(alpha=0.3)
    if named:
        figure.legend(
            *axes.get_legend_handles_labels(), loc="lower left", ncols=columns, fontsize=7, frameon=False,
            bbox_to_anchor=((left + 0.08) / size[0], (bottom + 0.03) / size[1]),
            borderpad=0, labelspacing=0.25, handlelength=1.2, columnspacing=1.2, borderaxespad=0,
        )  # fmt: skip
