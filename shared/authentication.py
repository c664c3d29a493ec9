"""Who calls: a SPIFFE id from a certificate, or the subject of a JSON web token."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import jwt

from shared.errors import FailedPrecondition, Unauthenticated
from shared.watched import LOOK_SECONDS, Watched

# What Kubernetes and the usual identity providers sign with. No HMAC: a public key would be taken for a secret.
ALGORITHMS = ("RS256", "ES256", "EdDSA")
IDENTITY_OF_SUBJECT = "token:{subject}"
REMEMBERED_TOKENS = 4_096
_AUTHORIZATION = "authorization"
_BEARER = "bearer "
_SPIFFE = b"spiffe://"


class TokenVerifier:
    """Verifies tokens bound to an audience, such as those that Kubernetes projects for a service account.

    Args:
        keys: file with the issuer's JSON Web Key Set; followed as it changes.
        issuer: the `iss` that is trusted, exactly.
        audience: the `aud` that must be among the token's.
        now: seconds since 1970.

    Raises:
        FailedPrecondition: TOKEN_KEYS_UNUSABLE.
    """

    def __init__(
        self,
        keys: Path,
        issuer: str,
        audience: str,
        now: Callable[[], float] = time.time,
        *,
        look_seconds: float = LOOK_SECONDS,
    ) -> None:
        self._issuer, self._audience, self._now = issuer, audience, now
        self._keys = Watched([keys], lambda: _read_keys(keys), look_seconds=look_seconds)
        self._lock = threading.Lock()
        # digest of a verified token → its identity, its end, and the keys that verified it.
        self._verified: dict[bytes, tuple[str, float, object]] = {}

    def identity_of(self, token: str) -> str:
        """Returns `token:<sub>`.

        Raises:
            Unauthenticated: the token is no token, not for this suite, over, or not signed by the issuer.
        """
        keys = self._keys.get()
        digest = hashlib.sha256(token.encode()).digest()
        known = self._verified.get(digest)
        if known is not None and known[1] > self._now() and known[2] is keys:
            return known[0]
        identity, ends_at = self._verify(token, keys)
        with self._lock:
            # Oldest first: a caller that sends ever new tokens displaces its own.
            while len(self._verified) >= REMEMBERED_TOKENS:
                self._verified.pop(next(iter(self._verified)))
            self._verified[digest] = (identity, ends_at, keys)
        return identity

    def _verify(self, token: str, keys: dict[str, jwt.PyJWK]) -> tuple[str, float]:
        try:
            key = keys.get(str(jwt.get_unverified_header(token).get("kid", "")))
            if key is None:
                raise _unauthenticated("it is signed with a key that is not among the issuer's")
            if key.algorithm_name not in ALGORITHMS:
                raise _unauthenticated("its key is of an algorithm that is not accepted")
            claims = jwt.decode(
                token,
                key,
                algorithms=[key.algorithm_name],
                audience=self._audience,
                issuer=self._issuer,
                # Times are compared below, with this clock.
                options={
                    "require": ["exp", "iss", "aud", "sub"],
                    "verify_exp": False,
                    "verify_nbf": False,
                    "verify_iat": False,
                },
            )
            ends_at, begins_at = float(claims["exp"]), float(claims.get("nbf", 0))
        except (jwt.PyJWTError, ValueError, TypeError) as error:
            # The message of the library names claims and keys, never their secret part.
            raise _unauthenticated(str(error) or type(error).__name__) from error
        if ends_at <= self._now():
            raise _unauthenticated("it has expired")
        if begins_at > self._now() + 5:
            raise _unauthenticated("it is not valid yet")
        return IDENTITY_OF_SUBJECT.format(subject=claims["sub"]), ends_at


class Authenticator:
    """Says who calls.

    Args:
        tokens: verifies bearer tokens; without it they are not looked at.
    """

    def __init__(self, tokens: TokenVerifier | None) -> None:
        self._tokens = tokens

    def identity_of(self, context: grpc.ServicerContext) -> str:
        """Returns the SPIFFE id of the caller's certificate, or `token:<sub>` where it brings a token.

        A token goes before the certificate: a gateway with a certificate of its own hands on its caller's.

        Raises:
            Unauthenticated: neither is there, or the token is not valid.
        """
        if self._tokens is not None:
            for key, value in context.invocation_metadata():
                if key == _AUTHORIZATION:
                    text = value if isinstance(value, str) else value.decode("ascii", "replace")
                    if text[: len(_BEARER)].lower() != _BEARER:
                        raise _unauthenticated("`authorization` is not of the form `Bearer <token>`")
                    return self._tokens.identity_of(text[len(_BEARER) :].strip())
        return spiffe_id(context.peer_identities() or ())


def spiffe_id(names: object) -> str:
    """Returns the SPIFFE id among a certificate's alternative names.

    Raises:
        Unauthenticated: there is none, or more than one (SPIFFE X.509-SVID, section 5.2).
    """
    found = [name for name in names if name.startswith(_SPIFFE)]  # type: ignore[attr-defined]
    if len(found) != 1:
        raise Unauthenticated(
            "UNAUTHENTICATED",
            "The caller brings neither a certificate with exactly one SPIFFE id nor a token. See docs/security.md.",
        )
    return str(found[0].decode("ascii", "replace"))


def _read_keys(path: Path) -> dict[str, jwt.PyJWK]:
    try:
        keys = jwt.PyJWKSet.from_dict(json.loads(path.read_bytes())).keys
    except OSError as error:
        raise _unusable(path, error.strerror or str(error)) from error
    except (jwt.PyJWTError, ValueError, AttributeError, TypeError) as error:
        raise _unusable(path, f"it is no JSON Web Key Set ({error})") from error
    return {key.key_id: key for key in keys if key.key_id}


def _unusable(path: Path, why: str) -> FailedPrecondition:
    return FailedPrecondition(
        "TOKEN_KEYS_UNUSABLE",
        f"{path} cannot be used: {why}. SHOPKEEPER_TOKEN_KEYS names the issuer's JSON Web Key Set; in Kubernetes "
        "`kubectl get --raw /openid/v1/jwks` prints it.",
    )


def _unauthenticated(why: str) -> Unauthenticated:
    return Unauthenticated("UNAUTHENTICATED", f"The token is refused: {why}.")
