"""Files into the catalogue: every row is taken, or named with its remedy; nothing outside can be reached."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import grpc
import pyarrow as pa
import pyarrow.parquet
import pytest
from shopkeeper.profile.v1 import catalog_service_pb2 as pb
from shopkeeper.profile.v1 import item_import_pb2, item_pb2

from services.profile.converters.item_files import ItemDirectory
from services.profile.domain.item_imports import ItemImport, ItemImportProgress
from services.profile.use_cases.item_imports import RunItemImports
from shared import grpc_status
from shared.errors import InvalidInput, NotFound, Unavailable
from shared.operations import OperationState
from tests.profile.conftest import Log, Shop, eventually

State = item_import_pb2.ItemImportState
NOW_US = 1_800_000_000_000_000


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    directory = tmp_path / "imports"
    directory.mkdir()
    return directory


@pytest.fixture
def importing(log: Log, directory: Path, start_profile: Callable[..., Any]) -> Shop:
    service, channel = start_profile(import_directory=directory)
    eventually(lambda: service.readiness()[0], "readiness")
    return Shop(service, channel, log)


def run(shop: Shop, source_uri: str, **fields: Any) -> item_import_pb2.ItemImport:
    """Imports a file and returns the import's last state."""
    started = shop.catalog.ImportItems(pb.ImportItemsRequest(source_uri=source_uri, **fields), timeout=20)
    states = list(
        shop.catalog.WatchItemImport(pb.WatchItemImportRequest(import_id=started.import_id), timeout=20)
    )
    assert states[-1].state > State.ITEM_IMPORT_STATE_RUNNING
    return states[-1]


def stored(shop: Shop, item_id: str) -> item_pb2.Item:
    found = shop.catalog.GetItem(pb.GetItemRequest(item_id=item_id))
    for output in ("etag", "update_time"):
        found.ClearField(output)
    return found


EXPECTED = item_pb2.Item(
    item_id="tea",
    title="Green tea, 100 g",
    brand="Leaf",
    category_path=["Drinks", "Tea"],
    attributes=[
        item_pb2.Attribute(key="organic", flag=True),
        item_pb2.Attribute(key="grams", number=100.0),
        item_pb2.Attribute(key="code", text="007"),
    ],
    price_micros=3_990_000,
    list_price_micros=5_000_000,
    currency_code="EUR",
    stock_quantity=12,
    tags=["sale", "new"],
)
EXPECTED.available_from.FromDatetime(datetime(2026, 1, 31, 9, tzinfo=UTC))


def write_csv(path: Path) -> list[pb.ItemColumnMapping]:
    path.write_text(
        'SKU,Title,brand,path,price,List Price,stock_quantity,labels,available_from,attributes.organic,attributes.grams,code\n'
        'tea,"Green tea, 100 g",Leaf,Drinks > Tea,3.99,5,12,sale|new,2026-01-31T10:00:00+01:00,true,100,007\n'
    )  # fmt: skip
    return [
        pb.ItemColumnMapping(column="sku", field="item_id"),
        pb.ItemColumnMapping(column="path", field="category_path", separator=">"),
        pb.ItemColumnMapping(column="labels", field="tags", separator="|"),
        pb.ItemColumnMapping(column="code", field="attributes.code"),
    ]


def write_json_lines(path: Path) -> list[pb.ItemColumnMapping]:
    row = {
        "item_id": "tea", "title": "Green tea, 100 g", "brand": "Leaf", "category_path": ["Drinks", "Tea"],
        "price_micros": 3_990_000, "list_price": 5.0, "stock_quantity": 12, "tags": ["sale", "new"],
        "available_from": "2026-01-31T09:00:00Z",
        "attributes": {"organic": True, "grams": 100, "code": "007"}, "unknown": {"a": [1]},
    }  # fmt: skip
    path.write_text(json.dumps(row) + "\n")
    return []


def write_parquet(path: Path) -> list[pb.ItemColumnMapping]:
    table = pa.table(
        {
            "item_id": ["tea"],
            "title": ["Green tea, 100 g"],
            "brand": ["Leaf"],
            "category_path": [["Drinks", "Tea"]],
            "price": pa.array([Decimal("3.99")], pa.decimal128(10, 2)),
            "list_price": [5.0],
            "stock_quantity": pa.array([12], pa.int32()),
            "tags": [["sale", "new"]],
            "available_from": pa.array([datetime(2026, 1, 31, 9, tzinfo=UTC)], pa.timestamp("us", "UTC")),
            "attributes.organic": [True],
            "attributes.grams": [100.0],
            "attributes.code": ["007"],
        }
    )
    pyarrow.parquet.write_table(table, path)
    return []


