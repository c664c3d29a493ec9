"""What epsilon costs: quality at 1, 2, 4, 8 and without noise, of both private mechanisms.

    python -m tests.benchmarks.bench_privacy [--people N,N,…] [--beauty DIR] [--seeds N] [--gradients] [--plot FILE.png]

Populations: Amazon Beauty where DIR holds it (said and left out where not), and simulated ones over 20,000 items with a long
tail (`long_tail`). Leave one out, full ranking, items seen before left out; at most 5,000 people are measured on. The contestants:

    counts       what a private run serves by default: noisy counts, noisy popularity, the catalogue's likeness
    popularity   the noisy popularity alone
    catalogue    likeness alone, which needs nobody's data: epsilon 0
    gradients    DP-Adam (with --gradients; no more people than --gradient-people). On the same people, test and delta; the people who
                 choose a weight for counts have nothing to choose here and teach too, as they do in a private run.

Each line printed is a measurement; the last line is JSON: "measurements", "environment", CPU and wall seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from services.trainer.bench_quality import read_sequences
from services.trainer.domain.privacy import DEFAULT_DELTA, GaussianRelease
from services.trainer.pipeline.dataset import Cleaning, Histories, clean, encode_attributes, hold_out
from services.trainer.pipeline.evaluation import (
    Contestants,
    ndcg_at_10,
    rank_by_blend,
    rank_by_fixed_scores,
    sample_rows,
)
from services.trainer.privacy.accounting import noise_for
from services.trainer.privacy.backoff import likeness_factors
from services.trainer.privacy.choosing import CHOICE_SHARE, choose_weight
from services.trainer.privacy.contributions import sum_shares, take_people
from services.trainer.privacy.counts import add_noise, contestants_of, with_likeness
from services.trainer.privacy.randomness import SecureRandom
from shared.bundle.scoring import Companion, CooccurrenceMatrix
from tests.benchmarks.long_tail import make_population

EPSILONS: tuple[float | None, ...] = (1.0, 2.0, 4.0, 8.0, None)
_ITEMS, _MEASURED, _CLIP = 20_000, 5_000, 1.0


class Population:
    """People to learn from, and those to measure on.

    Args:
        histories: of all; the last event of each is the test.
    """

    def __init__(self, name: str, histories: Histories, attributes_of: Mapping[str, Sequence[str]]) -> None:
        self.name, self.attributes_of = name, attributes_of
        before = histories.without_last(1)
        chooses_U = np.random.default_rng(0).random(before.user_count) < CHOICE_SHARE
        self.training = take_people(before, np.flatnonzero(~chooses_U))
        self.choosing = take_people(before, np.flatnonzero(chooses_U))
        self.before, self.people = before, before.user_count
        self.attributes = encode_attributes(histories.item_ids, attributes_of)
        held = hold_out(histories, 1, exclude_seen=True)
        self.test = take_people(histories, held.user_B[sample_rows(len(held), _MEASURED, 0)])
        self.held = hold_out(self.test, 1, exclude_seen=True)

    def measure(
        self, served: Contestants, queries: npt.NDArray[np.float32] | None = None
    ) -> dict[str, float]:
        """Returns hr@10 and ndcg@10 of what is served."""
        if queries is None:
            queries = np.zeros((len(self.held), served.item_vectors_ID.shape[1]), np.float32)
        return _measures(rank_by_blend(self.test, self.held, queries, served, True))

    def measure_popularity(self, popularity_I: npt.NDArray[np.float32]) -> dict[str, float]:
        """Returns those of one ranking for all."""
        return _measures(rank_by_fixed_scores(self.test, self.held, popularity_I, True))


def _measures(rank_B: npt.NDArray[np.int64]) -> dict[str, float]:
    return {"hr@10": float((rank_B <= 10).mean()), "ndcg@10": float(ndcg_at_10(rank_B).mean())}


def read_beauty(directory: Path) -> Population:
    """Returns the population of a directory as `make bench-quality` reads it."""
    events = read_sequences(directory / "sequences.txt").events
    attributes = json.loads((directory / "item_attributes.json").read_text())
    named = {item: [str(value) for value in values] for item, values in attributes.items()}
    return Population("Amazon Beauty", clean(events, Cleaning()), named)


def key_of(seed: int) -> bytes:
    """Returns a key for noise that repeats, which only a benchmark may have."""
    return seed.to_bytes(32, "little")


def measure_counts(population: Population, deltas: Sequence[float], seeds: int) -> Iterator[dict[str, Any]]:
    """Yields a measurement for each epsilon, delta and seed, and of the catalogue alone."""
    started = time.process_time()
    shares = sum_shares(population.training, _CLIP)
    counting_seconds = time.process_time() - started
    catalogue = likeness_factors(population.attributes)
    if catalogue is not None:
        none = CooccurrenceMatrix(
            np.zeros(len(shares.popularity_I) + 1, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32)
        )
        blank = np.zeros(len(shares.popularity_I), np.float32)
        base = contestants_of(add_noise(_empty(shares), 1.0, SecureRandom(key_of(0))), population.attributes)
        alone = replace(
            base, item_bias_I=blank, companion=Companion(base.companion.scoring, none, None, *catalogue)
        )
        yield {"contestant": "catalogue", "epsilon": 0.0, "seed": 0, **population.measure(alone)}
    for delta in deltas:
        for epsilon in EPSILONS:
            noise = noise_for(epsilon, delta).noise_multiplier if epsilon is not None else 0.0
            for seed in range(seeds if epsilon is not None else 1):
                counts = add_noise(shares, noise, SecureRandom(key_of(seed)))
                unweighted = contestants_of(counts, population.attributes)
                weight = choose_weight(
                    population.choosing, unweighted, True, noise, SecureRandom(key_of(seed + 100))
                )
                served = with_likeness(unweighted, weight)
                about = {
                    "epsilon": epsilon, "delta": delta if epsilon is not None else None,
                    "noise_multiplier": noise, "seed": seed,
                }  # fmt: skip
                yield {
                    "contestant": "counts", **about, "pairs": len(counts.pair_N), "likeness": weight,
                    "counting_cpu_seconds": round(counting_seconds, 1), **population.measure(served),
                }  # fmt: skip
                yield {
                    "contestant": "popularity",
                    **about,
                    **population.measure_popularity(served.popularity_I),
                }


def _empty(shares: Any) -> Any:
    return replace(
        shares,
        pair_N=np.zeros(0, np.int64),
        weight_N=np.zeros(0, np.int64),
        popularity_I=np.zeros_like(shares.popularity_I),
    )


def measure_gradients(
    population: Population, delta: float, seeds: int, sampling_rate: float | None, steps: int | None
) -> Iterator[dict[str, Any]]:
    """Yields a measurement of DP-Adam for each epsilon and seed of sampling and noise.

    Args:
        sampling_rate, steps: in place of those of a private run.
    """
    from services.trainer.privacy import gradients

    everyone = population.before
    sampling_rate, steps = sampling_rate or gradients.SAMPLING_RATE, steps or gradients.STEPS
    for seed, epsilon in ((s, e) for s in range(seeds) for e in EPSILONS):
        started = time.process_time()
        release, noise = GaussianRelease(1.0, sampling_rate, steps), 0.0
        if epsilon is not None:
            release = noise_for(epsilon, delta, sampling_rate, steps)
            noise = release.noise_multiplier
        model = gradients.train_gradients(
            everyone, population.attributes_of, release, _CLIP, SecureRandom(key_of(seed)),
            1 / sampling_rate, noise=noise,
        )  # fmt: skip
        served = gradients.contestants_of(model)
        yield {
            "contestant": "gradients", "epsilon": epsilon, "delta": delta if epsilon is not None else None,
            "noise_multiplier": noise, "sampling_rate": sampling_rate, "steps": steps, "seed": seed, "train_cpu_seconds": round(time.process_time() - started, 1),
            **population.measure(served, model.encode(population.test, population.held)),
        }  # fmt: skip


def draw(measurements: Sequence[Mapping[str, Any]], path: Path, delta: float) -> None:
    """Writes a picture of HR@10 by epsilon: a panel a population, a line a contestant."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    populations = list(dict.fromkeys(str(m["population"]) for m in measurements))
    figure, panels = plt.subplots(
        1, len(populations), figsize=(3.6 * len(populations), 3.9), dpi=120, squeeze=False
    )
    colours = {"counts": "tab:blue", "gradients": "tab:orange", "popularity": "tab:grey"}
    places = {epsilon: place for place, epsilon in enumerate(EPSILONS)}
    for axes, name in zip(panels[0], populations, strict=True):
        mine = [m for m in measurements if m["population"] == name]
        for contestant, colour in colours.items():
            found: dict[float | None, list[float]] = {}
            for m in mine:
                if m["contestant"] == contestant and m["delta"] in (delta, None):
                    found.setdefault(m["epsilon"], []).append(m["hr@10"])
            if not found:
                continue
            xs = sorted(found, key=lambda epsilon: places[epsilon])
            means = [float(np.mean(found[x])) for x in xs]
            spans = [[mean - min(found[x]) for x, mean in zip(xs, means, strict=True)],
                     [max(found[x]) - mean for x, mean in zip(xs, means, strict=True)]]  # fmt: skip
            axes.errorbar([places[x] for x in xs], means, yerr=spans, color=colour, marker="o", capsize=3, label=contestant)  # fmt: skip
        alone = [m["hr@10"] for m in mine if m["contestant"] == "catalogue"]
        if alone:
            axes.axhline(alone[0], color="tab:green", linestyle="--", label="catalogue alone")
        axes.set_xticks(range(len(EPSILONS)), ["1", "2", "4", "8", "no\nnoise"])
        axes.set_xlabel(f"epsilon a person (delta {delta:g})")
        axes.set_title(f"{name}\n{mine[0]['people']:,} people, {mine[0]['items']:,} items", fontsize=9)
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", alpha=0.3)
    panels[0][0].set_ylabel("HR@10, every item competes")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), fontsize=9, frameon=False)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)


