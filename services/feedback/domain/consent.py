"""What a person allows, and the proof that a person was erased."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
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
class Reading:
    """When and how a training read the log.

    Attributes:
        published_at: when what it learned was published, UTC: it had read before.
        requested_at: when it was asked for, UTC: it read after; None where that is not known.
        saw: whether a transaction of the log was visible to it; None where that is not known.
    """

    published_at: datetime
    requested_at: datetime | None = None
    saw: Callable[[int], bool] | None = None


@dataclass(frozen=True, slots=True)
class ModelVersion:
    """A model version in the registry.

    Attributes:
        in_service: whether `production` points at it.
        retire_at: when it is removed at the latest; None while an alias names it, or where versions stay for ever.
        readings: of the log: its own, and those of the versions whose weights it began with.
    """

    model: str
    version: str
    created_at: datetime
    in_service: bool
    retire_at: datetime | None = None
    readings: Sequence[Reading] = ()


@dataclass(frozen=True, slots=True)
class Erasure:
    """What the store erased.

    Attributes:
        erased_at: when the person was first forgotten, UTC.
        rows: number of rows erased by table.
        first_received_at: when the first of the person's events came in, as of this erasure or an earlier one; None
            when there never were any.
        transaction: which buried the person, so that who sees it sees no event of theirs; None where that is not known.
        settled_at: when it had certainly been committed, UTC; None where that is not known.
    """

    erased_at: datetime
    rows: Mapping[str, int]
    first_received_at: datetime | None
    transaction: int | None = None
    settled_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Receipt:
    """A signed statement about an erasure."""

    receipt_id: str
    issued_at: datetime
    erasure: Erasure
    user_keys: Sequence[bytes]
    model_versions: Sequence[ModelVersion]
    signed_payload: bytes
    signature: bytes


def containing_versions(versions: Sequence[ModelVersion], erasure: Erasure) -> list[ModelVersion]:
    """Returns the versions that may carry traces of the person: one of their readings may have found events of theirs."""
    return [
        version
        for version in versions
        if any(
            may_have_found(reading, erasure) for reading in version.readings or [Reading(version.created_at)]
        )
    ]


def may_have_found(reading: Reading, erasure: Erasure) -> bool:
    """Returns whether a reading may have found events of an erased person; true where nothing proves that it did not."""
    if erasure.first_received_at is None or reading.published_at < erasure.first_received_at:
        return False
    # Numbers of transactions begin anew after a restore to a moment, where times do not: neither proves it alone.
    if reading.published_at < erasure.erased_at:
        return True
    if reading.saw is not None and erasure.transaction is not None:
        return not reading.saw(erasure.transaction)
    return (
        reading.requested_at is None
        or erasure.settled_at is None
        or reading.requested_at < erasure.settled_at
    )


def receipt_payload(
    receipt_id: str,
    issued_at: datetime,
    erasure: Erasure,
    user_keys: Sequence[bytes],
    model_versions: Sequence[ModelVersion],
) -> bytes:
    """Returns the statement that is signed: canonical JSON, keys sorted, no spaces, UTF-8."""
    statement = {
        "receipt_id": receipt_id,
        "issue_time": issued_at.isoformat(),
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
