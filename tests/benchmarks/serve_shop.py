"""The shop of `bench_serve`: its bundle, its catalogue, and what its shoppers did.

Random vectors in clusters, an untrained Transformer of the trainer's own architecture (where TensorFlow is installed;
else the sum of the history), counted neighbours, records of some 350 bytes.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from shopkeeper.profile.v1 import catalog_service_pb2, item_pb2

from shared.bundle import Registry
from shared.bundle.arrays import encode_arrays
from shared.bundle.ranker import MAX_POSITION, RANKER, RANKER_FORMAT, TASKS, Ranker, RankerWeights
from shared.bundle.ranker_features import FEATURES, STATIC_FEATURES, ItemTable
from shared.bundle.sum_encoder import build_sum_encoder
from shared.bundle.writer import write_bundle
from shared.event_kinds import EventKind
from shared.keys import read_signing_key
from shared.privacy import Pseudonymizer
from tests.recommend.shop import FakeProfile, ProfileServer, point

REPOSITORY = Path(__file__).resolve().parents[2]
DIMENSION = 64
MAX_HISTORY = 64
NEIGHBOURS = 50
LARGE_NEIGHBOURS = 10
LARGE = 50_000
"""Items beyond which a catalogue is searched; its items have 10 neighbours each."""
ATTRIBUTE_RANK = 64
MOST_ATTRIBUTED = 1_000_000
"""Items up to which the bundle has attribute factors, as wide as the trainer's."""
MOST_CATALOGUED = 1_000_000
"""Items beyond which the catalogue describes none: its records alone would be gigabytes."""
EVENTS = 40
SHOPPERS = 200

_TRANSFORMER = """
import sys
from services.trainer.domain.hyper_parameters import HyperParameters
from services.trainer.pipeline.export import convert
from services.trainer.pipeline.transformer import Encoder
import tensorflow as tf
size = HyperParameters(dimension={dimension}, max_history={length})
encoder = Encoder(size)
encoder(tf.zeros((1, size.max_history, size.dimension)), tf.zeros((1, size.max_history), tf.int32),
        tf.ones((1, size.max_history, size.max_history)))
open(sys.argv[1], "wb").write(convert(encoder))
"""


def encoder_of(home: Path) -> tuple[bytes, str]:
    """Returns the encoder's model and what it is."""
    path = home / "encoder.tflite"
    code = _TRANSFORMER.format(dimension=DIMENSION, length=MAX_HISTORY)
    made = subprocess.run(
        [sys.executable, "-c", code, str(path)], cwd=REPOSITORY, capture_output=True, check=False
    )
    if made.returncode == 0:
        return path.read_bytes(), "transformer"
    return build_sum_encoder(MAX_HISTORY, DIMENSION), "sum of the history"


def item_id(number: int) -> str:
    return f"item-{number:07d}"


def random_ranker(items: int) -> Ranker:
    """Returns a second stage of the size that training makes, with an opinion of its own."""
    random = np.random.default_rng(2)
    features, tasks = len(FEATURES), len(TASKS)

    def drawn(*shape: int) -> np.ndarray:
        return (0.1 * random.standard_normal(shape)).astype(np.float32)

    weights = RankerWeights(
        drawn(features), np.full(features, 3, np.float32), drawn(2, features, features), drawn(2, features),
        drawn(features, 32), drawn(32), drawn(32, 16), drawn(16), drawn(features + 16, tasks), drawn(tasks),
        np.zeros(MAX_POSITION, np.float32), np.array([[1, 0]] * tasks, np.float32),
    )  # fmt: skip
    groups_I = random.integers(0, 200, items).astype(np.int32)
    table = ItemTable.of(drawn(items, len(STATIC_FEATURES)), groups_I, groups_I, np.zeros(items, np.int64))
    return Ranker(weights, table)


