"""Are generated images copies of training images? Distances to the nearest training and held-out image, and their
tests.

Every function takes distances or vectors of images (features, latents, or pixels), and knows no model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.stats import hypergeom, norm, rankdata
from torch import Tensor

from distill.metrics.bootstrap import bootstrap_interval, image_counts, percentile_interval
from distill.metrics.quality import weighted_auroc

Array = NDArray[np.float64]
THUMBNAIL_PX = 32
"""Side of the gray image that is compared pixel by pixel."""
_CANDIDATES = 8
_BLUR = 1e-5
"""Of the sum of both squared lengths: more than the error of a squared distance by a matrix product in float32."""
CROWD, NEAR = 50, 1 / 3
"""A near copy is at less than NEAR of the mean distance to its CROWD nearest training images."""


@dataclass(frozen=True)
class Nearest:
    """distance: (N,) Euclidean distance of each image to its nearest other image. row: (N,) which one that is."""

    distance: Array
    row: NDArray[np.int64]


def nearest(images: Tensor, others: Iterable[Tensor], leave_out: NDArray[np.int64] | None = None) -> Nearest:
    """The nearest of `others` for each image; of equally near ones the first.

    images: (N, d). others: blocks (B, d) of any size, one at a time in memory. leave_out: (N,) the row of `others` that
    an image is not compared with, -1 for none. Each block is searched by one matrix product in float32. Where it may
    have a nearer one, its 8 best rows are measured anew in float64, so that a copy has distance 0. Where all of `others`
    are left out, the distance is infinite. All values are finite.
    """
    exact = images.double()
    origin = exact.mean(dim=0)
    centred = (exact - origin).float()
    length = centred.square().sum(dim=1)
    best, rows, start = np.full(len(images), np.inf), np.full(len(images), -1), 0
    out = np.full(len(images), -1) if leave_out is None else leave_out
    for block in others:
        shifted = (block.double() - origin).float()
        rough, near = torch.cdist(centred, shifted, compute_mode="use_mm_for_euclid_dist").topk(
            min(_CANDIDATES, len(block)), largest=False
        )
        blurred = _BLUR * (length + shifted.square().sum(dim=1).max())
        maybe = np.flatnonzero((rough[:, 0].square() - blurred).double().numpy() <= best**2)
        near = near[maybe].sort(dim=1).values
        found = np.full(near.shape, np.inf)
        for k in range(near.shape[1]):
            found[:, k] = (exact[maybe] - block[near[:, k]].double()).norm(dim=1).numpy()
        found[near.numpy() + start == out[maybe, None]] = np.inf
        place = found.argmin(axis=1)
        distance = found[np.arange(len(maybe)), place]
        nearer = distance < best[maybe]
        best[maybe[nearer]] = distance[nearer]
        rows[maybe[nearer]] = start + near.numpy()[np.arange(len(maybe)), place][nearer]
        start += len(block)
    return Nearest(best, rows)


def nearer(one: Nearest, other: Nearest) -> Nearest:
    """For each image the nearer of two neighbours; of equally near ones that of `one`."""
    first = one.distance <= other.distance
    return Nearest(*(np.where(first, a, b) for a, b in ((one.distance, other.distance), (one.row, other.row))))


def closeness_in_crowd(images: Tensor, others: Iterable[Tensor], near: Nearest) -> Array:
    """(N,) distance to the nearest of `others`, over the mean distance to the 50 nearest of them: 0 for a copy.

    near: what `nearest` found. Source: Carlini et al. 2023, arXiv 2301.13188, section 5. The quotient does not fall
    because an image is smooth, for then all distances do. It is NaN where all distances are 0.
    """
    origin = images.float().mean(dim=0)
    centred, best = images.float() - origin, torch.empty(len(images), 0)
    for block in others:
        rough = torch.cdist(centred, block.float() - origin, compute_mode="use_mm_for_euclid_dist")
        best = torch.cat([best, rough], dim=1)
        best = best.topk(min(CROWD, best.shape[1]), largest=False).values
    crowd: Array = best.double().mean(dim=1).numpy()
    with np.errstate(invalid="ignore"):
        return near.distance / crowd


class NearCopies(TypedDict):
    """near: generated images that are near copies of a training image. near_held_out: how many of the `near_tested`
    held-out real images pass the same test. near_p: one-sided p of Fisher's exact test that generated images pass it
    more often."""

    near: int
    near_held_out: int
    near_tested: int
    near_p: float


def near_copies(generated: Array, held_out: Array) -> NearCopies:
    """generated, held_out: (N,) and (M,) of `closeness_in_crowd`, the smallest over the spaces that count.

    It counts near copies one by one, so that it finds a few among many images, and many of one image. `copies` cannot.
    """
    ours, theirs = int((generated < NEAR).sum()), int((held_out < NEAR).sum())
    p = hypergeom.sf(ours - 1, len(generated) + len(held_out), ours + theirs, len(generated))
    return {"near": ours, "near_held_out": theirs, "near_tested": len(held_out), "near_p": float(p)}


def thumbnails(images: Tensor) -> Tensor:
    """(N, 3, height, width) -> (N, 32 * 32): gray, of mean 0 and standard deviation 1, so that brightness does not
    count."""
    gray = F.interpolate(images.float().mean(1, True), size=(THUMBNAIL_PX,) * 2, mode="area").flatten(1)
    gray = gray - gray.mean(dim=1, keepdim=True)
    return gray / gray.std(dim=1, keepdim=True).clamp_min(1e-6)


class Closeness(TypedDict):
    """auc: probability that a generated image is nearer to training than a held-out image is; .5: no difference. p is
    one-sided."""

    auc: float
    auc_ci: tuple[float, float] | None
    z: float
    p: float


def closeness(
    generated: Array,
    held_out: Array,
    samples: int = 1000,
    seed: int = 0,
    *,
    groups: NDArray[np.int64] | None = None,
) -> Closeness:
    """The data-copying test of Meehan, Chaudhuri, Dasgupta 2020, arXiv 2004.05675, with one cell: a Mann-Whitney test.

    generated: (n,), held_out: (m,) distances to the nearest training image. The sign of z is turned: above 0 means that
    generated images are nearer. The interval draws generated images, and held-out images or whole groups of them:
    groups, (m,), see `bootstrap.numbered`. p assumes independent images.
    A small distance is not yet a copy: an image that is smoother than real ones is near to everything. `copies` does
    not have this fault.
    """
    n, m = len(generated), len(held_out)
    distances = np.concatenate([held_out, generated])
    is_held_out = np.arange(m + n) < m
    area = float(weighted_auroc(distances, is_held_out, np.ones((1, m + n)))[0])
    ties = np.unique(rankdata(distances), return_counts=True)[1].astype(np.float64)
    spread = np.sqrt(((m + n + 1) - (ties**3 - ties).sum() / ((m + n) * max(m + n - 1, 1))) / (12 * m * n))
    z = (area - 0.5) / spread if spread > 0 else 0.0
    counts = np.zeros((samples, m + n))
    sides = (np.arange(m) if groups is None else groups, m), (np.arange(n), n)
    for columns, (drawn, size) in zip((slice(0, m), slice(m, None)), sides, strict=True):
        start = 0
        for block in image_counts(drawn, samples, seed + size):
            counts[start : start + len(block), columns] = block
            start += len(block)
    resampled = weighted_auroc(distances, is_held_out, counts)
    return {"auc": area, "auc_ci": percentile_interval(resampled, 0.95), "z": float(z), "p": float(norm.sf(z))}


class Copies(TypedDict):
    """share: of generated images, those nearer to a training than to any held-out image. chance: what is expected if
    nothing is copied. copies: (share - chance) / (1 - chance), at least 0: the share of copies, if all other images are
    as by chance. neighbours: different images that are the nearest of some generated image. p: see `copies`. least_p:
    the p of as many generated images that are copies of different training images; where it is not small, nothing can
    be found."""

    share: float
    chance: float
    copies: float
    copies_ci: tuple[float, float] | None
    neighbours: int
    p: float
    least_p: float


def copies(
    training: Nearest,
    held_out: Nearest,
    training_count: int,
    held_out_count: int,
    samples: int = 1000,
    seed: int = 0,
    *,
    patients: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None,
) -> Copies:
    """How many generated images are copies of training images, and whether that is more than chance.

    training, held_out: the nearest of `training_count` and of `held_out_count` images, for the same generated images.
    patients: of each training and of each held-out image, see `bootstrap.numbered`; None: each image is of another.

    Assumed: images came into the training or the held-out split by chance, and the model saw the training split only.
    Then a model that does not copy would have drawn the same images had the splits been others, and the nearest image
    of all is a training image with probability N / (N + M). All images are used, for a subset of the training images as
    large as the held-out set would hide most of what was copied.
    Several generated images may share a nearest image, and are then one observation: the test counts *different*
    nearest images (exact, hypergeometric, one-sided), and the interval draws them with all generated images that they
    are nearest to. Images of one patient are alike, and are one observation too. Where patients of one split have more
    images than those of the other, chance lies between the shares of training patients and of training images; the
    larger one is taken, so that fewer copies are found rather than more. So this test does not find many copies of
    one image; `near_copies` does.
    An image that is equally near to both counts one half in `share`, and as held-out in the test.
    """
    is_training = training.distance < held_out.distance
    counted = is_training + 0.5 * (training.distance == held_out.distance)
    people = [training_count, held_out_count] if patients is None else [int(side.max()) + 1 for side in patients]
    rows = [side.row if patients is None else patients[k][side.row] for k, side in enumerate((training, held_out))]
    neighbour = np.where(is_training, rows[0], people[0] + rows[1])
    everyone, of_images = sum(people), training_count / (training_count + held_out_count)
    chance, different = max(of_images, people[0] / everyone), np.unique(neighbour)
    of_training, of_chance = int((different < people[0]).sum()), math.ceil(chance * everyone - 1e-9)
    most = min(len(counted), people[0])
    seen = ((of_training, min(len(different), everyone)), (most, most))
    p, least_p = (hypergeom.sf(k - 1, everyone, of_chance, n) for k, n in seen)
    interval = bootstrap_interval(counted, neighbour, lambda rows: float(rows.mean()), samples, seed)

    def above_chance(share: float) -> float:
        return max(0.0, (share - chance) / (1 - chance))

    share = float(counted.mean())
    return {
        "share": share,
        "chance": chance,
        "copies": above_chance(share),
        "copies_ci": (above_chance(interval[0]), above_chance(interval[1])) if interval else None,
        "neighbours": len(different),
        "p": float(p),
        "least_p": float(least_p),
    }


class Verdict(Copies):
    """The result of the space with the smallest p; both p are times the number of spaces (Bonferroni), at most 1."""

    space: str


def verdict(spaces: Mapping[str, Copies]) -> Verdict:
    """spaces: where distances were measured, such as "latents" -> what `copies` found there."""
    space = min(spaces, key=lambda name: spaces[name]["p"])
    found = spaces[space]
    p, least_p = (min(1.0, value * len(spaces)) for value in (found["p"], found["least_p"]))
    return {**found, "p": p, "least_p": least_p, "space": space}


def suspicion(training: Nearest, held_out: Nearest) -> Array:
    """(N,) d(nearest training image) / d(nearest held-out image): 0 for a copy, and 1 where both are equally near.

    The lower, the more suspicious. With many more training than held-out images most ratios are below 1.
    """
    equal = training.distance == held_out.distance
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(equal, 1.0, training.distance / held_out.distance)
