"""Are generated images of use? A small classifier of findings is trained on them and tested on real held-out images.

Beside it stand one that is trained on as many real images of the same captions, and one that is trained on both. All
take the same number of steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.evaluation.claims import student_interval
from distill.files import JsonObject
from distill.metrics import finding_auroc

SIDE_PX, BATCH, LEARNING_RATE = 64, 32, 2e-3


@dataclass(frozen=True)
class Labelled:
    """images: (N, 1, SIDE_PX, SIDE_PX) gray. labels: (N, findings) bool, what the captions say."""

    images: Tensor
    labels: Tensor

    @classmethod
    def of(cls, images: Tensor, labels: Tensor) -> Labelled:
        """images: (N, 3, height, width) in [-1, 1]."""
        gray = images.mean(dim=1, keepdim=True)
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
def mean_auc(model: nn.Module, data: Labelled) -> float:
    """Mean over the findings that some images have and some do not."""
    found = finding_auroc(model(data.images), data.labels, 1, 0)["auc"]
    return float("nan") if found is None else float(found)


def utility(real: Labelled, generated: Labelled, held_out: Labelled, *, steps: int, seeds: Sequence[int]) -> JsonObject:
    """{"real", "generated", "both", "generated_minus_real", "both_minus_real"}, each {"auc", "auc_ci", "per_seed"}.

    Intervals are Student's t over training seeds, differences are paired by seed; the held-out images are the same.
    """
    arms = {"real": real, "generated": generated, "both": real + generated}
    scores = {
        name: [mean_auc(train_classifier(data, steps, seed), held_out) for seed in seeds] for name, data in arms.items()
    }
    for name in ("generated", "both"):
        pairs = zip(scores[name], scores["real"], strict=True)
        scores[f"{name}_minus_real"] = [ours - theirs for ours, theirs in pairs]
    counts = {name: len(data) for name, data in arms.items()}
    return {name: _summary(values) for name, values in scores.items()} | {"images": counts, "held_out": len(held_out)}


def _summary(values: Sequence[float]) -> Mapping[str, object]:
    ends = student_interval(values)
    return {"auc": float(np.mean(values)), "auc_ci": list(ends) if ends else None, "per_seed": list(values)}
