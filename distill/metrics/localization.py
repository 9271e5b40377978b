"""Does the attention map of a finding cover the finding? One value for each (image, finding) pair, then an average.

Every metric leaves out pairs whose mask is empty or full: no map can be right or wrong there. `skipped` counts them.
Protocol "dombrowski" of Dombrowski et al., AAAI 2024, arXiv 2303.17908, unless a class says otherwise.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

MASS_GROUPS = ("bos", "words", "eos", "padding")


def _index_tensor(name: str, indices: Sequence[int] | Tensor, pairs: int) -> Tensor:
    tensor = torch.as_tensor(indices)
    if tensor.shape != (pairs,):
        raise ValueError(f"{name} must have shape ({pairs},), one index a map; got {tuple(tensor.shape)}")
    if pairs and (tensor.is_floating_point() or tensor.min() < 0):
        raise ValueError(f"{name} must be integers of at least 0; got {tensor.tolist()[:8]}")
    return tensor.long()


def _require_finite(name: str, rows: Tensor) -> None:
    bad = (~rows.isfinite()).flatten(1).any(dim=1)
    if bad.any():
        first = int(bad.nonzero()[0])
        raise ValueError(f"{int(bad.sum())} of {len(rows)} {name} contain NaN or inf (the first is number {first})")


def _min_max(maps: Tensor) -> Tensor:
    """(N, P) -> (N, P) in [0, 1] by row; a constant row becomes 0."""
    low = maps.amin(dim=1, keepdim=True)
    span = maps.amax(dim=1, keepdim=True) - low
    return (maps - low) / torch.where(span > 0, span, 1.0)


class LocalizationMetric(Metric, ABC):
    """Average over (image, finding) pairs of a score of one map against one mask.

    average: "macro" is the mean over findings of the mean over the pairs of each; "micro" the mean over all pairs.
    `compute` returns a float64 scalar, NaN when no pair has a value. `compute`, `values`, `per_finding` and `skipped`
    gather the pairs of all processes, so that every process must call them.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    finding_indices: list[Tensor]
    image_indices: list[Tensor]

    def __init__(self, average: Literal["macro", "micro"] = "macro", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if average not in ("macro", "micro"):
            raise ValueError(f"average must be 'macro' or 'micro'; got {average!r}")
        self.average = average
        # A MetricCollection merges metrics whose states are equal after the first batch, and two scores of an easy
        # batch can both be 1. The name of the class in the name of the state keeps them apart.
        self._value_state = f"values_{type(self).__name__}"
        for state in (self._value_state, "finding_indices", "image_indices"):
            self.add_state(state, [], dist_reduce_fx="cat")

    @abstractmethod
    def score(self, maps: Tensor, masks: Tensor) -> Tensor:
        """(N, P) float64 maps, (N, P) bool masks that are neither empty nor full -> (N,); NaN leaves a pair out."""

    def update(
        self, maps: Tensor, masks: Tensor, findings: Sequence[int] | Tensor, images: Sequence[int] | Tensor
    ) -> None:
        """Add N pairs.

        maps: (N, H, W) float, any range. masks: (N, H, W) bool, True inside the finding.
        findings, images: (N,) indices of at least 0; an image is what `bootstrap` draws again.
        Raises ValueError on other shapes or types, and on maps that contain NaN or inf.
        """
        if maps.ndim != 3 or maps.shape != masks.shape:
            raise ValueError(f"maps and masks must both be (N, H, W); got {tuple(maps.shape)} and {tuple(masks.shape)}")
        if not maps.is_floating_point() or masks.dtype != torch.bool:
            raise ValueError(f"maps must be float and masks bool; got {maps.dtype} and {masks.dtype}")
        finding_indices = _index_tensor("findings", findings, len(maps))
        image_indices = _index_tensor("images", images, len(maps))
        _require_finite("maps", maps)

        flat_maps, flat_masks = maps.flatten(1).double(), masks.flatten(1).to(maps.device)
        scorable = flat_masks.any(dim=1) & ~flat_masks.all(dim=1)
        values = torch.full((len(maps),), float("nan"), dtype=torch.float64, device=maps.device)
        if scorable.any():
            values[scorable] = self.score(flat_maps[scorable], flat_masks[scorable])
        for state, new in (
            (self._value_state, values),
            ("finding_indices", finding_indices),
            ("image_indices", image_indices),
        ):
            getattr(self, state).append(new.to(self.device))

    def sync(self, *args: Any, **kwargs: Any) -> None:
        # torchmetrics lets a process without any pair join the gathering with float32, whatever the others hold.
        for state, dtype in (
            (self._value_state, torch.float64),
            ("finding_indices", torch.int64),
            ("image_indices", torch.int64),
        ):
            if not len(getattr(self, state)):
                getattr(self, state).append(torch.zeros(0, dtype=dtype, device=self.device))
        super().sync(*args, **kwargs)

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

    Exact (Mann-Whitney U of the average ranks), without thresholds; a constant map has 0.5.
    """

    def score(self, maps: Tensor, masks: Tensor) -> Tensor:
        ascending = maps.sort(dim=1).values
        below = torch.searchsorted(ascending, maps, side="left")
        not_above = torch.searchsorted(ascending, maps, side="right")
        average_rank = (below + not_above + 1).double() / 2
        inside = masks.sum(dim=1).double()
        outside = (~masks).sum(dim=1).double()
        u = (average_rank * masks).sum(dim=1) - inside * (inside + 1) / 2
        return u / (inside * outside)


class SignedCNR(LocalizationMetric):
    """CNR = (mean_in - mean_out) / sqrt(var_in + var_out), unbiased variances, signed. A constant map has 0.

    Left out besides the empty and the full mask: a region of one pixel, whose unbiased variance does not exist, and a
    map that is constant in both regions with different values, whose contrast is infinite.
    """

    def score(self, maps: Tensor, masks: Tensor) -> Tensor:
        # CNR does not depend on the map's scale, and variances of very small numbers would underflow.
        normalized = _min_max(maps)
        mean_in, squares_in, flat_in = self._moments(normalized, masks)
        mean_out, squares_out, flat_out = self._moments(normalized, ~masks)
        variance_in = squares_in / (masks.sum(dim=1) - 1)
        variance_out = squares_out / ((~masks).sum(dim=1) - 1)
        ratio = (mean_in - mean_out) / (variance_in + variance_out).sqrt()
        # Decided by comparison: rounding leaves variances of about 1e-33 of equal numbers.
        ratio = torch.where(flat_in & flat_out, float("nan"), ratio)
        return torch.where(normalized.amax(dim=1) == 0, 0.0, ratio)

    @staticmethod
    def _moments(maps: Tensor, region: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, sum of squared deviations, and whether all values are equal, of each row's region."""
        mean = (maps * region).sum(dim=1) / region.sum(dim=1)
        squares = ((maps - mean[:, None]).square() * region).sum(dim=1)
        highest = torch.where(region, maps, -torch.inf).amax(dim=1)
        lowest = torch.where(region, maps, torch.inf).amin(dim=1)
        return mean, squares, highest == lowest


class PointingGame(LocalizationMetric):
    """Top-1: 1 when the highest pixel lies inside the mask, else 0.

    Ties: the expected value of choosing one of the highest pixels at random, which is the share of them inside; a
    constant map therefore has the mask's share of the image.
    """

    def score(self, maps: Tensor, masks: Tensor) -> Tensor:
        highest = maps == maps.amax(dim=1, keepdim=True)
        return (highest & masks).sum(dim=1).double() / highest.sum(dim=1)


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

    def score(self, maps: Tensor, masks: Tensor) -> Tensor:
        predicted = _min_max(maps) > self.threshold.to(maps.device)
        return (predicted & masks).sum(dim=1).double() / (predicted | masks).sum(dim=1)


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
        _require_finite("masses", masses)
        shares = masses.to(self.device, torch.float64)
        wrong = (shares < 0).any(dim=1) | ((shares.sum(dim=1) - 1).abs() > 0.01)
        if wrong.any():
            raise ValueError(f"{int(wrong.sum())} of {len(shares)} masses are negative or do not sum to 1")
        self.total += shares.sum(dim=0)
        self.count += len(shares)

    def compute(self) -> dict[str, Tensor]:
        """{group: float64 scalar in [0, 1]}; NaN before the first update."""
        return dict(zip(MASS_GROUPS, self.total / self.count, strict=True))
