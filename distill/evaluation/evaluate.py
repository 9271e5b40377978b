"""Localization and quality of one model, as dictionaries of metrics.json.

Evaluation never imports training: it takes a base and, as a user would, a run folder (models.load_model).
Work is shared between the processes of `accelerate launch`; every process must call these functions.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers import LCMScheduler
from PIL import Image
from tqdm.auto import tqdm

from distill.config import FullEvaluation
from distill.data.sample import ImageCaptionDataset
from distill.evaluation.localization import localization
from distill.evaluation.protocols import queries
from distill.evaluation.word_maps import write_word_maps
from distill.files import write_tensors
from distill.metrics import Diversity, finding_auroc, frechet_distance, frechet_interval
from distill.metrics.features import Features
from distill.models.bits import megabytes, quantize
from distill.models.blocks import model_size
from distill.models.family import Model


def _batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))


@dataclass(frozen=True)
class Generated:
    """Images of one model, on the CPU: (count, 3, height, width) float32 in [0, 1], by data set index, and what was scored."""

    indices: list[int]
    features: torch.Tensor | None
    scores: torch.Tensor | None


def sampler(model: Model, config: FullEvaluation) -> Any:
    """A scheduler as images are drawn with."""
    own = model.pipeline.scheduler
    return LCMScheduler.from_config(own.config) if config.scheduler == "lcm" else type(own).from_config(own.config)


@torch.no_grad()
def generate(
    model: Model, captions: Sequence[str], seeds: Sequence[int], resolution: int, config: FullEvaluation
) -> torch.Tensor:
    """(captions, 3, resolution, resolution) float32 in [0, 1], on the CPU. An image depends on its caption and seed only."""
    pipeline, own = model.pipeline, model.pipeline.scheduler
    pipeline.scheduler = sampler(model, config)
    try:
        images = pipeline(
            prompt=list(captions),
            height=resolution,
            width=resolution,
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="pt",
        ).images
    finally:
        pipeline.scheduler = own
    returned: torch.Tensor = images.float().cpu().clamp(0, 1)
    return returned


def _extract(features: Features | None, images: torch.Tensor, device: torch.device) -> tuple[Any, Any]:
    if features is None:
        return [None] * len(images), [None] * len(images)
    values, scores = features.to(device)(images.to(device) * 2 - 1)
    return values.cpu().numpy(), scores.cpu().numpy() if scores is not None else [None] * len(images)


def _stack(rows: list[Any]) -> torch.Tensor | None:
    return torch.from_numpy(np.stack(rows)) if rows and rows[0] is not None else None


def evaluation_order(dataset: ImageCaptionDataset, examples: Sequence[int], count: int) -> list[int]:
    """Indices of held-out captions to generate: the examples first, then the others in order."""
    return [*examples, *(i for i in range(len(dataset)) if i not in set(examples))][:count]


@torch.no_grad()
def quality(
    model: Model,
    dataset: ImageCaptionDataset,
    config: FullEvaluation,
    *,
    resolution: int,
    features: Features | None,
    real: Generated,
    accelerator: Accelerator,
    arm_dir: Path,
    examples: Sequence[int] = (),
    label: str = "",
) -> dict[str, Any]:
    """The `quality` entry of metrics.json; writes the images of the examples' captions to samples/.

    FID against `real`, the real images of the same captions. Image of caption i has seed config.seed + i, so that it is
    the same for any batch size and number of processes.
    """
    order = evaluation_order(dataset, examples, config.generated_images)
    # (caption, seed, place among the examples or -1, kind)
    jobs = [(i, config.seed + i, k if k < len(examples) else -1, "fid") for k, i in enumerate(order)]
    if config.diversity_samples >= 2:
        jobs += [
            (i, config.seed + i + 1_000_003 * (s + 1), -1, "diversity")
            for i in order[: config.diversity_captions]
            for s in range(config.diversity_samples)
        ]
    mine = jobs[accelerator.process_index :: accelerator.num_processes]
    samples_dir = arm_dir / "samples"
    samples_dir.mkdir(parents=True, exist_ok=True)
    rows: list[tuple[int, Any, Any]] = []
    varied: list[tuple[int, np.ndarray]] = []
    bar = tqdm(total=len(mine), desc=f"{label} images", unit="image", disable=not accelerator.is_main_process)
    for batch in _batches(mine, config.batch_size):
        captions = [dataset.caption(job[0]) for job in batch]
        images = generate(model, captions, [job[1] for job in batch], resolution, config)
        values, scores = _extract(features, images, accelerator.device)
        for (index, _, place, kind), image, value, score in zip(batch, images, values, scores, strict=True):
            if kind == "fid":
                rows.append((index, value, score))
            else:
                varied.append((index, image.numpy()))
            if place >= 0:
                save_png(image, samples_dir / f"{place:04d}.png")
        bar.update(len(batch))
    bar.close()
    rows = sorted(gather_object(rows), key=lambda row: row[0])
    varied = gather_object(varied)
    diversity = None
    if varied:
        metric = Diversity(sync_on_compute=False)
        for index in dict.fromkeys(i for i, _ in varied):
            metric.update(torch.from_numpy(np.stack([image for i, image in varied if i == index]))[None])
        diversity = float(metric.compute())
    indices = [row[0] for row in rows]
    generated = Generated(indices, _stack([row[1] for row in rows]), _stack([row[2] for row in rows]))
    if accelerator.is_main_process:
        save_features(generated, dataset, features, arm_dir / "features.safetensors")
    return compare(generated, real, dataset, config, features) | {"diversity": diversity}


def finding_labels(
    dataset: ImageCaptionDataset, indices: Sequence[int], features: Features
) -> tuple[list[int], torch.Tensor]:
    """Columns of the classifier's scores that are findings of the data, and (images, columns) bool: what captions say."""
    columns = [i for i, name in enumerate(features.findings) if name in {f.lower() for f in dataset.findings}]
    labels = [[features.findings[c] in {x.lower() for x in dataset.labels(i)} for c in columns] for i in indices]
    return columns, torch.tensor(labels)


