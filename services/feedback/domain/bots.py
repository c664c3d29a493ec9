"""What no person does. Marked, never dropped: what is a bot today may be a school class tomorrow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Nine of ten intervals lie within this share of the middle one: a person's differ by more than the middle itself.
_METRONOME_SPREAD = 0.1
_MINUTE_MS, _SECOND_MS = 60_000, 1_000


@dataclass(frozen=True, slots=True)
class BotRules:
    """Limits; each holds for a shopper and for a session, and events of the whole window beyond one are marked.

    Attributes:
        views_per_minute: item views in one minute of `occurred_at` that are believed (rate).
        bare_views_per_hour: item views in one hour that are believed of whoever does nothing but view items, and
            stays on none (pattern).
        users_per_session: shoppers in one session and hour that are believed (pattern).
        metronome_views: item views in one hour from which on equal intervals between them are not believed (pattern).
    """

    views_per_minute: int = 120
    bare_views_per_hour: int = 600
    users_per_session: int = 8
    metronome_views: int = 30


def is_metronome(moments_ms: Sequence[int], least: int) -> bool:
    """Returns whether at least so many moments of an hour follow each other like those of a machine.

    Robust: the tenth of the longest and of the shortest intervals (a pause, a retry) does not count.

    Args:
        moments_ms: milliseconds since the beginning of the hour, distinct, ascending.
    """
    if len(moments_ms) < least:
        return False
    moments_N = np.asarray(moments_ms, np.int64)
    low, middle, high = np.quantile(np.diff(moments_N), (0.1, 0.5, 0.9))
    # Intervals of one tick are those of a coarse clock, not of a regular visitor.
    tick = next((tick for tick in (_MINUTE_MS, _SECOND_MS) if not (moments_N % tick).any()), 1)
    return bool(middle >= 2 * tick and high - low <= _METRONOME_SPREAD * middle)
