"""What the ranker knows of a candidate. The one implementation of training and serving.

C = candidates, F = features, I = items, H = events of the history, S = features of an item alone.
Everything is there at serving: the first stage's scores, the shopper's newest events, and a table of items
that travels in the bundle, so that nothing is looked up that training did not see.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shared.event_kinds import EventKind

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]

STATIC_FEATURES = ("log_popularity", "cart_rate", "purchase_rate", "trend", "price_percentile")
"""Columns of `ItemTable.features_IS`."""

FEATURES = (
    "score",
    "gap_to_best",
    "log_rank",
    "log_cooccurrence",
    "cosine_to_newest",
    *STATIC_FEATURES,
    "log_age",
    "price_above_own",
    "price_distance",
    "category_affinity",
    "brand_affinity",
    "log_item_events",
    "log_since_item",
    "log_since_category",
    "log_history_length",
    "log_since_newest",
    "newest_is_cart",
    "newest_is_purchase",
)
"""Columns of `feature_matrix`; a ranker names those that it was trained with."""

MAX_EVENTS = 50
"""The newest events of a shopper that features are made of."""

MAX_GROUPS = 1 << 16
"""Categories, and brands, that a table may number."""

# Seconds: what lies further back, or never was, is alike.
_NEVER_SECONDS = 180 * 86_400.0
_DECAY = 0.9
# What an event says of a taste, beside a view.
_KIND_WEIGHT = np.ones(max(EventKind) + 2, np.float32)
_KIND_WEIGHT[EventKind.ADD_TO_CART] = 2.0
_KIND_WEIGHT[EventKind.PURCHASE] = 3.0


@dataclass(frozen=True, slots=True, eq=False)
class ItemTable:
    """Items as the ranker knows them, as of the newest event that training read.

    Attributes:
        features_IS: STATIC_FEATURES, float32: the log of popularity over its mean; the log of cart additions, and
            of purchases, over interest shown, smoothed; the log of the newest week over the weeks before; the place
            of the price among the catalogue's, in [0, 1], 0.5 where unknown.
        category_I, brand_I: numbers of the most specific category and of the brand, int32, -1 for none.
        first_seen_I: first event, Unix seconds, int64.
    """

    features_IS: Float32
    category_I: npt.NDArray[np.int32]
    brand_I: npt.NDArray[np.int32]
    first_seen_I: Int64
    category_count: int
    brand_count: int

    @classmethod
    def of(
        cls,
        features_IS: Float32,
        category_I: npt.NDArray[np.int32],
        brand_I: npt.NDArray[np.int32],
        first_seen_I: Int64,
    ) -> ItemTable:
        """Returns the table, with its groups counted."""
        categories, brands = int(category_I.max(initial=-1)) + 1, int(brand_I.max(initial=-1)) + 1
        return cls(features_IS, category_I, brand_I, first_seen_I, categories, brands)


@dataclass(frozen=True, slots=True, eq=False)
class Taste:
    """What the newest events of a shopper say, made once for each history.

    Attributes:
        indices_H: items, oldest first, int64.
        times_H: Unix seconds, float64, ascending.
        category_share_G, brand_share_B: weight of each group in the history; one entry more, 0, for none.
        category_time_G: newest event of each category, Unix seconds, -inf for never; one entry more likewise.
        price: weighted mean of price percentiles.
        newest_kind: of the newest event, 0 for none.
        newest_time: Unix seconds, -inf for never.
    """

    indices_H: Int64
    times_H: npt.NDArray[np.float64]
    category_share_G: Float32
    brand_share_B: Float32
    category_time_G: npt.NDArray[np.float64]
    price: float
    newest_kind: int
    newest_time: float


def taste_of(
    items: ItemTable, indices_H: Int64, kinds_H: npt.NDArray[np.integer], times_H: npt.NDArray[np.float64]
) -> Taste:
    """Returns what a history says.

    Args:
        indices_H: items that the table knows, oldest first, runs of one item taken together.
        kinds_H: EventKind.
        times_H: Unix seconds, ascending.
    """
    indices_H, kinds_H, times_H = indices_H[-MAX_EVENTS:], kinds_H[-MAX_EVENTS:], times_H[-MAX_EVENTS:]
    count = len(indices_H)
    category_time_G = np.full(items.category_count + 1, -np.inf)
    if not count:
        return Taste(
            indices_H,
            times_H,
            np.zeros(items.category_count + 1, np.float32),
            np.zeros(items.brand_count + 1, np.float32),
            category_time_G,
            0.5,
            0,
            -np.inf,
        )
    weight_H = _KIND_WEIGHT.take(kinds_H, mode="clip") * np.float32(_DECAY) ** np.arange(count - 1, -1, -1)
    weight_H /= weight_H.sum()
    category_H, brand_H = items.category_I[indices_H], items.brand_I[indices_H]
    # Group -1 writes to the entry more, which is blanked.
    category_share_G = np.bincount(
        np.where(category_H < 0, items.category_count, category_H), weight_H, items.category_count + 1
    ).astype(np.float32)
    brand_share_B = np.bincount(
        np.where(brand_H < 0, items.brand_count, brand_H), weight_H, items.brand_count + 1
    ).astype(np.float32)
    category_share_G[-1] = brand_share_B[-1] = 0
    np.maximum.at(category_time_G, category_H, times_H)
    category_time_G[-1] = -np.inf
    price = float(weight_H @ items.features_IS[indices_H, STATIC_FEATURES.index("price_percentile")])
    return Taste(
        indices_H,
        times_H,
        category_share_G,
        brand_share_B,
        category_time_G,
        price,
        int(kinds_H[-1]),
        float(times_H[-1]),
    )


def feature_matrix(
    items: ItemTable,
    taste: Taste,
    now: float,
    candidates_C: Int64,
    score_C: Float32,
    best_score: float,
    rank_C: npt.NDArray[np.integer],
    cooccurrence_C: Float32,
    cosine_C: Float32,
) -> Float32:
    """Returns the features of candidates, (C, F), float32, in the order of FEATURES.

    Args:
        now: Unix seconds.
        score_C: the first stage's.
        best_score: the highest among all that may be shown.
        rank_C: place by the first stage among all that may be shown, from 1.
        cooccurrence_C: damped counts, log(1 + scale c).
        cosine_C: of the item's vector with that of the newest event; 0 without one.
    """
    found_CF = np.empty((len(candidates_C), len(FEATURES)), np.float32)
    found_CF[:, 0] = score_C
    found_CF[:, 1] = np.float32(best_score) - score_C
    found_CF[:, 2] = rank_C
    found_CF[:, 3] = cooccurrence_C
    found_CF[:, 4] = cosine_C
    found_CF[:, 5:10] = items.features_IS[candidates_C]
    # Log-transformed below, all at once: 10 to 13 and the rank.
    found_CF[:, 10] = _seconds_since(items.first_seen_I[candidates_C], now)
    found_CF[:, 10] *= np.float32(1 / 3600)
    np.subtract(found_CF[:, 9], np.float32(taste.price), out=found_CF[:, 11])
    np.abs(found_CF[:, 11], out=found_CF[:, 12])
    category_C = items.category_I[candidates_C]
    found_CF[:, 13] = taste.category_share_G[category_C]
    found_CF[:, 14] = taste.brand_share_B[items.brand_I[candidates_C]]
    if len(taste.indices_H):
        same_CH = candidates_C[:, None] == taste.indices_H
        found_CF[:, 15] = 0
        found_CF[:, 16] = _NEVER_SECONDS
        # Few candidates are in the history, mostly none: they alone pay.
        for place in same_CH.any(axis=1).nonzero()[0].tolist():
            times = taste.times_H[same_CH[place]]
            found_CF[place, 15] = len(times)
            found_CF[place, 16] = min(max(now - float(times[-1]), 0.0), _NEVER_SECONDS)
    else:
        found_CF[:, 15] = 0
        found_CF[:, 16] = _NEVER_SECONDS
    found_CF[:, 17] = _seconds_since(taste.category_time_G, now)[category_C]
    found_CF[:, 18] = len(taste.indices_H)
    found_CF[:, 19] = min(max(now - taste.newest_time, 0.0), _NEVER_SECONDS)
    found_CF[:, 20] = taste.newest_kind == EventKind.ADD_TO_CART
    found_CF[:, 21] = taste.newest_kind == EventKind.PURCHASE
    # In place: 2, 10 and 15 to 19 are counts and times so far.
    np.log1p(found_CF[:, 15:20], out=found_CF[:, 15:20])
    np.log1p(found_CF[:, 10], out=found_CF[:, 10])
    np.log(found_CF[:, 2], out=found_CF[:, 2])
    return found_CF


def _seconds_since(times: npt.NDArray[np.number], now: float) -> Float32:
    # Both bounds apart: `np.clip` takes longer than all else here.
    since = now - times
    np.maximum(since, 0.0, out=since)
    np.minimum(since, _NEVER_SECONDS, out=since)
    return since.astype(np.float32)
