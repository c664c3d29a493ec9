"""A person's events as a model reads them. The one preprocessing of training and serving.

1. Only kinds that express interest count (`INTEREST_KINDS`), of items that the model knows.
2. A run of events with the same item is one event, the last of the run: someone
   who views, views again and buys did one thing, and what counts is how it ended.
3. Oldest first; the encoder sees the newest L, padded on the left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

# Item view, cart addition, purchase, rating, review, wish-list, share, recommendation click:
# shopkeeper.feedback.v1.EventKind.
INTEREST_KINDS = (3, 4, 6, 8, 9, 10, 11, 12)
# One more than the largest EventKind; 0 is padding.
KIND_COUNT = 18
# By kind, and one entry more: a kind of a later contract is clipped to it. `np.isin` takes ten times as long.
_IS_INTEREST = np.isin(np.arange(KIND_COUNT + 1), INTEREST_KINDS)


@dataclass(frozen=True, slots=True)
class History:
    """What is left of a person's events, oldest first.

    Attributes:
        indices_H: item indices, int64.
        kinds_H: event kinds, int32.
    """

    indices_H: npt.NDArray[np.int64]
    kinds_H: npt.NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.indices_H)


def history_from_events(
    item_ids_oldest_first: Sequence[str],
    kinds_oldest_first: Sequence[int],
    index_of: Callable[[str], int | None],
) -> History:
    """Returns the history of one person's events; unknown items and other kinds are skipped.

    Args:
        item_ids_oldest_first: one item id an event.
        kinds_oldest_first: its EventKind, as many.
        index_of: `Bundle.index_of`.
    """
    indices: list[int] = []
    kinds: list[int] = []
    for item_id, kind in zip(item_ids_oldest_first, kinds_oldest_first, strict=True):
        if kind not in INTEREST_KINDS:
            continue
        index = index_of(item_id)
        if index is None:
            continue
        if indices and indices[-1] == index:
            kinds[-1] = kind
        else:
            indices.append(index)
            kinds.append(kind)
    return History(np.array(indices, np.int64), np.array(kinds, np.int32))


def mark_clean_events(
    user_E: npt.NDArray[np.integer], item_E: npt.NDArray[np.integer], kind_E: npt.NDArray[np.integer]
) -> npt.NDArray[np.bool_]:
    """Returns which events the rules above keep, (E,), for events sorted by person, then oldest first.

    The same as `history_from_events` of every person, without a loop. `item_E` is negative for an
    unknown item.
    """
    keep_E = (item_E >= 0) & _IS_INTEREST.take(kind_E, mode="clip")
    kept = np.flatnonzero(keep_E)
    user_K, item_K = user_E[kept], item_E[kept]
    repeated_K = np.zeros(len(kept), bool)
    repeated_K[:-1] = (user_K[1:] == user_K[:-1]) & (item_K[1:] == item_K[:-1])
    keep_E[kept[repeated_K]] = False
    return keep_E


def encoder_inputs(
    history: History, item_vectors_ID: npt.NDArray[np.float32], max_history: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Returns what the encoder reads: vectors (L, D) float32, kinds (L,) int32, mask (L,) float32.

    Left-padded with zeros, the newest event last; the mask is 1 where there is an event.
    """
    length = min(len(history), max_history)
    vectors_LD = np.zeros((max_history, item_vectors_ID.shape[1]), np.float32)
    kinds_L = np.zeros(max_history, np.int32)
    mask_L = np.zeros(max_history, np.float32)
    if length:
        vectors_LD[-length:] = item_vectors_ID[history.indices_H[-length:]]
        kinds_L[-length:] = history.kinds_H[-length:]
        mask_L[-length:] = 1.0
    return vectors_LD, kinds_L, mask_L
