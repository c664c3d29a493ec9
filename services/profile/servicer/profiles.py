"""ProfileService: convert, call, convert."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NoReturn

import grpc
from google.protobuf import empty_pb2
from shopkeeper.profile.v1 import (
    profile_service_pb2 as pb,
)
from shopkeeper.profile.v1 import (
    profile_service_pb2_grpc,
    rebuild_pb2,
    segment_pb2,
)

from services.profile.converters.profiles import ProfileConverter
from services.profile.use_cases.profiles import Profiles
from shared.errors import Unimplemented
from shared.server import time_remaining_seconds

# An answer needs a moment to travel, too.
ANSWER_SECONDS = 0.01


class ProfileServicer(profile_service_pb2_grpc.ProfileServiceServicer):
    """Serves shoppers.

    Args:
        catch_up_seconds: patience with the log where the caller set no deadline.
    """

    def __init__(self, profiles: Profiles, converter: ProfileConverter, catch_up_seconds: float) -> None:
        self._profiles = profiles
        self._converter = converter
        self._catch_up_seconds = catch_up_seconds

    def GetProfile(self, request: pb.GetProfileRequest, context: grpc.ServicerContext) -> pb.Profile:
        """See the contract."""
        user_key = self._converter.user_key(request)
        token = self._converter.token(request.consistency_token)
        read = self._profiles.read([user_key], token, self._patience(context))
        return self._converter.profile(
            read.readings[0], read.watermark, request.view, self._profiles.portrait
        )

    def BatchGetProfiles(
        self, request: pb.BatchGetProfilesRequest, context: grpc.ServicerContext
    ) -> pb.BatchGetProfilesResponse:
        """See the contract."""
        user_keys = self._converter.user_keys(request)
        token = self._converter.token(request.consistency_token)
        read = self._profiles.read(user_keys, token, self._patience(context))
        return pb.BatchGetProfilesResponse(
            profiles=[
                self._converter.profile(reading, read.watermark, request.view, self._profiles.portrait)
                for reading in read.readings
            ]
        )

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
        """Not built yet."""
        _not_built("Read both with BatchGetProfiles and compare their interests.")

    def MergeUsers(
        self, request: pb.MergeUsersRequest, context: grpc.ServicerContext
    ) -> pb.MergeUsersResponse:
        """Not built yet."""
        _not_built("Send events under the id of the shopper who signed in.")

    def CreateSegment(
        self, request: pb.CreateSegmentRequest, context: grpc.ServicerContext
    ) -> segment_pb2.Segment:
        """Not built yet."""
        _no_segments()

    def GetSegment(self, request: pb.GetSegmentRequest, context: grpc.ServicerContext) -> segment_pb2.Segment:
        """Not built yet."""
        _no_segments()

    def ListSegments(
        self, request: pb.ListSegmentsRequest, context: grpc.ServicerContext
    ) -> pb.ListSegmentsResponse:
        """Not built yet."""
        _no_segments()

    def UpdateSegment(
        self, request: pb.UpdateSegmentRequest, context: grpc.ServicerContext
    ) -> segment_pb2.Segment:
        """Not built yet."""
        _no_segments()

    def DeleteSegment(
        self, request: pb.DeleteSegmentRequest, context: grpc.ServicerContext
    ) -> empty_pb2.Empty:
        """Not built yet."""
        _no_segments()

    def ListUsersInSegment(
        self, request: pb.ListUsersInSegmentRequest, context: grpc.ServicerContext
    ) -> pb.ListUsersInSegmentResponse:
        """Not built yet."""
        _no_segments()

    def ListAtRiskUsers(
        self, request: pb.ListAtRiskUsersRequest, context: grpc.ServicerContext
    ) -> pb.ListAtRiskUsersResponse:
        """Not built yet."""
        _no_churn()

    def WatchChurnAlerts(
        self, request: pb.WatchChurnAlertsRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.ChurnAlert]:
        """Not built yet."""
        _no_churn()

    def GetChurnModel(self, request: pb.GetChurnModelRequest, context: grpc.ServicerContext) -> pb.ChurnModel:
        """Not built yet."""
        _no_churn()

    def RebuildProfiles(
        self, request: pb.RebuildProfilesRequest, context: grpc.ServicerContext
    ) -> rebuild_pb2.Rebuild:
        """Not built yet."""
        _no_rebuild()

    def GetRebuild(self, request: pb.GetRebuildRequest, context: grpc.ServicerContext) -> rebuild_pb2.Rebuild:
        """Not built yet."""
        _no_rebuild()

    def WatchRebuild(
        self, request: pb.WatchRebuildRequest, context: grpc.ServicerContext
    ) -> Iterator[rebuild_pb2.Rebuild]:
        """Not built yet."""
        _no_rebuild()

    def CancelRebuild(
        self, request: pb.CancelRebuildRequest, context: grpc.ServicerContext
    ) -> rebuild_pb2.Rebuild:
        """Not built yet."""
        _no_rebuild()

    def _patience(self, context: grpc.ServicerContext) -> float:
        return max(0.0, time_remaining_seconds(context, self._catch_up_seconds) - ANSWER_SECONDS)


def _not_built(instead: str) -> NoReturn:
    raise Unimplemented("NOT_BUILT_YET", f"This part of the contract is not built yet. {instead}")


def _no_segments() -> NoReturn:
    _not_built("Read portraits with BatchGetProfiles and select by their fields.")


def _no_churn() -> NoReturn:
    _not_built(
        "The life-cycle stage and recency of a portrait (GetProfile) tell who has not bought for long."
    )


def _no_rebuild() -> NoReturn:
    _not_built("Portraits are folded from the log when they are read; there is nothing to rebuild.")
