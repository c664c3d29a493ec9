"""Which items of a large catalogue have the highest inner products with a query, in a fraction of a pass.

Up to MOST_EXACT items one product over all of them is faster than any index (0.1 ms for 12,000 items of 64
dimensions, 1 ms for 100,000). Beyond, faiss scans 4-bit codes of all items (product quantisation with one
code a dimension, André et al., 2015: "Cache locality is not enough"), and the best of the scan are scored
exactly from the item vectors themselves: a second copy of them inside the index would be the larger part of it.

The index is made when a version is loaded, not when it is published: it takes some five seconds a million
items beside a version that serves meanwhile, a bundle stays arrays that anybody can read, and no file of a
format that a library parses in C++ comes over the wire.
"""

from __future__ import annotations

import math

import numpy as np

from services.recommend.ports import Float32, Int64

MOST_EXACT = 50_000
_TRAINING_ITEMS = 65_536
_SAMPLED_ITEMS = 4_096


class ApproximateSearch:
    """Candidates by inner product plus bias, over the vectors of one model version. For any number of threads.

    Args:
        vectors_ID: item vectors, float32.
        bias_I: added to each item's product.
        seed: of the samples that the codes and the partition are learnt from.
    """

    def __init__(self, vectors_ID: Float32, bias_I: Float32, *, seed: int = 0) -> None:
        # Imported here: 40 MB that a shop of a few thousand items does not need.
        import faiss

        item_count, dimension = vectors_ID.shape
        random = np.random.default_rng(seed)
        self._item_count = item_count
        # A bias is one more dimension, by which every query is 1.
        self._with_bias = bool(np.any(bias_I != bias_I[:1]))
        width = dimension + self._with_bias
        faiss.omp_set_num_threads(1)
        self._index = faiss.IndexPQFastScan(width, width, 4, faiss.METRIC_INNER_PRODUCT)
        training = np.sort(random.choice(item_count, min(item_count, _TRAINING_ITEMS), replace=False))
        self._index.train(self._extended(vectors_ID[training], bias_I[training]))
        # In pieces: the extended copy of ten million vectors would be 2.6 GB for a moment.
        for start in range(0, item_count, 262_144):
            piece = slice(start, start + 262_144)
            self._index.add(self._extended(vectors_ID[piece], bias_I[piece]))
        sample = random.choice(item_count, min(item_count, _SAMPLED_ITEMS), replace=False)
        self._sample_vectors_SD = np.ascontiguousarray(vectors_ID[sample])
        self._sample_bias_S = np.ascontiguousarray(bias_I[sample])

    def best(self, query_D: Float32, count: int) -> Int64:
        """Returns about the `count` items of the highest logits, int64, in no order that counts."""
        query = np.ones((1, len(query_D) + self._with_bias), np.float32)
        query[0, : len(query_D)] = query_D
        indices: Int64 = self._index.search(query, min(count, self._item_count))[1][0]
        return indices[indices >= 0]

    def log_partition(self, query_D: Float32, best_logits_C: Float32) -> float:
        """Returns an estimate of log sum_i exp logits_i, from the best items' logits and a sample of the rest.

        Whatever lies above the lowest of the best is taken to be among them; the rest is estimated by
        the items of a fixed sample that lie below. Unbiased where the best are the best.
        """
        sample_S = self._sample_vectors_SD @ query_D + self._sample_bias_S
        lowest = best_logits_C.min() if len(best_logits_C) else np.float32(np.inf)
        rest_S = sample_S[sample_S < lowest].astype(np.float64)
        largest = float(max(best_logits_C.max(initial=-np.inf), sample_S.max()))
        total = float(np.exp(best_logits_C.astype(np.float64) - largest).sum())
        total += float(np.exp(rest_S - largest).sum()) * self._item_count / len(sample_S)
        return largest + math.log(max(total, 1e-300))

    def sampled_partitions(self, queries_QD: Float32) -> Float32:
        """Returns estimates of log sum_i exp logits_i from the sample alone, (Q,): good for differences."""
        logits_QS = queries_QD @ self._sample_vectors_SD.T + self._sample_bias_S
        largest_Q1 = logits_QS.max(axis=1, keepdims=True)
        mean_Q = np.exp(logits_QS - largest_Q1).mean(axis=1)
        estimate_Q: Float32 = largest_Q1[:, 0] + np.log(mean_Q) + np.float32(math.log(self._item_count))
        return estimate_Q

    def _extended(self, vectors_ND: Float32, bias_N: Float32) -> Float32:
        if self._with_bias:
            return np.concatenate([vectors_ND, bias_N[:, None]], axis=1)
        return np.ascontiguousarray(vectors_ND)
