"""Loads a version, or refuses it: nothing half-right ever serves.

weights.safetensors holds, for I items of dimension D:

    item_vectors          (I, D)    float32  input and output of the encoder
    item_bias             (I,)      float32
    popularity            (I,)      float32  decayed counts, at least 0
    cooccurrence_indptr   (I + 1,)  int64    rows of C, see shared.bundle.scoring
    cooccurrence_indices  (nnz,)    int32
    cooccurrence_weights  (nnz,)    float32  at least 0
    backward_indptr, backward_indices, backward_weights      optional: rows of the backward counts, likewise
    attribute_queries     (I, R)    float32  optional, with the next
    attribute_keys        (I, R)    float32  what attributes say: see shared.bundle.scoring
    last_seen             (I,)      int64    optional: last event, Unix seconds

vocabulary.safetensors holds `utf8` (N,) uint8 and `offsets` (I + 1,) int64.

ranker.safetensors, optional, holds the second stage: see `shared.bundle.ranker`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from shared.bundle.arrays import Vocabulary, map_arrays, release_pages
from shared.bundle.encoder import LiteRtEncoder
from shared.bundle.manifest import (
    ENCODER,
    MANIFEST,
    VOCABULARY,
    WEIGHTS,
    ScoringParameters,
    damaged,
    read_manifest,
    sha256_of,
)
from shared.bundle.ranker import RANKER, Ranker, ranker_of
from shared.bundle.scoring import Companion, CooccurrenceMatrix

_PIECE = 1 << 22
"""Numbers that are checked at a time."""


@dataclass(frozen=True, slots=True, eq=False)
class Bundle:
    """A verified model version in memory. Immutable; any number of threads may use it.

    Attributes:
        manifest: as in manifest.json.
        scoring: the constants of the blend.
        max_history: L of the encoder.
        dimension: D of the item vectors.
        item_ids: raw item ids in index order.
        item_vectors, item_bias, popularity, last_seen: see the module.
        companion: counts and attribute factors.
        encoder: the LiteRT runner.
        ranker: the second stage; None where the version has none, or one of a later format.
    """

    manifest: dict[str, Any]
    scoring: ScoringParameters
    max_history: int
    dimension: int
    item_ids: Vocabulary
    item_vectors: npt.NDArray[np.float32]
    item_bias: npt.NDArray[np.float32]
    popularity: npt.NDArray[np.float32]
    companion: Companion
    last_seen: npt.NDArray[np.int64] | None
    encoder: LiteRtEncoder
    ranker: Ranker | None = None

    @property
    def model(self) -> str:
        """Name of the model."""
        return str(self.manifest["model"])

    @property
    def version(self) -> str:
        """Id of the version."""
        return str(self.manifest["version"])

    @property
    def cooccurrence(self) -> CooccurrenceMatrix:
        """The forward counts."""
        return self.companion.forward

    @property
    def item_count(self) -> int:
        """I, the number of items."""
        return len(self.item_bias)

    def index_of(self, item_id: str) -> int | None:
        """Returns the item's index, or None for an item that the model does not know."""
        return self.item_ids.index_of(item_id)


def load_bundle(
    path: Path, public_key: Ed25519PublicKey, *, expected_name: tuple[str, str] | None = None
) -> Bundle:
    """Returns the version in a directory `<model>/<version>`.

    Args:
        path: its directory.
        public_key: of who signs bundles.
        expected_name: (model, version) that the manifest must name; by default those of the path, so
            that a version copied under another name is refused.

    Raises:
        DataLoss: BUNDLE_DAMAGED: a signature, file, digest, schema, shape, dtype or operator does not
            fit. Metadata `file` and the message say which.
    """
    manifest = read_manifest(path, public_key)
    named = (manifest.get("model"), manifest.get("version"))
    if named != (expected_name or (path.parent.name, path.name)):
        raise damaged(path, MANIFEST, f"it belongs to model {named[0]}, version {named[1]}")
    _check_files(path, manifest)
    try:
        scoring = ScoringParameters.from_json(manifest["scoring"])
        max_history = int(manifest["encoder"]["max_history"])
        dimension = int(manifest["encoder"]["dimension"])
    except (KeyError, TypeError, ValueError) as error:
        raise damaged(path, MANIFEST, f"scoring or encoder is not described ({error!r})") from error
    try:
        letters = map_arrays(path / VOCABULARY)
        _check_array(letters, "utf8", np.uint8, (None,))
        _check_array(letters, "offsets", np.int64, (None,))
        item_ids = Vocabulary(letters["utf8"], letters["offsets"])  # type: ignore[arg-type]
    except (ValueError, OSError) as error:
        raise damaged(path, VOCABULARY, str(error)) from error
    try:
        weights: Any = map_arrays(path / WEIGHTS)
        _check_weights(weights, len(item_ids), dimension)
    except (ValueError, OSError) as error:
        raise damaged(path, WEIGHTS, str(error)) from error
    try:
        encoder = LiteRtEncoder((path / ENCODER).read_bytes(), max_history, dimension)
    except (ValueError, OSError) as error:
        raise damaged(path, ENCODER, str(error)) from error
    ranker = None
    if RANKER in manifest["files"]:
        try:
            ranker = ranker_of(manifest.get("ranker"), map_arrays(path / RANKER), len(item_ids))
        except (ValueError, OSError) as error:
            raise damaged(path, RANKER, str(error)) from error
    # All of it was read to verify it; who serves it reads parts.
    release_pages(weights["item_vectors"])
    return Bundle(
        manifest=manifest,
        scoring=scoring,
        max_history=max_history,
        dimension=dimension,
        item_ids=item_ids,
        item_vectors=weights["item_vectors"],
        item_bias=weights["item_bias"],
        popularity=weights["popularity"],
        companion=Companion.from_arrays(weights, scoring),
        last_seen=weights.get("last_seen"),
        encoder=encoder,
        ranker=ranker,
    )