def publish(home: Path, items: int, ranked: bool = False) -> str:
    """Publishes the bundle; returns what its encoder is."""
    random = np.random.default_rng(1)
    centres = random.normal(size=(max(20, items // 100), DIMENSION)).astype(np.float32)
    vectors_ID = np.empty((items, DIMENSION), np.float32)
    # In pieces: the random numbers of ten million items would take more memory than the items.
    for start in range(0, items, 500_000):
        piece_ND = vectors_ID[start : start + 500_000]
        piece_ND[:] = 0.7 * random.standard_normal(piece_ND.shape, dtype=np.float32)
        piece_ND += centres[random.integers(0, len(centres), len(piece_ND))]
        piece_ND /= 4
    neighbours = NEIGHBOURS if items <= LARGE else LARGE_NEIGHBOURS
    arrays = {
        "item_vectors": vectors_ID,
        "item_bias": np.zeros(items, np.float32),
        "popularity": (1e4 / np.arange(1, items + 1)).astype(np.float32),
    }
    for matrix in ("cooccurrence", "backward"):
        columns_IN = random.integers(0, items, (items, neighbours), dtype=np.int32)
        columns_IN.sort(axis=1)
        arrays[f"{matrix}_indptr"] = np.arange(items + 1, dtype=np.int64) * neighbours
        arrays[f"{matrix}_indices"] = columns_IN.ravel()
        arrays[f"{matrix}_weights"] = random.random(items * neighbours, dtype=np.float32) / neighbours
    if items <= MOST_ATTRIBUTED:
        for factors in ("attribute_queries", "attribute_keys"):
            arrays[factors] = 0.3 * random.standard_normal((items, ATTRIBUTE_RANK), dtype=np.float32)
    encoder_bytes, name = encoder_of(home)
    version = write_bundle(
        Registry(home / "registry"),
        "main",
        arrays=arrays,
        vocabulary=[item_id(number) for number in range(items)],
        encoder_bytes=encoder_bytes,
        manifest_fields={
            "encoder": {"max_history": MAX_HISTORY, "dimension": DIMENSION},
            "scoring": {
                "lambda": 0.5,
                "scale": 30.0,
                "query_decay": 0.6065,
                "window": 50,
                "sequence": 0.9,
                "backward": 0.3,
                "repeat": -0.4,
            },
            "ranker": {"format": RANKER_FORMAT, "features": list(FEATURES), "tasks": list(TASKS)},
        },
        attachments={RANKER: encode_arrays(random_ranker(items).to_arrays())} if ranked else {},
        signing_key=read_signing_key(home / "keys"),
    )
    point(home / "registry", version)
    return name


class BenchProfile(FakeProfile):
    """The stand-in with a catalogue that arrives in parts: one message would be too large."""

    def __init__(self, items: int) -> None:
        super().__init__()
        self._count = items

    def WatchItems(self, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        if not request.resume_token:
            catalogued = self._count if self._count <= MOST_CATALOGUED else 0
            for start in range(0, catalogued, 1000):
                yield catalog_service_pb2.WatchItemsResponse(
                    reset=start == 0,
                    upserted=[record(n) for n in range(start, min(catalogued, start + 1000))],
                )
        while context.is_active() and self._running:
            yield catalog_service_pb2.WatchItemsResponse(snapshot_complete=True, watermark=b"1")
            time.sleep(0.25)


def record(number: int) -> item_pb2.Item:
    """Returns a record of some 350 bytes, as shops have them."""
    item = item_pb2.Item(
        item_id=item_id(number),
        title=f"A thing that people buy, model {number}",
        description="Made of what such things are made of, and described at the length that is usual. " * 2,
        brand=f"brand-{number % 200}",
        category_path=["everything", f"shelf-{number % 30}", f"board-{number % 300}"],
        price_micros=(number % 500 + 1) * 990_000,
        currency_code="EUR",
        stock_quantity=number % 50 + 1,
        rating_mean=4.2,
        rating_count=17,
    )
    item.attributes.add(key="colour", text=("red", "green", "blue")[number % 3])
    item.update_time.FromSeconds(1_750_000_000 + number)
    return item


def history_of(shopper: int, items: int) -> list[tuple[str, EventKind]]:
    """Returns a shopper's events, oldest first."""
    random = np.random.default_rng(1000 + shopper)
    kinds = [EventKind.ITEM_VIEW] * 8 + [EventKind.ADD_TO_CART, EventKind.PURCHASE]
    return [(item_id(int(n)), kinds[k % 10]) for k, n in enumerate(random.zipf(1.3, EVENTS) * 7919 % items)]


def serve_profile(home: Path, items: int) -> None:
    """Serves the stand-in until standard input ends."""
    pseudonymizer = Pseudonymizer.from_directory(home / "keys")
    profile = BenchProfile(items)
    now = time.time()
    for shopper in range(SHOPPERS):
        key = bytes(pseudonymizer.user_key(f"shopper-{shopper}"))
        for age, event in enumerate(history_of(shopper, items)):
            profile.record(key, event, at=now - 3600 + age)
    server = ProfileServer(profile)
    print(server.port, flush=True)
    sys.stdin.read()
    server.kill()
