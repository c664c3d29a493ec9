"""A training's curves and its outcome as the events that TensorBoard shows.

Written with TensorFlow alone: `tf.summary.scalar`, `.text` and `.image` want TensorBoard installed, which no run needs;
what they write is a tensor beside the name of the plugin that shows it.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shared.bundle.manifest import CARD

if TYPE_CHECKING:
    from services.trainer.pipeline.report import Comparison, Report
    from services.trainer.pipeline.training import PassCurve

DIRECTORY = "tensorboard"
# Of a pass, each the mean of neighbouring steps; TensorBoard draws a thousand of a curve.
_POINTS_OF_PASS = 100

# Told (step, value by name).
Scalars = Callable[[int, Mapping[str, float]], None]


def no_scalars(step: int, values: Mapping[str, float]) -> None:
    """Keeps nothing."""


class EventLog:
    """Writes events into a directory; one that cannot be written costs the curves, not the run.

    Args:
        directory: of the run's events; is made with the first of them.
        say: is told, once, why nothing more is written.
    """

    def __init__(self, directory: Path, say: Callable[[str], None] = lambda _: None) -> None:
        self._directory, self._say = directory, say
        self._writer: Any = None
        self._is_broken = False
        self._last_step = 0

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes numbers by name, such as "train/loss"."""
        self._last_step = max(self._last_step, step)
        self._write(step, {name: np.float32(value) for name, value in values.items()}, "scalars")

    def text(self, name: str, markdown: str) -> None:
        """Writes a text in Markdown."""
        self._write(self._last_step, {name: markdown}, "text")

    def picture(self, name: str, png: bytes) -> None:
        """Writes a PNG."""
        width, height = struct.unpack(">II", png[16:24])
        # As `tf.summary.image` has it: what it measures, then the picture, all of them strings.
        value = np.array([str(width).encode(), str(height).encode(), png], object)
        self._write(self._last_step, {name: value}, "images")

    def outcome(self, manifest: Mapping[str, Any], attachments: Mapping[str, bytes]) -> None:
        """Writes what a run came to, at its last step: the numbers, the card, and the card's pictures.

        Args:
            manifest: fields of the version's manifest.
            attachments: of the version, by file name; what is neither the card nor a PNG is left out.
        """
        self.scalars(self._last_step, scalars_of(manifest))
        self.text("card", attachments[CARD].decode())
        for name in sorted(attachments):
            if name.endswith(".png"):
                self.picture(f"card/{name.removesuffix('.png')}", attachments[name])

    def close(self) -> None:
        """Writes what is still in memory."""
        if self._writer is not None:
            self._attempt(self._writer.close)

    def _write(self, step: int, values: Mapping[str, Any], plugin: str) -> None:
        # Imported here: a run with too little data ends without it.
        import tensorflow as tf
        from tensorflow.core.framework import summary_pb2

        metadata = summary_pb2.SummaryMetadata(
            plugin_data=summary_pb2.SummaryMetadata.PluginData(plugin_name=plugin),
            data_class={
                "scalars": summary_pb2.DATA_CLASS_SCALAR,
                "images": summary_pb2.DATA_CLASS_BLOB_SEQUENCE,
            }.get(plugin, summary_pb2.DATA_CLASS_TENSOR),
        )

        def write() -> None:
            if self._writer is None:
                self._writer = tf.summary.create_file_writer(str(self._directory))
            with self._writer.as_default():
                for name, value in values.items():
                    tf.summary.write(name, value, step=step, metadata=metadata)
            self._writer.flush()

        self._attempt(write)

    def _attempt(self, write: Callable[[], None]) -> None:
        if self._is_broken:
            return
        import tensorflow as tf

        try:
            write()
        except (OSError, tf.errors.OpError) as error:
            self._is_broken = True
            why = (str(error).strip() or type(error).__name__).splitlines()[0]
            self._say(f"The curves for TensorBoard cannot be written ({why}); the run goes on without.")


def scalars_of_pass(write: Scalars, last_step: int, curve: PassCurve) -> None:
    """Writes loss and learning rate of the steps of a pass, neighbouring steps together where there are many.

    Args:
        last_step: steps made by the end of the pass.
    """
    count = len(curve.loss_S)
    step_S = np.arange(last_step - count + 1, last_step + 1)
    parts = np.array_split(np.arange(count), min(count, _POINTS_OF_PASS))
    for part in parts:
        write(
            int(step_S[part[-1]]),
            {
                "train/loss": float(curve.loss_S[part].mean()),
                "train/learning_rate": float(curve.rate_S[part].mean()),
            },
        )


def interval(name: str, value: Mapping[str, float]) -> dict[str, float]:
    """Returns a measure and the ends of its interval by name; of one without an interval itself alone."""
    if value["low"] == value["high"]:
        return {name: value["value"]}
    return {name: value["value"], f"{name}/low": value["low"], f"{name}/high": value["high"]}


def scalars_of_leads(report: Report, comparison: Comparison | None) -> dict[str, float]:
    """Returns by how much NDCG@10 leads popularity, and the version in service where that was compared with."""
    found = interval("gate/lead over popularity", report.lead_over_popularity._asdict())
    if comparison is not None and not comparison.why_none:
        found |= interval("gate/lead over the incumbent", comparison.lead._asdict())
        of_whom = "; newer than the incumbent" if comparison.same_people else ""
        for part in comparison.slices:
            if part.lead_over_incumbent is not None:
                found |= interval(f"slices/{part.name}{of_whom}/lead", part.lead_over_incumbent._asdict())
    return found


def scalars_of(manifest: Mapping[str, Any]) -> dict[str, float]:
    """Returns the numbers of a version's manifest by name: gate/…, ladder/…, slices/…, run/…."""
    gate = manifest["gate"]
    found: dict[str, float] = {"gate/passed": float(gate["verdict"] == "PASSED")}
    for check in gate["checks"]:
        # Slices share the name of their check: one that fails, fails it.
        name = f"gate/checks/{check['name']}"
        found[name] = min(found.get(name, 1.0), float(check["passed"]))
    for rung, measures in {"blend": manifest["metrics"], **manifest["baselines"]}.items():
        for measure, value in measures.items():
            found |= interval(f"ladder/{rung}/{measure}", value)
    for part in manifest["slices"]:
        found[f"slices/{part['name']}/people"] = float(part["users"])
        for measure, value in part["metrics"].items():
            found |= interval(f"slices/{part['name']}/{measure}", value)
        for measure, value in part.get("incumbent_metrics", {}).items():
            found |= interval(f"slices/{part['name']}/{measure} of the incumbent", value)
    return found | {f"run/{name}": float(value) for name, value in manifest.get("training", {}).items()}
