"""A published version's scores, by the same functions as serving."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shared.bundle import Bundle, cooccurrence_scores
from shared.bundle.history import History, encoder_inputs
from shared.bundle.scoring import blended_scores

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class FirstStage:
    """What a version says of every item to one history.

    Attributes:
        score_I: the blend.
        cooccurrence_I: log(1 + scale c).
        cosine_I: with the newest item.
    """

    score_I: Float32
    cooccurrence_I: Float32
    cosine_I: Float32


def first_stage(bundle: Bundle, unit_vectors_ID: Float32, history: History) -> FirstStage:
    """Returns the scores of a history of at least one event."""
    inputs = encoder_inputs(history, bundle.item_vectors, bundle.max_history)
    weighted_D = np.float32(bundle.scoring.sequence) * bundle.encoder.encode(*inputs)
    logits_I = bundle.item_vectors @ weighted_D + bundle.item_bias
    score_I = blended_scores(logits_I, bundle.companion.added(history.indices_H))
    c_I = cooccurrence_scores(bundle.cooccurrence, history.indices_H, bundle.scoring)
    damped_I = np.log1p(np.float32(bundle.scoring.scale) * c_I)
    return FirstStage(score_I, damped_I, unit_vectors_ID @ unit_vectors_ID[history.indices_H[-1]])


def unit_vectors(bundle: Bundle) -> Float32:
    """Returns item vectors of length 1, 0 where there is none, (I, D), float32."""
    norm_I1 = np.linalg.norm(bundle.item_vectors, axis=1, keepdims=True)
    return np.where(norm_I1 > 0, bundle.item_vectors / np.maximum(norm_I1, 1e-12), 0).astype(np.float32)
