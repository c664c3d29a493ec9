"""Portraits of items: what the catalogue says, what shoppers did, what it is like.

All items are looked at together, in the background, when somebody asks and what is known is too old: an item
stands among others, and alone says little.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from services.profile.domain.item_figures import (
    NO_COUNTS,
    Baskets,
    ItemCounts,
    ShopMeans,
    conversion_rate,
    rating,
    return_rate,
)
from services.profile.domain.item_portrait import ItemPortrait
from services.profile.domain.portrait import Estimate
from services.profile.ports import CatalogueStore, ItemFigures
from services.profile.use_cases.catalogue import Catalogue
from services.profile.use_cases.item_vectors import ItemVectors
from shared.errors import NotFound, Unavailable

FIRST_ANSWER_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class _Shop:
    """All items at one moment."""

    place_of: dict[str, int]
    categories: Sequence[str]
    told_ratings: Sequence[tuple[int, float] | None]
    counts: dict[str, ItemCounts]
    baskets: Baskets
    means: ShopMeans
    update_us: int


class ItemPortraits:
    """Thread-safe.

    Args:
        max_age_seconds: what is known of all items is computed anew when it is older.
        clock_us: microseconds since 1970.
    """

    def __init__(
        self,
        store: CatalogueStore,
        catalogue: Catalogue,
        figures: ItemFigures,
        vectors: ItemVectors,
        max_age_seconds: float,
        clock_us: Callable[[], int],
    ) -> None:
        self._store = store
        self._catalogue = catalogue
        self._figures = figures
        self._vectors = vectors
        self._max_age_us = int(max_age_seconds * 1e6)
        self._clock_us = clock_us
        self._lock = threading.Lock()
        self._shop: _Shop | None = None
        self._computed = threading.Condition(self._lock)
        self._computing = False
        self._problem: Unavailable | None = None

    def portrait(self, item_id: str, timeout_seconds: float) -> ItemPortrait:
        """Returns an item's portrait; a new item is known by the next computation, and one is begun.

        Raises:
            NotFound: no item has this id, or it is deleted.
            Unavailable: all items are being looked at for the first time; or the database does not answer.
        """
        if not self._catalogue.has(item_id):
            raise NotFound(
                "ITEM_NOT_FOUND", "No item has this id; write it with UpsertItems.", {"itemId": item_id}
            )
        shop = self._current(item_id, timeout_seconds)
        place = shop.place_of.get(item_id)
        counts = shop.counts.get(item_id, NO_COUNTS)
        facts = self._catalogue.facts(item_id)
        category = facts.category_path[0] if facts.category_path else ""
        self._vectors.wait_for(item_id, min(timeout_seconds, FIRST_ANSWER_SECONDS))
        content = self._vectors.content(item_id)
        text = picture = fused = None
        if content is not None:
            text, picture, fused = self._vectors.vectors(*content)
        return ItemPortrait(
            item_id,
            text,
            picture,
            fused,
            Estimate(counts.decayed_interest, counts.events),
            conversion_rate(counts, category, shop.means),
            Estimate(0.5, 0) if facts.price_level is None else Estimate(facts.price_level, 1),
            rating(shop.told_ratings[place] if place is not None else None, counts, shop.means),
            return_rate(counts, shop.means),
            shop.baskets.neighbours(item_id),
            self._vectors.similar(item_id),
            shop.update_us,
        )

    def _current(self, item_id: str, timeout_seconds: float) -> _Shop:
        with self._lock:
            shop = self._shop
            stale = shop is None or self._clock_us() - shop.update_us > self._max_age_us
            missing = shop is None or item_id not in shop.place_of
            if (stale or missing) and not self._computing:
                self._computing = True
                self._problem = None
                threading.Thread(target=self._compute, name="item-portraits", daemon=True).start()
            if missing:
                self._computed.wait_for(
                    lambda: not self._computing, min(timeout_seconds, FIRST_ANSWER_SECONDS)
                )
                shop = self._shop
            if shop is None:
                raise self._problem or Unavailable(
                    "CATALOGUE_LOADING", "All items are being looked at; retry.", retry_after_seconds=2.0
                )
            return shop

    def _compute(self) -> None:
        try:
            shop = self._look()
            with self._lock:
                self._shop = shop
        except Unavailable as error:
            with self._lock:
                self._problem = error
        finally:
            with self._lock:
                self._computing = False
                self._computed.notify_all()

    def _look(self) -> _Shop:
        now_us = self._clock_us()
        items = [
            stored.item for chunk in self._store.load() for stored in chunk.items if not stored.item.deleted
        ]
        items.sort(key=lambda item: item.item_id)
        counts, baskets = self._figures.read(now_us)
        categories = [item.category_path[0] if item.category_path else "" for item in items]
        told: list[tuple[int, float] | None] = [
            (item.rating_count, item.rating_mean or 0.0) if item.rating_count else None for item in items
        ]
        of_log = [(c.rating_count, c.rating_sum / c.rating_count) for c in counts.values() if c.rating_count]
        means = ShopMeans.of(
            [
                (category, counts.get(item.item_id, NO_COUNTS))
                for item, category in zip(items, categories, strict=True)
            ],
            [pair for pair in told if pair] or of_log,
        )
        return _Shop(
            {item.item_id: place for place, item in enumerate(items)},
            categories,
            told,
            counts,
            baskets,
            means,
            now_us,
        )
