"""KID, and precision, recall, density and coverage: how generated images lie among real ones, in features of images.

Every estimate takes counts: how often each image is drawn in a resample. Counts of 1 give the value of the sample
itself.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill.metrics.bootstrap import divide_or_nan
from distill.metrics.quality import check_features

MANIFOLD = ("precision", "recall", "density", "coverage")
FIDELITY = ("fid", "kid", *MANIFOLD)
"""What is measured on features of real and generated images, in the order of tables."""

Array = NDArray[np.float64]


def kernel_distance(
    real: Tensor, generated: Tensor, real_counts: Array | None = None, generated_counts: Array | None = None
) -> Array:
    """KID of each resample, (S,): the unbiased estimate of the squared maximum mean discrepancy; it may be below 0.

    mean k(r, r') + mean k(g, g') - 2 mean k(r, g), over pairs of different images, k(x, y) = (x y / d + 1)^3.
    All images are used at once: subsets, as in the authors' code, save memory at 10,000 images and add variance at 100.
    real: (N, d), generated: (M, d), two or more each. counts: (S, N) and (S, M). Two copies of one image are no pair of
    different images, so that resamples of single images have no bias either. Raises ValueError as `frechet_distance`
    does. Source: Binkowski et al. 2018, arXiv 1801.01401.
    """
    check_features(real, generated)
    real, generated = real.double().cpu(), generated.double().cpu()
    w = np.ones((1, len(real))) if real_counts is None else real_counts
    v = np.ones((1, len(generated))) if generated_counts is None else generated_counts

    def kernel(x: Tensor, y: Tensor) -> Array:
        values: Array = ((x @ y.T / x.shape[1] + 1) ** 3).numpy()
        return values

    def within(x: Tensor, counts: Array) -> Array:
        values = kernel(x, x)
        np.fill_diagonal(values, 0.0)
        pairs = counts.sum(axis=1) ** 2 - (counts**2).sum(axis=1)
        return divide_or_nan(((counts @ values) * counts).sum(axis=1), pairs)

    between = ((w @ kernel(real, generated)) * v).sum(axis=1) / (w.sum(axis=1) * v.sum(axis=1))
    found: Array = within(real, w) + within(generated, v) - 2 * between
    return found


class Manifolds:
    """Two sets of images, each as the union of balls: around each image, as far as its k-th nearest other image.

    precision: share of generated images in a real ball. recall: share of real images in a generated ball.
    density: real balls that hold a generated image, over k, mean over generated images; above 1 where these crowd.
    coverage: share of real balls that hold a generated image.
    Sources: Kynkäänniemi et al. 2019, arXiv 1904.06991; Naeem et al. 2020, arXiv 2002.09797.

    real: (N, d), generated: (M, d), more than `neighbours` (k) each. Distances are exact: a difference of squares would
    give two copies of one image a distance above 0. Raises ValueError for too few, other shapes, NaN and inf.
    """

    def __init__(self, real: Tensor, generated: Tensor, neighbours: int) -> None:
        if min(len(real), len(generated)) <= neighbours:
            raise ValueError(
                f"more than {neighbours} images a side are needed; got {len(real)} real and {len(generated)} generated"
            )
        check_features(real, generated)
        self.k = neighbours
        real, generated = real.double().cpu(), generated.double().cpu()
        self.between = self._distances(real, generated)
        self.of_real, self.of_generated = self._nearest(real), self._nearest(generated)

    @staticmethod
    def _distances(x: Tensor, y: Tensor) -> NDArray[np.float32]:
        # Rounding keeps the order of distances, and halves their memory.
        values: NDArray[np.float32] = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").float().numpy()
        return values

    def _nearest(self, x: Tensor) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Distances and rows of each image's nearest others: so many that a resample holds k of them."""
        distances = self._distances(x, x)
        np.fill_diagonal(distances, np.inf)
        found = torch.from_numpy(distances).topk(min(len(x) - 1, 8 * self.k + 32), largest=False)
        return found.values.numpy(), found.indices.numpy()

    def _radii(self, nearest: tuple[NDArray[np.float32], NDArray[np.int64]], counts: Array) -> NDArray[np.float32]:
        """(N,) distance to the k-th other image of a resample; -1 for an image that it does not hold."""
        distances, rows = nearest
        reached = counts[rows].cumsum(axis=1) >= self.k
        place = np.where(reached.any(axis=1), reached.argmax(axis=1), distances.shape[1] - 1)
        radii = np.take_along_axis(distances, place[:, None], axis=1)[:, 0]
        held: NDArray[np.float32] = np.where(counts > 0, radii, np.float32(-1))
        return held

    def values(self, real_counts: Array | None = None, generated_counts: Array | None = None) -> Array:
        """(4,), see MANIFOLD; of the sample itself, or of a resample. real_counts: (N,). generated_counts: (M,)."""
        w = np.ones(len(self.between)) if real_counts is None else real_counts
        v = np.ones(self.between.shape[1]) if generated_counts is None else generated_counts
        in_real = (self.between <= self._radii(self.of_real, w)[:, None]).astype(np.float32)
        in_generated = (self.between <= self._radii(self.of_generated, v)).astype(np.float32)
        w32, v32 = w.astype(np.float32), v.astype(np.float32)
        balls = (w32 @ in_real).astype(np.float64)
        return np.array(
            [
                np.average(balls > 0, weights=v),
                np.average(in_generated @ v32 > 0, weights=w),
                np.average(balls / self.k, weights=v),
                np.average(in_real @ v32 > 0, weights=w),
            ]
        )


def fidelity_resamples(
    real: Tensor, generated: Tensor, neighbours: int, real_counts: Array, generated_counts: Array
) -> dict[str, tuple[float, Array]]:
    """ "kid" and, with more than `neighbours` images a side, MANIFOLD -> value, and (S,) values of resamples.

    The mean excess of the resamples, which hold fewer different images, is taken off, as in `frechet_interval`. Their
    spread is that of new images or wider, up to 1.7 times for MANIFOLD at 80 images.
    """
    kid = float(kernel_distance(real, generated)[0])
    resampled = kernel_distance(real, generated, real_counts, generated_counts)
    # Resamples of whole patients hold more pairs of images of one patient, which are alike.
    found = {"kid": (kid, resampled + kid - resampled.mean())}
    if min(len(real), len(generated)) > neighbours:
        manifolds = Manifolds(real, generated, neighbours)
        exact = manifolds.values()
        table = np.stack([manifolds.values(w, v) for w, v in zip(real_counts, generated_counts, strict=True)])
        table = (table + exact - table.mean(axis=0)).clip(0.0, [1.0, 1.0, np.inf, 1.0])
        found |= {name: (float(exact[place]), table[:, place]) for place, name in enumerate(MANIFOLD)}
    return found
