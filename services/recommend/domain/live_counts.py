"""What is popular now, counted from the live histories that pass by."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from services.recommend.domain.segment_counts import SegmentCounts, SegmentPopularity
from shared.event_kinds import INTEREST_KINDS

Float32 = npt.NDArray[np.float32]

_INTEREST_KINDS = np.array(sorted(INTEREST_KINDS))

HALF_LIFE_SECONDS = 7 * 86_400.0
BUCKET_SECONDS = 600
KEPT_SECONDS = 30 * 86_400
_MAX_EXPONENT = 60.0


class LiveCounts:
    """Counts each event once, however often its history is sent.

    Popularity decays with a half-life of 7 days, by forward decay (Cormode et al., 2009): an event at
    time t adds 2**((t - landmark) / half-life), so that nothing needs to be touched as time passes.
    Trending counts events in buckets of ten minutes, for 30 days.

    Args:
        max_users: shoppers whose newest counted event is remembered; the least recent are forgotten,
            and would be counted again where their history came again.
    """

    def __init__(self, max_users: int = 1_000_000) -> None:
        self._lock = threading.Lock()
        self._max_users = max_users
        self._counted_until: OrderedDict[bytes, float] = OrderedDict()
        self._decayed_R: npt.NDArray[np.float64] = np.zeros(1024)
        self._landmark: float | None = None
        self._buckets: dict[int, dict[int, int]] = {}
        self._segments = SegmentCounts()
        self.event_count = 0

    def record(
        self,
        user_key: bytes,
        rows_N: npt.NDArray[np.int32],
        kinds_N: npt.NDArray[np.int32],
        times_N: npt.NDArray[np.float64],
        segments: Sequence[str] = (),
    ) -> None:
        """Counts what is new in a history (oldest first), in each of the segments that the shopper is in now."""
        if not len(rows_N):
            return
        with self._lock:
            since = self._counted_until.get(user_key, -math.inf)
            new_N = (times_N > since) & np.isin(kinds_N, _INTEREST_KINDS)
            self._counted_until[user_key] = max(since, float(times_N[-1]))
            self._counted_until.move_to_end(user_key)
            if len(self._counted_until) > self._max_users:
                self._counted_until.popitem(last=False)
            if new_N.any():
                self._add(rows_N[new_N], times_N[new_N], segments)

    def forget(self, user_key: bytes) -> None:
        """Forgets a shopper; the counts, which name nobody, stay."""
        with self._lock:
            self._counted_until.pop(user_key, None)

    def popularity(self, size: int, now: float) -> Float32:
        """Returns decayed counts of the first `size` rows as of `now` (seconds), float32, (R,)."""
        popularity_R = np.zeros(size, dtype=np.float32)
        with self._lock:
            if self._landmark is None:
                return popularity_R
            counted = min(size, len(self._decayed_R))
            scale = 2.0 ** (-min(1000.0, (now - self._landmark) / HALF_LIFE_SECONDS))
            popularity_R[:counted] = self._decayed_R[:counted] * scale
        return popularity_R

    def popularity_in(self, segments: Sequence[str], now: float) -> SegmentPopularity | None:
        """Returns decayed counts of the narrowest of the segments that has enough events; None where none has."""
        if not segments:
            return None
        with self._lock:
            if self._landmark is None:
                return None
            scale = 2.0 ** (-min(1000.0, (now - self._landmark) / HALF_LIFE_SECONDS))
            return self._segments.narrowest(segments, scale)

    def trending(self, size: int, window_seconds: float, now: float) -> Float32:
        """Returns the events of each of the first `size` rows within the window, float32, (R,)."""
        first = math.floor((now - window_seconds) / BUCKET_SECONDS) + 1
        counts_R = np.zeros(size, dtype=np.float32)
        with self._lock:
            for bucket, counts in self._buckets.items():
                if bucket >= first:
                    for row, count in counts.items():
                        if row < size:
                            counts_R[row] += count
        return counts_R

    def _add(
        self, rows: npt.NDArray[np.int32], times: npt.NDArray[np.float64], segments: Sequence[str]
    ) -> None:
        self.event_count += len(rows)
        newest = float(times.max())
        if self._landmark is None:
            self._landmark = newest
        exponents = (times - self._landmark) / HALF_LIFE_SECONDS
        if newest > self._landmark and float(exponents.max()) > _MAX_EXPONENT:
            factor = 2.0 ** ((self._landmark - newest) / HALF_LIFE_SECONDS)
            self._decayed_R *= factor
            self._segments.rescale(factor)
            self._landmark = newest
            exponents = (times - newest) / HALF_LIFE_SECONDS
        largest = int(rows.max())
        if largest >= len(self._decayed_R):
            grown = np.zeros(max(2 * len(self._decayed_R), largest + 1))
            grown[: len(self._decayed_R)] = self._decayed_R
            self._decayed_R = grown
        weights = 2.0**exponents
        np.add.at(self._decayed_R, rows, weights)
        self._segments.add(segments, rows, weights)
        buckets = (times // BUCKET_SECONDS).astype(np.int64)
        for bucket, row in zip(buckets.tolist(), rows.tolist(), strict=True):
            counts = self._buckets.setdefault(bucket, {})
            counts[row] = counts.get(row, 0) + 1
        if len(self._buckets) > KEPT_SECONDS // BUCKET_SECONDS:
            oldest_kept = max(self._buckets) - KEPT_SECONDS // BUCKET_SECONDS
            for bucket in [bucket for bucket in self._buckets if bucket < oldest_kept]:
                del self._buckets[bucket]
