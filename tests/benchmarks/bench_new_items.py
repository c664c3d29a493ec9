"""How long until a new item is a candidate, and a withdrawn one is gone, over the real services.

    make bench-new-items

Feedback, profile and recommend of one process, each behind its own socket, on a PostgreSQL: an item is written by
UpsertItems, and SimilarItems of one that it resembles is asked until the new item is in the answer; then it is
withdrawn, and asked for until it is gone. Times are from before the call of UpsertItems, so they have its own commit in them.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from shopkeeper.profile.v1 import catalog_service_pb2
from shopkeeper.recommend.v1 import recommend_service_pb2 as pb

from shared import embedded_postgres
from shared.database import ensure_database, migrate
from shared.keys import ensure_development_keys
from tests.recommend.shop import eventually, ids, item
from tests.recommend.test_with_real_neighbours import Suite

_WORDS = [
    "green",
    "black",
    "white",
    "herbal",
    "fruit",
    "mountain",
    "valley",
    "leaf",
    "blossom",
    "smoked",
    "roasted",
    "sweet",
    "bitter",
    "fresh",
    "old",
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--items", type=int, default=2_000, help="items of the catalogue beside those of the model"
    )
    parser.add_argument("--rounds", type=int, default=50)
    options = parser.parse_args()
    home = Path(tempfile.mkdtemp(prefix="shopkeeper-bench-"))
    keys = home / "keys"
    ensure_development_keys(keys)
    try:
        url = embedded_postgres.start(home)
        ensure_database(url)
        for service in ("feedback", "profile"):
            migrate(url, service)
        suite = Suite(url, keys, home)
        try:
            found = measure(suite, options.items, options.rounds)
        finally:
            suite.close()
    finally:
        embedded_postgres.stop(home)
    print(json.dumps(found))


def measure(suite: Suite, items: int, rounds: int) -> dict[str, float]:
    """Returns seconds at the 50th and 99th percentile, and the longest, of both ways."""
    random = np.random.default_rng(0)

    def titled(item_id: str, **fields: bool) -> catalog_service_pb2.UpsertItemsRequest:
        title = " ".join(random.choice(_WORDS, 4)) + " tea"
        return catalog_service_pb2.UpsertItemsRequest(items=[item(item_id, title=title, **fields)])

    for first in range(0, items, 500):
        request = catalog_service_pb2.UpsertItemsRequest()
        for n in range(first, min(items, first + 500)):
            request.MergeFrom(titled(f"stock-{n}"))
        request.MergeFrom(titled("tea-1"))
        suite.catalog.UpsertItems(request, timeout=60)
    vectors = suite.recommend.catalog_store.vectors
    eventually(lambda: vectors.current.count >= items, 120.0)
    time.sleep(3.0)

    def until(condition: Callable[[list[str]], bool]) -> None:
        request = pb.SimilarItemsRequest(item_id="tea-1", page_size=100)
        while not condition(ids(suite.stub.SimilarItems(request, timeout=5))):
            time.sleep(0.002)

    came, went = [], []
    for n in range(rounds):
        item_id = f"new-{n}"
        # The words of what it is to resemble: among the first hundred of thousands.
        record = suite.catalog.GetItem(catalog_service_pb2.GetItemRequest(item_id="tea-1"))
        began = time.perf_counter()
        written = item(item_id, title=record.title)
        suite.catalog.UpsertItems(catalog_service_pb2.UpsertItemsRequest(items=[written]), timeout=20)
        until(lambda found, item_id=item_id: item_id in found)
        came.append(time.perf_counter() - began)
        time.sleep(float(random.uniform(0, 0.3)))
        began = time.perf_counter()
        withdrawn = item(item_id, title=record.title, withdrawn=True)
        suite.catalog.UpsertItems(catalog_service_pb2.UpsertItemsRequest(items=[withdrawn]), timeout=20)
        until(lambda found, item_id=item_id: item_id not in found)
        went.append(time.perf_counter() - began)
    figures = {"items": float(items), "rounds": float(rounds)}
    for name, seconds in (("new_item", came), ("withdrawn_item", went)):
        figures[f"{name}_p50_ms"] = round(1000 * float(np.percentile(seconds, 50)), 1)
        figures[f"{name}_p99_ms"] = round(1000 * float(np.percentile(seconds, 99)), 1)
        figures[f"{name}_max_ms"] = round(1000 * max(seconds), 1)
    return figures


if __name__ == "__main__":
    main()
