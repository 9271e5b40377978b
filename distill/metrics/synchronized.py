"""The metrics of generated images as torchmetrics classes, for a loop of your own.

Each keeps the rows of its updates, and `compute` gathers those of all processes; a process may have none. Values are
those of the functions of this package that `evaluate.py` calls, without their intervals.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from distill.metrics.fidelity import MANIFOLD, Manifolds, kernel_distance
from distill.metrics.gathering import GatheredMetric
from distill.metrics.image_text import similarity
from distill.metrics.memorization import Nearest, closeness, copies, near_copies
from distill.metrics.quality import finding_auroc, frechet_distance


class RowMetric(GatheredMetric):
    """Tables of as many columns, kept flat, so that a process without rows can join the gathering."""

    tables: ClassVar[dict[str, torch.dtype]]
    columns: Tensor

    def __init__(self, **kwargs: object) -> None:
        super().__init__(self.tables, **kwargs)
        self.add_state("columns", torch.zeros((), dtype=torch.int64), dist_reduce_fx="max")

    def keep(self, **tables: Tensor) -> None:
        """tables: (N, columns). Raises ValueError for other shapes than the first update's, and for numbers in place of
        bool."""
        for name, rows in tables.items():
            if self.tables[name] == torch.bool and rows.dtype != torch.bool:
                raise ValueError(f"{name} must be bool; got {rows.dtype}")
            columns = int(self.columns) or (rows.shape[-1] if rows.ndim == 2 else 0)
            if rows.ndim != 2 or rows.shape[1] != columns:
                raise ValueError(f"{name} must be (N, {columns or 'columns'}); got {tuple(rows.shape)}")
            self.columns.fill_(columns)
            getattr(self, name).append(rows.detach().to(self.device, self.tables[name]).flatten())

    def table(self, name: str) -> Tensor:
        """(N, columns), on the CPU; of all processes within `compute`."""
        rows: Tensor = dim_zero_cat(getattr(self, name))
        return rows.cpu().view(len(rows) // int(self.columns), int(self.columns))


class FeatureMetric(RowMetric):
    """Of features of real and of generated images."""

    tables: ClassVar[dict[str, torch.dtype]] = {"real": torch.float64, "generated": torch.float64}

    def update(self, features: Tensor, *, real: bool) -> None:
        """features: (N, d) of a batch of images, of any extractor."""
        self.keep(**{"real" if real else "generated": features})


class FrechetDistance(FeatureMetric):
    """FID, or the same on other features than Inception's: see `frechet_distance`. At least 0."""

    higher_is_better = False

    def compute(self) -> Tensor:
        return torch.tensor(frechet_distance(self.table("real"), self.table("generated")), dtype=torch.float64)


class KernelDistance(FeatureMetric):
    """KID, unbiased, of all images at once: see `kernel_distance`. May be below 0."""

    higher_is_better = False

    def compute(self) -> Tensor:
        return torch.tensor(kernel_distance(self.table("real"), self.table("generated"))[0], dtype=torch.float64)


