"""The text of a filter, parsed with lark (LALR) into an expression.

The language is described at `RecommendService` in the contract.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from typing import Any

from lark import Lark, Token, Transformer, v_args
from lark.exceptions import UnexpectedCharacters, UnexpectedInput, UnexpectedToken, VisitError

from services.recommend.domain.filter_expression import (
    ATTRIBUTE_PREFIX,
    FLAG_FIELDS,
    MAX_DEPTH,
    NUMBER_FIELDS,
    TEXT_FIELDS,
    And,
    AnyOf,
    Compare,
    Expression,
    Flag,
    Not,
    Or,
)
from shared.errors import FieldViolation, InvalidInput

MAX_CHARACTERS = 5_000
_CACHED_EXPRESSIONS = 1_000

_GRAMMAR = r"""
?start: disjunction
?disjunction: conjunction ("OR" conjunction)*    -> disjunction
?conjunction: negation ("AND" negation)*         -> conjunction
?negation: "NOT" negation                        -> negation
         | "(" disjunction ")"
         | any_of
         | compare
         | flag
any_of: field ":" "ANY" "(" STRING ("," STRING)* ")"
compare: field COMPARISON NUMBER
flag: field
field: NAME ["." (NAME | STRING)]

COMPARISON: "<=" | ">=" | "!=" | "<" | ">" | "="
NUMBER: /-?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?/
NAME: /[A-Za-z_][A-Za-z0-9_]*/
STRING: /"(\\["\\]|[^"\\])*"/
%ignore /[ \t\r\n]+/
"""


class _Problem(Exception):
    """What is wrong, and at which token."""

    def __init__(self, token: Token, message: str) -> None:
        super().__init__(message)
        self.token = token
        self.message = message


def _text(token: Token) -> str:
    return str(token)[1:-1].replace('\\"', '"').replace("\\\\", "\\")


def _deeper(token: Token | None, operands: tuple[Expression, ...]) -> int:
    depth = 1 + max(operand.depth for operand in operands)
    if depth > MAX_DEPTH:
        raise _TooDeep
    return depth


class _TooDeep(Exception):
    pass


@v_args(inline=True)
class _Build(Transformer[Token, Expression]):
    """Makes the tree, and refuses fields that do not exist or are of another type."""

    def field(self, name: Token, key: Token | None) -> tuple[Token, str]:
        if key is not None:
            if name != "attributes":
                raise _Problem(name, f"{name} has no parts; only attributes has, as in attributes.colour")
            return name, ATTRIBUTE_PREFIX + (_text(key) if key.type == "STRING" else str(key))
        if name == "attributes":
            raise _Problem(name, "attributes needs a key, as in attributes.colour")
        if name not in TEXT_FIELDS + NUMBER_FIELDS + FLAG_FIELDS:
            known = ", ".join((*TEXT_FIELDS, *NUMBER_FIELDS, *FLAG_FIELDS, "attributes.KEY"))
            raise _Problem(name, f"{name} is not a field; fields are {known}")
        return name, str(name)

    def any_of(self, field: tuple[Token, str], *values: Token) -> Expression:
        token, name = field
        if name in NUMBER_FIELDS:
            raise _Problem(token, f"{name} is a number: compare it, as in {name} < 10")
        if name in FLAG_FIELDS:
            raise _Problem(token, f"{name} stands alone, or behind NOT")
        return AnyOf(name, tuple(_text(value) for value in values))

    def compare(self, field: tuple[Token, str], comparison: Token, number: Token) -> Expression:
        token, name = field
        if name in TEXT_FIELDS:
            raise _Problem(token, f'{name} is text: write {name}: ANY("...")')
        if name in FLAG_FIELDS:
            raise _Problem(token, f"{name} stands alone, or behind NOT")
        value = float(number)
        if not math.isfinite(value):
            raise _Problem(number, f"{number} is too large")
        return Compare(name, str(comparison), value)

    def flag(self, field: tuple[Token, str]) -> Expression:
        token, name = field
        if name in TEXT_FIELDS:
            raise _Problem(token, f'{name} is text: write {name}: ANY("...")')
        if name in NUMBER_FIELDS:
            raise _Problem(token, f"{name} is a number: compare it, as in {name} < 10")
        return Flag(name)

    def negation(self, operand: Expression) -> Expression:
        return Not(operand, _deeper(None, (operand,)))

    def conjunction(self, *operands: Expression) -> Expression:
        return operands[0] if len(operands) == 1 else And(operands, _deeper(None, operands))

    def disjunction(self, *operands: Expression) -> Expression:
        return operands[0] if len(operands) == 1 else Or(operands, _deeper(None, operands))


class FilterLanguage:
    """Parses filters, and remembers the last ones."""

    def __init__(self) -> None:
        self._lark: Any = Lark(_GRAMMAR, parser="lalr", transformer=_Build(), maybe_placeholders=True)
        self._lock = threading.Lock()
        self._expressions: OrderedDict[str, Expression] = OrderedDict()

    def parse(self, text: str, field: str = "filter") -> Expression:
        """Returns the expression of a text that is not blank.

        Raises:
            InvalidInput: INVALID_FILTER, with line, column and a caret below the place.
        """
        with self._lock:
            if (known := self._expressions.get(text)) is not None:
                self._expressions.move_to_end(text)
                return known
        if len(text) > MAX_CHARACTERS:
            problem = f"has {len(text)} characters; at most {MAX_CHARACTERS} are allowed."
            raise InvalidInput(
                "INVALID_FILTER",
                f"{field} {problem}",
                violations=[FieldViolation(field, problem, "INVALID_FILTER")],
            )
        expression = self._parse(text, field)
        with self._lock:
            self._expressions[text] = expression
            if len(self._expressions) > _CACHED_EXPRESSIONS:
                self._expressions.popitem(last=False)
        return expression

    def _parse(self, text: str, field: str) -> Expression:
        try:
            # The parser of lark keeps no state between calls, and so serves all threads.
            return self._lark.parse(text)
        except _Problem as error:
            raise _invalid(text, field, error.token.start_pos or 0, error.message) from None
        except _TooDeep:
            raise _invalid(text, field, 0, f"operators nest more than {MAX_DEPTH} deep") from None
        except VisitError as error:
            if isinstance(error.orig_exc, _Problem):
                problem = error.orig_exc
                raise _invalid(text, field, problem.token.start_pos or 0, problem.message) from None
            if isinstance(error.orig_exc, _TooDeep):
                raise _invalid(text, field, 0, f"operators nest more than {MAX_DEPTH} deep") from None
            raise
        except UnexpectedCharacters as error:
            start = error.pos_in_stream or 0
            what = f"unexpected {text[start]!r}"
            raise _invalid(text, field, start, what + _hint(text, start)) from None
        except UnexpectedToken as error:
            if error.token.type == "$END":
                raise _invalid(text, field, len(text), "the expression ends too early") from None
            expected = ", ".join(sorted(_NAMES.get(name, name) for name in error.expected))
            position = error.token.start_pos or 0
            raise _invalid(
                text, field, position, f"unexpected {str(error.token)!r}; expected one of {expected}"
            ) from None
        except UnexpectedInput as error:
            raise _invalid(text, field, error.pos_in_stream or 0, "does not parse") from None


_NAMES = {
    "LPAR": "(",
    "RPAR": ")",
    "COLON": ":",
    "COMMA": ",",
    "DOT": ".",
    "STRING": '"text"',
    "NUMBER": "a number",
    "NAME": "a field",
    "COMPARISON": "a comparison",
    "$END": "the end",
}


def _hint(text: str, position: int) -> str:
    if text[position] == '"':
        return '; a text ends with a quotation mark, and knows \\" and \\\\ only'
    if text[position] == "'":
        return '; texts stand in double quotation marks, as in "red"'
    return ""


def _invalid(text: str, field: str, position: int, message: str) -> InvalidInput:
    line = text.count("\n", 0, position) + 1
    column = position - (text.rfind("\n", 0, position) + 1) + 1
    whole = text.split("\n")[line - 1]
    start = max(0, column - 1 - 40)
    snippet = whole[start : start + 80]
    caret = " " * (column - 1 - start) + "^"
    problem = f"line {line}, column {column}: {message}\n{snippet}\n{caret}"
    return InvalidInput(
        "INVALID_FILTER",
        f"{field}, {problem}",
        {"line": str(line), "column": str(column)},
        [FieldViolation(field, problem, "INVALID_FILTER")],
    )
