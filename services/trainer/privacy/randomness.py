"""Noise and coins that nobody can foretell: a ChaCha20 stream under a key of the operating system's.

A run's seed stands on its card: noise from it could be subtracted. NumPy's generators are made for simulation, and
their state can be worked out from what they gave.
"""

from __future__ import annotations

import secrets

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from scipy.special import ndtri

Float64 = npt.NDArray[np.float64]

_CHUNK = 1 << 20


class SecureRandom:
    """Uniform and normal numbers of a keyed stream.

    Args:
        key: 32 bytes, for tests that repeat; by default fresh ones of the operating system.
    """

    def __init__(self, key: bytes | None = None) -> None:
        cipher = Cipher(algorithms.ChaCha20(key or secrets.token_bytes(32), bytes(16)), mode=None)
        self._stream = cipher.encryptor()

    def uniform(self, count: int) -> Float64:
        """Returns numbers in (0, 1), (count,): odd multiples of 2^-54, never 0 or 1."""
        found = np.empty(count)
        for first in range(0, count, _CHUNK):
            part = min(_CHUNK, count - first)
            words = np.frombuffer(self._stream.update(bytes(8 * part)), np.uint64)
            found[first : first + part] = ((words >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
        return found

    def normal(self, count: int) -> Float64:
        """Returns standard normal numbers, (count,), by inversion; none is beyond 8.2 in size."""
        return np.asarray(ndtri(self.uniform(count)))

    def coins(self, count: int, probability: float) -> npt.NDArray[np.bool_]:
        """Returns independent coins, (count,), true with a probability."""
        return self.uniform(count) < probability

    def successes(self, trials: int, probability: float) -> npt.NDArray[np.int64]:
        """Returns which of `trials` independent coins fell true, ascending, at a cost of the number of those."""
        if not 0 < probability < 1:
            return np.arange(trials if probability >= 1 else 0, dtype=np.int64)
        found: list[npt.NDArray[np.int64]] = []
        last = -1
        while last < trials:
            expected = int((trials - last) * probability * 1.1) + 16
            # The gap to the next success is geometric.
            gap = np.floor(np.log(self.uniform(expected)) / np.log1p(-probability)) + 1
            places = last + np.cumsum(np.minimum(gap, float(trials + 1))).astype(np.int64)
            found.append(places[places < trials])
            last = int(places[-1])
        return np.concatenate(found)

    def normal_above(self, threshold: float, count: int) -> Float64:
        """Returns standard normal numbers given that they are at least a threshold, (count,)."""
        return np.asarray(-ndtri(self.uniform(count) * float(_tail(threshold))))


def _tail(threshold: float) -> float:
    from scipy.special import ndtr

    return float(ndtr(-threshold))
