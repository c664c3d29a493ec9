"""What the server says is what the trained graph says: TensorFlow on one side, the socket on the other."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from shopkeeper.recommend.v1 import recommend_service_pb2 as pb

from shared.event_kinds import EventKind
from tests.recommend.shop import eventually
from tests.recommend.test_service import MakeShop

REPOSITORY = Path(__file__).resolve().parents[2]

# Runs where TensorFlow may be: in a process of its own. The formula is the naive one, in loops.
EXPORT = """
import sys
import numpy as np
from services.trainer.domain.hyper_parameters import HyperParameters
from services.trainer.pipeline.export import convert, serving_function
from services.trainer.pipeline.transformer import Encoder
from shared.bundle import Companion, CooccurrenceMatrix, History, ScoringParameters, encoder_inputs
from shared.bundle.scoring import naive_blended_scores

generator = np.random.default_rng(3)
size = HyperParameters(dimension=16, max_history=8)
encoder = Encoder(size)
encoder.build()
for weight in encoder.trainable_weights:
    weight.assign(generator.normal(0, 0.3, weight.shape))
vectors = generator.normal(0, 1, (60, 16)).astype(np.float32)
counts = np.where(generator.random((60, 60)) < 0.1, generator.random((60, 60)), 0).astype(np.float32)
def compressed(counts):
    rows, columns = np.nonzero(counts)
    indptr = np.concatenate([[0], np.cumsum((counts > 0).sum(1))]).astype(np.int64)
    return CooccurrenceMatrix(indptr, columns.astype(np.int32), counts[rows, columns])

scoring = ScoringParameters(lambda_=0.7, sequence=0.8, backward=-0.3, repeat=0.4)
factors = generator.normal(0, 1, (2, 60, 5)).astype(np.float32)
companion = Companion(scoring, compressed(counts), compressed(np.ascontiguousarray(counts.T)), *factors)
run = serving_function(encoder)
histories, kinds, expected = [], [], []
for length in (1, 2, 5, 8, 12):
    items = generator.permutation(60)[:length].astype(np.int64)
    kind = generator.choice([3, 4, 6], length).astype(np.int32)
    read = encoder_inputs(History(items, kind), vectors, size.max_history)
    q = run(*(part[None] for part in read))[0].numpy()
    expected.append(naive_blended_scores(vectors, np.zeros(60, np.float32), companion, q, items))
    histories.append(np.pad(items, (12 - length, 0), constant_values=-1))
    kinds.append(np.pad(kind, (12 - length, 0)))
np.savez(sys.argv[1], encoder=np.frombuffer(convert(encoder), np.uint8), vectors=vectors, counts=counts,
         histories=histories, kinds=kinds, expected=expected, **companion.to_arrays())
"""


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    path = tmp_path_factory.mktemp("export") / "export.npz"
    done = subprocess.run(
        [sys.executable, "-c", EXPORT, path], cwd=REPOSITORY, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]
    with np.load(path) as arrays:
        return dict(arrays)


def test_scores_of_the_server_are_those_of_the_graph(
    make_shop: MakeShop, exported: dict[str, np.ndarray]
) -> None:
    shop = make_shop()
    ids = [f"item-{n}" for n in range(60)]
    counts = exported["counts"]
    shop.publish(
        ids,
        exported["vectors"],
        pairs={(ids[i], ids[j]): float(counts[i, j]) for i, j in zip(*np.nonzero(counts), strict=True)},
        lambda_=0.7,
        encoder=exported["encoder"].tobytes(),
        max_history=8,
        further_arrays={
            name: array for name, array in exported.items() if name.startswith(("backward_", "attribute_"))
        },
        further_scoring={"sequence": 0.8, "backward": -0.3, "repeat": 0.4},
    )
    shop.start()
    for n, (history, kinds) in enumerate(zip(exported["histories"], exported["kinds"], strict=True)):
        key, length = shop.user_key(f"user-{n}"), int((history >= 0).sum())
        for place in range(12 - length, 12):
            shop.profile.record(
                key, (ids[history[place]], EventKind(int(kinds[place]))), at=1_750_000_000.0 + place
            )
        request = pb.RecommendRequest(user_id=f"user-{n}", placement="search", page_size=100)
        eventually(
            lambda request=request, length=length: (
                shop.stub.Recommend(request).freshness.events_used == length
            )
        )
        scores = {entry.item_id: entry.score for entry in shop.stub.Recommend(request).items}
        assert len(scores) == 60
        assert [scores[item_id] for item_id in ids] == pytest.approx(list(exported["expected"][n]), abs=2e-5)
