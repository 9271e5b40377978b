"""Thresholds and post-processing of attention maps: pure functions of a batch (N, height, width), on any device."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

OTSU_BINS = 256
MIXTURE_BINS = 4096
MIXTURE_TOLERANCE = 1e-3
MIXTURE_STEPS = 100
VARIANCE_FLOOR = 1e-6


def require_finite(name: str, rows: Tensor) -> None:
    """Raise ValueError when a row contains NaN or inf."""
    bad = (~rows.isfinite()).flatten(1).any(dim=1)
    if bad.any():
        first = int(bad.nonzero()[0])
        raise ValueError(f"{int(bad.sum())} of {len(rows)} {name} contain NaN or inf (the first is number {first})")


def require_maps(maps: Tensor) -> None:
    """Raise ValueError unless maps are (N, H, W) float without NaN and inf."""
    if maps.ndim != 3 or not maps.is_floating_point():
        raise ValueError(f"maps must be (N, H, W) float; got {tuple(maps.shape)} {maps.dtype}")
    require_finite("maps", maps)


def min_max(maps: Tensor) -> Tensor:
    """(N, H, W) -> (N, H, W) in [0, 1], each map by itself; a constant map becomes 0."""
    low = maps.amin(dim=(1, 2), keepdim=True)
    span = maps.amax(dim=(1, 2), keepdim=True) - low
    return (maps - low) / torch.where(span > 0, span, 1.0)


def gaussian_smooth(maps: Tensor, sigma: float) -> Tensor:
    """(N, H, W) float -> the same: Gaussian of `sigma` pixels, cut off at 4 sigma, the map mirrored at its borders.

    Computed in float64. Equals scipy.ndimage.gaussian_filter with its defaults (mode "reflect", which repeats the edge
    pixel; torch's padding of that name does not). Raises ValueError for a negative sigma.
    """
    if sigma < 0:
        raise ValueError(f"sigma must be at least 0 pixels; got {sigma}")
    radius = int(4 * sigma + 0.5)
    if radius == 0:
        return maps
    rows, columns = (_smoothing_matrix(size, sigma, radius).to(maps.device) for size in maps.shape[1:])
    return (rows @ maps.double() @ columns.T).to(maps.dtype)


def otsu_threshold(maps: Tensor) -> Tensor:
    """(N, H, W) float -> (N,) float64: the threshold that maximizes the variance between the two classes.

    256 bins between a map's minimum and maximum; the threshold is the centre of the last bin of the lower class, the
    lowest of equally good ones, as in scikit-image's threshold_otsu. Foreground is map > threshold; a constant map has
    its constant. Source: Otsu 1979. Raises ValueError on NaN and inf.
    """
    low, span, shares, centres = _histogram(maps, OTSU_BINS)
    return torch.where(span > 0, low + span * centres[_otsu_bin(shares, centres)], low)


def mixture_threshold(maps: Tensor) -> Tensor:
    """(N, H, W) float -> (N,) float64: mean of the two means of a Gaussian mixture of the map's values.

    Foreground is map > threshold; a constant map has its constant. Raises ValueError on NaN and inf.
    Source: Dombrowski et al.'s code (MischaD/chest-distillation, src/foreground_masks.py: `np.mean(gmm.means_)` of
    scikit-learn's GaussianMixture(2)). EM stops as there: when the mean log-likelihood changes by less than 1e-3, or
    after 100 steps. That is well before convergence, which can lie 0.2 of the map's range away.
    Differences: EM starts from the Otsu split (k-means' optimum) instead of a random k-means, and runs on a histogram
    of 4096 bins; the floor of 1e-6 on the variances is of the map scaled to [0, 1], so that the map's scale does not
    matter. On synthetic maps the threshold was within 0.001 of the map's range of scikit-learn's from the same start,
    and that of scikit-learn moved by up to 0.09 with its seed.
    """
    low, span, shares, centres = _histogram(maps, MIXTURE_BINS)
    upper = torch.arange(MIXTURE_BINS, device=maps.device) > _otsu_bin(shares, centres)[:, None]
    weights, means, variances = _maximize(torch.stack([~upper, upper], dim=1).double(), shares, centres)
    likelihood = torch.full_like(low, -math.inf)
    active = torch.ones_like(low, dtype=torch.bool)
    for _ in range(MIXTURE_STEPS):
        squares = (centres - means[..., None]).square() / variances[..., None]
        joint = (weights / (2 * math.pi * variances).sqrt()).log()[..., None] - squares / 2
        total = joint.logsumexp(dim=1, keepdim=True)
        updated = _maximize((joint - total).exp(), shares, centres)
        # A map's steps must not depend on the other maps of its batch.
        weights, means, variances = (
            torch.where(active[:, None], new, old)
            for new, old in zip(updated, (weights, means, variances), strict=True)
        )
        previous, likelihood = likelihood, (shares * total[:, 0]).sum(dim=1)
        active = active & ((likelihood - previous).abs() >= MIXTURE_TOLERANCE)
        if not active.any():
            break
    return torch.where(span > 0, low + span * means.mean(dim=1), low)


def mixture_masks(maps: Tensor) -> Tensor:
    """(N, H, W) float -> (N, H, W) bool: above `mixture_threshold`. A constant map predicts nothing."""
    return maps > mixture_threshold(maps)[:, None, None]


def majority_filter(masks: Tensor) -> Tensor:
    """(N, H, W) bool -> the same: each pixel becomes what most of its 3 x 3 neighbourhood is; the border stays.

    Source: the orphan filter of Dombrowski et al.'s code, which applies it to the mixture mask at 64 x 64.
    """
    filtered = masks.clone()
    if min(masks.shape[1:]) >= 3:
        share = F.avg_pool2d(masks.float()[:, None], kernel_size=3, stride=1)[:, 0]
        filtered[:, 1:-1, 1:-1] = share > 0.5  # 4/9 or 5/9 at the nearest
    return filtered


def remove_orphans(masks: Tensor, min_share: float) -> Tensor:
    """(N, H, W) bool -> the same, without connected components smaller than `min_share` of the mask's largest.

    Pixels that touch at a corner are connected. 0 keeps every component, 1 only the largest (and those as large).
    Runs on the CPU. Raises ValueError for a share outside [0, 1].
    """
    if not 0 <= min_share <= 1:
        raise ValueError(f"min_share must be in [0, 1]; got {min_share}")
    kept = np.zeros(tuple(masks.shape), dtype=bool)
    for index, mask in enumerate(masks.cpu().numpy()):
        labels, _ = ndimage.label(mask, structure=np.ones((3, 3)))
        sizes = np.bincount(labels.ravel())
        sizes[0] = 0
        large = sizes >= min_share * sizes.max()
        kept[index] = large[labels] & mask
    return torch.from_numpy(kept).to(masks.device)


def refine_by_self_attention(maps: Tensor, self_attention: Tensor, power: int = 1) -> Tensor:
    """A place's new value is the mean of the map over the places that it attends to: self_attention^power @ map.

    maps: (N, C, P) cross-attention maps. self_attention: (N, P, P), rows are the attending places and sum to 1.
    Returns (N, C, P) within the range of each map; power 0 changes nothing.
    Source: DiffSegmenter (Wang et al. 2023, arXiv 2309.02773) for power 1; higher powers spread further.
    Raises ValueError on other shapes, on rows that do not sum to 1 (within 0.01, for half precision), and for a
    negative power.
    """
    if maps.ndim != 3 or self_attention.shape != (len(maps), maps.shape[2], maps.shape[2]):
        raise ValueError(
            f"maps must be (N, C, P) and self_attention (N, P, P); "
            f"got {tuple(maps.shape)} and {tuple(self_attention.shape)}"
        )
    if power < 0:
        raise ValueError(f"power must be at least 0; got {power}")
    sums = self_attention.sum(dim=2, dtype=torch.float32)
    if not ((sums - 1).abs() <= 0.01).all():
        raise ValueError(f"rows of self_attention must sum to 1; got sums from {sums.min():.4g} to {sums.max():.4g}")
    transposed = self_attention.to(maps.dtype).transpose(1, 2)
    for _ in range(power):
        maps = maps @ transposed
    return maps


def _smoothing_matrix(size: int, sigma: float, radius: int) -> Tensor:
    """(size, size) float64: row i holds the weights of the pixels that make pixel i."""
    offsets = torch.arange(-radius, radius + 1)
    kernel = torch.exp(-0.5 * (offsets.double() / sigma).square())
    positions = (torch.arange(size)[:, None] + offsets) % (2 * size)
    mirrored = torch.minimum(positions, 2 * size - 1 - positions)
    weights = (kernel / kernel.sum()).expand(size, -1)
    return torch.zeros(size, size, dtype=torch.float64).scatter_add_(1, mirrored, weights)


def _histogram(maps: Tensor, bins: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """low (N,), span (N,), share of the pixels in each bin (N, bins), bin centres (bins,) in units of the span."""
    require_maps(maps)
    low = maps.amin(dim=(1, 2)).double()
    span = maps.amax(dim=(1, 2)).double() - low
    scale = torch.where(span > 0, span, 1.0)
    # Map by map: index tensors of a whole batch would need 16 bytes a pixel.
    counts = [
        torch.bincount(((row.double() - row_low) / row_scale * bins).long().clamp_(max=bins - 1), minlength=bins)
        for row, row_low, row_scale in zip(maps.flatten(1), low, scale, strict=True)
    ]
    shares = torch.stack(counts).double() / maps[0].numel() if counts else low.new_zeros(0, bins)
    centres = (torch.arange(bins, dtype=torch.float64, device=maps.device) + 0.5) / bins
    return low, span, shares, centres


def _otsu_bin(shares: Tensor, centres: Tensor) -> Tensor:
    """(N,) last bin of the lower class at the best split."""
    weighted = shares * centres
    below, above = shares.cumsum(dim=1), shares.flip(1).cumsum(dim=1).flip(1)
    mean_below = weighted.cumsum(dim=1) / below
    mean_above = weighted.flip(1).cumsum(dim=1).flip(1) / above
    # The first and the last bin are never empty unless the map is constant.
    between = below[:, :-1] * above[:, 1:] * (mean_below[:, :-1] - mean_above[:, 1:]).square()
    return between.nan_to_num(0.0).argmax(dim=1)


def _maximize(responsibilities: Tensor, shares: Tensor, centres: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """M-step: (N, 2, bins) -> weights, means and variances of the components, each (N, 2)."""
    mass = responsibilities * shares[:, None]
    weights = mass.sum(dim=2) + torch.finfo(torch.float64).tiny
    means = (mass * centres).sum(dim=2) / weights
    variances = (mass * (centres - means[..., None]).square()).sum(dim=2) / weights + VARIANCE_FLOOR
    return weights, means, variances
