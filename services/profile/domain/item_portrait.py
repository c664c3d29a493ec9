"""What is understood of an item."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from services.profile.domain.item_figures import Neighbour
from services.profile.domain.portrait import Estimate


@dataclass(frozen=True, slots=True)
class Vector:
    """A vector, the model that made it and its version."""

    values: Sequence[float]
    model: str
    version: str


@dataclass(frozen=True, slots=True)
class ItemPortrait:
    """All that is understood about one item; the fields are the contract's."""

    item_id: str
    text_vector: Vector | None
    image_vector: Vector | None
    fused_vector: Vector | None
    popularity: Estimate
    conversion_rate: Estimate
    price_percentile: Estimate
    rating: Estimate
    return_rate: Estimate
    co_purchased: Sequence[Neighbour]
    similar: Sequence[Neighbour]
    update_us: int
