"""Merchandising rules: what the shop wants, whatever the model thinks."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum


class GroupBy(IntEnum):
    """What items are told apart by; numbered as in the contract."""

    BRAND = 1
    CATEGORY = 2
    TOP_CATEGORY = 3


@dataclass(frozen=True, slots=True)
class Pin:
    """Puts items at positions, from 1, distinct: (item id, position)."""

    pins: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class Shift:
    """Adds an amount, in standard deviations of the scores, to the items of a filter; below 0 it buries."""

    filter_text: str
    amount: float


@dataclass(frozen=True, slots=True)
class Exclude:
    """Leaves the items of a filter out."""

    filter_text: str


@dataclass(frozen=True, slots=True)
class Cap:
    """At most `limit` items of one kind on a page; items of no known kind are not counted."""

    group_by: GroupBy
    limit: int


@dataclass(frozen=True, slots=True)
class MinimumShare:
    """At least this share of each page, in (0, 1], is of the filter, as far as there are such items."""

    filter_text: str
    share: float


Action = Pin | Shift | Exclude | Cap | MinimumShare


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule.

    Attributes:
        active: spans (start, end) in seconds since 1970, start included, end not; None is open. No span:
            always.
        placements: none is all.
        version: counts the changes, from 1; 0 of a draft.
        create_time, update_time: seconds since 1970.
    """

    rule_id: str
    display_name: str
    action: Action
    active: tuple[tuple[float | None, float | None], ...] = ()
    placements: tuple[str, ...] = ()
    disabled: bool = False
    version: int = 0
    etag: str = ""
    create_time: float | None = None
    update_time: float | None = None

    def acts(self, placement: str, now: float) -> bool:
        """Returns whether the rule acts in a placement at `now`, seconds since 1970."""
        if self.disabled or (self.placements and placement not in self.placements):
            return False
        return not self.active or any(
            (start is None or start <= now) and (end is None or now < end) for start, end in self.active
        )
