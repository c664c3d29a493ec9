"""What is popular with whom, counted from the live histories that pass by."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

MIN_EVENTS = 50
"""Decayed events below which a segment says too little to go by."""

MAX_SEGMENTS = 200
"""Segments that are counted; the one that was silent longest gives way."""

_REBUILT_SHARE = 0.01


@dataclass(slots=True)
class _Segment:
    """Weights by row, and the same as arrays, made anew when one in a hundred events is new."""

    weight_of: dict[int, float] = field(default_factory=dict)
    total: float = 0.0
    total_in_arrays: float = 0.0
    rows: npt.NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    weights: npt.NDArray[np.float64] = field(default_factory=lambda: np.empty(0))


@dataclass(frozen=True, slots=True)
class SegmentPopularity:
    """Decayed counts of one segment.

    Attributes:
        segment: its id; a stage of life has one that begins with "stage:".
        rows: the rows with a count, int32.
        counts: theirs, float64, above 0.
    """

    segment: str
    rows: npt.NDArray[np.int32]
    counts: npt.NDArray[np.float64]


class SegmentCounts:
    """Weights of events by segment and row. Not thread-safe: its owner has the lock and the clock.

    Weights are those of forward decay: all are of one landmark, which the owner moves.
    """

    def __init__(self) -> None:
        self._segments: OrderedDict[str, _Segment] = OrderedDict()

    def add(
        self, segments: Iterable[str], rows_N: npt.NDArray[np.int32], weights_N: npt.NDArray[np.float64]
    ) -> None:
        """Adds events of a shopper to each of the segments that they are in."""
        pairs = list(zip(rows_N.tolist(), weights_N.tolist(), strict=True))
        for name in segments:
            segment = self._segments.get(name)
            if segment is None:
                segment = self._segments[name] = _Segment()
                if len(self._segments) > MAX_SEGMENTS:
                    self._segments.popitem(last=False)
            self._segments.move_to_end(name)
            weight_of = segment.weight_of
            for row, weight in pairs:
                weight_of[row] = weight_of.get(row, 0.0) + weight
                segment.total += weight

    def rescale(self, factor: float) -> None:
        """Multiplies every weight: the landmark has moved."""
        for segment in self._segments.values():
            segment.weight_of = {row: weight * factor for row, weight in segment.weight_of.items()}
            segment.total *= factor
            segment.total_in_arrays = -1.0

    def narrowest(self, segments: Sequence[str], scale: float) -> SegmentPopularity | None:
        """Returns what is popular in the smallest of the segments that has MIN_EVENTS; None where none has.

        Args:
            scale: turns weights into counts as of now.
        """
        best: tuple[float, str] | None = None
        for name in segments:
            known = self._segments.get(name)
            if known is not None and known.total * scale >= MIN_EVENTS:
                best = min(best or (known.total, name), (known.total, name))
        if best is None:
            return None
        segment = self._segments[best[1]]
        new = segment.total - segment.total_in_arrays
        if segment.total_in_arrays < 0 or new > _REBUILT_SHARE * segment.total:
            count = len(segment.weight_of)
            segment.rows = np.fromiter(segment.weight_of.keys(), np.int32, count)
            segment.weights = np.fromiter(segment.weight_of.values(), np.float64, count)
            segment.total_in_arrays = segment.total
        return SegmentPopularity(best[1], segment.rows, segment.weights * scale)
