"""Who may call what, and how often: a policy file, deny by default.

    version: 1
    roles:
      storefront:
        identities: [spiffe://shopkeeper.local/ns/shop/sa/storefront]
        calls_per_second: 2000
        burst: 4000
    rpcs:
      /shopkeeper.recommend.v1.RecommendService/Recommend: [storefront]

An identity that is in no role may call nothing; an RPC that is not listed is called by nobody. An identity that is
in several roles has what any of them may do, and the highest of their limits.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import grpc
import yaml
from prometheus_client import Counter
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shared.authentication import Authenticator
from shared.errors import FailedPrecondition, PermissionDenied, ResourceExhausted
from shared.watched import LOOK_SECONDS, Watched

_DENIED = Counter(
    "shopkeeper_grpc_denied_total", "Calls refused before they reached their handler, by why.", ["cause"]
)
_NO_IDENTITY, _FORBIDDEN, _TOO_MANY = (
    _DENIED.labels(c) for c in ("unauthenticated", "forbidden", "rate_limited")
)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Role(_Strict):
    identities: list[str]
    description: str = ""
    calls_per_second: float = Field(100.0, gt=0)
    burst: int = Field(200, ge=1)


class _Document(_Strict):
    version: int = Field(ge=1, le=1)
    roles: dict[str, _Role]
    rpcs: dict[str, list[str]]


@dataclass(frozen=True, slots=True)
class Limit:
    """A token bucket: so many calls a second in the long run, so many at once."""

    calls_per_second: float
    burst: int


@dataclass(frozen=True, slots=True)
class Policy:
    """The policy, looked up by identity.

    Attributes:
        roles_of: identity → its roles.
        roles_for: RPC path, `/package.Service/Method` → the roles that may call it.
        limit_of: identity → its limit.
    """

    roles_of: Mapping[str, frozenset[str]]
    roles_for: Mapping[str, frozenset[str]]
    limit_of: Mapping[str, Limit]

    def allows(self, identity: str, rpc: str) -> bool:
        """Returns whether the identity may call the RPC."""
        return not self.roles_of.get(identity, _NONE).isdisjoint(self.roles_for.get(rpc, _NONE))


_NONE: frozenset[str] = frozenset()


def read_policy(path: Path) -> Policy:
    """Returns the policy of a file.

    Raises:
        FailedPrecondition: POLICY_UNUSABLE, with every problem.
    """
    try:
        document = _Document.model_validate(yaml.safe_load(path.read_bytes()))
    except OSError as error:
        raise _unusable(path, error.strerror or str(error)) from error
    except yaml.YAMLError as error:
        raise _unusable(path, f"it is no YAML ({error})") from error
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, p['loc']))}: {p['msg']}" for p in error.errors())
        raise _unusable(path, problems) from error
    unknown = sorted({role for roles in document.rpcs.values() for role in roles} - set(document.roles))
    if unknown:
        raise _unusable(path, f"rpcs name roles that are not defined: {', '.join(unknown)}")
    roles_of: dict[str, set[str]] = {}
    limit_of: dict[str, Limit] = {}
    for name, role in document.roles.items():
        for identity in role.identities:
            roles_of.setdefault(identity, set()).add(name)
            known = limit_of.get(identity, Limit(0.0, 0))
            limit_of[identity] = Limit(
                max(known.calls_per_second, role.calls_per_second), max(known.burst, role.burst)
            )
    return Policy(
        {identity: frozenset(roles) for identity, roles in roles_of.items()},
        {rpc: frozenset(roles) for rpc, roles in document.rpcs.items()},
        limit_of,
    )


class Gatekeeper:
    """Admits a call, or says why not.

    Args:
        policy: file, followed as it changes.
        authenticator: says who calls.
        clock: monotonic seconds.

    Raises:
        FailedPrecondition: POLICY_UNUSABLE.
    """

    def __init__(
        self,
        policy: Path,
        authenticator: Authenticator,
        clock: Callable[[], float] = time.monotonic,
        *,
        look_seconds: float = LOOK_SECONDS,
    ) -> None:
        self._policy = Watched([policy], lambda: read_policy(policy), look_seconds=look_seconds)
        self._authenticator, self._clock = authenticator, clock
        # Only identities of the policy get a bucket: strangers cannot fill the memory.
        self._buckets: dict[str, _Bucket] = {}

    def admit(self, context: grpc.ServicerContext, rpc: str) -> str:
        """Returns the caller's identity.

        Raises:
            Unauthenticated: nobody knows who calls.
            PermissionDenied: the caller may not; the same for an RPC that does not exist.
            ResourceExhausted: the caller calls more often than it may.
        """
        try:
            identity = self._authenticator.identity_of(context)
        except Exception:
            _NO_IDENTITY.inc()
            raise
        policy = self._policy.get()
        if not policy.allows(identity, rpc):
            _FORBIDDEN.inc()
            raise PermissionDenied(
                "PERMISSION_DENIED",
                "There is no such method, or this caller may not call it. The operator's policy file says who may.",
            )
        limit = policy.limit_of[identity]
        bucket = self._buckets.get(identity)
        if bucket is None or bucket.limit != limit:
            bucket = self._buckets[identity] = _Bucket(limit, self._clock())
        wait_seconds = bucket.take(self._clock())
        if wait_seconds > 0:
            _TOO_MANY.inc()
            raise ResourceExhausted(
                "RATE_LIMITED",
                f"This caller may make {limit.calls_per_second:g} calls a second of this replica.",
                {"callsPerSecond": f"{limit.calls_per_second:g}"},
                retry_after_seconds=wait_seconds,
            )
        return identity


class _Bucket:
    """Tokens of one caller; see https://en.wikipedia.org/wiki/Token_bucket."""

    __slots__ = ("_filled_at", "_lock", "_tokens", "limit")

    def __init__(self, limit: Limit, now: float) -> None:
        self.limit, self._tokens, self._filled_at = limit, float(limit.burst), now
        self._lock = threading.Lock()

    def take(self, now: float) -> float:
        """Takes one token, or returns the seconds until there is one."""
        with self._lock:
            elapsed = max(0.0, now - self._filled_at)
            self._tokens = min(self.limit.burst, self._tokens + elapsed * self.limit.calls_per_second)
            self._filled_at = now
            if self._tokens >= 1.0:
                self._tokens -= 1.0
                return 0.0
            return (1.0 - self._tokens) / self.limit.calls_per_second


def _unusable(path: Path, why: str) -> FailedPrecondition:
    return FailedPrecondition(
        "POLICY_UNUSABLE",
        f"{path} cannot be used: {why}. SHOPKEEPER_POLICY names the file that says who may call what; "
        "see docs/security.md.",
    )
