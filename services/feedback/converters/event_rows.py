"""One event, a message, to a row: every rule of the contract, and attribution."""

from __future__ import annotations

from typing import Any

from shopkeeper.feedback.v1 import event_pb2

from services.feedback.converters.event_details import DETAILS, DetailReader, Rejected, id_reason, refuse_nul
from services.feedback.converters.identities import Door
from services.feedback.domain.event_key import event_key_of_digest, event_key_of_uuid, milliseconds_of
from services.feedback.domain.events import ConsentBit, RowProblem, RowReason
from shared.errors import InvalidInput
from shared.tokens import AttributionToken, TokenSigner

MAX_TOKEN = 65_536
CLOCK_SKEW_US = 5 * 60 * 1_000_000
YEAR_2000_US = 946_684_800 * 1_000_000
# What google.protobuf.Timestamp allows: the years 1 to 9999.
_FIRST_SECOND, _LAST_SECOND = -62_135_596_800, 253_402_300_799
# Clocks of the replicas that issue and that verify a token differ a little.
_TOKEN_SKEW_MS = 300_000


class RowReader(DetailReader):
    """Reads events one by one. Ids that repeat are derived once, and forgotten with the reader.

    Args:
        door: turns raw ids into keys.
        signer: verifies attribution tokens.
        attribution_max_age_ms: an older token earns no credit.
        now_us: microseconds since 1970, UTC.
    """

    def __init__(self, door: Door, signer: TokenSigner, attribution_max_age_ms: int, now_us: int) -> None:
        super().__init__()
        self._door = door
        self._signer = signer
        self._attribution_max_age_ms = attribution_max_age_ms
        self._now_us = now_us
        self._keys_of: dict[str, tuple[bytes, bytes]] = {}
        self._session_key_of: dict[str, bytes] = {}
        self._token_of: dict[str, AttributionToken | RowProblem] = {}
        self._sparse: dict[str, dict[int, Any]] = {}
        self._problems: dict[int, RowProblem] = {}
        self._remarks: dict[int, RowProblem] = {}

    def _judged(self, number: int, index: int, event: event_pb2.Event, place: int) -> tuple[Any, ...] | None:
        """Returns the row of an event, or None and notes why not.

        Args:
            number: under which problems are noted.
            index: of the event in its request.
            place: of the row, under which its sparse values are kept.
        """
        try:
            row = self._row(event)
        except Rejected as problem:
            self._row_sparse = {}
            path = f"events[{index}].{problem.path}" if problem.path else f"events[{index}]"
            self._problems[number] = RowProblem(path, problem.reason, problem.message)
            return None
        if self._row_sparse:
            for name, value in self._row_sparse.items():
                if name == "remark":
                    path, reason, message = value
                    self._remarks[number] = RowProblem(f"events[{index}].{path}", reason, message)
                else:
                    self._sparse.setdefault(name, {})[place] = value
            self._row_sparse = {}
        return row

    def _row(self, event: event_pb2.Event) -> tuple[Any, ...]:
        kind_name = event.WhichOneof("detail")
        if kind_name is None:
            raise Rejected(
                "detail",
                RowReason.UNKNOWN_KIND,
                "None of the details of this contract is set; set exactly one, or upgrade the service.",
            )
        user_id = event.user_id
        keys = self._keys_of.get(user_id)
        if keys is None:
            keys = self._keys_of[user_id] = self._derive_keys(user_id)
        event_id = event.event_id
        event_key = event_key_of_uuid(event_id)
        if event.HasField("occurred_at"):
            occurred_at_us = self._timestamp(event.occurred_at)
        elif event_key is not None:
            occurred_at_us = milliseconds_of(event_key) * 1_000
            if occurred_at_us // 1_000_000 > _LAST_SECOND:
                raise Rejected("event_id", RowReason.OUT_OF_RANGE, "Its time lies beyond the year 9999.")
        elif not event_id:
            raise Rejected("event_id", RowReason.REQUIRED, "Give every event an id, best a UUIDv7.")
        else:
            raise Rejected(
                "occurred_at",
                RowReason.REQUIRED,
                "Required, because event_id is no UUIDv7 that tells the time.",
            )
        if event_key is None:
            event_key = event_key_of_digest(
                self._text(event_id, "event_id", 128, required=True), occurred_at_us // 1_000
            )
        kind, read = DETAILS[kind_name]
        product = read(self, getattr(event, kind_name), kind_name)
        session_id = event.session_id
        session_key = None
        if session_id:
            session_key = self._session_key_of.get(session_id)
            if session_key is None:
                # Most are short and plain: no need to look at them twice.
                text = (
                    session_id
                    if len(session_id) <= 128 and session_id.isascii() and session_id.isprintable()
                    else self._text(session_id, "session_id", 128)
                )
                session_key = self._session_key_of[session_id] = self._door.session_key(text)
        device, channel = event.device, event.channel
        if not 0 <= device <= 6:
            raise Rejected("device", RowReason.OUT_OF_RANGE, "No device of this contract; use DEVICE_OTHER.")
        if not 0 <= channel <= 8:
            raise Rejected(
                "channel", RowReason.OUT_OF_RANGE, "No channel of this contract; leave it unspecified."
            )
        consent = _consent_bits(event.consent) if event.HasField("consent") else 0
        if token := event.attribution_token:
            self._attribute(token, product[0])
        if occurred_at_us > self._now_us + CLOCK_SKEW_US:
            self._quarantine(RowReason.CLOCK_AHEAD, "More than five minutes in the future; set the clock.")
        elif occurred_at_us < YEAR_2000_US:
            self._quarantine(RowReason.CLOCK_BEHIND, "Before the year 2000; set the clock.")
        return (
            event_key,
            # The contract's events hold no maps: two equal ones have the same bytes.
            self._door.payload_digest(event.SerializeToString()),
            keys[0],
            keys[1],
            kind,
            occurred_at_us,
            session_key,
            *product,
            device,
            channel,
            consent,
        )

    def _derive_keys(self, user_id: str) -> tuple[bytes, bytes]:
        if not user_id:
            raise Rejected("user_id", RowReason.REQUIRED, "Say whose event it is, 1 to 256 characters.")
        try:
            return self._door.keys_of(user_id)
        except InvalidInput as error:
            refuse_nul(user_id, "user_id")
            raise Rejected("user_id", id_reason(user_id), error.message) from None

    def _timestamp(self, timestamp: Any) -> int:
        seconds, nanos = timestamp.seconds, timestamp.nanos
        if not (_FIRST_SECOND <= seconds <= _LAST_SECOND and 0 <= nanos < 1_000_000_000):
            raise Rejected(
                "occurred_at",
                RowReason.OUT_OF_RANGE,
                "No time: seconds of the years 1 to 9999, nanos below 1e9.",
            )
        return int(seconds) * 1_000_000 + int(nanos) // 1_000

    def _quarantine(self, reason: RowReason, message: str) -> None:
        self._row_sparse["quarantine_reason"] = int(reason)
        self._row_sparse["remark"] = ("occurred_at", reason, message)

    # Attribution

    def _attribute(self, token: str, item_id: str | None) -> None:
        attribution = self._token_of.get(token)
        if attribution is None:
            attribution = self._token_of[token] = self._verified(token)
        if isinstance(attribution, RowProblem):
            self._row_sparse["remark"] = (attribution.field, attribution.reason, attribution.message)
            return
        sparse = self._row_sparse
        sparse["recommendation_id"] = attribution.recommendation_id
        sparse["placement"] = attribution.placement
        sparse["serving_config"] = attribution.serving_config
        if attribution.model_version:
            sparse["model_version"] = attribution.model_version
        if attribution.variant:
            sparse["variant"] = attribution.variant
        if item_id is not None and (position := attribution.position_of(item_id)) is not None:
            # The token is signed and the client's word is not.
            sparse["position"] = position
            sparse["propensity"] = float(attribution.propensities_K[position - 1])
        else:
            # A position of something else, such as an advertisement, is no position in this recommendation.
            sparse.pop("position", None)
        if items := sparse.get("line_items"):
            sparse["line_positions"] = [attribution.position_of(item) for item in items]
        if items := sparse.get("impression_items"):
            positions = [attribution.position_of(item) for item in items]
            sparse["impression_propensities"] = [
                None if position is None else float(attribution.propensities_K[position - 1])
                for position in positions
            ]

    def _verified(self, token: str) -> AttributionToken | RowProblem:
        if len(token) > MAX_TOKEN:
            return RowProblem(
                "attribution_token",
                RowReason.ATTRIBUTION_INVALID,
                "Longer than any token; stored without it.",
            )
        try:
            attribution = AttributionToken.verify(self._signer, token)
        except InvalidInput:
            return RowProblem(
                "attribution_token",
                RowReason.ATTRIBUTION_INVALID,
                "Not issued by this installation, so stored without it; send tokens back unchanged.",
            )
        age_ms = self._now_us // 1_000 - attribution.issued_at_ms
        if age_ms > self._attribution_max_age_ms or age_ms < -_TOKEN_SKEW_MS:
            return RowProblem(
                "attribution_token",
                RowReason.ATTRIBUTION_EXPIRED,
                "Too old to earn credit; stored without it.",
            )
        return attribution


def _consent_bits(consent: event_pb2.EventConsent) -> int:
    bits = 0
    if consent.HasField("personalisation"):
        bits |= ConsentBit.PERSONALISATION_STATED | (consent.personalisation * ConsentBit.PERSONALISATION)
    if consent.HasField("training"):
        bits |= ConsentBit.TRAINING_STATED | (consent.training * ConsentBit.TRAINING)
    if consent.HasField("marketing"):
        bits |= ConsentBit.MARKETING_STATED | (consent.marketing * ConsentBit.MARKETING)
    return int(bits)
