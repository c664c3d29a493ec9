"""Other people's models on a split that `bench_peers` made: runs in a virtual environment of its own.

    python tests/benchmarks/peers.py SPLIT.npz NAME [--epochs N]

Imports nothing of this repository. A line of JSON for every time that it was measured: name, epoch, train_cpu_seconds,
hr@10, ndcg@10 on the test, from the history with the validation event, which is excluded from the answers. What has
epochs learns from the training events; what only counts, from those before the test, as our ladder does.

U = people, I = items, B = people of a batch.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator

import numpy as np
import scipy.sparse

_BATCH = 512


class SplitData:
    """Histories before the test, oldest first, and what came next."""

    def __init__(self, path: str) -> None:
        with np.load(path) as file:
            self.start_U1, self.item_E, self.target_U = file["start_U1"], file["item_E"], file["target_U"]
            self.item_count = int(file["item_count"])
        self.length_U = np.diff(self.start_U1)
        self.user_count = len(self.length_U)
        self.user_E = np.repeat(np.arange(self.user_count), self.length_U)
        last_E = np.zeros(len(self.item_E), bool)
        last_E[self.start_U1[1:][self.length_U > 0] - 1] = True
        # The last event before the test validates.
        self.training_E = ~last_E
        self.seen_UI = self.matrix(np.ones(len(self.item_E), bool))

    def matrix(self, of_E: np.ndarray) -> scipy.sparse.csr_matrix:
        """Returns who touched what, (U, I), binary."""
        touched = scipy.sparse.csr_matrix(
            (np.ones(int(of_E.sum()), np.float32), (self.user_E[of_E], self.item_E[of_E])),
            shape=(self.user_count, self.item_count),
        )
        touched.data[:] = 1.0
        return touched

    def measure(self, score: Callable[[np.ndarray], np.ndarray]) -> dict[str, float]:
        """Returns HR@10 and NDCG@10 over all people with a test; ties count against the model.

        Args:
            score: of every item, (B, I), for people (B,).
        """
        hits = gain = 0.0
        people = np.flatnonzero(self.target_U >= 0)
        for first in range(0, len(people), _BATCH):
            user_B = people[first : first + _BATCH]
            score_BI = np.array(score(user_B), np.float32)
            target_B = self.target_U[user_B]
            wanted_B = score_BI[np.arange(len(user_B)), target_B]
            seen = self.seen_UI[user_B].tocoo()
            score_BI[seen.row, seen.col] = -np.inf
            score_BI[np.arange(len(user_B)), target_B] = -np.inf
            rank_B = 1 + (score_BI >= wanted_B[:, None]).sum(axis=1)
            hits += float((rank_B <= 10).sum())
            gain += float((1 / np.log2(rank_B[rank_B <= 10] + 1)).sum())
        return {"hr@10": round(hits / len(people), 5), "ndcg@10": round(gain / len(people), 5)}


Measured = Iterator[dict[str, float]]


def bm25(split: SplitData, _epochs: int) -> Measured:
    """`implicit`'s item-item model, 200 neighbours."""
    from implicit.nearest_neighbours import BM25Recommender

    before = time.process_time()
    model = BM25Recommender(K=200, num_threads=2)
    model.fit(split.seen_UI, show_progress=False)
    cpu = time.process_time() - before
    similar_II = model.similarity
    yield {
        "epoch": 1,
        "train_cpu_seconds": cpu,
        **split.measure(lambda user_B: (split.seen_UI[user_B] @ similar_II).toarray()),
    }


def als(split: SplitData, epochs: int) -> Measured:
    """`implicit`'s matrix factorisation: 64 factors, weight 40 on what was seen."""
    from implicit.als import AlternatingLeastSquares

    before = time.process_time()
    model = AlternatingLeastSquares(
        factors=64, iterations=epochs, regularization=0.1, alpha=40.0, num_threads=2, random_state=0
    )
    model.fit(split.seen_UI, show_progress=False)
    cpu = time.process_time() - before
    users_UD, items_ID = np.asarray(model.user_factors), np.asarray(model.item_factors)
    yield {
        "epoch": epochs,
        "train_cpu_seconds": cpu,
        **split.measure(lambda user_B: users_UD[user_B] @ items_ID.T),
    }


def rectools_sasrec(split: SplitData, epochs: int) -> Measured:
    """RecTools' SASRec as it comes, with one block of 64 dimensions and the softmax over the catalogue."""
    import pandas as pd
    import torch
    from rectools import Columns
    from rectools.dataset import Dataset
    from rectools.models import SASRecModel

    torch.set_num_threads(2)

    def frame(of_E: np.ndarray) -> pd.DataFrame:
        return pd.DataFrame(
            {
                Columns.User: split.user_E[of_E],
                Columns.Item: split.item_E[of_E],
                Columns.Weight: 1.0,
                # An order is all that the file has.
                Columns.Datetime: pd.Timestamp("2020-01-01")
                + pd.to_timedelta(np.flatnonzero(of_E), unit="min"),
            }
        )

    dataset = Dataset.construct(frame(split.training_E))
    full = Dataset.construct(frame(np.ones(len(split.item_E), bool)))
    people = np.flatnonzero((split.target_U >= 0) & (split.length_U > 0))
    model = SASRecModel(n_factors=64, n_blocks=1, n_heads=1, session_max_len=50, deterministic=False)
    cpu = 0.0
    for epoch in range(1, epochs + 1):
        before = time.process_time()
        model.fit_partial(dataset, min_epochs=1, max_epochs=1)
        cpu += time.process_time() - before
        answers = model.recommend(people, full, k=10, filter_viewed=True, on_unsupported_targets="ignore")
        hit = answers[Columns.Item].to_numpy() == split.target_U[answers[Columns.User].to_numpy()]
        rank = answers[Columns.Rank].to_numpy()[hit]
        everyone = int((split.target_U >= 0).sum())
        yield {
            "epoch": epoch,
            "train_cpu_seconds": cpu,
            "hr@10": round(len(rank) / everyone, 5),
            "ndcg@10": round(float((1 / np.log2(rank + 1)).sum()) / everyone, 5),
        }


