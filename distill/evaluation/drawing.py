"""Images that a model draws of held-out captions, and their quality against the real images of the same captions.

Work is shared between the processes of `accelerate launch`; every process must call these functions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from diffusers import LCMScheduler
from tqdm.auto import tqdm

from distill.config import FullEvaluation
from distill.data.sample import ImageCaptionDataset, group_key
from distill.devices import channels_last
from distill.evaluation.fidelity import Generated, compare, finding_labels
from distill.evaluation.images import save_png
from distill.evaluation.kept import Batches, Kept, digest, features_key, packed, unpacked, weights_of
from distill.files import JsonObject, write_tensors
from distill.metrics import Diversity
from distill.metrics.features import Features
from distill.models.bits import check_finite
from distill.models.family import Model
from distill.models.prompts import embeddings_of


def _batches(items: Sequence[object], size: int) -> Iterator[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def sampler(model: Model, config: FullEvaluation) -> Any:
    """A scheduler as images are drawn with."""
    own = model.pipeline.scheduler
    return LCMScheduler.from_config(own.config) if config.scheduler == "lcm" else type(own).from_config(own.config)


@torch.no_grad()
def generate(
    model: Model, captions: Sequence[str], seeds: Sequence[int], resolution: int, config: FullEvaluation
) -> torch.Tensor:
    """(captions, 3, resolution, resolution) float32 in [0, 1], on the CPU. An image depends on its caption and seed
    only."""
    pipeline, own = model.pipeline, model.pipeline.scheduler
    # With one chunk as users draw: by the prompt.
    text = {"prompt": list(captions)} if model.caption_chunks == 1 else embeddings_of(model, captions)
    pipeline.scheduler = sampler(model, config)
    try:
        images = pipeline(
            **text,
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
    check_finite(returned, config.dtype, "the images")
    return returned


def _extract(features: Features | None, images: torch.Tensor, device: torch.device) -> tuple[Any, Any]:
    if features is None:
        return [None] * len(images), [None] * len(images)
    values, scores = features.to(device)(images.to(device) * 2 - 1)
    return values.cpu().numpy(), scores.cpu().numpy() if scores is not None else [None] * len(images)


def _stack(rows: list[Any]) -> torch.Tensor | None:
    return torch.from_numpy(np.stack(rows)) if rows and rows[0] is not None else None


def evaluation_order(dataset: ImageCaptionDataset, examples: Sequence[int], count: int) -> list[int]:
    """Indices of held-out captions to generate, at most one of each image: the examples first, then the first caption of
    each other image. A real image that is there twice would be its own neighbour, and its set look less varied."""
    return distinct_images(dataset, (*examples, *range(len(dataset))))[:count]


def distinct_images(dataset: ImageCaptionDataset, rows: Iterable[int]) -> list[int]:
    """The first of `rows` of each image, in their order."""
    first: dict[str, int] = {}
    for row in rows:
        first.setdefault(dataset.fingerprint(row), row)
    return list(first.values())


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
    weights: str | None = None,
    keep_images: bool = False,
    is_measured: bool = True,
) -> JsonObject:
    """The `quality` entry of metrics.json; writes the images of the examples' captions to samples/.

    FID against `real`, the real images of the same captions. Image of caption i has seed config.seed + i, so that it is
    the same for any batch size and number of processes. What an earlier call in `arm_dir` drew is used again where all
    that decides it is the same. weights: see kept.weights_of, before the weights were quantized. keep_images: write all
    of them to drawn/, see `drawn_images`. is_measured: write features.safetensors; else its images are for other parts
    alone, and the file is of a quality that was measured before.
    """
    order = evaluation_order(dataset, examples, config.generated_images)
    jobs = _jobs(order, config)
    hashes = [digest(index, seed, dataset.caption(index)) for index, seed in jobs]
    key = images_key(config, weights or weights_of(model), resolution, features)
    kept = Kept(arm_dir, "drawn", key, accelerator.process_index)
    batches = Batches(hashes, config.batch_size, rank=accelerator.process_index, world=accelerator.num_processes)
    several = range(len(order), len(jobs))
    diversity_of = digest([hashes[place] for place in several], batches.names_with(several))
    usable = _usable(kept, hashes[: len(order)], len(examples), arm_dir, keep_images)
    if diversity_of in kept.entries:
        usable |= {place: {"full": True} for place in several}
    accelerator.wait_for_everyone()  # all have read the files that are written from here on
    made: dict[int, JsonObject] = {}
    varied: list[tuple[int, np.ndarray]] = []
    missing = batches.missing(usable)
    count = sum(map(len, missing))
    bar = tqdm(total=count, desc=f"{label} images", unit="image", disable=not (count and accelerator.is_main_process))
    for places in missing:
        captions = [dataset.caption(jobs[place][0]) for place in places]
        images = generate(model, captions, [jobs[place][1] for place in places], resolution, config)
        values, scores = _extract(features, images, accelerator.device)
        for place, image, value, score in zip(places, images, values, scores, strict=True):
            if place in several:
                varied.append((jobs[place][0], image.numpy()))
                continue
            files = _files(arm_dir, place, hashes[place], len(examples), keep_images)
            for file in files:
                save_png(image, file)
            shown = place if place < len(examples) else -1
            row = {"made_of": hashes[place], "place": shown, "values": packed(value), "scores": packed(score)}
            row |= {"png": _sha256(files[0])} if files else {}
            made[place] = row | batches.mark(places, end=len(order))
        kept.add(*(made[place] for place in places if place in made))
        bar.update(len(places))
    bar.close()
    everyone = usable | dict(gather_object(list(made.items())))
    generated = _generated(dataset, {index: everyone[place] for place, index in enumerate(order)})
    everyones = gather_object(varied)
    diversity = _diversity(kept, diversity_of, everyones) if several and accelerator.is_main_process else None
    kept.close()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        kept.merge()
    if accelerator.is_main_process and is_measured:
        (arm_dir / "features.safetensors").unlink(missing_ok=True)  # of earlier images, and now there may be none
        save_features(generated, dataset, features, arm_dir / "features.safetensors")
    found: list[JsonObject] = [{}]
    if accelerator.is_main_process:
        found = [compare(generated, real, dataset, config, features) | {"diversity": diversity}]
    broadcast_object_list(found)
    return found[0]


def _generated(dataset: ImageCaptionDataset, rows: dict[int, JsonObject]) -> Generated:
    """rows: index of the caption -> what was kept of its image."""
    order = sorted(rows)
    values, scores = (_stack([unpacked(rows[i][key]) for i in order]) for key in ("values", "scores"))
    groups = [group_key(dataset, i) for i in order]
    return Generated(order, values, scores, [dataset.labels(i) for i in order], groups)


def _jobs(order: Sequence[int], config: FullEvaluation) -> list[tuple[int, int]]:
    """(caption, seed) of each image: one of every caption, then several of the first captions for the diversity."""
    several = [
        (i, config.seed + i + 1_000_003 * (s + 1))
        for i in order[: config.diversity_captions]
        for s in range(config.diversity_samples)
    ]
    return [*((i, config.seed + i) for i in order), *several]


def _usable(
    kept: Kept, hashes: Sequence[str], examples: int, arm_dir: Path, keep_images: bool
) -> dict[int, JsonObject]:
    """Place -> what was drawn before. Of an example the very image must be there too, at its place; keep_images: of
    all."""
    usable = {place: kept.entries[name] for place, name in enumerate(hashes) if name in kept.entries}
    for place, row in list(usable.items()):
        files = _files(arm_dir, place, hashes[place], examples, keep_images)
        if (place < examples and row["place"] != place) or any(_sha256(file) != row.get("png") for file in files):
            del usable[place]
    return usable


def _sha256(path: Path) -> str:
    """Of a file's bytes; empty where there is no file."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def _drawn(arm_dir: Path, made_of: str) -> Path:
    return arm_dir / "drawn" / f"{made_of}.png"


