"""What diversity costs and brings on real histories: `make bench-diversity DATA=DIR`.

DIR holds `sequences.txt` (a person a line: name, then items by time) and perhaps `item_attributes.json` (item: list of
attributes). The last item of each person is the test. Candidates are the best hundred by what was counted after the
person's newest items (directed, damped, decayed, as the co-occurrence of the blend), popularity behind it; items are
vectors of length 1 by the singular vectors of what is seen together, as 64 dimensions of a model would be. Nothing is
trained, so that the order of the page is what differs, and nothing else. The reordering is that of the service.

Of ten shown: HR and NDCG; the mean distance within the page, 1 - cosine; the mean share of attributes that two items of the page
do NOT share (Jaccard), which no algorithm sees; the share of the catalogue that is shown to anybody. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import scipy.sparse as sparse
from scipy.sparse.linalg import svds

from services.recommend.domain.ranking import determinantal_point_process, maximal_marginal_relevance

_SHOWN, _DEPTH, _DIMENSION, _WINDOW, _NEWEST = 10, 100, 64, 10, 10
_ALGORITHMS = {"mmr": maximal_marginal_relevance, "dpp": determinantal_point_process}


def histories_of(path: Path) -> tuple[list[np.ndarray], list[str]]:
    number_of: dict[str, int] = {}
    items_of: dict[str, list[int]] = {}
    for line in path.read_text(encoding="utf-8-sig").splitlines():
        if line.strip():
            name, *items = line.split()
            items_of.setdefault(name, []).extend(number_of.setdefault(i, len(number_of)) for i in items)
    return [np.array(items) for items in items_of.values() if len(items) >= 3], list(number_of)


def counted(histories: list[np.ndarray], items: int) -> sparse.csr_matrix:
    """Returns what followed what within the window, by distance, divided by the root of how often both were seen."""
    earlier, later, weight = [], [], []
    for history in histories:
        for distance in range(1, min(_WINDOW, len(history) - 1) + 1):
            earlier.append(history[:-distance])
            later.append(history[distance:])
            weight.append(np.full(len(history) - distance, 1 / distance))
    pairs = (np.concatenate(weight), (np.concatenate(earlier), np.concatenate(later)))
    counts = sparse.csr_matrix(pairs, (items, items))
    seen = np.bincount(np.concatenate(histories), minlength=items).astype(float) + 1
    scale = sparse.diags(1 / np.sqrt(seen))
    return (scale @ counts @ scale).tocsr()


def vectors_of(counts: sparse.csr_matrix) -> np.ndarray:
    left, value, _ = svds(counts + counts.T, k=_DIMENSION, random_state=0)
    vectors = left * np.sqrt(value)
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.where(length > 1e-9, vectors / np.maximum(length, 1e-9), 0).astype(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--people", type=int, default=4_000)
    options = parser.parse_args()
    everybody, item_ids = histories_of(options.data / "sequences.txt")
    before = [history[:-1] for history in everybody]
    items = len(item_ids)
    counts = counted(before, items)
    vectors = vectors_of(counts)
    popularity = np.bincount(np.concatenate(before), minlength=items)
    attributes: list[frozenset[int]] = []
    if (told := options.data / "item_attributes.json").exists():
        of = json.loads(told.read_text())
        attributes = [frozenset(of.get(item_id, ())) for item_id in item_ids]
    chosen = np.random.default_rng(0).choice(
        len(everybody), min(options.people, len(everybody)), replace=False
    )

    candidates = []
    for person in chosen.tolist():
        newest = before[person][-_NEWEST:]
        decay = 0.6065 ** np.arange(len(newest))[::-1]
        score = np.asarray(counts[newest].T @ decay).ravel()
        score = np.log1p(30 * score) + 1e-6 * np.log1p(popularity)
        score[before[person]] = -np.inf
        best = np.argpartition(-score, _DEPTH)[:_DEPTH]
        best = best[np.argsort(-score[best], kind="stable")]
        candidates.append((best, score[best].astype(np.float32), int(everybody[person][-1])))

    found: dict[str, dict[str, float]] = {}
    for name, strength in [("none", 0.0)] + [(n, s) for n in _ALGORITHMS for s in (0.05, 0.1, 0.2, 0.4)]:
        label = name if not strength else f"{name} {strength:g}"
        found[label] = judged(name, strength, candidates, vectors, attributes)
        print(f"{label:10} {found[label]}", flush=True)
    print(json.dumps({"data": options.data.name, "people": len(chosen), "items": items, **found}))


def judged(
    name: str,
    strength: float,
    candidates: list[tuple[np.ndarray, np.ndarray, int]],
    vectors: np.ndarray,
    attributes: list[frozenset[int]],
) -> dict[str, float]:
    reciprocal, distance, unlike = [], [], []
    shown: set[int] = set()
    pairs = np.triu_indices(_SHOWN, 1)
    spent = 0.0
    for rows, score, target in candidates:
        page = rows[:_SHOWN]
        if strength:
            began = time.thread_time()
            page = rows[_ALGORITHMS[name](score, vectors[rows], strength, _SHOWN)]
            spent += time.thread_time() - began
        shown.update(page.tolist())
        hit = np.flatnonzero(page == target)
        reciprocal.append(1 / np.log2(hit[0] + 2) if len(hit) else 0.0)
        distance.append(1 - float((vectors[page] @ vectors[page].T)[pairs].mean()))
        if attributes:
            of = [attributes[row] for row in page.tolist()]
            shared = [len(of[a] & of[b]) / max(1, len(of[a] | of[b])) for a, b in zip(*pairs, strict=True)]
            unlike.append(1 - float(np.mean(shared)))
    gain = np.array(reciprocal)
    figures = {
        "hr@10": round(float((gain > 0).mean()), 4),
        "ndcg@10": round(float(gain.mean()), 4),
        "distance": round(float(np.mean(distance)), 4),
        "coverage": round(len(shown) / len(vectors), 4),
        "cpu_us": round(1e6 * spent / len(candidates), 1),
    }
    if unlike:
        figures["attributes_unlike"] = round(float(np.mean(unlike)), 4)
    return figures


if __name__ == "__main__":
    main()
