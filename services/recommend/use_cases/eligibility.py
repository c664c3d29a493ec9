"""What may not be shown, whatever its score."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from services.recommend.domain.catalog import Catalog, Mask
from services.recommend.domain.filter_expression import compile_mask
from services.recommend.domain.recommendation import Verdict
from services.recommend.ports import FilterParser
from services.recommend.use_cases.world import World

_CACHED_MASKS = 256
_NO_ROWS = np.empty(0, dtype=np.int32)


class FilterMasks:
    """Masks of filters, one for each text and state of the catalogue."""

    def __init__(self, parser: FilterParser) -> None:
        self._parser = parser
        self._lock = threading.Lock()
        self._masks: OrderedDict[tuple[str, int], Mask] = OrderedDict()

    def mask(self, text: str, catalog: Catalog) -> Mask:
        """Returns where the filter is true, bool (R,), read-only.

        Raises:
            InvalidInput: INVALID_FILTER.
        """
        key = (text, catalog.version)
        with self._lock:
            if (mask_R := self._masks.get(key)) is not None:
                self._masks.move_to_end(key)
                return mask_R
        mask_R = compile_mask(self._parser.parse(text), catalog)
        mask_R.flags.writeable = False
        with self._lock:
            self._masks[key] = mask_R
            if len(self._masks) > _CACHED_MASKS:
                self._masks.popitem(last=False)
        return mask_R


@dataclass(frozen=True, slots=True)
class Exclusions:
    """The rows that a request leaves out, by reason; and those it shows after all others."""

    seen: npt.NDArray[np.int32]
    excluded: npt.NDArray[np.int32]
    in_cart: npt.NDArray[np.int32]
    owned: npt.NDArray[np.int32]
    context: npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Eligibility:
    """What may be shown.

    Attributes:
        eligible_R: nothing speaks against the item, seen before or not.
        unfiltered_R: nothing does, but perhaps the filter expression.
        filter_R: the request's filter.
        policy_R: the placement's own filter.
        ruled_out_R: what merchandising rules leave out.
    """

    world: World
    eligible_R: Mask
    unfiltered_R: Mask
    filter_R: Mask | None
    available_R: Mask | None
    respects_stock: bool
    exclusions: Exclusions
    policy_R: Mask | None = None
    ruled_out_R: Mask | None = None

    def split_by_seen(self) -> tuple[Mask, Mask]:
        """Returns `eligible_R` without the seen items, and the seen items of it alone."""
        seen = self.exclusions.seen
        if not len(seen):
            return self.eligible_R, np.zeros_like(self.eligible_R)
        unseen_R, seen_R = self.eligible_R.copy(), np.zeros_like(self.eligible_R)
        unseen_R[seen] = False
        seen_R[seen] = self.eligible_R[seen]
        return unseen_R, seen_R

    def verdicts(self, row: int, *, scored: bool) -> list[Verdict]:
        """Returns all that speaks against a row; [PASSED] where nothing does."""
        world, exclusions = self.world, self.exclusions
        against = (
            (Verdict.WITHDRAWN, bool(world.withdrawn_R[row])),
            (Verdict.NOT_IN_CATALOG, not world.in_catalog_R[row] and not world.withdrawn_R[row]),
            (Verdict.OUT_OF_STOCK, self.respects_stock and not world.in_stock_R[row]),
            (Verdict.NOT_AVAILABLE_NOW, self.available_R is not None and not self.available_R[row]),
            (Verdict.EXCLUDED, row in exclusions.excluded),
            (Verdict.IN_CART, row in exclusions.in_cart),
            (Verdict.OWNED, row in exclusions.owned),
            (Verdict.CONTEXT_ITEM, row in exclusions.context),
            (
                Verdict.FILTER_EXPRESSION,
                any(mask_R is not None and not mask_R[row] for mask_R in (self.filter_R, self.policy_R)),
            ),
            (Verdict.RULE, self.ruled_out_R is not None and bool(self.ruled_out_R[row])),
            (Verdict.NO_SCORE, not scored),
            (Verdict.SEEN, row in exclusions.seen),
        )
        return [verdict for verdict, speaks in against if speaks] or [Verdict.PASSED]

    def counts(self, scored_R: Mask) -> list[tuple[Verdict, int]]:
        """Returns how many of the scored items meet each verdict; an item counts once, by the first."""
        world, left_R = self.world, scored_R.copy()
        counts: list[tuple[Verdict, int]] = []

        def take(verdict: Verdict, against_R: Mask) -> None:
            hit_R = left_R & against_R
            if count := int(np.count_nonzero(hit_R)):
                counts.append((verdict, count))
                left_R[hit_R] = False

        take(Verdict.WITHDRAWN, world.withdrawn_R)
        take(Verdict.NOT_IN_CATALOG, ~world.in_catalog_R)
        if self.respects_stock:
            take(Verdict.OUT_OF_STOCK, ~world.in_stock_R)
        if self.available_R is not None:
            take(Verdict.NOT_AVAILABLE_NOW, ~self.available_R)
        for verdict, rows in (
            (Verdict.EXCLUDED, self.exclusions.excluded),
            (Verdict.IN_CART, self.exclusions.in_cart),
            (Verdict.OWNED, self.exclusions.owned),
            (Verdict.CONTEXT_ITEM, self.exclusions.context),
            (Verdict.SEEN, self.exclusions.seen),
        ):
            against_R = np.zeros(world.size, dtype=np.bool_)
            against_R[rows] = True
            take(verdict, against_R)
        for mask_R in (self.filter_R, self.policy_R):
            if mask_R is not None:
                take(Verdict.FILTER_EXPRESSION, ~mask_R)
        if self.ruled_out_R is not None:
            take(Verdict.RULE, self.ruled_out_R)
        return [(Verdict.PASSED, int(np.count_nonzero(left_R))), *counts]


def judge(
    world: World,
    exclusions: Exclusions,
    *,
    filter_R: Mask | None,
    respects_stock: bool,
    now: float,
    policy_R: Mask | None = None,
    ruled_out_R: Mask | None = None,
) -> Eligibility:
    """Returns what may be shown at `now`, seconds since 1970."""
    unfiltered_R = world.showable_R & world.in_stock_R if respects_stock else world.showable_R.copy()
    available_R = world.available_R(now)
    if available_R is not None:
        unfiltered_R &= available_R
    for rows in (exclusions.excluded, exclusions.in_cart, exclusions.owned, exclusions.context):
        unfiltered_R[rows] = False
    if policy_R is not None:
        unfiltered_R &= policy_R
    if ruled_out_R is not None:
        unfiltered_R &= ~ruled_out_R
    eligible_R = unfiltered_R if filter_R is None else unfiltered_R & filter_R
    return Eligibility(
        world,
        eligible_R,
        unfiltered_R,
        filter_R,
        available_R,
        respects_stock,
        exclusions,
        policy_R,
        ruled_out_R,
    )


def rows_of(world: World, item_ids: Iterable[str]) -> npt.NDArray[np.int32]:
    """Returns the rows of the items that this world knows, int32."""
    row_of = world.index.row_of
    rows = [row for item_id in item_ids if (row := row_of(item_id)) is not None and row < world.size]
    return np.array(rows, dtype=np.int32)


def rows_within(world: World, rows: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """Returns the rows that this world speaks of: a history may name newer ones."""
    return rows[rows < world.size]


def shown_rows(world: World, shown_digests: npt.NDArray[np.uint32]) -> npt.NDArray[np.int32]:
    """Returns the rows whose digests, low 32 bits, were on earlier pages."""
    if not len(shown_digests):
        return _NO_ROWS
    low_R = world.index.digests(world.size).astype(np.uint32)
    return np.flatnonzero(np.isin(low_R, shown_digests)).astype(np.int32)


def names(verdicts: Sequence[Verdict]) -> str:
    """Returns the verdicts for a log line or a finding."""
    return ", ".join(verdict.name.lower().replace("_", " ") for verdict in verdicts)
