"""Measures the model on a file of histories, without services.

    python -m services.trainer.bench_quality --data DIR [--topk FILE] [--max-seconds N] [--seed S]

DIR holds sequences.txt (one person a line: `user item item …`, oldest first) and perhaps
item_attributes.json (item id → list of attribute ids). The last line printed is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from services.trainer.domain.hyper_parameters import resolve
from services.trainer.pipeline.dataset import EventColumns
from services.trainer.pipeline.pipeline import Plan, TrainedModel, peak_resident_bytes, train_model
from shared.bundle.history import INTEREST_KINDS

_NAMES = ("hr@5", "hr@10", "hr@20", "ndcg@10")


def read_sequences(path: Path) -> tuple[EventColumns, list[str]]:
    """Returns the events of a file of histories, and the name of each person by number."""
    number_of: dict[str, int] = {}
    names: list[str] = []
    users: list[int] = []
    items: list[int] = []
    places: list[int] = []
    with path.open() as lines:
        for line in lines:
            name, *sequence = line.split()
            users += [len(names)] * len(sequence)
            items += [number_of.setdefault(item, len(number_of)) for item in sequence]
            places += range(len(sequence))
            names.append(name)
    order_E = np.array(places, np.int64)
    # The file has an order and no times.
    return EventColumns(
        user_E=np.array(users, np.int64),
        item_E=np.array(items, np.int32),
        kind_E=np.full(len(users), INTEREST_KINDS[0], np.int32),
        time_E=np.zeros(len(users), np.int64),
        order_E=order_E,
        item_ids=list(number_of),
    ), names


def write_topk(path: Path, trained: TrainedModel, names: list[str]) -> None:
    """Writes one line a person: `user item1 … item20`, the blend's answer."""
    with path.open("w") as file:
        for row, user in enumerate(trained.tested.user_B.tolist()):
            items = [trained.vocabulary[item] for item in trained.best_B20[row].tolist() if item >= 0]
            file.write(" ".join([names[trained.histories.user_U[user]], *items]) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--topk", type=Path)
    parser.add_argument("--max-seconds", type=int, default=600)
    parser.add_argument("--size", default="small")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--short-ladder",
        action="store_true",
        help="leave out the baselines that take long (EASE, founding model)",
    )
    parser.add_argument(
        "--refit",
        action="store_true",
        help="learn from the validation events too before measuring: another protocol than the published tables'",
    )
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    arguments = parser.parse_args()

    events, names = read_sequences(arguments.data / "sequences.txt")
    attributes_path = arguments.data / "item_attributes.json"
    attributes = json.loads(attributes_path.read_text()) if attributes_path.exists() else {}
    overrides: dict[str, Any] = {"max_train_seconds": arguments.max_seconds}
    for setting in arguments.set:
        name, _, value = setting.partition("=")
        overrides[name] = float(value) if "." in value or "e" in value else int(value)
    started = time.monotonic()

    def report(stage: str, message: str, **_: object) -> None:
        print(f"{time.monotonic() - started:7.1f} s  {stage:<10} {message}", file=sys.stderr, flush=True)

    trained = train_model(
        events,
        {item: [str(value) for value in values] for item, values in attributes.items()},
        resolve(arguments.size, overrides),
        Plan(max_test_users=sys.maxsize, full_ladder=not arguments.short_ladder, refit=arguments.refit),
        model_name="bench",
        seed=arguments.seed,
        report=report,
    )
    if arguments.topk:
        write_topk(arguments.topk, trained, names)
    values = {
        rung.name: {name: round(interval.value, 5) for name, interval in rung.metrics.items()}
        for rung in trained.report.ladder
    }
    blend = values.pop("blend")
    transformer = values.pop("transformer")
    training = trained.manifest_fields["training"]
    print(
        json.dumps(
            {
                **{name: blend[name] for name in _NAMES},
                "transformer": {name: transformer[name] for name in _NAMES},
                "ladder": {name: {key: rung[key] for key in _NAMES} for name, rung in values.items()},
                "users": trained.report.user_count,
                "lambda": trained.manifest_fields["scoring"]["lambda"],
                "mu": trained.manifest_fields["hyper_parameters"]["popularity_weight"],
                "gate": trained.verdict.verdict,
                "seed": arguments.seed,
                "train_cpu_seconds": round(training["cpu_seconds"], 1),
                "train_wall_seconds": round(training["wall_seconds"], 1),
                "peak_rss_mb": round(peak_resident_bytes() / 1e6, 1),
            }
        )
    )


if __name__ == "__main__":
    main()
