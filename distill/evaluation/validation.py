"""Looks at validation images while a model trains: diffusion loss, localization, and findings of drawn images.

Noise, timesteps, images and captions are the same at every look, so that looks differ by the weights alone.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from distill.config import FullEvaluation
from distill.data.sample import ImageCaptionDataset
from distill.evaluation.drawing import quality
from distill.evaluation.fidelity import Generated
from distill.evaluation.localization import localization
from distill.evaluation.protocols import Query, RealLatents, prepare_inputs
from distill.files import JsonObject, write_atomic
from distill.metrics.features import Features
from distill.models.family import Model

IMAGES = 100
"""Validation images of a look, for the loss and for localization."""
DRAWN = 32
"""Images drawn of the first validation captions for the finding AUC."""
TIMESTEPS = 5
"""Timesteps of the loss, in the middle of as many equal parts of the schedule."""
LOG = "validation_log.jsonl"

SCORES: dict[str, Callable[[JsonObject], float | None]] = {
    "loss": lambda row: -row["validation_loss"],
    "image_adds": lambda row: row.get("word", {}).get("image_adds"),
    "word_auc": lambda row: row.get("word", {}).get("auc"),
    "finding_auc": lambda row: row["finding_auc"],
}
"""Rule of `keep` -> how good the weights of a look are, from its row of validation_log.jsonl. Higher is better."""


@dataclass
class Looks:
    """Looks of one training. localized: how maps are made. drawn: how images are drawn. folder: of files of one
    look."""

    dataset: ImageCaptionDataset
    localized: FullEvaluation
    drawn: FullEvaluation
    resolution: int
    features: Features | None
    accelerator: Accelerator
    folder: Path
    latents: RealLatents = field(default_factory=RealLatents)

    @torch.no_grad()
    def look(self, model: Model, step: int) -> JsonObject:
        """A row of validation_log.jsonl, the same on every process.

        "validation_loss"; "finding_auc", None without a classifier; and where validation images have regions "images",
        "pairs", AUC, CNR, top-1 and image_adds of "word", "eos" and "padding", and "mass".
        """
        row: JsonObject = {"step": step}
        found = self._localized(model, f"step {step}")
        if found is not None:
            row |= {"images": found["word"]["images"], "pairs": found["word"]["pairs"]}
            keys = ("auc", "cnr", "top1", "image_adds")
            row |= {token: {key: found[token][key] for key in keys} for token in ("word", "eos", "padding")}
            row["mass"] = found["mass"]
        row["validation_loss"] = validation_loss(model, self.dataset, self.localized, self.accelerator, self.latents)
        row["finding_auc"] = self._finding_auc(model, f"step {step}")
        rows = [row]
        broadcast_object_list(rows)
        return rows[0]

    def _localized(self, model: Model, label: str) -> JsonObject | None:
        config = self.localized.model_copy(update={"localization_images": IMAGES, "bootstrap_samples": 1})
        with _emptied(self.folder, self.accelerator) as folder:
            return localization(
                model, self.dataset, config, accelerator=self.accelerator, arm_dir=folder, label=label,
                weights=label, latents=self.latents,
            )  # fmt: skip

    def _finding_auc(self, model: Model, label: str) -> float | None:
        if self.features is None or not self.features.findings:
            return None
        few = {"generated_images": DRAWN, "diversity_captions": 0, "bootstrap_samples": 1}
        with _emptied(self.folder, self.accelerator) as folder:
            found = quality(
                model, self.dataset, self.drawn.model_copy(update=few), resolution=self.resolution, features=self.features,
                real=Generated([], None, None), accelerator=self.accelerator, arm_dir=folder, label=label,
                weights=label,
            )  # fmt: skip
        area: float | None = found["finding_auc"]
        return area


def read_looks(log: Path) -> dict[int, JsonObject]:
    """Step -> row of validation_log.jsonl. Lines that a power loss tore are left out."""
    found: dict[int, JsonObject] = {}
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else ():
        with suppress(ValueError, TypeError, KeyError):
            row = json.loads(line)
            found[int(row["step"])] = row
    return found


def write_look(log: Path, row: JsonObject) -> None:
    """Add a row, in the place of those of later steps: they are of a training that was killed and goes on from
    before."""
    rows = [before for step, before in read_looks(log).items() if step < row["step"]] + [row]
    write_atomic(log, "".join(json.dumps(one) + "\n" for one in rows))


@contextmanager
def _emptied(folder: Path, accelerator: Accelerator) -> Iterator[Path]:
    """A folder of all processes, for files of one measurement."""
    if accelerator.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
    accelerator.wait_for_everyone()
    yield folder
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)


@torch.no_grad()
def validation_loss(
    model: Model,
    dataset: ImageCaptionDataset,
    config: FullEvaluation,
    accelerator: Accelerator,
    latents: RealLatents | None = None,
) -> float:
    """Mean of (target - prediction)^2 over the first IMAGES images at TIMESTEPS timesteps, with captions.

    The noise of image i has seed config.seed + i. Equal, to rounding, for any batch size and number of processes.
    """
    family, device = model.family, accelerator.device
    steps = family.num_timesteps(model)
    timesteps = [(2 * k + 1) * steps // (2 * TIMESTEPS) for k in range(TIMESTEPS)]
    mine = range(min(IMAGES, len(dataset)))[accelerator.process_index :: accelerator.num_processes]
    found: list[tuple[int, float]] = []
    for start in range(0, len(mine), config.batch_size):
        images = mine[start : start + config.batch_size]
        asked = [_whole_caption(model, dataset.caption(i), i) for i in images]
        inputs = prepare_inputs(model, [dataset[i] for i in images], asked, device, latents)
        noise, losses = inputs.noise(TIMESTEPS, config.seed), torch.zeros(len(images), device=device)
        for place, timestep in enumerate(timesteps):
            now = inputs.steps(timestep)
            noisy = family.add_noise(model, inputs.latents, noise[:, place], now)
            target = family.target(model, inputs.latents, noise[:, place], now)
            predicted = family.predict(model.denoiser, noisy, now, inputs.conditions)
            losses += (target.float() - predicted.float()).square().flatten(1).mean(dim=1)
        found += zip(images, (losses / TIMESTEPS).tolist(), strict=True)
    everyones: list[tuple[int, float]] = sorted(gather_object(found))
    return sum(loss for _, loss in everyones) / len(everyones)


def _whole_caption(model: Model, caption: str, image: int) -> Query:
    return Query(image, caption, (), (), model.token_groups(caption))