def save_features(images: Generated, dataset: ImageCaptionDataset, features: Features | None, path: Path) -> None:
    """What FID and finding AUC are of: indices (N,), features (N, d), and where there are some scores and labels (N, findings).

    Writes nothing without features.
    """
    if features is None or images.features is None:
        return
    tensors = {"indices": torch.tensor(images.indices), "features": images.features}
    if images.scores is not None:
        columns, labels = finding_labels(dataset, images.indices, features)
        if columns:
            tensors |= {"scores": images.scores[:, columns].contiguous(), "labels": labels}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, tensors)


def compare(
    generated: Generated,
    real: Generated,
    dataset: ImageCaptionDataset,
    config: FullEvaluation,
    features: Features | None,
) -> dict[str, Any]:
    """FID of two sets of features, and the finding AUC of the first against the labels of its captions; null where none."""
    result: dict[str, Any] = {"fid": None, "fid_ci": None, "finding_auc": None, "finding_auc_ci": None}
    ours, theirs = generated.features, real.features
    if features is not None and ours is not None and theirs is not None and min(len(ours), len(theirs)) >= 2:
        result["fid"] = frechet_distance(theirs, ours)
        interval = frechet_interval(theirs, ours, min(config.bootstrap_samples, 200), config.seed)
        result["fid_ci"] = list(interval) if interval else None
    if features is not None and generated.scores is not None:
        columns, labels = finding_labels(dataset, generated.indices, features)
        if columns:
            area = finding_auroc(generated.scores[:, columns], labels, config.bootstrap_samples, config.seed)
            result["finding_auc"] = area["auc"]
            result["finding_auc_ci"] = list(area["auc_ci"]) if area["auc_ci"] else None
    return result | {"images": len(generated.indices), "features": features.name if features else None}


@torch.no_grad()
def real_images(
    dataset: ImageCaptionDataset,
    indices: Sequence[int],
    features: Features | None,
    accelerator: Accelerator,
    batch_size: int,
) -> Generated:
    """Features and scores of real held-out images."""
    mine = list(indices)[accelerator.process_index :: accelerator.num_processes]
    rows: list[tuple[int, Any, Any]] = []
    for batch in _batches(mine, batch_size):
        if features is None:
            rows += [(i, None, None) for i in batch]
            continue
        pixels = torch.stack([dataset[i].pixel_values for i in batch])
        values, scores = _extract(features, (pixels + 1) / 2, accelerator.device)
        rows += list(zip(batch, values, scores, strict=True))
    rows = sorted(gather_object(rows), key=lambda row: row[0])
    return Generated([r[0] for r in rows], _stack([r[1] for r in rows]), _stack([r[2] for r in rows]))


