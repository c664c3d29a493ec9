"""Files become events and items; a bad row is named and harms no other."""

from __future__ import annotations

import gzip
import json
from datetime import datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from shared.event_kinds import EventKind
from shared.importing.batches import EventBatch, ItemRecord
from shared.importing.data_set import DataSet, open_data_set
from shared.importing.problems import ImportRefused

NOW_US = 1_800_000_000_000_000
HEADER = "user_id,item_id,timestamp,event_type,price,currency\n"


def opened(path: Path, mapping: str | Path | None = None) -> DataSet:
    return open_data_set(path, None if mapping is None else str(mapping), NOW_US)


def events_of(data_set: DataSet) -> list[EventBatch]:
    return list(data_set.events())


def ids_of(batches: list[EventBatch]) -> list[str]:
    return [event_id for batch in batches for event_id in batch.event_ids]


def items_of(data_set: DataSet) -> dict[str, ItemRecord]:
    return {record.item_id: record for batch in data_set.items() for record in batch}


def csv_of(tmp_path: Path, *rows: str, name: str = "log.csv", header: str = HEADER) -> Path:
    path = tmp_path / name
    path.write_text(header + "".join(f"{row}\n" for row in rows))
    return path


def problems_of(data_set: DataSet) -> list[str]:
    return [str(sample) for sample in data_set.problems.samples]


# What a good file becomes.


def test_an_event_log_of_the_usual_shape_needs_no_mapping(tmp_path: Path) -> None:
    path = csv_of(
        tmp_path, "u1,a,2026-01-31T10:00:00Z,view,2.50,EUR", "u2,b,2026-01-31T11:00:00+02:00,purchase,3,EUR"
    )
    (batch,) = events_of(opened(path))
    assert batch.user_ids == ["u1", "u2"]
    assert batch.kinds.tolist() == [EventKind.ITEM_VIEW, EventKind.PURCHASE]
    assert batch.item_ids == ["a", "b"]
    assert batch.price_micros.tolist() == [2_500_000, 3_000_000]
    assert batch.occurred_at_us.tolist() == [1_769_853_600_000_000, 1_769_850_000_000_000]


@pytest.mark.parametrize("compressed", [False, True])
def test_csv_json_lines_and_parquet_say_the_same(tmp_path: Path, compressed: bool) -> None:
    rows = [
        {"user_id": "u1", "item_id": "a", "timestamp": "2026-01-31T10:00:00Z", "event_type": "view"},
        {"user_id": "u2", "item_id": "b", "timestamp": "2026-01-31T10:00:01Z", "event_type": "cart"},
    ]
    csv_text = "user_id,item_id,timestamp,event_type\n" + "".join(",".join(r.values()) + "\n" for r in rows)
    json_text = "".join(json.dumps(r) + "\n" for r in rows)
    ids = []
    for name, text in (("x.csv", csv_text), ("x.jsonl", json_text)):
        path = tmp_path / (name + (".gz" if compressed else ""))
        path.write_bytes(gzip.compress(text.encode()) if compressed else text.encode())
        ids.append(ids_of(events_of(opened(path))))
    parquet = tmp_path / "x.parquet"
    pa.parquet.write_table(pa.Table.from_pylist(rows), parquet)
    ids.append(ids_of(events_of(opened(parquet))))
    assert len(ids[0]) == 2
    assert ids[0] == ids[1] == ids[2]


def test_importing_twice_gives_the_same_event_ids(tmp_path: Path) -> None:
    path = csv_of(tmp_path, "u1,a,2026-01-31T10:00:00Z,view,,", "u1,a,2026-01-31T10:00:00Z,view,,")
    first, second = ids_of(events_of(opened(path))), ids_of(events_of(opened(path)))
    assert first == second
    assert len(set(first)) == 2, "two equal rows are two events"
    assert first[1] == f"{first[0]}:1"


def test_identical_rows_are_counted_across_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.importing.readers.ROWS_PER_CHUNK", 2)
    path = tmp_path / "log.jsonl"
    row = json.dumps({"user_id": "u", "item_id": "a", "timestamp": 1_700_000_000})
    path.write_text("\n".join([row] * 5))
    ids = ids_of(events_of(opened(path)))
    assert [event_id.count(":") for event_id in ids] == [1, 2, 2, 2, 2]
    assert len(set(ids)) == 5


