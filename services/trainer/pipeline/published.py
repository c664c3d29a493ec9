"""A published version on today's histories: for the gate's comparison and for evaluations. NumPy and LiteRT."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime

import numpy as np
import numpy.typing as npt

from services.trainer.pipeline.dataset import HeldOut, Histories
from services.trainer.pipeline.evaluation import Contestants, Neighbours
from shared.bundle import Bundle
from shared.bundle.history import History, encoder_inputs, mark_clean_events
from shared.bundle.scoring import Companion, CooccurrenceMatrix
from shared.ranking_metrics import Interval

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]

# Below any logit, and still a number.
_UNKNOWN_BIAS = np.float32(-1e6)


def index_in(bundle: Bundle, histories: Histories) -> Int64:
    """Returns the bundle's index of each item of the histories, (I,); -1 for what it does not know."""
    found = [bundle.index_of(item_id) for item_id in histories.item_ids]
    return np.array([-1 if index is None else index for index in found], np.int64)


def contestants_of(
    bundle: Bundle,
    histories: Histories,
    popularity_I: Float32,
    popularity_decayed_I: Float32,
    neighbours: Mapping[str, Neighbours] | None = None,
) -> Contestants:
    """Returns the version as a contestant over the items of the histories; what it does not know comes last."""
    index_I = index_in(bundle, histories)
    known_I = index_I >= 0
    vectors_ID = np.where(known_I[:, None], bundle.item_vectors[index_I], 0).astype(np.float32)
    bias_I = np.where(known_I, bundle.item_bias[index_I], _UNKNOWN_BIAS).astype(np.float32)
    return Contestants(
        vectors_ID,
        bias_I,
        _companion_of(bundle, index_I),
        popularity_I,
        popularity_decayed_I,
        neighbours or {},
        known_I=known_I,
    )


def _companion_of(bundle: Bundle, index_I: Int64) -> Companion:
    companion = bundle.companion
    known_I1 = (index_I >= 0)[:, None]

    def factors(values_JR: Float32 | None) -> Float32 | None:
        return None if values_JR is None else np.where(known_I1, values_JR[index_I], 0).astype(np.float32)

    backward = None if companion.backward is None else _renumbered(companion.backward, index_I)
    return Companion(
        companion.scoring,
        _renumbered(companion.forward, index_I),
        backward,
        factors(companion.attribute_queries_IR),
        factors(companion.attribute_keys_IR),
    )


def _renumbered(matrix: CooccurrenceMatrix, index_I: Int64) -> CooccurrenceMatrix:
    item_of = np.full(matrix.item_count, -1, np.int64)
    item_of[index_I[index_I >= 0]] = np.flatnonzero(index_I >= 0)
    row_N = item_of[np.repeat(np.arange(matrix.item_count), np.diff(matrix.indptr_I1))]
    column_N = item_of[matrix.indices_N]
    keep = np.flatnonzero((row_N >= 0) & (column_N >= 0))
    keep = keep[np.lexsort((column_N[keep], row_N[keep]))]
    counts_I = np.bincount(row_N[keep], minlength=len(index_I))
    return CooccurrenceMatrix(
        np.concatenate([[0], np.cumsum(counts_I)]).astype(np.int64),
        column_N[keep].astype(np.int32),
        matrix.weights_N[keep],
    )


def encode_published(
    bundle: Bundle, histories: Histories, held_out: HeldOut, check: Callable[[], None]
) -> Float32:
    """Returns the query vector before each held-out event, (B, D), computed as it is served."""
    index_I = index_in(bundle, histories)
    query_BD = np.zeros((len(held_out), bundle.dimension), np.float32)
    for row in range(len(held_out)):
        items, kinds = held_out.prefix(histories, row)
        index_H = index_I[items]
        places = np.flatnonzero(mark_clean_events(np.zeros(len(index_H), np.int32), index_H, kinds))
        if len(places):
            history = History(index_H[places], kinds[places])
            query_BD[row] = bundle.encoder.encode(
                *encoder_inputs(history, bundle.item_vectors, bundle.max_history)
            )
        if row % 256 == 0:
            check()
    return query_BD


def newer_than(bundle: Bundle, histories: Histories, held_out: HeldOut) -> Int64:
    """Returns the rows whose event is later than anything that the version was trained on."""
    last = datetime.fromisoformat(bundle.manifest["data"]["last_event_at"])
    time_B = histories.time_E[histories.start_U1[held_out.user_B] + held_out.prefix_B]
    return np.flatnonzero(time_B > round(last.timestamp() * 1e6))


def published_ndcg(bundle: Bundle, split: str, exclude_seen: bool) -> tuple[Interval | None, str]:
    """Returns the NDCG@10 that a version was measured at under this protocol, or None and why there is none."""
    evaluation = bundle.manifest.get("evaluation", {})
    measured = (evaluation.get("split", "leave_one_out"), evaluation.get("exclude_seen", True))
    if measured != (split, exclude_seen):
        return None, (
            "too few held-out events are newer than it, and it was measured under another protocol "
            f"({measured[0]}, items seen before {'excluded' if measured[1] else 'included'})"
        )
    try:
        entry = bundle.manifest["metrics"]["ndcg@10"]
        return Interval(float(entry["value"]), float(entry["low"]), float(entry["high"])), ""
    except (KeyError, TypeError, ValueError):
        return None, "too few held-out events are newer than it, and its manifest has no NDCG@10"


def published_slices(bundle: Bundle, min_people: int) -> dict[str, dict[str, Interval]]:
    """Returns what a version was measured at on each part of the people, by its name; parts of too few left out.

    Parts of which its manifest says nothing that can be read are none.
    """
    found = {}
    for part in bundle.manifest.get("slices", ()):
        try:
            if part["users"] >= min_people and "incumbent_metrics" not in part:
                found[part["name"]] = {
                    name: Interval(float(entry["value"]), float(entry["low"]), float(entry["high"]))
                    for name, entry in part["metrics"].items()
                }
        except (KeyError, TypeError, ValueError):
            continue
    return {name: metrics for name, metrics in found.items() if "ndcg@10" in metrics}
