"""A shopper's events, as fresh as asked for, within the deadline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from services.recommend.domain.history import NO_HISTORY, History
from services.recommend.domain.recommendation import Cause, Degradation, Freshness
from services.recommend.ports import Clock, LiveHistory, LiveProfiles, StreamState
from shared.errors import InvalidInput, ShopkeeperError
from shared.identity import UserKey
from shared.tokens import ConsistencyToken

STALE_AFTER_SECONDS = 2.0
"""Heartbeats come every quarter of a second; silence for longer is an interruption."""

_FETCH_SECONDS = 0.25
"""The longest that a miss waits for the profile service."""


@dataclass(frozen=True, slots=True)
class Reading:
    """A shopper's events and segments, and what is missing from them."""

    history: History
    watermark: bytes
    degraded: Sequence[Degradation]
    state: StreamState | None = None
    segments: Sequence[str] = ()


class HistoryReader:
    """Reads histories from memory; waits or asks where that is not enough.

    Args:
        wait_share: share of the remaining time that waiting for events may use; the rest is kept for
            the answer itself.
        aside: entered while waiting, so that others may compute.
    """

    def __init__(
        self,
        profiles: LiveProfiles,
        clock: Clock,
        *,
        wait_share: float = 0.8,
        aside: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._profiles = profiles
        self._clock = clock
        self._wait_share = wait_share
        self._aside = aside

    def read(
        self, user_key: UserKey, token: ConsistencyToken | None, token_text: str, deadline: float
    ) -> Reading:
        """Returns the history of a shopper; never fails but for a token that is invalid.

        With a token: waits until the stream has passed it; then memory is complete. Where the
        stream is away, or does not pass it in time, the profile service is asked with the token.

        Args:
            deadline: of the whole answer, on the monotonic clock.

        Raises:
            InvalidInput: the profile service refuses the token.
        """
        budget = (deadline - self._clock.monotonic()) * self._wait_share
        state = self._profiles.state()
        streaming = self._is_live(state)
        reached = token is None or self._profiles.covers(token)
        if not reached and token is not None and streaming:
            with self._aside():
                reached = self._profiles.wait_until_covers(token, budget / 2)
            state = self._profiles.state()
        cached = self._profiles.cached(user_key)
        if cached is not None and reached:
            stale = [] if streaming else [Degradation(Cause.PROFILE_STALE, self._why(state))]
            return self._reading(cached, stale, state)

        budget = (deadline - self._clock.monotonic()) * self._wait_share
        if budget < 0.002:
            return self._missing(
                cached, Cause.DEADLINE_PROFILE_SKIPPED, "no time left to ask profile", reached
            )
        timeout = budget if not reached else min(budget, _FETCH_SECONDS)
        try:
            with self._aside():
                fetched = self._profiles.fetch(user_key, "" if token is None else token_text, timeout)
        except InvalidInput:
            raise
        except ShopkeeperError as error:
            cause = Cause.PROFILE_UNAVAILABLE if cached is None else Cause.PROFILE_STALE
            return self._missing(cached, cause, f"profile: {error.reason}", reached)
        return self._reading(fetched, [])

    def freshness(self, reading: Reading) -> Freshness:
        """Returns the freshness of a reading, without what depends on the answer."""
        state = reading.state or self._profiles.state()
        return Freshness(watermark=reading.watermark or state.watermark, watermark_time=state.watermark_time)

    def _is_live(self, state: StreamState) -> bool:
        heard = state.last_message_time
        return state.connected and heard is not None and self._clock.now() - heard < STALE_AFTER_SECONDS

    def _why(self, state: StreamState) -> str:
        heard = state.last_message_time
        silence = "never heard from" if heard is None else f"silent for {self._clock.now() - heard:.1f} s"
        return f"profile is {silence}" + (f": {state.last_error}" if state.last_error else "")

    def _missing(self, cached: LiveHistory | None, cause: Cause, text: str, reached: bool) -> Reading:
        degraded = [Degradation(cause, text)]
        if not reached:
            degraded.append(
                Degradation(
                    Cause.CONSISTENCY_NOT_REACHED, "the events of consistency_token were not seen in time"
                )
            )
        return Reading(NO_HISTORY, b"", degraded) if cached is None else self._reading(cached, degraded)

    @staticmethod
    def _reading(
        found: LiveHistory, degraded: list[Degradation], state: StreamState | None = None
    ) -> Reading:
        if not found.personalisation:
            degraded = [
                *degraded,
                Degradation(
                    Cause.NO_PERSONALISATION_CONSENT, "the shopper does not consent to personalisation"
                ),
            ]
            return Reading(NO_HISTORY, found.watermark, degraded, state)
        return Reading(found.history, found.watermark, degraded, state, found.segments)
