"""The cosine scorer of the founding document.

    sim(U, I) = (U · I + alpha R(T) · I) / (|U| |I|)

U is the shopper's portrait vector, I an item's, R(T) what the shopper is after at this moment T, as a vector
of the same space, and alpha how much the moment counts.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]

MOMENT_HALF_LIFE_SECONDS = 3_600.0


def cosine_similarities(
    portrait_D: Float32, moment_D: Float32, items_ID: Float32, inverse_norms_I: Float32, alpha: float
) -> Float32:
    """Returns sim(U, I) of every item, float32, (I,); 0 where |U| or |I| is 0.

    Args:
        portrait_D: U.
        moment_D: R(T).
        inverse_norms_I: 1 / |I|, 0 where |I| is 0.
    """
    norm = float(np.linalg.norm(portrait_D))
    if norm == 0:
        return np.zeros(len(items_ID), np.float32)
    # Both products share their right side: U · I + alpha R · I = (U + alpha R) · I.
    query_D = ((portrait_D + np.float32(alpha) * moment_D) / np.float32(norm)).astype(np.float32)
    return ((items_ID @ query_D) * inverse_norms_I).astype(np.float32)


def moment_vector(vectors_HD: Float32, times_H: npt.NDArray[np.float64]) -> Float32:
    """Returns R(T): the mean of the events' item vectors, (D,), each weighted by its recency.

    An event counts half of one that is an hour newer.
    """
    weights_H = 2.0 ** ((times_H - times_H.max()) / MOMENT_HALF_LIFE_SECONDS)
    return ((weights_H @ vectors_HD) / weights_H.sum()).astype(np.float32)
