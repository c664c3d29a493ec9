"""The log and the catalogue, as a run reads them."""

from __future__ import annotations

import itertools
import struct
import subprocess
import sys
from datetime import UTC, datetime

import numpy as np
import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shopkeeper.profile.v1 import catalog_service_pb2, catalog_service_pb2_grpc, item_pb2

from services.trainer.clients import CatalogueClient, bands_of, numbers_of, values_of
from services.trainer.pipeline.copy_decoding import CopyDecoder, KeyNumbers, arrow_keys, row_starts
from services.trainer.pipeline.log_reader import LOG_ERRORS, KeyedEvents, read_keyed_events
from shared.bundle.history import INTEREST_KINDS
from shared.database import Database
from shared.errors import Unimplemented
from shared.tokens import Watermark
from tests.trainer.conftest import walk


def naive_rows(database_url: str) -> list[tuple]:
    """The view, a tuple a row."""
    with psycopg.connect(database_url) as connection:
        return connection.execute(
            "SELECT user_key, item_id, kind, (extract(epoch FROM occurred_at) * 1000000)::bigint, line "
            "FROM feedback.training_events_v1 WHERE kind = ANY(%s)",
            (list(INTEREST_KINDS),),
        ).fetchall()


def read(database_url: str, **choices) -> KeyedEvents:
    database = Database(database_url, schema="trainer")
    try:
        return read_keyed_events(database.conninfo, **choices)
    finally:
        database.close()


def test_the_log_arrives_as_it_was_written_with_the_watermark_of_its_snapshot(record, database_url) -> None:
    histories = walk(users=40, items=12)
    record(histories)
    keyed = read(database_url)
    some = read(database_url, start_time=datetime(2026, 1, 1, 0, 2, tzinfo=UTC))
    events = keyed.events
    found = [
        (bytes(keyed.user_key_U[user]), events.item_ids[item], kind, time, line)
        for user, item, kind, time, line in zip(
            events.user_E, events.item_E, events.kind_E.tolist(), events.time_E.tolist(), events.order_E.tolist(), strict=True
        )
    ]  # fmt: skip
    assert sorted(found) == sorted(naive_rows(database_url))
    assert len(found) == sum(map(len, histories))
    assert list(events.item_ids) == sorted(events.item_ids)
    assert [bytes(key) for key in keyed.user_key_U] == sorted(bytes(key) for key in keyed.user_key_U)
    first = datetime.fromtimestamp(events.time_E.min() / 1e6, UTC)
    assert first == datetime(2026, 1, 1, tzinfo=UTC)
    # Two minutes are cut off: the first two events of everyone.
    assert len(some.events) == len(events) - 2 * len(histories)
    with psycopg.connect(database_url) as connection:
        row = connection.execute("SELECT max(xid)::text FROM feedback.events").fetchone()
    assert row is not None
    assert Watermark.decode(events.watermark).covers(int(row[0]))


def test_an_empty_log_is_no_error_of_reading(record, database_url) -> None:
    assert len(read(database_url).events) == 0


def test_a_log_that_is_not_there_is_an_error_that_says_so(database_url) -> None:
    with pytest.raises(LOG_ERRORS):
        read(
            database_url.replace("postgresql://", "postgresql://nobody-here@", 1)
            if "@" not in database_url
            else database_url + "-gone"
        )


def copied(rows: list[tuple[bytes, int, int, int, bytes]]) -> bytes:
    """What COPY sends of rows (user key, kind, microseconds since 2000, line, item id)."""
    content = b"PGCOPY\n\xff\r\n\x00" + bytes(8)
    for user_key, kind, moment, line, item_id in rows:
        content += (
            struct.pack(">hi16sihiqihi", 5, 16, user_key, 2, kind, 8, moment, 2, line, len(item_id)) + item_id
        )
    return content + b"\xff\xff"


