"""What content vectors are worth for items that nobody has touched: `make bench-encoders DATA=DIR`.

DIR holds fashion_images, chorus_icecat and beauty; what is missing is left out. The last line is JSON.

fashion    a picture, a title, a brand, gender and a top category are known of every item; half of the items are
           cold. How alike are the ten nearest of a cold item: gain 1 for the same kind (articleType), and 1/3 each
           more for the same colour, use and season; NDCG@10
search     a query's best judged product stands for what a shopper liked; the others judged for the query are to
           be found among thousands: NDCG@10, recall@100
beauty     a tenth of the items is cold, and attributes are all that is known of them. The first cold item of a
           shopper is to be found among all cold ones by the mean vector of what came before: recall@20, beside chance

Each by every part alone and by their fusion; with the milliseconds that a text and a picture take. Error bars are
the standard error over queries.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import os
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from services.profile.clients.encoders import E5TextEncoder, EfficientNetImageEncoder
from services.profile.domain.content_space import (
    MEANING_WEIGHT,
    PICTURE_WEIGHT,
    TEXT_WEIGHT,
    TRAIT_WEIGHT,
    Contents,
    ContentSpace,
    fused,
)
from services.profile.domain.items import Attribute, Item

Float = npt.NDArray[np.float32]

PARTS = ("ngrams", "traits", "e5", "picture")
WEIGHTS = dict(zip(PARTS, (TEXT_WEIGHT, TRAIT_WEIGHT, MEANING_WEIGHT, PICTURE_WEIGHT), strict=True))
BLENDS: tuple[tuple[str, ...], ...] = (
    ("ngrams",), ("traits",), ("e5",), ("picture",), ("ngrams", "e5"), ("ngrams", "traits"),
    ("ngrams", "traits", "e5"), ("ngrams", "traits", "picture"), PARTS,
)  # fmt: skip
OTHER_PRODUCTS = 1_000
QUERIES = 40


def ndcg(gain_K: Float, ideal: Float, k: int = 10) -> float:
    """Returns NDCG@k of gains in their order, beside the best order."""
    discount = 1.0 / np.log2(np.arange(2, k + 2))
    best = np.sort(ideal)[::-1][:k]
    return float((gain_K[:k] * discount[: len(gain_K[:k])]).sum() / (best * discount[: len(best)]).sum())


def summary(values: Sequence[float]) -> list[float]:
    """Returns the mean and its standard error."""
    return [round(float(np.mean(values)), 4), round(float(np.std(values) / np.sqrt(len(values))), 4)]


class Encoders:
    """Both encoders, and what they cost; texts that were encoded by an earlier run are read from a file."""

    def __init__(self, cache: Path | None) -> None:
        self._text, self._picture = E5TextEncoder(), EfficientNetImageEncoder()
        self._cache = cache
        self.seconds: dict[str, list[float]] = {"text": [], "picture": []}

    def texts(self, name: str, texts: Sequence[str]) -> Float:
        return self._cached(f"{name}-text", lambda: self._timed("text", self._text.encode, texts))

    def pictures(self, name: str, pictures: Sequence[bytes]) -> Float:
        return self._cached(f"{name}-picture", lambda: self._timed("picture", self._picture.encode, pictures))

    def _timed(self, kind: str, encode: Callable[[Any], Float], contents: Sequence[Any]) -> Float:
        parts = []
        for first in range(0, len(contents), 64):
            part = contents[first : first + 64]
            begun = time.perf_counter()
            parts.append(encode(part))
            self.seconds[kind].append((time.perf_counter() - begun) / len(part))
        return np.concatenate(parts)

    def _cached(self, name: str, make: Callable[[], Float]) -> Float:
        if self._cache is None:
            return make()
        path = self._cache / f"{name}.npy"
        if path.exists():
            return np.asarray(np.load(path), np.float32)
        vectors = make()
        self._cache.mkdir(parents=True, exist_ok=True)
        np.save(path, vectors)
        return vectors


def blends_of(
    contents: Contents, fitted: Contents, chosen: Mapping[str, float]
) -> Iterator[tuple[str, Float]]:
    """Yields each part alone, and their fusions, of a space that was fitted to some items."""
    parts = dict(zip(PARTS, ContentSpace.fit(fitted).parts(contents), strict=True))
    for blend in BLENDS:
        if all(parts[name].any() for name in blend):
            weights = [chosen[name] for name in blend]
            yield "+".join(blend), fused([parts[name] for name in blend], weights)


def fashion(directory: Path, encoders: Encoders, weights: Mapping[str, float]) -> dict[str, Any]:
    with (directory / "labels.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    with zipfile.ZipFile(directory / "images.zip") as archive:
        names = {Path(name).stem: name for name in archive.namelist() if name.endswith(".jpg")}
        rows = [row for row in rows if row["id"] in names]
        pictures = [archive.read(names[row["id"]]) for row in rows]
    items = [
        Item(row["id"], title=row["productDisplayName"], brand=row["productDisplayName"].split(" ")[0],
             category_path=(row["masterCategory"],), attributes=(Attribute("gender", row["gender"]),))
        for row in rows
    ]  # fmt: skip
    texts = Contents.of(items)
    contents = Contents(
        texts.texts,
        texts.traits,
        encoders.texts("fashion", texts.texts),
        encoders.pictures("fashion", pictures),
    )
    cold_N = np.random.default_rng(7).random(len(rows)) < 0.5
    warm, cold = np.flatnonzero(~cold_N), np.flatnonzero(cold_N)
    labels = {
        name: np.array([row[name] for row in rows])
        for name in ("articleType", "baseColour", "usage", "season")
    }
    gain_CW = sum(
        weight * (labels[name][cold][:, None] == labels[name][warm][None, :])
        for name, weight in (("articleType", 1.0), ("baseColour", 1 / 3), ("usage", 1 / 3), ("season", 1 / 3))
    ) * (labels["articleType"][cold][:, None] == labels["articleType"][warm][None, :])
    found = [row for row in range(len(cold)) if gain_CW[row].any()]
    result: dict[str, Any] = {"cold_items": len(found), "warm_items": len(warm)}
    for name, vector_ND in blends_of(contents, _some(contents, warm), weights):
        score_CW = vector_ND[cold] @ vector_ND[warm].T
        best = np.argsort(-score_CW, axis=1, kind="stable")[:, :10]
        result[name] = summary([ndcg(gain_CW[row][best[row]], gain_CW[row]) for row in found])
    return result


def search(directory: Path, encoders: Encoders, weights: Mapping[str, float]) -> dict[str, Any]:
    products: dict[str, Item] = {}
    for path in sorted(directory.glob("products-*.jsonl.gz")):
        with gzip.open(path, "rt") as stream:
            for line in stream:
                product = json.loads(line)
                products[str(product["id"])] = _product(product)
    judged: dict[str, dict[str, float]] = {}
    with (directory / "ratings.csv").open() as stream:
        for row in csv.DictReader(stream):
            if row["docid"] in products:
                judged.setdefault(row["query"], {})[row["docid"]] = float(row["rating"])
    rng = np.random.default_rng(7)
    judged = {query: judged[query] for query in rng.permutation(sorted(judged))[:QUERIES].tolist()}
    named = {docid for documents in judged.values() for docid in documents}
    rest = sorted(set(products) - named)
    some = rng.choice(len(rest), min(OTHER_PRODUCTS, len(rest)), replace=False)
    ids = sorted(named | {rest[at] for at in some})
    place = {docid: at for at, docid in enumerate(ids)}
    plain = Contents.of([products[docid] for docid in ids])
    contents = Contents(plain.texts, plain.traits, encoders.texts("search", plain.texts))
    tasks = []
    for documents in judged.values():
        good = sorted(
            (docid for docid, rating in documents.items() if rating >= 2), key=lambda d: (-documents[d], d)
        )
        if len(good) >= 3:
            tasks.append((place[good[0]], {place[docid]: documents[docid] for docid in good[1:]}))
    result: dict[str, Any] = {"queries": len(tasks), "products": len(ids)}
    for name, vector_ND in blends_of(contents, contents, weights):
        gains, recalls = [], []
        for seed, wanted in tasks:
            score_N = vector_ND @ vector_ND[seed]
            score_N[seed] = -np.inf
            order = np.argsort(-score_N, kind="stable")[:100]
            gain = np.array([wanted.get(int(at), 0.0) for at in order], np.float32)
            gains.append(ndcg(gain, np.array(list(wanted.values()), np.float32)))
            recalls.append(float(np.count_nonzero(gain)) / len(wanted))
        result[name] = {"ndcg_at_10": summary(gains), "recall_at_100": summary(recalls)}
    return result


def behaviour(
    histories: Sequence[Sequence[int]], items: Sequence[Item], weights: Mapping[str, float]
) -> dict[str, Any]:
    """Cold items of a log without texts: traits alone speak."""
    rng = np.random.default_rng(7)
    cold_N = rng.random(len(items)) < 0.1
    cold = np.flatnonzero(cold_N)
    place = {int(item): at for at, item in enumerate(cold)}
    tasks = []
    for history in histories:
        nth = next((at for at, item in enumerate(history) if cold_N[item]), 0)
        if nth:
            tasks.append((history[max(0, nth - 20) : nth], place[history[nth]]))
    contents = Contents.of(items)
    result: dict[str, Any] = {
        "shoppers": len(tasks), "cold_items": len(cold), "chance": round(min(1.0, 20 / len(cold)), 4),
    }  # fmt: skip
    fitted = _some(contents, np.sort(rng.permutation(np.flatnonzero(~cold_N))[:5000]))
    parts = ContentSpace.fit(fitted).parts(contents)
    hits = []
    for past, last in tasks:
        score_C = parts[1][cold] @ parts[1][past].mean(axis=0)
        # Ties are broken against us.
        hits.append(float(np.count_nonzero(score_C >= score_C[last]) <= 20))
    result["traits"] = summary(hits)
    return result


def beauty(directory: Path, weights: Mapping[str, float]) -> dict[str, Any]:
    attributes: dict[str, list[int]] = json.loads((directory / "item_attributes.json").read_text())
    number = {item: at for at, item in enumerate(attributes)}
    items = [Item(item, tags=tuple(f"a{a}" for a in found)) for item, found in attributes.items()]
    histories = [
        [number[item] for item in line.split()[1:] if item in number]
        for line in (directory / "sequences.txt").read_text().splitlines()
    ]
    return behaviour(histories, items, weights)


def _product(product: Mapping[str, Any]) -> Item:
    facets = tuple(
        Attribute(key.removeprefix("attr_t_"), str(value))
        for key, value in sorted(product.items())
        if key.startswith("attr_t_")
    )
    return Item(
        str(product["id"]),
        title=str(product.get("title") or product.get("name") or ""),
        brand=str(product.get("supplier") or ""),
        description=str(product.get("short_description") or ""),
        attributes=facets[:20],
    )


def _some(contents: Contents, places: npt.NDArray[np.intp]) -> Contents:
    return Contents(
        [contents.texts[at] for at in places],
        [contents.traits[at] for at in places],
        None if contents.meaning_NE is None else contents.meaning_NE[places],
        None if contents.picture_NE is None else contents.picture_NE[places],
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="directory of the data sets")
    parser.add_argument("--cache", type=Path, help="directory that keeps vectors between runs")
    parser.add_argument(
        "--weights", type=float, nargs=4, default=list(WEIGHTS.values()), help="of " + ", ".join(PARTS)
    )
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    weights = dict(zip(PARTS, arguments.weights, strict=True))
    encoders = Encoders(arguments.cache)
    results: dict[str, Any] = {"weights": weights}
    measures: dict[str, tuple[str, Callable[[Path], dict[str, Any]]]] = {
        "fashion": ("fashion_images", lambda path: fashion(path, encoders, weights)),
        "search": ("chorus_icecat", lambda path: search(path, encoders, weights)),
        "beauty": ("beauty", lambda path: beauty(path, weights)),
    }
    for name, (directory, measure) in measures.items():
        if (arguments.data / directory).is_dir():
            results[name] = measure(arguments.data / directory)
            for key, value in results[name].items():
                print(f"{name:8} {key:28} {value}", flush=True)
    for kind, seconds in encoders.seconds.items():
        if seconds:
            results[f"{kind}_ms"] = round(1e3 * float(np.median(seconds)), 1)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
