from __future__ import annotations

import hmac
import stat
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import FailedPrecondition, InvalidInput
from shared.identity import normalise_item_id, parse_user_key
from shared.keys import ensure_development_keys, read_secret, read_signing_key, read_verifying_key
from shared.privacy import HmacSha256, Pseudonymizer

SECRETS = {1: b"a" * 32, 2: b"b" * 32, 3: b"c" * 32}
IDS = st.text(alphabet=st.characters(codec="utf-8", exclude_categories=("Cc",)), min_size=1, max_size=100)


def naive_key(user_id: str, versions: int) -> bytes:
    """The formula as it is written down, by `hmac`."""
    normal = unicodedata.normalize("NFC", user_id).encode()
    key = hmac.digest(SECRETS[1], b"user\x00" + normal, "sha256")[:16]
    for version in range(2, versions + 1):
        key = hmac.digest(SECRETS[version], b"rotated\x00" + key, "sha256")[:16]
    return key


@given(IDS)
def test_a_pseudonym_is_the_truncated_hmac_of_the_nfc_form_and_a_later_one_that_of_the_one_before(
    user_id: str,
) -> None:
    for versions in (1, 2, 3):
        pseudonymizer = Pseudonymizer({version: SECRETS[version] for version in range(1, versions + 1)})
        assert pseudonymizer.user_key(user_id) == naive_key(user_id, versions)


@given(secret=st.binary(max_size=64), prefix=st.binary(max_size=100), message=st.binary(max_size=200))
def test_two_prepared_states_make_the_hmac_of_the_standard_library(
    secret: bytes, prefix: bytes, message: bytes
) -> None:
    assert HmacSha256(secret, prefix).digest(message) == hmac.digest(secret, prefix + message, "sha256")


def test_a_pseudonym_is_brought_to_the_current_version_without_the_raw_id() -> None:
    pseudonymizer = Pseudonymizer(SECRETS)
    for version in (1, 2, 3):
        old = naive_key("alice", version)
        assert pseudonymizer.rotated(old, version) == pseudonymizer.user_key("alice")
        assert pseudonymizer.rotated(naive_key("alice", 1), 1, version) == old


def test_a_gap_in_the_chain_of_versions_is_refused_by_name(tmp_path: Path) -> None:
    for version in (1, 3):
        (tmp_path / f"user_key.{version}.hex").write_text("ab" * 32)
    with pytest.raises(FailedPrecondition, match=r"user_key\.2\.hex"):
        Pseudonymizer.from_directory(tmp_path)


def test_two_spellings_of_one_name_are_one_person() -> None:
    pseudonymizer = Pseudonymizer(SECRETS)
    assert pseudonymizer.user_key("Jos\u00e9") == pseudonymizer.user_key("Jose\u0301")


def test_the_newest_key_version_is_current_and_the_older_ones_are_known() -> None:
    three, one = Pseudonymizer(SECRETS), Pseudonymizer({1: SECRETS[1]})
    assert (three.current_version, one.current_version) == (3, 1)
    assert three.all_keys("alice") == [naive_key("alice", version) for version in (3, 2, 1)]
    assert one.all_keys("alice") == [naive_key("alice", 1)]


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