def decoded(content: bytes, pieces: list[int]) -> list[tuple[bytes, int, int, int, bytes]]:
    decoder = CopyDecoder()
    for first, last in itertools.pairwise([0, *pieces, len(content)]):
        decoder.feed(content[first:last])
    return [
        (user, int(kind), int(time) - 946_684_800_000_000, int(line), item.encode())
        for block in decoder.finish()
        for user, kind, time, line, item in zip(
            arrow_keys(block.user_key_E).to_pylist(), block.kind_E, block.time_E, block.line_E, block.item.to_pylist(), strict=True
        )
    ]  # fmt: skip


@pytest.mark.parametrize("rows_at_once", [1, 150, 1000])
def test_people_are_numbered_by_the_order_of_their_keys_over_all_blocks(rows_at_once: int) -> None:
    generator = np.random.default_rng(0)
    random = [generator.bytes(16) for _ in range(50)]
    # Keys that differ in one half alone, and in a byte that a signed comparison would put first.
    alike = [b"\xff" * 8 + bytes([n]) * 8 for n in (0, 255, 127)] + [
        bytes([n]) * 8 + b"\0" * 8 for n in (0, 255)
    ]
    for distinct in (random, random + alike):
        drawn = [distinct[n] for n in generator.integers(0, len(distinct), 400)]
        numbers = KeyNumbers(rows_at_once)
        for first in range(0, 400, 130):
            numbers.add(np.frombuffer(b"".join(drawn[first : first + 130]), "V16"))
        user_E, user_key_U = numbers.finish()
        names = sorted(set(drawn))
        assert [key.tobytes() for key in user_key_U] == names
        assert user_E.tolist() == [names.index(key) for key in drawn]
    nobody_E, nobody_U = KeyNumbers().finish()
    assert (len(nobody_E), len(nobody_U)) == (0, 0)


@given(
    rows=st.lists(
        st.tuples(
            st.binary(min_size=16, max_size=16) | st.just(bytes([0, 5, 0, 0, 0, 16] + [0] * 10)),
            st.integers(0, 20),
            st.integers(-(2**62), 2**62),
            st.integers(0, 300),
            st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=40).map(
                str.encode
            ),
        ),
        max_size=20,
    ),
    cuts=st.lists(st.integers(0, 2000), max_size=6),
)
def test_a_copy_is_decoded_row_for_row_wherever_the_network_cut_it(rows, cuts) -> None:
    content = copied(rows)
    assert decoded(content, sorted(min(cut, len(content)) for cut in cuts)) == rows


def test_a_row_that_looks_like_another_one_s_head_is_walked_over() -> None:
    rows = [(bytes(16), 3, 1, 0, b"first"), (bytes(16), 3, 2, 0, b"second")]
    content = copied(rows)
    # No text of Postgres holds a zero byte: this is the worst that anything could send.
    inside = copied([(bytes(16), 4, 3, 0, b"x")])[19:-2]
    trap = [(bytes(16), 3, 1, 0, inside), *rows]
    assert len(row_starts(np.frombuffer(copied(trap)[19:], np.uint8))[0]) == 3
    assert decoded(content, []) == rows


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PGCOPY",
        b"PGCOPY\n\xff\r\n\x00" + b"\0" * 8 + b"\0\x05" + b"\xff\xff",
        copied([(bytes(16), 3, 1, 0, b"item")])[:-2],
        copied([(bytes(16), 3, 1, 0, b"item")]) + bytes(100),
        copied([(bytes(16), 3, 1, 0, b"item")]).replace(struct.pack(">ih", 2, 3), struct.pack(">ih", -1, 3)),
    ],
)
def test_what_is_no_complete_copy_of_such_rows_is_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match="COPY"):
        decoded(content, [])


def item(item_id: str, **fields: object) -> item_pb2.Item:
    return item_pb2.Item(item_id=item_id, **fields)  # type: ignore[arg-type]


def test_an_item_is_described_by_names_and_not_by_numbers() -> None:
    boots = item(
        "b",
        title="Red Winter Boots, red",
        brand="Acme",
        category_path=["Shoes", "Boots"],
        tags=["new"],
        attributes=[
            item_pb2.Attribute(key="colour", text="red"),
            item_pb2.Attribute(key="weight", number=1.2),
            item_pb2.Attribute(key="vegan", flag=True),
        ],
    )
    assert values_of(boots) == [
        "category:Shoes",
        "category:Shoes > Boots",
        "brand:Acme",
        "tag:new",
        "colour=red",
        "vegan=True",
        "word:boots",
        "word:red",
        "word:winter",
    ]


