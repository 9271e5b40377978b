"""Are generated images of use? A small classifier of findings is trained on them and tested on real held-out images.

Beside it stand one that is trained on real images (those of the same captions, where a model drew the generated ones),
and one that is trained on both. All take the same number of steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from numpy.typing import NDArray
from scipy.stats import norm
from torch import Tensor, nn

from distill.data.sample import ImageCaptionDataset, group_key
from distill.errors import UserError
from distill.evaluation.claims import student_interval
from distill.files import JsonObject
from distill.metrics.bootstrap import image_counts, numbered
from distill.metrics.quality import weighted_auroc
from distill.processes import process_state

Array = NDArray[np.float64]

SIDE_PX, BATCH, LEARNING_RATE = 64, 32, 2e-3
TESTED_IMAGES = 2000
"""Real images, at most, that the classifiers are tested on."""
RESAMPLES = 200
FEWEST = 5
"""A finding is asked for where this many images have it, and as many do not, in training as in testing."""


@dataclass(frozen=True)
class Labelled:
    """images: (N, 1, SIDE_PX, SIDE_PX) gray. labels: (N, findings) bool, what the captions say."""

    images: Tensor
    labels: Tensor

    @classmethod
    def of(cls, images: Tensor, labels: Tensor) -> Labelled:
        """images: (N, 3, height, width) in [-1, 1], rounded to 8 bits as files of images are."""
        gray = (((images + 1) * 127.5).round() / 127.5 - 1).mean(dim=1, keepdim=True)
        return cls(F.interpolate(gray, (SIDE_PX, SIDE_PX), mode="bilinear", antialias=True), labels)

    def __len__(self) -> int:
        return len(self.images)

    def __add__(self, other: Labelled) -> Labelled:
        return Labelled(torch.cat([self.images, other.images]), torch.cat([self.labels, other.labels]))


def new_classifier(findings: int, seed: int) -> nn.Sequential:
    """Four convolutions, about 60,000 weights; seconds on a CPU."""
    channels = (1, 16, 32, 48, 64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for wide, wider in pairwise(channels):
            layers += [nn.Conv2d(wide, wider, 3, stride=2, padding=1), nn.GroupNorm(8, wider), nn.ReLU()]
        # The place of a finding tells what it is, so that the last 4 x 4 places are kept apart.
        return nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * 16, findings))


def train_classifier(data: Labelled, steps: int, seed: int) -> nn.Module:
    """On the CPU; the same data and seed give the same classifier."""
    model = new_classifier(data.labels.shape[1], seed).train()
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    generator, order = torch.Generator().manual_seed(seed), torch.empty(0, dtype=torch.long)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # dropout
        for _ in range(steps):
            while len(order) < BATCH:
                order = torch.cat([order, torch.randperm(len(data), generator=generator)])
            rows, order = order[:BATCH], order[BATCH:]
            loss = F.binary_cross_entropy_with_logits(model(data.images[rows]), data.labels[rows].float())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def mean_auc(model: nn.Module, data: Labelled, counts: Array | None = None) -> Array:
    """Mean over the findings that some images have and some do not: of all images, and of each resample of them.

    counts: (S, N), how often a resample holds each image. Returns (1 + S,).
    """
    weights = np.concatenate([np.ones((1, len(data))), np.empty((0, len(data))) if counts is None else counts])
    scores, labels = model(data.images).double().numpy(), data.labels.numpy()
    mixed = [k for k in range(labels.shape[1]) if 0 < labels[:, k].sum() < len(labels)]
    areas = [weighted_auroc(scores[:, k], labels[:, k], weights) for k in mixed]
    found: Array = np.nanmean(areas, axis=0) if areas else np.full(len(weights), np.nan)
    return found


def interval(values: Sequence[float], resampled: Array, least: float) -> list[float] | None:
    """95 % interval of the mean of `values`, one a training seed: Student's t over them, and the spread of `resampled`, (S,),
    that mean on resamples of the images that are tested, added in squares. Both ends lie in [least, 1]."""
    ends = student_interval(values)
    if ends is None:
        return None
    half = float(np.hypot((ends[1] - ends[0]) / 2, norm.ppf(0.975) * np.nanstd(resampled)))
    mean = float(np.mean(values))
    return [max(least, mean - half), min(1.0, mean + half)]


def utility(
    real: Labelled,
    generated: Labelled,
    held_out: Labelled,
    *,
    steps: int,
    seeds: Sequence[int],
    patients: NDArray[np.int64] | None = None,
) -> JsonObject:
    """AUC on `held_out` of a classifier trained on "real", "generated" and "both", and the differences
    "generated_minus_real" and "both_minus_real"; each with NAME_ci and NAME_per_seed.

    All processes call this, and share the classifiers. Intervals are over training seeds and tested images, see
    `interval`; differences are paired by both. patients: of the tested images, see `bootstrap.numbered`; None: each is of
    another.
    """
    groups = np.arange(len(held_out)) if patients is None else patients
    counts = np.concatenate([*image_counts(groups, RESAMPLES, 0)])
    arms = {"real": real, "generated": generated, "both": real + generated}
    state, jobs = process_state(), [(name, seed) for name in arms for seed in seeds]
    mine = [
        (job, mean_auc(train_classifier(arms[job[0]], steps, job[1]), held_out, counts))
        for job in jobs[state.process_index :: state.num_processes]
    ]
    made = dict(gather_object(mine))
    areas = {name: np.stack([made[name, seed] for seed in seeds]) for name in arms}
    for name in ("generated", "both"):
        areas[f"{name}_minus_real"] = areas[name] - areas["real"]
    found: JsonObject = {"images": len(generated), "real_images": len(real), "held_out_images": len(held_out)}
    for name, each in areas.items():
        values, least = each[:, 0].tolist(), -1.0 if name.endswith("minus_real") else 0.0
        ends = interval(values, each[:, 1:].mean(axis=0), least)
        found |= {name: float(np.mean(values)), f"{name}_ci": ends, f"{name}_per_seed": values}
    return found


@dataclass(frozen=True)
class Task:
    """real: rows of the data set whose images one classifier is trained on. tested: rows of other patients, or
    images."""

    dataset: ImageCaptionDataset
    real: Sequence[int]
    tested: Sequence[int]
    findings: Sequence[str]

    @classmethod
    def of(cls, dataset: ImageCaptionDataset, real: Sequence[int]) -> Task:
        """Raises UserError where too few images are left to be tested on."""
        taken = {group_key(dataset, row) for row in real}
        tested = [row for row in range(len(dataset)) if group_key(dataset, row) not in taken][:TESTED_IMAGES]
        sides = [[{name.lower() for name in dataset.labels(row)} for row in rows] for rows in (real, tested)]
        names = sorted(set().union(*(labels for side in sides for labels in side)))
        findings = [name for name in names if all(_is_mixed(name, side) for side in sides)]
        if not findings:
            raise UserError(
                f"evaluation.parts has utility: classifiers are trained on {len(real):,} images "
                f"(evaluation.generated_images) and tested on the {len(tested):,} other held-out ones, and no finding "
                f"is in {FEWEST} of both and absent from "
                f"{FEWEST} of both. Give more held-out images, another evaluation.generated_images, or leave utility "
                "out"
            )
        return cls(dataset, real, tested, findings)

    def named_in(self, labels: Sequence[Sequence[str]]) -> Task:
        """The task with the findings alone that the labels of some images, made by another tool, state and leave out.

        Raises UserError where they name none: a classifier of such images would learn nothing, and look useless.
        """
        said = [{name.lower() for name in own} for own in labels]
        findings = [name for name in self.findings if _is_mixed(name, said)]
        if not findings:
            raise UserError(
                f"evaluation.parts has utility, and of the findings of the held-out images ({', '.join(self.findings)}) "
                f"none is in the labels of {FEWEST} of the {len(said):,} images and absent from {FEWEST}. Name them alike "
                "in the column labels of the images' metadata, or leave utility out"
            )
        return replace(self, findings=findings)

    def measure(
        self,
        count: int,
        image: Callable[[int], Tensor],
        labels: Callable[[int], Sequence[str]],
        *,
        steps: int,
        seeds: int,
    ) -> JsonObject:
        """The entry `utility` of `count` generated images. image: number -> (3, height, width) in [-1, 1]. All processes
        call this."""

        def own(row: int) -> Tensor:
            return self.dataset[row].pixel_values

        generated = self._labelled(range(count), image, labels)
        real, tested = (self._labelled(rows, own, self.dataset.labels) for rows in (self.real, self.tested))
        patients = numbered([group_key(self.dataset, row) for row in self.tested])
        found = utility(real, generated, tested, steps=steps, seeds=range(seeds), patients=patients)
        return found | {"findings": list(self.findings)}

    def _labelled(
        self, rows: Sequence[int], image: Callable[[int], Tensor], labels: Callable[[int], Sequence[str]]
    ) -> Labelled:
        """Of all rows; each process reads its share of them."""
        state, own = process_state(), list[tuple[int, Labelled]]()
        for start in range(0, len(rows), BATCH)[state.process_index :: state.num_processes]:
            batch = rows[start : start + BATCH]
            said = [{name.lower() for name in labels(row)} for row in batch]
            known = torch.tensor([[finding in names for finding in self.findings] for names in said])
            own.append((start, Labelled.of(torch.stack([image(row) for row in batch]), known)))
        parts = [part for _, part in sorted(gather_object(own), key=lambda pair: pair[0])]
        return Labelled(torch.cat([part.images for part in parts]), torch.cat([part.labels for part in parts]))


def _is_mixed(name: str, labels: Sequence[set[str]]) -> bool:
    stated = sum(name in own for own in labels)
    return FEWEST <= stated <= len(labels) - FEWEST
