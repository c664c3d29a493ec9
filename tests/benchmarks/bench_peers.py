"""Our model beside other people's, on one split and the same cores: `make bench-peers DATA=DIR`.

DIR is as for `make bench-quality`: the last item of each person is the test, every item competes but those seen before.
The peers (`peers.py`) run in a virtual environment of their own, each in a process. Our Transformer is trained several times with
few or many passes, each along the schedule of its own that a training of that length has: a training that shall end soon lets its rate
fall soon. CPU seconds are of the process while it trains, all threads; validating and measuring are not counted.

The last line is JSON: "peers" (every measurement of each), "ladder" (EASE and item-kNN), "ours" (the Transformer
alone after each training), "time_to_quality" (by peer: what it reached, its seconds, the fewest of ours for as much, the share).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from services.trainer.bench_quality import read_attributes, read_sequences
from services.trainer.domain.hyper_parameters import resolve
from services.trainer.pipeline.baselines import item_item_baselines
from services.trainer.pipeline.budget import Budget
from services.trainer.pipeline.dataset import (
    Cleaning,
    HeldOut,
    Histories,
    clean,
    encode_attributes,
    hold_out,
    leave_one_out,
)
from services.trainer.pipeline.evaluation import (
    ndcg_at_10,
    rank_by_neighbours,
    rank_by_query,
)

_PEERS = Path(__file__).with_name("peers.py")
_EPOCHS = {"implicit_bm25": 1, "implicit_als": 15, "sampled_softmax_sasrec": 4, "rectools_sasrec": 3}
_LIMIT_SECONDS = 1_500


def write_split(path: Path, histories: Histories, test: HeldOut) -> None:
    """Writes what the peers read: histories before the test, and the test."""
    before = histories.without_last(1)
    target_U = np.full(histories.user_count, -1, np.int64)
    target_U[test.user_B] = test.target_B
    np.savez(
        path,
        start_U1=before.start_U1,
        item_E=before.item_E,
        target_U=target_U,
        item_count=histories.item_count,
    )


def measures(rank_B: npt.NDArray[np.int64]) -> dict[str, float]:
    """Returns HR@10 and NDCG@10."""
    return {
        "hr@10": round(float((rank_B <= 10).mean()), 5),
        "ndcg@10": round(float(ndcg_at_10(rank_B).mean()), 5),
    }


def run_peer(python: Path, name: str, split: Path, epochs: int) -> list[dict[str, Any]]:
    """Returns every line that a peer said; what it cannot finish in time is left out."""
    command = [str(python), str(_PEERS), str(split), name, "--epochs", str(epochs)]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    lines = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=sys.stderr, text=True, env=environment, cwd=split.parent
    ) as process:
        assert process.stdout is not None
        watchdog = threading.Timer(_LIMIT_SECONDS, process.kill)
        watchdog.start()
        for line in process.stdout:
            if line.startswith("{"):
                lines.append(json.loads(line))
                print(json.dumps(lines[-1]), file=sys.stderr, flush=True)
        watchdog.cancel()
    if not lines:
        print(f"{name} said nothing.", file=sys.stderr)
    return lines


def train_ours(
    histories: Histories, attributes_of: dict[str, list[str]], seed: int, passes: int
) -> dict[str, Any]:
    """Returns what a training of so many passes took, and what it reached."""
    from services.trainer.pipeline.sequence_model import SequenceModel
    from services.trainer.pipeline.training import train

    size = resolve("small", {"max_epochs": passes})
    split = leave_one_out(histories, exclude_seen=True)
    attributes = encode_attributes(histories.item_ids, attributes_of)
    started = time.process_time()
    model = SequenceModel(histories.item_count, attributes, size, seed)
    validating = 0.0

    def quality(of: HeldOut) -> npt.NDArray[np.int64]:
        return rank_by_query(histories, of, model.encode(histories, of), model.item_vectors(), True)

    def validate() -> float:
        nonlocal validating
        before = time.process_time()
        found = float(ndcg_at_10(quality(split.validation)).mean())
        validating += time.process_time() - before
        return found

    # No limit of time: whole passes, whatever they take.
    train(model, histories.first(split.training_U), validate, lambda _: None, Budget(1e9, 0))
    cpu = time.process_time() - started - validating
    line = {"epoch": passes, "train_cpu_seconds": round(cpu, 1), **measures(quality(split.test))}
    print(json.dumps({"name": "ours", **line}), file=sys.stderr, flush=True)
    return line


def time_to_quality(ours: list[dict[str, Any]], peer: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns, for each measurement of a peer, when ours was as good by HR@10 first, and the share of its seconds."""
    found = []
    for line in peer:
        enough = [own["train_cpu_seconds"] for own in ours if own["hr@10"] >= line["hr@10"]]
        seconds = min(enough, default=None)
        found.append(
            {
                "epoch": line["epoch"],
                "hr@10": line["hr@10"],
                "peer_cpu_seconds": line["train_cpu_seconds"],
                "our_cpu_seconds": seconds,
                "share": None
                if seconds is None
                else round(seconds / max(line["train_cpu_seconds"], 1e-9), 3),
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--python", type=Path, required=True, help="of the virtual environment of the peers")
    parser.add_argument(
        "--peers", nargs="*", default=list(_EPOCHS), metavar="NAME[=EPOCHS]", help=", ".join(_EPOCHS)
    )
    parser.add_argument(
        "--passes", type=int, nargs="*", default=[2, 3, 5, 7, 20], help="of each training of ours"
    )
    parser.add_argument("--no-ladder", action="store_true", help="leaves EASE and item-kNN out")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    events = read_sequences(arguments.data / "sequences.txt").events
    known = read_attributes(arguments.data / "item_attributes.json")
    histories = clean(events, Cleaning(max_user_events=2_000))
    test, validation = hold_out(histories, 1, exclude_seen=True), hold_out(histories, 2, exclude_seen=True)
    said: dict[str, Any] = {"users": len(test), "items": histories.item_count, "peers": {}}
    with tempfile.TemporaryDirectory() as directory:
        split = Path(directory) / "split.npz"
        write_split(split, histories, test)
        for peer in arguments.peers:
            name, _, epochs = peer.partition("=")
            said["peers"][name] = run_peer(
                arguments.python.absolute(), name, split, int(epochs or _EPOCHS[name])
            )
    if not arguments.no_ladder:
        before = time.process_time()
        neighbours = item_item_baselines(
            histories,
            histories.without_last(2),
            histories.without_last(1),
            validation,
            50,
            True,
            full_ladder=True,
        )
        cpu = time.process_time() - before
        said["ladder"] = {
            name: measures(rank_by_neighbours(histories, test, model, True))
            for name, model in neighbours.items()
        }
        said["ladder_cpu_seconds"] = round(cpu, 1)
    said["ours"] = [train_ours(histories, known, arguments.seed, passes) for passes in arguments.passes]
    said["time_to_quality"] = {
        name: time_to_quality(said["ours"], lines) for name, lines in said["peers"].items() if lines
    }
    print(json.dumps(said))


if __name__ == "__main__":
    main()
