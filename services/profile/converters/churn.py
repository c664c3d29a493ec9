"""Risks of leaving: protobuf to domain and back."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence

from shopkeeper.profile.v1 import profile_service_pb2 as pb
from shopkeeper.profile.v1 import user_portrait_pb2

from services.profile.converters.profiles import invalid, timestamp
from services.profile.domain.churn_model import ChurnModel
from services.profile.domain.churn_risk import ChurnRisk, WinBack
from services.profile.domain.classification_quality import Quality
from services.profile.domain.portrait import Estimate
from shared.tokens import TokenSigner

MAX_PAGE_SIZE = 1000
DEFAULT_PAGE_SIZE = 100
MAX_HORIZON_DAYS = 365
DEFAULT_MIN_PROBABILITY = 0.5
DEFAULT_THRESHOLD = 0.7
_PAGE = "churn-page"
_ALERT = "churn-alert"
_PLACE = struct.Struct(">d16s")
_NUMBER = struct.Struct(">q")


class ChurnConverter:
    """Converts requests and answers about risks."""

    def __init__(self, signer: TokenSigner) -> None:
        self._signer = signer

    def horizon_days(
        self, request: pb.ListAtRiskUsersRequest | pb.WatchChurnAlertsRequest | pb.GetChurnModelRequest
    ) -> int:
        """Returns the horizon asked for; 0 stands for the model's."""
        if not 0 <= request.horizon_days <= MAX_HORIZON_DAYS:
            raise invalid("horizon_days", f"is {request.horizon_days}; send 1 to 365, or 0 for the model's.")
        return request.horizon_days

    def min_probability(self, request: pb.ListAtRiskUsersRequest) -> float:
        """Returns the least probability wanted."""
        if not request.HasField("min_probability"):
            return DEFAULT_MIN_PROBABILITY
        # NaN fails this too.
        if not 0.0 <= request.min_probability <= 1.0:
            raise invalid("min_probability", f"is {request.min_probability}; send a number in [0, 1].")
        return request.min_probability

    def page_size(self, request: pb.ListAtRiskUsersRequest) -> int:
        """Returns the most risks wanted."""
        if request.page_size < 0:
            raise invalid(
                "page_size", f"is {request.page_size}; send 0 for {DEFAULT_PAGE_SIZE}, or 1 to 1000."
            )
        return min(request.page_size or DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE)

    def place(self, request: pb.ListAtRiskUsersRequest) -> tuple[float, bytes] | None:
        """Returns where the page begins; raises InvalidInput for a token of other arguments."""
        if not request.page_token:
            return None
        payload = self._signer.verify(_page_kind(request), request.page_token, "page_token")
        probability, user_key = _PLACE.unpack(payload)
        return probability, user_key

    def page_token(self, request: pb.ListAtRiskUsersRequest, place: tuple[float, bytes]) -> str:
        """Returns the token of what comes behind a place."""
        return self._signer.sign(_page_kind(request), _PLACE.pack(*place))

    def threshold(self, request: pb.WatchChurnAlertsRequest) -> float:
        """Returns the threshold."""
        if not request.HasField("threshold"):
            return DEFAULT_THRESHOLD
        if not 0.0 < request.threshold < 1.0:
            raise invalid("threshold", f"is {request.threshold}; send a number in (0, 1).")
        return request.threshold

    def alert_id(self, request: pb.WatchChurnAlertsRequest) -> int | None:
        """Returns the alert to resume behind, or None."""
        if not request.resume_token:
            return None
        number: int = _NUMBER.unpack(self._signer.verify(_ALERT, request.resume_token, "resume_token"))[0]
        return number

    def alert(
        self,
        alert_id: int,
        previous_probability: float,
        time_us: int,
        risk: user_portrait_pb2.ChurnRisk,
    ) -> pb.ChurnAlert:
        """Returns the message of an alert."""
        return pb.ChurnAlert(
            risk=risk,
            previous_probability=previous_probability,
            alert_time=timestamp(time_us),
            alert_token=self._signer.sign(_ALERT, _NUMBER.pack(alert_id)),
        )


def churn_risk(
    risk: ChurnRisk, horizon_days: int, currency_code: str, as_of_us: int, model_version: str
) -> user_portrait_pb2.ChurnRisk:
    """Returns the message of a risk."""
    return user_portrait_pb2.ChurnRisk(
        user_key=risk.user_key,
        horizon_days=horizon_days,
        no_purchase_probability=_estimate(risk.probability, risk.order_count),
        alive_probability=_estimate(risk.alive_probability, risk.order_count),
        lifetime_value_micros=risk.lifetime_value_micros,
        currency_code=currency_code,
        reasons=[
            user_portrait_pb2.ChurnReason(
                signal=int(reason.signal),  # type: ignore[arg-type]
                contribution=reason.contribution,
                usual_value=reason.usual_value,
                current_value=reason.current_value,
            )
            for reason in risk.reasons
        ],
        suggested_actions=[_win_back(one) for one in risk.actions],
        as_of_time=timestamp(as_of_us),
        model_version=model_version,
    )


def _win_back(one: WinBack) -> user_portrait_pb2.WinBackAction:
    low, high = one.successes.interval()
    return user_portrait_pb2.WinBackAction(
        kind=int(one.action),  # type: ignore[arg-type]
        success_rate=_estimate(one.successes.rate, one.successes.similar),
        success_count=one.successes.returned,
        success_rate_low=low,
        success_rate_high=high,
    )


def draw_items(risk: user_portrait_pb2.ChurnRisk, item_ids: Sequence[str]) -> None:
    """Says with which items the suggested actions are to be done; those that have none keep none."""
    for action in risk.suggested_actions:
        if action.kind == user_portrait_pb2.WIN_BACK_ACTION_KIND_RECOMMEND_ITEMS:
            action.item_ids.extend(item_ids)


def churn_model(version: str, model: ChurnModel) -> pb.ChurnModel:
    """Returns the message of a model."""
    message = pb.ChurnModel(
        model_version=version,
        horizon_days=model.horizon_days,
        kind=int(model.kind),  # type: ignore[arg-type]
    )
    if model.quality is not None:
        message.quality.CopyFrom(_quality(model.quality))
    if model.reference_quality is not None:
        message.reference_quality.CopyFrom(_quality(model.reference_quality))
    return message


def _quality(quality: Quality) -> pb.ChurnModelQuality:
    return pb.ChurnModelQuality(
        auc=quality.auc,
        log_loss=quality.log_loss,
        expected_calibration_error=quality.expected_calibration_error,
        reliability=[
            pb.ReliabilityBin(
                mean_predicted=b.mean_predicted, observed_share=b.observed_share, user_count=b.count
            )
            for b in quality.reliability
        ],
    )


def _page_kind(request: pb.ListAtRiskUsersRequest) -> str:
    least = request.min_probability if request.HasField("min_probability") else math.inf
    return f"{_PAGE}:{request.horizon_days}:{least!r}:{request.segment_id}"


def _estimate(value: float, evidence_count: int) -> user_portrait_pb2.Estimate:
    estimate = Estimate(value, evidence_count)
    return user_portrait_pb2.Estimate(
        value=estimate.value, evidence_count=estimate.evidence_count, confidence=estimate.confidence
    )
