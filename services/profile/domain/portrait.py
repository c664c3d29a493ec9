"""What is understood of a shopper; `portrait_fold` makes it of events. Every number says how sure it is."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

SHORT_TERM_HALF_LIFE_DAYS = 7.0
LONG_TERM_HALF_LIFE_DAYS = 90.0
MAX_INTERESTS = 20
PRIOR_EVENTS = 5.0
PATH_SEPARATOR = " > "
DAY_US = 86_400_000_000


class LifeCycleStage(enum.IntEnum):
    """The numbers are the contract's."""

    UNSPECIFIED = 0
    PROSPECT = 1
    NEW = 2
    ACTIVE = 3
    LOYAL = 4
    LAPSING = 5
    LOST = 6


class Facet(enum.IntEnum):
    """The numbers are the contract's `InterestFacet`."""

    CATEGORY = 1
    BRAND = 2
    PRICE_BAND = 3
    ATTRIBUTE = 4


class Horizon(enum.IntEnum):
    """The numbers are the contract's `InterestHorizon`."""

    SHORT_TERM = 1
    LONG_TERM = 2


HALF_LIFE_DAYS = {
    Horizon.SHORT_TERM: SHORT_TERM_HALF_LIFE_DAYS,
    Horizon.LONG_TERM: LONG_TERM_HALF_LIFE_DAYS,
}


@dataclass(frozen=True, slots=True)
class ItemFacts:
    """What the catalogue tells a portrait about an item.

    Attributes:
        category_path: top first; empty when unknown.
        price_level: position among the prices of the top category, in [0, 1], or None.
        attributes: key and value, distinct keys; what a taste may be about, so no measures.
        list_price_micros, currency_code: the price before any discount, or None.
        discount_share: of the items of the top category those that sell below their list price, in [0, 1].
        facets: what evidence for the item is evidence for: (facet, attribute key, values).
    """

    category_path: tuple[str, ...] = ()
    brand: str = ""
    price_level: float | None = None
    attributes: tuple[tuple[str, str], ...] = ()
    list_price_micros: int | None = None
    currency_code: str = ""
    discount_share: float = 0.0
    facets: tuple[tuple[Facet, str, tuple[str, ...]], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        facets: list[tuple[Facet, str, tuple[str, ...]]] = []
        if self.category_path:
            path = self.category_path
            ancestors = tuple(PATH_SEPARATOR.join(path[:depth]) for depth in range(1, len(path) + 1))
            facets.append((Facet.CATEGORY, "", ancestors))
        if self.brand:
            facets.append((Facet.BRAND, "", (self.brand,)))
        if self.price_level is not None:
            facets.append((Facet.PRICE_BAND, "", (str(min(5, 1 + int(5 * self.price_level))),)))
        facets.extend((Facet.ATTRIBUTE, key, (value,)) for key, value in self.attributes)
        object.__setattr__(self, "facets", tuple(facets))


UNKNOWN_ITEM = ItemFacts()
ItemLookup = Callable[[str], ItemFacts]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number and its evidence; at 0 events the value is a default."""

    value: float
    evidence_count: int = 0
    prior_events: float = PRIOR_EVENTS

    @property
    def confidence(self) -> float:
        """n / (n + k), in [0, 1)."""
        return self.evidence_count / (self.evidence_count + self.prior_events)


@dataclass(frozen=True, slots=True)
class KindActivity:
    """Distinct events of one kind, and when they happened (microseconds since 1970)."""

    kind: int
    count: int
    first_us: int
    last_us: int


@dataclass(frozen=True, slots=True)
class Spend:
    """Purchases less returns in one currency."""

    currency_code: str
    amount_micros: int
    order_count: int


@dataclass(frozen=True, slots=True)
class Rfm:
    """Recency, frequency, monetary value (Hughes, 1994). `spend` is by ascending currency.

    Quintiles are 1 to 5, 5 the best fifth of all shoppers; 0 where not known.
    """

    recency_days: Estimate
    order_count: int
    monetary_micros: int
    currency_code: str
    spend: tuple[Spend, ...]
    recency_quintile: int = 0
    frequency_quintile: int = 0
    monetary_quintile: int = 0


# A portrait has a hundred of these: named tuples cost a third of what frozen dataclasses do.
class Interest(NamedTuple):
    """A value of a facet, its share of the facet's decayed evidence in [0, 1], and that evidence.

    Attributes:
        attribute_key: empty unless the facet is ATTRIBUTE; shares are then among the values of one key.
    """

    horizon: Horizon
    facet: Facet
    value: str
    weight: float
    decayed_evidence: float
    evidence_count: int
    attribute_key: str = ""


@dataclass(frozen=True, slots=True)
class PurchasingPower:
    """Price levels overall and by top category; the median price paid in the main currency."""

    price_level: Estimate
    category_price_levels: tuple[tuple[str, Estimate], ...]
    typical_price_micros: int
    currency_code: str


class HourPreference(NamedTuple):
    """The share of events in one hour (UTC) of the day."""

    hour: int
    share: float
    evidence_count: int


class Preference(NamedTuple):
    """The share of events of one device or channel, by its number in the contract."""

    code: int
    share: float
    evidence_count: int


@dataclass(frozen=True, slots=True)
class Portrait:
    """All that is understood about a shopper. Every number is finite.

    Attributes:
        event_count: lines that the portrait rests on.
        first_us, last_us: microseconds since 1970; None without events.
    """

    event_count: int
    truncated: bool
    first_us: int | None
    last_us: int | None
    activity: tuple[KindActivity, ...]
    rfm: Rfm
    life_cycle_stage: LifeCycleStage
    interests: tuple[Interest, ...]
    purchasing_power: PurchasingPower
    preferred_hours: tuple[HourPreference, ...]
    satisfaction: Estimate
    purchase_interval_days: Estimate
    preferred_devices: tuple[Preference, ...] = ()
    preferred_channels: tuple[Preference, ...] = ()
    discount_sensitivity: Estimate = Estimate(0.0)


@dataclass(frozen=True, slots=True)
class Summary:
    """The few numbers that travel with every live profile."""

    event_count: int
    order_count: int
    first_us: int | None
    last_us: int | None
    price_level: Estimate
    life_cycle_stage: LifeCycleStage

    @classmethod
    def of(cls, portrait: Portrait) -> Summary:
        """Returns the summary that a portrait holds."""
        return cls(
            portrait.event_count,
            portrait.rfm.order_count,
            portrait.first_us,
            portrait.last_us,
            portrait.purchasing_power.price_level,
            portrait.life_cycle_stage,
        )
