"""Percentile bootstrap that draws whole clusters (patients, or images), since what is of one is not independent.

Source: Efron, Tibshirani 1993; Field, Welsh 2007 for clusters. The same seed and the same clusters give the same draws,
so that intervals of several models on the same images are of the same resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

COUNTS_AT_ONCE = 2**22
"""Counts (float64) of one block of resamples: 32 MiB."""


def resample_counts(clusters: int, samples: int, seed: int) -> Iterator[NDArray[np.float64]]:
    """Blocks of shape (some samples, clusters): how often a resample holds each cluster. Rows sum to `clusters`."""
    rng = np.random.default_rng(seed)
    block = max(1, COUNTS_AT_ONCE // clusters)
    for start in range(0, samples, block):
        rows = min(block, samples - start)
        draws = rng.integers(clusters, size=(rows, clusters)) + clusters * np.arange(rows)[:, None]
        counts = np.bincount(draws.ravel(), minlength=rows * clusters)
        yield counts.reshape(rows, clusters).astype(np.float64)


def numbered(groups: Sequence[str]) -> NDArray[np.int64]:
    """Number of the group of each image, in the order in which the groups appear."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(group, len(numbers)) for group in groups], dtype=np.int64)


def image_counts(groups: NDArray[np.int64], samples: int, seed: int) -> Iterator[NDArray[np.float64]]:
    """Blocks of shape (some samples, images): how often a resample of whole groups holds each image.

    groups: (images,), see `numbered`.
    """
    for counts in resample_counts(int(groups.max()) + 1, samples, seed):
        yield counts[:, groups]


def drawn_rows(groups: NDArray[np.int64], generator: torch.Generator) -> torch.Tensor:
    """Rows of the images of one resample of whole groups. groups: (images,), see `numbered`."""
    count = int(groups.max()) + 1
    drawn = torch.randint(count, (count,), generator=generator)
    if count == len(groups):
        return drawn
    members = np.split(np.argsort(groups, kind="stable"), np.cumsum(np.bincount(groups))[:-1])
    return torch.from_numpy(np.concatenate([members[group] for group in drawn.tolist()]))


def divide_or_nan(numerator: NDArray[np.float64], denominator: NDArray[Any]) -> NDArray[np.float64]:
    """Elementwise ratio; NaN where the denominator is 0."""
    ratio = np.full_like(numerator, np.nan)
    np.divide(numerator, denominator, out=ratio, where=denominator != 0)
    return ratio


def mean_of_defined(table: NDArray[np.float64]) -> NDArray[np.float64]:
    """(samples, findings) -> (samples,): mean over the findings that are not NaN; NaN where all are."""
    defined = ~np.isnan(table)
    return divide_or_nan(np.where(defined, table, 0.0).sum(axis=1), defined.sum(axis=1))


def percentile_interval(statistics: NDArray[np.float64], level: float) -> tuple[float, float] | None:
    """Central interval of the resampled statistics that are not NaN; None when there is none."""
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1); got {level}")
    statistics = statistics[~np.isnan(statistics)]
    if not statistics.size:
        return None
    low, high = np.quantile(statistics, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def bootstrap_interval(
    values: ArrayLike,
    clusters: ArrayLike,
    statistic: Callable[[NDArray[np.float64]], float],
    samples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float] | None:
    """Interval of `statistic` over resamples of whole clusters.

    values: (N, ...), no NaN. clusters: (N,) index of the cluster of each row.
    statistic: takes the drawn rows, (M, ...), a cluster drawn twice being there twice; may return NaN, which leaves
    the resample out.
    Returns None with fewer than two clusters. Raises ValueError on NaN, and when the lengths differ.
    """
    rows = np.asarray(values, dtype=np.float64)
    _, labels, sizes = np.unique(np.asarray(clusters), return_inverse=True, return_counts=True)
    _check_rows(rows, labels)
    if len(sizes) < 2:
        return None
    by_cluster = rows[np.argsort(labels, kind="stable")]
    starts = np.cumsum(sizes) - sizes
    rng = np.random.default_rng(seed)
    statistics = np.empty(samples)
    for sample in range(samples):
        drawn = rng.integers(len(sizes), size=len(sizes))
        lengths = sizes[drawn]
        offsets = np.repeat(starts[drawn] - (np.cumsum(lengths) - lengths), lengths)
        statistics[sample] = statistic(by_cluster[offsets + np.arange(len(offsets))])
    return percentile_interval(statistics, level)


def macro_mean_interval(
    values: ArrayLike,
    findings: ArrayLike,
    images: ArrayLike,
    samples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float] | None:
    """Interval of the mean over findings of the mean over the finding's pairs; images, or patients, are drawn.

    values, findings, images: (pairs,). A finding that a resample does not hold is left out of that resample's mean.
    Returns None with fewer than two images. Raises ValueError on NaN, and when the lengths differ.
    """
    rows = np.asarray(values, dtype=np.float64)
    image_ids, image_rows = np.unique(np.asarray(images), return_inverse=True)
    finding_ids, finding_rows = np.unique(np.asarray(findings), return_inverse=True)
    _check_rows(rows, image_rows)
    _check_rows(rows, finding_rows)
    if len(image_ids) < 2:
        return None
    sums = np.zeros((len(image_ids), len(finding_ids)))
    pairs = np.zeros_like(sums)
    np.add.at(sums, (image_rows, finding_rows), rows)
    np.add.at(pairs, (image_rows, finding_rows), 1.0)
    statistics = []
    for counts in resample_counts(len(image_ids), samples, seed):
        statistics.append(mean_of_defined(divide_or_nan(counts @ sums, counts @ pairs)))
    return percentile_interval(np.concatenate([*statistics, np.empty(0)]), level)


def _check_rows(rows: NDArray[np.float64], labels: NDArray[np.int64]) -> None:
    if rows.shape[:1] != labels.shape:
        raise ValueError(f"one label a value is needed; got shapes {rows.shape} and {labels.shape}")
    if np.isnan(rows).any():
        raise ValueError(f"{int(np.isnan(rows).sum())} of {rows.size} values are NaN")
