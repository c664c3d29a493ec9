"""What an item is, as a vector, without any weights to download: character n-grams, weighted and projected.

    term weights: TF-IDF of hashed character n-grams (K. Weinberger et al., 2009, Feature hashing)
    projection: truncated SVD (S. Deerwester et al., 1990, LSA) by random sampling with power iterations
    (N. Halko, P. Martinsson & J. Tropp, 2011, algorithm 4.4)

Characters need no word boundaries, so Chinese titles work as English ones do. Shapes: N texts, B buckets,
D components.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import sparse

BUCKETS = 1 << 16
N_GRAMS = (2, 3, 4)
MAX_CHARACTERS = 2000
COMPONENTS = 96
_OVERSAMPLE = 16
_POWER_ITERATIONS = 2
_PRIMES = np.array([0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35, 0x27D4EB2F], np.uint32)

Float = npt.NDArray[np.float32]


def ngram_counts(texts: Sequence[str]) -> sparse.csr_matrix:
    """Returns how often each hashed n-gram occurs, damped: (N, B), float32, 1 + log(count).

    Texts are in NFKC and lower case; beyond 2,000 characters nothing is read.
    """
    codes: list[npt.NDArray[np.uint32]] = []
    lengths = np.empty(len(texts), np.int64)
    for row, text in enumerate(texts):
        words = unicodedata.normalize("NFKC", text[:MAX_CHARACTERS]).lower().split()
        normal = f" {' '.join(words)} " if words else ""
        codes.append(np.frombuffer(normal.encode("utf-32-le", "replace"), np.uint32))
        lengths[row] = len(codes[-1])
    if not lengths.any():
        return sparse.csr_matrix((len(texts), BUCKETS), dtype=np.float32)
    code_C = np.concatenate(codes)
    row_C = np.repeat(np.arange(len(texts)), lengths)
    rows, buckets = [], []
    for n in N_GRAMS:
        starts = len(code_C) - n + 1
        if starts <= 0:
            continue
        inside = row_C[:starts] == row_C[n - 1 :]
        hashed = np.full(starts, n, np.uint32)
        for place in range(n):
            hashed = (hashed ^ code_C[place : place + starts]) * _PRIMES[place]
            hashed ^= hashed >> np.uint32(15)
        rows.append(row_C[:starts][inside])
        buckets.append((hashed[inside] % BUCKETS).astype(np.int64))
    row_G, bucket_G = np.concatenate(rows), np.concatenate(buckets)
    counts = sparse.coo_matrix(
        (np.ones(len(row_G), np.float32), (row_G, bucket_G)), shape=(len(texts), BUCKETS)
    ).tocsr()
    counts.data = 1.0 + np.log(counts.data)
    return counts


@dataclass(frozen=True, slots=True)
class NgramEncoder:
    """A fitted encoder.

    Attributes:
        idf_B: float32.
        projection_BD: float32.
        version: names the fit: equal texts give an equal one.
    """

    idf_B: Float
    projection_BD: Float
    version: str

    MODEL = "char-ngram-svd"

    @classmethod
    def fit(cls, texts: Sequence[str], components: int = COMPONENTS) -> NgramEncoder:
        """Returns an encoder of a shop's texts; of fewer texts than components it has fewer of these."""
        counts = ngram_counts(texts)
        document_frequency = np.bincount(counts.indices, minlength=BUCKETS)
        idf = (np.log((1.0 + len(texts)) / (1.0 + document_frequency)) + 1.0).astype(np.float32)
        weighted = _unit_rows(counts.multiply(idf).tocsr())
        width = max(1, min(components, len(texts)))
        projection = _right_singular_vectors(weighted, width)
        digest = hashlib.sha256(b"".join(hashlib.sha256(text.encode()).digest() for text in sorted(texts)))
        return cls(idf, projection, digest.hexdigest()[:12])

    def encode(self, texts: Sequence[str]) -> Float:
        """Returns vectors of unit length, (N, D), float32; 0 where a text has nothing known in it."""
        weighted = _unit_rows(ngram_counts(texts).multiply(self.idf_B).tocsr())
        return unit(np.asarray(weighted @ self.projection_BD, np.float32))


def unit(vector_ND: Float) -> Float:
    """Returns vectors of length 1; those of length 0 stay as they are."""
    length_N1 = np.linalg.norm(vector_ND, axis=1, keepdims=True)
    return (vector_ND / np.where(length_N1 > 1e-12, length_N1, 1.0)).astype(np.float32)


def fuse(parts: Sequence[tuple[Float, float]]) -> Float:
    """Returns one vector of unit length an item from several, (N, sum of D).

    The cosine of two items is the mean of the parts' cosines, by their weights, over the parts that both
    have: a part that is missing is a row of 0.
    """
    scaled = [part_ND * np.float32(np.sqrt(weight)) for part_ND, weight in parts]
    return unit(np.concatenate(scaled, axis=1))


def _unit_rows(matrix: sparse.csr_matrix) -> sparse.csr_matrix:
    length = np.sqrt(np.asarray(matrix.multiply(matrix).sum(axis=1)).ravel())
    scale = sparse.diags(1.0 / np.where(length > 0, length, 1.0))
    return (scale @ matrix).astype(np.float32).tocsr()


def _right_singular_vectors(matrix: sparse.csr_matrix, width: int) -> Float:
    rng = np.random.default_rng(0)
    sample = min(width + _OVERSAMPLE, *matrix.shape)
    basis = matrix @ rng.standard_normal((matrix.shape[1], sample)).astype(np.float32)
    for _ in range(_POWER_ITERATIONS):
        basis, _ = np.linalg.qr(basis)
        basis = matrix @ (matrix.T @ basis)
    basis, _ = np.linalg.qr(basis)
    # The rows of basis^T A, (sample, B), span nearly what the largest singular vectors do.
    small = np.asarray((matrix.T @ basis).T)
    _, _, right = np.linalg.svd(small, full_matrices=False)
    return np.ascontiguousarray(right[:width].T, np.float32)
