"""Publishes a version: all of it appears by one rename, or nothing does."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from shared.bundle.arrays import encode_arrays, join_utf8
from shared.bundle.manifest import (
    ENCODER,
    MANIFEST,
    SCHEMA_VERSION,
    VOCABULARY,
    WEIGHTS,
    canonical_json,
    check_name,
    sha256_of,
    sign_manifest,
)
from shared.bundle.reader import load_bundle
from shared.bundle.registry import STAGING_PREFIX, Registry, fsync_directory


def new_version(now: datetime) -> str:
    """Returns a version id, `YYYYMMDDtHHMMSSz-` and six random hex digits; later ones sort later."""
    return f"{now.astimezone(UTC):%Y%m%dt%H%M%Sz}-{secrets.token_hex(3)}"


def write_bundle(
    registry: Registry,
    model: str,
    *,
    arrays: Mapping[str, npt.NDArray[np.generic]],
    vocabulary: Sequence[str],
    encoder_bytes: bytes,
    manifest_fields: Mapping[str, Any],
    attachments: Mapping[str, bytes],
    signing_key: Ed25519PrivateKey,
    before_publish: Callable[[], None] | None = None,
    fence: int | None = None,
    now: datetime | None = None,
) -> str:
    """Publishes a version and returns its id.

    Args:
        arrays: the contents of weights.safetensors, see `shared.bundle.reader`.
        vocabulary: item ids in index order.
        encoder_bytes: the LiteRT model.
        manifest_fields: `encoder`, `scoring`, `hyper_parameters`, `data`, `metrics`, `baselines`,
            `gate`, `code_version` and whatever else; the writer adds the rest.
        attachments: further files by name, such as card.md and charts.
        before_publish: called when all is on disk, just before the rename; raising stops it.
        fence: the number that came with the publisher's lease, see `Registry.fenced`.
        now: defaults to the system's clock.

    Raises:
        ValueError, DataLoss: what was given does not make a bundle that would load.
        Aborted: LEASE_LOST: another publisher has taken the lease since.
        OSError: the disk refuses. Nothing is left behind.
    """
    now = now or datetime.now(UTC)
    check_name(model, "model")
    version = new_version(now)
    utf8_N, offsets_I1 = join_utf8(vocabulary)
    contents: dict[str, bytes] = {
        **attachments,
        WEIGHTS: encode_arrays(arrays),
        VOCABULARY: encode_arrays({"utf8": utf8_N, "offsets": offsets_I1}),
        ENCODER: encoder_bytes,
    }
    for name in contents:
        if name == MANIFEST or name.startswith(".") or Path(name).name != name:
            raise ValueError(f"{name!r} cannot be the name of a bundle's file")
    parent = registry.root / model
    parent.mkdir(parents=True, exist_ok=True)
    staging = parent / f"{STAGING_PREFIX}{version}"
    try:
        staging.mkdir()
        for name, content in contents.items():
            _write(staging / name, content)
        fields = {
            **manifest_fields,
            "schema_version": SCHEMA_VERSION,
            "model": model,
            "version": version,
            "created_at": now.isoformat(timespec="seconds"),
            "files": _describe(staging, contents),
        }
        signed = sign_manifest(fields, signing_key)
        _write(staging / MANIFEST, canonical_json(signed))
        fsync_directory(staging)
        # What could not be loaded is not published.
        load_bundle(staging, signing_key.public_key(), expected_name=(model, version))
        if before_publish is not None:
            before_publish()
        with registry.fenced(model, fence):
            os.rename(staging, registry.version_path(model, version))
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    fsync_directory(parent)
    return version


def _describe(staging: Path, contents: Mapping[str, bytes]) -> dict[str, dict[str, str | int]]:
    described: dict[str, dict[str, str | int]] = {}
    for name in sorted(contents):
        digest, size = sha256_of(staging / name)
        described[name] = {"sha256": digest, "bytes": size}
    return described


def _write(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
