"""`shared.bundle.scoring.Companion` for many histories at once. NumPy and SciPy. B = histories, I = items."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import scipy.sparse

from shared.bundle.manifest import ScoringParameters
from shared.bundle.scoring import Companion, CooccurrenceMatrix, cooccurrence_scores_of_batch

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]

# Up to here a matrix is unfolded for ranking (64 MB), where at least this share of it is filled.
_DENSE_ITEMS, _DENSE_SHARE = 4_000, 0.02


# Without slots, which would leave no room for what is made on demand.
@dataclass(frozen=True, eq=False)
class Neighbours:
    """A model that sums rows of an item-item matrix over the decayed history."""

    matrix: CooccurrenceMatrix
    scoring: ScoringParameters
    dense_II: Float32 | None = None

    @classmethod
    def of(cls, matrix: CooccurrenceMatrix, scoring: ScoringParameters) -> Neighbours:
        """Returns it with the matrix unfolded where that is faster."""
        items = matrix.item_count
        crowded = items <= _DENSE_ITEMS and len(matrix.indices_N) > _DENSE_SHARE * items * items
        return cls(matrix, scoring, matrix.to_dense() if crowded else None)

    @cached_property
    def sparse_II(self) -> scipy.sparse.csr_matrix:
        """The matrix for SciPy."""
        matrix = self.matrix
        shape = (matrix.item_count, matrix.item_count)
        return scipy.sparse.csr_matrix((matrix.weights_N, matrix.indices_N, matrix.indptr_I1), shape=shape)

    def scores(self, histories: list[Int64]) -> Float32:
        """Returns the score of every item, (B, I)."""
        return cooccurrence_scores_of_batch(self.matrix, histories, self.scoring, self.dense_II)


def recency_weights(
    histories: list[Int64], item_count: int, scoring: ScoringParameters, *, mean: bool
) -> scipy.sparse.csr_matrix:
    """Returns query_decay^age by item of each history's window, (B, I); with `mean`, rows sum to 1."""
    recent = [history_H[-scoring.window :] for history_H in histories]
    length_B = np.array([len(items) for items in recent], np.int64)
    columns_N = np.concatenate(recent) if recent else np.zeros(0, np.int64)
    end_B = np.cumsum(length_B)
    age_N = np.repeat(end_B, length_B) - 1 - np.arange(len(columns_N))
    weight_N = np.float64(scoring.query_decay) ** age_N
    if mean:
        row_N = np.repeat(np.arange(len(recent)), length_B)
        weight_N /= np.bincount(row_N, weight_N, minlength=len(recent))[row_N]
    indptr = np.concatenate([[0], end_B])
    # In single precision like what it is multiplied with, which would else be converted whole for each product.
    found = scipy.sparse.csr_matrix(
        (weight_N.astype(np.float32), columns_N, indptr), shape=(len(recent), item_count)
    )
    found.sum_duplicates()
    return found


class BatchCompanion:
    """The companion, prepared for batches.

    Args:
        known_I: items that the model knows, where it does not know all; it does not read the others in a history.
    """

    def __init__(self, companion: Companion, known_I: npt.NDArray[np.bool_] | None = None) -> None:
        self.companion, scoring = companion, companion.scoring
        self._known_I = known_I
        self._scoring = scoring
        self._forward = Neighbours.of(companion.forward, scoring)
        self._backward = None
        if companion.backward is not None and scoring.backward:
            self._backward = Neighbours.of(companion.backward, scoring)

    def forward(self, histories: list[Int64]) -> Float32:
        """Returns c, (B, I)."""
        return self._forward.scores(self._read(histories))

    def _read(self, histories: list[Int64]) -> list[Int64]:
        if self._known_I is None:
            return histories
        known = [history_H[self._known_I[history_H]] for history_H in histories]
        # What an unknown item kept apart may now be a run, which is one event.
        return [items[np.append(items[1:] != items[:-1], True)[: len(items)]] for items in known]

    def added(self, histories: list[Int64], forward_BI: Float32) -> Float32:
        """Returns what the companion adds to the log-softmax, (B, I).

        Args:
            forward_BI: c of the histories.
        """
        histories = self._read(histories)
        scoring, scale = self._scoring, np.float32(self._scoring.scale)
        added_BI = np.float32(scoring.lambda_) * np.log1p(scale * forward_BI)
        if self._backward is not None:
            added_BI += np.float32(scoring.backward) * np.log1p(scale * self._backward.scores(histories))
        items = self.companion.forward.item_count
        if scoring.repeat:
            repeats_BI = recency_weights(histories, items, scoring, mean=False)
            added_BI += np.float32(scoring.repeat) * np.log1p(scale * repeats_BI.toarray().astype(np.float32))
        queries_IR, keys_IR = self.companion.attribute_queries_IR, self.companion.attribute_keys_IR
        if queries_IR is not None and keys_IR is not None:
            mean_BI = recency_weights(histories, items, scoring, mean=True)
            added_BI += np.asarray(mean_BI @ queries_IR, np.float32) @ keys_IR.T
        return added_BI

    def add_to(self, score_BI: Float32, histories: list[Int64]) -> None:
        """Adds in place what `added` would, at the cost of what histories and their rows hold.

        Args:
            score_BI: logits, or anything else that orders items.
        """
        histories = self._read(histories)
        scoring, items = self._scoring, self.companion.forward.item_count
        recent_BI = recency_weights(histories, items, scoring, mean=False)
        parts: list[tuple[float, scipy.sparse.csr_matrix]] = (
            [(scoring.repeat, recent_BI)] if scoring.repeat else []
        )
        for weight, neighbours in ((scoring.lambda_, self._forward), (scoring.backward, self._backward)):
            if weight and neighbours is not None:
                parts.append((weight, recent_BI @ neighbours.sparse_II))
        for weight, found_BI in parts:
            row_N = np.repeat(np.arange(len(histories)), np.diff(found_BI.indptr))
            damped_N = np.log1p(np.float32(scoring.scale) * found_BI.data.astype(np.float32))
            score_BI[row_N, found_BI.indices] += np.float32(weight) * damped_N
        queries_IR, keys_IR = self.companion.attribute_queries_IR, self.companion.attribute_keys_IR
        if queries_IR is not None and keys_IR is not None:
            mean_BI = recency_weights(histories, items, scoring, mean=True)
            score_BI += np.asarray(mean_BI @ queries_IR, np.float32) @ keys_IR.T
