"""Does the attention map of a finding cover the finding? One value for each (image, finding) pair, then an average.

Every metric leaves out pairs whose mask is empty or full: no map can be right or wrong there. `skipped` counts them.
Protocol "dombrowski" of Dombrowski et al., AAAI 2024, arXiv 2303.17908, unless a class says otherwise; "vilouras" is
Vilouras et al. 2024, arXiv 2404.12920. "Their code" is MischaD/chest-distillation and vios-s/ldm-phrase-grounding.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from distill.metrics.gathering import GatheredMetric
from distill.metrics.maps import min_max, mixture_masks, otsu_threshold, require_finite, require_maps

MASS_GROUPS = ("bos", "words", "eos", "padding")

Boxes = Sequence[Sequence[Sequence[float]]]
"""For each pair (x, y, width, height) of each of its boxes, in pixels of the map. A pixel is inside if its centre
is."""


def _index_tensor(name: str, indices: Sequence[int] | NDArray[np.int64] | Tensor, pairs: int) -> Tensor:
    tensor = torch.as_tensor(indices)
    if tensor.shape != (pairs,):
        raise ValueError(f"{name} must have shape ({pairs},), one index a map; got {tuple(tensor.shape)}")
    if pairs and (tensor.is_floating_point() or tensor.min() < 0):
        raise ValueError(f"{name} must be integers of at least 0; got {tensor.tolist()[:8]}")
    return tensor.long()


@dataclass(frozen=True)
class Pairs:
    """N pairs whose masks are neither empty nor full.

    maps: (N, H, W) float64. masks: (N, H, W) bool. predicted: (N, H, W) bool, if it was given.
    edges: for each pair (boxes, 4) float64: left, top, right, bottom, cut at the map; (0, 4) where there is no box.
    """

    maps: Tensor
    masks: Tensor
    edges: Sequence[Tensor]
    predicted: Tensor | None


def _edges(boxes: Boxes, size: tuple[int, int], device: torch.device) -> list[Tensor]:
    """Corners of each pair's boxes, cut at the map of `size` (height, width); ValueError for a box that has no area
    there."""
    height, width = size
    corners = []
    for number, own in enumerate(boxes):
        if any(len(box) != 4 for box in own):
            raise ValueError(f"a box is (x, y, width, height); got {list(own)} for map number {number}")
        rows = torch.as_tensor([list(box) for box in own], dtype=torch.float64).reshape(-1, 4)
        x, y, w, h = rows.unbind(dim=1)
        cut = torch.stack([x.clamp(min=0), y.clamp(min=0), (x + w).clamp(max=width), (y + h).clamp(max=height)], dim=1)
        if not (cut[:, :2] < cut[:, 2:]).all():
            raise ValueError(f"boxes of map number {number} have no area in its {width} x {height} pixels: {list(own)}")
        corners.append(cut.to(device))
    return corners


class LocalizationMetric(GatheredMetric, ABC):
    """Average over (image, finding) pairs of a score of one map against one mask.

    average: "macro" is the mean over findings of the mean over the pairs of each; "micro" the mean over all pairs.
    `compute` returns a float64 scalar, NaN when no pair has a value. `compute`, `values`, `per_finding` and `skipped`
    gather the pairs of all processes, so that every process must call them.
    """

    higher_is_better = True
    needs_boxes = False
    finding_indices: list[Tensor]
    image_indices: list[Tensor]

    def __init__(self, average: Literal["macro", "micro"] = "macro", **kwargs: object) -> None:
        # A MetricCollection merges metrics whose states are equal after the first batch, and two scores of an easy
        # batch can both be 1. The name of the class in the name of the state keeps them apart.
        self._value_state = f"values_{type(self).__name__}"
        indices = {"finding_indices": torch.int64, "image_indices": torch.int64}
        super().__init__({self._value_state: torch.float64} | indices, **kwargs)
        if average not in ("macro", "micro"):
            raise ValueError(f"average must be 'macro' or 'micro'; got {average!r}")
        self.average = average

    @abstractmethod
    def score(self, pairs: Pairs) -> Tensor:
        """(N,) float64; NaN leaves a pair out."""

    @torch.no_grad()
    def pair_scores(
        self, maps: Tensor, masks: Tensor, boxes: Boxes | None = None, predicted: Tensor | None = None
    ) -> Tensor:
        """(N,) float64, NaN where the pair is left out; keeps nothing.

        maps: (N, H, W) float, any range. masks: (N, H, W) bool, True inside the finding.
        boxes: the finding's boxes, for the metrics that need them.
        predicted: (N, H, W) bool, what the maps predict, for the metrics of the mixture threshold, which otherwise
        compute `mixture_masks(maps)` each; the others ignore it.
        Raises ValueError on other shapes or types, on maps that contain NaN or inf, and where needed boxes are missing.
        """
        if maps.ndim != 3 or maps.shape != masks.shape:
            raise ValueError(f"maps and masks must both be (N, H, W); got {tuple(maps.shape)} and {tuple(masks.shape)}")
        if not maps.is_floating_point() or masks.dtype != torch.bool:
            raise ValueError(f"maps must be float and masks bool; got {maps.dtype} and {masks.dtype}")
        if predicted is not None and (predicted.shape != maps.shape or predicted.dtype != torch.bool):
            raise ValueError(
                f"predicted must be {tuple(maps.shape)} bool; got {tuple(predicted.shape)} {predicted.dtype}"
            )
        if boxes is None and self.needs_boxes:
            raise ValueError(f"{type(self).__name__} needs boxes: for each map a list of (x, y, width, height)")
        if boxes is not None and len(boxes) != len(maps):
            raise ValueError(f"boxes must have one list a map; got {len(boxes)} lists for {len(maps)} maps")
        require_maps(maps)

        masks = masks.to(maps.device)
        edges = _edges([()] * len(maps) if boxes is None else boxes, (maps.shape[1], maps.shape[2]), maps.device)
        scorable = masks.any(dim=2).any(dim=1) & ~masks.all(dim=2).all(dim=1)
        values = torch.full((len(maps),), float("nan"), dtype=torch.float64, device=maps.device)
        if scorable.any():
            pairs = Pairs(
                maps[scorable].double(),
                masks[scorable],
                [own for own, keep in zip(edges, scorable.tolist(), strict=True) if keep],
                None if predicted is None else predicted.to(maps.device)[scorable],
            )
            values[scorable] = self.score(pairs)
        return values

    def update(
        self,
        maps: Tensor,
        masks: Tensor,
        findings: Sequence[int] | Tensor,
        images: Sequence[int] | Tensor,
        boxes: Boxes | None = None,
        predicted: Tensor | None = None,
    ) -> None:
        """Add N pairs.

        findings, images: (N,) indices of at least 0; an image is what `bootstrap` draws again.
        The others, and the errors, are those of `pair_scores`.
        """
        values = self.pair_scores(maps, masks, boxes, predicted)
        self._append(values, findings, images)

    def restore(
        self,
        values: ArrayLike,
        findings: Sequence[int] | NDArray[np.int64] | Tensor,
        images: Sequence[int] | NDArray[np.int64] | Tensor,
    ) -> None:
        """Add pairs by the values that `pair_scores` gave them, NaN included, so that a killed evaluation goes on.

        Raises ValueError when the lengths differ, and on infinite values.
        """
        scores = torch.as_tensor(np.asarray(values, dtype=np.float64))
        if scores.ndim != 1 or scores.isinf().any():
            raise ValueError(f"values must be (N,) and finite or NaN; got {tuple(scores.shape)} {scores.tolist()[:8]}")
        self._append(scores, findings, images)
        # What torchmetrics does around `update`: forget the computed value, and know that there is something to
        # compute.
        self._computed = None
        self._update_count += 1

    def _append(
        self,
        values: Tensor,
        findings: Sequence[int] | NDArray[np.int64] | Tensor,
        images: Sequence[int] | NDArray[np.int64] | Tensor,
    ) -> None:
        finding_indices = _index_tensor("findings", findings, len(values))
        image_indices = _index_tensor("images", images, len(values))
        for state, new in (
            (self._value_state, values),
            ("finding_indices", finding_indices),
            ("image_indices", image_indices),
        ):
            getattr(self, state).append(new.to(self.device))

    def compute(self) -> Tensor:
        values, findings, _ = self._pairs()
        defined = ~values.isnan()
        values, findings = values[defined], findings[defined]
        if self.average == "micro":
            return values.mean()
        groups = torch.unique(findings, return_inverse=True)[1]
        return (torch.bincount(groups, weights=values) / torch.bincount(groups)).mean()

    def values(self) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
        """(values, findings, images) of the pairs that have a value, each of shape (pairs,), from all processes."""
        values, findings, images = self._gathered()
        defined = ~np.isnan(values)
        return values[defined], findings[defined], images[defined]

    def per_finding(self, names: Sequence[str]) -> dict[str, dict[str, float | int | None]]:
        """{name: {"value": mean over the finding's pairs or None, "pairs": their number}}, finding k being names[k].

        Raises ValueError when an index has no name.
        """
        values, findings, _ = self.values()
        if findings.size and findings.max() >= len(names):
            raise ValueError(f"finding index {findings.max()} has no name; there are {len(names)} names")
        of_finding = {name: values[findings == index] for index, name in enumerate(names)}
        return {
            name: {"value": float(own.mean()) if own.size else None, "pairs": int(own.size)}
            for name, own in of_finding.items()
        }

    @property
    def skipped(self) -> int:
        """Pairs without a value, in all processes: mask empty or full, or the metric's own rule."""
        return int(np.isnan(self._gathered()[0]).sum())

    def _gathered(self) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
        with self.sync_context(dist_sync_fn=self.dist_sync_fn, should_sync=self.sync_on_compute):
            values, findings, images = (state.cpu().numpy() for state in self._pairs())
        return values, findings, images

    def _pairs(self) -> tuple[Tensor, Tensor, Tensor]:
        """(values, findings, images) within a sync context, NaN values included."""
        return (
            dim_zero_cat(getattr(self, self._value_state)),
            dim_zero_cat(self.finding_indices),
            dim_zero_cat(self.image_indices),
        )


class PixelAUROC(LocalizationMetric):
    """Probability that a pixel inside the mask has a higher value than one outside; ties count 1/2. In [0, 1].

    Exact (Mann-Whitney U), without thresholds; a constant map has 0.5.
    """

    def score(self, pairs: Pairs) -> Tensor:
        masks = pairs.masks.flatten(1)
        # Sorted integers of (value, inside): no search, and of equal values those outside come first.
        keys = _sorted(_ranks(pairs.maps.flatten(1)) * 2 + masks)
        values, inside = keys >> 1, keys & 1
        not_above = (1 - inside).cumsum(dim=1, dtype=torch.int32)
        is_first = torch.ones_like(inside)
        is_first[:, 1:] = values[:, 1:] != values[:, :-1]
        below = (is_first * (not_above - (1 - inside))).cummax(dim=1).values
        twice_u = ((below + not_above) * inside).sum(dim=1).double()
        positives = masks.sum(dim=1).double()
        return twice_u / (2 * positives * (masks.shape[1] - positives))


def _ranks(maps: Tensor) -> Tensor:
    """(N, P) float64 -> (N, P) integers of at least 0 in the same order within a row, with the same ties."""
    single = maps.float()
    if not torch.equal(single.double(), maps):
        returned: Tensor = torch.unique(maps, return_inverse=True)[1]
        return returned
    # The bits of floats of one sign are ordered as the floats are; -0.0 becomes 0.
    bits = single.view(torch.int32)
    ordered = torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
    lowest, highest = ordered.aminmax()
    if int(highest) - int(lowest) >= 2**30:  # which twice would not fit; maps in [0, 1] do
        ordered = ordered.long()
    return ordered - ordered.amin(dim=1, keepdim=True)


def _sorted(keys: Tensor) -> Tensor:
    """Rows in ascending order. On a CPU NumPy takes half of the time of torch, which also returns indices."""
    if keys.device.type != "cpu":
        return keys.sort(dim=1).values
    return torch.from_numpy(np.sort(keys.numpy(), axis=1))


class ThresholdAUROC(LocalizationMetric):
    """Area under the ROC curve of five thresholds (0, .25, .5, .75, 1), by trapezoids; protocol "vilouras". In [0, 1].

    The map is scaled to [0, 1], set to 0 where it is not above its Otsu threshold, and counts as positive at and above
    a threshold. A map that was already masked so is not changed by it. A constant map has 0.5.
    Source: their code (torcheval's binary_binned_auroc with 5 thresholds, on the masked map).
    """

    def score(self, pairs: Pairs) -> Tensor:
        scaled = min_max(pairs.maps)
        masked = scaled * (scaled > otsu_threshold(scaled)[:, None, None])
        hits, false_alarms = [torch.zeros_like(masked[:, 0, 0])], [torch.zeros_like(masked[:, 0, 0])]
        for threshold in (1.0, 0.75, 0.5, 0.25, 0.0):
            positive = masked >= threshold
            hits.append(_count(positive & pairs.masks) / _count(pairs.masks))
            false_alarms.append(_count(positive & ~pairs.masks) / _count(~pairs.masks))
        return torch.trapezoid(torch.stack(hits, dim=1), torch.stack(false_alarms, dim=1), dim=1)


class SignedCNR(LocalizationMetric):
    """CNR = (mean_in - mean_out) / sqrt(var_in + var_out), unbiased variances, signed. A constant map has 0.

    Left out besides the empty and the full mask: a region of one pixel, whose unbiased variance does not exist, and a
    map that is constant in both regions with different values, whose contrast is infinite.
    """

    def score(self, pairs: Pairs) -> Tensor:
        return _contrast_to_noise(pairs.maps, pairs.masks, correction=1)


class AbsoluteCNR(LocalizationMetric):
    """CNR = |mean_in - mean_out| / sqrt(var_in + var_out), population variances, of each box, then their mean.

    "Out" is the map without that box. A constant map has 0. A box is left out that holds no pixel's centre, that covers
    the map, or whose contrast is infinite; a pair without any other box is left out. Needs `boxes`.
    Source: BioViL (Boecking et al. 2022) and protocol "vilouras", whose code also takes the boxes before it in the list
    out of "out", so that it depends on their order.
    """

    needs_boxes = True

    def score(self, pairs: Pairs) -> Tensor:
        height, width = pairs.maps.shape[1:]
        x = torch.arange(width, device=pairs.maps.device) + 0.5
        y = torch.arange(height, device=pairs.maps.device) + 0.5
        values = []
        for map_, edges in zip(pairs.maps, pairs.edges, strict=True):
            left, top, right, bottom = edges[:, :, None].unbind(dim=1)
            inside = ((top <= y) & (y < bottom))[:, :, None] & ((left <= x) & (x < right))[:, None, :]
            inside = inside[inside.flatten(1).any(dim=1) & ~inside.flatten(1).all(dim=1)]
            ratios = _contrast_to_noise(map_.expand(inside.shape), inside, correction=0).abs()
            values.append(ratios.nanmean())
        return torch.stack(values)


def _contrast_to_noise(maps: Tensor, region: Tensor, correction: int) -> Tensor:
    """(N,) float64: contrast of the region with the rest, variances divided by their pixels minus `correction`.

    NaN where it is infinite or the variance does not exist; 0 for a constant map.
    """
    # CNR does not depend on the map's scale, and variances of very small numbers would underflow.
    normalized, region = min_max(maps).flatten(1), region.flatten(1)
    mean_in, squares_in, flat_in = _moments(normalized, region)
    mean_out, squares_out, flat_out = _moments(normalized, ~region)
    variance_in = squares_in / (region.sum(dim=1) - correction)
    variance_out = squares_out / ((~region).sum(dim=1) - correction)
    ratio = (mean_in - mean_out) / (variance_in + variance_out).sqrt()
    # Decided by comparison: rounding leaves variances of about 1e-33 of equal numbers.
    ratio = torch.where(flat_in & flat_out, float("nan"), ratio)
    return torch.where(normalized.amax(dim=1) == 0, 0.0, ratio)


def _moments(rows: Tensor, region: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, sum of squared deviations, and whether all values are equal, of each row's region."""
    mean = (rows * region).sum(dim=1) / region.sum(dim=1)
    squares = ((rows - mean[:, None]).square() * region).sum(dim=1)
    highest = torch.where(region, rows, -torch.inf).amax(dim=1)
    lowest = torch.where(region, rows, torch.inf).amin(dim=1)
    return mean, squares, highest == lowest


class PointingGame(LocalizationMetric):
    """Top-1: 1 when the highest pixel lies inside the mask or within `tolerance` pixels of one inside, else 0.

    Ties: the expected value of choosing one of the highest pixels at random, which is the share of them that hit; a
    constant map therefore has the mask's share of the image (at tolerance 0).
    Source: Zhang et al. 2018 (IJCV), with 15 px; "dombrowski" has 0. Raises ValueError for a negative tolerance.
    """

    tolerance: Tensor

    def __init__(self, average: Literal["macro", "micro"] = "macro", tolerance: float = 0.0, **kwargs: Any) -> None:
        super().__init__(average=average, **kwargs)
        if not 0 <= tolerance < math.inf:
            raise ValueError(f"tolerance must be at least 0 pixels; got {tolerance}")
        # A state, so that a MetricCollection does not merge two tolerances that agree on its first batch.
        self.add_state("tolerance", torch.tensor(tolerance, dtype=torch.float64), dist_reduce_fx="max")

    def score(self, pairs: Pairs) -> Tensor:
        highest = pairs.maps == pairs.maps.amax(dim=(1, 2), keepdim=True)
        target = pairs.masks
        if self.tolerance > 0:
            distances = [ndimage.distance_transform_edt(~mask) for mask in target.cpu().numpy()]
            target = torch.from_numpy(np.stack(distances) <= float(self.tolerance)).to(target.device)
        return _count(highest & target) / _count(highest)


def _count(masks: Tensor) -> Tensor:
    """(N, H, W) bool -> (N,) float64."""
    return masks.sum(dim=(1, 2)).double()


def _iou(predicted: Tensor, masks: Tensor) -> Tensor:
    return _count(predicted & masks) / _count(predicted | masks)


class IoUAtThreshold(LocalizationMetric):
    """Intersection over union of the mask and of the min-max normalized map above `threshold`. In [0, 1].

    A constant map predicts nothing and has 0. Raises ValueError for a threshold outside [0, 1).
    """

    threshold: Tensor

    def __init__(self, threshold: float = 0.5, average: Literal["macro", "micro"] = "macro", **kwargs: Any) -> None:
        super().__init__(average=average, **kwargs)
        if not 0 <= threshold < 1:
            raise ValueError(f"threshold must be in [0, 1); got {threshold}")
        # A state, so that a MetricCollection does not merge two thresholds that agree on its first batch.
        self.add_state("threshold", torch.tensor(threshold, dtype=torch.float64), dist_reduce_fx="max")

    def score(self, pairs: Pairs) -> Tensor:
        return _iou(min_max(pairs.maps) > self.threshold.to(pairs.maps.device), pairs.masks)


class MeanIoU(LocalizationMetric):
    """Mean of the IoU of the mask and of the min-max normalized map above .1, .2, .3, .4 and .5. In [0, 1].

    A constant map predicts nothing and has 0. Source: BioViL (Boecking et al. 2022) and protocol "vilouras".
    """

    def score(self, pairs: Pairs) -> Tensor:
        normalized = min_max(pairs.maps)
        return torch.stack([_iou(normalized > t, pairs.masks) for t in (0.1, 0.2, 0.3, 0.4, 0.5)]).mean(dim=0)


class MixtureMetric(LocalizationMetric):
    """Scores what a map predicts: `predicted`, or else `mixture_masks(maps)`.

    Computed once and handed to several of these metrics, `predicted` spares them the mixture. It also allows the exact
    order of the paper's code: mixture at 64 x 64, `majority_filter`, enlarged to 512.
    """

    def score(self, pairs: Pairs) -> Tensor:
        return self.score_predicted(mixture_masks(pairs.maps) if pairs.predicted is None else pairs.predicted, pairs)

    @abstractmethod
    def score_predicted(self, predicted: Tensor, pairs: Pairs) -> Tensor:
        """(N,) float64; NaN leaves a pair out."""


class MixtureIoU(MixtureMetric):
    """Intersection over union of the mask and of what the map predicts. In [0, 1]; a constant map has 0."""

    def score_predicted(self, predicted: Tensor, pairs: Pairs) -> Tensor:
        return _iou(predicted, pairs.masks)


class MixtureTwoClassIoU(MixtureMetric):
    """(IoU of the foreground + IoU of the background) / 2, the paper's mIoU. In [0, 1].

    A constant map predicts background only and has half the share of the image outside the mask.
    """

    def score_predicted(self, predicted: Tensor, pairs: Pairs) -> Tensor:
        return (_iou(predicted, pairs.masks) + _iou(~predicted, ~pairs.masks)) / 2


def _bounding_edges(masks: Tensor) -> Tensor:
    """(N, H, W) bool -> (N, 4) float64 left, top, right, bottom; left > right for an empty mask."""
    edges = []
    for dim in (1, 2):  # columns, then rows
        filled = masks.any(dim=dim)
        index = torch.arange(filled.shape[1], device=masks.device)
        edges.append(torch.where(filled, index, filled.shape[1]).amin(dim=1))
        edges.append(torch.where(filled, index + 1, 0).amax(dim=1))
    left, right, top, bottom = edges
    return torch.stack([left, top, right, bottom], dim=1).double()


def _true_edges(pairs: Pairs) -> Tensor:
    """(N, 4): bounding box of each pair's boxes, or of its mask where there is none."""
    edges = _bounding_edges(pairs.masks)
    for number, own in enumerate(pairs.edges):
        if len(own):
            edges[number] = torch.cat([own[:, :2].amin(dim=0), own[:, 2:].amax(dim=0)])
    return edges


class BoxIoU(MixtureMetric):
    """IoU of two rectangles: around what the map predicts, and around the pair's boxes (or else its mask). In [0, 1].

    A constant map predicts nothing and has 0. Their code compares the first rectangle, less its last row and column,
    with the boxes' union: nearly the same for one box, lower for several.
    """

    def score_predicted(self, predicted: Tensor, pairs: Pairs) -> Tensor:
        found, true = _bounding_edges(predicted), _true_edges(pairs)
        shared = torch.cat([torch.maximum(found[:, :2], true[:, :2]), torch.minimum(found[:, 2:], true[:, 2:])], dim=1)
        areas = [(e[:, 2:] - e[:, :2]).clamp(min=0).prod(dim=1) for e in (found, true, shared)]
        return areas[2] / (areas[0] + areas[1] - areas[2])


class CentreDistance(MixtureMetric):
    """Distance of the centres of the two rectangles of `BoxIoU`, in pixels of the map (in the paper, of 512 x 512).

    Left out as in their code: a pair with several boxes; and a map that predicts nothing, on which their code fails.
    """

    higher_is_better = False

    def score_predicted(self, predicted: Tensor, pairs: Pairs) -> Tensor:
        found, true = _bounding_edges(predicted), _true_edges(pairs)
        centres = [(e[:, :2] + e[:, 2:]) / 2 for e in (found, true)]
        distance = (centres[0] - centres[1]).norm(dim=1)
        several = torch.tensor([len(own) > 1 for own in pairs.edges], device=found.device)
        return torch.where(several | (found[:, 0] > found[:, 2]), float("nan"), distance)


class AttentionMass(Metric):
    """Mean attention mass of the BOS, word, EOS and padding tokens; it shows localization that leaks to the tail."""

    is_differentiable = False
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros(len(MASS_GROUPS), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, masses: Tensor) -> None:
        """masses: (N, 4) in the order of MASS_GROUPS, each row sums to 1 (within 0.01, for half precision).

        Raises ValueError on other shapes, on NaN or inf, and on rows that are no shares of 1.
        """
        if masses.ndim != 2 or masses.shape[1] != len(MASS_GROUPS):
            raise ValueError(f"masses must be (N, {len(MASS_GROUPS)}); got {tuple(masses.shape)}")
        require_finite("masses", masses)
        shares = masses.to(self.device, torch.float64)
        wrong = (shares < 0).any(dim=1) | ((shares.sum(dim=1) - 1).abs() > 0.01)
        if wrong.any():
            raise ValueError(f"{int(wrong.sum())} of {len(shares)} masses are negative or do not sum to 1")
        self.total += shares.sum(dim=0)
        self.count += len(shares)

    def compute(self) -> dict[str, Tensor]:
        """{group: float64 scalar in [0, 1]}; NaN before the first update."""
        return dict(zip(MASS_GROUPS, self.total / self.count, strict=True))
