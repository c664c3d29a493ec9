"""The state of a training on disk, so that a killed run goes on from its last pass. NumPy only.

One file a run: the SHA-256 of everything after it, then a safetensors file. It is replaced by one rename; a file
whose digest does not fit, or that belongs to other events, another size or other code, is refused, and the training
begins anew.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from services.trainer.pipeline.dataset import Histories, ItemAttributes
from shared.bundle.registry import write_atomically

Array = npt.NDArray[Any]

CHECKPOINT = "checkpoint"
_DIGEST_BYTES = 32
_STATE = "state"
# Writing may take this share of the time.
_WRITING_SHARE = 0.05


@dataclass(frozen=True, slots=True)
class TrainingState:
    """Where a training stands after a whole pass.

    Attributes:
        weights: everything that the model and its optimiser hold, in the model's order.
        best_weights: of the best pass so far.
        progress: counts, reports and the generator's state, as JSON.
    """

    weights: Sequence[Array]
    best_weights: Sequence[Array]
    progress: Mapping[str, Any]


class Checkpoints:
    """The checkpoint of one run.

    Args:
        directory: the run's own.
        report: told, in words, what becomes of a checkpoint that is there.
    """

    def __init__(self, directory: Path, report: Callable[[str], None] = lambda _: None) -> None:
        self._path, self._report = directory / CHECKPOINT, report
        self._fingerprint = ""
        self._written_at, self._writing_seconds = -np.inf, 0.0

    def belong_to(self, fingerprint: str) -> None:
        """Says what the training depends on, see `fingerprint_of`."""
        self._fingerprint = fingerprint

    def load(self) -> TrainingState | None:
        """Returns the state to go on from, or None where there is none that can be trusted."""
        try:
            content = self._path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            self._report(f"The checkpoint cannot be read ({error.strerror}); training begins anew.")
            return None
        digest, payload = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
        if hashlib.sha256(payload).digest() != digest:
            self._report(
                "The checkpoint is damaged and refused: its digest does not fit. Training begins anew."
            )
            return None
        try:
            arrays = load(payload)
            progress = json.loads(arrays.pop(_STATE).tobytes())
        except (SafetensorError, KeyError, ValueError):
            self._report("The checkpoint is refused: it is none. Training begins anew.")
            return None
        if progress.pop("fingerprint", None) != self._fingerprint:
            self._report(
                "The checkpoint is refused: the events, the size or the code are others than when it was written. "
                "Training begins anew."
            )
            return None
        return TrainingState(_in_order(arrays, "weight"), _in_order(arrays, "best"), progress)

    def save(self, state: TrainingState, *, now: Callable[[], float] = time.monotonic) -> bool:
        """Replaces the checkpoint, unless that would take too much of the time; returns whether it did.

        A disk that refuses costs the checkpoint, not the run: the one before stays as it was.
        """
        began = now()
        if began - self._written_at < self._writing_seconds / _WRITING_SHARE:
            return False
        fields = {**state.progress, "fingerprint": self._fingerprint}
        arrays = {
            **{f"weight.{place}": array for place, array in enumerate(state.weights)},
            **{f"best.{place}": array for place, array in enumerate(state.best_weights)},
            _STATE: np.frombuffer(json.dumps(fields).encode(), np.uint8),
        }
        payload = save({name: np.asarray(array, order="C") for name, array in arrays.items()})
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._path, hashlib.sha256(payload).digest() + payload)
            written = True
        except OSError as error:
            self._report(f"No checkpoint could be written ({error.strerror}); training goes on without.")
            written = False
        self._written_at = now()
        self._writing_seconds = self._written_at - began
        return written

    def remove(self) -> None:
        """Removes the checkpoint."""
        self._path.unlink(missing_ok=True)


def fingerprint_of(
    histories: Histories, attributes: ItemAttributes, size: Mapping[str, Any], seed: int, code_version: str
) -> str:
    """Returns a digest of everything that a training's outcome depends on."""
    digest = hashlib.sha256(json.dumps([size, seed, code_version], sort_keys=True).encode())
    arrays: list[Array] = [
        histories.start_U1, histories.item_E, histories.kind_E, histories.time_E, attributes.attribute_IP,
    ]  # fmt: skip
    if attributes.content_IC is not None:
        arrays.append(attributes.content_IC)
    for array in arrays:
        digest.update(str((array.shape, array.dtype)).encode())
        digest.update(np.ascontiguousarray(array).data)
    digest.update("\0".join(histories.item_ids).encode())
    return digest.hexdigest()


def _in_order(arrays: Mapping[str, Array], prefix: str) -> list[Array]:
    count = sum(name.startswith(f"{prefix}.") for name in arrays)
    return [arrays[f"{prefix}.{place}"] for place in range(count)]