@pytest.mark.parametrize(
    ("name", "write"),
    [("items.csv", write_csv), ("items.jsonl", write_json_lines), ("items.parquet", write_parquet)],
)
def test_every_format_gives_the_same_item(
    importing: Shop, directory: Path, name: str, write: Callable[[Path], list[pb.ItemColumnMapping]]
) -> None:
    columns = write(directory / name)

    ended = run(importing, name, columns=columns, currency_code="EUR")

    assert ended.state == State.ITEM_IMPORT_STATE_SUCCEEDED, ended
    assert (ended.read_row_count, ended.stored_row_count, ended.rejected_row_count) == (1, 1, 0)
    assert ended.progress == 1.0
    assert ended.source_uri == name
    assert ended.HasField("end_time")
    assert stored(importing, "tea") == EXPECTED


def test_a_bad_row_harms_no_other_and_is_named(importing: Shop, directory: Path) -> None:
    rows = ["item_id,title,price,currency_code,rating_count,rating_mean"]
    rows += [f"item-{n},Item {n},{n}.50,EUR,," for n in range(1, 2101)]
    rows[5] = "item-5,Item 5,five,EUR,,"
    rows[7] = ",Nameless,1,EUR,,"
    rows[9] = "item-9,Item 9,1,euros,,"
    rows[11] = "item-11,Item 11,1,EUR"
    rows[2000] = "item-2000,Item 2000,1,EUR,3,9.5"
    (directory / "items.csv").write_text("\n".join(rows) + "\n")

    ended = run(importing, "items.csv")

    assert ended.state == State.ITEM_IMPORT_STATE_SUCCEEDED
    assert (ended.read_row_count, ended.stored_row_count, ended.rejected_row_count) == (2100, 2095, 5)
    told = {row.row_number: [(v.field, v.description) for v in row.violations] for row in ended.rejected_rows}
    assert told[5] == [("price", "is no number; write 19.99, without a currency sign.")]
    assert told[7][0][0] == "item_id"
    assert told[9][0][0] == "currency_code"
    assert "has 4 values where the header has 6" in told[11][0][1]
    assert told[2000] == [("rating_mean", "is not in [0, 5].")]
    assert stored(importing, "item-2100").price_micros == 2_100_500_000
    with pytest.raises(grpc.RpcError):
        stored(importing, "item-5")


def test_an_older_file_never_overwrites_a_newer_write(importing: Shop, directory: Path) -> None:
    (directory / "items.csv").write_text("item_id,title\ntea,Of the file\ncup,Cup\n")
    importing.catalog.UpsertItems(
        pb.UpsertItemsRequest(items=[item_pb2.Item(item_id="tea", title="Of the shop")])
    )
    request = pb.ImportItemsRequest(source_uri="items.csv")
    request.write_time.FromDatetime(datetime(2026, 1, 1, tzinfo=UTC))

    ended = run(importing, "items.csv", write_time=request.write_time)

    assert (ended.stored_row_count, ended.superseded_row_count) == (1, 1)
    assert stored(importing, "tea").title == "Of the shop"


def test_the_same_request_id_starts_one_import(importing: Shop, directory: Path) -> None:
    (directory / "items.csv").write_text("item_id,title\ntea,Tea\n")
    request = pb.ImportItemsRequest(source_uri="items.csv", request_id="nightly")
    first = importing.catalog.ImportItems(request)
    assert importing.catalog.ImportItems(request).import_id == first.import_id

    ids = [
        importing.catalog.ImportItems(pb.ImportItemsRequest(source_uri="items.csv")).import_id
        for _ in range(4)
    ]
    listed: list[str] = []
    token = ""
    while True:
        page = importing.catalog.ListItemImports(pb.ListItemImportsRequest(page_size=2, page_token=token))
        listed += [one.import_id for one in page.imports]
        token = page.next_page_token
        if not token:
            break
    assert set(listed) == {first.import_id, *ids}
    assert len(listed) == 5
    assert listed[-1] == first.import_id


def test_nothing_outside_of_the_directory_can_be_reached(
    importing: Shop, directory: Path, tmp_path: Path, subtests: pytest.Subtests
) -> None:
    (tmp_path / "secret.csv").write_text("item_id,title\ntea,Tea\n")
    (directory / "link.csv").symlink_to(tmp_path / "secret.csv")
    (directory / "no_id.csv").write_text("sku,title\ntea,Tea\n")
    for source_uri in (
        "../secret.csv", "link.csv", str(tmp_path / "secret.csv"), f"file://{tmp_path}/secret.csv", "missing.csv",
        "~/x.csv", "file://elsewhere/x.csv", "a\x00b", "", ".", "x" * 5000, "no_id.csv",
    ):  # fmt: skip
        with subtests.test(source_uri[:20]), pytest.raises(grpc.RpcError) as failure:
            importing.catalog.ImportItems(pb.ImportItemsRequest(source_uri=source_uri))
        error = grpc_status.from_rpc_error(failure.value)
        assert isinstance(error, InvalidInput), error
        assert error.violations
        assert str(tmp_path) not in error.message
    assert run(importing, f"file://{directory}/no_id.csv", columns=[
        pb.ItemColumnMapping(column="SKU", field="item_id")
    ]).stored_row_count == 1  # fmt: skip


