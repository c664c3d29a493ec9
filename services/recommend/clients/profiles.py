"""Live histories: `WatchProfiles` for what changes, `GetProfile` on a miss."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
from shopkeeper.profile.v1 import (
    live_profile_pb2,
    profile_service_pb2,
    profile_service_pb2_grpc,
    user_portrait_pb2,
)

from services.recommend.clients.stream import ReconnectingStream
from services.recommend.domain.history import MAX_EVENTS, History
from services.recommend.domain.item_index import ItemIndex
from services.recommend.domain.live_counts import LiveCounts
from services.recommend.ports import LiveHistory, StreamState
from shared.errors import InvalidInput, ShopkeeperError, Unavailable
from shared.grpc_status import from_rpc_error
from shared.identity import UserKey
from shared.tokens import ConsistencyToken, Watermark

_BREAKER_SECONDS = 1.0
_LAG_OF_INTEREST_SECONDS = 60.0


class ProfileClient:
    """Live histories: `WatchProfiles` for what changes, `GetProfile` on a miss. Implements `ports.LiveProfiles`.

    Args:
        max_profiles: shoppers held; the least recently asked for or changed are dropped.
        observe_lag: told, for every fresh event, the seconds from its occurrence until it was visible here.
        on_erased: told of each shopper who is forgotten.
    """

    def __init__(
        self,
        channel: grpc.Channel,
        index: ItemIndex,
        counts: LiveCounts,
        *,
        partition_index: int = 0,
        partition_count: int = 1,
        max_profiles: int = 200_000,
        max_items: int = 5_000_000,
        observe_lag: Callable[[float], None] = lambda _: None,
        on_erased: Callable[[bytes], None] = lambda _: None,
    ) -> None:
        self._stub = profile_service_pb2_grpc.ProfileServiceStub(channel)
        self._index = index
        self._counts = counts
        self._partition = (partition_index, partition_count)
        self._max_profiles = max_profiles
        self._max_items = max_items
        self._observe_lag = observe_lag
        self._on_erased = on_erased
        self._lock = threading.Condition()
        self._profiles: OrderedDict[bytes, LiveHistory] = OrderedDict()
        self._position: dict[bytes, tuple[int, int]] = {}
        self._watermark: Watermark | None = None
        self._start: tuple[int, int] | None = None
        self._encoded_watermark = b""
        self._watermark_time: float | None = None
        self._progress_time: float | None = None
        self._flights: dict[tuple[bytes, str], _Flight] = {}
        self._closed_until = 0.0
        self._stream = ReconnectingStream("profiles", self._open, self._consume, self._begin_anew)

    def start(self) -> None:
        """Begins to follow the stream."""
        self._stream.start()

    def stop(self) -> None:
        """Ends the following."""
        self._stream.stop()

    def cached(self, user_key: UserKey) -> LiveHistory | None:
        with self._lock:
            found = self._profiles.get(user_key)
            if found is not None:
                self._profiles.move_to_end(user_key)
            return found

    def covers(self, token: ConsistencyToken) -> bool:
        watermark = self._watermark
        return watermark is not None and watermark.covers(token)

    def wait_until_covers(self, token: ConsistencyToken, timeout_seconds: float) -> bool:
        with self._lock:
            return self._lock.wait_for(lambda: self.covers(token), timeout=max(0.0, timeout_seconds))

    def fetch(self, user_key: UserKey, consistency_text: str, timeout_seconds: float) -> LiveHistory:
        if time.monotonic() < self._closed_until:
            raise Unavailable(
                "PROFILE_UNAVAILABLE", f"profile failed a moment ago: {self._stream.last_error}"
            )
        key = (bytes(user_key), consistency_text)
        with self._lock:
            flight = self._flights.get(key)
            leads = flight is None
            if flight is None:
                flight = self._flights[key] = _Flight()
        if not leads:
            return flight.wait(timeout_seconds)
        try:
            flight.land(self._fetch(user_key, consistency_text, timeout_seconds))
        except ShopkeeperError as error:
            flight.fail(error)
        except Exception as error:
            flight.fail(Unavailable("PROFILE_UNAVAILABLE", f"{type(error).__name__}: {error}"))
        finally:
            with self._lock:
                self._flights.pop(key, None)
        return flight.wait(0)

    def state(self) -> StreamState:
        stream = self._stream
        return StreamState(
            name="profiles",
            connected=stream.connected,
            # Heartbeats go on while profile cannot read the log; only a new reading is news.
            last_message_time=self._progress_time,
            watermark=self._encoded_watermark,
            watermark_time=self._watermark_time,
            entries=len(self._profiles),
            last_error="" if stream.connected else stream.last_error,
            complete=True,
        )

    def _fetch(self, user_key: UserKey, consistency_text: str, timeout_seconds: float) -> LiveHistory:
        request = profile_service_pb2.GetProfileRequest(
            user_key=user_key,
            view=profile_service_pb2.PROFILE_VIEW_LIVE,
            consistency_token=consistency_text,
        )
        try:
            profile = self._stub.GetProfile(request, timeout=timeout_seconds)
        except grpc.RpcError as rpc_error:
            error = from_rpc_error(rpc_error)
            if isinstance(error, InvalidInput):
                raise error from None
            if not self._stream.connected or not self._is_progressing():
                # Asking again for every request would cost each of them its time.
                self._closed_until = time.monotonic() + _BREAKER_SECONDS
            raise error from None
        return self._take(profile.live, fresh=False)

    def _is_progressing(self) -> bool:
        return self._progress_time is not None and time.time() - self._progress_time < _BREAKER_SECONDS

    def _begin_anew(self) -> None:
        self._encoded_watermark = b""

    def _open(self) -> Any:
        index, count = self._partition
        return self._stub.WatchProfiles(
            profile_service_pb2.WatchProfilesRequest(
                partition_index=index, partition_count=count, resume_watermark=self._encoded_watermark
            )
        )

    def _consume(self, message: profile_service_pb2.WatchProfilesResponse) -> None:
        if message.reset:
            with self._lock:
                self._profiles.clear()
                self._position.clear()
                # What the old stream has seen is no longer here.
                self._watermark, self._encoded_watermark, self._start = None, b"", None
        for user_key in message.erased_user_keys:
            self._counts.forget(user_key)
            self._on_erased(user_key)
            with self._lock:
                self._profiles.pop(user_key, None)
                self._position.pop(user_key, None)
        for live in message.changed:
            self._take(live, fresh=True)
        if message.watermark:
            watermark = Watermark.decode(message.watermark)
            with self._lock:
                self._watermark, self._encoded_watermark = watermark, message.watermark
                if self._start is None:
                    self._start = _order(watermark)
                now = time.time()
                read = (
                    message.watermark_time.ToNanoseconds() / 1e9
                    if message.HasField("watermark_time")
                    else now
                )
                if read != self._watermark_time:
                    self._watermark_time, self._progress_time = read, now
                self._lock.notify_all()

    def _take(self, live: live_profile_pb2.LiveProfile, *, fresh: bool) -> LiveHistory:
        """Takes a live profile in, unless a newer one of the shopper is here; returns the newer."""
        position = _order(Watermark.decode(live.watermark)) if live.watermark else (0, 0)
        history = self._history(live)
        segments = segments_of(live)
        made = LiveHistory(history, live.personalisation, live.watermark, segments)
        with self._lock:
            held = self._profiles.get(live.user_key)
            if held is not None and self._position.get(live.user_key, (0, 0)) > position:
                return held
            if not fresh and (self._start is None or position < self._start):
                # From before the stream began, by a replica that lags: nobody would tell what came between.
                return made
            self._profiles[live.user_key] = made
            self._profiles.move_to_end(live.user_key)
            self._position[live.user_key] = position
            if len(self._profiles) > self._max_profiles:
                dropped, _ = self._profiles.popitem(last=False)
                self._position.pop(dropped, None)
        self._counts.record(live.user_key, history.rows_N, history.kinds_N, history.times_N, segments)
        if fresh and len(history):
            lag = time.time() - float(history.times_N[-1])
            if 0 <= lag < _LAG_OF_INTEREST_SECONDS:
                self._observe_lag(lag)
        return made

    def _history(self, live: live_profile_pb2.LiveProfile) -> History:
        # Newest first on the wire, oldest first here: models read time forwards.
        events = list(live.history[:MAX_EVENTS])[::-1]
        ids = [event.item_id for event in events]
        if len(self._index) < self._max_items:
            rows_N = self._index.intern(ids)
        else:
            # The index never shrinks: beyond its limit, items that it does not know are left out.
            known = [(row, event) for row, event in zip(map(self._index.row_of, ids), events, strict=True)]
            events = [event for row, event in known if row is not None]
            rows_N = np.array([row for row, _ in known if row is not None], dtype=np.int32)
        times_N = np.array(
            [e.occurred_at.seconds + e.occurred_at.nanos * 1e-9 for e in events], dtype=np.float64
        )
        return History(rows_N, np.array([event.kind for event in events], dtype=np.int32), times_N)


def _order(watermark: Watermark) -> tuple[int, int]:
    """Returns by what watermarks of one log compare: the later one shows more."""
    # A commit in the midst of what was seen already moves nothing but the list of those that are missing.
    return watermark.xmax, -len(watermark.in_progress)


_STAGE_OF = {
    number: "stage:" + name.removeprefix("LIFE_CYCLE_STAGE_").lower()
    for name, number in user_portrait_pb2.LifeCycleStage.items()
    if number
}
# Who has done nothing yet has not bought either.
_STAGE_OF[user_portrait_pb2.LIFE_CYCLE_STAGE_UNSPECIFIED] = _STAGE_OF[
    user_portrait_pb2.LIFE_CYCLE_STAGE_PROSPECT
]


def segments_of(live: live_profile_pb2.LiveProfile) -> tuple[str, ...]:
    """Returns the segments of a shopper; none of one who does not consent to personalisation."""
    if not live.personalisation:
        return ()
    stage = _STAGE_OF.get(live.summary.life_cycle_stage)
    segments = tuple(live.summary.segment_ids)
    return segments if stage is None else (*segments, stage)


class _Flight:
    """One call that several threads wait for."""

    def __init__(self) -> None:
        self._landed = threading.Event()
        self._result: LiveHistory | None = None
        self._error: ShopkeeperError | None = None

    def land(self, result: LiveHistory) -> None:
        self._result = result
        self._landed.set()

    def fail(self, error: ShopkeeperError) -> None:
        self._error = error
        self._landed.set()

    def wait(self, timeout_seconds: float) -> LiveHistory:
        if not self._landed.wait(timeout_seconds):
            raise Unavailable("PROFILE_UNAVAILABLE", "profile did not answer in time")
        if self._result is None:
            raise self._error or Unavailable("PROFILE_UNAVAILABLE", "profile did not answer")
        return self._result
