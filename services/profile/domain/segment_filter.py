"""Segment filters: the tree of an expression, and what it means for one shopper."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass

from services.profile.domain.churn_risk import ChurnRisk
from services.profile.domain.portrait import Facet, LifeCycleStage, Portrait

MAX_DEPTH = 50
"""Nested operators; deeper expressions are refused, so that evaluation may recurse."""

_COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "=": operator.eq,
    "!=": operator.ne,
}


@dataclass(frozen=True, slots=True)
class SegmentFacts:
    """What a filter may ask of a shopper; `risk` is None where nothing is known of it."""

    portrait: Portrait
    risk: ChurnRisk | None


def _known(value: float, evidence_count: int) -> float | None:
    return value if evidence_count else None


NUMBER_FIELDS: dict[str, Callable[[SegmentFacts], float | None]] = {
    "event_count": lambda f: f.portrait.event_count,
    "rfm.recency_days": lambda f: _known(
        f.portrait.rfm.recency_days.value, f.portrait.rfm.recency_days.evidence_count
    ),
    "rfm.order_count": lambda f: f.portrait.rfm.order_count,
    "rfm.monetary_micros": lambda f: f.portrait.rfm.monetary_micros,
    "purchase_interval_days": lambda f: _known(
        f.portrait.purchase_interval_days.value, f.portrait.purchase_interval_days.evidence_count
    ),
    "satisfaction": lambda f: _known(f.portrait.satisfaction.value, f.portrait.satisfaction.evidence_count),
    "purchasing_power.price_level": lambda f: _known(
        f.portrait.purchasing_power.price_level.value, f.portrait.purchasing_power.price_level.evidence_count
    ),
    "churn_risk.no_purchase_probability": lambda f: f.risk.probability if f.risk else None,
    "churn_risk.alive_probability": lambda f: f.risk.alive_probability if f.risk else None,
    "churn_risk.lifetime_value_micros": lambda f: f.risk.lifetime_value_micros if f.risk else None,
}
"""Fields that are compared with a number; None where nothing is known: every comparison is false then."""

TEXT_FIELDS: dict[str, Callable[[SegmentFacts], str]] = {
    "life_cycle_stage": lambda f: f.portrait.life_cycle_stage.name,
    "rfm.currency_code": lambda f: f.portrait.rfm.currency_code,
}
"""Fields that are compared with a text, by = and !=."""

INTEREST_FIELDS: dict[str, Facet] = {
    "interests.category": Facet.CATEGORY,
    "interests.brand": Facet.BRAND,
    "interests.price_band": Facet.PRICE_BAND,
}
STAGES = tuple(stage.name for stage in LifeCycleStage)


@dataclass(frozen=True, slots=True)
class Compare:
    """True where the number is known and compares so."""

    field: str
    comparison: str
    number: float


@dataclass(frozen=True, slots=True)
class TextIs:
    """True where the text equals, or with `negated` differs."""

    field: str
    text: str
    negated: bool


@dataclass(frozen=True, slots=True)
class InterestIn:
    """True where the greater weight of the two horizons compares so; no interest at all weighs 0."""

    facet: Facet
    value: str
    comparison: str
    weight: float


@dataclass(frozen=True, slots=True)
class Not:
    operand: Expression


@dataclass(frozen=True, slots=True)
class And:
    operands: tuple[Expression, ...]


@dataclass(frozen=True, slots=True)
class Or:
    operands: tuple[Expression, ...]


Expression = Compare | TextIs | InterestIn | Not | And | Or


def depth(expression: Expression) -> int:
    """Returns how deep operators nest; 0 for a comparison."""
    deepest, level = 0, [expression]
    while level:
        below: list[Expression] = []
        for node in level:
            match node:
                case Not(operand):
                    below.append(operand)
                case And(operands) | Or(operands):
                    below.extend(operands)
        level = below
        deepest += bool(below)
    return deepest


def matches(expression: Expression, facts: SegmentFacts) -> bool:
    """Returns whether a shopper is in the segment."""
    match expression:
        case Not(operand):
            return not matches(operand, facts)
        case And(operands):
            return all(matches(operand, facts) for operand in operands)
        case Or(operands):
            return any(matches(operand, facts) for operand in operands)
        case TextIs(field, text, negated):
            return (TEXT_FIELDS[field](facts) == text) is not negated
        case InterestIn(facet, value, comparison, weight):
            found = max(
                (i.weight for i in facts.portrait.interests if i.facet is facet and i.value == value),
                default=0.0,
            )
            return _COMPARISONS[comparison](found, weight)
        case Compare(field, comparison, number):
            known = NUMBER_FIELDS[field](facts)
            return known is not None and _COMPARISONS[comparison](known, number)
