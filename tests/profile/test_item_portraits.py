"""The portrait of an item: counts worked by hand, and vectors by which an item nobody touched has neighbours."""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from datetime import UTC, datetime, timedelta

import grpc
import numpy as np
import pytest
from shopkeeper.profile.v1 import catalog_service_pb2 as pb
from shopkeeper.profile.v1 import item_pb2, item_portrait_pb2

from services.profile.domain.content_vectors import N_GRAMS, NgramEncoder, fuse, ngram_counts, unit
from services.profile.domain.item_figures import Baskets
from shared import grpc_status
from shared.errors import NotFound
from shared.event_kinds import EventKind
from tests.profile.conftest import Shop, eventually, item


def portrait(shop: Shop, item_id: str) -> item_portrait_pb2.ItemPortrait:
    return shop.catalog.GetItemPortrait(pb.GetItemPortraitRequest(item_id=item_id), timeout=20)


def upsert(shop: Shop, *items: item_pb2.Item) -> None:
    results = shop.catalog.UpsertItems(pb.UpsertItemsRequest(items=items)).results
    assert all(result.status == pb.ITEM_WRITE_STATUS_STORED for result in results)
    eventually(lambda: shop.service.catalogue.has(items[-1].item_id), "the catalogue")


def test_the_portrait_of_an_item_worked_by_hand(shop: Shop) -> None:
    upsert(
        shop,
        item("boot", title="Red winter boot", category_path=["Shoes"], brand="Acme", price_micros=80, currency_code="EUR",
             rating_count=30, rating_mean=4.5),
        item("shoe", title="Red winter shoe", category_path=["Shoes"], brand="Acme", price_micros=40, currency_code="EUR"),
        item("tea", title="Green tea", category_path=["Food"], rating_count=10, rating_mean=2.5),
    )  # fmt: skip
    # Fresh events: nothing has decayed yet, to a thousandth.
    now = datetime.now(UTC)
    for number in range(8):
        shop.log.record("ann", EventKind.ITEM_VIEW, "boot", at=now - timedelta(seconds=number))
    for _ in range(2):
        shop.log.record("ann", EventKind.ITEM_VIEW, "shoe", at=now)
    shop.log.record("ann", EventKind.PURCHASE, lines=[("boot", 1, 80), ("shoe", 1, 40)], at=now)
    shop.log.record("bob", EventKind.PURCHASE, lines=[("boot", 1, 80), ("tea", 1, 4)], at=now)
    shop.log.record("bob", EventKind.RETURN, lines=[("boot", 1, 80)], at=now)
    shop.log.record("cid", EventKind.ITEM_VIEW, "boot", at=now - timedelta(days=30))

    boot = portrait(shop, "boot")

    # 8 views and one of 30 days ago, which counts half; 2 purchases at 5 each.
    assert boot.popularity.value == pytest.approx(8 + 0.5 + 2 * 5, rel=1e-3)
    assert boot.popularity.evidence_count == 11
    assert boot.popularity_half_life_days == 30.0
    # The shelf: 3 purchases of 11 views, worth 50 views.
    assert boot.conversion_rate.value == pytest.approx((2 + 50 * 3 / 11) / (9 + 50))
    assert boot.conversion_rate.evidence_count == 9
    # The shop: 1 of 4 lines came back, worth 20 lines.
    assert boot.return_rate.value == pytest.approx((1 + 20 * 0.25) / (2 + 20))
    # The shop's mean, 4, worth ten ratings.
    assert boot.rating.value == pytest.approx((30 * 4.5 + 10 * 4.0) / 40)
    assert boot.price_percentile.value == pytest.approx((1 + 2) / 2 / 2)
    # Boot is in 2 orders, each other in 1, of which 1 with it.
    assert [(n.item_id, n.evidence_count) for n in boot.co_purchased] == [("shoe", 1), ("tea", 1)]
    assert boot.co_purchased[0].score == pytest.approx(1 / math.sqrt(2 * 1))
    assert boot.similar[0].item_id == "shoe"
    assert len(boot.text_vector.values) >= 1
    assert np.linalg.norm(boot.fused_vector.values) == pytest.approx(1.0, abs=1e-5)
    assert not boot.HasField("image_vector")


