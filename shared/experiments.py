"""Who sees which variant of an experiment: computed anywhere, without a call. Pure.

How to compute it in any language, for a user key of 16 bytes:

    point(purpose) = (BLAKE2b_8(purpose || 0x00 || salt || 0x00 || user_key) >> 11) / 2**53

where BLAKE2b_8 is BLAKE2b (RFC 7693) with a digest of 8 bytes and no key, read as an unsigned big-endian
integer; `purpose` and `salt` are UTF-8. (A digest of 8 bytes is not the beginning of a longer one: the length
is part of what BLAKE2b hashes.) Shifting leaves the 53 bits that a double holds, so that every language gets
the same number in [0, 1).

    takes part  iff  point("traffic") < traffic_fraction
    variant     =    the first whose running sum of weights, in order, is > point("variant") * sum of weights,
                     or the last where rounding leaves none

The two points are independent. So a larger `traffic_fraction` under the same salt adds people and moves
nobody, and experiments of different salts are independent of each other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

_TRAFFIC = "traffic"
_VARIANT = "variant"


@dataclass(frozen=True, slots=True)
class VariantShare:
    """One of the things compared.

    Attributes:
        variant_id: within the experiment.
        weight: its share relative to the others, finite, above 0.
        serving_config: what its people are served with.
    """

    variant_id: str
    weight: float
    serving_config: str


@dataclass(frozen=True, slots=True)
class Split:
    """How an experiment divides people.

    Attributes:
        experiment_id: the experiment.
        salt: what the hash is salted with; the experiment's id unless it says otherwise.
        traffic_fraction: the share of people who take part, in (0, 1].
        variants: at least one, the control first.
    """

    experiment_id: str
    salt: str
    traffic_fraction: float
    variants: Sequence[VariantShare]


@dataclass(frozen=True, slots=True)
class Assignment:
    """What one person gets.

    Attributes:
        label: goes into `variant` of the attribution token; how events find back to the experiment.
        serving_config: what to serve with.
    """

    experiment_id: str
    variant_id: str
    serving_config: str

    @property
    def label(self) -> str:
        """Returns `experiment_id/variant_id`."""
        return variant_label(self.experiment_id, self.variant_id)


def assign(user_key: bytes, split: Split) -> Assignment | None:
    """Returns the variant of a person, always the same one; None for those who do not take part."""
    if point(_TRAFFIC, split.salt, user_key) >= split.traffic_fraction:
        return None
    target = point(_VARIANT, split.salt, user_key) * _total_weight(split.variants)
    running = 0.0
    for variant in split.variants:
        running += variant.weight
        if running > target:
            break
    return Assignment(split.experiment_id, variant.variant_id, variant.serving_config)


def point(purpose: str, salt: str, user_key: bytes) -> float:
    """Returns the point in [0, 1) on which a user key falls; uniform over keys."""
    hashed = hashlib.blake2b(b"\x00".join((purpose.encode(), salt.encode(), user_key)), digest_size=8)
    return (int.from_bytes(hashed.digest(), "big") >> 11) / (1 << 53)


def variant_label(experiment_id: str, variant_id: str) -> str:
    """Returns what tokens and events carry as their variant."""
    return f"{experiment_id}/{variant_id}"


def _total_weight(variants: Sequence[VariantShare]) -> float:
    # Summed in the order of the running sum, or rounding could leave the last variant below the total.
    total = 0.0
    for variant in variants:
        total += variant.weight
    return total
