"""How real, how varied and how faithful to their captions are generated images?"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.functional.classification import binary_auroc
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as ms_ssim
from torchmetrics.image.fid import FrechetInceptionDistance

from distill.metrics.bootstrap import divide_or_nan, drawn_rows, image_counts, mean_of_defined, percentile_interval

MS_SSIM_BETAS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Weights of the scales, finest first. Source: Wang, Simoncelli, Bovik 2003."""


class _GivenFeatures(nn.Module):
    """Passes features through, so that torchmetrics measures the distance of features that exist already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def check_features(real: Tensor, generated: Tensor) -> None:
    """Raise ValueError unless they are (N, d) and (M, d), finite, of two images or more."""
    if real.ndim != 2 or generated.ndim != 2 or real.shape[1] != generated.shape[1]:
        raise ValueError(f"features must be (N, d) and (M, d); got {tuple(real.shape)} and {tuple(generated.shape)}")
    if len(real) < 2 or len(generated) < 2:
        raise ValueError(f"two images a side are needed; got {len(real)} real and {len(generated)} generated")
    for name, features in (("real", real), ("generated", generated)):
        if not features.isfinite().all():
            raise ValueError(f"{int((~features.isfinite()).sum())} {name} features are NaN or inf")


def frechet_distance(real: Tensor, generated: Tensor) -> float:
    """|mu_r - mu_g|^2 + Tr(S_r + S_g - 2 (S_r S_g)^(1/2)), at least 0, by torchmetrics in float64.

    real: (N, d), generated: (M, d) features of images. The expected value falls as N and M grow, so that only
    distances at equal N and M can be compared. Raises ValueError on other shapes, fewer than two rows, NaN or inf.
    Source: Heusel et al. 2017.
    """
    check_features(real, generated)
    # All features are here, and other processes are not asked: they may not be measuring.
    metric = FrechetInceptionDistance(feature=_GivenFeatures(real.shape[1]), sync_on_compute=False)
    # The distance does not move with the origin, and sums of squares far from it lose digits.
    origin = real.double().mean(dim=0)
    metric.update((real.double() - origin).cpu(), real=True)
    metric.update((generated.double() - origin).cpu(), real=False)
    return max(0.0, float(metric.compute()))


def frechet_by_factors(real: Tensor, generated: Tensor) -> float:
    """The same distance: with S = A^T A, Tr((S_r S_g)^(1/2)) is the sum of the singular values of A_r A_g^T.

    A matrix of min(N, d) x min(M, d), where the eigenvalues of a (d, d) matrix take many seconds at d = 2048.
    """
    gap = (real.mean(dim=0) - generated.mean(dim=0)).square().sum()
    factors = []
    for features in (real, generated):
        factor = (features - features.mean(dim=0)) / (len(features) - 1) ** 0.5
        factors.append(torch.linalg.qr(factor, mode="r").R if factor.shape[0] > factor.shape[1] else factor)
    overlap = torch.linalg.svdvals(factors[0] @ factors[1].T).sum()
    return float(gap + factors[0].square().sum() + factors[1].square().sum() - 2 * overlap)


def frechet_interval(
    real: Tensor,
    generated: Tensor,
    samples: int = 100,
    seed: int = 0,
    level: float = 0.95,
    *,
    groups: Sequence[NDArray[np.int64]] | None = None,
) -> tuple[float, float] | None:
    """Interval of `frechet_distance` over resamples of the images of both sides.

    groups: of the real and of the generated images, see `bootstrap.numbered`; whole groups are drawn. None: each image
    is a group.

    A resample holds fewer different images, so that its distance is larger than that of the sample it is drawn from,
    often by more than the interval is wide. The mean excess is therefore subtracted: the interval lies around the
    distance at this N and M, and its width is the spread of the draw of images, not a bound for infinite N.
    None when samples is 0, or a side is one group. Raises ValueError as `frechet_distance` does.
    """
    check_features(real, generated)
    real, generated = real.double().cpu(), generated.double().cpu()
    groups = [np.arange(len(side)) for side in (real, generated)] if groups is None else groups
    if any(group.max() == 0 for group in groups):
        return None
    generator = torch.Generator().manual_seed(seed)
    distances = np.empty(samples)
    for sample in range(samples):
        sides = [side[drawn_rows(g, generator)] for side, g in zip((real, generated), groups, strict=True)]
        distances[sample] = frechet_by_factors(*sides)
    if samples:
        distances += frechet_by_factors(real, generated) - distances.mean()
    return percentile_interval(distances.clip(min=0.0), level)


def ms_ssim_betas(height: int, width: int) -> tuple[float, ...]:
    """Weights of as many scales, at most five, as the 11-pixel window fits in.

    Five scales take sides of 176 pixels, four of 99, three of 44, two of 12, one of 11. The weights of fewer than five
    are divided by their sum. Raises ValueError for smaller sides.
    """
    side = min(height, width)
    for scales in range(len(MS_SSIM_BETAS), 0, -1):
        # torchmetrics' own bound, and room at the coarsest scale for the reflected border of 5 pixels.
        if side // max(1, scales - 1) ** 2 > 10 and side >> (scales - 1) > 5:
            kept = MS_SSIM_BETAS[:scales]
            return kept if scales == len(MS_SSIM_BETAS) else tuple(beta / sum(kept) for beta in kept)
    raise ValueError(f"MS-SSIM takes sides of at least 11 pixels; got {height} x {width}")


class Diversity(Metric):
    """Mean over captions of the mean over pairs of images of that caption of 1 - MS-SSIM. In [0, 1], higher is varied.

    Images of different captions are never compared. MS-SSIM is torchmetrics', on the range [0, 1]; sides under 176
    pixels have fewer than five scales (`ms_ssim_betas`), so that values at different resolutions do not compare.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    total: Tensor
    captions: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("captions", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, images: Tensor) -> None:
        """images: (captions, samples, channels, H, W) in [0, 1], at least two samples a caption.

        Raises ValueError on other shapes and ranges, and on sides under 11 pixels.
        """
        if images.ndim != 5 or images.shape[1] < 2:
            raise ValueError(
                f"images must be (captions, samples, channels, H, W), two samples or more; got {tuple(images.shape)}"
            )
        if images.numel() and not (images.min() >= 0 and images.max() <= 1):
            raise ValueError(f"images must be in [0, 1]; got [{float(images.min())}, {float(images.max())}]")
        betas = ms_ssim_betas(*images.shape[-2:])
        first, second = zip(*combinations(range(images.shape[1]), 2), strict=True)
        for samples in images.float():
            similarity = ms_ssim(samples[[*first]], samples[[*second]], reduction="none", data_range=1.0, betas=betas)
            self.total += (1 - similarity.double()).mean().to(self.device)
            self.captions += 1

    def compute(self) -> Tensor:
        return self.total / self.captions


