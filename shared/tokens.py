"""Tokens that travel through a caller and come back. Pure.

A token is opaque to its bearer and signed, so that nobody can forge a
position in the log, a page, or the credit for a sale.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from shared.errors import FieldViolation, InvalidInput
from shared.keys import read_secret

_MAC_BYTES = 16


class TokenSigner:
    """Signs and verifies tokens with HMAC-SHA-256, truncated to 16 bytes.

    The kind is part of what is signed: a page token never passes as a consistency token.
    """

    def __init__(self, secret: bytes) -> None:
        self._hmac = hmac.new(secret, digestmod=hashlib.sha256)

    @classmethod
    def from_directory(cls, keys: Path) -> TokenSigner:
        """Reads `token_key.hex`; fails with FailedPrecondition where it is missing."""
        return cls(read_secret(keys, "token_key"))

    def sign(self, kind: str, payload: bytes) -> str:
        """Returns base64url text without padding."""
        return base64.urlsafe_b64encode(payload + self._mac(kind, payload)).rstrip(b"=").decode()

    def verify(self, kind: str, token: str, field: str = "") -> bytes:
        """Returns the payload of a token that `sign` made for the same kind.

        Raises:
            InvalidInput: it is not such a token.
        """
        try:
            signed = base64.b64decode(
                token.encode("ascii") + b"=" * (-len(token) % 4), altchars=b"-_", validate=True
            )
        except (ValueError, binascii.Error):
            signed = b""
        payload, mac = signed[:-_MAC_BYTES], signed[-_MAC_BYTES:]
        if len(signed) < _MAC_BYTES or not hmac.compare_digest(mac, self._mac(kind, payload)):
            path = field or f"{kind}_token"
            problem = f"is not a {kind} token of this installation; send one back unchanged, or leave it out."
            raise InvalidInput(
                "INVALID_TOKEN",
                f"{path} {problem}",
                {"kind": kind},
                [FieldViolation(path, problem, "INVALID_TOKEN")],
            )
        return payload

    def _mac(self, kind: str, payload: bytes) -> bytes:
        state = self._hmac.copy()
        state.update(kind.encode() + b"\x00" + payload)
        return state.digest()[:_MAC_BYTES]


@dataclass(frozen=True, slots=True)
class ConsistencyToken:
    """A commit in the log: whoever has read the transaction `xid` has seen the bearer's events."""

    xid: int

    KIND = "consistency"

    def sign(self, signer: TokenSigner) -> str:
        """Returns the text that goes to the caller."""
        return signer.sign(self.KIND, struct.pack(">Q", self.xid))

    @classmethod
    def verify(cls, signer: TokenSigner, token: str, field: str = "consistency_token") -> ConsistencyToken:
        """Returns the token; raises InvalidInput when it is forged."""
        payload = signer.verify(cls.KIND, token, field)
        return cls(struct.unpack(">Q", payload)[0])


@dataclass(frozen=True, slots=True)
class Watermark:
    """How far a reader of the log has come: a PostgreSQL snapshot.

    A sequence number would lie: it is handed out before commit, so that a late commit slips in
    behind a reader that trusts it. A snapshot says exactly which transactions were visible.

    One thing it does not say: whether the numbers that it holds to be over will be given out again. What is
    remembered is therefore its `durable` part.

    Attributes:
        xmin: every transaction below it is visible, or was rolled back.
        xmax: no transaction from it on is visible.
        in_progress: those between the two that were not yet visible.
    """

    xmin: int
    xmax: int
    in_progress: frozenset[int] = field(default_factory=frozenset)

    def covers(self, transaction: ConsistencyToken | int) -> bool:
        """Returns whether the reader has seen the transaction."""
        xid = transaction.xid if isinstance(transaction, ConsistencyToken) else transaction
        return xid < self.xmax and xid not in self.in_progress

    def durable(self, newest_xid: int) -> Watermark:
        """Returns the part of a snapshot that holds after a crash of PostgreSQL too.

        A crash forgets the numbers of transactions of which nothing had reached the disk, as of those that were
        rolled back a moment before, and gives them out again. What was visible had reached it, and so had every
        number below.

        Args:
            newest_xid: the greatest transaction of which the snapshot shows a row to this reader; 0 for none.
        """
        xmax = min(self.xmax, newest_xid + 1)
        return Watermark(min(self.xmin, xmax), xmax, frozenset(xid for xid in self.in_progress if xid < xmax))

    def to_pg(self) -> str:
        """Returns the text form of `pg_snapshot`."""
        return f"{self.xmin}:{self.xmax}:{','.join(map(str, sorted(self.in_progress)))}"

    @classmethod
    def parse_pg(cls, text: str) -> Watermark:
        """Returns the watermark of `pg_current_snapshot()::text`.

        Raises:
            ValueError: not of the form `xmin:xmax:xip,...`.
        """
        xmin, xmax, in_progress = text.split(":")
        return cls(int(xmin), int(xmax), frozenset(int(xid) for xid in in_progress.split(",") if xid))

    def encode(self) -> bytes:
        """Returns the bytes form for the wire."""
        return self.to_pg().encode()

    @classmethod
    def decode(cls, encoded: bytes, field: str = "watermark") -> Watermark:
        """Returns the watermark of `encode`; raises InvalidInput when it is none."""
        try:
            return cls.parse_pg(encoded.decode("ascii"))
        except (ValueError, UnicodeDecodeError) as error:
            problem = "is not a watermark; send one back unchanged, or leave it empty."
            raise InvalidInput(
                "INVALID_WATERMARK", f"{field} {problem}", violations=[FieldViolation(field, problem)]
            ) from error


