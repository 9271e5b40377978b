"""AUC of two maps that never look at the image: what a model's map has to beat.

`centre` is minus the distance to the image's centre. `mean_mask` is the finding's mean mask over training images.
They depend on the data alone, so that a run computes them once for all its models.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from distill.config import FullEvaluation
from distill.data.sample import ImageCaptionDataset, group_key, image_key, region_fingerprint, region_list
from distill.errors import UserError
from distill.evaluation.image_adds import mean_over
from distill.evaluation.protocols import PROTOCOLS, Query, ground_truth, ground_truths
from distill.evaluation.within_prior import STRATA, areas_within, prior_at, strata_of
from distill.files import JsonObject, read_json, write_json, write_tensors
from distill.metrics import macro_mean_interval

PRIOR_TRAINING_IMAGES = 600
"""Training images of each finding whose masks are averaged."""
FILE = "priors.json"
MEANS_FILE = "mean_masks.safetensors"


@dataclass(frozen=True)
class MeanMasks:
    """masks: finding -> (side, side) float32, without findings that no training image has a region of. images: all of
    them."""

    masks: Mapping[str, torch.Tensor] = field(default_factory=dict)
    images: int = 0


@torch.no_grad()
def priors(
    held_out: ImageCaptionDataset,
    training: ImageCaptionDataset | None,
    asked: Sequence[Query],
    config: FullEvaluation,
    *,
    accelerator: Accelerator,
    folder: Path | None = None,
) -> JsonObject:
    """{"centre": {"auc", "auc_ci", "within_prior", "within_prior_ci"}, "mean_mask": {the same, "training_images"}};
    "mean_mask" and "within_prior" are None without training regions.

    The pairs, masks, metric and average are those of the protocol's "auc"; smoothing and thresholds of the model's maps
    are not applied. folder: the result is kept in its priors.json, by a hash of what decides it. All processes must
    call this, and share the work.
    """
    key = priors_key(held_out, training, asked, config)
    path = None if folder is None else folder / FILE
    known: list[Any] = [None]
    if accelerator.is_main_process and path is not None and path.exists():
        known = [_read(path).get(key)]
    broadcast_object_list(known)
    if known[0] is not None:
        return dict(known[0])
    means = MeanMasks() if training is None else mean_masks(training, held_out, asked, config, accelerator, folder)
    values, findings, clusters = _scores(held_out, asked, means.masks, config, accelerator)
    entries = [_entry(values[:, place], findings, clusters, config) for place in range(2)]
    result: JsonObject = {"centre": entries[0], "mean_mask": None}
    if means.images:
        result["mean_mask"] = entries[1] | {"training_images": means.images}
    if accelerator.is_main_process and path is not None:
        write_json(path, _read(path) | {key: result})
    return result


def _read(path: Path) -> JsonObject:
    """What the file keeps; nothing where it is missing or damaged, because it can be made anew."""
    try:
        found = read_json(path)
    except UserError:
        return {}
    return found if isinstance(found, dict) else {}


def priors_key(
    held_out: ImageCaptionDataset,
    training: ImageCaptionDataset | None,
    asked: Sequence[Query],
    config: FullEvaluation,
) -> str:
    """Hash of the pairs, the settings, and the training images, of which 64 stand for all, with the boxes and masks of
    those that the mean masks are made of."""
    count = 0 if training is None else len(training)
    parts: list[Any] = [
        config.protocol,
        config.ground_truth,
        config.bootstrap_samples,
        config.seed,
        PRIOR_TRAINING_IMAGES,
        STRATA,
        count,
    ]
    parts += [list(held_out.findings)]
    parts += [f"{held_out.fingerprint(q.image)}{group_key(held_out, q.image)}{q.truth}{q.findings}" for q in asked]
    if training is not None:
        parts += [training.fingerprint(i) for i in range(0, count, max(1, count // 64))]
        parts += [training.labels(i) for i in range(count)]
        if hasattr(training, "region_fingerprint"):  # else regions follow from the image's own fingerprint
            rows = training_rows(training, held_out, _names(held_out, asked))
            parts += [region_fingerprint(training, i) for i in sorted(set().union(*rows.values()))]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _names(held_out: ImageCaptionDataset, asked: Sequence[Query]) -> list[str]:
    return sorted({held_out.findings[f] for query in asked for f in query.findings})


def centre_map(side: int) -> torch.Tensor:
    """(side, side) float32: minus the distance of each pixel's centre to the image's centre, in pixels."""
    offset = torch.arange(side, dtype=torch.float32) + 0.5 - side / 2
    return -torch.hypot(offset[:, None], offset[None, :])


def training_rows(
    training: ImageCaptionDataset, held_out: ImageCaptionDataset, findings: Sequence[str]
) -> dict[str, list[int]]:
    """finding -> rows of up to PRIOR_TRAINING_IMAGES different training images labelled with it, in a fixed random
    order.

    An image whose fingerprint is that of a held-out image is left out. No image is decoded.
    """
    forbidden = {held_out.fingerprint(i) for i in range(len(held_out))}
    chosen: dict[str, dict[str, int]] = {finding: {} for finding in findings}
    for index in np.random.default_rng(0).permutation(len(training)).tolist():
        labels = [finding for finding in training.labels(index) if finding in chosen]
        wanted = [finding for finding in labels if len(chosen[finding]) < PRIOR_TRAINING_IMAGES]
        if wanted and training.fingerprint(index) not in forbidden:
            for finding in wanted:
                chosen[finding].setdefault(image_key(training, index), index)
        if all(len(rows) >= PRIOR_TRAINING_IMAGES for rows in chosen.values()):
            break
    return {finding: list(rows.values()) for finding, rows in chosen.items()}


def mean_masks(
    training: ImageCaptionDataset,
    held_out: ImageCaptionDataset,
    asked: Sequence[Query],
    config: FullEvaluation,
    accelerator: Accelerator,
    folder: Path | None = None,
) -> MeanMasks:
    """The mean of each finding's training masks. folder: kept in its mean_masks.safetensors, by the key of `priors`.

    All processes must call this, and share the work.
    """
    key = priors_key(held_out, training, asked, config)
    known: list[MeanMasks | None] = [None]
    if accelerator.is_main_process and folder is not None:
        known = [_read_means(folder / MEANS_FILE, key)]
    broadcast_object_list(known)
    if known[0] is not None:
        return known[0]
    found = _mean_masks(training, held_out, asked, config, accelerator)
    if accelerator.is_main_process and folder is not None and found.images:
        folder.mkdir(parents=True, exist_ok=True)
        about = json.dumps({"key": key, "images": found.images})
        write_tensors(folder / MEANS_FILE, dict(found.masks), {"about": about})
    return found


def _read_means(path: Path, key: str) -> MeanMasks | None:
    """What the file keeps; None where it is missing, damaged or of other data."""
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})["about"])
            if about["key"] != key:
                return None
            masks = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return MeanMasks(masks, int(about["images"]))
    except (OSError, SafetensorError, KeyError, ValueError, TypeError):
        return None


def _mean_masks(
    training: ImageCaptionDataset,
    held_out: ImageCaptionDataset,
    asked: Sequence[Query],
    config: FullEvaluation,
    accelerator: Accelerator,
) -> MeanMasks:
    kind = PROTOCOLS[config.protocol].ground_truth if config.ground_truth == "auto" else config.ground_truth
    names = _names(held_out, asked)
    chosen = {finding: set(rows) for finding, rows in training_rows(training, held_out, names).items()}
    indices = sorted(set().union(*chosen.values()))
    sums: dict[str, tuple[NDArray[np.float64], int]] = {}
    used = []
    for index in indices[accelerator.process_index :: accelerator.num_processes]:
        regions = [r for r in region_list(training, index) if index in chosen.get(r.finding, ())]
        for region in regions:
            side = region.mask.shape[-1]
            mask = ground_truth(region, side, side, kind)[0].double().numpy()
            total, count = sums.get(region.finding, (np.zeros_like(mask), 0))
            sums[region.finding] = total + mask, count + 1
        used += [image_key(training, index)] if regions else []
    means: dict[str, torch.Tensor] = {}
    parts = gather_object([sums])
    for finding in names:
        own = [part[finding] for part in parts if finding in part]
        if own:
            mean = sum(total for total, _ in own) / sum(count for _, count in own)
            means[finding] = torch.from_numpy(mean).float()
    return MeanMasks(means, len(set(gather_object(used))))


def _scores(
    held_out: ImageCaptionDataset,
    asked: Sequence[Query],
    means: Mapping[str, torch.Tensor],
    config: FullEvaluation,
    accelerator: Accelerator,
) -> tuple[NDArray[np.float64], NDArray[np.int64], list[str]]:
    """(pairs, 2, 2) of the centre and of the mean mask the AUC and that within the prior, NaN where there is none, and
    each pair's finding and patient, or image."""
    protocol = PROTOCOLS[config.protocol]
    metric = protocol.metrics(config)["auc"].to(accelerator.device)
    rows: list[tuple[int, int, str, list[list[float]]]] = []
    for number in range(len(asked))[accelerator.process_index :: accelerator.num_processes]:
        query = asked[number]
        masks, boxes = ground_truths(query, held_out[query.image], held_out.findings, config)
        masks, side = masks.to(accelerator.device), masks.shape[-1]
        centre = centre_map(side).to(masks.device).expand(len(masks), -1, -1)
        known = [means.get(held_out.findings[f]) for f in query.findings]
        mean = torch.stack([torch.zeros(side, side) if m is None else prior_at(m, (side, side), config) for m in known])
        mean = mean.to(masks.device)
        cluster = group_key(held_out, query.image)
        areas = zip(*(metric.pair_scores(blind, masks, boxes).tolist() for blind in (centre, mean)), strict=True)
        for finding, m, mask, prior, own in zip(query.findings, known, masks, mean, areas, strict=True):
            both, within = [own[0], np.nan if m is None else own[1]], [np.nan, np.nan]
            if m is not None and protocol.size != "original":  # as of the models' maps
                blind = torch.stack([centre[0], prior]).flatten(1)
                within = areas_within(blind, mask.flatten(), strata_of(prior.flatten())).tolist()
            rows.append((number, finding, cluster, [list(pair) for pair in zip(both, within, strict=True)]))
    rows = sorted(gather_object(rows), key=lambda row: row[:2])
    values = np.array([row[3] for row in rows], dtype=np.float64).reshape(-1, 2, 2)
    return values, np.array([row[1] for row in rows], dtype=np.int64), [row[2] for row in rows]


def _entry(
    values: NDArray[np.float64], findings: NDArray[np.int64], clusters: Sequence[str], config: FullEvaluation
) -> JsonObject:
    """values: (pairs, 2), see `_scores`."""
    macro = PROTOCOLS[config.protocol].metrics(config)["auc"].average == "macro"
    entry: JsonObject = {}
    for key, column in zip(("auc", "within_prior"), values.T, strict=True):
        defined = ~np.isnan(column)
        own, groups = column[defined], findings[defined] if macro else np.zeros_like(findings[defined])
        images = np.array(clusters)[defined]
        interval = macro_mean_interval(own, groups, images, config.bootstrap_samples, config.seed) if len(own) else None
        entry |= {key: mean_over(own, groups), f"{key}_ci": list(interval) if interval else None}
    return entry
