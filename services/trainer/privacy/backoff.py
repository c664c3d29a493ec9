"""What serves where counts drown in noise: the catalogue, which is public, and means over groups of items. NumPy.

    sim(h, i)    likeness of two items by their attributes (`pipeline.attribute_terms`): of the catalogue alone, free
    g(i)         the rarest of i's attributes that at least sqrt(I) items have: groups of some size, of the catalogue
    m_g          mean over the group of the noisy popularities; its noise is smaller by the root of the group's size
    p_i          m_g + k (p~_i - m_g),  k = max(0, 1 - noise^2 / variance of p~ around the m_g)

The last is the estimate of James and Stein (1961) around the group's mean: where noise is small it is the item's own
count, where noise is all there is it is the group's. It reads noisy counts and costs no privacy.

I = items, R = rank.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import scipy.sparse

from services.trainer.pipeline.attribute_terms import AttributeTerms
from services.trainer.pipeline.dataset import ItemAttributes

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]

# Brands are many and alike in weight: cut to a few directions, likeness would know none of them. 64 MB at the most.
_MAX_CELLS = 16_000_000
# No item is shown to be this much rarer than its group and the shop.
_FLOOR = 0.1


def groups_of(attributes: ItemAttributes) -> Int64:
    """Returns the group of each item, (I,), from 0; those without a common attribute are one."""
    items = len(attributes.attribute_IP)
    count_A = np.bincount(attributes.attribute_IP.reshape(-1), minlength=attributes.attribute_count + 1)
    usable_A = count_A >= np.sqrt(items)
    usable_A[0] = False
    if not attributes.attribute_IP.shape[1]:
        return np.zeros(items, np.int64)
    size_IP = np.where(usable_A[attributes.attribute_IP], count_A[attributes.attribute_IP], items + 1)
    place_I = size_IP.argmin(axis=1)
    rows = np.arange(items)
    chosen_I = np.where(size_IP[rows, place_I] <= items, attributes.attribute_IP[rows, place_I], 0)
    return np.unique(chosen_I, return_inverse=True)[1].astype(np.int64)


def shrunk(noisy_I: Float64, noise: float, group_I: Int64) -> Float64:
    """Returns p, (I,), above 0, of noisy popularities whose noise has that standard deviation."""
    size_G = np.bincount(group_I)
    mean_I = np.maximum(np.bincount(group_I, noisy_I) / size_G, 0.0)[group_I]
    apart_I = noisy_I - mean_I
    variance = float(np.mean(apart_I**2))
    kept = max(0.0, 1.0 - noise**2 / variance) if variance > 0 else 0.0
    floor_I = _FLOOR * (mean_I + max(float(noisy_I.mean()), 1e-3))
    return np.maximum(mean_I + kept * apart_I, floor_I)


def likeness_factors(attributes: ItemAttributes) -> tuple[Float32, Float32] | None:
    """Returns a, k, each (I, R), whose product is sim, in [0, 1]; None without attributes.

    Exact where the attributes are few enough for the catalogue's size, else the best of a lower rank.
    """
    items = len(attributes.attribute_IP)
    if not attributes.attribute_count:
        return None
    terms = AttributeTerms(attributes, scipy.sparse.csr_matrix((items, items)))
    rank = max(_MAX_CELLS // items, 1)
    if attributes.attribute_count > rank:
        return terms.factors(1.0, 0.0, 0.0, rank)
    keys_IR = np.asarray(terms.x_IA.todense(), np.float32)
    return keys_IR, keys_IR
