"""Training that begins at the weights of a published version: an incremental refresh.

A version carries what its training may go on from: the rows of its tables by item id and by attribute, and the encoder.
Items that it does not know begin at the mean of those it knows, plus what their attributes say; the optimiser
begins anew. I = items, A = attributes, D = width.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from services.trainer.domain.hyper_parameters import HyperParameters
from services.trainer.pipeline.dataset import MIN_USERS, HeldOut, Histories, ItemAttributes, Split
from shared.errors import FailedPrecondition

if TYPE_CHECKING:
    from services.trainer.pipeline.sequence_model import SequenceModel

Float32 = npt.NDArray[np.float32]

FILE = "training.safetensors"
# A refresh makes this share of the passes that a training from the start may: the weights are nearly there.
_PASSES_SHARE = 0.25


@dataclass(frozen=True, slots=True, eq=False)
class InitialWeights:
    """What a training begins with.

    Attributes:
        version: whose weights they are.
        item_ids: of the rows of `id_ID`.
        attribute_names: of the rows of `attribute_AD`.
        dense: everything else, in the model's order.
        last_event_microseconds: the newest event that they know, since 1970.
        lineage: how the version, and those whose weights it began with in turn, read the log.
    """

    version: str
    item_ids: Sequence[str]
    id_ID: Float32
    attribute_names: Sequence[str]
    attribute_AD: Float32
    dense: Sequence[Float32]
    last_event_microseconds: int
    lineage: Sequence[Mapping[str, str]] = ()


def weights_to_bytes(model: SequenceModel, attributes: ItemAttributes) -> bytes:
    """Returns the file that a version carries for trainings to come."""
    identity, attribute, *dense = model.weights()
    arrays: dict[str, npt.NDArray[Any]] = {
        "id": identity,
        "attribute": attribute[1:],
        "attribute_names": np.frombuffer(json.dumps(list(attributes.names)).encode(), np.uint8),
        **{f"dense.{place}": values for place, values in enumerate(dense)},
    }
    return save({name: np.ascontiguousarray(array) for name, array in arrays.items()})


def read_weights(
    directory: Path, version: str, item_ids: Sequence[str], manifest: dict[str, Any]
) -> InitialWeights:
    """Returns the weights of a version whose files are verified.

    Raises:
        FailedPrecondition: INITIAL_VERSION_UNFIT: it carries none, as a private one or one of an older build.
    """
    try:
        arrays = load((directory / FILE).read_bytes())
        dense = [arrays[f"dense.{n}"] for n in range(sum(name.startswith("dense.") for name in arrays))]
        last = datetime.fromisoformat(manifest["data"]["last_event_at"])
        return InitialWeights(
            version, item_ids, arrays["id"], json.loads(arrays["attribute_names"].tobytes()),
            arrays["attribute"], dense, round(last.timestamp() * 1e6), lineage_of(version, manifest),
        )  # fmt: skip
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise FailedPrecondition(
            "INITIAL_VERSION_UNFIT",
            f"Version {version} carries no weights that a training can begin with (a private version, or one of an "
            "older build). Leave initial_version out.",
        ) from error


def lineage_of(version: str, manifest: Mapping[str, Any]) -> list[dict[str, str]]:
    """Returns how a version and its ancestors read the log, from its manifest: the newest first.

    An erasure receipt names whoever began at weights that may hold the person, also when the ancestor is gone.
    """
    own = {
        "version": version,
        "created_at": manifest["created_at"],
        "requested_at": manifest.get("requested_at", ""),
        "watermark": manifest["data"].get("watermark", ""),
    }
    return [own, *manifest.get("lineage", [])]


def begin_at(
    initial: InitialWeights, model: SequenceModel, item_ids: Sequence[str], attributes: ItemAttributes
) -> int:
    """Sets the weights of a new model; returns how many of its items were known.

    Raises:
        FailedPrecondition: INITIAL_VERSION_UNFIT: the sizes differ.
    """
    identity, attribute, *dense = model.weights()
    ours, theirs = [values.shape for values in dense], [values.shape for values in initial.dense]
    if ours != theirs or identity.shape[1] != initial.id_ID.shape[1]:
        raise FailedPrecondition(
            "INITIAL_VERSION_UNFIT",
            f"Version {initial.version} has another size than the one asked for, or other content vectors. Ask for its "
            "size, or leave initial_version out.",
        )
    known = _copy_rows(identity, item_ids, initial.id_ID, initial.item_ids)
    _copy_rows(attribute[1:], attributes.names, initial.attribute_AD, initial.attribute_names)
    model.set_weights([identity, attribute, *initial.dense])
    model.start_averages()
    return known


def _copy_rows(target_RD: Float32, names_R: Sequence[str], source_SD: Float32, names_S: Sequence[str]) -> int:
    """Fills rows by name, those without a namesake with the mean; returns how many had one."""
    place_of = {name: place for place, name in enumerate(names_S)}
    source_R = np.array([place_of.get(name, -1) for name in names_R], np.int64)
    if len(source_SD):
        target_RD[:] = source_SD.mean(axis=0)
        target_RD[source_R >= 0] = source_SD[source_R[source_R >= 0]]
    return int((source_R >= 0).sum())


def shortened(size: HyperParameters) -> HyperParameters:
    """Returns the size with the passes of a refresh."""
    return replace(size, max_epochs=max(2, round(_PASSES_SHARE * size.max_epochs)))


def only_newer(moment_microseconds: int, histories: Histories, split: Split) -> Split:
    """Returns the split with those held-out events alone that are newer than a moment.

    A version has learned from every event of its day: asked for one of those again, it would remember, not foretell.

    Raises:
        FailedPrecondition: TOO_LITTLE_DATA: there are too few.
    """

    def newer(held_out: HeldOut) -> HeldOut:
        time_B = histories.time_E[histories.start_U1[held_out.user_B] + held_out.prefix_B]
        return held_out.take(np.flatnonzero(time_B > moment_microseconds))

    validation, test = newer(split.validation), newer(split.test)
    if min(len(validation), len(test)) < MIN_USERS:
        raise FailedPrecondition(
            "TOO_LITTLE_DATA",
            f"Only {min(len(validation), len(test))} events that could be held out are newer than what initial_version "
            f"has learned from; {MIN_USERS} are needed to measure what begins at its weights. Wait for more, or leave it out.",
        )
    return replace(split, validation=validation, test=test)
