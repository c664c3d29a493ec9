"""ProfileService: convert, call, convert."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import grpc
from google.protobuf import empty_pb2
from shopkeeper.profile.v1 import (
    profile_service_pb2 as pb,
)
from shopkeeper.profile.v1 import (
    profile_service_pb2_grpc,
    rebuild_pb2,
    segment_pb2,
    user_portrait_pb2,
)

from services.profile.converters.churn import ChurnConverter, churn_model, churn_risk, draw_items
from services.profile.converters.item_imports import request_id_of
from services.profile.converters.item_portraits import embedding
from services.profile.converters.profiles import ProfileConverter, comparison, invalid
from services.profile.converters.rebuilds import rebuild_message
from services.profile.converters.segment_language import parse_filter
from services.profile.converters.segments import SegmentConverter, revision, segment_id, version_wanted
from services.profile.domain.churn_risk import ChurnRisk
from services.profile.domain.messages import Reading
from services.profile.use_cases.churn import ChurnWatch, Erasure, Members, Scores
from services.profile.use_cases.profiles import Profiles
from services.profile.use_cases.rebuilds import ManageRebuilds
from services.profile.use_cases.segments import SegmentMembers, Segments
from shared.deadline import time_remaining_seconds
from shared.identity import UserKey
from shared.tokens import Watermark

# An answer needs a moment to travel, too.
ANSWER_SECONDS = 0.01
# A page of more shoppers than these is a list to count, not to act on.
MAX_DRAWN = 50


class ProfileServicer(profile_service_pb2_grpc.ProfileServiceServicer):
    """Serves shoppers.

    Args:
        catch_up_seconds: patience with the log where the caller set no deadline.
        stopped: set when streams must end.
    """

    def __init__(
        self,
        profiles: Profiles,
        rebuilds: ManageRebuilds,
        converter: ProfileConverter,
        churn: ChurnWatch,
        churn_converter: ChurnConverter,
        segments: Segments,
        members: SegmentMembers,
        segment_converter: SegmentConverter,
        catch_up_seconds: float,
        stopped: threading.Event,
    ) -> None:
        self._profiles = profiles
        self._converter = converter
        self._churn = churn
        self._churn_converter = churn_converter
        self._segments = segments
        self._members = members
        self._segment_converter = segment_converter
        self._catch_up_seconds = catch_up_seconds
        self._rebuilds = rebuilds
        self._stopped = stopped

    def GetProfile(self, request: pb.GetProfileRequest, context: grpc.ServicerContext) -> pb.Profile:
        """See the contract."""
        user_key = self._converter.user_key(request)
        token = self._converter.token(request.consistency_token)
        read = self._profiles.read([user_key], token, self._patience(context))
        profile = self._profile(read.readings[0], read.watermark, request.view)
        if request.with_embedding:
            self._embed([profile])
        return profile

    def BatchGetProfiles(
        self, request: pb.BatchGetProfilesRequest, context: grpc.ServicerContext
    ) -> pb.BatchGetProfilesResponse:
        """See the contract."""
        user_keys = self._converter.user_keys(request)
        token = self._converter.token(request.consistency_token)
        read = self._profiles.read(user_keys, token, self._patience(context))
        profiles = [self._profile(reading, read.watermark, request.view) for reading in read.readings]
        if request.with_embedding:
            self._embed(profiles)
        return pb.BatchGetProfilesResponse(profiles=profiles)

    def WatchProfiles(
        self, request: pb.WatchProfilesRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.WatchProfilesResponse]:
        """See the contract."""
        index, count, resume = self._converter.partition(request)
        for message in self._profiles.watch(index, count, resume, context.is_active):
            yield self._converter.message(message)

    def CompareProfiles(
        self, request: pb.CompareProfilesRequest, context: grpc.ServicerContext
    ) -> pb.CompareProfilesResponse:
        """See the contract."""
        first, second = self._converter.two_users(request)
        return comparison(self._profiles.compare(first, second, self._patience(context)))

    def MergeUsers(
        self, request: pb.MergeUsersRequest, context: grpc.ServicerContext
    ) -> pb.MergeUsersResponse:
        """See the contract."""
        anonymous, known = self._converter.two_users(request)
        if anonymous == known:
            raise invalid("known", "is the anonymous visitor as well; name two ids.")
        user_key, event_count = self._profiles.merge(anonymous, known, self._patience(context))
        return pb.MergeUsersResponse(user_key=user_key, merged_event_count=event_count)

    def CreateSegment(
        self, request: pb.CreateSegmentRequest, context: grpc.ServicerContext
    ) -> segment_pb2.Segment:
        """See the contract."""
        segment = self._segment_converter.new_segment(request)
        return self._segment_converter.segment(self._segments.create(segment, request.request_id))

    def GetSegment(self, request: pb.GetSegmentRequest, context: grpc.ServicerContext) -> segment_pb2.Segment:
        """See the contract."""
        return self._segment_converter.segment(
            self._segments.get(segment_id(request.segment_id), version_wanted(request.version))
        )

    def ListSegments(
        self, request: pb.ListSegmentsRequest, context: grpc.ServicerContext
    ) -> pb.ListSegmentsResponse:
        """See the contract."""
        after, page_size = self._segment_converter.page(request)
        segments = self._segments.page(after, page_size + 1)
        response = pb.ListSegmentsResponse(
            segments=[self._segment_converter.segment(segment) for segment in segments[:page_size]]
        )
        if len(segments) > page_size:
            response.next_page_token = self._segment_converter.page_token(segments[page_size - 1].segment_id)
        return response

    def UpdateSegment(
        self, request: pb.UpdateSegmentRequest, context: grpc.ServicerContext
    ) -> segment_pb2.Segment:
        """See the contract."""
        return self._segment_converter.segment(self._segments.update(self._segment_converter.change(request)))

    def DeleteSegment(
        self, request: pb.DeleteSegmentRequest, context: grpc.ServicerContext
    ) -> empty_pb2.Empty:
        """See the contract."""
        self._segments.delete(segment_id(request.segment_id), revision(request.etag))
        return empty_pb2.Empty()

    def ListUsersInSegment(
        self, request: pb.ListUsersInSegmentRequest, context: grpc.ServicerContext
    ) -> pb.ListUsersInSegmentResponse:
        """See the contract."""
        version, after, page_size = self._segment_converter.users_page(request)
        segment = self._segments.get(segment_id(request.segment_id), version)
        page = self._members.page(parse_filter(segment.filter), after, page_size)
        response = pb.ListUsersInSegmentResponse(user_keys=page.user_keys, segment_version=segment.version)
        if page.next_key is not None:
            response.next_page_token = self._segment_converter.users_page_token(segment, page.next_key)
        return response

    def ListAtRiskUsers(
        self, request: pb.ListAtRiskUsersRequest, context: grpc.ServicerContext
    ) -> pb.ListAtRiskUsersResponse:
        """See the contract."""
        least = self._churn_converter.min_probability(request)
        page_size = self._churn_converter.page_size(request)
        place = self._churn_converter.place(request)
        scores = self._churn.scores(self._churn_converter.horizon_days(request))
        page = self._churn.page(scores, least, place, page_size, self._members_of(request.segment_id))
        response = pb.ListAtRiskUsersResponse(risks=[_risk_message(scores, risk) for risk in page.risks])
        if len(page.risks) <= MAX_DRAWN:
            items = self._churn.suggested([risk.user_key for risk in page.risks])
            for risk, item_ids in zip(response.risks, items, strict=True):
                draw_items(risk, item_ids)
        if page.more and page.last is not None:
            response.next_page_token = self._churn_converter.page_token(request, page.last)
        return response

    def WatchChurnAlerts(
        self, request: pb.WatchChurnAlertsRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.ChurnAlert]:
        """See the contract."""
        threshold = self._churn_converter.threshold(request)
        alert_id = self._churn_converter.alert_id(request)
        horizon_days = self._churn_converter.horizon_days(request)
        members = self._members_of(request.segment_id)
        for alert in self._churn.watch(horizon_days, threshold, alert_id, context.is_active, members):
            if isinstance(alert, Erasure):
                yield pb.ChurnAlert(risk=user_portrait_pb2.ChurnRisk(user_key=alert.user_key), erased=True)
                continue
            scores = self._churn.scores(horizon_days)
            stored = alert.stored
            # What was so when the alert arose, though more may have become known since.
            risk = _risk_message(scores, alert.risk) if alert.risk else user_portrait_pb2.ChurnRisk()
            draw_items(risk, self._churn.suggested([stored.user_key])[0])
            risk.user_key = stored.user_key
            risk.no_purchase_probability.value = stored.probability
            risk.model_version = stored.model_version
            yield self._churn_converter.alert(
                stored.alert_id, stored.previous_probability, stored.time_us, risk
            )

    def GetChurnModel(self, request: pb.GetChurnModelRequest, context: grpc.ServicerContext) -> pb.ChurnModel:
        """See the contract."""
        return churn_model(*self._churn.model(self._churn_converter.horizon_days(request)))

    def RebuildProfiles(
        self, request: pb.RebuildProfilesRequest, context: grpc.ServicerContext
    ) -> rebuild_pb2.Rebuild:
        """See the contract."""
        return rebuild_message(self._rebuilds.begin(request_id_of(request.request_id)))

    def GetRebuild(self, request: pb.GetRebuildRequest, context: grpc.ServicerContext) -> rebuild_pb2.Rebuild:
        """See the contract."""
        return rebuild_message(self._rebuilds.get(request.rebuild_id))

    def WatchRebuild(
        self, request: pb.WatchRebuildRequest, context: grpc.ServicerContext
    ) -> Iterator[rebuild_pb2.Rebuild]:
        """See the contract."""
        for rebuild in self._rebuilds.watch(request.rebuild_id, self._stopped, context.is_active):
            yield rebuild_message(rebuild)

    def CancelRebuild(
        self, request: pb.CancelRebuildRequest, context: grpc.ServicerContext
    ) -> rebuild_pb2.Rebuild:
        """See the contract."""
        return rebuild_message(self._rebuilds.cancel(request.rebuild_id))

    def _profile(self, reading: Reading, watermark: Watermark, view: int) -> pb.Profile:
        user_key = self._profiles.stands_for(reading.user_key)
        profile = self._converter.profile(user_key, reading, watermark, view, self._profiles.portrait)
        if profile.HasField("portrait") and (known := self._churn.risk_of(user_key)) is not None:
            profile.portrait.churn_risk.CopyFrom(_risk_message(*known))
        return profile

    def _embed(self, profiles: Sequence[pb.Profile]) -> None:
        portrayed = [profile for profile in profiles if profile.HasField("portrait")]
        vectors = self._profiles.embeddings([UserKey(profile.user_key) for profile in portrayed])
        for profile, vector in zip(portrayed, vectors, strict=True):
            if vector is not None:
                profile.portrait.embedding.CopyFrom(embedding(vector))

    def _members_of(self, requested_segment: str) -> Members | None:
        if not requested_segment:
            return None
        expression = parse_filter(self._segments.get(segment_id(requested_segment)).filter)
        return lambda user_keys: self._members.contains(expression, user_keys)

    def _patience(self, context: grpc.ServicerContext) -> float:
        return max(0.0, time_remaining_seconds(context, self._catch_up_seconds) - ANSWER_SECONDS)


def _risk_message(scores: Scores, risk: ChurnRisk) -> user_portrait_pb2.ChurnRisk:
    shoppers = scores.shoppers
    return churn_risk(
        risk, shoppers.model.horizon_days, shoppers.currency_code, shoppers.as_of_us, scores.version
    )
