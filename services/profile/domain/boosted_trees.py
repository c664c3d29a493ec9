"""Gradient-boosted trees on binned features, for the probability of a yes.

    J. H. Friedman (2001), Greedy function approximation: a gradient boosting machine; T. Chen & C. Guestrin
    (2016), XGBoost (the second-order gain); G. Ke et al. (2017), LightGBM (histograms).

All trees have one depth D, so that a model is three arrays, and a prediction a loop over D.
Shapes: K examples, F features, B = `MAX_BINS` bins, M trees, D depth; a tree has 2^D - 1 nodes, 2^D leaves.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import expit, logit

Float = npt.NDArray[np.float64]
Int = npt.NDArray[np.int64]

MAX_BINS = 64


@dataclass(frozen=True, slots=True)
class BoostingParameters:
    """How trees are grown.

    Attributes:
        trees: how many, >= 0.
        depth: decisions between root and leaf, 1 to 8.
        learning_rate: by how much each tree is shrunk, in (0, 1].
        least_weight: the least sum of second derivatives in a leaf.
        ridge: the penalty on leaves (lambda).
        row_share, feature_share: sampled for each tree, in (0, 1].
    """

    trees: int = 150
    depth: int = 3
    learning_rate: float = 0.05
    least_weight: float = 20.0
    ridge: float = 10.0
    row_share: float = 0.7
    feature_share: float = 0.5


@dataclass(frozen=True, slots=True)
class BoostedTrees:
    """A fitted model.

    Attributes:
        bias: the log-odds before any tree.
        feature_MV: the feature asked about at each inner node, int64, V = 2^D - 1, in breadth-first order.
        threshold_MV: float64; larger goes right, +inf sends everybody left.
        leaf_ML: log-odds added in each leaf, float64, L = 2^D.
    """

    bias: float
    feature_MV: Int
    threshold_MV: Float
    leaf_ML: Float

    @classmethod
    def fit(
        cls,
        feature_KF: Float,
        label_K: Float,
        weight_K: Float,
        parameters: BoostingParameters,
        rng: np.random.Generator,
    ) -> BoostedTrees:
        """Returns trees that minimise the weighted logarithmic loss.

        Raises:
            ValueError: all labels are the same.
        """
        positive = float(label_K @ weight_K / weight_K.sum())
        if not 0 < positive < 1:
            raise ValueError("both outcomes must occur")
        count, width = feature_KF.shape
        depth = parameters.depth
        edges = [_edges(feature_KF[:, f]) for f in range(width)]
        bin_FK = np.stack([np.searchsorted(edges[f], feature_KF[:, f], "left") for f in range(width)])
        bias = float(logit(positive))
        score_K = np.full(count, bias)
        inner, leaves = 2**depth - 1, 2**depth
        features = np.zeros((parameters.trees, inner), np.int64)
        thresholds = np.full((parameters.trees, inner), np.inf)
        values = np.zeros((parameters.trees, leaves))
        columns = max(1, round(parameters.feature_share * width))
        for tree in range(parameters.trees):
            probability = expit(score_K)
            drawn = rng.random(count) < parameters.row_share
            gradient = np.where(drawn, (probability - label_K) * weight_K, 0.0)
            curvature = np.where(drawn, probability * (1 - probability) * weight_K, 0.0)
            chosen = np.sort(rng.choice(width, columns, replace=False))
            node_K = np.zeros(count, np.int64)
            for level in range(depth):
                nodes = 2**level
                split = _best_splits(
                    bin_FK[chosen],
                    node_K,
                    nodes,
                    gradient,
                    curvature,
                    parameters.least_weight,
                    parameters.ridge,
                )
                first = nodes - 1
                right_K = np.zeros(count, np.bool_)
                for node, (column, cut) in enumerate(split):
                    if column < 0:
                        continue
                    feature = int(chosen[column])
                    features[tree, first + node] = feature
                    thresholds[tree, first + node] = edges[feature][cut]
                    inside = node_K == node
                    right_K |= inside & (bin_FK[feature] > cut)
                node_K = 2 * node_K + right_K
            sums = np.bincount(node_K, gradient, leaves)
            weights = np.bincount(node_K, curvature, leaves)
            values[tree] = -parameters.learning_rate * sums / (weights + parameters.ridge)
            score_K += values[tree][node_K]
        return cls(bias, features, thresholds, values)

    def log_odds(self, feature_KF: Float) -> Float:
        """Returns the log-odds of a yes, (K,)."""
        total = np.full(len(feature_KF), self.bias)
        for leaf_K, values in self._leaves(feature_KF):
            total += values[leaf_K]
        return total

    def contributions(self, feature_KF: Float) -> Float:
        """Returns how much each feature moves the log-odds, (K, F), by the path through each tree.

        The value of an inner node is the mean of its leaves; the feature asked there is credited with the
        step to the child (A. Saabas, 2014). Rows add up to the log-odds less the mean of the leaves.
        """
        credit_KF = np.zeros(feature_KF.shape)
        rows = np.arange(len(feature_KF))
        depth = _depth(self.leaf_ML)
        for tree in range(len(self.leaf_ML)):
            means = [self.leaf_ML[tree].reshape(2**level, -1).mean(axis=1) for level in range(depth + 1)]
            node_K = np.zeros(len(feature_KF), np.int64)
            for level in range(depth):
                at_K = 2**level - 1 + node_K
                feature_K = self.feature_MV[tree, at_K]
                child_K = 2 * node_K + (feature_KF[rows, feature_K] > self.threshold_MV[tree, at_K])
                credit_KF[rows, feature_K] += means[level + 1][child_K] - means[level][node_K]
                node_K = child_K
        return credit_KF

    def _leaves(self, feature_KF: Float) -> list[tuple[Int, Float]]:
        rows = np.arange(len(feature_KF))
        depth = _depth(self.leaf_ML)
        found = []
        for tree in range(len(self.leaf_ML)):
            node_K = np.zeros(len(feature_KF), np.int64)
            for level in range(depth):
                at_K = 2**level - 1 + node_K
                value_K = feature_KF[rows, self.feature_MV[tree, at_K]]
                node_K = 2 * node_K + (value_K > self.threshold_MV[tree, at_K])
            found.append((node_K, self.leaf_ML[tree]))
        return found


def _depth(leaf_ML: Float) -> int:
    return int(leaf_ML.shape[1]).bit_length() - 1


def _edges(values_K: Float) -> Float:
    """Returns at most B - 1 thresholds between distinct values, ascending; at least one."""
    distinct = np.unique(values_K)
    if len(distinct) == 1:
        return distinct
    if len(distinct) > MAX_BINS:
        distinct = np.unique(np.quantile(values_K, np.linspace(0, 1, MAX_BINS), method="lower"))
    return distinct[:-1]


def _best_splits(
    bin_CK: Int,
    node_K: Int,
    nodes: int,
    gradient_K: Float,
    curvature_K: Float,
    least_weight: float,
    ridge: float,
) -> list[tuple[int, int]]:
    """Returns for each node the column and the last bin that goes left; (-1, 0) where no split gains.

    gain = G_l^2 / (H_l + lambda) + G_r^2 / (H_r + lambda) - G^2 / (H + lambda)   (Chen & Guestrin, eq. 7)
    """
    columns = len(bin_CK)
    base_K = node_K * MAX_BINS
    g_CNB = np.empty((columns, nodes, MAX_BINS))
    h_CNB = np.empty((columns, nodes, MAX_BINS))
    for column in range(columns):
        cell_K = base_K + bin_CK[column]
        g_CNB[column] = np.bincount(cell_K, gradient_K, nodes * MAX_BINS).reshape(nodes, MAX_BINS)
        h_CNB[column] = np.bincount(cell_K, curvature_K, nodes * MAX_BINS).reshape(nodes, MAX_BINS)
    left_g, left_h = g_CNB.cumsum(axis=2), h_CNB.cumsum(axis=2)
    total_g, total_h = left_g[:, :, -1:], left_h[:, :, -1:]
    right_g, right_h = total_g - left_g, total_h - left_h
    gain = left_g**2 / (left_h + ridge) + right_g**2 / (right_h + ridge) - total_g**2 / (total_h + ridge)
    gain[(left_h < least_weight) | (right_h < least_weight)] = 0.0
    best = []
    for node in range(nodes):
        at = int(gain[:, node, :].argmax())
        column, cut = divmod(at, MAX_BINS)
        best.append((column, cut) if gain[column, node, cut] > 1e-9 else (-1, 0))
    return best
