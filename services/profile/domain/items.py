"""The catalogue's items, and what writes to them mean. Pure."""

from __future__ import annotations

import bisect
import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

MAX_BATCH_ROWS = 1000
MAX_CLOCK_SKEW_US = 5 * 60 * 1_000_000


class Field(enum.IntEnum):
    """The fields that have a time of their own, by their number in the contract's `Item`.

    Both kinds of image share one; DELETED has no number in the contract.
    """

    TITLE = 2
    DESCRIPTION = 3
    BRAND = 4
    CATEGORY_PATH = 5
    ATTRIBUTES = 6
    PRICE_MICROS = 7
    LIST_PRICE_MICROS = 8
    CURRENCY_CODE = 9
    STOCK_QUANTITY = 10
    PRIMARY_ITEM_ID = 11
    IMAGE = 12
    TAGS = 14
    AVAILABLE_FROM = 15
    AVAILABLE_UNTIL = 16
    MARGIN_MICROS = 17
    LANGUAGE_CODE = 18
    RATING_COUNT = 19
    RATING_MEAN = 20
    WITHDRAWN = 21
    DELETED = 22


ALL_FIELDS = frozenset(Field)


@dataclass(frozen=True, slots=True)
class Attribute:
    """A typed attribute; the type of `value` is its type."""

    key: str
    value: str | float | bool


@dataclass(frozen=True, slots=True)
class Item:
    """An item of the catalogue; None and empty texts stand for unknown.

    Attributes:
        price_micros, list_price_micros, margin_micros: millionths of the unit of `currency_code`.
        available_from_us, available_until_us, update_time_us: microseconds since 1970, UTC.
        placeholder: named by events or inventory, never described.
        revision: counts writes, from 1; 0 before the first.
    """

    item_id: str
    title: str = ""
    description: str = ""
    brand: str = ""
    category_path: tuple[str, ...] = ()
    attributes: tuple[Attribute, ...] = ()
    price_micros: int | None = None
    list_price_micros: int | None = None
    currency_code: str = ""
    stock_quantity: int | None = None
    primary_item_id: str = ""
    image_uri: str = ""
    image_bytes: bytes = b""
    tags: tuple[str, ...] = ()
    available_from_us: int | None = None
    available_until_us: int | None = None
    margin_micros: int | None = None
    language_code: str = ""
    rating_count: int | None = None
    rating_mean: float | None = None
    withdrawn: bool = False
    placeholder: bool = False
    deleted: bool = False
    update_time_us: int = 0
    revision: int = 0


@dataclass(frozen=True, slots=True)
class ItemWrite:
    """New values of some fields of one item.

    Attributes:
        row: the index of the row in its request.
        item: carries the values.
        fields: which of them are written.
        write_time_us: decides, field by field, which write is newer.
        describes: whether the item is described by it, not merely counted or priced.
        may_create: whether it may create the item.
        if_revision: the revision that must be current, or None.
    """

    row: int
    item: Item
    fields: frozenset[Field]
    write_time_us: int
    describes: bool = True
    may_create: bool = True
    if_revision: int | None = None


class WriteStatus(enum.IntEnum):
    """What became of a write; the numbers are the contract's `ItemWriteStatus`."""

    STORED = 1
    SUPERSEDED = 2
    REJECTED = 3
    NOT_FOUND = 4
    ETAG_MISMATCH = 5


@dataclass(frozen=True, slots=True)
class WriteResult:
    """What became of one write, and the item's revision after it (0 where there is none)."""

    row: int
    item_id: str
    status: WriteStatus
    revision: int = 0


@dataclass(frozen=True, slots=True)
class ItemFilter:
    """Which items; all conditions must hold, empty ones do."""

    category_path_prefix: tuple[str, ...] = ()
    brands: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    primary_item_id: str = ""
    in_stock_only: bool = False
    min_price_micros: int | None = None
    max_price_micros: int | None = None
    currency_code: str = ""
    exclude_withdrawn: bool = False
    exclude_placeholders: bool = False


def rounds_of_distinct_items(writes: Sequence[ItemWrite]) -> list[list[ItemWrite]]:
    """Returns the writes in rounds that name no item twice and keep each item's order."""
    rounds: list[list[ItemWrite]] = []
    seen: dict[str, int] = {}
    for write in writes:
        nth = seen.get(write.item.item_id, 0)
        seen[write.item.item_id] = nth + 1
        if nth == len(rounds):
            rounds.append([])
        rounds[nth].append(write)
    return rounds


@dataclass(frozen=True, slots=True)
class PriceLevels:
    """Where a price lies among the catalogue's prices of the same top category and currency."""

    prices_of_shelf: dict[tuple[str, str], list[int]] = field(default_factory=dict)

    @classmethod
    def of(cls, priced: Iterable[tuple[str, str, int]]) -> PriceLevels:
        """Returns the levels of (top category, currency, price in micros)."""
        shelves: dict[tuple[str, str], list[int]] = {}
        for category, currency, price in priced:
            shelves.setdefault((category, currency), []).append(price)
        for prices in shelves.values():
            prices.sort()
        return cls(shelves)

    def level(self, category: str, currency: str, price_micros: int) -> float | None:
        """Returns the mid-rank of a price, in [0, 1]; None where the shelf holds fewer than two prices."""
        prices = self.prices_of_shelf.get((category, currency), ())
        if len(prices) < 2:
            return None
        below = bisect.bisect_left(prices, price_micros)
        not_above = bisect.bisect_right(prices, price_micros)
        return (below + not_above) / (2 * len(prices))
