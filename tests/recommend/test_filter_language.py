"""The filter language: what it means, and what it says when it does not understand."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.recommend.converters.filter_language import MAX_CHARACTERS, FilterLanguage
from services.recommend.domain.catalog import CatalogItem, CatalogStore
from services.recommend.domain.filter_expression import (
    And,
    AnyOf,
    Compare,
    Expression,
    Flag,
    Not,
    Or,
    compile_mask,
    matches,
)
from services.recommend.domain.item_index import ItemIndex
from shared.errors import InvalidInput

LANGUAGE = FilterLanguage()

BALM = CatalogItem(
    "balm",
    brand="Alba",
    category_path=("beauty", "skin care"),
    tags=("sale",),
    price=19.99,
    list_price=25.0,
    stock=3,
    rating=4.5,
    rating_count=10,
    texts={"color": "red", "Skin type": "dry"},
    numbers={"weight": 0.5},
    flags={"vegan": True},
)
SOAP = CatalogItem("soap", brand="X", category_path=("beauty", "soap"), price=5.0, stock=0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('category: ANY("skin care")', {"balm"}),
        ('category: ANY("beauty")', {"balm", "soap"}),
        ('category: ANY("skin care", "soap") AND price < 30 AND NOT brand: ANY("X") AND in_stock', {"balm"}),
        ('NOT brand: ANY("X")', {"balm"}),
        ("price = 19.99", {"balm"}),
        ("price >= 5 AND price <= 5", {"soap"}),
        ("discount > 0.2", {"balm"}),
        ("rating != 4.5", set()),
        ("NOT rating >= 4", {"soap"}),
        ("attributes.weight <= .5", {"balm"}),
        ('attributes."Skin type": ANY("dry") OR stock = 0', {"balm", "soap"}),
        ("attributes.vegan", {"balm"}),
        ('item_id: ANY("soap", "nobody")', {"soap"}),
        ('tags: ANY("sale") OR in_stock AND brand: ANY("X")', {"balm"}),
        ('(tags: ANY("sale") OR in_stock) AND brand: ANY("X")', set()),
        ("NOT NOT in_stock", {"balm"}),
    ],
)
def test_an_expression_means_what_the_contract_says(text: str, expected: set[str]) -> None:
    assert chosen(LANGUAGE.parse(text), [BALM, SOAP]) == expected


@pytest.mark.parametrize(
    ("text", "line", "column", "word"),
    [
        ("price <", 1, 8, "too early"),
        ("brand < 3", 1, 1, 'brand: ANY("...")'),
        ('price: ANY("3")', 1, 1, "price < 10"),
        ("in_stock AND\n  colour", 2, 3, "colour is not a field"),
        ("brand: ANY('x')", 1, 12, "double quotation marks"),
        ("(in_stock", 1, 10, "too early"),
        ("in_stock in_stock", 1, 10, "expected one of"),
        ("price < 1e999", 1, 9, "too large"),
        ("attributes", 1, 1, "needs a key"),
        ("", 1, 1, "too early"),
    ],
)
def test_a_mistake_is_shown_where_it_is(text: str, line: int, column: int, word: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        LANGUAGE.parse(text)
    assert caught.value.reason == "INVALID_FILTER"
    assert caught.value.metadata == {"line": str(line), "column": str(column)}
    assert word in caught.value.message
    *_, snippet, caret = caught.value.message.split("\n")
    assert snippet == text.split("\n")[line - 1]
    assert caret.index("^") == column - 1


def test_nesting_has_a_limit_and_parentheses_do_not() -> None:
    with pytest.raises(InvalidInput, match="nest"):
        LANGUAGE.parse("NOT " * 101 + "in_stock")
    assert LANGUAGE.parse("(" * 2000 + "in_stock" + ")" * 2000) == Flag("in_stock")


def test_a_text_beyond_the_limit_is_refused_before_it_is_read() -> None:
    with pytest.raises(InvalidInput, match=str(MAX_CHARACTERS)):
        LANGUAGE.parse("x" * (MAX_CHARACTERS + 1))


words = st.sampled_from(["a", "b", 'ä "quoted"', "back\\slash", "c"])
numbers = st.sampled_from([-1.5, 0.0, 1.0, 2.5, 3.0])
optional_numbers = st.none() | numbers.filter(lambda number: number >= 0)
items = st.builds(
    CatalogItem,
    item_id=st.sampled_from([f"i{n}" for n in range(8)]),
    brand=st.just("") | words,
    category_path=st.lists(words, max_size=3, unique=True).map(tuple),
    tags=st.lists(words, max_size=2, unique=True).map(tuple),
    price=optional_numbers,
    list_price=optional_numbers,
    stock=optional_numbers,
    rating=optional_numbers,
    rating_count=optional_numbers,
    texts=st.dictionaries(st.sampled_from(["k", "odd key"]), words, max_size=2),
    numbers=st.dictionaries(st.sampled_from(["k", "n"]), numbers, max_size=2),
    flags=st.dictionaries(st.sampled_from(["f", "k"]), st.booleans(), max_size=2),
)
leaves = st.one_of(
    st.builds(
        AnyOf,
        st.sampled_from(["brand", "category", "tags", "item_id", "attributes.k", "attributes.odd key"]),
        st.lists(words | st.sampled_from(["i1", "i2"]), min_size=1, max_size=3).map(tuple),
    ),
    st.builds(
        Compare,
        st.sampled_from(
            [
                "price",
                "list_price",
                "discount",
                "stock",
                "rating",
                "rating_count",
                "attributes.k",
                "attributes.n",
            ]
        ),
        st.sampled_from(["<", "<=", ">", ">=", "=", "!="]),
        numbers,
    ),
    st.builds(Flag, st.sampled_from(["in_stock", "attributes.f", "attributes.k"])),
)
expressions = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.builds(lambda operand: Not(operand, 1 + operand.depth), inner),
        st.lists(inner, min_size=2, max_size=3).map(
            lambda operands: And(tuple(operands), 1 + max(o.depth for o in operands))
        ),
        st.lists(inner, min_size=2, max_size=3).map(
            lambda operands: Or(tuple(operands), 1 + max(o.depth for o in operands))
        ),
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(expressions, st.lists(items, max_size=12))
def test_a_mask_agrees_with_asking_item_by_item(expression: Expression, catalog: list[CatalogItem]) -> None:
    latest = list({item.item_id: item for item in catalog}.values())
    assert chosen(expression, catalog) == {item.item_id for item in latest if matches(expression, item)}


@settings(max_examples=200, deadline=None)
@given(expressions)
def test_what_is_written_is_what_is_read(expression: Expression) -> None:
    assert LANGUAGE.parse(written(expression)) == expression


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet='abcNOTANDR_:(),."\\<>=! 01\n\t', max_size=60))
def test_any_text_is_understood_or_refused_with_a_reason(text: str) -> None:
    reason = "INVALID_FILTER"
    try:
        LANGUAGE.parse(text)
    except InvalidInput as error:
        reason = error.reason
    assert reason == "INVALID_FILTER"


def chosen(expression: Expression, catalog: list[CatalogItem]) -> set[str]:
    index = ItemIndex()
    store = CatalogStore(index)
    store.stage(catalog, [])
    state = store.publish()
    mask_R = compile_mask(expression, state)
    # Rows beyond the catalogue's items have no say in a filter.
    return {index.id_of(row) for row in range(state.size) if mask_R[row] and row in state.items}


def written(expression: Expression) -> str:
    """Returns the text of an expression; parentheses everywhere they may be needed."""
    match expression:
        case AnyOf(field, values):
            quoted = ", ".join('"' + v.replace("\\", "\\\\").replace('"', '\\"') + '"' for v in values)
            return f"{name(field)}: ANY({quoted})"
        case Compare(field, comparison, number):
            return f"{name(field)} {comparison} {number!r}"
        case Flag(field):
            return name(field)
        case Not(operand):
            return f"NOT ({written(operand)})"
        case And(operands):
            return " AND ".join(f"({written(operand)})" for operand in operands)
        case Or(operands):
            return " OR ".join(f"({written(operand)})" for operand in operands)


def name(field: str) -> str:
    if field.startswith("attributes.") and " " in field:
        return f'attributes."{field.removeprefix("attributes.")}"'
    return field
