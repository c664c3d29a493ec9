from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import InvalidInput
from shared.tokens import (
    AttributionToken,
    ConsistencyToken,
    TokenSigner,
    Watermark,
    item_digests,
    pack_page,
    unpack_page,
)

SIGNER = TokenSigner(b"k" * 32)


@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=50), st.binary(max_size=100))
def test_a_token_comes_back_as_it_went(kind: str, payload: bytes) -> None:
    assert SIGNER.verify(kind, SIGNER.sign(kind, payload)) == payload


@given(st.binary(max_size=60), st.integers(min_value=0), st.integers(1, 255))
def test_a_changed_token_is_refused(payload: bytes, position: int, change: int) -> None:
    import base64

    token = SIGNER.sign("page", payload)
    signed = bytearray(base64.urlsafe_b64decode(token + "=" * (-len(token) % 4)))
    signed[position % len(signed)] ^= change
    with pytest.raises(InvalidInput):
        SIGNER.verify("page", base64.urlsafe_b64encode(bytes(signed)).rstrip(b"=").decode())


@given(st.text(alphabet=st.characters(codec="utf-8")))
def test_any_text_that_is_no_token_is_refused_and_named(text: str) -> None:
    with pytest.raises(InvalidInput) as failure:
        SIGNER.verify("consistency", text, "consistency_token")
    assert failure.value.violations[0].field == "consistency_token"


def test_a_token_of_one_kind_does_not_pass_as_another() -> None:
    with pytest.raises(InvalidInput):
        SIGNER.verify("page", ConsistencyToken(7).sign(SIGNER))


def test_a_token_of_another_installation_is_refused() -> None:
    with pytest.raises(InvalidInput):
        ConsistencyToken.verify(TokenSigner(b"x" * 32), ConsistencyToken(7).sign(SIGNER))


def test_an_attribution_token_knows_the_positions_of_its_items() -> None:
    token = AttributionToken(
        b"12345678",
        1_700_000_000_000,
        "home",
        "default",
        "20260101t000000z-abcdef",
        "",
        item_digests(["a", "ü", "商品"]),
        np.asarray([1.0, 0.5, 0.25], dtype=np.float32),
    )
    back = AttributionToken.verify(SIGNER, token.sign(SIGNER))
    assert [back.position_of(item) for item in ("a", "ü", "商品", "z")] == [1, 2, 3, None]
    assert back.propensities_K.tolist() == [1.0, 0.5, 0.25]
    assert (back.placement, back.serving_config, back.issued_at_ms) == ("home", "default", 1_700_000_000_000)


def test_a_watermark_covers_what_was_visible_and_nothing_else() -> None:
    watermark = Watermark.parse_pg("10:15:10,12")
    assert [xid for xid in range(5, 20) if watermark.covers(xid)] == [5, 6, 7, 8, 9, 11, 13, 14]
    assert not watermark.covers(ConsistencyToken(12))


@given(st.integers(0, 2**63), st.integers(0, 2**63), st.frozensets(st.integers(0, 2**63), max_size=5))
def test_a_watermark_survives_the_wire(xmin: int, xmax: int, in_progress: frozenset[int]) -> None:
    watermark = Watermark(xmin, xmax, in_progress)
    assert Watermark.decode(watermark.encode()) == watermark


@given(st.binary(max_size=30).filter(lambda encoded: encoded.count(b":") != 2))
def test_bytes_that_are_no_watermark_are_invalid_input(encoded: bytes) -> None:
    with pytest.raises(InvalidInput) as failure:
        Watermark.decode(encoded)
    assert failure.value.violations[0].field == "watermark"


@given(st.lists(st.text(alphabet=st.characters(codec="utf-8"), max_size=40), max_size=4))
def test_a_page_token_keeps_its_fields(fields: list[str]) -> None:
    assert unpack_page(pack_page(fields)) == fields
