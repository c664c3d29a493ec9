"""The text of a segment's filter, parsed with lark (LALR) into an expression.

The language is described at `Segment.filter` in the contract. AND and OR do not mix without parentheses:
AIP-160 and everybody else disagree on which binds closer.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

from lark import Lark, Token, Transformer, v_args
from lark.exceptions import UnexpectedCharacters, UnexpectedInput, UnexpectedToken, VisitError

from services.profile.domain.segment_filter import (
    INTEREST_FIELDS,
    MAX_DEPTH,
    NUMBER_FIELDS,
    STAGES,
    TEXT_FIELDS,
    And,
    Compare,
    Expression,
    InterestIn,
    Not,
    Or,
    TextIs,
    depth,
)
from shared.errors import FieldViolation, InvalidInput

MAX_CHARACTERS = 4_000

_GRAMMAR = r"""
?start: all | any | term
all: term ("AND" term)+
any: term ("OR" term)+
?term: "NOT" term                          -> negation
     | "(" start ")"
     | FIELD COMPARISON NUMBER             -> compare
     | FIELD COMPARISON (NAME | STRING)    -> text
     | FIELD ":" (NAME | STRING)           -> interest
     | FIELD ":" STRING COMPARISON NUMBER  -> interest

COMPARISON: "<=" | ">=" | "!=" | "<" | ">" | "="
NUMBER: /-?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?/
FIELD: /[a-z_]+(\.[a-z_]+)?/
NAME: /[A-Z][A-Z_]*/
STRING: /"(\\["\\]|[^"\\])*"/
%ignore /[ \t\r\n]+/
"""


class _Problem(Exception):
    """What is wrong, and at which character."""

    def __init__(self, token: Token, message: str) -> None:
        super().__init__(message)
        self.position = token.start_pos or 0
        self.message = message


def _text(token: Token) -> str:
    return (
        str(token)[1:-1].replace('\\"', '"').replace("\\\\", "\\") if token.type == "STRING" else str(token)
    )


@v_args(inline=True)
class _Build(Transformer[Token, Expression]):
    """Makes the tree, and refuses fields that do not exist or are of another type."""

    def compare(self, field: Token, comparison: Token, number: Token) -> Expression:
        if field not in NUMBER_FIELDS:
            raise _Problem(field, _unfit(field, "compared with a number"))
        value = float(number)
        if not math.isfinite(value):
            raise _Problem(number, f"{number} is too large")
        return Compare(str(field), str(comparison), value)

    def text(self, field: Token, comparison: Token, text: Token) -> Expression:
        if field not in TEXT_FIELDS:
            raise _Problem(field, _unfit(field, "compared with a text"))
        if comparison not in ("=", "!="):
            raise _Problem(comparison, f"{field} knows = and != only")
        value = _text(text)
        if field == "life_cycle_stage" and value not in STAGES:
            raise _Problem(text, f"{value} is no stage; stages are {', '.join(STAGES)}")
        return TextIs(str(field), value, comparison == "!=")

    def interest(self, field: Token, value: Token, *rest: Token) -> Expression:
        if field not in INTEREST_FIELDS:
            raise _Problem(field, _unfit(field, "asked for with a colon"))
        comparison, weight = (str(rest[0]), float(rest[1])) if rest else (">", 0.0)
        return InterestIn(INTEREST_FIELDS[field], _text(value), comparison, weight)

    def negation(self, operand: Expression) -> Expression:
        return Not(operand)

    def all(self, *operands: Expression) -> Expression:
        return And(operands)

    def any(self, *operands: Expression) -> Expression:
        return Or(operands)


def _unfit(field: str, how: str) -> str:
    if field in NUMBER_FIELDS or field in TEXT_FIELDS or field in INTEREST_FIELDS:
        return f"{field} cannot be {how}"
    known = ", ".join((*NUMBER_FIELDS, *TEXT_FIELDS, *INTEREST_FIELDS))
    return f"{field} is not a field; fields are {known}"


_LARK: Any = Lark(_GRAMMAR, parser="lalr", transformer=_Build())


@lru_cache(maxsize=1_000)
def parse_filter(text: str, field: str = "filter") -> Expression:
    """Returns the expression of a text.

    Raises:
        InvalidInput: INVALID_FILTER, with the position of the problem.
    """
    if not text.strip():
        raise _invalid(text, field, 0, "it is empty; every shopper is `event_count >= 0`")
    if len(text) > MAX_CHARACTERS:
        raise _invalid(text, field, MAX_CHARACTERS, f"it is longer than {MAX_CHARACTERS} characters")
    # The parser recurses into nothing, but what walks the tree may: parentheses bound its depth.
    try:
        expression: Expression = _LARK.parse(text)
    except _Problem as error:
        raise _invalid(text, field, error.position, error.message) from None
    except VisitError as error:
        if isinstance(error.orig_exc, _Problem):
            raise _invalid(text, field, error.orig_exc.position, error.orig_exc.message) from None
        raise
    except UnexpectedCharacters as error:
        position = error.pos_in_stream or 0
        raise _invalid(text, field, position, f"unexpected {text[position]!r}") from None
    except UnexpectedToken as error:
        if error.token.type == "$END":
            raise _invalid(text, field, len(text), "the expression ends too early") from None
        hint = "; put AND and OR apart with parentheses" if error.token in ("AND", "OR") else ""
        raise _invalid(
            text, field, error.token.start_pos or 0, f"unexpected {str(error.token)!r}{hint}"
        ) from None
    except UnexpectedInput as error:
        raise _invalid(text, field, error.pos_in_stream or 0, "it does not parse") from None
    if depth(expression) > MAX_DEPTH:
        raise _invalid(text, field, 0, f"operators nest more than {MAX_DEPTH} deep")
    return expression


def _invalid(text: str, field: str, position: int, message: str) -> InvalidInput:
    snippet = text[max(0, position - 30) : position + 30]
    problem = f"at character {position + 1}: {message}" + (f" (near {snippet!r})." if snippet else ".")
    return InvalidInput(
        "INVALID_FILTER",
        f"{field}, {problem}",
        {"position": str(position)},
        [FieldViolation(field, problem, "INVALID_FILTER")],
    )
