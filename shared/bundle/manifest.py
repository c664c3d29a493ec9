"""What a version says of itself, in canonical JSON, signed with Ed25519."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from shared.errors import DataLoss, FieldViolation, InvalidInput

SCHEMA_VERSION = 2
# Version 1 has neither backward counts nor attribute factors, and its scoring lacks their weights.
READABLE_SCHEMAS = (1, 2)
MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"
VOCABULARY = "vocabulary.safetensors"
ENCODER = "encoder.tflite"
CARD = "card.md"

NAME = re.compile(r"^[a-z0-9][a-z0-9_-]{0,62}$")
# A manifest is read whole before its signature is known to be good: its size is bounded.
MAX_MANIFEST_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class ScoringParameters:
    """The constants of the blend, see `shared.bundle.scoring`.

    Attributes:
        lambda_: weight of the forward counts, at least 0.
        scale: factor within the logarithms, at least 0.
        query_decay: weight of a history item relative to the next newer one, in (0, 1].
        window: newest history items that the companion looks at, at least 1.
        sequence: weight of the Transformer's logits, at least 0.
        backward, repeat: weights of the backward counts and of the items of the history themselves, any number.
    """

    lambda_: float
    scale: float = 30.0
    query_decay: float = 0.6065
    window: int = 50
    sequence: float = 1.0
    backward: float = 0.0
    repeat: float = 0.0

    def __post_init__(self) -> None:
        within = self.lambda_ >= 0 and self.scale >= 0 and 0 < self.query_decay <= 1 and self.window >= 1
        if not (within and self.sequence >= 0 and math.isfinite(self.backward + self.repeat)):
            raise ValueError(f"{self} is out of range")

    def to_json(self) -> dict[str, float | int]:
        """Returns the manifest's form."""
        return {
            "lambda": self.lambda_,
            "scale": self.scale,
            "query_decay": self.query_decay,
            "window": self.window,
            "sequence": self.sequence,
            "backward": self.backward,
            "repeat": self.repeat,
        }

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> ScoringParameters:
        """Reads the manifest's form; raises KeyError, TypeError or ValueError where it is not one."""
        return cls(
            lambda_=float(fields["lambda"]),
            scale=float(fields["scale"]),
            query_decay=float(fields["query_decay"]),
            window=int(fields["window"]),
            sequence=float(fields.get("sequence", 1.0)),
            backward=float(fields.get("backward", 0.0)),
            repeat=float(fields.get("repeat", 0.0)),
        )


def check_name(name: str, field: str) -> str:
    """Returns the name of a model, version or alias unchanged.

    Raises:
        InvalidInput: it does not match `^[a-z0-9][a-z0-9_-]{0,62}$`. Nothing else ever becomes a path.
    """
    if not NAME.fullmatch(name):
        problem = f"must match {NAME.pattern}: lower-case letters, digits, - and _, at most 63."
        raise InvalidInput("INVALID_REQUEST", f"{field} {problem}", {}, [FieldViolation(field, problem)])
    return name


def canonical_json(fields: Mapping[str, Any]) -> bytes:
    """Returns the one byte string that these fields have: sorted keys, no spaces, UTF-8, no NaN."""
    return json.dumps(
        fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def sign_manifest(fields: Mapping[str, Any], signing_key: Ed25519PrivateKey) -> dict[str, Any]:
    """Returns the fields with `signature`, over their canonical JSON without it."""
    unsigned = {name: value for name, value in fields.items() if name != "signature"}
    signature = signing_key.sign(canonical_json(unsigned))
    return {**unsigned, "signature": base64.b64encode(signature).decode()}


def read_manifest(directory: Path, public_key: Ed25519PublicKey | None = None) -> dict[str, Any]:
    """Returns the manifest in a version's directory; with a key, only when its signature fits.

    Raises:
        DataLoss: it is missing, no JSON object, of another schema, or not signed by this key.
    """
    path = directory / MANIFEST
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise damaged(directory, MANIFEST, f"it is larger than {MAX_MANIFEST_BYTES} bytes")
        content = path.read_bytes()
        manifest = json.loads(content)
    except OSError as error:
        raise damaged(directory, MANIFEST, error.strerror or str(error)) from error
    except (ValueError, RecursionError) as error:
        raise damaged(directory, MANIFEST, f"it is no JSON ({error})") from error
    if not isinstance(manifest, dict):
        raise damaged(directory, MANIFEST, "it is no JSON object")
    if public_key is not None:
        _verify(directory, manifest, content, public_key)
    if manifest.get("schema_version") not in READABLE_SCHEMAS:
        readable = " or ".join(map(str, READABLE_SCHEMAS))
        raise damaged(
            directory, MANIFEST, f"its schema is {manifest.get('schema_version')!r}, not {readable}"
        )
    return manifest


def sha256_of(path: Path) -> tuple[str, int]:
    """Returns the hexadecimal SHA-256 and the size in bytes of a file."""
    digest = hashlib.sha256()
    size = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
            size += len(chunk)
    return digest.hexdigest(), size


def damaged(directory: Path, file: str, why: str) -> DataLoss:
    """Returns the error for a version that does not fit together."""
    model, version = directory.parent.name, directory.name
    return DataLoss(
        "BUNDLE_DAMAGED",
        f"{file} of model {model}, version {version}, is refused: {why}. Promote another version, or publish anew.",
        {"model": model, "version": version, "file": file},
    )


def _verify(directory: Path, manifest: dict[str, Any], content: bytes, public_key: Ed25519PublicKey) -> None:
    unsigned = {name: value for name, value in manifest.items() if name != "signature"}
    try:
        signature = base64.b64decode(manifest["signature"], validate=True)
        public_key.verify(signature, canonical_json(unsigned))
    except (KeyError, TypeError, ValueError, InvalidSignature) as error:
        raise damaged(directory, MANIFEST, "its signature does not fit") from error
    # The signature covers the meaning; this covers the bytes: a manifest has one form only.
    if content != canonical_json(manifest):
        raise damaged(directory, MANIFEST, "its bytes are not the canonical form of what was signed")
