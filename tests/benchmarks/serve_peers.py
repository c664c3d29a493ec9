"""Other people's ways to answer "twenty items for this person", one call a person; runs in the peers' environment.

Factors and weights are random: what a call costs does not depend on what was learnt. Prints one line of JSON a peer.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import numpy as np
import scipy.sparse

TOP = 20
EVENTS = 50


def interactions(people: int, items: int) -> scipy.sparse.csr_matrix:
    random = np.random.default_rng(0)
    rows = np.repeat(np.arange(people), EVENTS)
    columns = random.integers(0, items, len(rows))
    return scipy.sparse.csr_matrix((np.ones(len(rows), np.float32), (rows, columns)), (people, items))


def implicit_als(items: int) -> Callable[[int], object]:
    """The person's factors are at hand: what was learnt last night, and no event since."""
    from implicit.cpu.als import AlternatingLeastSquares

    matrix = interactions(1_000, items)
    model = AlternatingLeastSquares(factors=64, num_threads=1)
    random = np.random.default_rng(1)
    model.user_factors = random.normal(size=(1_000, 64)).astype(np.float32)
    model.item_factors = random.normal(size=(items, 64)).astype(np.float32)
    return lambda person: model.recommend(person, matrix[person], N=TOP, filter_already_liked_items=True)


def implicit_als_fold_in(items: int) -> Callable[[int], object]:
    """The person's factors follow from their events at the call, as ours do."""
    from implicit.cpu.als import AlternatingLeastSquares

    matrix = interactions(1_000, items)
    model = AlternatingLeastSquares(factors=64, num_threads=1)
    random = np.random.default_rng(1)
    model.user_factors = random.normal(size=(1_000, 64)).astype(np.float32)
    model.item_factors = random.normal(size=(items, 64)).astype(np.float32)
    return lambda person: model.recommend(
        person, matrix[person], N=TOP, filter_already_liked_items=True, recalculate_user=True
    )


def rectools_sasrec(items: int) -> Callable[[int], object]:
    """RecTools' SASRec, the events of the person at the call; trained for a moment, to be a model at all."""
    import pandas as pd
    import torch
    from rectools import Columns
    from rectools.dataset import Dataset
    from rectools.models import SASRecModel

    torch.set_num_threads(1)
    random = np.random.default_rng(0)
    people = max(40, items // EVENTS + 1)
    # Every item once, or the model would not know it.
    item_E = np.concatenate([random.permutation(items), random.integers(0, items, people * EVENTS - items)])
    frame = pd.DataFrame(
        {
            Columns.User: np.repeat(np.arange(people), EVENTS),
            Columns.Item: item_E,
            Columns.Weight: 1.0,
            Columns.Datetime: pd.Timestamp("2020-01-01")
            + pd.to_timedelta(np.arange(len(item_E)), unit="min"),
        }
    )
    model = SASRecModel(
        n_factors=64, n_blocks=2, n_heads=1, session_max_len=EVENTS, epochs=1, deterministic=False
    )
    model.fit(Dataset.construct(frame))

    def recommend(person: int) -> object:
        # Only whom it is about: the data set of everybody would be copied at every call.
        events = frame.iloc[person % people * EVENTS : (person % people + 1) * EVENTS]
        return model.recommend([person % people], Dataset.construct(events), k=TOP, filter_viewed=True)

    return recommend


PEERS = {
    "implicit_als": implicit_als,
    "implicit_als_fold_in": implicit_als_fold_in,
    "rectools_sasrec": rectools_sasrec,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--items", type=int, required=True)
    parser.add_argument("--requests", type=int, required=True)
    arguments = parser.parse_args()
    for name, make in PEERS.items():
        try:
            answer = make(arguments.items)
            requests = arguments.requests if name != "rectools_sasrec" else max(20, arguments.requests // 20)
            for person in range(5):
                answer(person)
            cpu, wall = time.process_time(), []
            for person in range(requests):
                began = time.perf_counter()
                answer(person % 1_000)
                wall.append(time.perf_counter() - began)
            cpu = time.process_time() - cpu
        except Exception as error:
            print(json.dumps({"name": name, "error": f"{type(error).__name__}: {error}"[:300]}), flush=True)
            continue
        found = {"name": name, "requests": requests, "cpu_ms_per_request": round(1000 * cpu / requests, 3)}
        found["p50_ms"] = round(1000 * float(np.median(wall)), 3)
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
