"""Measures the model on a file of histories, without services.

    python -m services.trainer.bench_quality --data DIR [--topk FILE] [--seed S] [--seeds N] [--max-seconds N]

DIR holds sequences.txt (one person a line: `user item item …`, oldest first) and perhaps item_attributes.json
(item id → list of attribute ids) and item_vectors.npz (`content.ContentVectors.read`). Leave one out: the last item is the test, the one before chooses passes and the weights
of the blend, and the Transformer never learns from it; every item competes but those seen before. Counts (of every
contestant) and histories are up to date when the test is taken: they hold the validation events. What the blend reaches
with the counts of the training events alone is said under "frozen_counts". The last line printed is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from services.trainer.domain.hyper_parameters import resolve
from services.trainer.pipeline.answering import best_items
from services.trainer.pipeline.content import ContentVectors
from services.trainer.pipeline.dataset import (
    Cleaning,
    EventColumns,
    HeldOut,
    Histories,
    clean,
    everyone,
    hold_out,
)
from services.trainer.pipeline.describing import peak_resident_bytes, resident_bytes
from services.trainer.pipeline.evaluation import (
    Contestants,
    ndcg_at_10,
    popularity,
    rank_by_fixed_scores,
)
from services.trainer.pipeline.pipeline import train_model
from services.trainer.pipeline.plan import Plan
from shared.bundle.history import INTEREST_KINDS
from shared.bundle.manifest import ScoringParameters
from shared.bundle.scoring import Companion, CooccurrenceMatrix
from shared.errors import FailedPrecondition, InvalidInput

_NAMES = ("hr@5", "hr@10", "hr@20", "ndcg@10")
# Every contestant ranks so many (person, item) pairs at most, about two minutes in all; the answers are for everybody.
_MEASURED_CELLS, _MEASURED_PEOPLE = 800_000_000, 5_000
_FORMAT = "It must hold a person a line: `user item item …`, oldest first."
# Of a person: all, but for robots.
_MAX_USER_EVENTS = 2_000


@dataclass(frozen=True, slots=True, eq=False)
class Sequences:
    """A file of histories.

    Attributes:
        names: of each person by number.
        ends_in_run: people whose last two items are one: what came last is no news, so that they have no test.
    """

    events: EventColumns
    names: list[str]
    ends_in_run: frozenset[int]


class UnreadableInput(Exception):
    """What was given cannot be read; the message says where and what helps."""


def read_sequences(path: Path) -> Sequences:
    """Reads a file of histories: white space of any kind, empty lines, and people in several lines are no matter.

    Raises:
        UnreadableInput: there is no such file, or it is no UTF-8.
    """
    number_of: dict[str, int] = {}
    items_of: dict[str, list[int]] = {}
    try:
        with path.open(encoding="utf-8-sig") as lines:
            for line in lines:
                if not line.strip():
                    continue
                name, *sequence = line.split()
                items_of.setdefault(name, []).extend(
                    number_of.setdefault(item, len(number_of)) for item in sequence
                )
    except UnicodeDecodeError as error:
        raise UnreadableInput(f"{path}, line {_line_that_is_no_text(path)}: not UTF-8. {_FORMAT}") from error
    except OSError as error:
        raise UnreadableInput(f"{path}: {error.strerror}. {_FORMAT}") from error
    lengths = [len(items) for items in items_of.values()]
    count = sum(lengths)
    # The file has an order and no times.
    events = EventColumns(
        user_E=np.repeat(np.arange(len(lengths)), lengths),
        item_E=np.fromiter(itertools.chain.from_iterable(items_of.values()), np.int32, count),
        kind_E=np.full(count, INTEREST_KINDS[0], np.int32),
        time_E=np.zeros(count, np.int64),
        order_E=np.fromiter(itertools.chain.from_iterable(map(range, lengths)), np.int64, count),
        item_ids=list(number_of),
    )
    ends_in_run = (
        number for number, items in enumerate(items_of.values()) if len(items) > 1 and items[-1] == items[-2]
    )
    return Sequences(events, list(items_of), frozenset(ends_in_run))


def _line_that_is_no_text(path: Path) -> int:
    """Returns the number of the first line, from 1, that is no UTF-8; 0 where all are."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    return 0


def read_attributes(path: Path) -> dict[str, list[str]]:
    """Returns the attribute values of each item id; none where there is no such file.

    Raises:
        UnreadableInput: it is no JSON object.
    """
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UnreadableInput(f"{path}: {error}. It must be JSON: item id to a list of values.") from error
    if not isinstance(found, dict):
        raise UnreadableInput(f"{path}: it must be a JSON object of item id to a list of values.")
    return {
        str(item): [str(value) for value in (values if isinstance(values, list) else [values])]
        for item, values in found.items()
        if values is not None
    }


