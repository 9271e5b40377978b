"""Sample, extract, score: localization and quality of one model, as dictionaries of metrics.json.

Evaluation never imports training: it takes a base and, as a user would, a run folder (components.load_components).
Work is shared between the processes of `accelerate launch`; every process must call these functions.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from safetensors.torch import save_file
from tqdm.auto import tqdm

from distill.attention import aggregate, normalize, record_attention
from distill.components import Components, encode_text
from distill.config import EvaluationConfig
from distill.data.captions import BOS, EOS, PADDING, WORD, find_words, token_groups, token_spans
from distill.data.sample import ImageCaptionDataset, Sample
from distill.errors import UserError
from distill.metrics import (
    AttentionMass,
    Diversity,
    IoUAtThreshold,
    LocalizationMetric,
    PixelAUROC,
    PointingGame,
    SignedCNR,
    finding_auroc,
    frechet_distance,
    frechet_interval,
    macro_mean_interval,
)
from distill.metrics.features import Features

TOKEN_MAPS = ("word", "eos", "padding")


@dataclass(frozen=True)
class Query:
    """One text of one held-out image, and the findings whose maps are scored on it.

    image: index in the data set. groups: (tokens,) codes. tokens: for each pair, positions of the finding's words.
    """

    image: int
    text: str
    findings: tuple[int, ...]
    tokens: tuple[tuple[int, ...], ...]
    groups: torch.Tensor


def queries(dataset: ImageCaptionDataset, components: Components, config: EvaluationConfig) -> list[Query]:
    """The (image, finding) pairs of the first `localization_images` images that have any, the same for every model.

    `caption`: the image's caption; pairs whose caption names the finding by none of its words are left out.
    `phrase`: the region's phrase, or the finding's name; one text a pair.
    Empty if no image has a region. Raises UserError if there are regions and no text names any of their findings.
    """
    tokenizer, length = components.tokenizers[0], components.max_tokens
    names = list(dataset.findings)
    found: list[Query] = []
    images = regions = 0
    for index in range(len(dataset) if dataset.findings else 0):
        if images == config.localization_images:
            break
        texts: dict[str, list[tuple[int, tuple[int, ...]]]] = {}
        phrases = {region.finding: region.phrase for region in dataset[index].regions}
        regions += len(phrases)
        for finding in phrases:
            words = dataset.query_words[finding]
            text = dataset.caption(index)
            if config.localization_text == "phrase":
                text = phrases[finding] or finding
            tokens = tuple(token_spans(tokenizer, text, find_words(text, words), length))
            if not tokens and config.localization_text == "phrase":
                tokens = tuple((token_groups(tokenizer, text, length) == WORD).nonzero().flatten().tolist())
            if tokens:
                texts.setdefault(text, []).append((names.index(finding), tokens))
        for text, pairs in texts.items():
            groups = token_groups(tokenizer, text, length)
            found.append(Query(index, text, tuple(f for f, _ in pairs), tuple(t for _, t in pairs), groups))
        images += bool(texts)
    if regions and not found:
        raise UserError(
            "no held-out image has a region of a finding that its text names; check data.findings, data.query_words and "
            "evaluation.localization_text"
        )
    return found


def selection(query: Query, columns: int) -> torch.Tensor:
    """(tokens, columns) float32 that maps token probabilities to BOS, words, EOS, padding sums and word means of the pairs."""
    matrix = torch.zeros(len(query.groups), columns)
    for column, code in enumerate((BOS, WORD, EOS, PADDING)):
        matrix[query.groups == code, column] = 1.0
    for column, tokens in enumerate(query.tokens, start=4):
        matrix[list(tokens), column] = 1.0 / len(tokens)
    return matrix


def attention_maps(
    components: Components,
    samples: Sequence[Sample],
    batch: Sequence[Query],
    config: EvaluationConfig,
    maps: Any,
    device: torch.device,
) -> torch.Tensor:
    """(queries, 4 + pairs, height, width) attention on BOS, words, EOS, padding and each pair's words, at latent size.

    The real latents (posterior mean) are noised at each of config.timesteps with noise that depends on the image only;
    nothing is generated. Mean over heads, layers and timesteps. Source: protocol of Dombrowski et al. 2024 (paper's
    evaluation re-noises the real latent at every step, so that the steps are independent and can be batched).
    """
    columns = 4 + max(len(query.tokens) for query in batch)
    pixels = torch.stack([sample.pixel_values for sample in samples]).to(device, components.vae.dtype)
    latents = components.vae.encode(pixels).latent_dist.mean.float() * components.vae.config.scaling_factor
    ids = [x.to(device) for x in components.tokenize([query.text for query in batch])]
    embeds, pooled = encode_text(components.text_encoders, ids)
    chosen = torch.stack([selection(query, columns) for query in batch]).to(device)
    noise = torch.stack(
        [
            torch.randn((len(config.timesteps), *latents.shape[1:]), generator=torch.Generator().manual_seed(seed))
            for seed in (config.seed + query.image for query in batch)
        ]
    ).to(device)
    size = (latents.shape[-2], latents.shape[-1])
    total = torch.zeros((len(batch), columns, *size), device=device)
    maps.reduce = lambda probabilities: probabilities.mean(dim=1) @ chosen
    dtype = components.unet.dtype
    for place, timestep in enumerate(config.timesteps):
        steps = torch.full((len(batch),), timestep, device=device)
        noisy = components.noise_scheduler.add_noise(latents, noise[:, place], steps)
        added = None
        if components.is_sdxl and pooled is not None:
            ids_of_time = [(*s.original_size, *s.crop_top_left, *s.pixel_values.shape[-2:]) for s in samples]
            added = {"text_embeds": pooled.to(dtype), "time_ids": torch.tensor(ids_of_time, device=device, dtype=dtype)}
        maps.start()
        components.unet(noisy.to(dtype), steps, embeds.to(dtype), added_cond_kwargs=added)
        total += aggregate(maps.take(), maps.sizes, size)
    return total / len(config.timesteps)


def _batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))


@torch.no_grad()
def localization(
    components: Components,
    dataset: ImageCaptionDataset,
    config: EvaluationConfig,
    *,
    accelerator: Accelerator,
    arm_dir: Path,
    examples: Sequence[int] = (),
    label: str = "",
) -> dict[str, Any] | None:
    """The `localization` entry of metrics.json, None without regions; writes the examples' maps to maps.safetensors."""
    all_queries = queries(dataset, components, config)
    if not all_queries:
        return None
    device = accelerator.device
    scores: dict[str, dict[str, LocalizationMetric]] = {
        token: {
            "auc": PixelAUROC().to(device),
            "cnr": SignedCNR().to(device),
            "top1": PointingGame().to(device),
            "iou": IoUAtThreshold(config.iou_threshold).to(device),
        }
        for token in TOKEN_MAPS
    }
    mass = AttentionMass().to(device)
    mine = all_queries[accelerator.process_index :: accelerator.num_processes]
    kept: list[tuple[str, np.ndarray]] = []
    bar = tqdm(total=len(mine), desc=f"{label} maps", unit="image", disable=not accelerator.is_main_process)
    with record_attention(components.unet, config.layers) as maps:
        for batch in _batches(mine, config.batch_size):
            samples = [dataset[query.image] for query in batch]
            found = attention_maps(components, samples, batch, config, maps, device)
            mass.update(found[:, :4].mean(dim=(-2, -1)))
            for query, sample, row in zip(batch, samples, found, strict=True):
                regions = {region.finding: region for region in sample.regions}
                masks = torch.stack([regions[dataset.findings[f]].mask for f in query.findings])
                images = [query.image] * len(masks)
                word = row[4 : 4 + len(masks)]
                for token, part in zip(TOKEN_MAPS, (word, row[2:3], row[3:4]), strict=True):
                    scaled = F.interpolate(
                        normalize(part)[None], masks.shape[-2:], mode="bilinear", align_corners=False
                    )[0]
                    full = scaled.expand(len(masks), -1, -1)
                    for metric in scores[token].values():
                        metric.update(full, masks, query.findings, images)
                if query.image in examples:
                    for finding, image in zip(query.findings, normalize(word).cpu().numpy(), strict=True):
                        kept.append((f"{sample.id}/{dataset.findings[finding]}", image))
            bar.update(len(batch))
    bar.close()
    gathered = dict(gather_object(kept))
    if accelerator.is_main_process and gathered:
        arm_dir.mkdir(parents=True, exist_ok=True)
        tensors = {
            key: torch.from_numpy(np.ascontiguousarray(value, dtype=np.float32)) for key, value in gathered.items()
        }
        save_file(tensors, arm_dir / "maps.partial")
        os.replace(arm_dir / "maps.partial", arm_dir / "maps.safetensors")
    result: dict[str, Any] = {token: _summary(metrics, dataset.findings, config) for token, metrics in scores.items()}
    result["mass"] = {name: float(value) for name, value in mass.compute().items()}
    return result


