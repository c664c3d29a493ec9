"""After a crash PostgreSQL gives out anew the numbers of transactions of which nothing was on disk: nobody may skip them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest

from services.profile.domain.items import Field, Item, ItemWrite
from services.profile.ports import CatalogueChanges
from services.profile.storage.catalogue import PostgresCatalogue
from services.profile.storage.contents import PostgresContents
from shared.database import Database
from tests.own_postgres import OwnPostgres
from tests.profile.conftest import Log, Shop, eventually
from tests.profile.test_live_profiles import get, item_ids
from tests.profile.test_watch_profiles import Watcher


@pytest.fixture(scope="module")
def own_postgres(postgres_homes: Callable[[], Path]) -> OwnPostgres:
    return OwnPostgres(postgres_homes(), "feedback", "profile")


@pytest.fixture
def database_url(own_postgres: OwnPostgres) -> str:
    return own_postgres.url


@pytest.fixture
def shop(own_postgres: OwnPostgres, keys_dir: Path, start_profile: Callable[..., Any]) -> Iterator[Shop]:
    service, channel = start_profile()
    eventually(lambda: service.readiness()[0], "readiness")
    log = Log(own_postgres.url, keys_dir)
    yield Shop(service, channel, log)
    log.connection.close()


def polls_twice(shop: Shop) -> None:
    """Waits until the service has read the log as it is now."""
    follower = shop.service.follower
    ended = follower._polls_ended
    eventually(lambda: follower._polls_ended >= ended + 2, "two polls")


def test_events_that_reuse_numbers_are_seen_at_once_by_who_has_their_token(
    own_postgres: OwnPostgres, shop: Shop
) -> None:
    shop.log.record("ann", item_id="before")
    eventually(lambda: item_ids(get(shop, "ann")) == ["before"])
    watcher = Watcher(shop)
    eventually(lambda: watcher.watermark)
    with own_postgres.numbers_to_be_reused():
        polls_twice(shop)
    shop.log.connection = psycopg.connect(own_postgres.url, autocommit=True)
    token = shop.log.record("ann", item_id="after")
    assert item_ids(get(shop, "ann", token)) == ["after", "before"]
    eventually(lambda: watcher.history(shop.log.key("ann")) == ["after", "before"])
    # Nothing else changed: a crash is not a reason to begin anew.
    assert watcher.resets == 1
    watcher.stop()
    # Whoever was away meanwhile hears of it too.
    with own_postgres.numbers_to_be_reused():
        polls_twice(shop)
        late = Watcher(shop)
        eventually(lambda: late.watermark)
        late.stop()
    shop.log.connection = psycopg.connect(own_postgres.url, autocommit=True)
    shop.log.record("bob", item_id="missed")
    again = Watcher(shop, resume_watermark=late.watermark)
    eventually(lambda: again.history(shop.log.key("bob")) == ["missed"])
    again.stop()


def last(changes: Iterable[CatalogueChanges]) -> CatalogueChanges:
    return list(changes)[-1]


def test_items_that_reuse_numbers_are_read(own_postgres: OwnPostgres) -> None:
    def write(item_id: str) -> ItemWrite:
        return ItemWrite(0, Item(item_id, title=item_id), frozenset({Field.TITLE}), 1)

    with closing(Database(own_postgres.url, schema="profile", pool_size=2)) as database:
        store = PostgresCatalogue(database)
        store.write([write("before")])
        loaded = last(store.load()).watermark
        with own_postgres.numbers_to_be_reused():
            polled = store.poll(loaded).watermark
            loaded = last(store.load()).watermark
        store.write([write("after")])
        for since in (polled, loaded):
            changes = store.poll(since)
            assert [stored.item.item_id for stored in changes.items] == ["after"]
            assert not since.covers(changes.items[0].xid)
        assert store.poll(changes.watermark).items == ()
        store.close()


def test_vectors_that_reuse_numbers_are_read(own_postgres: OwnPostgres) -> None:
    vector_ND = np.ones((1, 4), np.float32)
    with closing(Database(own_postgres.url, schema="profile", pool_size=2)) as database:
        store = PostgresContents(database)
        store.put_vectors("model", [b"before"], vector_ND)
        with own_postgres.numbers_to_be_reused():
            first = store.new_vectors(None).watermark
            since = store.new_vectors(first).watermark
        store.put_vectors("model", [b"after"], vector_ND)
        assert store.new_vectors(first).digests == [b"after"]
        again = store.new_vectors(since)
        assert again.digests == [b"after"]
        assert not store.new_vectors(again.watermark).digests