def write_topk(
    path: Path, best_B20: npt.NDArray[np.int32], asked: HeldOut, histories: Histories, names: list[str]
) -> None:
    """Writes one line a person: `user item1 … item20`, the blend's answer."""
    with path.open("w") as file:
        for row, user in enumerate(asked.user_B.tolist()):
            items = [histories.item_ids[item] for item in best_B20[row].tolist() if item >= 0]
            file.write(" ".join([names[histories.user_U[user]], *items]) + "\n")


def measure_popularity(sequences: Sequences, plan: Plan, arguments: argparse.Namespace) -> dict[str, Any]:
    """Answers by popularity, for files that nothing can be learned from."""
    histories = clean(sequences.events, plan.cleaning)
    after_all_U = np.isin(histories.user_U, list(plan.answered_after_all))
    asked, test = everyone(histories, after_all_U), hold_out(histories, 1, exclude_seen=True)
    test = test.take(np.flatnonzero(~after_all_U[test.user_B]))
    count_I = popularity(histories.without_last(1))
    if arguments.topk:
        items = histories.item_count
        nothing = CooccurrenceMatrix(
            np.zeros(items + 1, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32)
        )
        served = Contestants(
            np.zeros((items, 1), np.float32), count_I, Companion(ScoringParameters(0.0), nothing), count_I, count_I
        )  # fmt: skip
        best_B20 = best_items(
            histories, asked, np.zeros((len(asked), 1), np.float32), served, exclude_seen=True
        )
        write_topk(arguments.topk, best_B20, asked, histories, sequences.names)
    rank_B = rank_by_fixed_scores(histories, test, count_I, exclude_seen=True)
    measures = _measures(rank_B) if len(test) else dict.fromkeys(_NAMES, 0.0)
    return {
        **measures,
        "transformer": dict.fromkeys(_NAMES, 0.0),
        "ladder": {"popularity": measures},
        "frozen_counts": measures,
        "users": len(test),
        "gate": "FAILED",
        "seed": arguments.seed,
        "train_cpu_seconds": 0.0,
        "train_wall_seconds": 0.0,
        "peak_rss_mb": round(peak_resident_bytes() / 1e6, 1),
    }


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Trains once and returns what the last line says."""
    sequences = read_sequences(arguments.data / "sequences.txt")
    events, vectors = sequences.events, arguments.data / "item_vectors.npz"
    overrides: dict[str, Any] = {"max_train_seconds": arguments.max_seconds}
    for setting in arguments.set:
        name, _, value = setting.partition("=")
        try:
            overrides[name] = float(value) if "." in value or "e" in value else int(value)
        except ValueError as error:
            raise UnreadableInput(f"--set {setting}: it must be NAME=NUMBER.") from error
    size = resolve(arguments.size, overrides)
    try:
        content = ContentVectors.read(vectors) if vectors.exists() else None
    except ValueError as error:
        raise UnreadableInput(str(error)) from error
    started = time.monotonic()

    def report(stage: str, message: str, **_: object) -> None:
        memory = f"{resident_bytes() / 1e6:6,.0f} of {peak_resident_bytes() / 1e6:6,.0f} MB"
        print(
            f"{time.monotonic() - started:7.1f} s {memory}  {stage:<10} {message}",
            file=sys.stderr,
            flush=True,
        )

    plan = Plan(
        cleaning=Cleaning(max_user_events=_MAX_USER_EVENTS),
        max_test_users=max(_MEASURED_PEOPLE, _MEASURED_CELLS // max(len(events.item_ids), 1)),
        full_ladder=not arguments.short_ladder,
        refit=arguments.refit,
        answer_everyone=arguments.topk is not None,
        frozen_counts=True,
        answered_after_all=sequences.ends_in_run,
    )
    try:
        trained = train_model(
            events,
            read_attributes(arguments.data / "item_attributes.json"),
            size,
            plan,
            content=content,
            model_name="bench",
            seed=arguments.seed,
            report=report,
        )
    except FailedPrecondition as error:
        if error.reason != "TOO_LITTLE_DATA":
            raise
        report("FAILED", f"{error.message} Popularity answers.")
        return measure_popularity(sequences, plan, arguments)
    assert trained.frozen_rank_B is not None
    if arguments.topk:
        write_topk(arguments.topk, trained.best_B20, trained.tested, trained.histories, sequences.names)
    values = {
        rung.name: {name: round(rung.metrics[name].value, 5) for name in _NAMES}
        for rung in trained.report.ladder
    }
    blend = values.pop("blend")
    transformer = values.pop("transformer")
    training = trained.manifest_fields["training"]
    return {
        **blend,
        "transformer": transformer,
        "ladder": values,
        "frozen_counts": _measures(trained.frozen_rank_B),
        "users": trained.report.user_count,
        "protocol": "weights learned from validation events too"
        if arguments.refit
        else "weights of training events",
        "weights": {
            name.removeprefix("weight_"): round(weight, 3)
            for name, weight in trained.manifest_fields["hyper_parameters"].items()
            if name.startswith("weight_")
        },
        "gate": trained.verdict.verdict,
        "seed": arguments.seed,
        "train_cpu_seconds": round(training["cpu_seconds"], 1),
        "train_wall_seconds": round(training["wall_seconds"], 1),
        "wall_seconds": round(time.monotonic() - started, 1),
        "peak_rss_mb": round(peak_resident_bytes() / 1e6, 1),
    }


def _measures(rank_B: npt.NDArray[np.int64]) -> dict[str, float]:
    hits = {f"hr@{k}": round(float((rank_B <= k).mean()), 5) for k in (5, 10, 20)}
    return {**hits, "ndcg@10": round(float(ndcg_at_10(rank_B).mean()), 5)}


def measure_seeds(arguments: argparse.Namespace) -> dict[str, Any]:
    """Trains once a seed, each in a process of its own; returns the first one's line with the means over all."""
    lines: list[dict[str, Any]] = []
    for seed in range(arguments.seed, arguments.seed + arguments.seeds):
        command = [
            sys.executable,
            "-m",
            "services.trainer.bench_quality",
            *_without(sys.argv[1:], "--seeds", "--seed"),
        ]
        if lines:
            # The answers are those of the first; the baselines do not depend on the seed.
            command = [*_without(command, "--topk"), "--short-ladder"]
        done = subprocess.run([*command, "--seed", str(seed)], stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            # It has said why.
            sys.exit(done.returncode)
        lines.append(json.loads(done.stdout.splitlines()[-1]))
    return {**lines[0], **over_seeds(lines)}


def over_seeds(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns means in place of values, standard deviations under "sd", and the largest cost of all."""

    def of(pick: Any) -> tuple[dict[str, float], dict[str, float]]:
        table = np.array([[pick(line)[name] for name in _NAMES] for line in lines])
        spread = table.std(axis=0, ddof=1) if len(lines) > 1 else np.zeros(len(_NAMES))
        return (
            dict(zip(_NAMES, np.round(table.mean(axis=0), 5).tolist(), strict=True)),
            dict(zip(_NAMES, np.round(spread, 5).tolist(), strict=True)),
        )

    blend, blend_sd = of(lambda line: line)
    transformer, transformer_sd = of(lambda line: line["transformer"])
    frozen, frozen_sd = of(lambda line: line["frozen_counts"])
    costs = ("train_cpu_seconds", "train_wall_seconds", "wall_seconds", "peak_rss_mb")
    return {
        **blend,
        "transformer": transformer,
        "frozen_counts": frozen,
        "sd": {**blend_sd, "transformer": transformer_sd, "frozen_counts": frozen_sd},
        "seeds": [line["seed"] for line in lines],
        **{name: max(line[name] for line in lines) for name in costs},
    }


def _without(words: list[str], *names: str) -> list[str]:
    """Returns a command line without these options and their values."""
    kept: list[str] = []
    skip = False
    for word in words:
        if not skip and word not in names:
            kept.append(word)
        skip = not skip and word in names
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--topk", type=Path)
    parser.add_argument("--max-seconds", type=int, default=480, help="of wall time, for training alone")
    parser.add_argument("--size", default="small")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--seeds", type=int, default=1, help="train so often, from --seed on, and report means"
    )
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
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a hyper-parameter")
    arguments = parser.parse_args()
    try:
        _check(arguments)
        line = measure_seeds(arguments) if arguments.seeds > 1 else measure(arguments)
    except UnreadableInput as error:
        parser.error(str(error))
    except InvalidInput as error:
        parser.error(error.message)
    print(json.dumps(line))


def _check(arguments: argparse.Namespace) -> None:
    """Finds out before minutes of training what would fail after them.

    Raises:
        UnreadableInput: it would.
    """
    if not arguments.data.is_dir():
        raise UnreadableInput(f"--data {arguments.data}: no such directory. It must hold sequences.txt.")
    topk = arguments.topk
    if topk is not None and (topk.is_dir() or not topk.parent.is_dir()):
        what = "it is a directory" if topk.is_dir() else f"there is no directory {topk.parent}"
        raise UnreadableInput(f"--topk {topk}: {what}. Name a file that can be written.")
    if topk is not None and not os.access(topk if topk.exists() else topk.parent, os.W_OK):
        raise UnreadableInput(f"--topk {topk}: it may not be written.")
    if arguments.seeds < 1 or arguments.seed < 0:
        raise UnreadableInput("--seeds must be at least 1, and --seed at least 0.")


if __name__ == "__main__":
    main()
