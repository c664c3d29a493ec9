"""Where candidates come from."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum


class Source(IntEnum):
    """A source; numbered as `CandidateSource` in the contract."""

    SEQUENCE = 1
    COOCCURRENCE = 2
    CONTENT = 3
    BUY_AGAIN = 4
    TRENDING = 5
    NEW_ITEMS = 6
    POPULAR_IN_SEGMENT = 7
    POPULAR = 8
    COSINE = 9
    RULE = 10


DEFAULT_CANDIDATE_LIMIT = 1_000


@dataclass(frozen=True, slots=True)
class SourceWeight:
    """How much a source counts in a weighted sum.

    Attributes:
        weight: in [0, 1000].
        candidate_limit: the most candidates taken from it.
    """

    source: Source
    weight: float
    candidate_limit: int = DEFAULT_CANDIDATE_LIMIT
