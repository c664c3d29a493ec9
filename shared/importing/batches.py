"""Events and items on their way into the suite: columns, until the last moment."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

EVENTS_PER_BATCH = 500
LINES_PER_BATCH = 4_000
UNKNOWN_PRICE = -1


@dataclass(frozen=True, slots=True)
class EventBatch:
    """E events with L lines in all; the lines of event e are `offsets[e]:offsets[e + 1]`.

    Attributes:
        event_ids: E ids that make a second import of the same rows harmless.
        user_ids: E raw ids.
        kinds: (E,) uint8, EventKind.
        occurred_at_us: (E,) int64, microseconds since 1970 UTC.
        offsets: (E + 1,) int64.
        item_ids: L ids.
        quantities: (L,) float64, above 0.
        price_micros: (L,) int64, unit price in millionths; -1 where unknown.
        currency_codes: L codes, "" where there is no price.
        values: (E,) float64, the rating; NaN for events without one.
        session_ids, order_ids, queries, attribution_tokens, texts: E texts each, "" where unknown.
        row_numbers: (E,) int64, the row of the file, from 1, that an event (or its first line) came from;
            empty when it came from no file.
    """

    event_ids: Sequence[str]
    user_ids: Sequence[str]
    kinds: NDArray[np.uint8]
    occurred_at_us: NDArray[np.int64]
    offsets: NDArray[np.int64]
    item_ids: Sequence[str]
    quantities: NDArray[np.float64]
    price_micros: NDArray[np.int64]
    currency_codes: Sequence[str]
    values: NDArray[np.float64]
    session_ids: Sequence[str]
    order_ids: Sequence[str]
    queries: Sequence[str]
    attribution_tokens: Sequence[str] = ()
    texts: Sequence[str] = ()
    row_numbers: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))

    def __post_init__(self) -> None:
        events, lines = len(self.event_ids), len(self.item_ids)
        assert self.offsets.shape == (events + 1,), "one offset an event, and the end"
        assert self.offsets[-1] == lines, "the last offset is the number of lines"
        assert len(self.user_ids) == len(self.kinds) == len(self.occurred_at_us) == events
        assert len(self.quantities) == len(self.price_micros) == len(self.currency_codes) == lines

    def __len__(self) -> int:
        return len(self.event_ids)

    def parts(self, events: int = EVENTS_PER_BATCH, lines: int = LINES_PER_BATCH) -> Iterator[EventBatch]:
        """Yields consecutive parts of at most so many events and lines; one event is never cut."""
        start = 0
        while start < len(self):
            by_lines = int(np.searchsorted(self.offsets, self.offsets[start] + lines, side="right")) - 1
            end = min(len(self), start + events, max(start + 1, by_lines))
            yield self.part(start, end)
            start = end

    def part(self, start: int, end: int) -> EventBatch:
        """Returns the events start..end - 1."""
        first, last = int(self.offsets[start]), int(self.offsets[end])
        return EventBatch(
            self.event_ids[start:end], self.user_ids[start:end], self.kinds[start:end],
            self.occurred_at_us[start:end], self.offsets[start : end + 1] - first, self.item_ids[first:last],
            self.quantities[first:last], self.price_micros[first:last], self.currency_codes[first:last],
            self.values[start:end], self.session_ids[start:end], self.order_ids[start:end],
            self.queries[start:end], self.attribution_tokens[start:end], self.texts[start:end],
            self.row_numbers[start:end],
        )  # fmt: skip


@dataclass(slots=True)
class ItemRecord:
    """What is known of one item; an empty field is unknown.

    `attributes` values are texts, numbers or flags. `created_at_us` is microseconds since 1970.
    """

    item_id: str
    title: str = ""
    description: str = ""
    brand: str = ""
    category_path: tuple[str, ...] = ()
    price_micros: int = UNKNOWN_PRICE
    currency_code: str = ""
    image_uri: str = ""
    created_at_us: int | None = None
    withdrawn: bool = False
    attributes: dict[str, str | float | bool] = field(default_factory=dict)

    def complete_with(self, other: ItemRecord) -> None:
        """Fills what is unknown here from `other`."""
        self.title = self.title or other.title
        self.description = self.description or other.description
        self.brand = self.brand or other.brand
        self.category_path = self.category_path or other.category_path
        if self.price_micros == UNKNOWN_PRICE:
            self.price_micros, self.currency_code = other.price_micros, other.currency_code
        self.image_uri = self.image_uri or other.image_uri
        self.created_at_us = self.created_at_us if self.created_at_us is not None else other.created_at_us
        self.attributes = {**other.attributes, **self.attributes}
