"""How alike two shoppers are. Pure: a function of two portraits and of what was touched."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from services.profile.domain.portrait import Estimate, Horizon, Interest, Portrait

MAX_SHARED_INTERESTS = 50


@dataclass(frozen=True, slots=True)
class Comparison:
    """How alike two shoppers are; every number is finite, and rests on the shopper of whom less is known.

    Attributes:
        embedding_similarity: cosine, in [-1, 1]; 0 where the vectors do not compare.
        interest_similarity: cosine of the lasting interests, in [0, 1].
        item_overlap: items that both touched among those that either did, in [0, 1].
        shared_interests: as the first and as the second has it, by falling product of the weights.
    """

    embedding_similarity: Estimate
    interest_similarity: Estimate
    item_overlap: Estimate
    shared_interests: Sequence[tuple[Interest, Interest]]


def compare(
    first: Portrait,
    second: Portrait,
    first_items: Collection[int],
    second_items: Collection[int],
    embeddings: tuple[Sequence[float], Sequence[float]] | None = None,
) -> Comparison:
    """Returns how alike two shoppers are; the order of the two changes nothing but the pairs' order.

    Args:
        first_items, second_items: distinct items that each touched, by any number that names them.
        embeddings: of one model version and one length, or None.
    """
    evidence = min(first.event_count, second.event_count)
    of_first, of_second = _by_name(first), _by_name(second)
    both = [(of_first[name], of_second[name]) for name in of_first.keys() & of_second.keys()]
    both.sort(
        key=lambda pair: (
            -pair[0].weight * pair[1].weight,
            pair[0].horizon,
            pair[0].facet,
            pair[0].attribute_key,
            pair[0].value,
        )
    )
    union = len(set(first_items) | set(second_items))
    overlap = len(set(first_items) & set(second_items)) / union if union else 0.0
    return Comparison(
        Estimate(_cosine(*embeddings) if embeddings else 0.0, evidence if embeddings else 0),
        Estimate(_interest_cosine(first, second), evidence),
        Estimate(overlap, evidence),
        both[:MAX_SHARED_INTERESTS],
    )


def _by_name(portrait: Portrait) -> dict[tuple[int, int, str, str], Interest]:
    return {(i.horizon, i.facet, i.attribute_key, i.value): i for i in portrait.interests}


def _interest_cosine(first: Portrait, second: Portrait) -> float:
    def weights(portrait: Portrait) -> dict[tuple[int, str, str], float]:
        return {
            (i.facet, i.attribute_key, i.value): i.weight
            for i in portrait.interests
            if i.horizon == Horizon.LONG_TERM
        }

    a, b = weights(first), weights(second)
    # fsum: exact, so that the order of the interests cannot show.
    product = math.fsum(a[name] * b[name] for name in a.keys() & b.keys())
    length = math.sqrt(math.fsum(w * w for w in a.values()) * math.fsum(w * w for w in b.values()))
    return min(1.0, product / length) if length > 0 else 0.0


def _cosine(a: Sequence[float], b: Sequence[float]) -> float:
    product = math.fsum(x * y for x, y in zip(a, b, strict=True))
    length = math.sqrt(math.fsum(x * x for x in a) * math.fsum(y * y for y in b))
    return max(-1.0, min(1.0, product / length)) if length > 0 else 0.0
