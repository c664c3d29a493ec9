"""A mapping is read strictly: what it does not understand, it names."""

from __future__ import annotations

import pytest

from shared.event_kinds import EventKind
from shared.importing.mapping import fold, parse_mapping, shipped_mappings
from shared.importing.problems import ImportRefused

MINIMAL = """
name: shop
sources:
  - role: events
    files: ["*.csv"]
    kind: purchase
    fields: {user: customer, item: sku, time: at}
"""


def refusal(text: str) -> str:
    with pytest.raises(ImportRefused) as caught:
        parse_mapping(text, "my.yaml")
    assert caught.value.reason == "MAPPING_INVALID"
    return caught.value.message


def test_a_minimal_mapping_is_understood() -> None:
    source = parse_mapping(MINIMAL, "my.yaml").sources[0]
    assert source.kind == EventKind.PURCHASE
    assert source.fields["user"].columns == ("customer",)
    assert source.timezone.key == "UTC"


def test_a_misspelt_key_is_named_with_the_nearest_known_one() -> None:
    message = refusal(MINIMAL.replace("kind: purchase", "kind: purchase\n    timezon: Europe/London"))
    assert "my.yaml" in message
    assert "sources[0].timezon" in message
    assert "'timezone'" in message


def test_a_misspelt_field_is_named_with_the_nearest_known_one() -> None:
    assert "'quantity'" in refusal(MINIMAL.replace("time: at", "time: at, quantitty: n"))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("kind: purchase", "kind: purchse"), "'purchase'"),
        (("role: events", "role: event"), "'events'"),
        (("user: customer, ", ""), "fields.user"),
        (("kind: purchase\n", "\n"), "kinds"),
        (("kind: purchase", "kind: purchase\n    timezone: Mars/Olympus"), "IANA"),
        (("kind: purchase", "kind: purchase\n    guests: per_order"), "order"),
        (
            ("kind: purchase", "kind: purchase\n    drop: [{field: item, matches: '(', reason: r}]"),
            "regular expression",
        ),
        (("kind: purchase", "kind: purchase\n    drop: [{field: item, reason: r}]"), "exactly one"),
        (("name: shop", "name: My Shop"), "a-z"),
        (("name: shop", "- shop"), "YAML"),
    ],
)
def test_what_is_wrong_with_a_mapping_is_said(change: tuple[str, str], told: str) -> None:
    assert told in refusal(MINIMAL.replace(*change))


def test_a_mapping_cannot_run_code() -> None:
    refusal(MINIMAL + "note: !!python/object/apply:os.system ['true']\n")


def test_column_names_match_without_regard_to_case_and_spaces() -> None:
    assert fold("Customer ID") == fold("customer_id") == fold("CustomerId")


def test_every_shipped_mapping_is_valid_and_named_like_its_data_set() -> None:
    assert {"online_retail", "jd_actions", "cdnow", "beauty", "chorus_icecat", "fashion_images"} <= set(
        shipped_mappings()
    )
