"""What a shopper did lately, in rows of the item index."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from shared.event_kinds import INTEREST_KINDS, EventKind

# By kind, and one entry more: a kind of a later contract is clipped to it. `np.isin` takes ten times as long.
_IS_INTEREST = np.isin(np.arange(max(EventKind) + 2), sorted(INTEREST_KINDS))

MAX_EVENTS = 200
"""The newest events that a history keeps."""


@dataclass(frozen=True, slots=True)
class History:
    """Events of one shopper, oldest first.

    Attributes:
        rows_N: rows of the item index, int32.
        kinds_N: event kinds, int32.
        times_N: seconds since 1970, UTC, float64, ascending.
    """

    rows_N: npt.NDArray[np.int32]
    kinds_N: npt.NDArray[np.int32]
    times_N: npt.NDArray[np.float64]
    _derived: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.rows_N)

    def derived(self, name: str, version: str, make: Callable[[], Any]) -> Any:
        """Returns what follows from the history alone, made once for each version of what makes it.

        Several requests come between two events of a shopper; only the newest version is kept.
        """
        held = self._derived.get(name)
        if held is None or held[0] != version:
            held = self._derived[name] = (version, make())
        return held[1]

    def followed_by(self, later: History) -> History:
        """Returns both, by time; an event of `later` that is here already (row, kind, time) counts once.

        Events of the same time keep their order, those of `later` last.
        """
        if not len(later):
            return self
        if not len(self):
            return later
        known = set(
            zip(self.rows_N.tolist(), self.kinds_N.tolist(), np.round(self.times_N, 3).tolist(), strict=True)
        )
        new = [
            n
            for n, event in enumerate(
                zip(
                    later.rows_N.tolist(),
                    later.kinds_N.tolist(),
                    np.round(later.times_N, 3).tolist(),
                    strict=True,
                )
            )
            if event not in known
        ]
        times_N = np.concatenate([self.times_N, later.times_N[new]])
        order = np.argsort(times_N, kind="stable")[-MAX_EVENTS:]
        return History(
            np.concatenate([self.rows_N, later.rows_N[new]])[order],
            np.concatenate([self.kinds_N, later.kinds_N[new]])[order],
            times_N[order],
        )

    def seen_rows(self) -> npt.NDArray[np.int32]:
        """Returns the rows of the items that the shopper has shown an interest in, int32, ascending."""
        rows: npt.NDArray[np.int32] = self.derived(
            "seen", "", lambda: np.unique(self.rows_N[_IS_INTEREST.take(self.kinds_N, mode="clip")])
        )
        return rows

    def owned_rows(self) -> npt.NDArray[np.int32]:
        """Returns the rows of the items bought more often than sent back, int32, ascending."""
        rows: npt.NDArray[np.int32] = self.derived("owned", "", self._owned_rows)
        return rows

    def _owned_rows(self) -> npt.NDArray[np.int32]:
        bought = self.rows_N[self.kinds_N == EventKind.PURCHASE]
        if not len(bought):
            return bought
        rows, counts = np.unique(bought, return_counts=True)
        returned = self.rows_N[self.kinds_N == EventKind.RETURN]
        if len(returned):
            counts = counts - np.array([np.count_nonzero(returned == row) for row in rows])
        return rows[counts > 0]


NO_HISTORY = History(np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, np.float64))


@dataclass(frozen=True, slots=True)
class Purchases:
    """The items that a shopper has bought, one entry an item.

    Attributes:
        rows_P: rows, int32.
        counts_P: purchases, int64, at least 1.
        newest_P: the newest purchase, seconds since 1970.
        interval_P: mean seconds between two purchases of the item; NaN with one.
    """

    rows_P: npt.NDArray[np.int32]
    counts_P: npt.NDArray[np.int64]
    newest_P: npt.NDArray[np.float64]
    interval_P: npt.NDArray[np.float64]


def purchases_of(history: History) -> Purchases:
    """Returns the purchases of a history, by row."""
    bought_N = history.kinds_N == EventKind.PURCHASE
    rows_N, times_N = history.rows_N[bought_N], history.times_N[bought_N]
    rows_P, inverse_N, counts_P = np.unique(rows_N, return_inverse=True, return_counts=True)
    newest_P = np.full(len(rows_P), -np.inf)
    oldest_P = np.full(len(rows_P), np.inf)
    np.maximum.at(newest_P, inverse_N, times_N)
    np.minimum.at(oldest_P, inverse_N, times_N)
    with np.errstate(invalid="ignore", divide="ignore"):
        interval_P = np.where(
            (counts_P > 1) & (newest_P > oldest_P), (newest_P - oldest_P) / (counts_P - 1), np.nan
        )
    return Purchases(rows_P, counts_P, newest_P, interval_P)


DEFAULT_INTERVAL_SECONDS = 90 * 86_400.0
"""Assumed between two purchases of an item that was bought once."""


def buy_again_scores(purchases: Purchases, now: float) -> npt.NDArray[np.float64]:
    """Returns how much each item is due, (P,), float64, at least 0.

    count * exp(-|ln(elapsed / interval)|): highest when the time since the last purchase equals the
    item's own interval, falling off on both sides alike, and proportional to how often it was bought.
    """
    interval_P = np.where(np.isnan(purchases.interval_P), DEFAULT_INTERVAL_SECONDS, purchases.interval_P)
    # An hour at least: an item bought a moment ago has a ratio, and is not due.
    ratio_P = np.maximum(now - purchases.newest_P, 3600.0) / np.maximum(interval_P, 3600.0)
    return purchases.counts_P.astype(np.float64) * np.exp(-np.abs(np.log(ratio_P)))
