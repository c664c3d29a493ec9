"""Shoppers: protobuf to domain and back."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence

from google.protobuf.timestamp_pb2 import Timestamp
from shopkeeper.profile.v1 import live_profile_pb2, profile_service_pb2, user_portrait_pb2

from services.profile.domain import portrait as domain
from services.profile.domain.comparison import Comparison
from services.profile.domain.events import HAS_PRICE, EventWindow, Vocabulary
from services.profile.domain.messages import ProfilesMessage, Reading
from shared.errors import FieldViolation, InvalidInput
from shared.identity import UserKey, parse_user_key
from shared.privacy import Pseudonymizer
from shared.tokens import ConsistencyToken, TokenSigner, Watermark

MAX_BATCH_USERS = 1000
MAX_PARTITIONS = 4096
CACHED_PROFILES = 2048

View = profile_service_pb2.ProfileView


def invalid(field: str, problem: str) -> InvalidInput:
    """Returns the error of one malformed field."""
    return InvalidInput("INVALID_REQUEST", f"{field} {problem}", violations=[FieldViolation(field, problem)])


class ProfileConverter:
    """Converts requests and answers about shoppers.

    Args:
        items, currencies: what the codes of events stand for.
        summary: computes the summary of a reading.
        segments: the ids of the segments that a shopper is in; the portrait is given where it is at hand.
        segments_revision: changes when the answers of `segments` may.
    """

    def __init__(
        self,
        pseudonymizer: Pseudonymizer,
        signer: TokenSigner,
        items: Vocabulary,
        currencies: Vocabulary,
        summary: Callable[[Reading], domain.Summary],
        segments: Callable[[Reading, domain.Portrait | None], Sequence[str]],
        segments_revision: Callable[[], int],
    ) -> None:
        self._pseudonymizer = pseudonymizer
        self._signer = signer
        self._items = items
        self._currencies = currencies
        self._summary = summary
        self._segments = segments
        self._segments_revision = segments_revision
        self._cache: OrderedDict[UserKey, tuple[tuple[int, int], live_profile_pb2.LiveProfile]] = (
            OrderedDict()
        )
        self._cache_lock = threading.Lock()

    def user_key(
        self, user: profile_service_pb2.UserReference | profile_service_pb2.GetProfileRequest, path: str = ""
    ) -> UserKey:
        """Returns the pseudonym that a reference stands for.

        Raises:
            InvalidInput: none is set, or it is malformed.
        """
        match user.WhichOneof("user"):
            case "user_id":
                return self._pseudonymizer.user_key(user.user_id, f"{path}user_id")
            case "user_key":
                return parse_user_key(user.user_key, f"{path}user_key")
        raise invalid(f"{path}user", "is not set; set user_id or user_key.")

    def user_keys(self, request: profile_service_pb2.BatchGetProfilesRequest) -> list[UserKey]:
        """Returns the pseudonyms of a batch; raises InvalidInput naming every bad row."""
        if not 1 <= len(request.users) <= MAX_BATCH_USERS:
            raise invalid("users", f"has {len(request.users)} entries; send 1 to {MAX_BATCH_USERS}.")
        keys: list[UserKey] = []
        violations: list[FieldViolation] = []
        for row, user in enumerate(request.users):
            try:
                keys.append(self.user_key(user, f"users[{row}]."))
            except InvalidInput as error:
                violations.extend(error.violations)
        if violations:
            raise InvalidInput(
                "INVALID_REQUEST",
                f"{len(violations)} of {len(request.users)} users are malformed; the first: "
                f"{violations[0].field} {violations[0].description}",
                violations=violations,
            )
        return keys

    def two_users(
        self, request: profile_service_pb2.CompareProfilesRequest | profile_service_pb2.MergeUsersRequest
    ) -> tuple[UserKey, UserKey]:
        """Returns both pseudonyms of a request; raises InvalidInput naming every bad one."""
        names = [field.name for field in request.DESCRIPTOR.fields]
        keys: list[UserKey] = []
        violations: list[FieldViolation] = []
        for name in names:
            try:
                keys.append(self.user_key(getattr(request, name), f"{name}."))
            except InvalidInput as error:
                violations.extend(error.violations)
        if violations:
            first = violations[0]
            raise InvalidInput("INVALID_REQUEST", f"{first.field} {first.description}", violations=violations)
        return keys[0], keys[1]

    def token(self, consistency_token: str) -> ConsistencyToken | None:
        """Returns the token, or None for an empty one; raises InvalidInput for a forged one."""
        return ConsistencyToken.verify(self._signer, consistency_token) if consistency_token else None

    def partition(
        self, request: profile_service_pb2.WatchProfilesRequest
    ) -> tuple[int, int, Watermark | None]:
        """Returns (index, count, watermark to resume from)."""
        count = request.partition_count or 1
        if not 1 <= count <= MAX_PARTITIONS:
            raise invalid("partition_count", f"is {count}; send 1 to {MAX_PARTITIONS}, or 0 for 1.")
        if not 0 <= request.partition_index < count:
            raise invalid(
                "partition_index",
                f"is {request.partition_index}; send 0 to partition_count - 1 ({count - 1}).",
            )
        return request.partition_index, count, resume_watermark(request.resume_watermark, "resume_watermark")

    def live_profile(self, reading: Reading, watermark: Watermark) -> live_profile_pb2.LiveProfile:
        """Returns the live profile of a reading; equal readings share the work."""
        live = live_profile_pb2.LiveProfile()
        live.CopyFrom(self._shared(reading))
        live.watermark = watermark.encode()
        return live

    def profile(
        self,
        user_key: UserKey,
        reading: Reading,
        watermark: Watermark,
        view: int,
        portrait: Callable[[Reading], domain.Portrait],
    ) -> profile_service_pb2.Profile:
        """Returns what a view shows of a reading.

        Args:
            user_key: who the shopper is; the reading may go by another of their names.
        """
        profile = profile_service_pb2.Profile(user_key=user_key)
        known = None
        if view != View.PROFILE_VIEW_LIVE and reading.window.personalisation:
            known = portrait(reading)
            profile.portrait.MergeFrom(user_portrait(known))
        if view != View.PROFILE_VIEW_PORTRAIT:
            profile.live.MergeFrom(self._shared(reading, known))
            profile.live.watermark = watermark.encode()
        return profile

    def message(self, message: ProfilesMessage) -> profile_service_pb2.WatchProfilesResponse:
        """Returns a message of the stream."""
        response = profile_service_pb2.WatchProfilesResponse(
            erased_user_keys=message.erased, reset=message.reset
        )
        live_watermark = message.live_watermark.encode()
        for reading in message.readings:
            live = response.changed.add()
            live.CopyFrom(self._shared(reading))
            live.watermark = live_watermark
        if message.watermark is not None:
            response.watermark = message.watermark.encode()
            response.watermark_time.CopyFrom(timestamp(message.watermark_time_us))
        return response

    def _shared(self, reading: Reading, known: domain.Portrait | None = None) -> live_profile_pb2.LiveProfile:
        # Every watcher gets the same profile, and recommend often asks for who just changed.
        version = (reading.version, self._segments_revision())
        with self._cache_lock:
            cached = self._cache.get(reading.user_key)
            if cached is not None and cached[0] == version:
                self._cache.move_to_end(reading.user_key)
                return cached[1]
        live = self._build(reading, known)
        with self._cache_lock:
            self._cache[reading.user_key] = (version, live)
            self._cache.move_to_end(reading.user_key)
            while len(self._cache) > CACHED_PROFILES:
                self._cache.popitem(last=False)
        return live

    def _build(self, reading: Reading, known: domain.Portrait | None) -> live_profile_pb2.LiveProfile:
        window = reading.window
        live = live_profile_pb2.LiveProfile(user_key=reading.user_key, personalisation=window.personalisation)
        if window.personalisation:
            live.history.extend(self._history(window))
            summary = domain.Summary.of(known) if known else self._summary(reading)
            live.summary.event_count = summary.event_count
            live.summary.order_count = summary.order_count
            live.summary.price_level = summary.price_level.value
            live.summary.price_level_evidence_count = summary.price_level.evidence_count
            live.summary.life_cycle_stage = summary.life_cycle_stage  # type: ignore[assignment]
            live.summary.segment_ids.extend(self._segments(reading, known))
            if summary.first_us is not None and summary.last_us is not None:
                live.summary.first_event_time.CopyFrom(timestamp(summary.first_us))
                live.summary.last_event_time.CopyFrom(timestamp(summary.last_us))
        return live

    def _history(self, window: EventWindow) -> list[live_profile_pb2.HistoryEvent]:
        events = window.history()
        keys = events[["key_high", "key_low"]].astype([("high", ">u8"), ("low", ">u8")]).tobytes()
        items, currencies = self._items, self._currencies
        history = []
        columns = zip(
            *(
                events[name].tolist()
                for name in (
                    "line", "kind", "item", "occurred_at_us", "quantity", "value",
                    "price_micros", "currency", "flags",
                )
            ),
            strict=True,
        )  # fmt: skip
        for row, (line, kind, item, time_us, quantity, value, price, currency, flags) in enumerate(columns):
            seconds, micros = divmod(time_us, 1_000_000)
            event = live_profile_pb2.HistoryEvent(
                event_key=keys[16 * row : 16 * row + 16],
                line=line,
                kind=kind,
                item_id=items[item],
                occurred_at=Timestamp(seconds=seconds, nanos=micros * 1000),
            )
            if math.isfinite(quantity):
                event.quantity = quantity
            if math.isfinite(value):
                event.value = value
            if flags & HAS_PRICE:
                event.price_micros = price
                if currency >= 0:
                    event.currency_code = currencies[currency]
            history.append(event)
        return history


def resume_watermark(encoded: bytes, field: str) -> Watermark | None:
    """Returns the watermark to resume from, or None for an empty one; raises InvalidInput."""
    if not encoded:
        return None
    watermark = Watermark.decode(encoded, field)
    # What is no snapshot would be refused by the database only.
    if not (0 < watermark.xmin <= watermark.xmax < 2**63) or not all(
        watermark.xmin <= xid < watermark.xmax for xid in watermark.in_progress
    ):
        raise InvalidInput(
            "INVALID_WATERMARK",
            f"{field} is not a watermark; send one back unchanged, or leave it empty.",
            violations=[FieldViolation(field, "is not a watermark.")],
        )
    return watermark


def user_portrait(portrait: domain.Portrait) -> user_portrait_pb2.UserPortrait:
    """Returns the message of a portrait."""
    rfm, power = portrait.rfm, portrait.purchasing_power
    message = user_portrait_pb2.UserPortrait(
        event_count=portrait.event_count,
        truncated=portrait.truncated,
        activity=[
            user_portrait_pb2.KindActivity(
                kind=activity.kind,  # type: ignore[arg-type]
                count=activity.count,
                first_time=timestamp(activity.first_us),
                last_time=timestamp(activity.last_us),
            )
            for activity in portrait.activity
        ],
        rfm=user_portrait_pb2.Rfm(
            recency_days=estimate(rfm.recency_days),
            order_count=rfm.order_count,
            monetary_micros=rfm.monetary_micros,
            currency_code=rfm.currency_code,
            spend=[
                user_portrait_pb2.Spend(
                    currency_code=spend.currency_code,
                    amount_micros=spend.amount_micros,
                    order_count=spend.order_count,
                )
                for spend in rfm.spend
            ],
            recency_quintile=rfm.recency_quintile,
            frequency_quintile=rfm.frequency_quintile,
            monetary_quintile=rfm.monetary_quintile,
        ),
        life_cycle_stage=int(portrait.life_cycle_stage),  # type: ignore[arg-type]
        interests=[_interest(interest) for interest in portrait.interests],
        purchasing_power=user_portrait_pb2.PurchasingPower(
            price_level=estimate(power.price_level),
            category_price_levels=[
                user_portrait_pb2.CategoryPriceLevel(category=category, price_level=estimate(level))
                for category, level in power.category_price_levels
            ],
            typical_price_micros=power.typical_price_micros,
            currency_code=power.currency_code,
        ),
        preferred_hours=[
            user_portrait_pb2.HourPreference(
                hour=hour.hour, share=hour.share, evidence_count=hour.evidence_count
            )
            for hour in portrait.preferred_hours
        ],
        preferred_devices=[
            user_portrait_pb2.DevicePreference(
                device=device.code,  # type: ignore[arg-type]
                share=device.share,
                evidence_count=device.evidence_count,
            )
            for device in portrait.preferred_devices
        ],
        preferred_channels=[
            user_portrait_pb2.ChannelPreference(
                channel=channel.code,  # type: ignore[arg-type]
                share=channel.share,
                evidence_count=channel.evidence_count,
            )
            for channel in portrait.preferred_channels
        ],
        discount_sensitivity=estimate(portrait.discount_sensitivity),
        satisfaction=estimate(portrait.satisfaction),
        purchase_interval_days=estimate(portrait.purchase_interval_days),
    )
    if portrait.first_us is not None and portrait.last_us is not None:
        message.first_event_time.CopyFrom(timestamp(portrait.first_us))
        message.last_event_time.CopyFrom(timestamp(portrait.last_us))
    return message


def timestamp(time_us: int) -> Timestamp:
    """Returns microseconds since 1970 as a Timestamp."""
    seconds, micros = divmod(time_us, 1_000_000)
    return Timestamp(seconds=seconds, nanos=micros * 1000)


def comparison(compared: Comparison) -> profile_service_pb2.CompareProfilesResponse:
    """Returns the message of a comparison."""
    return profile_service_pb2.CompareProfilesResponse(
        embedding_similarity=estimate(compared.embedding_similarity),
        interest_similarity=estimate(compared.interest_similarity),
        item_overlap=estimate(compared.item_overlap),
        shared_interests=[
            profile_service_pb2.SharedInterest(first=_interest(first), second=_interest(second))
            for first, second in compared.shared_interests
        ],
    )


def _interest(interest: domain.Interest) -> user_portrait_pb2.Interest:
    count = interest.evidence_count
    return user_portrait_pb2.Interest(
        horizon=interest.horizon,  # type: ignore[arg-type]
        facet=interest.facet,  # type: ignore[arg-type]
        attribute_key=interest.attribute_key,
        value=interest.value,
        weight=interest.weight,
        decayed_evidence=interest.decayed_evidence,
        evidence_count=count,
        half_life_days=domain.HALF_LIFE_DAYS[interest.horizon],
        # There are a hundred of them: without the detour over an Estimate.
        confidence=count / (count + domain.PRIOR_EVENTS),
    )


def estimate(known: domain.Estimate) -> user_portrait_pb2.Estimate:
    """Returns the message of a number and how sure it is."""
    return user_portrait_pb2.Estimate(
        value=known.value, evidence_count=known.evidence_count, confidence=known.confidence
    )