@pytest.mark.parametrize(
    ("written", "micros"),
    [
        ("1700000000", 1_700_000_000_000_000),
        ("1700000000123", 1_700_000_000_123_000),
        ("1700000000123456", 1_700_000_000_123_456),
        ("2023-11-14 22:13:20 UTC", 1_700_000_000_000_000),
        ("2023-11-14T22:13:20+00:00", 1_700_000_000_000_000),
    ],
)
def test_times_are_read_in_the_forms_that_logs_use(tmp_path: Path, written: str, micros: int) -> None:
    (batch,) = events_of(opened(csv_of(tmp_path, f"u,a,{written},view,,")))
    assert batch.occurred_at_us.tolist() == [micros]


# An order log: the shape of Online Retail, with made-up rows.

RETAIL_HEADER = "Invoice,StockCode,Description,Quantity,InvoiceDate,Price,Customer ID,Country\n"


def test_the_lines_of_an_invoice_are_one_purchase(tmp_path: Path) -> None:
    path = csv_of(
        tmp_path,
        "1,A1,RED CUP,2,2011-07-01 08:26:00,2.55,17850.0,UK",
        "2,A1,RED CUP,1,2011-07-01 08:27:00,2.95,17851.0,UK",
        "1,B2,BLUE CUP,1,2011-07-01 08:26:00,3.39,17850.0,UK",
        header=RETAIL_HEADER,
    )
    data_set = opened(path)
    assert data_set.mapping.name == "online_retail"
    (batch,) = events_of(data_set)
    assert batch.event_ids == ["online_retail:1:purchase", "online_retail:2:purchase"]
    assert batch.user_ids == ["17850", "17851"]
    assert batch.offsets.tolist() == [0, 2, 3]
    assert batch.item_ids == ["A1", "B2", "A1"]
    assert batch.quantities.tolist() == [2, 1, 1]
    # London is an hour ahead of UTC in July.
    assert (
        batch.occurred_at_us[0]
        == int(datetime.fromisoformat("2011-07-01T07:26:00+00:00").timestamp()) * 1_000_000
    )


def test_a_cancelled_invoice_is_a_return_of_positive_quantities(tmp_path: Path) -> None:
    path = csv_of(tmp_path, "C9,A1,RED CUP,-3,2011-01-04 10:00:00,2.55,17850,UK", header=RETAIL_HEADER)
    (batch,) = events_of(opened(path))
    assert batch.kinds.tolist() == [EventKind.RETURN]
    assert batch.quantities.tolist() == [3]


def test_each_order_of_a_guest_is_a_shopper_of_its_own(tmp_path: Path) -> None:
    path = csv_of(
        tmp_path,
        "1,A1,CUP,1,2011-01-04 10:00:00,2,,UK",
        "2,A1,CUP,1,2011-01-04 10:00:00,2,,UK",
        header=RETAIL_HEADER,
    )
    (batch,) = events_of(opened(path))
    assert batch.user_ids == ["guest:1", "guest:2"]


def test_postage_and_free_lines_are_left_out_and_are_no_errors(tmp_path: Path) -> None:
    path = csv_of(
        tmp_path,
        "1,POST,POSTAGE,1,2011-01-04 10:00:00,18,1,UK",
        "1,A1,damaged,1,2011-01-04 10:00:00,0,1,UK",
        "1,B1,CUP,1,2011-01-04 10:00:00,1,1,UK",
        header=RETAIL_HEADER,
    )
    data_set = opened(path)
    (batch,) = events_of(data_set)
    assert batch.item_ids == ["B1"]
    assert data_set.problems.left_out_rows == 2
    assert data_set.problems.rejected_rows == 0


def test_items_are_derived_from_events_with_commonest_title_and_median_price(tmp_path: Path) -> None:
    rows = [
        f"{n},A1,{title},1,2011-01-04 10:00:00,{price},1,UK"
        for n, (title, price) in enumerate([("RED CUP", 1), ("RED CUP", 2), ("red cup?", 9)])
    ]
    data_set = opened(csv_of(tmp_path, *rows, header=RETAIL_HEADER))
    events_of(data_set)
    item = items_of(data_set)["A1"]
    assert (item.title, item.price_micros, item.currency_code) == ("RED CUP", 2_000_000, "GBP")


