"""Moments."""

from __future__ import annotations

from datetime import UTC, datetime

from google.protobuf.timestamp_pb2 import Timestamp


def timestamp(moment: datetime) -> Timestamp:
    """Returns a moment as the contract shows it."""
    message = Timestamp()
    message.FromDatetime(moment.astimezone(UTC))
    return message


def time_of(text: str) -> Timestamp:
    """Returns an RFC 3339 moment as the contract shows it."""
    return timestamp(datetime.fromisoformat(text))
