"""One model and one catalogue, joined: a request is answered from one `World` throughout."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from services.recommend.domain.catalog import Catalog, Mask
from services.recommend.domain.item_index import ItemIndex
from services.recommend.domain.serving_config import ServingConfig
from services.recommend.ports import CatalogSource, Model, Models, ModelSource


@dataclass(frozen=True, slots=True)
class World:
    """Everything that an answer is made of but the shopper. Immutable.

    Attributes:
        size: R, the rows that this world speaks of.
        in_catalog_R: the catalogue has the item, or has no say.
        withdrawn_R: withdrawn or deleted.
        in_stock_R: not sold out.
        showable_R: in_catalog_R and not withdrawn_R.
        unlearnt_rows: rows that the model does not know, int32, ascending; all of them without a model.
    """

    model: Model | None
    catalog: Catalog
    size: int
    in_catalog_R: Mask
    withdrawn_R: Mask
    in_stock_R: Mask
    showable_R: Mask
    unlearnt_rows: npt.NDArray[np.int32]
    _rows_are_indices: bool

    @property
    def index(self) -> ItemIndex:
        return self.catalog.index

    def knows(self, row: int) -> bool:
        """Returns whether the catalogue or the model knows the item."""
        if row in self.catalog.items:
            return True
        return self.model is not None and int(self.model.indices_of(np.array([row], np.int32))[0]) >= 0

    def by_row(self, values_I: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Returns the values of the model's items by row, (R,), -inf for items that it does not know."""
        if self._rows_are_indices and len(values_I) == self.size:
            return values_I
        values_R = np.full(self.size, -np.inf, dtype=np.float32)
        if self.model is not None:
            if self._rows_are_indices:
                values_R[: len(values_I)] = values_I
            else:
                values_R[self.model.rows_I] = values_I
        return values_R

    def available_R(self, now: float) -> Mask | None:
        """Returns where the item is for sale at `now` (seconds), (R,); None where no item has times."""
        rows = self.catalog.timed_rows
        if not len(rows):
            return None
        begins, ends = (
            self.catalog.numbers("available_from")[rows],
            self.catalog.numbers("available_until")[rows],
        )
        available_R = np.ones(self.size, dtype=np.bool_)
        # NaN compares false: no limit on that side.
        available_R[rows[(now < begins) | (now >= ends)]] = False
        return available_R


def join(model: Model | None, catalog: Catalog) -> World:
    """Returns the world of a model and a catalogue.

    Items that the catalogue does not describe are shown only where it has no say: while it is
    empty, for a shop that does not use it; or, of items that it has not spoken of yet, while its
    first snapshot is still arriving.
    """
    described_R, withdrawn_R = (
        catalog.flags("described"),
        catalog.flags("withdrawn") | catalog.flags("deleted"),
    )
    if catalog.described_count == 0:
        in_catalog_R = np.ones(catalog.size, dtype=np.bool_)
    elif catalog.complete:
        in_catalog_R = described_R
    else:
        in_catalog_R = np.ones(catalog.size, dtype=np.bool_)
    stock_R = catalog.numbers("stock")
    rows_are_indices = model is not None and bool(
        np.array_equal(model.rows_I, np.arange(model.item_count, dtype=np.int32))
    )
    unlearnt_R = np.ones(catalog.size, dtype=np.bool_)
    if model is not None:
        unlearnt_R[model.rows_I[: catalog.size] if rows_are_indices else model.rows_I] = False
    return World(
        model=model,
        catalog=catalog,
        size=catalog.size,
        in_catalog_R=in_catalog_R,
        withdrawn_R=withdrawn_R,
        in_stock_R=~(stock_R <= 0),
        showable_R=in_catalog_R & ~withdrawn_R,
        unlearnt_rows=np.flatnonzero(unlearnt_R).astype(np.int32),
        _rows_are_indices=rows_are_indices,
    )


class WorldHolder:
    """Joins the newest model and the newest catalogue, once for each pair."""

    def __init__(self, models: ModelSource, catalogs: CatalogSource, index: ItemIndex) -> None:
        self._models = models
        self._catalogs = catalogs
        self._index = index
        self._lock = threading.Lock()
        self._current: World | None = None

    def current(self) -> World:
        """Returns the newest world. Whoever holds it sees no change."""
        model, catalog, world = self._models.current(), self._catalogs.current, self._current
        # Without a model even items that only events name are candidates.
        stale = model is None and len(self._index) > catalog.size
        if world is not None and world.model is model and world.catalog is catalog and not stale:
            return world
        with self._lock:
            model, catalog = self._models.current(), self._catalogs.current
            needed = len(self._index) if model is None else int(model.rows_I.max(initial=-1)) + 1
            if catalog.size < needed:
                catalog = self._catalogs.publish()
            world = self._current
            if world is None or world.model is not model or world.catalog is not catalog:
                world = self._current = join(model, catalog)
            return world


class Worlds:
    """The newest world of each model that a serving config names; the service's own where that has none."""

    def __init__(self, models: Models, catalogs: CatalogSource, index: ItemIndex) -> None:
        self._models = models
        self._catalogs = catalogs
        self._index = index
        own = models.source("", "")
        assert own is not None
        self._own = WorldHolder(own, catalogs, index)
        self._others: dict[tuple[str, str], tuple[ModelSource, WorldHolder]] = {}

    def current(self, model: str = "", alias: str = "") -> World:
        """Returns the newest world of a model, the service's own where that one has no version in service."""
        if not model and not alias:
            return self._own.current()
        world = self.other(model, alias)
        return self._own.current() if world is None else world

    def other(self, model: str, alias: str) -> World | None:
        """Returns the newest world of a model; None where it has no version in service."""
        source = self._models.source(model, alias)
        if source is None or source.current() is None:
            return None
        held = self._others.get((model, alias))
        if held is None or held[0] is not source:
            held = self._others[model, alias] = (source, WorldHolder(source, self._catalogs, self._index))
        return held[1].current()

    def of(self, config: ServingConfig) -> World:
        """Returns the newest world that a config serves with."""
        return self.current(config.model, config.model_alias)