def test_a_mapping_that_cannot_be_names_what_was_meant(importing: Shop, directory: Path) -> None:
    (directory / "items.csv").write_text("item_id,title\ntea,Tea\n")
    for column, field, hint in (("title", "titel", "did you mean title?"), ("titel", "title", "'title'?")):
        with pytest.raises(grpc.RpcError) as failure:
            importing.catalog.ImportItems(
                pb.ImportItemsRequest(
                    source_uri="items.csv", columns=[pb.ItemColumnMapping(column=column, field=field)]
                )
            )
        assert hint in (failure.value.details() or "")


def test_an_unknown_import_is_not_found(importing: Shop) -> None:
    for import_id in ("", "nonsense", "00000000-0000-0000-0000-000000000000"):
        with pytest.raises(grpc.RpcError) as failure:
            importing.catalog.GetItemImport(pb.GetItemImportRequest(import_id=import_id))
        error = grpc_status.from_rpc_error(failure.value)
        assert isinstance(error, NotFound)
        assert error.reason == "IMPORT_NOT_FOUND"


class _Store:
    """Imports in memory: fails or cancels on request."""

    def __init__(self, source: bytes) -> None:
        self.job = ItemImport("1", source, OperationState.PENDING, NOW_US, NOW_US)
        self.checkpoints: list[ItemImportProgress] = []
        self.break_at = self.cancel_at = 10**9
        self.end: tuple[OperationState, str, str] | None = None

    def oldest_unfinished(self) -> ItemImport | None:
        return self.job if self.end is None else None

    def checkpoint(self, import_id: str, progress: ItemImportProgress) -> bool:
        if len(self.checkpoints) == self.break_at:
            self.break_at = 10**9
            raise Unavailable("DATABASE_UNAVAILABLE", "away")
        self.checkpoints.append(progress)
        return len(self.checkpoints) < self.cancel_at

    def finish(self, import_id: str, state: OperationState, reason: str, message: str, now_us: int) -> None:
        self.end = (state, reason, message)


@pytest.fixture
def job(directory: Path, log: Log, start_profile: Callable[..., Any]) -> Callable[[str], Any]:
    service, _ = start_profile()
    files = ItemDirectory(directory, lambda: NOW_US)

    def job(name: str) -> tuple[_Store, RunItemImports]:
        store = _Store(pb.ImportItemsRequest(source_uri=name).SerializeToString())
        runner = RunItemImports(store, files, service.catalogue, lambda: NOW_US, threading.Event())  # type: ignore[arg-type]
        return store, runner

    return job


def test_an_import_that_was_cut_short_ends_as_if_it_had_not_been(job: Any, directory: Path, log: Log) -> None:
    (directory / "items.csv").write_text("item_id\n" + "".join(f"item-{n}\n" for n in range(2500)))
    store, runner = job("items.csv")
    store.break_at = 2
    with pytest.raises(Unavailable):
        runner.run_next()
    count = "SELECT count(*) FROM profile.items"
    assert log.connection.execute(count).fetchone() == (2000,)

    assert runner.run_next()

    assert store.end == (OperationState.SUCCEEDED, "", "")
    assert (store.checkpoints[-1].read_rows, store.checkpoints[-1].stored_rows) == (2500, 2500)
    assert log.connection.execute(count).fetchone() == (2500,)
    assert not runner.run_next()


def test_a_cancelled_import_keeps_what_it_had_stored(job: Any, directory: Path, log: Log) -> None:
    (directory / "items.csv").write_text("item_id\n" + "".join(f"item-{n}\n" for n in range(2500)))
    store, runner = job("items.csv")
    store.cancel_at = 2
    assert runner.run_next()
    assert store.end is not None
    assert store.end[0] == OperationState.CANCELLED
    assert log.connection.execute("SELECT count(*) FROM profile.items").fetchone() == (1000,)


def test_a_file_that_breaks_off_fails_and_says_where(job: Any, directory: Path) -> None:
    import gzip

    rows = "".join(f"item-{n:09},{'ever so long ' * 1000}\n" for n in range(1500))
    whole = gzip.compress(("item_id,description\n" + rows).encode(), 1)
    (directory / "items.csv.gz").write_bytes(whole[: len(whole) - len(whole) // 8])
    store, runner = job("items.csv.gz")
    store.cancel_at = 10**9
    assert runner.run_next()
    assert store.end is not None
    state, reason, message = store.end
    assert (state, reason) == (OperationState.FAILED, "IMPORT_REFUSED")
    assert "items.csv.gz" in message
