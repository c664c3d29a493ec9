"""How far the log has moved away from what a model was trained on. Pure.

The population stability index of two distributions over the same bins, sum (a - e) ln(a / e): below 0.1 nothing
has changed, above 0.2 much has (Siddiqi, 2006).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Int64 = npt.NDArray[np.int64]

# Items with a bin of their own, and groups of about equally many events for the others.
_OWN_BINS, _GROUPS = 50, 10
# Added to every bin: an empty one would be infinitely far away.
_PRIOR = 0.5


def population_stability_index(expected_B: Int64, actual_B: Int64) -> float:
    """Returns the index of counts in B bins, at least 0; half an event is added to each bin."""
    expected = (expected_B + _PRIOR) / (expected_B + _PRIOR).sum()
    actual = (actual_B + _PRIOR) / (actual_B + _PRIOR).sum()
    return float(((actual - expected) * np.log(actual / expected)).sum())


def bins_of_items(expected_I: Int64) -> Int64:
    """Returns the bin of each item, (I,): the most frequent ones alone, the others in groups, new ones together.

    Single bins for all would find drift in the noise of rare items.
    """
    order_I = np.argsort(-expected_I, kind="stable")
    bin_I = np.empty(len(expected_I), np.int64)
    own = order_I[:_OWN_BINS]
    bin_I[own] = np.arange(len(own))
    rest = order_I[_OWN_BINS:]
    total = max(int(expected_I[rest].sum()), 1)
    before = np.cumsum(expected_I[rest]) - expected_I[rest]
    bin_I[rest] = _OWN_BINS + np.minimum(_GROUPS * before // total, _GROUPS - 1)
    bin_I[expected_I == 0] = _OWN_BINS + _GROUPS
    return bin_I


def drift_of_items(expected_I: Int64, actual_I: Int64) -> float:
    """Returns the index of events over items, in the bins of `bins_of_items`."""
    bin_I = bins_of_items(expected_I)
    used, bin_I = np.unique(bin_I, return_inverse=True)
    return population_stability_index(
        np.bincount(bin_I, expected_I, len(used)), np.bincount(bin_I, actual_I, len(used))
    )