def test_an_item_that_nobody_touched_has_defaults_and_neighbours(shop: Shop) -> None:
    upsert(
        shop,
        item("a", title="红色冬靴 女款"),
        item("b", title="女款 红色靴子"),
        item("c", title="绿茶 一百克"),
        item_pb2.Item(item_id="blank"),
    )
    cold = portrait(shop, "a")

    assert (cold.popularity.value, cold.popularity.evidence_count) == (0.0, 0)
    assert (cold.conversion_rate.value, cold.return_rate.value) == (0.0, 0.0)
    assert (cold.rating.value, cold.rating.evidence_count) == (3.0, 0)
    assert (cold.price_percentile.value, cold.price_percentile.evidence_count) == (0.5, 0)
    assert cold.similar[0].item_id == "b"
    assert list(cold.co_purchased) == []
    blank = portrait(shop, "blank")
    assert not blank.HasField("text_vector")
    assert not blank.HasField("fused_vector")
    assert list(blank.similar) == []
    # One that came after the last look at all items is known as soon as it is asked for.
    upsert(shop, item("d", title="红色冬靴"))
    assert portrait(shop, "d").similar[0].item_id == "a"


def test_an_item_that_is_not_there_has_no_portrait(shop: Shop) -> None:
    upsert(shop, item("gone"))
    shop.catalog.DeleteItems(pb.DeleteItemsRequest(item_ids=["gone"]))
    eventually(lambda: not shop.service.catalogue.has("gone"), "the deletion")
    for item_id in ("gone", "never"):
        with pytest.raises(grpc.RpcError) as failure:
            portrait(shop, item_id)
        assert isinstance(grpc_status.from_rpc_error(failure.value), NotFound)


def test_hashed_n_grams_are_those_of_a_naive_count() -> None:
    texts = ["Green  Tea", "green tea green", "", "绿茶", "a", "\u212bngstr\u00f6m"]
    counts = ngram_counts(texts)
    seen: dict[str, int] = {}
    for row, text in enumerate(texts):
        words = unicodedata.normalize("NFKC", text).lower().split()
        normal = " " + " ".join(words) + " " if words else ""
        naive = Counter(normal[at : at + n] for n in N_GRAMS for at in range(len(normal) - n + 1))
        got = counts[row]
        assert got.nnz == len(naive)
        assert sorted(np.round(np.exp(got.data - 1.0), 4).tolist()) == sorted(map(float, naive.values()))
        seen |= naive
    assert (counts[0] - counts[0]).nnz == 0
    assert counts[0, counts[1].indices].nnz >= len("green tea")


def test_equal_texts_have_equal_vectors_and_the_fit_keeps_cosines() -> None:
    rng = np.random.default_rng(1)
    words = ["red", "green", "boot", "shoe", "tea", "cup", "winter", "summer", "wool", "silk"]
    texts = [" ".join(rng.choice(words, 4)) for _ in range(300)]
    encoder = NgramEncoder.fit(texts)
    again = NgramEncoder.fit(texts)
    assert encoder.version == again.version
    vectors = encoder.encode(texts)
    assert np.array_equal(vectors, again.encode(texts))
    assert np.array_equal(encoder.encode(texts[:1])[0], vectors[0])
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1.0, abs=1e-5)
    weighted = ngram_counts(texts).multiply(encoder.idf_B).toarray()
    exact = unit(weighted.astype(np.float32)) @ unit(weighted.astype(np.float32)).T
    # A projection to few components keeps who is near whom.
    correlation = np.corrcoef(exact.ravel(), (vectors @ vectors.T).ravel())[0, 1]
    assert correlation > 0.95


def test_a_fused_cosine_is_the_weighted_mean_of_its_parts() -> None:
    rng = np.random.default_rng(4)
    one, other = unit(rng.normal(size=(5, 3))), unit(rng.normal(size=(5, 4)))
    other[4] = 0.0
    fused = fuse([(one, 0.7), (other, 0.3)])
    assert (fused @ fused.T)[0, 1] == pytest.approx(
        0.7 * one[0] @ one[1] + 0.3 * other[0] @ other[1], abs=1e-6
    )
    assert np.linalg.norm(fused, axis=1) == pytest.approx(1.0, abs=1e-6)


def test_neighbours_are_those_of_a_naive_count() -> None:
    rng = np.random.default_rng(9)
    orders, items = rng.integers(0, 40, 300), rng.integers(0, 12, 300)
    ids = [f"item-{n:02}" for n in range(12)]
    baskets = Baskets.of(orders, items, ids)
    sets = [{int(i) for i in items[orders == order]} for order in range(40)]
    for number, item_id in enumerate(ids):
        own = [basket for basket in sets if number in basket]
        naive = []
        for other in set().union(*own) - {number} if own else set():
            both = sum(other in basket for basket in own)
            total = sum(other in basket for basket in sets)
            naive.append((-both / math.sqrt(len(own) * total), ids[other], both))
        got = [(-n.score, n.item_id, n.evidence_count) for n in baskets.neighbours(item_id)]
        assert [(round(s, 9), i, e) for s, i, e in got] == sorted((round(s, 9), i, e) for s, i, e in naive)
    assert baskets.neighbours("unknown") == []
