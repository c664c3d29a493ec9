"""What no person does. Marked, never dropped: what is a bot today may be a school class tomorrow."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BotRules:
    """Limits; each holds for a shopper and for a session, and events of the whole window beyond one are marked.

    Attributes:
        views_per_minute: item views in one minute of `occurred_at` that are believed (rate).
        bare_views_per_hour: item views in one hour that are believed of whoever does nothing but view items, and
            stays on none (pattern).
        users_per_session: shoppers in one session and hour that are believed (pattern).
    """

    views_per_minute: int = 120
    bare_views_per_hour: int = 600
    users_per_session: int = 8
