"""What the catalogue says of the next item: likeness, and which attributes follow which. NumPy and SciPy.

I = items, A = attributes, C = width of the content, R = rank, B = people.

    x_i          attributes of i, each weighted by idf_a^2, to length 1;  idf_a = log(I / items with a)
    similarity   sim(h, i) = x_h · x_i
    y_i          attributes of i, in equal shares
    N = Y' W Y   how often attribute b came after a, W being the directed pair weights of items
    L[a, b]      log((N[a, b] + .1) / (E[a, b] + .1)),  E[a, b] = N[a, :] N[:, b] / N, what chance would give
    transition   tr(h, i) = y_h L y_i
    content      co(h, i) = v_h · v_i, of the vectors of text and pictures

A history's terms are means over its items, weighted by recency. All are bilinear in items, so that their weighted sum is
a matrix (I, I) of low rank: what is served is its best R factors (randomised SVD, Halko, Martinsson & Tropp, 2011).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import scipy.sparse

from services.trainer.pipeline.dataset import ItemAttributes

Float32 = npt.NDArray[np.float32]

_SMOOTHING = 0.1
# L is dense: 16 MB. Rarer attributes take no part in transitions.
_MAX_LIFT_ATTRIBUTES = 2_048
_OVERSAMPLING, _POWER_ITERATIONS = 16, 3
_GRAM_ROWS = 20_000
# Of the largest singular value: what is smaller is not known in single precision.
_ROUNDING = 1e-6


class AttributeTerms:
    """The terms above of one catalogue.

    Args:
        attributes: of the items.
        pairs_II: W, (I, I) sparse.
    """

    def __init__(self, attributes: ItemAttributes, pairs_II: scipy.sparse.csr_matrix) -> None:
        items, count = len(attributes.attribute_IP), attributes.attribute_count
        self.has_attributes = count > 0
        self.content_IC = attributes.content_IC
        row_N, place_N = np.nonzero(attributes.attribute_IP)
        column_N = attributes.attribute_IP[row_N, place_N] - 1
        has_IA = scipy.sparse.csr_matrix(
            (np.ones(len(row_N), np.float32), (row_N, column_N)), shape=(items, count)
        )
        items_with_A = np.asarray(has_IA.sum(axis=0)).ravel()
        idf_A = np.log(items / np.maximum(items_with_A, 1.0))
        weighted_IA = has_IA @ scipy.sparse.diags_array((idf_A**2).astype(np.float32))
        length_I = np.sqrt(np.asarray(weighted_IA.multiply(weighted_IA).sum(axis=1)).ravel())
        self.x_IA = _scaled_rows(weighted_IA, length_I)
        frequent = np.sort(np.argsort(-items_with_A, kind="stable")[:_MAX_LIFT_ATTRIBUTES])
        shares_IA = has_IA[:, frequent]
        self.y_IA = _scaled_rows(shares_IA, np.asarray(shares_IA.sum(axis=1)).ravel())
        n_AA = np.asarray((self.y_IA.T @ pairs_II @ self.y_IA).todense(), np.float64)
        total = max(float(n_AA.sum()), 1e-9)
        expected_AA = np.outer(n_AA.sum(axis=1), n_AA.sum(axis=0)) / total
        self.lift_AA: Float32 = np.log((n_AA + _SMOOTHING) / (expected_AA + _SMOOTHING)).astype(np.float32)

    def similarity(self, mean_BI: scipy.sparse.csr_matrix) -> Float32:
        """Returns sim of every item, (B, I), for histories as rows of weights that sum to 1."""
        liked_BA = np.asarray((mean_BI @ self.x_IA).todense(), np.float32)
        return np.ascontiguousarray((self.x_IA @ liked_BA.T).T, np.float32)

    def transition(self, mean_BI: scipy.sparse.csr_matrix) -> Float32:
        """Returns tr of every item, (B, I), likewise."""
        expected_BA = np.asarray((mean_BI @ self.y_IA).todense(), np.float32) @ self.lift_AA
        return np.ascontiguousarray((self.y_IA @ expected_BA.T).T, np.float32)

    def content(self, mean_BI: scipy.sparse.csr_matrix) -> Float32:
        """Returns co of every item, (B, I), likewise."""
        assert self.content_IC is not None
        return np.asarray(mean_BI @ self.content_IC, np.float32) @ self.content_IC.T

    def factors(
        self, similarity: float, transition: float, content: float, rank: int
    ) -> tuple[Float32, Float32]:
        """Returns a, k, each (I, R): a_h · k_i is close to similarity * sim + transition * tr + content * co of (h, i)."""
        items = self.x_IA.shape[0]
        width = min(items, rank + _OVERSAMPLING)

        def product(right_IR: Float32, lift_AA: Float32) -> Float32:
            found_IR = np.asarray(self.x_IA @ (np.float32(similarity) * (self.x_IA.T @ right_IR)), np.float32)
            after_AR = np.float32(transition) * (lift_AA @ (self.y_IA.T @ right_IR))
            content_IC = self.content_IC if content else None
            of_content_CR = np.zeros((0, 0), np.float32)
            if content_IC is not None:
                of_content_CR = np.float32(content) * (content_IC.T @ right_IR)
            # By parts: of 200,000 items each of these matrices is 64 MB.
            for first in range(0, items, _GRAM_ROWS):
                rows = slice(first, first + _GRAM_ROWS)
                found_IR[rows] += self.y_IA[rows] @ after_AR
                if content_IC is not None:
                    found_IR[rows] += content_IC[rows] @ of_content_CR
            return found_IR

        basis_IR = np.random.default_rng(0).standard_normal((items, width), np.float32)
        basis_IR = _orthonormal(product(basis_IR, self.lift_AA))
        for _ in range(_POWER_ITERATIONS):
            basis_IR = _orthonormal(product(basis_IR, self.lift_AA.T))
            basis_IR = _orthonormal(product(basis_IR, self.lift_AA))
        # M is close to Q (M' Q)', and M' Q = K S L' of the eigenvectors L of its small Gram matrix.
        seen_IR = product(basis_IR, self.lift_AA.T)
        size_R, left_RR = _singular(seen_IR)
        size_R, left_RR = size_R[:rank], left_RR[:, :rank]
        root_R = np.sqrt(size_R)
        inverse_R = np.divide(1.0, root_R, out=np.zeros_like(root_R), where=root_R > 0)
        queries_IR = basis_IR @ (left_RR * root_R).astype(np.float32)
        keys_IR = seen_IR @ (left_RR * inverse_R).astype(np.float32)
        return queries_IR, keys_IR


def _singular(tall_IR: Float32) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Returns singular values, (R,), largest first, 0 for what is but rounding, and right singular vectors as columns.

    From the Gram matrix: a QR decomposition of so tall a matrix takes ten times the memory, and a hundred times as long.
    """
    gram_RR = np.zeros((tall_IR.shape[1],) * 2)
    for first in range(0, len(tall_IR), _GRAM_ROWS):
        part = tall_IR[first : first + _GRAM_ROWS].astype(np.float64)
        gram_RR += part.T @ part
    squared_R, vectors_RR = np.linalg.eigh(gram_RR)
    squared_R, vectors_RR = squared_R[::-1], vectors_RR[:, ::-1]
    squared_R = np.where(squared_R > _ROUNDING**2 * squared_R[0], squared_R, 0.0)
    return np.sqrt(squared_R), vectors_RR


def _orthonormal(tall_IR: Float32) -> Float32:
    """Makes the columns an orthonormal basis of themselves, in place; columns of zeros where there are fewer."""
    # Twice: the first leaves what the rounding of single precision does.
    for _ in range(2):
        size_R, vectors_RR = _singular(tall_IR)
        inverse_R = np.divide(1.0, size_R, out=np.zeros_like(size_R), where=size_R > 0)
        turned_RR = (vectors_RR * inverse_R).astype(np.float32)
        for first in range(0, len(tall_IR), _GRAM_ROWS):
            rows = slice(first, first + _GRAM_ROWS)
            tall_IR[rows] = tall_IR[rows] @ turned_RR
    return tall_IR


def _scaled_rows(matrix: scipy.sparse.sparray, length_I: npt.NDArray[np.floating]) -> scipy.sparse.csr_matrix:
    inverse_I = np.where(length_I > 0, 1 / np.maximum(length_I, 1e-12), 0.0).astype(np.float32)
    return scipy.sparse.csr_matrix(scipy.sparse.diags_array(inverse_I) @ matrix)
