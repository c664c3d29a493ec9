from __future__ import annotations

import hashlib
import hmac
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import FailedPrecondition, InvalidInput
from shared.identity import normalise_item_id, parse_user_key
from shared.keys import ensure_development_keys, read_secret, read_signing_key, read_verifying_key
from shared.privacy import Pseudonymizer

SECRETS = {1: b"a" * 32, 2: b"b" * 32}
IDS = st.text(alphabet=st.characters(codec="utf-8", exclude_categories=("Cc",)), min_size=1, max_size=100)


@given(IDS)
def test_a_pseudonym_is_the_truncated_hmac_of_the_nfc_form(user_id: str) -> None:
    import unicodedata

    message = b"user\x00" + unicodedata.normalize("NFC", user_id).encode()
    expected = hmac.new(SECRETS[2], message, hashlib.sha256).digest()[:16]
    assert Pseudonymizer(SECRETS).user_key(user_id) == expected


def test_two_spellings_of_one_name_are_one_person() -> None:
    pseudonymizer = Pseudonymizer(SECRETS)
    assert pseudonymizer.user_key("Jos\u00e9") == pseudonymizer.user_key("Jose\u0301")


def test_the_newest_key_version_is_current_and_the_older_ones_are_known() -> None:
    both, old = Pseudonymizer(SECRETS), Pseudonymizer({1: SECRETS[1]})
    assert both.current_version == 2
    assert both.all_keys("alice") == [both.user_key("alice"), old.user_key("alice")]
    assert both.user_key("alice") != old.user_key("alice")


@pytest.mark.parametrize("user_id", ["", "x" * 257, "a\x00b", "a\nb", "\x7f"])
def test_an_id_that_is_none_is_named(user_id: str) -> None:
    with pytest.raises(InvalidInput) as failure:
        Pseudonymizer(SECRETS).user_key(user_id, "events[2].user_id")
    assert failure.value.violations[0].field == "events[2].user_id"
    with pytest.raises(InvalidInput):
        normalise_item_id(user_id)


@pytest.mark.parametrize("encoded", [b"", b"x" * 15, b"x" * 17])
def test_a_user_key_has_16_bytes(encoded: bytes) -> None:
    with pytest.raises(InvalidInput):
        parse_user_key(encoded)


def test_development_keys_are_made_once_and_for_the_owner_only(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    created = ensure_development_keys(keys)
    assert set(created) == {entry.name for entry in keys.iterdir()}
    before = {entry.name: entry.read_bytes() for entry in keys.iterdir()}
    assert ensure_development_keys(keys) == []
    assert before == {entry.name: entry.read_bytes() for entry in keys.iterdir()}
    assert {stat.S_IMODE(entry.stat().st_mode) for entry in keys.iterdir()} == {0o600}
    signature = read_signing_key(keys).sign(b"text")
    read_verifying_key(keys).verify(signature, b"text")


@pytest.mark.parametrize("content", [None, "zz" * 32, "ab" * 31])
def test_a_key_that_cannot_be_used_is_named_with_a_remedy(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "token_key.hex").write_text(content)
    with pytest.raises(FailedPrecondition) as failure:
        read_secret(tmp_path, "token_key")
    assert failure.value.reason == "KEY_MISSING"
    assert "token_key.hex" in failure.value.message
    assert "shopkeeper doctor" in failure.value.message


def test_without_any_user_key_there_are_no_pseudonyms(tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition):
        Pseudonymizer.from_directory(tmp_path)
    with pytest.raises(FailedPrecondition):
        Pseudonymizer.from_directory(tmp_path / "missing")
