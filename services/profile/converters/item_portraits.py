"""Portraits of items: domain to protobuf."""

from __future__ import annotations

from shopkeeper.profile.v1 import item_portrait_pb2, user_portrait_pb2

from services.profile.converters.profiles import estimate, timestamp
from services.profile.domain.item_figures import POPULARITY_HALF_LIFE_DAYS, Neighbour
from services.profile.domain.item_portrait import ItemPortrait, Vector


def item_portrait(portrait: ItemPortrait) -> item_portrait_pb2.ItemPortrait:
    """Returns the message of an item's portrait."""
    return item_portrait_pb2.ItemPortrait(
        item_id=portrait.item_id,
        text_vector=_embedding(portrait.text_vector),
        image_vector=_embedding(portrait.image_vector),
        fused_vector=_embedding(portrait.fused_vector),
        popularity=estimate(portrait.popularity),
        popularity_half_life_days=POPULARITY_HALF_LIFE_DAYS,
        conversion_rate=estimate(portrait.conversion_rate),
        price_percentile=estimate(portrait.price_percentile),
        rating=estimate(portrait.rating),
        return_rate=estimate(portrait.return_rate),
        co_purchased=[_neighbour(one) for one in portrait.co_purchased],
        similar=[_neighbour(one) for one in portrait.similar],
        update_time=timestamp(portrait.update_us),
    )


def _embedding(vector: Vector | None) -> user_portrait_pb2.Embedding | None:
    return None if vector is None else embedding(vector)


def embedding(vector: Vector) -> user_portrait_pb2.Embedding:
    """Returns the message of a vector."""
    return user_portrait_pb2.Embedding(values=vector.values, model=vector.model, model_version=vector.version)


def _neighbour(neighbour: Neighbour) -> item_portrait_pb2.ItemNeighbour:
    return item_portrait_pb2.ItemNeighbour(
        item_id=neighbour.item_id, score=neighbour.score, evidence_count=neighbour.evidence_count
    )