def environment() -> dict[str, Any]:
    """Returns what the machine was."""
    return {
        "python": platform.python_version(), "numpy": np.__version__, "machine": platform.machine(),
        "cores": os.cpu_count(), "threads": os.environ.get("OMP_NUM_THREADS", ""),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--people", default="22000,100000,1000000", help="of the simulated populations; empty: none"
    )
    parser.add_argument("--beauty", type=Path, default=Path("../shared/data/beauty"))
    parser.add_argument("--deltas", default=f"{DEFAULT_DELTA:g}", help="1e-6,1e-5: the first is drawn")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--gradients", action="store_true")
    parser.add_argument("--gradient-people", type=int, default=100_000)
    parser.add_argument("--gradient-seeds", type=int, help="fewer than of the counts, which cost less")
    parser.add_argument(
        "--sampling-rate", type=float, help="of gradients, where a private run's would take too long"
    )
    parser.add_argument("--steps", type=int, help="of gradients")
    parser.add_argument("--counts", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--plot", type=Path)
    parser.add_argument(
        "--measured", type=Path, nargs="*", default=[], help="last lines of earlier runs, drawn too"
    )
    arguments = parser.parse_args()
    deltas = [float(delta) for delta in arguments.deltas.split(",")]
    wall, cpu = time.monotonic(), time.process_time()
    measurements: list[dict[str, Any]] = []
    for path in arguments.measured:
        measurements += json.loads(path.read_text().splitlines()[-1])["measurements"]

    def populations() -> Iterator[Population]:
        if str(arguments.beauty) == "none":
            pass
        elif (arguments.beauty / "sequences.txt").exists():
            yield read_beauty(arguments.beauty)
        else:
            print(
                f"Beauty is left out: {arguments.beauty} holds no sequences.txt (--beauty DIR).",
                file=sys.stderr,
            )
        for people in [int(number) for number in arguments.people.split(",") if number]:
            made = make_population(people, _ITEMS, seed=1)
            yield Population("SIMULATION, long tail", made.histories, made.attributes_of)

    for population in populations():
        people, items = population.people, population.training.item_count
        found = [measure_counts(population, deltas, arguments.seeds)] if arguments.counts else []
        if arguments.gradients and people <= arguments.gradient_people:
            found.append(
                measure_gradients(
                    population, deltas[0], arguments.gradient_seeds or arguments.seeds,
                    arguments.sampling_rate, arguments.steps,
                )
            )  # fmt: skip
        for measurement in (m for part in found for m in part):
            label = population.name if "SIM" not in population.name else f"{population.name}, {people:,}"
            line = {"population": label, "people": people, "items": items, **measurement}
            measurements.append(line)
            print(json.dumps(line), file=sys.stderr, flush=True)
    if arguments.plot:
        draw(measurements, arguments.plot, deltas[0])
    print(
        json.dumps(
            {
                "measurements": measurements,
                "environment": environment(),
                "cpu_seconds": round(time.process_time() - cpu, 1),
                "wall_seconds": round(time.monotonic() - wall, 1),
            }
        )
    )


if __name__ == "__main__":
    main()
