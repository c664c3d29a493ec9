"""Items as vectors: at once without encoders, better with them, and nothing is encoded twice."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shopkeeper.profile.v1 import catalog_service_pb2 as pb
from shopkeeper.profile.v1 import item_pb2, item_portrait_pb2

from services.profile.__main__ import Profile, export_vectors
from services.profile.clients.encoders import (
    E5TextEncoder,
    EfficientNetImageEncoder,
    decoded,
    read_checkpoint,
    text_encoder,
)
from services.profile.domain import efficientnet_lite
from services.profile.domain.content_space import Amounts, Contents, ContentSpace, Projection, fused
from services.profile.domain.content_vectors import unit
from services.profile.settings import ProfileSettings
from shared.errors import FailedPrecondition
from tests.profile.conftest import Shop, eventually, item

CHINESE = item("dress-zh", title="红色连衣裙 夏季女装", brand="Anna")
ENGLISH = item("dress-en", title="A red summer dress for women", brand="Berta")
DRILL = item("drill", title="Cordless drill, 18 V, with two batteries", brand="Carl")


def picture(colour: tuple[int, int, int], kind: str = "PNG", size: tuple[int, int] = (40, 60)) -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    Image.new("RGB", size, colour).save(stream, kind)
    return stream.getvalue()


def upsert(shop: Shop, *items: item_pb2.Item) -> None:
    answer = shop.catalog.UpsertItems(pb.UpsertItemsRequest(items=items), timeout=20)
    assert all(result.status == pb.ITEM_WRITE_STATUS_STORED for result in answer.results)


def portrait(shop: Shop, item_id: str) -> item_portrait_pb2.ItemPortrait:
    eventually(lambda: shop.service.catalogue.has(item_id), f"{item_id} in memory")
    return shop.catalog.GetItemPortrait(pb.GetItemPortraitRequest(item_id=item_id), timeout=20)


class Watcher:
    """What a client of WatchItems holds."""

    def __init__(self, shop: Shop, resume_token: bytes = b"", with_vectors: bool = True) -> None:
        self.vectors: dict[str, np.ndarray] = {}
        self.items: set[str] = set()
        self.version = ""
        self.complete = threading.Event()
        self.orphans: list[str] = []
        request = pb.WatchItemsRequest(with_vectors=with_vectors, resume_token=resume_token)
        self.stream = shop.catalog.WatchItems(request)
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        try:
            for message in self.stream:
                self.items.update(one.item_id for one in message.upserted)
                if message.vectors and message.vector_version != self.version:
                    self.vectors.clear()
                    self.version = message.vector_version
                for one in message.vectors:
                    if one.item_id not in self.items:
                        self.orphans.append(one.item_id)
                    self.vectors[one.item_id] = np.array(one.values, np.float32)
                if message.snapshot_complete:
                    self.complete.set()
        except Exception:
            return


class Counting:
    """A real encoder, whose calls are counted."""

    def __init__(self, encoder: Any) -> None:
        self._encoder = encoder
        self.model, self.dimension = encoder.model, encoder.dimension
        self.encoded: list[Any] = []

    def encode(self, contents: Sequence[Any]) -> Any:
        self.encoded += contents
        return self._encoder.encode(contents)


@pytest.fixture
def encoding_shop(
    log: Any, start_profile: Callable[..., tuple[Profile, Any]], monkeypatch: pytest.MonkeyPatch
) -> Callable[[], tuple[Shop, Counting, Counting]]:
    """Returns a function that starts a replica with both encoders, whose calls are counted."""

    def start() -> tuple[Shop, Counting, Counting]:
        texts, pictures = Counting(E5TextEncoder()), Counting(EfficientNetImageEncoder())
        monkeypatch.setattr("services.profile.__main__.text_encoder", lambda _name: texts)
        monkeypatch.setattr("services.profile.__main__.image_encoder", lambda _name: pictures)
        service, channel = start_profile()
        eventually(lambda: service.readiness()[0], "readiness")
        return Shop(service, channel, log), texts, pictures

    return start


# Without encoders


def test_a_new_item_is_streamed_with_its_vector_at_once_and_compares_with_the_others(shop: Shop) -> None:
    upsert(shop, *(item(f"tea-{n}", title=f"Green tea number {n}", brand="Leaf") for n in range(30)),
           *(item(f"drill-{n}", title=f"Cordless drill model {n}", brand="Bolt") for n in range(30)))  # fmt: skip
    watcher = Watcher(shop)
    assert watcher.complete.wait(20)
    eventually(lambda: len(watcher.vectors) == 60, "the vectors of all items")
    upsert(shop, item("tea-new", title="Green tea of the new harvest", brand="Leaf"))
    eventually(lambda: "tea-new" in watcher.vectors, "the vector of the new item")

    scores = {other: float(v @ watcher.vectors["tea-new"]) for other, v in watcher.vectors.items()}
    nearest = sorted(scores, key=lambda other: -scores[other])[1:11]
    assert all(other.startswith("tea") for other in nearest)
    assert watcher.orphans == [], "a vector comes after its item"
    assert np.linalg.norm(watcher.vectors["tea-new"]) == pytest.approx(1.0, abs=1e-5)
    watcher.stream.cancel()


def test_a_watcher_that_does_not_ask_gets_no_vectors(shop: Shop) -> None:
    upsert(shop, CHINESE, DRILL)
    asked, plain = Watcher(shop), Watcher(shop, with_vectors=False)
    eventually(lambda: len(asked.vectors) == 2 and len(plain.items) == 2)
    upsert(shop, ENGLISH)
    eventually(lambda: "dress-en" in asked.vectors and "dress-en" in plain.items)
    assert plain.vectors == {}
    for watcher in (asked, plain):
        watcher.stream.cancel()


def test_two_replicas_fuse_in_one_space(
    shop: Shop, start_profile: Callable[..., tuple[Profile, Any]]
) -> None:
    upsert(shop, CHINESE, ENGLISH, DRILL)
    service, channel = start_profile()
    eventually(lambda: service.readiness()[0], "readiness")
    watchers = [Watcher(shop), Watcher(Shop(service, channel, shop.log))]

    def agree() -> bool:
        one, other = watchers
        return (
            one.version == other.version
            and one.vectors.keys() == other.vectors.keys() == {"dress-zh", "dress-en", "drill"}
            and all(np.array_equal(one.vectors[key], other.vectors[key]) for key in one.vectors)
        )

    eventually(agree, "agreement of two replicas")
    for watcher in watchers:
        watcher.stream.cancel()


def test_a_deleted_item_is_nobodys_neighbour(shop: Shop) -> None:
    upsert(shop, CHINESE, ENGLISH, DRILL)
    eventually(lambda: len(portrait(shop, "drill").fused_vector.values))
    watcher = Watcher(shop)
    eventually(lambda: len(watcher.vectors) == 3)
    watcher.stream.cancel()
    shop.catalog.DeleteItems(pb.DeleteItemsRequest(item_ids=["dress-en"]), timeout=20)
    eventually(lambda: "dress-en" not in {n.item_id for n in portrait(shop, "drill").similar})


def test_the_vectors_of_all_items_are_written_for_a_training_run(
    shop: Shop, database_url: str, keys_dir: Path, tmp_path: Path
) -> None:
    upsert(shop, CHINESE, ENGLISH, DRILL)
    watcher = Watcher(shop)
    eventually(lambda: len(watcher.vectors) == 3)
    settings = ProfileSettings(database_url=database_url, keys=keys_dir)
    assert export_vectors(settings, tmp_path / "items.npz") == 3
    with np.load(tmp_path / "items.npz", allow_pickle=False) as written:
        exported = dict(zip(written["item_ids"].tolist(), written["vectors"], strict=True))
    assert exported.keys() == watcher.vectors.keys()
    for item_id, vector in watcher.vectors.items():
        assert np.array_equal(exported[item_id], vector)
    watcher.stream.cancel()


# With encoders


def test_a_second_import_of_the_same_contents_encodes_nothing(
    encoding_shop: Callable[[], tuple[Shop, Counting, Counting]],
) -> None:
    shop, texts, pictures = encoding_shop()
    red, blue = picture((250, 10, 10)), picture((10, 10, 250), "JPEG")
    items = [
        item(f"{colour}-{n}", title=f"A {colour} thing, number {n}", image_bytes=bytes_)
        for colour, bytes_ in (("red", red), ("blue", blue)) for n in range(4)
    ]  # fmt: skip
    upsert(shop, *items)
    eventually(lambda: portrait(shop, "blue-3").image_vector.values, "the last picture")
    eventually(lambda: portrait(shop, "red-0").text_vector.model == E5TextEncoder.model, "the first text")
    eventually(lambda: not shop.service.vectors._waiting, "the end of encoding")
    assert len(texts.encoded) == 8
    assert len(pictures.encoded) == 2, "equal pictures are one content"

    # Again, in other items, and by another replica with an encoder of its own.
    again, more_texts, more_pictures = encoding_shop()
    for one in items:
        one.item_id = f"again-{one.item_id}"
        one.price_micros, one.currency_code = 5_000_000, "EUR"
    upsert(again, *items)
    eventually(lambda: portrait(again, "again-blue-3").image_vector.values)
    eventually(lambda: portrait(again, "again-red-0").text_vector.model == E5TextEncoder.model)
    assert (len(texts.encoded), len(pictures.encoded)) == (8, 2)
    assert more_texts.encoded == []
    assert more_pictures.encoded == []


def test_an_encoder_that_is_cut_short_goes_on_where_it_was(
    encoding_shop: Callable[[], tuple[Shop, Counting, Counting]],
) -> None:
    shop, texts, _ = encoding_shop()
    encode, batches = texts.encode, []

    def cut_short(contents: Sequence[str]) -> Any:
        batches.append(len(contents))
        if len(batches) > 1:
            raise RuntimeError("killed")
        return encode(contents)

    texts.encode = cut_short  # type: ignore[method-assign]
    upsert(shop, *(item(f"item-{n}", title=f"The thing with the number {n}") for n in range(20)))
    eventually(lambda: len(batches) > 1, "the second batch")
    shop.service.drain()
    shop.service.close()

    _, more, _ = encoding_shop()
    eventually(lambda: len(set(texts.encoded) | set(more.encoded)) == 20, "the rest")
    assert texts.encoded
    assert not set(texts.encoded) & set(more.encoded), "nothing is encoded twice"


def test_a_title_in_chinese_is_near_the_same_thing_in_english(
    encoding_shop: Callable[[], tuple[Shop, Counting, Counting]],
) -> None:
    shop, _, _ = encoding_shop()
    upsert(
        shop, CHINESE, ENGLISH, DRILL, item("tea", title="绿茶 茶叶 250克"), item("lamp", title="Desk lamp")
    )
    watcher = Watcher(shop)

    def nearest() -> str:
        others = {key: v for key, v in watcher.vectors.items() if key != "dress-zh"}
        own = watcher.vectors.get("dress-zh")
        return "" if own is None or len(others) < 4 else max(others, key=lambda key: float(others[key] @ own))

    eventually(lambda: nearest() == "dress-en", "a neighbour by meaning alone")
    watcher.stream.cancel()


def test_bytes_that_are_no_picture_are_looked_at_once_and_harm_nothing(
    encoding_shop: Callable[[], tuple[Shop, Counting, Counting]],
) -> None:
    shop, _texts, pictures = encoding_shop()
    bad = picture((1, 2, 3), "JPEG")[:200]
    upsert(shop, item("bad", image_bytes=bad), item("good", image_bytes=picture((1, 2, 3))))
    eventually(lambda: portrait(shop, "good").image_vector.values)
    eventually(lambda: len(pictures.encoded) == 2)
    time.sleep(1.5)
    assert len(pictures.encoded) == 2
    assert not portrait(shop, "bad").image_vector.values
    assert portrait(shop, "bad").fused_vector.values


# The encoders


def test_an_encoder_that_is_not_installed_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(FailedPrecondition, match=r"requirements/encoders\.txt") as caught:
        text_encoder("e5")
    assert caught.value.reason == "ENCODER_MISSING"
    assert text_encoder("ngrams") is None


def test_weights_that_are_not_the_known_ones_are_refused() -> None:
    with pytest.raises(FailedPrecondition, match="not those"):
        read_checkpoint(b"\x80\x02cos\nsystem\n", "0" * 64)


def test_weights_that_name_anything_but_tensors_are_refused(tmp_path: Path) -> None:
    import hashlib
    import pickle

    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    content = pickle.dumps(Hostile())
    with pytest.raises(pickle.UnpicklingError, match="no place in weights"):
        read_checkpoint(content, hashlib.sha256(content).hexdigest())
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"\xff\xd8\xff", b"<svg/>", b"GIF89a" + bytes(40), bytes(1000)])
def test_bytes_that_are_no_jpeg_png_or_webp_are_no_picture(content: bytes) -> None:
    assert decoded(content) is None


def test_a_picture_that_says_it_is_enormous_is_not_unpacked() -> None:
    import struct
    import zlib

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    assert decoded(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b"")) is None


@pytest.mark.parametrize(
    ("kernel", "stride", "high", "wide"), [(3, 1, 5, 6), (3, 2, 6, 7), (5, 2, 8, 8), (5, 1, 4, 4)]
)
def test_convolutions_are_those_of_a_loop(kernel: int, stride: int, high: int, wide: int) -> None:
    rng = np.random.default_rng(kernel + stride)
    x = rng.standard_normal((high, wide, 3)).astype(np.float32)
    full = rng.standard_normal((kernel, kernel, 3, 4)).astype(np.float32)
    out_high, out_wide = -(-high // stride), -(-wide // stride)
    above = max(0, (out_high - 1) * stride + kernel - high) // 2
    left = max(0, (out_wide - 1) * stride + kernel - wide) // 2
    expected = np.zeros((out_high, out_wide, 4))
    by_channel = np.zeros((out_high, out_wide, 3))
    for i, j, r, c in np.ndindex(out_high, out_wide, kernel, kernel):
        y, z = i * stride + r - above, j * stride + c - left
        if 0 <= y < high and 0 <= z < wide:
            expected[i, j] += x[y, z] @ full[r, c]
            by_channel[i, j] += x[y, z] * full[r, c, :, 0]

    assert np.allclose(efficientnet_lite.convolve(x, full, stride), expected, atol=1e-4)
    assert np.allclose(efficientnet_lite.convolve_depthwise(x, full[..., 0], stride), by_channel, atol=1e-4)


# The space


def contents(count: int, seed: int = 0) -> Contents:
    rng = np.random.default_rng(seed)
    words = ["red", "blue", "tea", "drill", "dress", "lamp", "茶", "裙"]
    texts = [" ".join(rng.choice(words, 4)) + f" {n}" for n in range(count)]
    traits = [f"brand:{n % 7}" for n in range(count)]
    meaning = unit(rng.standard_normal((count, 384)).astype(np.float32) + 2)
    pictures = unit(rng.standard_normal((count, 1280)).astype(np.float32) + 2)
    pictures[::3] = 0
    return Contents(texts, traits, meaning, pictures)


def test_the_cosine_of_two_items_is_the_weighted_mean_of_their_parts() -> None:
    rng = np.random.default_rng(1)
    parts = [unit(rng.standard_normal((2, size)).astype(np.float32)) for size in (3, 5)]
    one, other = fused(parts, (0.75, 0.25))
    expected = 0.75 * (parts[0][0] @ parts[0][1]) + 0.25 * (parts[1][0] @ parts[1][1])
    assert float(one @ other) == pytest.approx(float(expected), abs=1e-6)


def test_a_space_survives_being_stored() -> None:
    some = contents(40)
    space = ContentSpace.fit(some)
    stored = ContentSpace.of_arrays(space.arrays())
    assert np.array_equal(stored.fuse(some), space.fuse(some))
    assert (stored.version, stored.fitted) == (space.version, Amounts(40, 40, 26))
    assert ContentSpace.fit(some).version == space.version
    assert ContentSpace.fit(contents(40, seed=1)).version != space.version


def test_a_space_fitted_without_encoders_leaves_their_parts_empty() -> None:
    some = contents(10)
    plain = ContentSpace.fit(Contents(some.texts, some.traits))
    _, _, meaning, pictures = plain.parts(some)
    assert not meaning.any()
    assert not pictures.any()
    assert np.allclose(np.linalg.norm(plain.fuse(some), axis=1), 1.0, atol=1e-5)


def test_a_projection_centres_and_leaves_what_is_unknown_at_zero() -> None:
    rng = np.random.default_rng(0)
    vectors = unit(rng.standard_normal((200, 20)).astype(np.float32) * 0.1 + 1)
    projection = Projection.fit(vectors, 8)
    out = projection.apply(np.concatenate([vectors, np.zeros((1, 20), np.float32)]))
    before = float((vectors @ vectors.T)[np.triu_indices(200, 1)].mean())
    after = float((out[:200] @ out[:200].T)[np.triu_indices(200, 1)].mean())
    assert before > 0.9
    assert abs(after) < 0.05
    assert not out[200].any()


def test_a_space_is_fitted_anew_when_there_is_four_times_as_much() -> None:
    assert Amounts(40, 0, 0).outgrows(Amounts(10, 0, 0))
    assert not Amounts(39, 10, 0).outgrows(Amounts(10, 10, 0))
    assert Amounts(10, 1, 0).outgrows(Amounts(10, 0, 0))
