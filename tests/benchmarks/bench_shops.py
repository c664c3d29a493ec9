"""The one configuration over different shops: `make bench-shops DATA=DIR` (ONLY=retail,jd; SIZE=small).

Turns event files with times into the directories that `make bench-quality` reads, and measures each of them in a process of its own.
DIR holds the data sets by name; those that are missing are left out:

    beauty           as it is, with its attributes
    beauty_few       its first 500 people, every third item without attributes
    retail           UCI Online Retail: the first purchase of each product by each customer, words of the description and price decile
    retail_bare      the same without attributes
    retail_abroad    the same, customers outside the United Kingdom: some 400 people
    retail_short     the first four products of each customer
    retail_repeats   every purchase line, so that products come again
    retail_baskets   the newest 6,000 orders as people of their own: histories of one visit, guests too
    jd               JD.com: whatever was done first with each product, with its attributes
    simulated        SIMULATION: the shop of `shared.simulation`, 1,200 people
    simulated_tiny   SIMULATION: 24 products
    huge             SIMULATION: 200,000 people, 193,000 products in 4,000 groups, a million events (only where asked for: --only huge)

Further logs: `--events FILE --columns USER,ITEM,TIME [--attributes COLUMN,COLUMN]`, a Parquet file.

A line a shop, and JSON at the end: HR@10 and NDCG@10 of the blend, the Transformer and each baseline, the best of the simple ones,
and how many standard errors the blend is above it. Answers are checked: twenty a person, or as many as there are items that
they have not had; none of those; none twice.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

Words = Mapping[str, Sequence[str]]
_ANSWERS = 20


def write_shop(
    directory: Path,
    users: Sequence[str],
    items: Sequence[str],
    time_E: npt.NDArray[Any],
    attributes_of: Words | None = None,
    *,
    repeats: bool = False,
    longest: int | None = None,
) -> None:
    """Writes the events of each person by time; of one time in the order given.

    Args:
        repeats: every event; else the first one with each item.
        longest: no more events than this, the oldest.
    """
    _, user_E = np.unique(np.asarray(users, str), return_inverse=True)
    item_names, item_E = np.unique(np.asarray(items, str), return_inverse=True)
    order = np.lexsort((np.arange(len(time_E)), time_E, user_E))
    user_E, item_E = user_E[order], item_E[order]
    if not repeats:
        first = np.sort(np.unique(user_E * len(item_names) + item_E, return_index=True)[1])
        user_E, item_E = user_E[first], item_E[first]
    directory.mkdir(parents=True)
    with (directory / "sequences.txt").open("w") as file:
        for user, of_user in enumerate(np.split(item_E, np.flatnonzero(np.diff(user_E)) + 1)):
            file.write(f"u{user} {' '.join(item_names[of_user[:longest]])}\n")
    if attributes_of:
        (directory / "item_attributes.json").write_text(json.dumps(attributes_of))


def beauty(data: Path, directory: Path) -> None:
    directory.mkdir(parents=True)
    for name in ("sequences.txt", "item_attributes.json"):
        (directory / name).write_bytes((data / "beauty" / name).read_bytes())


def beauty_few(data: Path, directory: Path) -> None:
    directory.mkdir(parents=True)
    lines = (data / "beauty" / "sequences.txt").read_text().splitlines(keepends=True)
    (directory / "sequences.txt").write_text("".join(lines[:500]))
    attributes_of = json.loads((data / "beauty" / "item_attributes.json").read_text())
    some = {item: values for place, (item, values) in enumerate(attributes_of.items()) if place % 3}
    (directory / "item_attributes.json").write_text(json.dumps(some))


def _purchases(data: Path) -> pa.Table:
    table = pq.read_table(data / "online_retail" / "events.parquet")
    sold = pc.and_(pc.greater(table["quantity"], 0), pc.greater(table["price"], 0))
    return table.filter(pc.and_(sold, pc.match_substring_regex(table["stock_code"], "^[0-9]{5}")))


def _retail(
    rows: pa.Table, directory: Path, person: str = "customer_id", with_attributes: bool = True, **form: Any
) -> None:
    rows = rows.filter(pc.is_valid(rows[person]))
    items = [str(code).replace(" ", "_") for code in rows["stock_code"].to_pylist()]
    attributes_of: dict[str, list[str]] = {}
    if with_attributes:
        words: dict[str, set[str]] = {}
        for item, text in zip(items, rows["description"].to_pylist(), strict=True):
            words.setdefault(item, set()).update(re.findall(r"[a-z]{3,}", (text or "").lower()))
        price_E = rows["price"].to_numpy()
        names, item_E = np.unique(items, return_inverse=True)
        mean_I = np.bincount(item_E, price_E) / np.bincount(item_E)
        decile_I = np.searchsorted(np.quantile(mean_I, np.arange(1, 10) / 10), mean_I)
        attributes_of = {
            name: [f"price:{decile}", *(f"word:{word}" for word in sorted(words[name]))]
            for name, decile in zip(names.tolist(), decile_I.tolist(), strict=True)
        }
    write_shop(directory, _words(rows[person]), items, _microseconds(rows["ts"]), attributes_of, **form)


def retail(data: Path, directory: Path) -> None:
    _retail(_purchases(data), directory)


def retail_bare(data: Path, directory: Path) -> None:
    _retail(_purchases(data), directory, with_attributes=False)


def retail_abroad(data: Path, directory: Path) -> None:
    rows = _purchases(data)
    _retail(rows.filter(pc.not_equal(rows["country"], "United Kingdom")), directory)


def retail_short(data: Path, directory: Path) -> None:
    _retail(_purchases(data), directory, longest=4)


def retail_repeats(data: Path, directory: Path) -> None:
    _retail(_purchases(data), directory, repeats=True)


def retail_baskets(data: Path, directory: Path) -> None:
    rows = _purchases(data)
    newest = sorted(pc.unique(rows["invoice"]).to_pylist())[-6_000:]
    _retail(rows.filter(pc.is_in(rows["invoice"], pa.array(newest))), directory, person="invoice")


def jd(data: Path, directory: Path) -> None:
    rows = pq.read_table(data / "jd_actions" / "actions.parquet")
    rows = rows.filter(pc.not_equal(pc.cast(rows["type"], pa.string()), "3"))
    products = pq.read_table(data / "jd_actions" / "products.parquet").to_pylist()
    attributes_of = {
        str(item): [f"cate={category}", f"br={brand}"]
        for item, category, brand in zip(*(rows[name].to_pylist() for name in ("sku_id", "cate", "br")), strict=True)
    }  # fmt: skip
    for product in products:
        attributes_of[str(product["sku_id"])] = [
            f"{name}={product[name]}" for name in ("a1", "a2", "a3", "cate", "br")
        ]
    write_shop(
        directory, _words(rows["user_id"]), _words(rows["sku_id"]), _microseconds(rows["ts"]), attributes_of
    )


def _simulated(directory: Path, people: int, items: int) -> None:
    from shared.bundle.history import INTEREST_KINDS
    from shared.simulation.history import Scale, make_history

    world, batch = make_history(Scale(shoppers=people, items=items))
    users, chosen, times = [], [], []
    for event, (user, kind) in enumerate(zip(batch.user_ids, batch.kinds, strict=True)):
        if int(kind) in INTEREST_KINDS:
            for place in range(batch.offsets[event], batch.offsets[event + 1]):
                if batch.item_ids[place]:
                    users.append(user)
                    chosen.append(batch.item_ids[place])
                    times.append(event)
    attributes_of = {
        record.item_id: [f"brand:{record.brand}", *(f"category:{step}" for step in record.category_path)]
        for record in world.shop.records()
    }
    write_shop(directory, users, chosen, np.array(times), attributes_of)


def simulated(_data: Path, directory: Path) -> None:
    _simulated(directory, 1_200, 400)


def simulated_tiny(_data: Path, directory: Path) -> None:
    _simulated(directory, 600, 24)


def huge(_data: Path, directory: Path) -> None:
    """A catalogue with next to no popular items: each person takes from two of 4,000 groups, the first more often."""
    generator, people, items, groups = np.random.default_rng(1), 200_000, 200_000, 4_000
    group_I = generator.integers(0, groups, items)
    of_group = np.argsort(group_I, kind="stable")
    start_G1 = np.searchsorted(group_I[of_group], np.arange(groups + 1))
    length_U = np.minimum(2 + generator.exponential(3.6, people).astype(np.int64), 120)
    user_E = np.repeat(np.arange(people), length_U)
    liked_U2 = generator.integers(0, groups, (people, 2))
    group_E = liked_U2[user_E, (generator.random(len(user_E)) < 0.4).astype(np.int64)]
    size_E = start_G1[group_E + 1] - start_G1[group_E]
    place_E = np.minimum((size_E * generator.random(len(user_E)) ** 2).astype(np.int64), size_E - 1)
    name_I = [f"p{index}" for index in range(items)]
    items_E = [name_I[item] for item in of_group[start_G1[group_E] + place_E].tolist()]
    attributes_of = {
        name: [f"group:{group}", f"kind:{group % 40}"]
        for name, group in zip(name_I, group_I.tolist(), strict=True)
    }
    write_shop(directory, user_E.astype(str), items_E, np.arange(len(user_E)), attributes_of)


def from_events(path: Path, columns: Sequence[str], attributes: Sequence[str], directory: Path) -> None:
    """Writes any Parquet file of events: columns of person, item, time, and of attributes of the item."""
    rows = pq.read_table(path, columns=[*columns, *attributes])
    person, item, time = columns
    rows = rows.filter(pc.and_(pc.is_valid(rows[person]), pc.is_valid(rows[item])))
    items = [name.replace(" ", "_") for name in _words(rows[item])]
    attributes_of: dict[str, list[str]] = {}
    for name in attributes:
        for key, value in set(zip(items, _words(rows[name]), strict=True)):
            attributes_of.setdefault(key, []).append(f"{name}:{value}")
    write_shop(directory, _words(rows[person]), items, _microseconds(rows[time]), attributes_of)


def _words(column: pa.ChunkedArray) -> list[str]:
    return [str(value) for value in column.to_pylist()]


def _microseconds(column: pa.ChunkedArray) -> npt.NDArray[np.int64]:
    if pa.types.is_timestamp(column.type):
        column = pc.cast(column, pa.timestamp("us"), safe=False)
        return column.to_numpy().astype("datetime64[us]").astype(np.int64)
    return column.to_numpy().astype(np.int64)


SHOPS: dict[str, Callable[[Path, Path], None]] = {
    shop.__name__: shop
    for shop in (
        beauty, beauty_few, retail, retail_bare, retail_abroad, retail_baskets, retail_short, retail_repeats, jd, simulated, simulated_tiny, huge,
    )
}  # fmt: skip


def check_answers(sequences: Path, answers: Path) -> int:
    """Returns how many people have been answered wrongly: too few items, one twice, one that they had."""
    history_of: dict[str, list[str]] = {}
    for line in sequences.read_text().splitlines():
        user, *items = line.split()
        history_of.setdefault(user, []).extend(items)
    catalogue = {item for items in history_of.values() for item in items}
    wrong, answered = 0, set()
    for line in answers.read_text().splitlines():
        user, *items = line.split()
        had = set(history_of[user][:-1])
        answered.add(user)
        fits = len(set(items)) == len(items) and not had & set(items) and set(items) <= catalogue
        wrong += not fits or len(items) < min(_ANSWERS, len(catalogue - had))
    return wrong + len({user for user, items in history_of.items() if items} - answered)


def measure(directory: Path, options: Sequence[str]) -> dict[str, Any]:
    """Runs `bench_quality` on a directory."""
    answers = directory / "answers.txt"
    command = [sys.executable, "-m", "services.trainer.bench_quality", "--data", str(directory)]
    done = subprocess.run(
        [*command, "--topk", str(answers), *options], stdout=subprocess.PIPE, text=True, check=True
    )
    said = json.loads(done.stdout.splitlines()[-1])
    simple, best = max(
        ((name, rung["ndcg@10"]) for name, rung in said["ladder"].items()), key=lambda pair: pair[1]
    )
    people = max(said["users"], 1)
    # NDCG lies in [0, HR]: its variance is at most that of the hits. Of the difference it is less still.
    error = float(np.sqrt(max(said["ndcg@10"], best, 1 / people) / people))
    return {
        "people": said["users"],
        **{
            name: [rung["hr@10"], rung["ndcg@10"]]
            for name, rung in {"blend": said, "transformer": said["transformer"], **said["ladder"]}.items()
        },
        "best_simple": simple,
        "lead_in_errors": round((said["ndcg@10"] - best) / error, 2),
        "wrong_answers": check_answers(directory / "sequences.txt", answers),
        "weights": said.get("weights", {}),
        "train_cpu_seconds": said["train_cpu_seconds"],
        "peak_rss_mb": said["peak_rss_mb"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="directory of the data sets")
    parser.add_argument("--only", help="names, separated by commas")
    parser.add_argument("--events", type=Path, help="a Parquet file of events of your own")
    parser.add_argument("--columns", help="its person, item and time, separated by commas")
    parser.add_argument("--attributes", default="", help="its columns that say something of the item")
    parser.add_argument("--keep", type=Path, help="write the directories here and leave them")
    arguments, options = parser.parse_known_args()
    if not arguments.data and not arguments.events:
        parser.error("say --data DIR or --events FILE --columns USER,ITEM,TIME")
    if arguments.events and len((arguments.columns or "").split(",")) != 3:
        parser.error("--events needs --columns USER,ITEM,TIME")
    unknown = set((arguments.only or "").split(",")) - {"", *SHOPS}
    if unknown:
        parser.error(f"--only knows {', '.join(SHOPS)}, not {', '.join(sorted(unknown))}")
    said: dict[str, Any] = {}
    by_default = [name for name in SHOPS if name != huge.__name__]
    with tempfile.TemporaryDirectory() as temporary:
        root = arguments.keep or Path(temporary)

        def tell(name: str) -> None:
            said[name] = measure(root / name, options)
            print(name, json.dumps(said[name]), flush=True)

        if arguments.events:
            attributes = [name for name in arguments.attributes.split(",") if name]
            from_events(arguments.events, arguments.columns.split(","), attributes, root / "events")
            tell("events")
        for name in (arguments.only or ",".join(by_default)).split(",") if arguments.data else ():
            try:
                SHOPS[name](arguments.data, root / name)
            except FileNotFoundError as error:
                print(f"{name} is left out: {error}", file=sys.stderr)
                continue
            tell(name)
    print(json.dumps({"benchmark": "shops", "shops": said}))


if __name__ == "__main__":
    main()
