"""Errors that know the remedy, not the transport.

Every failure a caller can act on is one of these types. `shared.grpc_status`
alone translates them to and from gRPC. A reason is an upper-case identifier
that is documented in the service's `error_reason.proto`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One field of a request that is wrong.

    Attributes:
        field: path from the request's root, such as `events[3].purchase.lines[0].quantity`.
        description: what is wrong with the value, and what would be right.
        reason: upper-case identifier, or empty.
    """

    field: str
    description: str
    reason: str = ""


# Plain classes, not frozen dataclasses: an exception's traceback is assigned to on its way up.
class ShopkeeperError(Exception):
    """A failure with a reason from the contract.

    Args:
        reason: upper-case identifier, such as `PROFILE_NOT_FOUND`.
        message: one sentence for a developer: what is wrong, and the remedy.
        metadata: values that belong to the reason, by camelCase name. Never personal data.
    """

    def __init__(self, reason: str, message: str, metadata: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.metadata: dict[str, str] = dict(metadata or {})

    def __str__(self) -> str:
        return f"{self.reason}: {self.message}"


class InvalidInput(ShopkeeperError):
    """The request is wrong, whatever the state. `violations` names the fields."""

    def __init__(
        self,
        reason: str,
        message: str,
        metadata: Mapping[str, str] | None = None,
        violations: Sequence[FieldViolation] = (),
    ) -> None:
        super().__init__(reason, message, metadata)
        self.violations = tuple(violations)


class NotFound(ShopkeeperError):
    """The named resource does not exist, or may not be seen by this caller."""


class AlreadyExists(ShopkeeperError):
    """The resource that the request would create exists."""


class FailedPrecondition(ShopkeeperError):
    """The request is right, but not in this state."""


class Aborted(ShopkeeperError):
    """Somebody else was faster: read again, then retry."""


class PermissionDenied(ShopkeeperError):
    """The caller may not do this."""


class Unauthenticated(ShopkeeperError):
    """The caller did not say, or could not prove, who it is."""


class Unimplemented(ShopkeeperError):
    """The contract has this, this build does not."""


class DeadlineExceeded(ShopkeeperError):
    """The caller's time was over before the answer was ready."""


class Cancelled(ShopkeeperError):
    """The caller went away."""


class DataLoss(ShopkeeperError):
    """Stored bytes are not what was written: a digest, signature or shape does not fit."""


class Retryable(ShopkeeperError):
    """A failure that goes away: the caller is told when to try again."""

    def __init__(
        self,
        reason: str,
        message: str,
        metadata: Mapping[str, str] | None = None,
        retry_after_seconds: float = 0.5,
    ) -> None:
        super().__init__(reason, message, metadata)
        self.retry_after_seconds = retry_after_seconds


class ResourceExhausted(Retryable):
    """Over a limit, or over capacity."""


class Unavailable(Retryable):
    """A dependency is away; a retry helps."""
