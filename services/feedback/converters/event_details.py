"""Details of events to values of columns: what each kind must and may say, and within which ranges.

Values are checked by the range that must hold, so that a NaN, for which no comparison holds, is refused by
the same line.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable
from typing import Any

from shopkeeper.feedback.v1 import event_pb2

from services.feedback.converters.identities import is_plain_id
from services.feedback.domain.events import RowReason
from shared.errors import InvalidInput
from shared.identity import normalise_item_id

MAX_LINES = 500
MAX_TEXT = 20_000
MAX_QUANTITY = 1e6
MAX_PRICE_MICROS = 10**15
MAX_POSITION = 10_000
MAX_DWELL_SECONDS = 86_400.0


class Rejected(Exception):
    """A row that cannot be stored; the path is relative to the event."""

    def __init__(self, path: str, reason: RowReason, message: str) -> None:
        super().__init__(path)
        self.path = path
        self.reason = reason
        self.message = message


Product = tuple[str | None, float | None, int | None, str | None, float | None]
"""item_id, quantity, price_micros, currency_code, value."""
_NO_PRODUCT: Product = (None, None, None, None, None)


class DetailReader:
    """Reads the details of events, one at a time. What repeats within a request is derived once.

    What few rows have goes to `_row_sparse`, by the name of its column.
    """

    def __init__(self) -> None:
        self._item_id_of: dict[str, str] = {}
        self._currency_codes: set[str] = set()
        self._row_sparse: dict[str, Any] = {}

    # Values

    def _text(self, value: str, path: str, limit: int, *, required: bool = False) -> str:
        if not value:
            if required:
                raise Rejected(path, RowReason.REQUIRED, f"Required, 1 to {limit} characters.")
            return value
        if not value.isascii():
            # Bounded first: normalising a huge text costs time.
            if len(value) > 4 * limit:
                raise Rejected(path, RowReason.TOO_LONG, f"At most {limit} characters; shorten it.")
            value = unicodedata.normalize("NFC", value)
        if len(value) > limit:
            raise Rejected(path, RowReason.TOO_LONG, f"At most {limit} characters; shorten it.")
        refuse_nul(value, path)
        return value

    def _item_id(self, value: str, path: str) -> str:
        if is_plain_id(value):
            return value
        item_id = self._item_id_of.get(value)
        if item_id is None:
            if not value:
                raise Rejected(path, RowReason.REQUIRED, "Say which item, 1 to 256 characters.")
            refuse_nul(value, path)
            try:
                item_id = self._item_id_of[value] = normalise_item_id(value)
            except InvalidInput as error:
                raise Rejected(path, id_reason(value), error.message) from None
        return item_id

    def _optional_item_id(self, value: str, path: str) -> str | None:
        return self._item_id(value, path) if value else None

    def _quantity(self, value: float, path: str) -> float:
        if 0 < value <= MAX_QUANTITY:
            return value
        if value == 0:
            return 1.0
        raise _out_of_range(value, path, "above 0 and at most 1,000,000")

    def _price(self, detail: Any, path: str) -> int | None:
        if not detail.HasField("price_micros"):
            return None
        price: int = detail.price_micros
        if not 0 <= price <= MAX_PRICE_MICROS:
            raise _out_of_range(price, f"{path}.price_micros", "in [0, 1e15]")
        return price

    def _currency(self, code: str, priced: bool, path: str) -> str | None:
        if priced and code in self._currency_codes:
            return code
        path = f"{path}.currency_code"
        if not code:
            if priced:
                raise Rejected(path, RowReason.REQUIRED, "Required with a price: ISO 4217, such as EUR.")
            return None
        if len(code) != 3 or not (code.isascii() and code.isalpha() and code.isupper()):
            refuse_nul(code, path)
            raise Rejected(path, RowReason.MALFORMED, "Three capital letters of ISO 4217, such as EUR.")
        if not priced:
            raise Rejected(
                path, RowReason.FORBIDDEN, "Forbidden without a price; drop it, or send the price."
            )
        self._currency_codes.add(code)
        return code

    def _dwell(self, value: float, path: str) -> float | None:
        if value == 0:
            return None
        if 0 < value <= MAX_DWELL_SECONDS:
            return value
        raise _out_of_range(value, path, "in [0, 86400] seconds")

    def _stars(self, value: float, path: str) -> float:
        if 1 <= value <= 5:
            return value
        if value == 0:
            raise Rejected(path, RowReason.REQUIRED, "Required, in [1, 5].")
        raise _out_of_range(value, path, "in [1, 5]")

    def _position(self, value: int, path: str) -> int | None:
        if value == 0:
            return None
        if 0 < value <= MAX_POSITION:
            return value
        raise _out_of_range(value, path, "in [1, 10000], or 0 when unknown")

    def _attributes(self, **values: Any) -> None:
        present = {name: value for name, value in values.items() if value not in ("", 0, None)}
        if present:
            self._row_sparse["attributes"] = present

    def _lines(self, detail: Any, path: str) -> str | None:
        lines = detail.lines
        if not lines:
            raise Rejected(f"{path}.lines", RowReason.REQUIRED, "Send at least one line.")
        if len(lines) > MAX_LINES:
            raise Rejected(
                f"{path}.lines", RowReason.TOO_LONG, f"At most {MAX_LINES} lines; split the order."
            )
        items, quantities, prices = [], [], []
        for number, line in enumerate(lines):
            line_path = f"{path}.lines[{number}]"
            items.append(self._item_id(line.item_id, f"{line_path}.item_id"))
            quantities.append(self._quantity(line.quantity, f"{line_path}.quantity"))
            prices.append(self._price(line, line_path))
        currency = self._currency(detail.currency_code, any(price is not None for price in prices), path)
        self._row_sparse["line_items"] = items
        self._row_sparse["line_quantities"] = quantities
        self._row_sparse["line_prices"] = prices
        return currency

    # Details, by the name of their field

    def search(self, detail: event_pb2.Search, path: str) -> Product:
        self._row_sparse["text"] = self._text(detail.query, f"{path}.query", 1_024, required=True)
        if detail.HasField("result_count"):
            if detail.result_count < 0:
                raise _out_of_range(detail.result_count, f"{path}.result_count", "at least 0")
            self._row_sparse["attributes"] = {"result_count": detail.result_count}
        return _NO_PRODUCT

    def page_view(self, detail: event_pb2.PageView, path: str) -> Product:
        _known(detail.page_type, 7, f"{path}.page_type", "PAGE_TYPE_OTHER")
        placement = self._text(detail.placement, f"{path}.placement", 64)
        category = self._text(detail.category, f"{path}.category", 256)
        impressions = detail.impressions
        if len(impressions) > MAX_LINES:
            raise Rejected(f"{path}.impressions", RowReason.TOO_LONG, f"At most {MAX_LINES}; split the view.")
        if impressions:
            items, positions = [], []
            for number, impression in enumerate(impressions):
                item_path = f"{path}.impressions[{number}]"
                items.append(self._item_id(impression.item_id, f"{item_path}.item_id"))
                position = self._position(impression.position, f"{item_path}.position")
                positions.append(number + 1 if position is None else position)
            self._row_sparse["impression_items"] = items
            self._row_sparse["impression_positions"] = positions
        if placement:
            self._row_sparse["placement"] = placement
        self._attributes(page_type=detail.page_type, category=category)
        return (None, None, None, None, self._dwell(detail.dwell_seconds, f"{path}.dwell_seconds"))

    def item_view(self, detail: event_pb2.ItemView, path: str) -> Product:
        item_id, dwell_seconds = detail.item_id, detail.dwell_seconds
        price = self._price(detail, path)
        # Most events of a shop come through here: what is plainly right is not asked twice, nor its path written.
        return (
            item_id if is_plain_id(item_id) else self._item_id(item_id, f"{path}.item_id"),
            None,
            price,
            self._currency(detail.currency_code, price is not None, path),
            dwell_seconds
            if dwell_seconds > 0 and dwell_seconds <= MAX_DWELL_SECONDS
            else self._dwell(dwell_seconds, f"{path}.dwell_seconds"),
        )

    def add_to_cart(self, detail: event_pb2.AddToCart, path: str) -> Product:
        price = self._price(detail, path)
        return (
            self._item_id(detail.item_id, f"{path}.item_id"),
            self._quantity(detail.quantity, f"{path}.quantity"),
            price,
            self._currency(detail.currency_code, price is not None, path),
            None,
        )

    def remove_from_cart(self, detail: event_pb2.RemoveFromCart, path: str) -> Product:
        item_id = self._item_id(detail.item_id, f"{path}.item_id")
        return (item_id, self._quantity(detail.quantity, f"{path}.quantity"), None, None, None)

    def purchase(self, detail: event_pb2.Purchase, path: str) -> Product:
        self._attributes(order_id=self._text(detail.order_id, f"{path}.order_id", 128))
        return (None, None, None, self._lines(detail, path), None)

    def item_return(self, detail: event_pb2.ItemReturn, path: str) -> Product:
        _known(detail.cause, 6, f"{path}.cause", "RETURN_CAUSE_OTHER")
        self._attributes(order_id=self._text(detail.order_id, f"{path}.order_id", 128), cause=detail.cause)
        return (None, None, None, self._lines(detail, path), None)

    def rating(self, detail: event_pb2.Rating, path: str) -> Product:
        item_id = self._item_id(detail.item_id, f"{path}.item_id")
        return (item_id, None, None, None, self._stars(detail.stars, f"{path}.stars"))

    def review(self, detail: event_pb2.Review, path: str) -> Product:
        item_id = self._item_id(detail.item_id, f"{path}.item_id")
        self._row_sparse["text"] = self._text(detail.text, f"{path}.text", MAX_TEXT, required=True)
        stars = self._stars(detail.stars, f"{path}.stars") if detail.HasField("stars") else None
        return (item_id, None, None, None, stars)

    def wish_list(self, detail: event_pb2.WishList, path: str) -> Product:
        return (self._item_id(detail.item_id, f"{path}.item_id"), None, None, None, None)

    def share(self, detail: event_pb2.Share, path: str) -> Product:
        self._attributes(medium=self._text(detail.medium, f"{path}.medium", 64))
        return (self._item_id(detail.item_id, f"{path}.item_id"), None, None, None, None)

    def recommendation_click(self, detail: event_pb2.RecommendationClick, path: str) -> Product:
        position = self._position(detail.position, f"{path}.position")
        if position is not None:
            self._row_sparse["position"] = position
        return (self._item_id(detail.item_id, f"{path}.item_id"), None, None, None, None)

    def advertisement(self, detail: event_pb2.AdImpression | event_pb2.AdClick, path: str) -> Product:
        self._attributes(
            campaign_id=self._text(detail.campaign_id, f"{path}.campaign_id", 128, required=True),
            creative_id=self._text(detail.creative_id, f"{path}.creative_id", 128),
        )
        position = self._position(detail.position, f"{path}.position")
        if position is not None:
            self._row_sparse["position"] = position
        return (self._optional_item_id(detail.item_id, f"{path}.item_id"), None, None, None, None)

    def support_question(self, detail: event_pb2.SupportQuestion, path: str) -> Product:
        self._row_sparse["text"] = self._text(detail.text, f"{path}.text", MAX_TEXT, required=True)
        self._attributes(answer_id=self._text(detail.answer_id, f"{path}.answer_id", 128))
        return (self._optional_item_id(detail.item_id, f"{path}.item_id"), None, None, None, None)

    def support_verdict(self, detail: event_pb2.SupportVerdict, path: str) -> Product:
        if not detail.HasField("helpful"):
            raise Rejected(f"{path}.helpful", RowReason.REQUIRED, "Say whether the answer helped.")
        self._attributes(answer_id=self._text(detail.answer_id, f"{path}.answer_id", 128, required=True))
        return (None, None, None, None, 1.0 if detail.helpful else 0.0)

    def survey(self, detail: event_pb2.Survey, path: str) -> Product:
        has_csat, has_nps = detail.HasField("csat"), detail.HasField("nps")
        if not has_csat and not has_nps:
            raise Rejected(f"{path}.csat", RowReason.REQUIRED, "Send csat, nps, or both.")
        if has_csat and not 1 <= detail.csat <= 5:
            raise _out_of_range(detail.csat, f"{path}.csat", "in [1, 5]")
        if has_nps and not 0 <= detail.nps <= 10:
            raise _out_of_range(detail.nps, f"{path}.nps", "in [0, 10]")
        if has_nps:
            self._row_sparse["attributes"] = {"nps": detail.nps}
        if comment := self._text(detail.comment, f"{path}.comment", MAX_TEXT):
            self._row_sparse["text"] = comment
        return (None, None, None, None, float(detail.csat) if has_csat else None)


_Read = Callable[[DetailReader, Any, str], Product]
# Field of the oneof → (kind = field number - 9, how it is read).
DETAILS: dict[str, tuple[int, _Read]] = {
    field.name: (
        field.number - 9,
        DetailReader.advertisement if field.name.startswith("ad_") else getattr(DetailReader, field.name),
    )
    for field in event_pb2.Event.DESCRIPTOR.oneofs_by_name["detail"].fields
}


def _known(value: int, last: int, path: str, other: str) -> None:
    if not 0 <= value <= last:
        raise Rejected(path, RowReason.OUT_OF_RANGE, f"No value of this contract; use {other}.")


def refuse_nul(value: str, path: str) -> None:
    """Raises Rejected for a text that PostgreSQL cannot hold."""
    if "\x00" in value:
        raise Rejected(path, RowReason.NUL_CHARACTER, "Holds a NUL character; strip it.")


def id_reason(value: str) -> RowReason:
    """Returns why an id was refused."""
    return RowReason.TOO_LONG if len(value) > 256 else RowReason.MALFORMED


def _out_of_range(value: float, path: str, expected: str) -> Rejected:
    if math.isfinite(value):
        return Rejected(path, RowReason.OUT_OF_RANGE, f"Must be {expected}.")
    return Rejected(path, RowReason.NOT_FINITE, f"Not a finite number; must be {expected}.")