class FindingAUROC(TypedDict):
    """Values that do not exist are None."""

    auc: float | None
    auc_ci: tuple[float, float] | None
    per_finding: list[float | None]


def finding_auroc(
    scores: Tensor,
    labels: Tensor,
    samples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    *,
    counted: Tensor | None = None,
    groups: NDArray[np.int64] | None = None,
) -> FindingAUROC:
    """Area under the ROC curve of each finding, by torchmetrics, and its mean over the findings ("auc").

    scores: (N, F) float, any monotone scale. labels: (N, F) bool, what the caption says. counted: (N, F) bool, the
    images that count for a finding; None counts all. groups: (N,) of whole groups that are drawn, see
    `bootstrap.numbered`; None: each image is one.
    A finding that all images or none have has no area (None) and is left out of the mean. "auc_ci" is a percentile
    bootstrap over images, in which a finding is left out of the resamples that lack one of its classes; None for one
    group.
    Raises ValueError on other shapes, labels that are not bool, NaN or inf.
    """
    if scores.ndim != 2 or scores.shape != labels.shape:
        raise ValueError(f"scores and labels must both be (N, F); got {tuple(scores.shape)} and {tuple(labels.shape)}")
    if labels.dtype != torch.bool:
        raise ValueError(f"labels must be bool; got {labels.dtype}")
    if not scores.isfinite().all():
        raise ValueError(f"{int((~scores.isfinite()).sum())} of {scores.numel()} scores are NaN or inf")
    scores, labels = scores.cpu(), labels.cpu()
    rows = torch.ones_like(labels) if counted is None else counted.cpu()
    classes = [(labels[:, index] & own, ~labels[:, index] & own) for index, own in enumerate(rows.T)]
    usable = [index for index, both in enumerate(classes) if all(side.any() for side in both)]
    # torchmetrics takes a sigmoid of scores outside [0, 1], in which large logits become equal. Ranks keep their order.
    ranks = {index: torch.unique(scores[:, index], return_inverse=True)[1].double() / len(scores) for index in usable}
    per_finding: list[float | None] = [None] * scores.shape[1]
    for index in usable:
        own = rows[:, index]
        per_finding[index] = float(binary_auroc(ranks[index][own], labels[own, index].long()))
    if not usable:
        return {"auc": None, "auc_ci": None, "per_finding": per_finding}

    statistics = [np.empty(0)]
    groups = np.arange(len(scores)) if groups is None else groups
    for counts in image_counts(groups, samples if groups.max() else 0, seed):
        columns = [
            weighted_auroc(ranks[index].numpy(), labels[:, index].numpy(), counts * rows[:, index].numpy())
            for index in usable
        ]
        statistics.append(mean_of_defined(np.stack(columns, axis=1)))
    return {
        "auc": float(np.mean([per_finding[index] for index in usable])),
        "auc_ci": percentile_interval(np.concatenate(statistics), level),
        "per_finding": per_finding,
    }


def weighted_auroc(
    scores: NDArray[np.float64], labels: NDArray[np.bool_], weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    """scores, labels: (N,); weights: (S, N) -> (S,) areas of N weighted images, ties 1/2; NaN without both classes."""
    order = np.argsort(scores, kind="stable")
    scores, labels, weights = scores[order], labels[order], weights[:, order]
    negatives_below = np.zeros((len(weights), len(scores) + 1))
    np.cumsum(weights * ~labels, axis=1, out=negatives_below[:, 1:])
    below = np.searchsorted(scores, scores[labels], side="left")
    not_above = np.searchsorted(scores, scores[labels], side="right")
    positives = weights[:, labels]
    wins = (positives * (negatives_below[:, below] + negatives_below[:, not_above])).sum(axis=1) / 2
    return divide_or_nan(wins, positives.sum(axis=1) * negatives_below[:, -1])