def item_digest(item_id: str) -> int:
    """Returns 64 bits of BLAKE2b of an item id, by which an attribution token knows its items."""
    return int.from_bytes(hashlib.blake2b(item_id.encode(), digest_size=8).digest(), "big")


def item_digests(item_ids: Iterable[str]) -> npt.NDArray[np.uint64]:
    """Returns the digests of item ids, in their order."""
    return np.fromiter((item_digest(item_id) for item_id in item_ids), dtype=np.uint64)


@dataclass(frozen=True, slots=True)
class AttributionToken:
    """What was shown, by what: comes back with the next events and needs no look-up.

    Attributes:
        recommendation_id: 8 random bytes.
        issued_at_ms: milliseconds since 1970, UTC.
        placement, serving_config, model_version, variant: at most 255 bytes each in UTF-8.
        item_digests_K: digests of the K shown items, in the order of their positions, uint64.
        propensities_K: probability of each item at its position, in (0, 1], float32.
    """

    recommendation_id: bytes
    issued_at_ms: int
    placement: str
    serving_config: str
    model_version: str
    variant: str
    item_digests_K: npt.NDArray[np.uint64]
    propensities_K: npt.NDArray[np.float32]

    KIND = "attribution"
    _HEAD = struct.Struct(">B8sQH")
    _LAYOUT = 1

    def __post_init__(self) -> None:
        if len(self.recommendation_id) != 8:
            raise ValueError("recommendation_id must have 8 bytes")
        if len(self.item_digests_K) != len(self.propensities_K):
            raise ValueError("one propensity an item")

    def position_of(self, item_id: str) -> int | None:
        """Returns the position at which the item was shown, from 1, or None where it was not."""
        found = np.flatnonzero(self.item_digests_K == np.uint64(item_digest(item_id)))
        return int(found[0]) + 1 if len(found) else None

    def sign(self, signer: TokenSigner) -> str:
        """Returns the text that goes to the caller: some 16 bytes an item, in base64."""
        return signer.sign(self.KIND, self.pack())

    @classmethod
    def verify(cls, signer: TokenSigner, token: str, field: str = "attribution_token") -> AttributionToken:
        """Returns the token; raises InvalidInput when it is forged or of an unknown layout."""
        payload = signer.verify(cls.KIND, token, field)
        try:
            return cls.unpack(payload)
        except (ValueError, struct.error) as error:
            problem = "has a layout that this version does not read; leave it out."
            raise InvalidInput(
                "INVALID_TOKEN", f"{field} {problem}", violations=[FieldViolation(field, problem)]
            ) from error

    def pack(self) -> bytes:
        """Returns the payload: a fixed head, four short texts, then the two arrays, big-endian."""
        texts = b"".join(
            _short_text(text)
            for text in (self.placement, self.serving_config, self.model_version, self.variant)
        )
        head = self._HEAD.pack(
            self._LAYOUT, self.recommendation_id, self.issued_at_ms, len(self.item_digests_K)
        )
        return (
            head
            + texts
            + self.item_digests_K.astype(">u8").tobytes()
            + (self.propensities_K.astype(">f4").tobytes())
        )

    @classmethod
    def unpack(cls, payload: bytes) -> AttributionToken:
        """Returns the token of `pack`.

        Raises:
            ValueError, struct.error: not such a payload.
        """
        layout, recommendation_id, issued_at_ms, k = cls._HEAD.unpack_from(payload)
        if layout != cls._LAYOUT:
            raise ValueError(f"layout {layout}")
        offset = cls._HEAD.size
        texts = ["", "", "", ""]
        for index in range(4):
            length = payload[offset]
            texts[index] = payload[offset + 1 : offset + 1 + length].decode()
            offset += 1 + length
        if len(payload) != offset + 12 * k:
            raise ValueError("the length does not fit")
        return cls(
            recommendation_id,
            issued_at_ms,
            texts[0],
            texts[1],
            texts[2],
            texts[3],
            np.frombuffer(payload, ">u8", k, offset).astype(np.uint64),
            np.frombuffer(payload, ">f4", k, offset + 8 * k).astype(np.float32),
        )


def pack_page(fields: Sequence[str]) -> bytes:
    """Returns the payload of a keyset page token: the key after which the next page begins."""
    return b"".join(struct.pack(">H", len(text.encode())) + text.encode() for text in fields)


def unpack_page(payload: bytes) -> list[str]:
    """Returns the fields of `pack_page`."""
    fields, offset = [], 0
    while offset < len(payload):
        (length,) = struct.unpack_from(">H", payload, offset)
        fields.append(payload[offset + 2 : offset + 2 + length].decode())
        offset += 2 + length
    return fields


def _short_text(text: str) -> bytes:
    encoded = text.encode()
    if len(encoded) > 255:
        raise ValueError(f"{text[:20]}… has more than 255 bytes")
    return bytes([len(encoded)]) + encoded