def test_an_order_longer_than_the_contract_allows_is_split(tmp_path: Path) -> None:
    rows = [f"1,I{n},CUP,1,2011-01-04 10:00:00,1,1,UK" for n in range(1_200)]
    batches = events_of(opened(csv_of(tmp_path, *rows, header=RETAIL_HEADER)))
    lengths = [int(n) for batch in batches for n in np.diff(batch.offsets)]
    assert lengths == [500, 500, 200]
    assert len(set(ids_of(batches))) == 3


def test_the_price_that_a_float32_column_means_is_the_price_read(tmp_path: Path) -> None:
    path = tmp_path / "events.parquet"
    table = {
        "invoice": ["1"], "stock_code": ["A"], "description": ["CUP"], "quantity": pa.array([1], pa.int32()),
        "ts": pa.array([datetime(2011, 1, 4)], pa.timestamp("ms")), "price": pa.array([165.05], pa.float32()),
        "customer_id": pa.array([7], pa.int32()), "country": ["UK"],
    }  # fmt: skip
    pa.parquet.write_table(pa.table(table), path)
    (batch,) = events_of(opened(path))
    assert batch.price_micros.tolist() == [165_050_000]


# Other shapes.


def test_sequences_get_days_that_keep_their_order_and_end_together(tmp_path: Path) -> None:
    (tmp_path / "sequences.txt").write_text("1 a b c\n2 d e\n")
    (tmp_path / "item_attributes.json").write_text('{"a": [4, 7]}')
    data_set = opened(tmp_path)
    assert data_set.mapping.name == "beauty"
    (batch,) = events_of(data_set)
    times = dict(zip(batch.item_ids, batch.occurred_at_us.tolist(), strict=True))
    day = 86_400 * 1_000_000
    assert times["c"] - times["b"] == times["b"] - times["a"] == day
    assert abs(times["c"] - times["e"]) < day
    assert items_of(data_set)["a"].attributes == {"attributes.4": True, "attributes.7": True}


def test_a_log_without_items_is_of_one_made_up_item(tmp_path: Path) -> None:
    path = tmp_path / "CDNOW_master.txt"
    path.write_text(" 00001 19970101  1   11.77\n 00002 19970112  5   77.00\n")
    data_set = opened(path)
    assert data_set.mapping.name == "cdnow"
    (batch,) = events_of(data_set)
    assert batch.item_ids == ["cd", "cd"]
    assert batch.occurred_at_us[1] - batch.occurred_at_us[0] == 11 * 86_400 * 1_000_000


def test_views_and_clicks_of_the_same_second_are_one_event(tmp_path: Path) -> None:
    header = "user_id,sku_id,ts,model_id,type,cate,br\n"
    path = csv_of(
        tmp_path, "1,9,2016-01-31 15:59:54,,1,8,30", "1,9,2016-01-31 15:59:54,0,6,8,30", "1,9,2016-01-31 16:00:00,,4,8,30",
        name="actions.csv", header=header,
    )  # fmt: skip
    data_set = opened(path)
    assert data_set.mapping.name == "jd_actions"
    (batch,) = events_of(data_set)
    assert batch.kinds.tolist() == [EventKind.ITEM_VIEW, EventKind.PURCHASE]
    assert items_of(data_set)["9"].category_path == ("8",)


