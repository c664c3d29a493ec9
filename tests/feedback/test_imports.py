"""Files that become events: every row once, whatever happens on the way."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import pyarrow as pa
import pyarrow.parquet
import pytest
from shopkeeper.feedback.v1 import event_kind_pb2, event_pb2, feedback_service_pb2, import_pb2

from tests.feedback.conftest import Shop, eventually

VIEW, CART, PURCHASE, REVIEW = (
    event_kind_pb2.EVENT_KIND_ITEM_VIEW,
    event_kind_pb2.EVENT_KIND_ADD_TO_CART,
    event_kind_pb2.EVENT_KIND_PURCHASE,
    event_kind_pb2.EVENT_KIND_REVIEW,
)
COLUMNS = import_pb2.ColumnMapping(
    user_id_column="who", occurred_at_column="when", item_id_column="what", default_kind=VIEW
)


@pytest.fixture
def importing(shop: Shop) -> Iterator[Shop]:
    """A shop whose imports run."""
    shop.imports.mkdir()
    shop.feedback.start()
    yield shop
    shop.feedback.stopped.set()


def views(path: Path, rows: int, start: int = 0) -> None:
    lines = [
        f"user {i % 7},item {i % 11},2024-03-01T00:{i // 60 % 60:02d}:{i % 60:02d}Z"
        for i in range(start, start + rows)
    ]
    path.write_text("who,what,when\n" + "\n".join(lines) + "\n")


def begin(shop: Shop, path: str, request_id: str = "", **source: Any) -> import_pb2.Import:
    source = source or {"mapping": COLUMNS}
    request = feedback_service_pb2.ImportEventsRequest(
        source=import_pb2.ImportSource(path=path, **source), request_id=request_id
    )
    return shop.stub.ImportEvents(request, timeout=20)


def finished(shop: Shop, one: import_pb2.Import) -> import_pb2.Import:
    request = feedback_service_pb2.WatchImportRequest(import_id=one.import_id)
    *_, last = shop.stub.WatchImport(request, timeout=60)
    assert last.HasField("end_time")
    return last


def counts(one: import_pb2.Import) -> tuple[int, int, int, int]:
    return one.stored_count, one.duplicate_count, one.quarantined_count, one.rejected_count


def test_every_row_of_a_csv_file_becomes_an_event_and_a_second_import_none(importing: Shop) -> None:
    views(importing.imports / "views.csv", 1_200)
    first = finished(importing, begin(importing, "views.csv"))
    assert first.state == import_pb2.IMPORT_STATE_SUCCEEDED
    assert (first.read_row_count, first.total_row_count, counts(first)) == (1_200, 1_200, (1_200, 0, 0, 0))
    second = finished(importing, begin(importing, "views.csv"))
    assert counts(second) == (0, 1_200, 0, 0)
    assert importing.count() == 1_200
    channel = event_pb2.CHANNEL_IMPORT
    assert importing.sql("SELECT DISTINCT channel, kind FROM feedback.events") == [(channel, VIEW)]


def test_json_lines_and_parquet_say_the_same_as_csv(importing: Shop) -> None:
    rows = [{"who": f"user {i}", "what": "lamp", "when": 1_700_000_000 + i} for i in range(50)]
    mapping = import_pb2.ColumnMapping()
    mapping.CopyFrom(COLUMNS)
    mapping.occurred_at_format = "epoch_seconds"
    (importing.imports / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pa.parquet.write_table(pa.Table.from_pylist(rows), importing.imports / "a.parquet")
    (importing.imports / "a.csv").write_text(
        "who,what,when\n" + "\n".join(f"{row['who']},lamp,{row['when']}" for row in rows)
    )
    assert counts(finished(importing, begin(importing, "a.jsonl", mapping=mapping))) == (50, 0, 0, 0)
    parquet = finished(importing, begin(importing, "a.parquet", mapping=mapping))
    assert counts(parquet) == (0, 50, 0, 0)
    assert parquet.total_row_count == 50
    assert counts(finished(importing, begin(importing, "a.csv", mapping=mapping))) == (0, 50, 0, 0)


def test_kinds_orders_returns_and_texts_come_from_their_columns(importing: Shop) -> None:
    (importing.imports / "shop.csv").write_text(
        "id,who,what,when,action,words\n"
        "e-1,ada,lamp,2024-01-01 10:00,look,\n"
        "e-2,ada,lamp,2024-01-01 10:01,basket,\n"
        "e-3,ada,lamp,2024-01-02 10:00,said,a fine lamp\n"
        "e-4,ada,lamp,2024-01-03 10:00,,\n"
    )
    mapping = import_pb2.ColumnMapping(
        user_id_column="who", occurred_at_column="when", item_id_column="what", kind_column="action",
        event_id_column="id", text_column="words", default_kind=VIEW, time_zone="Asia/Shanghai",
        kind_values=[
            import_pb2.KindValue(value=value, kind=kind)
            for value, kind in (("look", VIEW), ("basket", CART), ("said", REVIEW))
        ],
    )  # fmt: skip
    assert counts(finished(importing, begin(importing, "shop.csv", mapping=mapping))) == (4, 0, 0, 0)
    stored = importing.sql("SELECT kind, occurred_at FROM feedback.events ORDER BY occurred_at")
    assert [kind for kind, _ in stored] == [VIEW, CART, REVIEW, VIEW]
    assert stored[0][1] == datetime(2024, 1, 1, 2, 0, tzinfo=UTC)
    (importing.imports / "orders.csv").write_text(
        "who,what,when,order,n,price\n"
        "ada,lamp,2024-01-01T00:00:00Z,o-1,2,9.99\n"
        "ada,sofa,2024-01-01T00:00:00Z,o-1,1,100\n"
        "ada,lamp,2024-01-05T00:00:00Z,o-1,-1,9.99\n"
    )
    mapping = import_pb2.ColumnMapping(
        user_id_column="who", occurred_at_column="when", item_id_column="what", order_id_column="order",
        quantity_column="n", price_column="price", currency_code="EUR", default_kind=PURCHASE,
    )  # fmt: skip
    # Three rows, two events: rows are what is counted.
    assert counts(finished(importing, begin(importing, "orders.csv", mapping=mapping))) == (3, 0, 0, 0)
    assert importing.sql("SELECT line_items, line_prices FROM feedback.events WHERE kind = %s", PURCHASE) == [
        (["lamp", "sofa"], [9_990_000, 100_000_000])
    ]


def test_a_bad_row_is_named_with_its_column_and_harms_no_other(importing: Shop) -> None:
    (importing.imports / "bad.csv").write_text(
        "who,what,when\n"
        "ada,lamp,2024-01-01T00:00:00Z\n"
        ",lamp,2024-01-01T00:00:01Z\n"
        "ada.secret@example.org,lamp,yesterday\n"
        "ada,,2024-01-01T00:00:02Z\n"
        "ada,sofa,2024-01-01T00:00:03Z\n"
    )
    one = finished(importing, begin(importing, "bad.csv"))
    assert (one.state, counts(one)) == (import_pb2.IMPORT_STATE_SUCCEEDED, (2, 0, 0, 3))
    samples = {sample.row_number: sample.result for sample in one.error_samples}
    assert {row: result.field for row, result in samples.items()} == {2: "who", 3: "when", 4: "what"}
    assert samples[2].reason == event_pb2.EVENT_REASON_REQUIRED
    assert all(
        result.status == event_pb2.EVENT_STATUS_REJECTED and result.message for result in samples.values()
    )
    # A sample says what is wrong, never with whose.
    assert "secret" not in str(importing.sql("SELECT i::text FROM feedback.imports AS i"))


def test_what_the_log_refuses_is_named_by_its_row_too(importing: Shop) -> None:
    importing.stub.ForgetUser(feedback_service_pb2.ForgetUserRequest(user_id="user 3"), timeout=20)
    views(importing.imports / "views.csv", 70)
    one = finished(importing, begin(importing, "views.csv"))
    assert counts(one) == (60, 0, 0, 10)
    assert one.error_samples[0].row_number == 4
    assert one.error_samples[0].result.reason == event_pb2.EVENT_REASON_USER_FORGOTTEN
    assert one.error_samples[0].result.field == "user_id"


def test_a_yaml_file_can_hold_the_mapping(importing: Shop) -> None:
    views(importing.imports / "views.csv", 20)
    (importing.imports / "ours.yaml").write_text(
        "name: ours\nsources:\n- role: events\n  files: ['*.csv']\n  kind: item_view\n"
        "  fields: {user: who, item: what, time: when}\n"
    )
    assert counts(finished(importing, begin(importing, "views.csv", mapping_path="ours.yaml"))) == (
        20,
        0,
        0,
        0,
    )


@pytest.mark.parametrize(
    "path", ["../secret.csv", "/etc/passwd", "a/../../secret.csv", "link.csv", "missing.csv", "", "a\x00.csv"]
)
def test_nothing_outside_of_the_import_directory_can_be_reached(importing: Shop, path: str) -> None:
    views(importing.imports.parent / "secret.csv", 3)
    (importing.imports / "link.csv").symlink_to(importing.imports.parent / "secret.csv")
    with pytest.raises(grpc.RpcError) as failure:
        begin(importing, path)
    assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert str(importing.imports) not in failure.value.details()


def test_a_mapping_that_does_not_fit_is_told_at_once(importing: Shop) -> None:
    views(importing.imports / "views.csv", 3)
    mapping = import_pb2.ColumnMapping()
    mapping.CopyFrom(COLUMNS)
    mapping.item_id_column = "whta"
    with pytest.raises(grpc.RpcError) as failure:
        begin(importing, "views.csv", mapping=mapping)
    assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "Did you mean 'what'?" in failure.value.details()
    with pytest.raises(grpc.RpcError) as failure:
        begin(importing, "views.csv", mapping=import_pb2.ColumnMapping(user_id_column="who"))
    assert "source.mapping.occurred_at_column is required" in failure.value.details()


def test_the_same_request_id_is_the_same_import(importing: Shop) -> None:
    views(importing.imports / "views.csv", 3)
    first, again = begin(importing, "views.csv", "nightly"), begin(importing, "views.csv", "nightly")
    assert first.import_id == again.import_id != begin(importing, "views.csv").import_id


def test_imports_are_listed_from_the_newest_page_by_page(importing: Shop) -> None:
    views(importing.imports / "views.csv", 3)
    begun = [begin(importing, "views.csv").import_id for _ in range(5)]
    listed, token = [], ""
    while True:
        page = importing.stub.ListImports(
            feedback_service_pb2.ListImportsRequest(page_size=2, page_token=token), timeout=10
        )
        listed += [one.import_id for one in page.imports]
        if not (token := page.next_page_token):
            break
    assert listed == begun[::-1]
    unknown = feedback_service_pb2.GetImportRequest(import_id="nobody's")
    with pytest.raises(grpc.RpcError) as failure:
        importing.stub.GetImport(unknown, timeout=10)
    assert failure.value.code() is grpc.StatusCode.NOT_FOUND


def test_a_cancelled_import_keeps_what_was_stored_and_stores_no_more(shop: Shop) -> None:
    shop.imports.mkdir()
    views(shop.imports / "views.csv", 3)
    waiting = begin(shop, "views.csv")
    request = feedback_service_pb2.CancelImportRequest(import_id=waiting.import_id)
    assert shop.stub.CancelImport(request, timeout=10).state == import_pb2.IMPORT_STATE_CANCELLED
    shop.feedback.start()
    other = finished(shop, begin(shop, "views.csv"))
    assert counts(other) == (3, 0, 0, 0)
    assert shop.stub.CancelImport(request, timeout=10).state == import_pb2.IMPORT_STATE_CANCELLED
    late = feedback_service_pb2.CancelImportRequest(import_id=other.import_id)
    assert shop.stub.CancelImport(late, timeout=10).state == import_pb2.IMPORT_STATE_SUCCEEDED


def test_an_import_that_runs_can_be_cancelled(importing: Shop) -> None:
    views(importing.imports / "views.csv", 40_000)
    one = begin(importing, "views.csv")
    eventually(lambda: importing.count() > 0, 30)
    request = feedback_service_pb2.CancelImportRequest(import_id=one.import_id)
    importing.stub.CancelImport(request, timeout=10)
    last = finished(importing, one)
    assert last.state == import_pb2.IMPORT_STATE_CANCELLED
    assert 0 < importing.count() < 40_000


def test_a_file_that_changes_in_the_middle_is_not_gone_on_with(shop: Shop) -> None:
    shop.imports.mkdir()
    views(shop.imports / "views.csv", 30)
    one = begin(shop, "views.csv")
    shop.sql("UPDATE feedback.imports SET state = 2, settled_events = 10, file_digest = '\\x00'")
    shop.feedback.start()
    last = finished(shop, one)
    assert last.state == import_pb2.IMPORT_STATE_FAILED
    assert "Import it again" in last.failure