class PrecisionRecallDensityCoverage(FeatureMetric):
    """{"precision", "recall", "density", "coverage"}: see `Manifolds`. neighbours: k of its balls."""

    higher_is_better = True

    def __init__(self, neighbours: int = 5, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.neighbours = neighbours

    def compute(self) -> dict[str, Tensor]:
        values = Manifolds(self.table("real"), self.table("generated"), self.neighbours).values()
        return dict(zip(MANIFOLD, torch.from_numpy(values), strict=True))


class FindingAUC(RowMetric):
    """Mean over findings of the AUC of a classifier's scores: see `finding_auroc`. NaN where no finding has both
    classes."""

    higher_is_better = True
    tables: ClassVar[dict[str, torch.dtype]] = {"scores": torch.float64, "labels": torch.bool}

    def update(self, scores: Tensor, labels: Tensor) -> None:
        """scores: (N, findings) of generated images. labels: (N, findings) bool, what their captions say."""
        self.keep(scores=scores, labels=labels)

    def compute(self) -> Tensor:
        area = finding_auroc(self.table("scores"), self.table("labels"), samples=0)["auc"]
        return torch.tensor(float("nan") if area is None else area, dtype=torch.float64)


class ImageTextSimilarity(RowMetric):
    """{"own", "adds"}: see `similarity`. "adds" is NaN where all captions are one."""

    higher_is_better = True
    tables: ClassVar[dict[str, torch.dtype]] = {"images": torch.float64, "texts": torch.float64}

    def update(self, images: Tensor, texts: Tensor) -> None:
        """images, texts: (N, d), of length 1; equal rows of texts are one caption."""
        self.keep(images=images, texts=texts)

    def compute(self) -> dict[str, Tensor]:
        texts = self.table("texts")
        captions = [str(row) for row in torch.unique(texts, dim=0, return_inverse=True)[1].tolist()]
        found = similarity(self.table("images"), texts, captions, samples=0)
        adds = float("nan") if found["adds"] is None else found["adds"]
        return {"own": torch.tensor(found["own"], dtype=torch.float64), "adds": torch.tensor(adds, dtype=torch.float64)}


class CopiedShare(RowMetric):
    """{"share", "chance", "copies", "p"}: are generated images copies of training images? See `copies`.

    training, held_out: how many real images of each there are, each of another patient.
    """

    higher_is_better = False
    tables: ClassVar[dict[str, torch.dtype]] = {
        name: dtype
        for side in ("training", "held_out")
        for name, dtype in ((f"{side}_distance", torch.float64), (f"{side}_row", torch.int64))
    }

    def __init__(self, training: int, held_out: int, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.counts = training, held_out

    def update(self, training: Nearest, held_out: Nearest) -> None:
        """The nearest training and held-out image of each generated image, see `nearest`."""
        sides = {"training": training, "held_out": held_out}
        distances = {f"{name}_distance": torch.as_tensor(side.distance)[:, None] for name, side in sides.items()}
        self.keep(**distances, **{f"{name}_row": torch.as_tensor(side.row)[:, None] for name, side in sides.items()})

    def compute(self) -> dict[str, Tensor]:
        near = [
            Nearest(self.table(f"{side}_distance")[:, 0].numpy(), self.table(f"{side}_row")[:, 0].numpy())
            for side in ("training", "held_out")
        ]
        found = copies(near[0], near[1], *self.counts, samples=0)
        values = {name: found[name] for name in ("share", "chance", "copies", "p")}
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}


class NearCopyCount(RowMetric):
    """{"near", "near_held_out", "near_tested", "near_p"}: see `near_copies`."""

    higher_is_better = False
    tables: ClassVar[dict[str, torch.dtype]] = {"generated": torch.float64, "held_out": torch.float64}

    def update(self, closeness: Tensor, *, generated: bool) -> None:
        """closeness: (N,) of generated, or of held-out images, see `closeness_in_crowd`."""
        self.keep(**{"generated" if generated else "held_out": closeness[:, None]})

    def compute(self) -> dict[str, Tensor]:
        found = near_copies(*(self.table(name)[:, 0].numpy() for name in ("generated", "held_out")))
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in found.items()}


class NearerThanHeldOut(RowMetric):
    """Chance that a generated image is nearer to training than a held-out image is: see `closeness`."""

    higher_is_better = False
    tables: ClassVar[dict[str, torch.dtype]] = {"generated": torch.float64, "held_out": torch.float64}

    def update(self, distances: Tensor, *, generated: bool) -> None:
        """distances: (N,) of generated, or of held-out images to their nearest training image."""
        self.keep(**{"generated" if generated else "held_out": distances[:, None]})

    def compute(self) -> Tensor:
        generated, held_out = (self.table(name)[:, 0].numpy() for name in ("generated", "held_out"))
        return torch.tensor(closeness(generated, held_out, samples=0)["auc"], dtype=torch.float64)