def _summary(metrics: dict[str, LocalizationMetric], names: Sequence[str], config: EvaluationConfig) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, metric in metrics.items():
        values, findings, images = metric.values()
        result[key] = float(metric.compute()) if len(values) else None
        interval = macro_mean_interval(values, findings, images, config.bootstrap_samples, config.seed)
        result[f"{key}_ci"] = list(interval) if interval else None
    # Counts are those of the AUC; the CNR also leaves out maps whose contrast is infinite.
    values, _, images = metrics["auc"].values()
    per_metric = {key: metric.per_finding(names) for key, metric in metrics.items()}
    result["images"], result["pairs"] = len(set(images.tolist())), len(values)
    result["per_finding"] = {
        name: {key: found[name]["value"] for key, found in per_metric.items()} | {"pairs": entry["pairs"]}
        for name, entry in per_metric["auc"].items()
        if entry["pairs"]
    }
    return result


@dataclass(frozen=True)
class Generated:
    """Images of one model, on the CPU: (count, 3, height, width) float32 in [0, 1], by data set index, and what was scored."""

    indices: list[int]
    features: torch.Tensor | None
    scores: torch.Tensor | None


@torch.no_grad()
def generate(
    components: Components, captions: Sequence[str], seeds: Sequence[int], resolution: int, config: EvaluationConfig
) -> torch.Tensor:
    """(captions, 3, resolution, resolution) float32 in [0, 1], on the CPU. An image depends on its caption and seed only."""
    images = components.pipeline(
        prompt=list(captions),
        height=resolution,
        width=resolution,
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="pt",
    ).images
    return images.float().cpu().clamp(0, 1)


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
    components: Components,
    dataset: ImageCaptionDataset,
    config: EvaluationConfig,
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
        images = generate(components, captions, [job[1] for job in batch], resolution, config)
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
    return compare(generated, real, dataset, config, features) | {"diversity": diversity}


