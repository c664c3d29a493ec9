"""What one person adds to the private counts, bounded before anybody's is added to it. Pure NumPy.

    w_ab = sum over events i < j <= i + WINDOW of the newest MAX_EVENTS with items a, b, of 1 / (j - i)
    p_a  = 1 for each item among them

    share = ( floor(G c_w w min(1, C / |w|)) ,  floor(G c_p p min(1, C / |p|)) ) / G,   c_w^2 + c_p^2 = 1

in units of 1 / G: whole numbers, whose sum over people is exact in whatever order it is made, and whose L2 norm is
at most C for every person, whatever that person did. Nobody else's data has a part in it.

E = events, U = people, I = items, N = entries.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from services.trainer.pipeline.dataset import Cleaning, EventColumns, Histories, clean, flat_positions

Int64 = npt.NDArray[np.int64]

# Public constants: chosen on the simulated population, never on anybody's data.
MAX_EVENTS = 50
WINDOW = 8
POPULARITY_SHARE = 0.05
# Units of the clipping norm. Rounding down by one of them is far below the noise.
GRID = 1 << 20
# Rounding of the floats before the floor must not lift a norm above its bound.
_SAFETY = 1.0 - 1e-9
_CHUNK_USERS = 20_000
_LEAST_MERGED = 2_000_000
_LAG_BITS = 9


@dataclass(frozen=True, slots=True, eq=False)
class Shares:
    """Sums of shares, or one person's share, in units of clip_norm / GRID.

    Attributes:
        pair_N: a * I + b, ascending, distinct.
        weight_N: of the pairs, int64.
        popularity_I: int64.
    """

    pair_N: Int64
    weight_N: Int64
    popularity_I: Int64


def over_catalogue(events: EventColumns, cleaning: Cleaning, catalogue: list[str]) -> Histories:
    """Returns clean histories over the items of the catalogue, which is public, in its order.

    Which items occur in the log tells of people; which the shop sells does not. Events of others are left out.
    """
    index_of = {item_id: index for index, item_id in enumerate(catalogue)}
    index_I = np.array([index_of.get(item_id, -1) for item_id in events.item_ids], np.int64)
    known_E = index_I[events.item_E] >= 0 if len(events) else np.zeros(0, bool)
    known = EventColumns(
        events.user_E[known_E], events.item_E[known_E], events.kind_E[known_E],
        events.time_E[known_E], events.order_E[known_E], events.item_ids,
    )  # fmt: skip
    found = clean(known, cleaning)
    renumbered_I = np.array([index_of[item_id] for item_id in found.item_ids], np.int32)
    item_E = renumbered_I[found.item_E] if len(found.item_E) else found.item_E
    return Histories(found.start_U1, item_E, found.kind_E, found.time_E, catalogue, found.user_U)


def take_people(histories: Histories, rows: Int64) -> Histories:
    """Returns the histories of some people."""
    length_U = histories.length_U[rows]
    kept = flat_positions(histories.start_U1[:-1][rows], length_U)
    return Histories(
        np.concatenate([[0], np.cumsum(length_U)]).astype(np.int64),
        histories.item_E[kept], histories.kind_E[kept], histories.time_E[kept],
        histories.item_ids, histories.user_U[rows],
    )  # fmt: skip


def sum_shares(histories: Histories, clip_norm: float, window: int = WINDOW) -> Shares:
    """Returns the sum of everybody's share."""
    pairs: list[Int64] = [np.zeros(0, np.int64)]
    weights: list[Int64] = [np.zeros(0, np.int64)]
    popularity_I = np.zeros(histories.item_count, np.int64)
    waiting = 0
    for _user_N, pair_N, weight_N, item_P, count_P in shares_of_people(histories, clip_norm, window):
        pairs.append(pair_N)
        weights.append(weight_N)
        waiting += len(pair_N)
        # As much as what is summed already, or more: each pair is sorted a logarithmic number of times.
        if waiting > max(len(pairs[0]), _LEAST_MERGED):
            merged = _merge(np.concatenate(pairs), np.concatenate(weights))
            pairs, weights, waiting = [merged[0]], [merged[1]], 0
        # Not bincount's own weights: floats, whose sums are not exact.
        np.add.at(popularity_I, item_P, count_P)
    return Shares(*_merge(np.concatenate(pairs), np.concatenate(weights)), popularity_I)


def shares_of_people(
    histories: Histories, clip_norm: float, window: int = WINDOW
) -> Iterator[tuple[Int64, Int64, Int64, Int64, Int64]]:
    """Yields (user_N, pair_N, weight_N, item_P, count_P) of some people after the other; zeros are left out."""
    length_U = np.minimum(histories.length_U, MAX_EVENTS)
    start_U = histories.start_U1[1:] - length_U
    items = histories.item_count
    for first in range(0, histories.user_count, _CHUNK_USERS):
        users = slice(first, min(first + _CHUNK_USERS, histories.user_count))
        part_U = length_U[users]
        positions = flat_positions(start_U[users], part_U)
        item_E = histories.item_E[positions].astype(np.int64)
        user_E = np.repeat(np.arange(len(part_U)), part_U)
        place_E = np.arange(len(item_E)) - np.repeat(np.cumsum(part_U) - part_U, part_U)
        packed: list[Int64] = []
        later = np.arange(len(item_E))
        for lag in range(1, window + 1):
            later = later[place_E[later] >= lag]
            pair = (user_E[later] * items + item_E[later - lag]) * items + item_E[later]
            packed.append(pair << _LAG_BITS | lag)
        key_N = np.sort(np.concatenate(packed))
        lag_N = key_N & ((1 << _LAG_BITS) - 1)
        key_N, weight_N = _merge(key_N >> _LAG_BITS, 1.0 / lag_N)
        user_N = key_N // (items * items)
        unit_w = clip_norm * np.sqrt(1 - POPULARITY_SHARE)
        share_N = _clipped(user_N, weight_N, len(part_U), clip_norm, unit_w / clip_norm)
        user_P, item_P = np.divmod(np.unique(user_E * items + item_E), items)
        count_P = _clipped(
            user_P, np.ones(len(user_P)), len(part_U), clip_norm, float(np.sqrt(POPULARITY_SHARE))
        )
        some = np.flatnonzero(share_N)
        yield user_N[some] + first, key_N[some] % (items * items), share_N[some], item_P, count_P


def _clipped(
    user_N: Int64, value_N: npt.NDArray[np.float64], users: int, clip_norm: float, part: float
) -> Int64:
    """Returns values in grid units, with each person's L2 norm at most part * GRID."""
    norm_U = np.sqrt(np.bincount(user_N, value_N * value_N, minlength=users))
    scale_U = part * _SAFETY * GRID / np.maximum(norm_U, clip_norm)
    return np.floor(value_N * scale_U[user_N]).astype(np.int64)


def _merge(key_N: Int64, value_N: npt.NDArray) -> tuple[Int64, npt.NDArray]:
    """Returns distinct keys, ascending, and the sums of their values."""
    if not len(key_N):
        return key_N, value_N
    order = np.argsort(key_N, kind="stable")
    key_N, value_N = key_N[order], value_N[order]
    first = np.flatnonzero(np.concatenate([[True], key_N[1:] != key_N[:-1]]))
    return key_N[first], np.add.reduceat(value_N, first)
