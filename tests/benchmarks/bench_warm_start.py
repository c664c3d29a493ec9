"""What beginning at yesterday's weights saves: `make bench-warm-start DATA=FILE` (events with times, Parquet).

A file of purchases as of UCI Online Retail (customer_id, stock_code, description, ts). A version is trained on the events
before the last `--share` of the time; then two on all of them, one from the start and one from that version's weights, with the
same held-out events: those newer than the version. The last line is JSON: NDCG@10 and HR@10 of the blend and of the Transformer
alone, with the CPU seconds of training.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from services.trainer.domain.hyper_parameters import resolve
from services.trainer.pipeline import warm_start
from services.trainer.pipeline.dataset import EventColumns
from services.trainer.pipeline.pipeline import train_model
from services.trainer.pipeline.plan import Plan, TrainedModel
from services.trainer.pipeline.warm_start import InitialWeights, read_weights
from shared.event_kinds import EventKind


def read(path: Path) -> EventColumns:
    """Returns the purchases of known customers; no returns, nothing that is no product."""
    table = pq.read_table(path, columns=["customer_id", "stock_code", "quantity", "ts"])
    kept = pc.and_(pc.is_valid(table["customer_id"]), pc.greater(table["quantity"], 0))
    table = table.filter(pc.and_(kept, pc.match_substring_regex(table["stock_code"], "^[0-9]{5}")))
    users = table["customer_id"].combine_chunks().dictionary_encode()
    items = table["stock_code"].combine_chunks().dictionary_encode()
    return EventColumns(
        user_E=users.indices.to_numpy().astype(np.int64),
        item_E=items.indices.to_numpy().astype(np.int32),
        kind_E=np.full(len(table), int(EventKind.PURCHASE), np.int32),
        time_E=table["ts"].cast("timestamp[us]").to_numpy().astype("datetime64[us]").astype(np.int64),
        order_E=np.arange(len(table), dtype=np.int64),
        item_ids=items.dictionary.to_pylist(),
    )


def part(events: EventColumns, keep_E: np.ndarray) -> EventColumns:
    """Returns some of the events."""
    names = ("user_E", "item_E", "kind_E", "time_E", "order_E")
    return replace(events, **{name: getattr(events, name)[keep_E] for name in names})


def train(events: EventColumns, initial: InitialWeights | None, size: str, seed: int) -> TrainedModel:
    return train_model(
        events, {}, resolve(size, {}), Plan(resamples=200), model_name="main", seed=seed, initial=initial,
        report=lambda stage, message, **_: print(f"{stage}: {message}", flush=True),
    )  # fmt: skip


def figures(model: TrainedModel) -> dict[str, Any]:
    ladder = {rung.name: rung.metrics for rung in model.report.ladder}
    return {
        "people": model.report.user_count,
        **{
            f"{name}_{measure}": round(ladder[name][measure].value, 4)
            for name in ("blend", "transformer")
            for measure in ("ndcg@10", "hr@10")
        },
        "train_cpu_seconds": round(model.manifest_fields["training"]["cpu_seconds"], 1),
        "train_wall_seconds": round(model.manifest_fields["training"]["wall_seconds"], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--size", default="small")
    parser.add_argument("--share", type=float, default=0.1, help="of the time, that is new")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    events = read(arguments.data)
    moment = events.time_E.min() + (1 - arguments.share) * (events.time_E.max() - events.time_E.min())
    first = train(part(events, events.time_E < moment), None, arguments.size, arguments.seed)
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / warm_start.FILE).write_bytes(first.attachments[warm_start.FILE])
        # What publishing would add to the manifest.
        published = {**first.manifest_fields, "created_at": ""}
        initial = read_weights(Path(directory), "first", list(first.vocabulary), published)
    refreshed = train(events, initial, arguments.size, arguments.seed)
    # The same questions: what is held out is what the first version cannot know, from the start too.
    anew = train_model(
        events, {}, resolve(arguments.size, {}), Plan(resamples=200), model_name="main", seed=arguments.seed,
        report=lambda stage, message, **_: print(f"{stage}: {message}", flush=True), newer_than_microseconds=initial.last_event_microseconds,
    )  # fmt: skip
    print(json.dumps({
        "benchmark": "warm start", "events": len(events), "size": arguments.size, "seed": arguments.seed,
        "first": figures(first), "refreshed": figures(refreshed), "anew": figures(anew),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
