"""Responses and a first stage into features and labels, split by time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from services.trainer.ranker.first_stage import first_stage, unit_vectors
from services.trainer.ranker.responses import Responses
from shared.bundle import Bundle
from shared.bundle.history import History, mark_clean_events
from shared.bundle.ranker_features import FEATURES, ItemTable, feature_matrix, taste_of

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]

# What a shown item counts at most for those that were as good and not drawn.
MAX_WEIGHT = 5.0
# One person's share: their newest pages.
MAX_PAGES_OF_ONE = 200


@dataclass(frozen=True, slots=True, eq=False)
class Examples:
    """Impressions as the ranker sees them, by page, oldest page first.

    Attributes:
        features_NF: float32.
        labels_NT: float32, 0 or 1.
        position_N: from 1, int64.
        weight_N: clipped inverse propensity, float32.
        page_N, user_N: numbers, int64.
        time_N: of the page, microseconds, int64.
        item_N: index in the version's vocabulary, int64.
    """

    features_NF: Float32
    labels_NT: Float32
    position_N: Int64
    weight_N: Float32
    page_N: Int64
    user_N: Int64
    time_N: Int64
    item_N: Int64

    def __len__(self) -> int:
        return len(self.page_N)

    def where(self, keep_N: npt.NDArray[np.bool_]) -> Examples:
        """Returns some of the impressions."""
        return Examples(
            self.features_NF[keep_N], self.labels_NT[keep_N], self.position_N[keep_N], self.weight_N[keep_N],
            self.page_N[keep_N], self.user_N[keep_N], self.time_N[keep_N], self.item_N[keep_N],
        )  # fmt: skip

    def split(self, shares: tuple[float, float] = (0.6, 0.8)) -> tuple[Examples, Examples, Examples]:
        """Returns what is trained on, what stops and calibrates, what judges: each later than the one before."""
        pages = np.unique(self.page_N)
        first, second = (
            pages[min(int(share * len(pages)), len(pages) - 1)] if len(pages) else 0 for share in shares
        )
        return (
            self.where(self.page_N < first),
            self.where((self.page_N >= first) & (self.page_N < second)),
            self.where(self.page_N >= second),
        )


def make_examples(
    responses: Responses,
    bundle: Bundle,
    items: ItemTable,
    *,
    exclude_seen: bool,
    max_pages: int,
    check: Callable[[], None] = lambda: None,
) -> Examples:
    """Returns the examples of the newest pages, as serving with this version would have seen them.

    Args:
        bundle: trained on nothing that is later than the first page.
        items: of the version's vocabulary, as of its own newest event.
        exclude_seen: whether items of the history come after all others, where the rank is counted.
        check: called now and then; raises to stop.
    """
    index_V = np.array([_index(bundle, item_id) for item_id in responses.item_ids], np.int64)
    item_N = index_V[responses.item_N] if len(responses) else np.empty(0, np.int64)
    page_starts = np.flatnonzero(np.diff(responses.page_N, prepend=-1))
    page_ends = np.append(page_starts[1:], len(responses))
    few = _newest_of_each(responses.user_N[page_starts], MAX_PAGES_OF_ONE)
    page_starts, page_ends = page_starts[few], page_ends[few]
    newest = slice(max(0, len(page_starts) - max_pages), None)
    order_E = np.lexsort((responses.event_time_E, responses.event_user_E))
    user_E, time_E = responses.event_user_E[order_E], responses.event_time_E[order_E]
    kind_E, index_E = responses.event_kind_E[order_E], index_V[responses.event_item_E[order_E]]
    first_P = np.searchsorted(user_E, responses.user_N[page_starts], "left")
    end_P = np.searchsorted(user_E, responses.user_N[page_starts], "right")
    unit_ID = unit_vectors(bundle)
    features, kept = [], []
    bounds = np.stack([page_starts, page_ends, first_P, end_P], axis=1)[newest].tolist()
    for number, (start, end, first, after) in enumerate(bounds):
        if not number % 200:
            check()
        shown = np.arange(start, end)[item_N[start:end] >= 0]
        moment = int(responses.time_N[start])
        last = first + int(np.searchsorted(time_E[first:after], moment, "left"))
        known = np.flatnonzero(
            mark_clean_events(
                np.zeros(last - first, np.int32), index_E[first:last], kind_E[first:last].astype(np.int32)
            )
        )
        # Without an event there is no first stage to rank after: popularity serves.
        if not len(shown) or not len(known):
            continue
        places = first + known
        history = History(index_E[places], kind_E[places].astype(np.int32))
        found = first_stage(bundle, unit_ID, history)
        candidates_C = item_N[shown]
        competing_I = found.score_I
        if exclude_seen:
            competing_I = competing_I.copy()
            competing_I[history.indices_H] = -np.inf
        score_C = found.score_I[candidates_C]
        rank_C = 1 + (competing_I > score_C[:, None]).sum(axis=1)
        taste = taste_of(items, history.indices_H, history.kinds_H, time_E[places] / 1e6)
        best = max(float(competing_I.max()), float(score_C.max()))
        features.append(
            feature_matrix(
                items,
                taste,
                moment / 1e6,
                candidates_C,
                score_C,
                best,
                rank_C,
                found.cooccurrence_I[candidates_C],
                found.cosine_I[candidates_C],
            )
        )
        kept.append(shown)
    rows = np.concatenate(kept) if kept else np.empty(0, np.int64)
    features_NF = np.concatenate(features) if features else np.empty((0, len(FEATURES)), np.float32)
    weight_N = np.minimum(1 / responses.propensity_N[rows], MAX_WEIGHT)
    return Examples(
        features_NF,
        responses.labels_NT[rows].astype(np.float32),
        responses.position_N[rows],
        weight_N.astype(np.float32),
        responses.page_N[rows],
        responses.user_N[rows],
        responses.time_N[rows],
        item_N[rows],
    )


def _newest_of_each(user_P: Int64, most: int) -> Int64:
    """Returns which pages are among the newest `most` of their person, ascending."""
    order = np.lexsort((-np.arange(len(user_P)), user_P))
    starts = np.flatnonzero(np.diff(user_P[order], prepend=-1))
    place = np.arange(len(order)) - np.repeat(starts, np.diff(np.append(starts, len(order))))
    return np.sort(order[place < most])


def _index(bundle: Bundle, item_id: str) -> int:
    index = bundle.index_of(item_id)
    return -1 if index is None else index
