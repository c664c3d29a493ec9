"""The table of items that features need, as of a moment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from services.trainer.pipeline.dataset import EventColumns
from shared.bundle.ranker_features import MAX_GROUPS, ItemTable
from shared.event_kinds import INTEREST_KINDS, EventKind

_DAY = 86_400 * 1_000_000
_HALF_LIFE_DAYS = 30.0
# Interest shown that the mean rate of the shop stands in for, in an item of few events.
_PRIOR_EVENTS = 20.0


def item_table(
    events: EventColumns,
    attributes_of: Mapping[str, Sequence[str]],
    price_of: Mapping[str, int],
    vocabulary: Sequence[str],
    before: int | None = None,
) -> ItemTable:
    """Returns the table of a version's items.

    Args:
        before: only events up to this moment count, microseconds since 1970; by default all do.
        vocabulary: item ids in index order.
    """
    index_of = {item_id: index for index, item_id in enumerate(vocabulary)}
    index_V = np.array([index_of.get(item_id, -1) for item_id in events.item_ids], np.int64)
    item_E = index_V[events.item_E] if len(events) else np.empty(0, np.int64)
    keep_E = (item_E >= 0) & np.isin(events.kind_E, [int(kind) for kind in INTEREST_KINDS])
    if before is not None:
        keep_E &= events.time_E <= before
    item_E, kind_E, time_E = item_E[keep_E], events.kind_E[keep_E], events.time_E[keep_E]
    count = len(vocabulary)
    now = int(time_E.max()) if len(time_E) else 0

    def counted(mask_E: npt.NDArray[np.bool_], weight_E: npt.NDArray[np.float64] | None = None) -> np.ndarray:
        weights = None if weight_E is None else weight_E[mask_E]
        return np.bincount(item_E[mask_E], weights, minlength=count).astype(np.float64)

    everything_E = np.ones(len(item_E), bool)
    decayed_I = counted(everything_E, 0.5 ** ((now - time_E) / (_HALF_LIFE_DAYS * _DAY)))
    total_I = counted(everything_E)
    cart_I, bought_I = counted(kind_E == EventKind.ADD_TO_CART), counted(kind_E == EventKind.PURCHASE)
    week_I, month_I = counted(time_E > now - 7 * _DAY), counted(time_E > now - 28 * _DAY)

    def rate(part_I: np.ndarray) -> np.ndarray:
        mean = (part_I.sum() + 1.0) / (total_I.sum() + 10.0)
        return np.asarray(np.log((part_I + _PRIOR_EVENTS * mean) / (total_I + _PRIOR_EVENTS)))

    price_I = np.array([price_of.get(item_id, 0) for item_id in vocabulary], np.float64)
    known = np.flatnonzero(price_I > 0)
    percentile_I = np.full(count, 0.5)
    if len(known) > 1:
        # Equal prices have an equal place.
        _, place_K, times = np.unique(price_I[known], return_inverse=True, return_counts=True)
        middle = np.cumsum(times) - (times + 1) / 2
        percentile_I[known] = middle[place_K] / (len(known) - 1)
    features_IS = np.stack(
        [
            np.log((decayed_I + 0.5) / (decayed_I.mean() + 0.5)) if count else decayed_I,
            rate(cart_I),
            rate(bought_I),
            np.log((week_I + 1.0) / (month_I / 4 + 1.0)),
            percentile_I,
        ],
        axis=1,
    ).astype(np.float32)
    first_I = np.full(count, now, np.int64)
    np.minimum.at(first_I, item_E, time_E)
    return ItemTable.of(
        features_IS,
        _groups(vocabulary, attributes_of, "category:"),
        _groups(vocabulary, attributes_of, "brand:"),
        first_I // 1_000_000,
    )


def _groups(
    vocabulary: Sequence[str], attributes_of: Mapping[str, Sequence[str]], prefix: str
) -> npt.NDArray[np.int32]:
    """Returns the number of each item's value with a prefix, the longest of several, -1 for none."""
    number_of: dict[str, int] = {}
    group_I = np.full(len(vocabulary), -1, np.int32)
    for index, item_id in enumerate(vocabulary):
        values = [value for value in attributes_of.get(item_id, ()) if value.startswith(prefix)]
        if values and len(number_of) < MAX_GROUPS:
            group_I[index] = number_of.setdefault(max(values, key=len), len(number_of))
    return group_I
