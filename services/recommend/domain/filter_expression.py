"""Filter expressions: the tree, and its compilation to a mask over the catalogue.

`services.recommend.filter_language` makes the tree of a text. `matches` is the
slow, readable twin of `compile_mask`: what an expression means for one item.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from services.recommend.domain.catalog import Catalog, CatalogItem, Float, Mask

TEXT_FIELDS = ("item_id", "primary_item_id", "brand", "category", "tags", "currency", "language")
NUMBER_FIELDS = ("price", "list_price", "discount", "stock", "rating", "rating_count")
FLAG_FIELDS = ("in_stock",)
ATTRIBUTE_PREFIX = "attributes."

MAX_DEPTH = 100
"""Nested operators; deeper expressions are refused, so that compilation may recurse."""

_COMPARISONS: dict[str, Callable[[Float, float], Mask]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "=": operator.eq,
    "!=": operator.ne,
}


@dataclass(frozen=True, slots=True)
class AnyOf:
    """True where one of the item's values of the field is among `values`."""

    field: str
    values: tuple[str, ...]
    depth: int = 0


@dataclass(frozen=True, slots=True)
class Compare:
    """True where the item's number compares so; false where it has none."""

    field: str
    comparison: str
    number: float
    depth: int = 0


@dataclass(frozen=True, slots=True)
class Flag:
    """True where the item's flag is true; false where it has none."""

    field: str
    depth: int = 0


@dataclass(frozen=True, slots=True)
class Not:
    operand: Expression
    depth: int


@dataclass(frozen=True, slots=True)
class And:
    operands: tuple[Expression, ...]
    depth: int


@dataclass(frozen=True, slots=True)
class Or:
    operands: tuple[Expression, ...]
    depth: int


Expression = AnyOf | Compare | Flag | Not | And | Or


def compile_mask(expression: Expression, catalog: Catalog) -> Mask:
    """Returns where the expression is true, bool (R,)."""
    match expression:
        case Not(operand):
            return ~compile_mask(operand, catalog)
        case And(operands):
            mask_R = compile_mask(operands[0], catalog)
            for operand in operands[1:]:
                mask_R &= compile_mask(operand, catalog)
            return mask_R
        case Or(operands):
            mask_R = compile_mask(operands[0], catalog)
            for operand in operands[1:]:
                mask_R |= compile_mask(operand, catalog)
            return mask_R
        case AnyOf("item_id", values):
            mask_R = np.zeros(catalog.size, dtype=np.bool_)
            rows = [row for value in values if (row := catalog.index.row_of(value)) is not None]
            mask_R[[row for row in rows if row in catalog.items]] = True
            return mask_R
        case AnyOf(field, values):
            mask_R = np.zeros(catalog.size, dtype=np.bool_)
            for value in values:
                mask_R[catalog.posting((field, value)).rows] = True
            return mask_R
        case Flag("in_stock"):
            stock_R = catalog.numbers("stock")
            mask_R = ~(stock_R <= 0)  # NaN, which is not counted, is in stock.
            mask_R &= ~catalog.flags("deleted")
            return mask_R
        case Flag(field):
            mask_R = np.zeros(catalog.size, dtype=np.bool_)
            mask_R[catalog.posting((f"?{field}", "")).rows] = True
            return mask_R
        case Compare(field, comparison, number):
            compare = _COMPARISONS[comparison]
            if field.startswith(ATTRIBUTE_PREFIX):
                posting = catalog.posting((f"#{field}", ""))
                mask_R = np.zeros(catalog.size, dtype=np.bool_)
                if posting.values is not None:
                    mask_R[posting.rows[compare(posting.values, number)]] = True
                return mask_R
            values_R = _numbers(field, catalog)
            # NaN != x is true for IEEE 754, and false here: the item has no such number.
            return compare(values_R, number) & ~np.isnan(values_R)


def matches(expression: Expression, item: CatalogItem) -> bool:
    """Returns whether the expression is true for one item: the definition that `compile_mask` meets."""
    match expression:
        case Not(operand):
            return not matches(operand, item)
        case And(operands):
            return all(matches(operand, item) for operand in operands)
        case Or(operands):
            return any(matches(operand, item) for operand in operands)
        case AnyOf("category", values):
            return any(step in values for step in item.category_path)
        case AnyOf("tags", values):
            return any(tag in values for tag in item.tags)
        case AnyOf(field, values) if field.startswith(ATTRIBUTE_PREFIX):
            return item.texts.get(field.removeprefix(ATTRIBUTE_PREFIX)) in values
        case AnyOf(field, values):
            value = getattr(item, field)
            return value != "" and value in values
        case Flag("in_stock"):
            return item.stock is None or item.stock > 0
        case Flag(field):
            return item.flags.get(field.removeprefix(ATTRIBUTE_PREFIX), False)
        case Compare("discount", comparison, number):
            if item.price is None or not item.list_price:
                return False
            return _compare(1 - item.price / item.list_price, comparison, number)
        case Compare(field, comparison, number) if field.startswith(ATTRIBUTE_PREFIX):
            return _compare(item.numbers.get(field.removeprefix(ATTRIBUTE_PREFIX)), comparison, number)
        case Compare(field, comparison, number):
            return _compare(getattr(item, field), comparison, number)


def _compare(value: float | None, comparison: str, number: float) -> bool:
    return value is not None and bool(_COMPARISONS[comparison](value, number))  # type: ignore[arg-type]


def _numbers(field: str, catalog: Catalog) -> Float:
    if field != "discount":
        return catalog.numbers(field)
    price_R, list_price_R = catalog.numbers("price"), catalog.numbers("list_price")
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(list_price_R > 0, 1 - price_R / list_price_R, np.nan)
