"""The search of large catalogues alone: `python -m tests.benchmarks.bench_search --items 10000000`.

Clustered random vectors, the index that a server makes of them, and queries near items. Times are CPU of the one thread, so
that they hold on a machine with other work; recall is against the exact product. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import numpy as np
import psutil

from services.recommend.storage.search import ApproximateSearch

DIMENSION = 64
CANDIDATES = 1_000
QUERIES = 10


def vectors_of(items: int, random: np.random.Generator) -> np.ndarray:
    centres = random.standard_normal((max(20, items // 100), DIMENSION), dtype=np.float32)
    vectors_ID = np.empty((items, DIMENSION), np.float32)
    for start in range(0, items, 500_000):
        piece_ND = vectors_ID[start : start + 500_000]
        piece_ND[:] = 0.7 * random.standard_normal(piece_ND.shape, dtype=np.float32)
        piece_ND += centres[random.integers(0, len(centres), len(piece_ND))]
        piece_ND /= 4
    return vectors_ID


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--items", type=int, default=10_000_000)
    items = parser.parse_args().items
    random = np.random.default_rng(1)
    vectors_ID = vectors_of(items, random)
    began = time.process_time()
    search = ApproximateSearch(vectors_ID, np.zeros(items, np.float32))
    index_seconds = time.process_time() - began
    scan_ms, search_ms, recall = [], [], []
    for item in random.integers(0, items, QUERIES + 1):
        query_D = 4 * vectors_ID[item] + 0.3 * random.standard_normal(DIMENSION, dtype=np.float32)
        query_D *= 4 / np.linalg.norm(query_D)
        start = time.thread_time()
        found_C = search.best(query_D, CANDIDATES)
        scanned = time.thread_time()
        score_C = vectors_ID[found_C] @ query_D
        scan_ms.append(1e3 * (scanned - start))
        search_ms.append(1e3 * (time.thread_time() - start))
        best = np.argpartition(-(vectors_ID @ query_D), 100)[:100]
        recall.append(len(np.intersect1d(best, found_C[np.argsort(-score_C)[:100]])) / 100)
    numbers = {
        "items": items,
        "index_cpu_seconds": round(index_seconds, 1),
        # The first query warms.
        "scan_cpu_ms": round(statistics.median(scan_ms[1:]), 2),
        "search_cpu_ms": round(statistics.median(search_ms[1:]), 2),
        "recall_at_100": round(statistics.mean(recall[1:]), 4),
        "rss_mb": round(psutil.Process().memory_info().rss / 1e6),
    }
    print(json.dumps(numbers))


if __name__ == "__main__":
    main()
