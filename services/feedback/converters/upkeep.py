"""Purges and key rotations, to the domain and back."""

from __future__ import annotations

from datetime import datetime

from shopkeeper.feedback.v1 import consent_pb2, feedback_service_pb2

from services.feedback.converters.metrics import invalid, moment
from services.feedback.converters.people import to_timestamp
from services.feedback.domain.key_rotation import DEFAULT_ROWS_PER_SECOND, MAX_ROWS_PER_SECOND, KeyRotation
from shared.event_kinds import EventKind


def from_purge_events(
    request: feedback_service_pb2.PurgeEventsRequest,
) -> tuple[datetime | None, datetime, list[int]]:
    """Returns start, end and kinds; no kinds are all kinds.

    Raises:
        InvalidInput: no end, an empty range, or a kind that there is not.
    """
    start, end = moment(request, "start_time"), moment(request, "end_time")
    if end is None:
        raise invalid("end_time", "is required: say up to which time events are meant.")
    if start is not None and start >= end:
        raise invalid("start_time", "lies not before end_time.")
    for index, kind in enumerate(request.kinds):
        if int(kind) not in EventKind.__members__.values():
            raise invalid(f"kinds[{index}]", "is no kind of this contract.")
    return start, end, sorted(set(request.kinds))


def from_rotate_user_keys(request: feedback_service_pb2.RotateUserKeysRequest) -> int:
    """Returns rows a second; raises InvalidInput."""
    if not 0 <= request.max_rows_per_second <= MAX_ROWS_PER_SECOND:
        raise invalid("max_rows_per_second", "must be in [1, 1000000], or 0 for 5,000.")
    return request.max_rows_per_second or DEFAULT_ROWS_PER_SECOND


def to_key_rotation(rotation: KeyRotation) -> consent_pb2.KeyRotation:
    """Returns a rotation as the contract says it."""
    return consent_pb2.KeyRotation(
        key_rotation_id=rotation.rotation_id,
        state=consent_pb2.KeyRotationState.ValueType(int(rotation.state)),
        target_key_version=rotation.target_version,
        rewritten_row_count=rotation.rewritten_rows,
        remaining_row_count=rotation.remaining_rows,
        create_time=to_timestamp(rotation.created_at),
        end_time=to_timestamp(rotation.ended_at) if rotation.ended_at else None,
    )
