"""TreeSHAP of scikit-learn's histogram boosting: what each feature adds to the logit of one row.

A leaf is reached through intervals of at most `depth` features. Of a set of known features, the tree expects the mean
of the leaves that agree with the row on those features, weighted by the share of training rows at each unknown split.
The Shapley values of one leaf are then a sum over the subsets of its few features, which is exact and short for shallow
trees (Lundberg et al. 2020, path-dependent).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from math import factorial
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Path = dict[int, tuple[float, NDArray[np.bool_]]]
"""Feature -> share of training rows that go this way at its splits, and which rows to explain do."""


class Tree(Protocol):
    """nodes: a structured array, the root first."""

    nodes: NDArray[np.void]


class BoostedTrees(Protocol):
    """What is used of scikit-learn's HistGradientBoostingClassifier, which is an optional package."""

    _baseline_prediction: Floats
    _predictors: Sequence[Sequence[Tree]]

    def predict_proba(self, X: Floats) -> Floats: ...


def tree_shap(model: BoostedTrees, rows: Floats) -> tuple[float, Floats]:
    """(expected logit, (N, features)); their sum over a row is its logit. For two classes and trees of a small
    depth."""
    expected, found = float(model._baseline_prediction.item()), np.zeros(rows.shape)
    for (tree,) in model._predictors:
        for value, path in _leaves(tree.nodes, rows, 0, {}):
            expected += value * float(np.prod([share for share, _ in path.values()]))
            _add_leaf(found, value, path)
    return expected, found


def _leaves(nodes: NDArray[np.void], rows: Floats, place: int, path: Path) -> Iterator[tuple[float, Path]]:
    node = nodes[place]
    if node["is_leaf"]:
        yield float(node["value"]), path
        return
    feature = int(node["feature_idx"])
    values = rows[:, feature]
    left = np.where(np.isnan(values), bool(node["missing_go_to_left"]), values <= node["num_threshold"])
    before, ways = path.get(feature, (1.0, np.ones(len(rows), dtype=bool)))
    for child, goes in ((int(node["left"]), left), (int(node["right"]), ~left)):
        share = before * nodes[child]["count"] / node["count"]
        yield from _leaves(nodes, rows, child, {**path, feature: (share, ways & goes)})


def _add_leaf(found: Floats, value: float, path: Path) -> None:
    """Add the Shapley values of the game whose worth is value x product of 1[row agrees] (known) or share (unknown)."""
    count = len(path)
    for feature, (share, agrees) in path.items():
        others = [name for name in path if name != feature]
        for size in range(count):
            weight = factorial(size) * factorial(count - size - 1) / factorial(count)
            for known in combinations(others, size):
                worth = np.full(len(found), weight * value)
                for other in others:
                    worth *= path[other][1] if other in known else path[other][0]
                found[:, feature] += worth * (agrees - share)
