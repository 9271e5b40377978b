"""Features of an image that have a name: what a person can see and say of it, as one row of numbers an image.

Only brightness, contrast and clipped share know the image's own brightness and contrast. All others are of the
standardized gray image z = (gray - mean) / standard deviation, so that a wrong contrast moves no measure of sharpness.
A mirrored image has the same row, except `mass to the right`, whose sign turns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Feature:
    """kind: features of one kind are shuffled together, since they say nearly the same. unit: unit or range."""

    name: str
    kind: str
    unit: str
    meaning: str


SD = "standard deviations of the image"
FEATURES: tuple[Feature, ...] = (
    Feature("mean brightness", "brightness", "0 (black) to 1 (white)", "Mean of all pixels."),
    Feature("clipped share", "brightness", "0 to 1", "Share of pixels that are pure black or pure white."),
    Feature("contrast", "contrast", "0 to .5", "Standard deviation of all pixels."),
    Feature("brightness range", "contrast", "0 to 1", "From the darkest hundredth of the pixels to the brightest."),
    Feature("dark tones", "tones", SD, "The value that a tenth of the pixels is darker than, from the mean."),
    Feature("middle tones", "tones", SD, "The median pixel, from the mean."),
    Feature("bright tones", "tones", SD, "The value that a tenth of the pixels is brighter than, from the mean."),
    Feature("skewness", "tones", "number", "Above 0 where few pixels are much brighter than the rest."),
    Feature("tone entropy", "tones", "0 to 6 bits", "How evenly the 64 levels of brightness are used."),
    Feature("coarse structure", "detail", "0 to 1", "Share of the spectrum's energy below 1/8 of the finest frequency."),
    Feature("medium structure", "detail", "0 to 1", "Share of energy from 1/8 to 1/4 of the finest frequency."),
    Feature("fine detail", "detail", "0 to 1", "Share of energy from 1/4 to 1/2 of the finest frequency."),
    Feature("finest detail", "detail", "0 to 1", "Share of energy above 1/2 of the finest frequency."),
    Feature("spectrum slope", "detail", "powers of ten each", "How fast energy falls with frequency; lower is smoother."),
    Feature("spectrum bumps", "detail", "powers of ten", "How far the spectrum is from a straight line: grids and ringing."),
    Feature("edge sharpness", "sharpness", f"{SD} a pixel", "Mean gradient."),
    Feature("strongest edges", "sharpness", f"{SD} a pixel", "Gradient that one pixel in a hundred exceeds."),
    Feature("Laplacian variance", "sharpness", "variances of the image", "The usual measure of focus; blur lowers it."),
    Feature("noise", "sharpness", SD, "Grain: median absolute value of a high-pass that ignores edges."),
    Feature("local contrast", "texture", SD, "Mean standard deviation within squares of an eighth of the side."),
    Feature("texture contrast", "texture", "squared levels of 16", "Mean squared step between neighbours (GLCM contrast)."),
    Feature("texture homogeneity", "texture", "0 to 1", "How alike neighbours are (GLCM homogeneity)."),
    Feature("texture entropy", "texture", "0 to 8 bits", "How varied small patterns are (local binary patterns)."),
    Feature("left-right symmetry", "layout", "-1 to 1", "Correlation with the mirrored image."),
    Feature("mass to the right", "layout", "-1 to 1", "Centre of brightness, from the image's left to its right."),
    Feature("mass to the bottom", "layout", "-1 to 1", "Centre of brightness, from top to bottom."),
    Feature("border brightness", "layout", SD, "Mean of the outermost sixteenth on all sides, from the mean."),
    Feature("dark area in the centre", "layout", "0 to 1", "Share of the centre that is dark: lungs, in a chest X-ray."),
    Feature("bright width between dark areas", "layout", "0 to 1",
            "Share of bright pixels between the outer edges of the dark areas, below the middle: the cardiothoracic "
            "ratio, roughly. Unknown without a dark area on either side."),
    Feature("lower middle brightness", "layout", SD, "Mean of where a heart lies in a chest X-ray, from the mean."),
    Feature("colour saturation", "colour", SD, "Mean spread of red, green and blue; 0 in a gray image."),
    Feature("blockiness", "compression", "1 where there is none", "Steps at every eighth pixel, over steps elsewhere."),
)  # fmt: skip
SMALLEST_PX = 32
_BINS, _REACH = 64, 3.0
"""Levels of the histogram of z, from -_REACH to _REACH."""


@torch.no_grad()
def image_features(images: Tensor) -> Tensor:
    """(N, 3, height, width) in [-1, 1] -> (N, len(FEATURES)) float64, in the order of FEATURES; NaN where unknown.

    Raises ValueError for another shape, a side below 32 px, and pixels that are NaN or outside [-1, 1].
    """
    if images.ndim != 4 or images.shape[1] != 3 or min(images.shape[-2:]) < SMALLEST_PX:
        raise ValueError(f"images must be (N, 3, height, width) of at least 32 px; got {tuple(images.shape)}")
    if not (images.abs() <= 1 + 1e-6).all():
        raise ValueError("pixels must be numbers in [-1, 1]")
    pixels = (images.double() + 1) / 2
    gray = pixels.mean(dim=1)
    mean, deviation = gray.mean(dim=(1, 2)), gray.std(dim=(1, 2), correction=0)
    scale = deviation.clamp(min=1e-6)
    z = (gray - mean[:, None, None]) / scale[:, None, None]
    low, high = torch.quantile(gray.flatten(1), torch.tensor([0.01, 0.99], dtype=gray.dtype), dim=1)
    columns = [
        mean,
        ((gray <= 0.5 / 255) | (gray >= 254.5 / 255)).double().mean(dim=(1, 2)),
        deviation,
        high - low,
        *_tones(z),
        *_detail(z),
        *_sharpness(z),
        *_texture(z),
        *_layout(z),
        (pixels.amax(dim=1) - pixels.amin(dim=1)).mean(dim=(1, 2)) / scale,
        _blockiness(z),
    ]
    return torch.stack(columns, dim=1)


def _histogram(values: Tensor, bins: int) -> Tensor:
    """(N, ...) whole numbers below `bins` -> (N, bins) shares."""
    flat = values.flatten(1).long()
    counts = torch.zeros(len(flat), bins, dtype=torch.float64).scatter_add_(1, flat, torch.ones(flat.shape).double())
    return counts / flat.shape[1]


def _levels(z: Tensor, levels: int) -> Tensor:
    """z in `levels` equal steps from -_REACH to _REACH, as whole numbers in float64."""
    return ((z / _REACH + 1) / 2 * levels).floor().clamp(0, levels - 1)


def _entropy(shares: Tensor) -> Tensor:
    return -(shares * shares.clamp(min=1e-300).log2()).sum(dim=1)


def _tones(z: Tensor) -> list[Tensor]:
    quantiles = torch.quantile(z.flatten(1), torch.tensor([0.1, 0.5, 0.9], dtype=z.dtype), dim=1)
    return [*quantiles, z.pow(3).mean(dim=(1, 2)), _entropy(_histogram(_levels(z, _BINS), _BINS))]


def _hann(side: int) -> Tensor:
    """The same from either end."""
    return torch.hann_window(side, periodic=False, dtype=torch.float64)


def _detail(z: Tensor) -> list[Tensor]:
    """Shares of energy in four bands, and slope and residual of the mean energy at each frequency, in logarithms.

    Frequencies are in units of the finest that a row or a column holds (Nyquist). A Hann window hides the border.
    """
    height, width = z.shape[-2:]
    window = _hann(height)[:, None] * _hann(width)
    power = torch.fft.fft2(z * window).abs().square()
    power[:, 0, 0] = 0
    frequency = 2 * torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.fftfreq(width)[None, :]).double()
    total = power.sum(dim=(1, 2)).clamp(min=1e-12)
    ends = (0.0, 0.125, 0.25, 0.5, 2.0)
    bands = [
        (power * ((frequency >= low) & (frequency < high))).sum(dim=(1, 2)) / total for low, high in pairwise(ends)
    ]
    rings = (frequency * 16).round().long().flatten()
    inside = (rings >= 1) & (rings <= 16)
    sums = torch.zeros(len(z), 17, dtype=z.dtype).index_add_(1, rings[inside], power.flatten(1)[:, inside])
    energy = (sums / torch.bincount(rings[inside], minlength=17))[:, 1:].clamp(min=1e-12).log10()
    place = torch.arange(1, 17).double().log10()
    place = place - place.mean()
    slope = (energy * place).sum(dim=1) / place.square().sum()
    left = energy - energy.mean(dim=1, keepdim=True) - slope[:, None] * place
    return [*bands, slope, left.square().mean(dim=1).sqrt()]


def _sharpness(z: Tensor) -> list[Tensor]:
    """Source of the noise: Immerkaer 1996, with a median in place of the mean."""
    across, down = z[:, 1:-1, 2:] - z[:, 1:-1, :-2], z[:, 2:, 1:-1] - z[:, :-2, 1:-1]
    gradient = torch.hypot(across, down).flatten(1) / 2
    second = [z[:, 1:-1, 2:] + z[:, 1:-1, :-2], z[:, 2:, 1:-1] + z[:, :-2, 1:-1]]
    laplacian = second[0] + second[1] - 4 * z[:, 1:-1, 1:-1]
    kernel = torch.tensor([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], dtype=z.dtype)
    grain = F.conv2d(z[:, None], kernel[None, None]).abs().flatten(1).median(dim=1).values
    strongest = torch.quantile(gradient, 0.99, dim=1)
    return [gradient.mean(dim=1), strongest, laplacian.flatten(1).var(dim=1, correction=0), 1.4826 * grain / 6]


def _texture(z: Tensor) -> list[Tensor]:
    """Of the co-occurrence matrix p of 16 levels at distance 1: sum p (i - j)^2 and sum p / (1 + (i - j)^2)."""
    side = max(2, min(z.shape[-2:]) // 8)
    mean, square = (F.avg_pool2d(values[:, None], side) for values in (z, z.square()))
    local = (square - mean.square()).clamp(min=0).sqrt().mean(dim=(1, 2, 3))
    levels = _levels(z, 16)
    steps = torch.cat([levels.diff(dim=2).flatten(1), levels.diff(dim=1).flatten(1)], dim=1).square()
    centre, patterns = z[:, 1:-1, 1:-1], torch.zeros_like(z[:, 1:-1, 1:-1])
    height, width = z.shape[-2:]
    places = [(1, 0), (0, 0), (0, 1), (0, 2), (1, 2), (2, 2), (2, 1), (2, 0)]
    for bit, (top, left) in enumerate(places):
        brighter = z[:, top : height - 2 + top, left : width - 2 + left] > centre + 1e-9
        patterns += brighter * 2**bit
    return [local, steps.mean(dim=1), (1 / (1 + steps)).mean(dim=1), _entropy(_histogram(patterns, 256))]


def _layout(z: Tensor) -> list[Tensor]:
    height, width = z.shape[-2:]
    symmetry = (z * z.flip(-1)).mean(dim=(1, 2))
    weight = (z - torch.quantile(z.flatten(1), 0.01, dim=1)[:, None, None]).clamp(min=0)
    total = weight.sum(dim=(1, 2)).clamp(min=1e-12)
    across, down = (torch.linspace(-1, 1, side, dtype=z.dtype) for side in (width, height))
    rightwards = (weight * across).sum(dim=(1, 2)) / total
    downwards = (weight * down[:, None]).sum(dim=(1, 2)) / total
    frame = max(1, min(height, width) // 16)
    border = torch.ones(height, width, dtype=torch.bool)
    border[frame:-frame, frame:-frame] = False
    dark = z < _otsu(z)[:, None, None]
    heart = _box(z, (0.5, 0.7), 0.35).mean(dim=(1, 2))
    lungs = _box(dark, (0.2, 0.8), 0.2).double().mean(dim=(1, 2))
    return [symmetry, rightwards, downwards, z[:, border].mean(dim=1), lungs, _bright_width(dark), heart]


def _box(images: Tensor, rows: tuple[float, float], margin: float) -> Tensor:
    """Rows from one share of the height to another, and columns without `margin` of the width on both sides."""
    height, width = images.shape[-2:]
    left = int(margin * width)
    return images[:, int(rows[0] * height) : math.ceil(rows[1] * height), left : width - left]


def _bright_width(dark: Tensor) -> Tensor:
    """Median over rows of the bright share between the outermost dark pixels; NaN if half of the rows lack a side."""
    band = _box(dark, (0.5, 0.7), 0.1)
    width = band.shape[-1]
    half = width // 2
    both = band[..., :half].any(dim=2) & band[..., width - half :].any(dim=2)
    place = torch.arange(width)
    first = torch.where(band, place, width).amin(dim=2)
    last = torch.where(band, place, -1).amax(dim=2)
    share = 1 - band.sum(dim=2) / (last - first + 1).clamp(min=1)
    share = torch.where(both, share.double(), torch.nan)
    return torch.where(both.double().mean(dim=1) > 0.5, share.nanmedian(dim=1).values, torch.nan)


def _otsu(z: Tensor) -> Tensor:
    """The value between dark and bright: it makes the variance between the two largest (Otsu 1979)."""
    shares = _histogram(_levels(z, _BINS), _BINS)
    level = ((torch.arange(_BINS).double() + 0.5) / _BINS * 2 - 1) * _REACH
    below, moment = shares.cumsum(dim=1), (shares * level).cumsum(dim=1)
    between = (moment[:, -1:] * below - moment).square() / (below * (1 - below)).clamp(min=1e-12)
    return level[between[:, :-1].argmax(dim=1)] + _REACH / _BINS


def _blockiness(z: Tensor) -> Tensor:
    """Mean of rows and columns; 1 for a constant image."""
    found = []
    for steps in (z.diff(dim=2).abs().mean(dim=1), z.diff(dim=1).abs().mean(dim=2)):
        at_border = torch.arange(steps.shape[1]) % 8 == 7
        found.append((steps[:, at_border].mean(dim=1) + 1e-9) / (steps[:, ~at_border].mean(dim=1) + 1e-9))
    return torch.stack(found).mean(dim=0)
