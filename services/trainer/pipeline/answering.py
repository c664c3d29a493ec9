"""The best items of everybody: what is served, for whole populations. NumPy and SciPy.

B = people, I = items, D = dimension, k = answers. Exact: every item is scored, and what serving would show is what comes out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from services.trainer.pipeline.batch_companion import BatchCompanion
from services.trainer.pipeline.dataset import HeldOut, Histories

if TYPE_CHECKING:
    from services.trainer.pipeline.evaluation import Contestants

Float32 = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]

# Scores held at once: 32 MB, and as much again for one of the terms. Every chunk reads the vectors of all items.
_SCORES = 8_000_000
# From so many items on, the best are looked for among the blocks with the largest maxima.
_BLOCKED_ITEMS, _BLOCK = 4_096, 64


def best_items(
    histories: Histories,
    asked: HeldOut,
    query_BD: Float32,
    served: Contestants,
    exclude_seen: bool,
    k: int = 20,
    check: Callable[[], None] = lambda: None,
) -> Int32:
    """Returns the k best items of what is served, best first, (B, k), -1 where there are fewer.

    Without any event it is the most popular ones; what must be foretold is a candidate like any other.

    Args:
        check: called between chunks of people; raises to stop.
    """
    batch = BatchCompanion(served.companion, served.known_I)
    best_BK = np.full((len(asked), k), -1, np.int32)
    step = max(1, _SCORES // max(histories.item_count, 1))
    weight = np.float32(served.companion.scoring.sequence)
    for first in range(0, len(asked), step):
        check()
        rows = slice(first, min(first + step, len(asked)))
        part = asked.take(np.arange(rows.start, rows.stop))
        seen = [part.prefix(histories, row)[0].astype(np.int64) for row in range(len(part))]
        # The partition is the same for all items of a row: it changes no order.
        score_BI = np.asarray((weight * query_BD[rows]) @ served.item_vectors_ID.T, np.float32)
        score_BI += served.item_bias_I
        batch.add_to(score_BI, seen)
        score_BI[part.prefix_B == 0] = served.popularity_I
        if exclude_seen:
            score_BI[np.repeat(np.arange(len(part)), part.prefix_B), np.concatenate(seen)] = -np.inf
        chosen_BK = top_items(score_BI, k)
        allowed_BK = np.isfinite(np.take_along_axis(score_BI, chosen_BK, axis=1))
        best_BK[rows, : chosen_BK.shape[1]] = np.where(allowed_BK, chosen_BK, -1)
    return best_BK


def top_items(score_BI: Float32, k: int) -> Int32:
    """Returns the k best items of each row, best first, (B, k or fewer); of equal ones any."""
    rows, items = score_BI.shape
    k = min(k, items)
    if items < _BLOCKED_ITEMS or items < 2 * k * _BLOCK:
        return _top_of_all(score_BI, k)
    # The k best lie in the k blocks whose maxima are the largest, or behind the last whole block.
    blocks = items // _BLOCK
    largest_BG = score_BI[:, : blocks * _BLOCK].reshape(rows, blocks, _BLOCK).max(axis=2)
    block_BK = np.argpartition(-largest_BG, k - 1, axis=1)[:, :k]
    inside_BN = (block_BK[:, :, None] * _BLOCK + np.arange(_BLOCK)).reshape(rows, -1)
    behind = np.arange(blocks * _BLOCK, items)
    item_BN = np.concatenate([inside_BN, np.broadcast_to(behind, (rows, len(behind)))], axis=1)
    place_BK = _top_of_all(np.take_along_axis(score_BI, item_BN, axis=1), k)
    return np.take_along_axis(item_BN, place_BK, axis=1).astype(np.int32)


def _top_of_all(score_BI: Float32, k: int) -> Int32:
    best_BK = np.argpartition(-score_BI, k - 1, axis=1)[:, :k]
    order_BK = np.argsort(-np.take_along_axis(score_BI, best_BK, axis=1), axis=1, kind="stable")
    return np.take_along_axis(best_BK, order_BK, axis=1).astype(np.int32)