def test_thousands_of_sparse_attributes_of_a_json_catalogue_arrive(tmp_path: Path) -> None:
    path = tmp_path / "products.jsonl"
    lines = [
        {
            "id": "1",
            "title": "Lamp",
            "supplier": "Bruma",
            "price": 1999,
            "attr_t_colour": "red",
            "attr_b_led": True,
        },
        {"id": "2", "title": "Bulb", "supplier": "Corvid", "attr_n_watts": 9.5},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    items = items_of(opened(path))
    assert items["1"].attributes == {"colour": "red", "led": True}
    assert items["2"].attributes == {"watts": 9.5}
    assert (items["1"].price_micros, items["1"].currency_code) == (19_990_000, "EUR")


# Bad rows.


@pytest.mark.parametrize(
    ("bad", "field", "told"),
    [
        ("u1,a,yesterday,view,,", "timestamp", "is no date and time"),
        ("u1,a,2027-01-16T00:00:00Z,view,,", "timestamp", "in the future"),
        ("u1,a,1970-01-02T00:00:00Z,view,,", "timestamp", "before the year 2000"),
        ("u1,a,,view,,", "timestamp", "is missing"),
        (",a,2026-01-31T10:00:00Z,view,,", "user_id", "is missing"),
        ("u1,,2026-01-31T10:00:00Z,view,,", "item_id", "is missing"),
        ("u1,a,2026-01-31T10:00:00Z,teleport,,", "event_type", "no kind"),
        ("u1,a,2026-01-31T10:00:00Z,view,cheap,EUR", "price", "is no number"),
        ("u1,a,2026-01-31T10:00:00Z,view,NaN,EUR", "price", "is no number"),
        ("u1,a,2026-01-31T10:00:00Z,view,-4,EUR", "price", "outside"),
        ("u1,a,2026-01-31T10:00:00Z,view,4,euros", "currency", "no currency code"),
        (f"{'u' * 300},a,2026-01-31T10:00:00Z,view,,", "user_id", "longer than 256"),
        ("u1,a\x01b,2026-01-31T10:00:00Z,view,,", "item_id", "control character"),
        ("u1,a,2026-01-31T10:00:00Z,view,,,,too,many", "", "has 9 values where the header has 6"),
    ],
)
def test_a_bad_row_is_named_with_its_field_and_the_rest_goes_in(
    tmp_path: Path, bad: str, field: str, told: str
) -> None:
    good = "u1,a,2026-01-31T10:00:00Z,view,,"
    data_set = opened(csv_of(tmp_path, good, bad, good))
    assert sum(len(batch) for batch in events_of(data_set)) == 2
    assert data_set.problems.rejected_rows == 1
    (sample,) = data_set.problems.samples
    assert (sample.row, sample.field) == (2, field)
    assert told in sample.problem
    assert sample.remedy


def test_rows_after_a_malformed_one_keep_their_numbers(tmp_path: Path) -> None:
    good = "u1,a,2026-01-31T10:00:00Z,view,,"
    data_set = opened(csv_of(tmp_path, good, "too,few", good, "u1,a,never,view,,"))
    events_of(data_set)
    assert [sample.row for sample in data_set.problems.samples] == [2, 4]


def test_a_million_bad_rows_are_counted_and_only_a_few_are_kept(tmp_path: Path) -> None:
    data_set = opened(csv_of(tmp_path, *["u1,a,never,view,,"] * 5_000))
    events_of(data_set)
    assert data_set.problems.rejected_rows == 5_000
    assert len(data_set.problems.samples) <= 5


def test_a_bad_line_of_json_is_named_and_the_rest_goes_in(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    good = json.dumps({"user_id": "u", "item_id": "a", "timestamp": 1_700_000_000})
    path.write_text(f'{good}\n{{"user_id": \n[1, 2]\n{"[" * 5_000}\n{good}\n')
    data_set = opened(path)
    assert sum(len(batch) for batch in events_of(data_set)) == 2
    assert sorted(sample.row for sample in data_set.problems.samples) == [2, 3, 4]


def test_text_that_is_not_utf8_costs_a_note_and_no_row(tmp_path: Path) -> None:
    path = tmp_path / "latin.csv"
    path.write_bytes(RETAIL_HEADER.encode() + b"1,A1,\xa35 CAF\xc9 CUP,1,2011-01-04 10:00:00,2,1,UK\n")
    data_set = opened(path)
    events_of(data_set)
    assert items_of(data_set)["A1"].title == "£5 CAFÉ CUP"
    assert sum(data_set.problems.notes.values()) >= 1


def test_a_damaged_parquet_file_gives_the_rows_before_the_damage(tmp_path: Path) -> None:
    path = tmp_path / "log.parquet"
    rows = 200_000
    table = pa.table({
        "user_id": [f"u{n}" for n in range(rows)], "item_id": [f"i{n * 7919 % 100_003}" for n in range(rows)],
        "timestamp": [1_700_000_000 + n for n in range(rows)],
    })  # fmt: skip
    pa.parquet.write_table(table, path, row_group_size=rows // 4, compression="gzip")
    content = bytearray(path.read_bytes())
    middle = len(content) * 3 // 5
    content[middle : middle + 4_000] = bytes(4_000)
    path.write_bytes(content)
    data_set = opened(path)
    count = sum(len(batch) for batch in events_of(data_set))
    assert 0 < count < rows
    assert any("damaged after row" in text for text in problems_of(data_set))


# Files and mappings that cannot be used.


def refused(path: Path, mapping: str | Path | None = None) -> ImportRefused:
    def import_whole() -> None:
        events_of(opened(path, mapping))

    with pytest.raises(ImportRefused) as caught:
        import_whole()
    return caught.value


def test_a_path_that_does_not_exist_is_named(tmp_path: Path) -> None:
    assert refused(tmp_path / "nowhere").reason == "PATH_MISSING"


def test_an_empty_directory_is_named(tmp_path: Path) -> None:
    assert refused(tmp_path).reason == "PATH_EMPTY"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.parquet", b"this is no parquet"),
        ("x.csv", b""),
        ("x.csv", "user_id,item_id\n".encode("utf-16")),
        ("x.csv.gz", b"this is no gzip"),
        ("x.jsonl", b"[1, 2, 3]"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    error = refused(path)
    assert error.reason == "FILE_UNREADABLE"
    assert name in error.message


def test_a_missing_column_is_named_with_the_nearest_one(tmp_path: Path) -> None:
    path = csv_of(tmp_path, "1", name="actions.csv", header="userid,sku_id,ts,typ,cate\n")
    error = refused(path, "jd_actions")
    assert error.reason == "MAPPING_MISFIT"
    assert "'kind' needs the column 'type'" in error.message
    assert "Did you mean 'typ'?" in error.message


def test_an_unknown_mapping_is_named_with_the_nearest_one(tmp_path: Path) -> None:
    assert "'online_retail'" in refused(csv_of(tmp_path, "x"), "online_retial").message


def test_where_no_mapping_fits_the_way_on_is_shown(tmp_path: Path) -> None:
    error = refused(csv_of(tmp_path, "1,2", header="alpha,beta\n"))
    assert error.reason == "MAPPING_NOT_FOUND"
    assert "--mapping" in error.message


def test_a_mapping_of_ones_own_is_used(tmp_path: Path) -> None:
    mapping = tmp_path / "mine" / "shop.yaml"
    mapping.parent.mkdir()
    mapping.write_text(
        "name: mine\nsources:\n  - role: events\n    files: ['*.csv']\n    timezone: Europe/Berlin\n    kind: wish_list\n"
        "    fields: {user: wer, item: was, time: {column: wann, format: '%d.%m.%Y %H:%M'}}\n"
    )
    path = csv_of(tmp_path, "u;a;24.12.2025 18:00", header="wer;was;wann\n")
    (batch,) = events_of(opened(path, mapping))
    assert batch.kinds.tolist() == [EventKind.WISH_LIST]
    assert batch.occurred_at_us.tolist() == [1_766_595_600_000_000]


def test_a_rating_needs_stars_and_a_search_needs_words(tmp_path: Path) -> None:
    mapping = tmp_path / "m.yaml"
    mapping.write_text(
        "name: m\nsources:\n  - role: events\n    files: ['*.csv']\n    kinds: {rate: rating, look: search}\n"
        "    fields: {user: u, item: i, time: t, kind: k, value: v, query: q}\n"
    )
    at = "2026-01-31T10:00:00Z"
    rows = [
        f"u,a,{at},rate,4.5,",
        f"u,a,{at},rate,9,",
        f"u,a,{at},rate,,",
        f"u,,{at},look,,red lamp",
        f"u,,{at},look,,",
    ]
    data_set = opened(csv_of(tmp_path, *rows, header="u,i,t,k,v,q\n"), mapping)
    (batch,) = events_of(data_set)
    assert batch.kinds.tolist() == [EventKind.RATING, EventKind.SEARCH]
    assert batch.values[0] == 4.5
    assert list(batch.queries) == ["", "red lamp"]
    assert batch.offsets.tolist() == [0, 1, 1], "a search is about no item"
    assert [sample.row for sample in data_set.problems.samples] == [2, 3, 5]


# Real data, where they are.


@pytest.mark.parametrize(
    ("name", "events", "items"),
    [("online_retail", 23_245, 3_921), ("jd_actions", 41_824, 3_568), ("cdnow", 6_919, 1), ("beauty", 198_502, 12_101),
     ("chorus_icecat", 0, 19_406), ("fashion_images", 0, 834)],
)  # fmt: skip
def test_the_shipped_mappings_read_the_real_data_sets_whole(
    test_data: Path, name: str, events: int, items: int
) -> None:
    if not (test_data / name).is_dir():
        pytest.skip(f"{name} is not among the real data")
    data_set = opened(test_data / name)
    assert data_set.mapping.name == name
    batches = events_of(data_set)
    assert sum(len(batch) for batch in batches) == events
    assert len(set(ids_of(batches))) == events
    assert len(items_of(data_set)) == items
    assert data_set.problems.rejected_rows == 0
