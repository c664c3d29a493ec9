"""A second model that answers beside the one that is shown: compared, never shown.

The comparison is made on one thread of its own, after the answer has gone. Where requests come faster than it
compares, some are passed over: which ones does not depend on what they are.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from services.recommend.use_cases.world import World

Rows = npt.NDArray[np.int32]

_MOST_WAITING = 32


@dataclass(frozen=True, slots=True)
class Comparison:
    """One request, answered by two models.

    Attributes:
        serving_config: of the request.
        shown_version, shadow_version: of the models.
        item_count: items of the longer page.
        overlap: share of those that are on both pages, in [0, 1].
        rank_biased_overlap: likeness of the two orders, in [0, 1], the top weighing most.
    """

    serving_config: str
    shown_version: str
    shadow_version: str
    item_count: int
    overlap: float
    rank_biased_overlap: float


class Shadow:
    """Makes comparisons, one after the other.

    Args:
        compared: told of each.
        failed: told of what went wrong with one; None: of one that was passed over.
    """

    def __init__(
        self, compared: Callable[[Comparison], None], failed: Callable[[Exception | None], None]
    ) -> None:
        self._compared = compared
        self._failed = failed
        self._waiting: queue.Queue[Callable[[], Comparison] | None] = queue.Queue(_MOST_WAITING)
        self._thread = threading.Thread(target=self._run, name="shadow", daemon=True)
        self._thread.start()

    def later(
        self, serving_config: str, shown: World, shadow: World, shown_K: Rows, answer: Callable[[], Rows]
    ) -> None:
        """Compares a page with what `answer` will return. Returns at once."""

        def compare() -> Comparison:
            shadow_K = answer()
            count = max(len(shown_K), len(shadow_K))
            both = len(set(shown_K.tolist()) & set(shadow_K.tolist()))
            return Comparison(
                serving_config,
                shown.model.version if shown.model is not None else "",
                shadow.model.version if shadow.model is not None else "",
                count,
                both / count if count else 1.0,
                rank_biased_overlap(shown_K, shadow_K),
            )

        try:
            self._waiting.put_nowait(compare)
        except queue.Full:
            self._failed(None)

    def stop(self) -> None:
        """Ends the thread after the comparison under way."""
        while True:
            try:
                self._waiting.put_nowait(None)
                return
            except queue.Full:
                with contextlib.suppress(queue.Empty):
                    self._waiting.get_nowait()

    def _run(self) -> None:
        while (compare := self._waiting.get()) is not None:
            try:
                self._compared(compare())
            except Exception as error:
                self._failed(error)


def rank_biased_overlap(first_K: Rows, second_K: Rows, persistence: float = 0.9) -> float:
    """Returns how alike two rankings without repeats are, in [0, 1].

    Webber, Moffat and Zobel (2010), truncated at the shorter's length and normalised, so that equal rankings
    are at 1: sum over depths d of persistence**(d - 1) * |first d of both| / d.
    """
    depth = min(len(first_K), len(second_K))
    if not depth:
        return float(len(first_K) == len(second_K))
    first: set[int] = set()
    second: set[int] = set()
    total = weights = 0.0
    for d in range(1, depth + 1):
        first.add(int(first_K[d - 1]))
        second.add(int(second_K[d - 1]))
        weight = persistence ** (d - 1)
        total += weight * len(first & second) / d
        weights += weight
    return total / weights