@dataclass(frozen=True)
class HeldOut:
    """What all arms of a run are compared on."""

    dataset: ImageCaptionDataset
    examples: list[int]
    features: Features | None
    real: Generated
    quality: dict[str, Any]
    training: ImageCaptionDataset | None = None
    priors_dir: Path | None = None


def held_out(
    dataset: ImageCaptionDataset,
    model: Model,
    config: FullEvaluation,
    features: Features | None,
    *,
    accelerator: Accelerator,
    run_dir: Path,
    training: ImageCaptionDataset | None = None,
) -> HeldOut:
    """Choose the example images, write them to real/, and score real images as if they were generated.

    The FID of the real row is between the real images that the arms are compared with and as many others, so that it
    shows what the distance is at this number of images when nothing is wrong. training: for the prior `mean_mask`.
    """
    located = list(dict.fromkeys(query.image for query in queries(dataset, model, config, accelerator)))
    examples = (located or list(range(len(dataset))))[: config.examples]
    if accelerator.is_main_process:
        write_examples(dataset, examples, run_dir / "real")
    order = evaluation_order(dataset, examples, 2 * config.generated_images)
    first, others = order[: config.generated_images], order[config.generated_images :]
    real = real_images(dataset, first, features, accelerator, config.batch_size)
    if accelerator.is_main_process:
        save_features(real, dataset, features, run_dir / "real" / "features.safetensors")
    result = compare(real, real, dataset, config, features) | {"fid": None, "fid_ci": None}
    if features is not None and len(others) == len(first):
        halves = compare(
            real_images(dataset, others, features, accelerator, config.batch_size), real, dataset, config, features
        )
        result |= {"fid": halves["fid"], "fid_ci": halves["fid_ci"]}
    return HeldOut(dataset, examples, features, real, result | {"diversity": None}, training, run_dir / "real")


def evaluate(
    model: Model,
    against: HeldOut,
    config: FullEvaluation,
    *,
    resolution: int,
    accelerator: Accelerator,
    arm_dir: Path,
    label: str,
) -> dict[str, Any]:
    """{"localization", "quality", "size", "seconds": {"localization_seconds", "evaluation_seconds"}} of one model."""
    began = time.perf_counter()
    model.to(accelerator.device).freeze()
    if config.quantization != "none":
        quantize(model, config.quantization)
    stored = megabytes(model)
    shared: dict[str, Any] = {
        "accelerator": accelerator,
        "arm_dir": arm_dir,
        "examples": against.examples,
        "label": label,
    }
    of_data: dict[str, Any] = {"training": against.training, "priors_dir": against.priors_dir}
    located = localization(model, against.dataset, config, **shared, **of_data)
    localization_seconds = time.perf_counter() - began
    own = {"examples": against.examples, "accelerator": accelerator, "arm_dir": arm_dir}
    write_word_maps(model, against.dataset, config, **own)
    drawn = quality(
        model,
        against.dataset,
        config,
        resolution=resolution,
        features=against.features,
        real=against.real,
        **shared,
    )
    seconds = {
        "localization_seconds": localization_seconds,
        "evaluation_seconds": time.perf_counter() - began,
    }
    scheduler = sampler(model, config)
    scheduler.set_timesteps(config.num_inference_steps)
    passes = len(scheduler.timesteps) * (2 if config.guidance_scale > 1 else 1)
    size = model_size(model, resolution) | {"denoiser_passes_an_image": passes, "megabytes": stored}
    returned: dict[str, Any] = finite({"localization": located, "quality": drawn, "size": size, "seconds": seconds})
    return returned


def finite(value: Any) -> Any:
    """The same nested value with null for what is not a finite number: JSON has no NaN."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_examples(dataset: ImageCaptionDataset, examples: Sequence[int], folder: Path) -> None:
    """real/examples.jsonl and the images it names."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for place, index in enumerate(examples):
        sample = dataset[index]
        save_png((sample.pixel_values + 1) / 2, folder / f"{place:04d}.png")
        regions = [{"finding": r.finding, "boxes": [list(box) for box in r.boxes]} for r in sample.regions]
        row = {"id": sample.id, "image": f"real/{place:04d}.png", "caption": sample.caption, "regions": regions}
        lines.append(json.dumps(row) + "\n")
    (folder / "examples.jsonl").write_text("".join(lines), encoding="utf-8")


def save_png(image: torch.Tensor, path: Path) -> None:
    """image: (3, height, width) in [0, 1]."""
    array = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    Image.fromarray(array).save(path)