def _check_files(path: Path, manifest: dict[str, Any]) -> None:
    listed = manifest.get("files")
    if not isinstance(listed, dict) or not {WEIGHTS, VOCABULARY, ENCODER} <= set(listed):
        raise damaged(path, MANIFEST, "it does not list every file")
    try:
        present = {entry.name for entry in path.iterdir()}
    except OSError as error:
        raise damaged(path, MANIFEST, error.strerror or str(error)) from error
    for name in sorted(present - set(listed) - {MANIFEST}):
        raise damaged(path, name, "the manifest does not list it")
    for name in sorted(listed):
        try:
            digest, size = sha256_of(path / name)
        except OSError as error:
            raise damaged(path, name, error.strerror or str(error)) from error
        if listed[name] != {"sha256": digest, "bytes": size}:
            raise damaged(path, name, "its SHA-256 or its size is not what the manifest says")


def _check_array(
    arrays: dict[str, Any], name: str, dtype: type[np.generic], shape: tuple[int | None, ...]
) -> None:
    array = arrays.get(name)
    if array is None:
        raise ValueError(f"array {name} is missing")
    fits = array.ndim == len(shape) and all(
        wanted in (None, length) for wanted, length in zip(shape, array.shape, strict=True)
    )
    if array.dtype != dtype or not fits:
        raise ValueError(f"array {name} is {array.shape} {array.dtype}, not {shape} {np.dtype(dtype)}")
    if np.issubdtype(array.dtype, np.floating) and not _is_finite(array):
        raise ValueError(f"array {name} holds a value that is not finite")


def _is_finite(array: npt.NDArray[np.floating]) -> bool:
    flat = array.reshape(-1)
    # In pieces: a byte for each of the numbers of ten million vectors would be 640 MB for a moment.
    return all(bool(np.isfinite(flat[start : start + _PIECE]).all()) for start in range(0, len(flat), _PIECE))


def _check_weights(weights: dict[str, Any], item_count: int, dimension: int) -> None:
    """Raises ValueError unless the arrays are those of the module's table."""
    _check_array(weights, "item_vectors", np.float32, (item_count, dimension))
    _check_array(weights, "item_bias", np.float32, (item_count,))
    _check_array(weights, "popularity", np.float32, (item_count,))
    if np.any(weights["popularity"] < 0):
        raise ValueError("a count is negative")
    if "last_seen" in weights:
        _check_array(weights, "last_seen", np.int64, (item_count,))
    _check_counts(weights, "cooccurrence", item_count)
    if any(name.startswith("backward_") for name in weights):
        _check_counts(weights, "backward", item_count)
    if "attribute_queries" in weights or "attribute_keys" in weights:
        _check_array(weights, "attribute_queries", np.float32, (item_count, None))
        _check_array(weights, "attribute_keys", np.float32, weights["attribute_queries"].shape)


def _check_counts(weights: dict[str, Any], name: str, item_count: int) -> None:
    _check_array(weights, f"{name}_indptr", np.int64, (item_count + 1,))
    _check_array(weights, f"{name}_indices", np.int32, (None,))
    nnz = len(weights[f"{name}_indices"])
    _check_array(weights, f"{name}_weights", np.float32, (nnz,))
    indptr_I1, indices_N = weights[f"{name}_indptr"], weights[f"{name}_indices"]
    if indptr_I1[0] != 0 or indptr_I1[-1] != nnz or np.any(np.diff(indptr_I1) < 0):
        raise ValueError(f"{name}_indptr does not tile the rows")
    if nnz and (indices_N.min() < 0 or indices_N.max() >= item_count):
        raise ValueError(f"{name}_indices points outside the catalogue")
    if np.any(weights[f"{name}_weights"] < 0):
        raise ValueError("a count is negative")
