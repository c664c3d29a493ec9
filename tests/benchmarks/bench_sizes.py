"""What each named size of the model takes: `make bench-sizes`.

Trains a few steps of each size that fits here on random histories over 12,000 items with three attributes each, in a process of
its own. A line a size: parameters (in the item tables, in the encoder), milliseconds of wall time and of CPU a step, tokens a
second, and the largest resident memory. What `large` takes is worked out in docs/training.md: it does not fit two cores.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

import numpy as np

from services.trainer.domain.hyper_parameters import resolve
from services.trainer.pipeline.dataset import Histories, ItemAttributes

_ITEMS, _ATTRIBUTES = 12_000, 1_200
_WARM_STEPS = 3


def measure(name: str, steps: int) -> dict[str, object]:
    """Returns what a size takes."""
    from services.trainer.pipeline.sequence_model import SequenceModel
    from services.trainer.pipeline.training import PassRunner

    size = resolve(name, {})
    generator = np.random.default_rng(0)
    # So many people that a step is a whole one, see `rows_of_step`; their histories are as long as a row.
    people = 16 * size.rows_per_step
    count = people * size.max_history
    histories = Histories(
        np.arange(people + 1) * size.max_history,
        generator.integers(0, _ITEMS, count).astype(np.int32),
        np.full(count, 3, np.int32),
        np.zeros(count, np.int64),
        [str(item) for item in range(_ITEMS)],
        np.arange(people),
    )
    attributes = ItemAttributes(
        generator.integers(1, _ATTRIBUTES + 1, (_ITEMS, 3)).astype(np.int32), _ATTRIBUTES
    )
    model = SequenceModel(_ITEMS, attributes, size, seed=0)
    runner = PassRunner(model, histories, generator)
    wall: list[float] = []
    cpu: list[float] = []
    started = (0.0, 0.0)

    def before_step() -> float | None:
        nonlocal started
        if len(wall) >= steps + _WARM_STEPS:
            return None
        started = (time.perf_counter(), time.process_time())
        return size.learning_rate

    def after_step() -> None:
        model.step_count.numpy()
        wall.append(time.perf_counter() - started[0])
        cpu.append(time.process_time() - started[1])

    while len(wall) < steps + _WARM_STEPS:
        runner.run(before_step, after_step)
    milliseconds = float(np.median(wall[_WARM_STEPS:]) * 1e3)
    return {
        "size": name,
        "items": _ITEMS,
        "table_parameters": sum(int(np.prod(table.shape)) for table in model._tables),
        "encoder_parameters": sum(int(np.prod(variable.shape)) for variable in model.dense),
        "tokens_of_step": runner.rows * size.max_history,
        "step_ms": round(milliseconds, 1),
        "step_cpu_ms": round(float(np.median(cpu[_WARM_STEPS:])) * 1e3, 1),
        "tokens_per_second": round(runner.rows * size.max_history / milliseconds * 1e3),
        "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sizes", nargs="*", default=["tiny", "small", "base"])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--alone", action="store_true", help="in this process")
    arguments = parser.parse_args()
    for name in arguments.sizes:
        if arguments.alone:
            print(json.dumps(measure(name, arguments.steps)), flush=True)
        else:
            command = [sys.executable, "-m", "tests.benchmarks.bench_sizes", name, "--alone"]
            subprocess.run([*command, "--steps", str(arguments.steps)], check=True)


if __name__ == "__main__":
    main()