def sampled_softmax_sasrec(split: SplitData, epochs: int) -> Measured:
    """SASRec by the recipe of Klenitskiy & Vasilev (RecSys 2023): 50 events, 64 dimensions, 2 blocks, 1 head, dropout .1.

    Batches of 128 people, Adam 1e-3, cross-entropy against 3,000 negatives of a person.
    """
    import torch
    from torch import nn

    torch.manual_seed(0)
    torch.set_num_threads(2)
    generator = np.random.default_rng(0)
    length, width, rate = 50, 64, 0.1

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.norm_fed = nn.LayerNorm(width), nn.LayerNorm(width)
            self.attention = nn.MultiheadAttention(width, 1, rate, batch_first=True)
            self.fed = nn.Sequential(
                nn.Linear(width, width),
                nn.ReLU(),
                nn.Dropout(rate),
                nn.Linear(width, width),
                nn.Dropout(rate),
            )

        def forward(self, x: torch.Tensor, causal: torch.Tensor) -> torch.Tensor:
            query = self.norm(x)
            x = query + self.attention(query, x, x, attn_mask=causal, need_weights=False)[0]
            x = self.norm_fed(x)
            return x + self.fed(x)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.items = nn.Embedding(split.item_count + 1, width, padding_idx=0)
            self.places = nn.Embedding(length, width)
            for table in (self.items, self.places):
                nn.init.xavier_normal_(table.weight)
            self.drop, self.blocks, self.norm = (
                nn.Dropout(rate), nn.ModuleList([Block(), Block()]), nn.LayerNorm(width),
            )  # fmt: skip
            self.register_buffer("causal", torch.triu(torch.ones(length, length, dtype=torch.bool), 1))

        def forward(self, item_BT: torch.Tensor) -> torch.Tensor:
            real = (item_BT > 0)[:, :, None]
            x = (
                self.drop(self.items(item_BT) * width**0.5 + self.places.weight[None, : item_BT.shape[1]])
                * real
            )
            for block in self.blocks:
                x = block(x, self.causal[: x.shape[1], : x.shape[1]]) * real
            return self.norm(x)

    def newest(user_B: np.ndarray, without_last: int) -> np.ndarray:
        rows = np.zeros((len(user_B), length + 1), np.int64)
        for row, user in enumerate(user_B):
            items = split.item_E[split.start_U1[user] : split.start_U1[user + 1] - without_last][
                -length - 1 :
            ]
            # Right-padded: attention is causal, so what follows a history changes nothing.
            rows[row, : len(items)] = items + 1
        return rows

    model = Model()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    learners = np.flatnonzero(split.length_U >= 3)
    cpu = 0.0
    for epoch in range(1, epochs + 1):
        before = time.process_time()
        model.train()
        for user_B in np.array_split(generator.permutation(learners), max(1, len(learners) // 128)):
            # Padded to the longest of the batch, as theirs is.
            longest = min(int(split.length_U[user_B].max()) - 1, length + 1)
            rows = torch.from_numpy(newest(user_B, 1)[:, :longest])
            negative_BN = torch.from_numpy(generator.integers(1, split.item_count + 1, (len(user_B), 3000)))
            query_BTD = model(rows[:, :-1])
            target_BT = rows[:, 1:]
            positive = (query_BTD * model.items(target_BT)).sum(-1, keepdim=True)
            logits = torch.cat([positive, query_BTD @ model.items(negative_BN).transpose(1, 2)], -1)
            wanted = target_BT > 0
            loss = nn.functional.cross_entropy(
                logits[wanted], torch.zeros(int(wanted.sum()), dtype=torch.int64)
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        cpu += time.process_time() - before
        model.eval()

        @torch.no_grad()
        def score(user_B: np.ndarray) -> np.ndarray:
            rows = newest(user_B, 0)
            # The newest `length` of up to one more.
            rows = np.where((rows[:, -1:] > 0), np.roll(rows, -1, axis=1), rows)[:, :length]
            query_BTD = model(torch.from_numpy(rows))
            last_B = np.maximum((rows > 0).sum(axis=1) - 1, 0)
            query_BD = query_BTD[torch.arange(len(rows)), torch.from_numpy(last_B)]
            return (query_BD @ model.items.weight[1:].T).numpy()

        yield {"epoch": epoch, "train_cpu_seconds": cpu, **split.measure(score)}


PEERS: dict[str, Callable[[SplitData, int], Measured]] = {
    "implicit_bm25": bm25,
    "implicit_als": als,
    "sampled_softmax_sasrec": sampled_softmax_sasrec,
    "rectools_sasrec": rectools_sasrec,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("split")
    parser.add_argument("name", choices=PEERS)
    parser.add_argument("--epochs", type=int, default=3)
    arguments = parser.parse_args()
    for line in PEERS[arguments.name](SplitData(arguments.split), arguments.epochs):
        line["train_cpu_seconds"] = round(line["train_cpu_seconds"], 1)
        print(json.dumps({"name": arguments.name, **line}), flush=True)


if __name__ == "__main__":
    main()
