"""Merchandising rules at work on one request.

Exclusions act as a filter, boosts and buries on the scores that the order is made of, both before diversity;
pins, caps and minimum shares then arrange the page. Of two pins for one place the first rule's stands. A pin
counts towards caps and shares, and no cap takes it out. No rule brings back what is not eligible.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from services.recommend.domain.catalog import Catalog, Mask
from services.recommend.domain.ranking import top_rows
from services.recommend.domain.rules import Cap, Exclude, GroupBy, MinimumShare, Pin, Rule, Shift
from services.recommend.ports import Float32
from services.recommend.use_cases.eligibility import FilterMasks
from services.recommend.use_cases.selection import Selection
from services.recommend.use_cases.world import World


@dataclass(slots=True)
class RulePlan:
    """The rules that act on one request, over the rows of its world, in the config's order.

    Attributes:
        exclusions: (rule, where it leaves items out).
        shifts: (rule, where it shifts, by how many standard deviations).
        pins: (rule, row, position from 1).
        shares: (rule, where it wants a share, the share).
        moved: by row, what rules added to its score, or 0 where they placed it.
        displaced: by row, the caps and shares that passed it over.
    """

    exclusions: list[tuple[str, Mask]] = field(default_factory=list)
    shifts: list[tuple[str, Mask, float]] = field(default_factory=list)
    pins: list[tuple[str, int, int]] = field(default_factory=list)
    caps: list[tuple[str, Cap]] = field(default_factory=list)
    shares: list[tuple[str, Mask, float]] = field(default_factory=list)
    moved: dict[int, dict[str, float]] = field(default_factory=dict)
    displaced: dict[int, set[str]] = field(default_factory=dict)
    deviation: float = 1.0

    @property
    def arranges(self) -> bool:
        """Whether the page is arranged after the order is known."""
        return bool(self.pins or self.caps or self.shares)

    def ruled_out(self, size: int) -> Mask | None:
        """Returns where a rule leaves items out, bool (R,); None where none does."""
        if not self.exclusions:
            return None
        return np.logical_or.reduce([mask_R[:size] for _, mask_R in self.exclusions])

    def order(self, score_R: Float32, eligible_R: Mask) -> Float32:
        """Returns what the order is made of: the scores, shifted by boosts and buries, (R,)."""
        if not self.shifts:
            return score_R
        scored = score_R[eligible_R & (score_R > -np.inf)]
        deviation = float(scored.std()) if len(scored) else 0.0
        self.deviation = deviation if deviation > 0 else 1.0
        order_R = score_R.copy()
        for _, mask_R, amount in self.shifts:
            order_R[mask_R] += np.float32(amount * self.deviation)
        return order_R

    def rules_of(self, row: int) -> list[str]:
        """Returns the rules that moved or removed the item."""
        found = [rule_id for rule_id, mask_R in self.exclusions if mask_R[row]]
        found += [rule_id for rule_id, mask_R, _ in self.shifts if mask_R[row]]
        found += self.moved.get(row, {})
        found += sorted(self.displaced.get(row, ()))
        return list(dict.fromkeys(found))

    def contributions(self, row: int) -> dict[str, float]:
        """Returns what each rule did for an item on the page: added to its score, or 0 for its place."""
        added = {rule_id: amount * self.deviation for rule_id, mask_R, amount in self.shifts if mask_R[row]}
        return added | self.moved.get(row, {})


def plan_rules(
    rules: Sequence[Rule], placement: str, now: float, world: World, filters: FilterMasks
) -> RulePlan | None:
    """Returns what acts in a placement at `now`, seconds since 1970; None where nothing does."""
    plan, acts = RulePlan(), False
    for rule in rules:
        if not rule.acts(placement, now):
            continue
        acts = True
        match rule.action:
            case Exclude(text):
                plan.exclusions.append((rule.rule_id, filters.mask(text, world.catalog)))
            case Shift(text, amount):
                plan.shifts.append((rule.rule_id, filters.mask(text, world.catalog), amount))
            case MinimumShare(text, share):
                plan.shares.append((rule.rule_id, filters.mask(text, world.catalog), share))
            case Cap():
                plan.caps.append((rule.rule_id, rule.action))
            case Pin(pins):
                for item_id, position in pins:
                    row = world.index.row_of(item_id)
                    if row is not None and row < world.size:
                        plan.pins.append((rule.rule_id, row, position))
    return plan if acts else None


def group_of(catalog: Catalog, row: int, group_by: GroupBy) -> str:
    """Returns the kind that an item is of; "" where it is unknown."""
    item = catalog.items.get(row)
    if item is None:
        return ""
    if group_by is GroupBy.BRAND:
        return item.brand
    path = item.category_path
    if not path:
        return ""
    return path[-1] if group_by is GroupBy.CATEGORY else path[0]


def arrange(
    pool: Selection,
    plan: RulePlan,
    world: World,
    eligible_R: Mask,
    order_R: Float32,
    count: int,
    offset: int,
    pin_tier: int,
) -> tuple[Selection, npt.NDArray[np.int32]]:
    """Returns a page of at most `count` items that meets the plan, and the pool's rows that were left, in order.

    A minimum share is met at the last places that allow it, so that as little as possible is moved.

    Args:
        pool: more candidates than the page has room for, best first.
        offset: items on the pages before.
        pin_tier: the tier of pinned items that no other tier has brought.
    """
    scores = dict(zip(pool.rows_K.tolist(), pool.scores_K.tolist(), strict=True))
    tiers = dict(zip(pool.rows_K.tolist(), pool.tiers_K.tolist(), strict=True))
    # A page never has more places than there are items for it.
    slots: list[int | None] = [None] * count
    pinned: set[int] = set()
    for rule_id, row, position in plan.pins:
        slot = position - 1 - offset
        if row in pinned or not eligible_R[row] or slot < 0:
            continue
        if slot < count and slots[slot] is not None:
            continue
        # One whose place is on a later page is kept for it.
        pinned.add(row)
        plan.moved.setdefault(row, {})[rule_id] = 0.0
        if slot < count:
            slots[slot] = row
    waiting = [row for row in pool.rows_K.tolist() if row not in pinned]
    needed: list[tuple[str, Mask, int]] = []
    for rule_id, mask_R, share in plan.shares:
        wanted = math.ceil(share * count - 1e-9)
        wanted -= sum(1 for row in slots if row is not None and mask_R[row])
        available_R = eligible_R & mask_R
        available_R[[*waiting, *pinned]] = False
        more = top_rows(order_R, available_R, max(wanted, 1)).tolist()
        for row in more:
            waiting.append(row)
            scores[row], tiers[row] = float(order_R[row]), 0
        needed.append((rule_id, mask_R, wanted))
    groups: list[dict[str, int]] = [{} for _ in plan.caps]
    kinds = [
        {row: group_of(world.catalog, row, cap.group_by) for row in [*waiting, *pinned]}
        for _, cap in plan.caps
    ]
    for taken in slots:
        if taken is not None:
            _count(groups, kinds, taken)
    for place in range(count):
        if slots[place] is not None:
            continue
        free = sum(1 for row in slots[place:] if row is None)
        tight = [(n, rule_id, mask_R) for n, (rule_id, mask_R, wanted) in enumerate(needed) if wanted >= free]
        chosen = first = None
        passed: list[int] = []
        for row in waiting:
            full = _full(plan, groups, kinds, row)
            if full:
                plan.displaced.setdefault(row, set()).update(full)
                continue
            first = row if first is None else first
            if all(mask_R[row] for _, _, mask_R in tight):
                chosen = row
                break
            passed.append(row)
        if chosen is None:
            chosen = first
        elif chosen != first:
            for _, rule_id, _ in tight:
                plan.moved.setdefault(chosen, {})[rule_id] = 0.0
                for row in passed:
                    plan.displaced.setdefault(row, set()).add(rule_id)
        if chosen is None:
            break
        slots[place] = chosen
        waiting.remove(chosen)
        _count(groups, kinds, chosen)
        needed = [(rule_id, mask_R, wanted - int(mask_R[chosen])) for rule_id, mask_R, wanted in needed]
    rows = [row for row in slots if row is not None]
    later = [
        row for _, row, _ in sorted(plan.pins, key=lambda pin: pin[2]) if row in pinned and row not in rows
    ]
    if not waiting and not pool.has_more:
        # There will be no page on which its place would be.
        rows, later = rows + later[: count - len(rows)], later[count - len(rows) :]
    for row in rows:
        plan.displaced.pop(row, None)
    lowest = min(pool.scores_K.tolist(), default=0.0) - 1
    page = Selection(
        np.array(rows, np.int32),
        np.array([scores.get(row, lowest) for row in rows], np.float32),
        np.array([tiers.get(row, pin_tier) for row in rows], np.int32),
        pool.has_more or bool(waiting) or bool(later),
    )
    return page, np.array(waiting, np.int32)


def has_room(plan: RulePlan, page: Selection, row: int, catalog: Catalog, further: int) -> bool:
    """Returns whether `further` more items of the row's kinds would stay within every cap."""
    for _, cap in plan.caps:
        kind = group_of(catalog, row, cap.group_by)
        held = sum(1 for other in page.rows_K.tolist() if group_of(catalog, other, cap.group_by) == kind)
        if kind and held + further > cap.limit:
            return False
    return True


def _count(groups: list[dict[str, int]], kinds: list[dict[int, str]], row: int) -> None:
    for group, kind in zip(groups, kinds, strict=True):
        group[kind[row]] = group.get(kind[row], 0) + 1


def _full(plan: RulePlan, groups: list[dict[str, int]], kinds: list[dict[int, str]], row: int) -> list[str]:
    return [
        rule_id
        for (rule_id, cap), group, kind in zip(plan.caps, groups, kinds, strict=True)
        if kind[row] and group.get(kind[row], 0) >= cap.limit
    ]