def test_prices_and_other_numbers_are_told_by_the_tenth_of_the_catalogue_that_they_are_in() -> None:
    boots = item("boots", price_micros=19_990_000, currency_code="EUR", attributes=[
        item_pb2.Attribute(key="weight", number=1.2), item_pb2.Attribute(key="colour", text="red"),
    ])  # fmt: skip
    assert numbers_of(boots) == {"price:EUR": 19.99, "weight": 1.2}
    prices = {f"i{n}": 10.0 ** (n / 10) for n in range(100)}
    bands = bands_of(prices)
    assert [bands[f"i{n}"] for n in (0, 9, 10, 55, 99)] == [0, 0, 1, 5, 9]
    assert set(bands_of(dict.fromkeys(prices, 5.0)).values()) == {9}
    assert bands_of({"a": 1.0, "b": 2.0}) == {}


class PagedCatalogue(catalog_service_pb2_grpc.CatalogServiceServicer):
    def ListItems(self, request, context):
        first = int(request.page_token or 0)
        return catalog_service_pb2.ListItemsResponse(
            items=[
                item(f"i{n}", brand="x", price_micros=n * 1_000_000, currency_code="EUR")
                for n in range(5 * first, 5 * first + 5)
            ],
            next_page_token=str(first + 1) if first < 4 else "",
        )


class NoCatalogue(catalog_service_pb2_grpc.CatalogServiceServicer):
    def ListItems(self, request, context):
        raise Unimplemented("NOT_BUILT_YET", "there is none")


@pytest.mark.parametrize(("servicer", "items"), [(PagedCatalogue(), 25), (NoCatalogue(), 0)])
def test_the_catalogue_is_read_to_its_end_or_done_without(serve, servicer, items: int) -> None:
    channel = serve(
        lambda server: catalog_service_pb2_grpc.add_CatalogServiceServicer_to_server(servicer, server)
    )
    client = CatalogueClient("127.0.0.1:9", timeout_seconds=5)
    client._stub = catalog_service_pb2_grpc.CatalogServiceStub(channel)
    attributes, why_none = client.attributes()
    client.close()
    assert len(attributes) == items
    assert bool(why_none) == (items == 0)
    if items:
        # Bands are of the whole catalogue, not of a page.
        assert attributes["i3"] == ["brand:x", "price:EUR~1"]
        assert attributes["i24"] == ["brand:x", "price:EUR~9"]


def test_the_server_never_loads_tensorflow() -> None:
    code = "import services.trainer.__main__, sys; print([m for m in sys.modules if m in ('tensorflow', 'keras', 'matplotlib')])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_the_same_seed_gives_the_same_weights_and_they_beat_popularity() -> None:
    from services.trainer.domain.hyper_parameters import resolve
    from services.trainer.pipeline.pipeline import train_model
    from services.trainer.pipeline.plan import Plan
    from tests.trainer.conftest import columns_of

    events = columns_of(walk(users=120, items=30))
    attributes = {f"item-{n}": [f"half:{n // 15}"] for n in range(30)}

    def train(seed: int):
        size = resolve("tiny", {"max_epochs": 8, "negatives": 8})
        return train_model(
            events,
            attributes,
            size,
            Plan(refit=False, resamples=100),
            model_name="main",
            seed=seed,
            report=lambda *_, **__: None,
            # A clock that stands still: a slow moment shortens no schedule.
            clock=lambda: 0.0,
        )

    first, again = train(1), train(1)
    np.testing.assert_array_equal(first.arrays["item_vectors"], again.arrays["item_vectors"])
    assert first.manifest_fields["data"]["attributes"] == 2
    ladder = {rung.name: rung.metrics["ndcg@10"] for rung in first.report.ladder}
    assert ladder["transformer"].value > ladder["popularity"].high
    assert first.report.lead_over_popularity.low > 0