def compare(
    generated: Generated,
    real: Generated,
    dataset: ImageCaptionDataset,
    config: EvaluationConfig,
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
        columns = [i for i, name in enumerate(features.findings) if name in {f.lower() for f in dataset.findings}]
        labels = torch.tensor(
            [
                [features.findings[c] in {x.lower() for x in dataset.labels(i)} for c in columns]
                for i in generated.indices
            ]
        )
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


def held_out(
    dataset: ImageCaptionDataset,
    components: Components,
    config: EvaluationConfig,
    features: Features | None,
    *,
    accelerator: Accelerator,
    run_dir: Path,
) -> HeldOut:
    """Choose the example images, write them to real/, and score real images as if they were generated.

    The FID of the real row is between the real images that the arms are compared with and as many others, so that it
    shows what the distance is at this number of images when nothing is wrong.
    """
    located = list(dict.fromkeys(query.image for query in queries(dataset, components, config)))
    examples = (located or list(range(len(dataset))))[: config.examples]
    if accelerator.is_main_process:
        write_examples(dataset, examples, run_dir / "real")
    order = evaluation_order(dataset, examples, 2 * config.generated_images)
    first, others = order[: config.generated_images], order[config.generated_images :]
    real = real_images(dataset, first, features, accelerator, config.batch_size)
    result = compare(real, real, dataset, config, features) | {"fid": None, "fid_ci": None}
    if features is not None and len(others) == len(first):
        halves = compare(
            real_images(dataset, others, features, accelerator, config.batch_size), real, dataset, config, features
        )
        result |= {"fid": halves["fid"], "fid_ci": halves["fid_ci"]}
    return HeldOut(dataset, examples, features, real, result | {"diversity": None})


def evaluate(
    components: Components,
    against: HeldOut,
    config: EvaluationConfig,
    *,
    resolution: int,
    accelerator: Accelerator,
    arm_dir: Path,
    label: str,
) -> dict[str, Any]:
    """{"localization": ..., "quality": ..., "evaluation_seconds": ...} of one model."""
    began = time.perf_counter()
    components.to(accelerator.device).freeze()
    shared: dict[str, Any] = {
        "accelerator": accelerator,
        "arm_dir": arm_dir,
        "examples": against.examples,
        "label": label,
    }
    located = localization(components, against.dataset, config, **shared)
    drawn = quality(
        components,
        against.dataset,
        config,
        resolution=resolution,
        features=against.features,
        real=against.real,
        **shared,
    )
    return finite({"localization": located, "quality": drawn, "evaluation_seconds": time.perf_counter() - began})


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
