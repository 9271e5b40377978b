"""A denoiser that was trained to memorize 16 images is found; one that saw many is not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from torch import Tensor, nn
from torchmetrics.functional.classification import binary_auroc

from distill.data.phantom.dataset import PhantomDataset
from distill.metrics.memorization import Nearest, closeness, closeness_in_crowd, copies, near_copies, nearest, suspicion

SIDE = 16


def pictures(split: str, count: int) -> Tensor:
    """(count, 16 * 16): phantoms in few pixels, of mean 0 and standard deviation 1 over all."""
    dataset = PhantomDataset(split, count, 0, 64)  # type: ignore[arg-type]
    gray = torch.stack([dataset[k].pixel_values.mean(0, keepdim=True) for k in range(count)])
    return (F.interpolate(gray, size=(SIDE, SIDE), mode="area").flatten(1) + 0.4) / 0.4


class Denoiser(nn.Module):
    """Predicts the clean image from a noisy one and its timestep."""

    def __init__(self, width: int = 512) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(SIDE * SIDE + 32, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, SIDE * SIDE),
        )  # fmt: skip

    def forward(self, noisy: Tensor, timesteps: Tensor) -> Tensor:
        angles = timesteps[:, None] / 1000 * torch.arange(1, 17) * torch.pi / 2
        found: Tensor = self.layers(torch.cat([noisy, angles.sin(), angles.cos()], dim=1))
        return found


def drawn(training: Tensor, *, steps: int, count: int, seed: int) -> Tensor:
    """Images of a denoiser that was trained on `training`."""
    torch.manual_seed(seed)
    model, scheduler = Denoiser(), DDIMScheduler(prediction_type="sample", clip_sample=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        images = training[torch.randint(len(training), (128,))]
        noise, timesteps = torch.randn_like(images), torch.randint(1000, (128,))
        loss = F.mse_loss(model(scheduler.add_noise(images, noise, timesteps), timesteps), images)  # type: ignore[arg-type]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    scheduler.set_timesteps(50)
    images = torch.randn(count, SIDE * SIDE)
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            clean = model(images, timestep.expand(count))
            images = scheduler.step(clean, timestep, images).prev_sample  # type: ignore[union-attr, arg-type]
    return images


def crowded(images: Tensor, training: Tensor) -> np.ndarray:
    return closeness_in_crowd(images, [training], nearest(images, [training]))


def neighbours(images: Tensor, training: Tensor, held_out: Tensor) -> tuple[Nearest, Nearest]:
    return nearest(images, training.split(500)), nearest(images, held_out.split(500))


@pytest.mark.slow
def test_a_model_that_memorized_is_found_and_one_that_did_not_is_not() -> None:
    """The score of an image tells those of the one model from those of the other with an AUC of at least .95.

    About 75 s on one core. The images of the model that saw many are smoother than real ones, and so nearer to training
    images than real ones are: `closeness` alone has p below .001 for each seed, and does not show a copy.
    """
    many, held_out = pictures("train", 1000), pictures("test", 200)
    few = many[:16]
    copied = drawn(few, steps=3000, count=64, seed=0)
    sides = neighbours(copied, few, held_out)
    found = copies(*sides, len(few), len(held_out))
    assert found["p"] < 1e-6 and found["copies_ci"] is not None and found["copies_ci"][0] > 0.5
    near = near_copies(crowded(copied, few), crowded(held_out, few))
    assert near["near"] > 32 and near["near_held_out"] == 0
    real = nearest(held_out, many.split(500)).distance
    for seed in range(3):
        fair = drawn(many, steps=1500, count=64, seed=seed)
        apart = neighbours(fair, many, held_out)
        assert copies(*apart, len(many), len(held_out))["p"] > 0.05
        assert closeness(apart[0].distance, real)["p"] < 0.001
        assert near_copies(crowded(fair, many), crowded(held_out, many))["near"] == 0
        scores = np.concatenate([-suspicion(*neighbours(images, few, held_out)) for images in (copied, fair)])
        ranks = torch.from_numpy(scores).argsort().argsort() / len(scores)
        assert binary_auroc(ranks, torch.tensor([1] * 64 + [0] * 64)) >= 0.95
