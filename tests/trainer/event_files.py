"""Reads what was written for TensorBoard, without it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Events:
    """The events of a directory.

    Attributes:
        scalars: (step, value) by name, in the order written.
        texts: by name.
        pictures: PNGs by name, with the width and the height that are told of each.
    """

    scalars: dict[str, list[tuple[int, float]]]
    texts: dict[str, str]
    pictures: dict[str, tuple[int, int, bytes]]


def events_in(directory: Path) -> Events:
    """Returns the events of every file of a directory."""
    import tensorflow as tf
    from tensorflow.core.util import event_pb2

    found = Events({}, {}, {})
    for path in sorted(directory.glob("events.out.tfevents.*")):
        for record in tf.data.TFRecordDataset(str(path)):
            event = event_pb2.Event.FromString(record.numpy())
            for value in event.summary.value:
                plugin, tensor = value.metadata.plugin_data.plugin_name, tf.make_ndarray(value.tensor)
                if plugin == "scalars":
                    found.scalars.setdefault(value.tag, []).append((event.step, float(tensor)))
                elif plugin == "images":
                    width, height, png = tensor.tolist()
                    found.pictures[value.tag] = (int(width), int(height), png)
                else:
                    assert plugin == "text"
                    found.texts[value.tag] = tensor.item().decode()
    return found
