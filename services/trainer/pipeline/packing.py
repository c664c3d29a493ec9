"""People packed into rows of tokens, so that short histories waste nothing. Pure NumPy.

R = rows, T = tokens of a row, S = pieces of histories, K = targets of a token.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from services.trainer.pipeline.dataset import HeldOut, Histories, flat_positions

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class PackedRows:
    """Rows of tokens.

    Attributes:
        item_RT: item index, 0 in padding.
        kind_RT: event kind, 0 in padding.
        segment_RT: 1, 2, … for the pieces of a row, 0 in padding. Tokens of different segments never meet.
        target_RTK: the next K items of the same person, nearest first, -1 where there is none.
        last_S: flat position (row * T + token) of each piece's last token.
    """

    item_RT: Int32
    kind_RT: Int32
    segment_RT: Int32
    target_RTK: Int32
    last_S: Int64

    @property
    def filled_share(self) -> float:
        """Share of the tokens that are not padding."""
        return float((self.segment_RT > 0).mean()) if self.segment_RT.size else 0.0


def place_pieces(
    length_S: Int64, row_tokens: int, generator: np.random.Generator | None = None
) -> tuple[Int64, Int64, int]:
    """Returns the row and the first token of each piece, and the number of rows.

    Best fit, longest first; pieces of one length are shuffled, so that every epoch has other neighbours.
    Each piece must fit a row.
    """
    shuffled = np.arange(len(length_S)) if generator is None else generator.permutation(len(length_S))
    order = shuffled[np.argsort(-length_S[shuffled], kind="stable")]
    row_S = np.zeros(len(length_S), np.int64)
    offset_S = np.zeros(len(length_S), np.int64)
    # Rows by free tokens, a stack for each amount; bit f of `occupied` says that stack f holds one.
    rows_with: list[list[int]] = [[] for _ in range(row_tokens + 1)]
    occupied = 0
    rows = 0
    for piece, length in zip(order.tolist(), length_S[order].tolist(), strict=True):
        fitting = occupied >> length
        if fitting:
            free = length + (fitting & -fitting).bit_length() - 1
            row = rows_with[free].pop()
            if not rows_with[free]:
                occupied ^= 1 << free
        else:
            free, row = row_tokens, rows
            rows += 1
        row_S[piece], offset_S[piece] = row, row_tokens - free
        left = free - length
        rows_with[left].append(row)
        if left:
            occupied |= 1 << left
    return row_S, offset_S, rows


def pack_pieces(
    start_S: Int64,
    length_S: Int64,
    item_E: Int32,
    kind_E: Int32,
    next_EK: Int32,
    row_tokens: int,
    generator: np.random.Generator | None = None,
) -> PackedRows:
    """Returns pieces of the flat arrays `item_E`, `kind_E`, `next_EK` packed into rows.

    Args:
        start_S, length_S: where each piece lies; at most `row_tokens` long.
        next_EK: targets of each event, (E, K), -1 for none.
    """
    row_S, offset_S, rows = place_pieces(length_S, row_tokens, generator)
    source = flat_positions(start_S, length_S)
    place = flat_positions(row_S * row_tokens + offset_S, length_S)
    # Segments count within a row, in order of their place.
    order = np.lexsort((offset_S, row_S))
    segment_S = np.empty(len(row_S), np.int64)
    ordered_rows = row_S[order]
    first = np.searchsorted(ordered_rows, ordered_rows, "left")
    segment_S[order] = np.arange(len(row_S)) - first + 1

    def spread(values: npt.NDArray[np.integer], empty: int) -> Int32:
        flat = np.full((rows * row_tokens, *values.shape[1:]), empty, np.int32)
        flat[place] = values
        return flat.reshape(rows, row_tokens, *values.shape[1:])

    return PackedRows(
        item_RT=spread(item_E[source], 0),
        kind_RT=spread(kind_E[source], 0),
        segment_RT=spread(np.repeat(segment_S, length_S), 0),
        target_RTK=spread(next_EK[source], -1),
        last_S=row_S * row_tokens + offset_S + length_S - 1,
    )


def next_items(histories: Histories, count: int) -> Int32:
    """Returns the `count` items that follow each event of the same person, (E, K), -1 where there is none."""
    end_E = np.repeat(histories.start_U1[1:], histories.length_U)
    following_EK = np.arange(len(end_E))[:, None] + np.arange(1, count + 1)
    within_EK = following_EK < end_E[:, None]
    return np.where(within_EK, histories.item_E[np.where(within_EK, following_EK, 0)], -1).astype(np.int32)


def pack_for_training(
    histories: Histories, row_tokens: int, generator: np.random.Generator, targets: int = 1
) -> PackedRows:
    """Returns every event that has a next one, with the next `targets` items.

    A history longer than a row is cut from its end, so that the newest piece is full; the last token
    of a piece still knows its targets, the first of the next.
    """
    if not len(histories.item_E):
        nothing = np.zeros((0, row_tokens), np.int32)
        return PackedRows(
            nothing, nothing, nothing, np.zeros((0, row_tokens, targets), np.int32), np.zeros(0, np.int64)
        )
    next_EK = next_items(histories, targets)
    # The last event has no target: it need not be read at all.
    usable_U = np.maximum(histories.length_U - 1, 0)
    pieces_U = -(-usable_U // row_tokens)
    user_S = np.repeat(np.arange(histories.user_count), pieces_U)
    number_S = flat_positions(np.zeros_like(pieces_U), pieces_U)
    end_S = histories.start_U1[user_S] + usable_U[user_S] - number_S * row_tokens
    start_S = np.maximum(end_S - row_tokens, histories.start_U1[user_S])
    return pack_pieces(
        start_S, end_S - start_S, histories.item_E, histories.kind_E, next_EK, row_tokens, generator
    )


def pack_for_encoding(histories: Histories, held_out: HeldOut, row_tokens: int) -> PackedRows:
    """Returns the newest `row_tokens` events before each held-out one; `last_S` are the places of its answers."""
    length_S = np.minimum(held_out.prefix_B, row_tokens)
    start_S = histories.start_U1[held_out.user_B] + held_out.prefix_B - length_S
    nothing_EK = np.full((len(histories.item_E), 0), -1, np.int32)
    return pack_pieces(start_S, length_S, histories.item_E, histories.kind_E, nothing_EK, row_tokens)