def _files(arm_dir: Path, place: int, made_of: str, examples: int, keep_images: bool) -> list[Path]:
    """Where the image of a caption is written; nowhere if it is no example and keep_images is false."""
    files = [arm_dir / "samples" / f"{place:04d}.png"] if place < examples else []
    return [*files, *([_drawn(arm_dir, made_of)] if keep_images else [])]


def drawn_images(
    dataset: ImageCaptionDataset, examples: Sequence[int], config: FullEvaluation, arm_dir: Path
) -> tuple[list[Path], list[int]]:
    """Files of the images that `quality` drew with keep_images, and the row of `dataset` whose caption each is of."""
    order = evaluation_order(dataset, examples, config.generated_images)
    return [_drawn(arm_dir, digest(i, config.seed + i, dataset.caption(i))) for i in order], order


def _diversity(kept: Kept, made_of: str, varied: Sequence[tuple[int, np.ndarray]]) -> float:
    """Of (caption, image) of all processes, or as it was kept. On the main process."""
    if made_of in kept.entries:
        return float(kept.entries[made_of]["diversity"])
    metric = Diversity(sync_on_compute=False)
    for index in dict.fromkeys(i for i, _ in varied):
        metric.update(torch.from_numpy(np.stack([image for i, image in varied if i == index]))[None])
    found = float(metric.compute())
    kept.add({"made_of": made_of, "diversity": found})
    return found


OF_IMAGES = ("num_inference_steps", "guidance_scale", "scheduler", "quantization", "dtype")
"""Options of evaluation that change a generated image."""


def images_key(config: FullEvaluation, weights: str, resolution: int, features: Features | None) -> str:
    """Hash of what decides a generated image and its features besides caption and seed."""
    settings = config.model_dump(mode="json", include=set(OF_IMAGES))
    return digest(settings, weights, resolution, features_key(features))


def save_features(images: Generated, dataset: ImageCaptionDataset, features: Features | None, path: Path) -> None:
    """What FID and finding AUC are of: indices (N,), features (N, d), and where there are some scores and labels (N,
    findings); groups (N,), where images share one.

    Writes nothing without features.
    """
    if features is None or images.features is None:
        return
    tensors = {"indices": torch.tensor(images.indices), "features": images.features}
    if images.scores is not None:
        columns, labels = finding_labels(dataset, images.indices, features)
        if columns:
            tensors |= {"scores": images.scores[:, columns].contiguous(), "labels": labels}
    groups = images.numbered()
    if len(set(groups.tolist())) < len(groups):
        tensors["groups"] = torch.from_numpy(groups)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, tensors)


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
    with channels_last([] if features is None else [features], accelerator.device):
        for batch in _batches(mine, batch_size):
            if features is None:
                rows += [(i, None, None) for i in batch]
                continue
            pixels = torch.stack([dataset[i].pixel_values for i in batch])
            values, scores = _extract(features, (pixels + 1) / 2, accelerator.device)
            rows += list(zip(batch, values, scores, strict=True))
    rows = sorted(gather_object(rows), key=lambda row: row[0])
    labels = [dataset.labels(row[0]) for row in rows]
    groups = [group_key(dataset, row[0]) for row in rows]
    return Generated([r[0] for r in rows], _stack([r[1] for r in rows]), _stack([r[2] for r in rows]), labels, groups)
