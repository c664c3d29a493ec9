"""The companion of one history at a time: its matrices side by side, so that one pass reads them all.

The same formula as `shared.bundle.scoring`, for a server. There two sparse matrices are gathered, sorted and
summed one after the other; here row h of one matrix holds C[h], B[h] and h itself, in columns of their own, so
that one gather and one sum give c, b and r.

    I = items, H = events of the history, R = those within the window, N = entries, P = parts, C = candidates
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shared.bundle.scoring import Companion, CooccurrenceMatrix

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class FoldedCompanion:
    """What is added to the log-softmax of every item.

    Attributes:
        companion: the formula's own form.
        weights_P: of each part in the blend.
        indptr_I1, columns_N, entries_N: compressed rows of (I, P * I); int64, int32, float32.
    """

    companion: Companion
    weights_P: tuple[float, ...]
    indptr_I1: Int64
    columns_N: npt.NDArray[np.int32]
    entries_N: Float32

    @classmethod
    def of(cls, companion: Companion) -> FoldedCompanion:
        """Returns the companion folded. The first part is C, whatever its weight."""
        scoring, items = companion.scoring, companion.forward.item_count
        parts = [(scoring.lambda_, companion.forward)]
        if companion.backward is not None and scoring.backward:
            parts.append((scoring.backward, companion.backward))
        if scoring.repeat:
            each_I = np.arange(items + 1)
            identity = CooccurrenceMatrix(each_I, each_I[:-1].astype(np.int32), np.ones(items, np.float32))
            parts.append((scoring.repeat, identity))
        ends_PI = np.cumsum([np.diff(matrix.indptr_I1) for _, matrix in parts], axis=0)
        indptr_I1 = np.concatenate([[0], np.cumsum(ends_PI[-1])]).astype(np.int64)
        columns_N = np.empty(indptr_I1[-1], np.int32)
        entries_N = np.empty(indptr_I1[-1], np.float32)
        for p, (_, matrix) in enumerate(parts):
            # Where a part's entries of a row begin, less where they did: no sort, as rows come in order.
            starts_I = indptr_I1[:-1] + (ends_PI[p - 1] if p else 0) - matrix.indptr_I1[:-1]
            place_N = np.repeat(starts_I, np.diff(matrix.indptr_I1))
            place_N += np.arange(len(place_N))
            columns_N[place_N] = matrix.indices_N + np.int32(items * p)
            entries_N[place_N] = matrix.weights_N
        return cls(companion, tuple(weight for weight, _ in parts), indptr_I1, columns_N, entries_N)

    def _gather(self, rows_R: Int64) -> tuple[Int64, Float32, Int64]:
        starts_R = self.indptr_I1[rows_R]
        lengths_R = self.indptr_I1[rows_R + 1] - starts_R
        ends_R = lengths_R.cumsum()
        positions_N = (starts_R - ends_R + lengths_R).repeat(lengths_R)
        positions_N += np.arange(len(positions_N))
        # NumPy indexes and counts by int64; converted once.
        return self.columns_N[positions_N].astype(np.int64), self.entries_N[positions_N], lengths_R

    def counts(self, history_H: Int64) -> tuple[Float32, Float32]:
        """Returns c of every item, and what counts and repeats add to it; (I,) each, float32."""
        scoring, items = self.companion.scoring, self.companion.forward.item_count
        recent_R = history_H[-scoring.window :]
        decay_R = np.float64(scoring.query_decay) ** np.arange(len(recent_R) - 1, -1, -1)
        columns_N, entries_N, lengths_R = self._gather(recent_R)
        c_PI = np.bincount(
            columns_N, entries_N * decay_R.repeat(lengths_R), minlength=len(self.weights_P) * items
        )
        # Most items are counted with nothing: a logarithm for each that is, once for every entry that names it.
        c_N = c_PI[columns_N].astype(np.float32)
        damped_PI = np.zeros(len(c_PI), np.float32)
        damped_PI[columns_N] = np.log1p(np.float32(scoring.scale) * c_N)
        added_I: Float32 = np.dot(np.array(self.weights_P, np.float32), damped_PI.reshape(-1, items))
        return c_PI[:items].astype(np.float32), added_I

    def content(self, history_H: Int64) -> Float32 | None:
        """Returns the attribute term of every item, (I,), float32; None where there is none."""
        return self.companion.content(history_H)

    def added_without(self, history_H: Int64, places_E: Int64, candidates_C: Int64) -> Float32:
        """Returns what would be added to candidates were an event of the history not there, (E, C), float32.

        The later events keep their ages, the earlier ones are one event younger, and one more of them may come
        into the window: row e is `Companion.added_to` of the history without its event e.
        """
        companion, scoring = self.companion, self.companion.scoring
        first = max(0, len(history_H) - scoring.window - 1)
        recent_R, places_E = history_H[first:], places_E - first
        age_R = np.arange(len(recent_R) - 1, -1, -1)
        # Row e: the age that each event would have.
        age_ER = age_R - (np.arange(len(recent_R)) < places_E[:, None])
        decay_ER = np.where(age_ER < scoring.window, np.float64(scoring.query_decay) ** age_ER, 0.0)
        decay_ER[np.arange(len(recent_R)) == places_E[:, None]] = 0.0

        raw_RPC, place_C = self._of_candidates(recent_R, candidates_C)
        c_EPC = np.tensordot(decay_ER, raw_RPC, axes=1).astype(np.float32)
        weights_P1 = np.array(self.weights_P, np.float32)[:, None]
        added_EC: Float32 = (np.log1p(np.float32(scoring.scale) * c_EPC) * weights_P1).sum(axis=1)[:, place_C]
        if companion.attribute_queries_IR is not None and companion.attribute_keys_IR is not None:
            total_E1 = np.maximum(decay_ER.sum(axis=1, keepdims=True), np.finfo(np.float64).tiny)
            mean_ER = (decay_ER / total_E1).astype(np.float32) @ companion.attribute_queries_IR[recent_R]
            added_EC = added_EC + mean_ER @ companion.attribute_keys_IR[candidates_C].T
        return added_EC

    def losses(self, history_H: Int64, candidates_C: Int64) -> Float32:
        """Returns by how much counts and repeats would add less without each history item, (C, H), float32.

        As `Companion.losses`: the others keep their ages.
        """
        scoring = self.companion.scoring
        recent_R = history_H[-scoring.window :]
        decay_R = np.float64(scoring.query_decay) ** np.arange(len(recent_R) - 1, -1, -1)
        raw_RPC, place_C = self._of_candidates(recent_R, candidates_C)
        part_RPC = (raw_RPC * decay_R[:, None, None]).astype(np.float32)
        total_PC = part_RPC.sum(axis=0)
        scale, weights_P1 = np.float32(scoring.scale), np.array(self.weights_P, np.float32)[:, None]
        whole_PC = np.log1p(scale * total_PC)
        # Most events have never been counted beside a candidate, and take nothing away.
        event_N, part_N, place_N = np.nonzero(part_RPC)
        rest_N = np.maximum(total_PC[part_N, place_N] - part_RPC[event_N, part_N, place_N], 0)
        lost_RPC = np.zeros_like(part_RPC)
        lost_RPC[event_N, part_N, place_N] = whole_PC[part_N, place_N] - np.log1p(scale * rest_N)
        lost_CH = np.zeros((len(candidates_C), len(history_H)), np.float32)
        lost_CH[:, len(history_H) - len(recent_R) :] = (lost_RPC * weights_P1).sum(axis=1)[:, place_C].T
        return lost_CH

    def _of_candidates(self, recent_R: Int64, candidates_C: Int64) -> tuple[Float64, Int64]:
        """Returns the entries of some columns, (R, P, distinct candidates), and the place there of each candidate."""
        items = self.companion.forward.item_count
        columns_N, entries_N, lengths_R = self._gather(recent_R)
        part_N, item_N = np.divmod(columns_N, items)
        distinct_C, place_C = np.unique(candidates_C, return_inverse=True)
        hit = np.searchsorted(distinct_C, item_N)
        hit[hit == len(distinct_C)] = 0
        kept_N = np.flatnonzero(distinct_C[hit] == item_N)
        row_N = np.arange(len(recent_R)).repeat(lengths_R)[kept_N]
        raw_RPC = np.zeros((len(recent_R), len(self.weights_P), len(distinct_C)))
        np.add.at(raw_RPC, (row_N, part_N[kept_N], hit[kept_N]), entries_N[kept_N])
        return raw_RPC, place_C
