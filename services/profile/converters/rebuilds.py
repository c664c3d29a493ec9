"""Rebuilds: domain to protobuf."""

from __future__ import annotations

from shopkeeper.profile.v1 import rebuild_pb2

from services.profile.converters.profiles import timestamp
from services.profile.domain.rebuilds import Rebuild


def rebuild_message(rebuild: Rebuild) -> rebuild_pb2.Rebuild:
    """Returns a rebuild as the contract says it."""
    return rebuild_pb2.Rebuild(
        rebuild_id=rebuild.rebuild_id,
        state=int(rebuild.state),  # type: ignore[arg-type]
        folded_event_count=rebuild.folded_events,
        total_event_count=max(rebuild.total_events, rebuild.folded_events),
        portrait_count=rebuild.portraits,
        watermark=rebuild.watermark,
        create_time=timestamp(rebuild.created_us),
        end_time=timestamp(rebuild.ended_us) if rebuild.ended_us is not None else None,
        failure_reason=rebuild.failure_reason,
        failure_message=rebuild.failure_message,
    )
