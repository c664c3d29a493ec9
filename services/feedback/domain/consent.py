"""What a person allows, and the proof that a person was erased."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime


@dataclass(frozen=True, slots=True)
class Consent:
    """A person's consent; None where it was never said, and the default is in force.

    Attributes:
        updated_at: when it was last set, UTC; None when it never was.
        forgotten: the person has been erased.
    """

    personalisation: bool | None = None
    training: bool | None = None
    marketing: bool | None = None
    updated_at: datetime | None = None
    forgotten: bool = False

    def in_force(self) -> Consent:
        """Returns the consent with the defaults filled in: all but marketing are allowed."""
        if self.forgotten:
            return Consent(False, False, False, self.updated_at, True)
        return Consent(
            True if self.personalisation is None else self.personalisation,
            True if self.training is None else self.training,
            False if self.marketing is None else self.marketing,
            self.updated_at,
        )


@dataclass(frozen=True, slots=True)
class ModelVersion:
    """A model version in the registry.

    Attributes:
        in_service: whether `production` points at it.
        retire_at: when it is removed at the latest; None while an alias names it, or where versions stay for ever.
    """

    model: str
    version: str
    created_at: datetime
    in_service: bool
    retire_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Erasure:
    """What the store erased.

    Attributes:
        erased_at: when the person was first forgotten, UTC.
        rows: number of rows erased by table.
        first_received_at: when the first of the person's events came in, as of this erasure or an earlier one; None
            when there never were any.
    """

    erased_at: datetime
    rows: Mapping[str, int]
    first_received_at: datetime | None


@dataclass(frozen=True, slots=True)
class Receipt:
    """A signed statement about an erasure."""

    receipt_id: str
    erasure: Erasure
    user_keys: Sequence[bytes]
    model_versions: Sequence[ModelVersion]
    signed_payload: bytes
    signature: bytes


def containing_versions(
    versions: Sequence[ModelVersion], first_received_at: datetime | None
) -> list[ModelVersion]:
    """Returns the versions trained since the person's first event came in: they may carry its traces."""
    if first_received_at is None:
        return []
    return [version for version in versions if version.created_at >= first_received_at]


def receipt_payload(
    receipt_id: str, erasure: Erasure, user_keys: Sequence[bytes], model_versions: Sequence[ModelVersion]
) -> bytes:
    """Returns the statement that is signed: canonical JSON, keys sorted, no spaces, UTF-8."""
    statement = {
        "receipt_id": receipt_id,
        "erased_at": erasure.erased_at.isoformat(),
        "user_keys": [key.hex() for key in user_keys],
        "erased_rows": dict(erasure.rows),
        "model_versions": [
            {
                "model": version.model,
                "version": version.version,
                "create_time": version.created_at.isoformat(),
                "in_service": version.in_service,
                "retire_time": version.retire_at.isoformat() if version.retire_at else None,
            }
            for version in model_versions
        ],
    }
    return json.dumps(statement, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
