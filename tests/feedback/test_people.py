"""Consent, erasure, export: what belongs to a person, and how it ends."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import psycopg
import pytest
from cryptography.exceptions import InvalidSignature
from shopkeeper.feedback.v1 import consent_pb2, event_pb2, feedback_service_pb2
from typer.testing import CliRunner

from services.feedback.converters.identities import Door
from services.feedback.storage.partitions import WRITERS_LOCK
from services.feedback.storage.tombstone_list import TombstoneList
from shared import grpc_status
from shared.bundle.registry import Registry
from shared.cli.app import app
from shared.cli.output import message_dict
from shared.errors import DataLoss, FailedPrecondition
from shared.keys import read_verifying_key
from shared.tokens import ConsistencyToken, TokenSigner, Watermark
from tests.feedback.conftest import DUPLICATE, REJECTED, STORED, Shop, event, eventually, item_view, uuid7


def set_consent(shop: Shop, user_id: str, **consent: bool) -> consent_pb2.Consent:
    return shop.stub.SetConsent(
        feedback_service_pb2.SetConsentRequest(user_id=user_id, consent=consent_pb2.Consent(**consent)),
        timeout=10,
    )


def get_consent(shop: Shop, user_id: str) -> consent_pb2.Consent:
    return shop.stub.GetConsent(feedback_service_pb2.GetConsentRequest(user_id=user_id), timeout=10)


def forget(shop: Shop, user_id: str) -> consent_pb2.ErasureReceipt:
    return shop.stub.ForgetUser(feedback_service_pb2.ForgetUserRequest(user_id=user_id), timeout=20)


def export(shop: Shop, user_id: str) -> list[dict]:
    parts = shop.stub.ExportUser(feedback_service_pb2.ExportUserRequest(user_id=user_id), timeout=20)
    return [json.loads(line) for part in parts for line in part.json_lines]


def seen_by_training(shop: Shop) -> int:
    return int(shop.sql("SELECT count(*) FROM feedback.training_events_v1", role="shopkeeper_trainer")[0][0])


def personalised(shop: Shop) -> list[bool]:
    return [row[0] for row in shop.sql("SELECT personalisation FROM feedback.events_v1 ORDER BY event_key")]


# Consent


def test_who_never_said_allows_all_but_marketing(shop: Shop) -> None:
    consent = get_consent(shop, "ada")
    assert (consent.personalisation, consent.training, consent.marketing) == (True, True, False)
    assert not consent.HasField("update_time")


def test_consent_is_in_force_for_earlier_and_later_events(shop: Shop) -> None:
    shop.record(item_view(), item_view(user_id="bob"))
    set_consent(shop, "ada", training=False, personalisation=False)
    shop.record(item_view())
    assert seen_by_training(shop) == 1
    assert personalised(shop) == [False, True, False]
    set_consent(shop, "ada", training=True)
    assert seen_by_training(shop) == 3
    assert personalised(shop) == [False, True, False]


def test_fields_that_are_not_set_stay_as_they_were(shop: Shop) -> None:
    set_consent(shop, "ada", training=False)
    consent = set_consent(shop, "ada", marketing=True)
    assert (consent.personalisation, consent.training, consent.marketing) == (True, False, True)
    assert get_consent(shop, "ada") == consent


def test_an_event_can_narrow_consent_but_not_widen_it(shop: Shop) -> None:
    shop.record(item_view(consent=event_pb2.EventConsent(training=False, personalisation=False)))
    assert seen_by_training(shop) == 0
    set_consent(shop, "bob", training=False, personalisation=False)
    shop.record(item_view(user_id="bob", consent=event_pb2.EventConsent(training=True, personalisation=True)))
    assert seen_by_training(shop) == 0
    assert personalised(shop) == [False, False]


def test_setting_nothing_is_an_error(shop: Shop) -> None:
    with pytest.raises(grpc.RpcError) as failure:
        set_consent(shop, "ada")
    assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT


# Texts


def test_what_a_person_wrote_is_stored_under_their_own_key(shop: Shop) -> None:
    shop.record(
        event(review=event_pb2.Review(item_id="lamp", text="first words")),
        event(review=event_pb2.Review(item_id="lamp", text="second words")),
        event(user_id="bob", support_question=event_pb2.SupportQuestion(text="first words")),
    )
    sealed = [row[0] for row in shop.sql("SELECT text FROM feedback.events")]
    assert len(set(sealed)) == 3
    assert not any(b"words" in text for text in sealed)
    assert shop.sql("SELECT count(*) FROM feedback.data_keys") == [(2,)]
    texts = {line.get("text") for line in export(shop, "ada")}
    assert {"first words", "second words"} <= texts


def test_a_text_moved_to_another_row_does_not_decrypt(shop: Shop) -> None:
    shop.record(
        event(review=event_pb2.Review(item_id="a", text="one")),
        event(review=event_pb2.Review(item_id="b", text="two")),
    )
    shop.sql("UPDATE feedback.events SET text = (SELECT text FROM feedback.events WHERE item_id = 'a')")
    with pytest.raises(grpc.RpcError) as failure:
        export(shop, "ada")
    assert failure.value.code() is grpc.StatusCode.DATA_LOSS


CANARY = "canary.4711@example.org"


def test_a_raw_id_or_text_is_nowhere_in_the_database(shop: Shop) -> None:
    shop.record(
        item_view(user_id=CANARY, session_id=f"visit of {CANARY}"),
        event(user_id=CANARY, review=event_pb2.Review(item_id="a", text=f"mine is {CANARY}")),
        event(user_id=CANARY, search=event_pb2.Search(query=CANARY)),
    )
    set_consent(shop, CANARY, marketing=True)
    raw = CANARY.encode()
    disguises = [CANARY, raw.hex(), base64.b64encode(raw)[:-4].decode(), hashlib.sha256(raw).hexdigest()]
    with psycopg.connect(shop.url) as connection:
        tables = connection.execute(
            "SELECT format('%I.%I', schemaname, tablename) FROM pg_tables WHERE schemaname = 'feedback'"
        ).fetchall()
        dump = "\n".join(
            row[0]
            for (table,) in tables
            for row in connection.execute(f"SELECT t::text FROM {table} t").fetchall()
        )
    assert "4,0,0,0,f" in dump or len(dump) > 500
    assert [disguise for disguise in disguises if disguise in dump] == []


# Erasure


def test_forgetting_erases_everything_and_says_so(shop: Shop) -> None:
    shop.record(
        item_view(),
        event(review=event_pb2.Review(item_id="lamp", text="mine")),
        item_view(user_id="bob"),
    )
    set_consent(shop, "ada", marketing=True)
    receipt = forget(shop, "ada")
    assert {row.table: row.row_count for row in receipt.erased_rows} == {
        "events": 2,
        "consents": 1,
        "data_keys": 1,
    }
    assert shop.sql("SELECT count(*) FROM feedback.events") == [(1,)]
    assert shop.sql("SELECT count(*) FROM feedback.data_keys") == [(0,)]
    user_key = Door.from_directory(shop.keys).person("ada").user_keys[0]
    assert list(receipt.user_keys) == [user_key]
    assert shop.sql("SELECT user_key FROM feedback.tombstones_v1", role="shopkeeper_profile") == [(user_key,)]
    assert len(export(shop, "ada")) == 1


def test_the_receipt_is_signed(shop: Shop) -> None:
    shop.record(item_view())
    receipt = forget(shop, "ada")
    key = read_verifying_key(shop.keys)
    key.verify(receipt.signature, receipt.signed_payload)
    statement = json.loads(receipt.signed_payload)
    assert statement["receipt_id"] == receipt.receipt_id
    assert statement["erased_rows"]["events"] == 1
    with pytest.raises(InvalidSignature):
        key.verify(receipt.signature, receipt.signed_payload.replace(b'"events":1', b'"events":2'))


def test_later_events_of_a_forgotten_person_are_refused_for_ever(shop: Shop) -> None:
    before = item_view()
    shop.record(before)
    forget(shop, "ada")
    answer = shop.record(
        item_view(), before, item_view(user_id="bob"), event(review=event_pb2.Review(item_id="a", text="x"))
    )
    assert [result.status for result in answer.results] == [REJECTED, REJECTED, STORED, REJECTED]
    assert answer.results[0].reason == event_pb2.EVENT_REASON_USER_FORGOTTEN
    assert answer.results[0].field == "events[0].user_id"
    assert shop.sql("SELECT count(*) FROM feedback.data_keys") == [(0,)]
    with pytest.raises(grpc.RpcError) as failure:
        set_consent(shop, "ada", training=True)
    assert failure.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert get_consent(shop, "ada").forgotten


def test_an_id_that_a_forgotten_person_takes_first_is_left_to_the_living(shop: Shop) -> None:
    forget(shop, "ada")
    shared, other = uuid7(), uuid7()
    events = [
        item_view(event_id=shared), item_view(event_id=shared, user_id="bob"), item_view(event_id=other),
        item_view(event_id=shared, user_id="bob"), item_view(event_id=shared, user_id="eve"),
        item_view(event_id=other), item_view(event_id=shared),
    ]  # fmt: skip
    answer = shop.record(*events)
    assert [result.status for result in answer.results] == [
        REJECTED, STORED, REJECTED, DUPLICATE, REJECTED, REJECTED, REJECTED,
    ]  # fmt: skip
    reasons = [result.reason for result in answer.results]
    assert reasons.count(event_pb2.EVENT_REASON_USER_FORGOTTEN) == 4
    assert reasons[4] == event_pb2.EVENT_REASON_PAYLOAD_CONFLICT
    ((xid, user_key),) = shop.sql("SELECT xid::text, user_key FROM feedback.events")
    assert user_key == Door.from_directory(shop.keys).person("bob").user_keys[0]
    token = ConsistencyToken.verify(TokenSigner.from_directory(shop.keys), answer.consistency_token)
    assert token.xid == int(xid)


def test_forgetting_twice_is_harmless(shop: Shop) -> None:
    shop.record(item_view())
    first, second = forget(shop, "ada"), forget(shop, "ada")
    assert second.erased_at == first.erased_at
    assert {row.row_count for row in second.erased_rows} == {0}


def test_forgetting_waits_for_a_writer_that_has_not_seen_the_tombstone(shop: Shop) -> None:
    # A writer of another replica stands between its snapshot and its commit.
    with psycopg.connect(shop.url) as writer:
        writer.execute(f"SELECT pg_advisory_xact_lock_shared({WRITERS_LOCK})")
        user_key = Door.from_directory(shop.keys).person("ada").user_keys[0]
        receipts: list[consent_pb2.ErasureReceipt] = []
        thread = threading.Thread(target=lambda: receipts.append(forget(shop, "ada")))
        thread.start()
        eventually(lambda: shop.sql("SELECT 1 FROM feedback.tombstones"))
        writer.execute(
            "INSERT INTO feedback.events (event_key, payload_digest, occurred_at, kind, device, channel, consent, "
            "user_key) VALUES (gen_random_uuid(), 0, now(), 3, 0, 0, 0, %s)",
            (user_key,),
        )
        waits = "SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
        eventually(lambda: receipts or shop.sql(waits))
        assert not receipts
        writer.commit()
        thread.join(20)
    assert {row.table: row.row_count for row in receipts[0].erased_rows}["events"] == 1
    assert shop.count() == 0


def test_an_erasure_that_was_cut_short_is_completed(shop: Shop) -> None:
    shop.record(item_view())
    person = Door.from_directory(shop.keys).person("ada")
    shop.sql(
        "INSERT INTO feedback.tombstones (tombstone_key, user_keys, erased_at) VALUES (%s, %s, now())",
        person.tombstone_key,
        list(person.user_keys),
    )
    assert shop.feedback.people.finish_erasures() == 1
    assert shop.count() == 0
    assert shop.feedback.people.finish_erasures() == 0


def write_version(shop: Shop, version: str, created_at: datetime | None, **fields: object) -> None:
    manifest: dict[str, object] = {"schema_version": 1, "model": "main", "version": version, **fields}
    if created_at:
        manifest["created_at"] = created_at.isoformat()
    (shop.registry / "main" / version).mkdir(parents=True)
    (shop.registry / "main" / version / "manifest.json").write_text(json.dumps(manifest))


def test_the_receipt_names_models_trained_since_the_first_event_and_when_they_go(shop: Shop) -> None:
    shop.record(item_view())
    now = datetime.now(UTC)
    write_version(shop, "20200101t000000z-aaaaaa", now - timedelta(days=1))
    write_version(shop, "20200102t000000z-bbbbbb", now + timedelta(seconds=1))
    write_version(shop, "20200103t000000z-cccccc", None)
    write_version(shop, "20200104t000000z-dddddd", now + timedelta(seconds=2))
    Registry(shop.registry).set_alias("main", "production", "20200104t000000z-dddddd", reason="PROMOTED")
    receipt = forget(shop, "ada")
    in_service, replaced = receipt.model_versions
    assert (in_service.version, replaced.version) == ("20200104t000000z-dddddd", "20200102t000000z-bbbbbb")
    assert in_service.in_service
    assert not in_service.HasField("retire_time")
    retire_at = now + timedelta(seconds=1) + timedelta(days=180)
    assert replaced.retire_time.ToDatetime(UTC) == retire_at
    statement = json.loads(receipt.signed_payload)
    assert [version["retire_time"] for version in statement["model_versions"]] == [
        None,
        retire_at.isoformat(),
    ]


def test_a_second_receipt_still_names_the_models_that_hold_the_person(shop: Shop) -> None:
    shop.record(item_view())
    write_version(shop, "20200102t000000z-bbbbbb", datetime.now(UTC) + timedelta(seconds=1))
    first, second = forget(shop, "ada"), forget(shop, "ada")
    assert len(first.model_versions) == 1
    assert second.model_versions == first.model_versions
    assert forget(shop, "nobody").model_versions == []


def issue_anew(shop: Shop, receipt_id: str) -> consent_pb2.ErasureReceipt:
    request = feedback_service_pb2.GetErasureReceiptRequest(receipt_id=receipt_id)
    return shop.stub.GetErasureReceipt(request, timeout=10)


def snapshot(shop: Shop) -> dict[str, str]:
    """Returns what a training run that reads the log now writes into its manifest."""
    ((watermark,),) = shop.sql("SELECT pg_current_snapshot()::text")
    return {"watermark": Watermark.parse_pg(watermark).encode().hex()}


def versions(receipt: consent_pb2.ErasureReceipt) -> set[str]:
    return {version.version for version in receipt.model_versions}


def test_a_run_that_had_read_before_the_erasure_and_publishes_after_it_is_on_the_receipt_issued_anew(
    shop: Shop,
) -> None:
    shop.record(item_view())
    read_before = snapshot(shop)
    receipt = forget(shop, "ada")
    assert versions(receipt) == set()
    # What the trainer does as well: the day of the erasure is not told from the day of publishing.
    now = datetime.now(UTC) + timedelta(seconds=1)
    write_version(shop, "before", now, data=read_before)
    write_version(shop, "after", now, data=snapshot(shop))
    refreshed = {"created_at": now.isoformat(), "requested_at": "", **read_before}
    write_version(shop, "begun-at-before", now, data=snapshot(shop), lineage=[refreshed])
    write_version(shop, "begun-at-gone", now, data=snapshot(shop), hyper_parameters={"initial_version": "x"})
    later = issue_anew(shop, receipt.receipt_id)
    assert versions(later) == {"before", "begun-at-before", "begun-at-gone"}
    assert (later.receipt_id, later.erased_at) == (receipt.receipt_id, receipt.erased_at)
    assert list(later.user_keys) == list(receipt.user_keys)
    assert {row.table: row.row_count for row in later.erased_rows}["events"] == 1
    assert later.issue_time.ToDatetime() > receipt.issue_time.ToDatetime()
    read_verifying_key(shop.keys).verify(later.signature, later.signed_payload)
    statement = json.loads(later.signed_payload)
    assert {one["version"] for one in statement["model_versions"]} == versions(later)
    assert datetime.fromisoformat(statement["issue_time"]) == later.issue_time.ToDatetime(UTC)
    # Asking for a new receipt says the same, though nothing was left to erase.
    assert versions(forget(shop, "ada")) == versions(later)


def test_a_version_whose_reading_is_not_told_is_named_unless_it_was_asked_for_after_the_erasure(
    shop: Shop,
) -> None:
    shop.record(item_view())
    before = datetime.now(UTC)
    receipt = forget(shop, "ada")
    after = datetime.now(UTC) + timedelta(seconds=1)
    # A private run's watermark would count transactions: it has none.
    for name, requested_at in (("in-flight", before), ("later", after)):
        write_version(shop, name, after, data={"watermark": ""}, requested_at=requested_at.isoformat())
    write_version(shop, "silent", after)
    assert versions(issue_anew(shop, receipt.receipt_id)) == {"in-flight", "silent"}


def test_after_a_restore_the_numbers_of_transactions_prove_nothing(shop: Shop) -> None:
    shop.record(item_view())
    receipt = forget(shop, "ada")
    # Of a cluster that was ahead, and was lost: its versions are older than what is erased in the restored one.
    ahead = {"watermark": Watermark(10**12, 10**12).encode().hex()}
    write_version(shop, "of-the-lost-cluster", datetime.now(UTC) - timedelta(milliseconds=1), data=ahead)
    shop.sql("UPDATE feedback.tombstones SET erased_at = now()")
    assert versions(issue_anew(shop, receipt.receipt_id)) == {"of-the-lost-cluster"}
    # Replayed from the list: the transaction that buried them is of another cluster.
    exported = tombstones_of(shop).export()
    shop.sql("DELETE FROM feedback.tombstones")
    tombstones_of(shop).replay(exported)
    shop.feedback.people.finish_erasures()
    assert shop.sql("SELECT buried_xid FROM feedback.tombstones") == [(None,)]


@pytest.mark.parametrize("receipt_id", ["", "no uuid", "00000000-0000-4000-8000-000000000000"])
def test_a_receipt_that_is_not_there_is_not_found(shop: Shop, receipt_id: str) -> None:
    with pytest.raises(grpc.RpcError) as failure:
        issue_anew(shop, receipt_id)
    assert failure.value.code() is grpc.StatusCode.NOT_FOUND
    assert grpc_status.from_rpc_error(failure.value).reason == "RECEIPT_NOT_FOUND"


def test_a_receipt_is_verified_offline_and_a_changed_one_is_refused(shop: Shop, tmp_path: Path) -> None:
    shop.record(item_view())
    receipt = forget(shop, "ada")
    file = tmp_path / "receipt.json"
    command = ["verify-receipt", str(file), "--key", str(shop.keys)]
    file.write_text(json.dumps(message_dict(receipt)))
    verified = CliRunner().invoke(app, command)
    assert verified.exit_code == 0
    assert json.loads(verified.stdout) == json.loads(receipt.signed_payload)
    receipt.signed_payload = receipt.signed_payload.replace(b'"events":1', b'"events":2')
    file.write_text(json.dumps(message_dict(receipt)))
    refused = CliRunner().invoke(app, command)
    assert refused.exit_code != 0
    assert not refused.stdout
    file.write_text("no receipt")
    assert CliRunner().invoke(app, command).exit_code == 2


# The list of erased people


def tombstones_of(shop: Shop) -> TombstoneList:
    return TombstoneList.from_directory(shop.feedback.database, shop.keys)


def test_a_list_of_the_erased_erases_them_again_in_a_restored_log(shop: Shop) -> None:
    shop.record(item_view(), item_view(user_id="bob"))
    forget(shop, "ada")
    exported = tombstones_of(shop).export()
    shop.sql("DELETE FROM feedback.tombstones")
    shop.record(item_view())
    assert shop.count() == 2
    for _ in range(2):
        assert tombstones_of(shop).replay(exported).people == 1
    assert shop.feedback.people.finish_erasures() == 1
    assert shop.count() == 1
    assert tombstones_of(shop).export().splitlines()[:-1] == exported.splitlines()[:-1]
    assert shop.statuses(item_view()) == [REJECTED]


def test_a_list_that_is_older_than_the_database_or_than_asked_for_is_refused(shop: Shop) -> None:
    forget(shop, "ada")
    older = tombstones_of(shop).export()
    between = shop.sql("SELECT clock_timestamp()")[0][0]
    forget(shop, "bob")
    newest = tombstones_of(shop).export()
    with pytest.raises(FailedPrecondition, match="1 of those whom this database knows") as failure:
        tombstones_of(shop).replay(older)
    assert failure.value.reason == "TOMBSTONES_STALE"
    shop.sql("DELETE FROM feedback.tombstones")
    # Now the database does not know better; the operator does.
    with pytest.raises(FailedPrecondition, match="from after"):
        tombstones_of(shop).replay(older, between)
    assert shop.sql("SELECT count(*) FROM feedback.tombstones") == [(0,)]
    replayed = tombstones_of(shop).replay(newest, between)
    assert (replayed.people, replayed.exported_at > between) == (2, True)
    assert replayed.newest_erased_at is not None
    assert replayed.newest_erased_at < replayed.exported_at


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text.replace(text[:4], "0000" if text[:4] != "0000" else "1111", 1),
        lambda text: text.split("\n", 1)[1],
        lambda text: "".join(line + "\n" for line in text.splitlines()[:-1]),
        lambda text: text[:-1],
        lambda text: "",
        lambda text: text.splitlines()[0] + "\n" + text,
        lambda text: text.replace("hmac-sha256", "none"),
        lambda text: re.sub(r"(hmac-sha256,\d+,2)\d", r"\g<1>9", text),
        lambda text: re.sub(r"(hmac-sha256,)\d+", r"\g<1>3", text),
    ],
    ids=[
        "changed",
        "line lost",
        "cut off",
        "last byte lost",
        "empty",
        "line twice",
        "no code",
        "later",
        "number",
    ],
)
def test_a_damaged_list_of_the_erased_is_refused_before_anything_is_replayed(
    shop: Shop, damage: Callable[[str], str]
) -> None:
    forget(shop, "ada")
    forget(shop, "bob")
    exported = tombstones_of(shop).export()
    shop.sql("DELETE FROM feedback.tombstones")
    with pytest.raises(DataLoss) as failure:
        tombstones_of(shop).replay(damage(exported))
    assert failure.value.reason == "TOMBSTONES_DAMAGED"
    assert shop.sql("SELECT count(*) FROM feedback.tombstones") == [(0,)]


def test_a_list_under_another_key_is_refused(shop: Shop) -> None:
    with pytest.raises(DataLoss):
        tombstones_of(shop).replay(TombstoneList(shop.feedback.database, bytes(32)).export())


# Export


def test_an_export_tells_everything_from_the_oldest(shop: Shop) -> None:
    set_consent(shop, "ada", training=False)
    lines = [event_pb2.OrderLine(item_id="lamp", quantity=2, price_micros=5_000_000)]
    shop.record(
        item_view(session_id="s"),
        event(purchase=event_pb2.Purchase(order_id="o-1", lines=lines, currency_code="EUR")),
        event(page_view=event_pb2.PageView(impressions=[event_pb2.Impression(item_id="sofa")])),
        event(survey=event_pb2.Survey(nps=10, comment="good")),
        item_view(user_id="bob"),
    )
    consent, *events = export(shop, "ada")
    assert (consent["type"], consent["training"]) == ("consent", False)
    assert [entry["kind"] for entry in events] == ["ITEM_VIEW", "PURCHASE", "PAGE_VIEW", "SURVEY"]
    assert events[1]["lines"] == [{"item_id": "lamp", "quantity": 2.0, "price_micros": 5_000_000}]
    assert events[1]["attributes"] == {"order_id": "o-1"}
    assert events[2]["impressions"] == [{"item_id": "sofa", "position": 1}]
    assert (events[3]["text"], events[3]["attributes"]) == ("good", {"nps": 10})


def test_an_export_of_many_pages_is_whole(shop: Shop) -> None:
    for _ in range(3):
        shop.record(*[item_view() for _ in range(150)])
    keys = [entry["event_key"] for entry in export(shop, "ada")[1:]]
    assert len(keys) == len(set(keys)) == 450
    assert keys == sorted(keys)


def test_a_key_that_is_missing_stops_the_service_before_it_starts(tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition) as failure:
        Door.from_directory(tmp_path)
    assert failure.value.reason == "KEY_MISSING"
