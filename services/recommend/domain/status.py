"""The state of this process, as an operator sees it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from services.recommend.domain.recommendation import Degradation


@dataclass(frozen=True, slots=True)
class Refusal:
    """A version that was not put into service. `time` is in seconds since 1970."""

    model: str
    version: str
    reason: str
    text: str
    time: float


@dataclass(frozen=True, slots=True)
class ModelState:
    """What is in service, and what was refused, newest first.

    Attributes:
        version: "" where no version is in service; then the four after it are empty too.
        loaded_time: when it came into service, seconds since 1970.
        swap_count: how often a version came into service, the first included.
    """

    model_name: str
    alias: str
    version: str = ""
    created_time: float | None = None
    item_count: int = 0
    dimension: int = 0
    max_history: int = 0
    loaded_time: float | None = None
    swap_count: int = 0
    refused: Sequence[Refusal] = ()


@dataclass(frozen=True, slots=True)
class StreamState:
    """How a stream of the profile service is doing; times in seconds since 1970, None never."""

    name: str
    connected: bool
    last_message_time: float | None
    watermark: bytes
    watermark_time: float | None
    entries: int
    last_error: str
    complete: bool


@dataclass(frozen=True, slots=True)
class ServiceStatus:
    """The state of this process, its own model first; `start_time` is in seconds since 1970."""

    models: Sequence[ModelState]
    streams: Sequence[StreamState]
    degraded: Sequence[Degradation]
    start_time: float
