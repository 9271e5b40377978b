"""Which layers and timesteps localize? AUC of each on validation images, a subset chosen from them, and a test of it.

A cell is a cross-attention layer at a timestep. The subset is a set of layers times a set of timesteps, whose mean map
protocol `ours` scores; it is chosen by the word maps alone, on validation images alone. The choice of layers and
timesteps is common (Vilouras et al. 2024, arXiv 2404.12920, take four layers and a range of steps by inspection).
Work is shared between the processes of `accelerate launch`; every process must call these functions.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from numpy.typing import NDArray
from tqdm.auto import tqdm

from distill.attention.heat_maps import normalize, to_image
from distill.attention.recording import attention_layers, record_attention
from distill.config import FullEvaluation
from distill.data.sample import ImageCaptionDataset, Sample, group_key, image_key
from distill.errors import UserError
from distill.evaluation.image_adds import PAIR_MEASURES, Row
from distill.evaluation.localization import TOKEN_MAPS, localization
from distill.evaluation.protocols import (
    DEFAULT_TIMESTEPS,
    PROTOCOLS,
    ground_truth,
    post_process,
    prepare_inputs,
    queries,
)
from distill.files import JsonObject, provenance
from distill.metrics import PixelAUROC, macro_mean_interval
from distill.models.family import AttentionSubset, Model

MIN_GAIN = 0.0005
"""Validation AUC that a change of the subset must gain; less is noise, and larger subsets would follow it."""
PIXELS_AT_ONCE = 2**22
"""Pixels whose AUC is computed at a time: 32 MiB of float64."""

Indices = tuple[int, ...]


@dataclass(frozen=True)
class Cells:
    """The maps of every layer at every timestep, for the (image, finding) pairs of this process.

    maps: (pairs, layers, timesteps, height, width) float32, attention on the finding's words, at latent size.
    masks: (pairs, side, side) bool, neither empty nor full. findings, images: (pairs,) indices in the data set.
    numbers: (pairs,) place of each pair among those of all processes.
    auc: (pairs, token maps, layers, timesteps), in the order of TOKEN_MAPS.
    """

    layers: tuple[str, ...]
    timesteps: Indices
    maps: torch.Tensor
    masks: torch.Tensor
    findings: NDArray[np.int64]
    images: NDArray[np.int64]
    numbers: NDArray[np.int64]
    auc: NDArray[np.float64]


def pair_auc(maps: torch.Tensor, masks: torch.Tensor, config: FullEvaluation) -> NDArray[np.float64]:
    """(N,) pixel AUC of maps (N, height, width) against masks (N, side, side), resized as by protocol `ours`.

    NaN where a mask is empty or full.
    """
    metric, values = PixelAUROC(), [np.zeros(0)]
    rows = max(1, PIXELS_AT_ONCE // masks[0].numel()) if len(masks) else 1
    for start in range(0, len(maps), rows):
        part, truth = maps[start : start + rows], masks[start : start + rows]
        full = F.interpolate(normalize(part)[None], truth.shape[-2:], mode="bilinear", align_corners=False)[0]
        values.append(metric.pair_scores(post_process(full, config), truth).cpu().numpy())
    return np.concatenate(values)


def macro_mean(values: NDArray[np.float64], findings: NDArray[np.int64]) -> NDArray[np.float64]:
    """(pairs, ...) -> (...): mean over findings of the mean over the finding's pairs."""
    returned: NDArray[np.float64] = np.mean([values[findings == f].mean(axis=0) for f in np.unique(findings)], axis=0)
    return returned


@torch.no_grad()
def compute_cells(
    model: Model,
    dataset: ImageCaptionDataset,
    config: FullEvaluation,
    timesteps: Sequence[int],
    *,
    accelerator: Accelerator,
    label: str = "",
) -> Cells:
    """The cells of all cross-attention layers for the first `config.localization_images` images that have regions.

    timesteps: in ascending order. The maps stay in memory: 4 bytes x pairs x layers x timesteps x latent places, shared
    between the processes. Raises UserError if no region can be scored.
    """
    asked = queries(dataset, model, config, accelerator)
    starts = np.cumsum([0, *(len(query.findings) for query in asked)])
    layers = attention_layers(model.denoiser)
    mine = list(range(len(asked)))[accelerator.process_index :: accelerator.num_processes]
    maps: list[torch.Tensor] = []
    auc = [np.zeros((0, len(TOKEN_MAPS), len(layers), len(timesteps)))]
    masks: list[torch.Tensor] = []
    pairs: list[tuple[int, int, int]] = []
    bar = tqdm(total=len(mine), desc=f"{label} atlas", unit="image", disable=not accelerator.is_main_process)
    with record_attention(model.denoiser) as recorder:
        for start in range(0, len(mine), config.batch_size):
            batch = [asked[n] for n in mine[start : start + config.batch_size]]
            samples = [dataset[query.image] for query in batch]
            rows, columns, truths = [], [], []
            for row, (query, sample) in enumerate(zip(batch, samples, strict=True)):
                for place, finding in enumerate(query.findings):
                    mask = _mask(sample, dataset.findings[finding], config)
                    if not mask.any() or mask.all():
                        continue
                    rows.append(row)
                    columns.append(4 + place)
                    truths.append(mask)
                    pairs.append((finding, query.image, int(starts[mine[start + row]]) + place))
            inputs = prepare_inputs(model, samples, batch, accelerator.device)
            recorder.reduce = partial(_chosen_columns, inputs.chosen)
            found = torch.empty(len(rows), len(layers), len(timesteps), *inputs.size)
            scores = np.empty((len(rows), *auc[0].shape[1:]))
            truth = torch.stack(truths * len(TOKEN_MAPS)).to(accelerator.device) if truths else torch.zeros(0, 1, 1)
            for step, by_layer in enumerate(inputs.renoised(timesteps, config.seed, recorder) if rows else ()):
                for place, layer in enumerate(layers):
                    images = to_image(by_layer[layer], recorder.sizes[layer], inputs.size)
                    word, eos, padding = images[rows, columns], images[rows, 2], images[rows, 3]
                    found[:, place, step] = word.cpu()
                    own = pair_auc(torch.cat([word, eos, padding]), truth, config)
                    scores[:, :, place, step] = own.reshape(len(TOKEN_MAPS), -1).T
            maps.append(found)
            auc.append(scores)
            masks += truths
            bar.update(len(batch))
    bar.close()
    if not sum(gather_object([len(pairs)])):
        raise UserError("no validation image has a region that can be scored: each is empty or the whole image")
    findings, images_of, numbers = np.array(pairs, dtype=np.int64).reshape(-1, 3).T
    return Cells(
        layers=tuple(layers),
        timesteps=tuple(timesteps),
        maps=torch.cat(maps) if maps else torch.zeros(0, len(layers), len(timesteps), 1, 1),
        masks=torch.stack(masks) if masks else torch.zeros(0, 1, 1, dtype=torch.bool),
        findings=findings,
        images=images_of,
        numbers=numbers,
        auc=np.concatenate(auc),
    )


def _mask(sample: Sample, finding: str, config: FullEvaluation) -> torch.Tensor:
    side = sample.pixel_values.shape[-1]
    kind = PROTOCOLS["ours"].ground_truth if config.ground_truth == "auto" else config.ground_truth
    region = next(region for region in sample.regions if region.finding == finding)
    return ground_truth(region, side, side, kind)[0]


def _chosen_columns(chosen: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
    return probabilities.mean(dim=1) @ chosen


# --- the choice -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """The subset, its AUC on the images that it was chosen on, that of all layers at DEFAULT_TIMESTEPS (None if those
    are not among the cells), and the subsets on the way, each with its AUC, the last being the subset."""

    subset: AttentionSubset
    auc: float
    default_auc: float | None
    steps: tuple[tuple[AttentionSubset, float], ...]

    @property
    def is_better(self) -> bool:
        return self.default_auc is None or self.auc > self.default_auc


def gather_pairs(cells: Cells, values: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """(pairs, ...) values and (pairs,) findings of all processes, in the same order whatever their number."""
    parts = gather_object([(cells.numbers, values, cells.findings)])
    numbers, gathered, findings = (np.concatenate(part) for part in zip(*parts, strict=True))
    order = np.argsort(numbers)
    return gathered[order], findings[order]


def choose_subset(
    cells: Cells,
    config: FullEvaluation,
    max_timesteps: int,
    *,
    device: torch.device | None = None,
    progress: Callable[[float], None] = lambda auc: None,
) -> Choice:
    """Greedy search for the layers and timesteps (at most `max_timesteps`) whose mean word map has the highest AUC.

    From the best cell, the layer or timestep is added or dropped that raises the macro AUC most, as long as one raises
    it by more than MIN_GAIN; so the result is never worse than the best cell. progress: called with the AUC of each
    step.
    """
    known: dict[tuple[Indices, Indices], float] = {}

    def auc(layers: Indices, timesteps: Indices) -> float:
        if (layers, timesteps) not in known:
            mean = cells.maps[:, list(layers)][:, :, list(timesteps)].mean(dim=(1, 2))
            known[layers, timesteps] = float(
                macro_mean(*gather_pairs(cells, pair_auc(mean.to(device), cells.masks.to(device), config)))
            )
        return known[layers, timesteps]

    def named(layers: Indices, timesteps: Indices) -> AttentionSubset:
        return AttentionSubset(tuple(cells.layers[i] for i in layers), tuple(cells.timesteps[i] for i in timesteps))

    words = macro_mean(*gather_pairs(cells, cells.auc))[TOKEN_MAPS.index("word")]
    layer, timestep = np.unravel_index(int(words.argmax()), words.shape)
    best: tuple[Indices, Indices] = (int(layer),), (int(timestep),)
    steps = [(named(*best), auc(*best))]
    while True:
        progress(steps[-1][1])
        following = max(
            _neighbours(*best, len(cells.layers), len(cells.timesteps), max_timesteps), key=lambda s: auc(*s)
        )
        if auc(*following) <= steps[-1][1] + MIN_GAIN:
            break
        best = following
        steps.append((named(*best), auc(*best)))
    default = None
    if set(DEFAULT_TIMESTEPS) <= set(cells.timesteps):
        default = auc(tuple(range(len(cells.layers))), tuple(cells.timesteps.index(t) for t in DEFAULT_TIMESTEPS))
    return Choice(*steps[-1], default, tuple(steps))


def _neighbours(
    layers: Indices, timesteps: Indices, all_layers: int, all_timesteps: int, max_timesteps: int
) -> Iterator[tuple[Indices, Indices]]:
    """Subsets with one layer or timestep more or less, none of them empty; itself where there is no other."""
    yield layers, timesteps
    for i in range(all_layers):
        if changed := tuple(sorted({*layers} ^ {i})):
            yield changed, timesteps
    for i in range(all_timesteps):
        changed = tuple(sorted({*timesteps} ^ {i}))
        if changed and len(changed) <= max_timesteps:
            yield layers, changed


# --- the test -------------------------------------------------------------------------------------------------------


def paired_difference(
    default: Sequence[Mapping[str, Any]],
    chosen: Sequence[Mapping[str, Any]],
    key: str,
    cluster: Callable[[int], str],
    config: FullEvaluation,
) -> JsonObject:
    """Chosen minus default of one metric of the word maps: macro mean over the pairs that both have, and its interval.

    default, chosen: lines of pairs.jsonl (see `distill.localization.Scores`). key: a metric of their scores, or one of
    PAIR_MEASURES. cluster: index of an image -> what the bootstrap draws. Returns {"value": None without pairs, "ci":
    [low, high] or None, "pairs"}.
    """
    before = {(row["query"], row["finding"]): _word(row, key) for row in default}
    rows, gains = [], []
    for row in chosen:
        earlier, own = before.get((row["query"], row["finding"])), _word(row, key)
        if earlier is not None and own is not None:
            rows.append(row)
            gains.append(own - earlier)
    if not rows:
        return {"value": None, "ci": None, "pairs": 0}
    values, findings = np.array(gains), np.array([row["finding"] for row in rows])
    clusters = [cluster(row["image"]) for row in rows]
    interval = macro_mean_interval(values, findings, clusters, config.bootstrap_samples, config.seed)
    return {"value": float(macro_mean(values, findings)), "ci": interval and list(interval), "pairs": len(rows)}


def _word(row: Row, key: str) -> float | None:
    """A measure of a pair's word map."""
    value: float | None = row[key]["word"] if key in PAIR_MEASURES else row["scores"]["word"][key]
    return value


def compare_on_test(
    model: Model,
    dataset: ImageCaptionDataset,
    config: FullEvaluation,
    subset: AttentionSubset,
    *,
    accelerator: Accelerator,
    folder: Path,
    label: str = "",
) -> JsonObject | None:
    """`localization` by all layers at DEFAULT_TIMESTEPS and by the subset, on the same pairs; None without regions.

    -> {"default": entry, "chosen": entry, "difference": {metric: see `paired_difference`}}. The scores of each pair are
    in <folder>/default and <folder>/chosen, from which the same call continues after a kill.
    """
    found: JsonObject = {}
    rows = {}
    for name, layers, timesteps in (
        ("default", (), DEFAULT_TIMESTEPS),
        ("chosen", subset.layers, subset.timesteps),
    ):
        own = config.model_copy(update={"layers": layers, "timesteps": timesteps})
        shared: dict[str, Any] = {"accelerator": accelerator, "arm_dir": folder / name, "label": f"{label} {name}"}
        found[name] = localization(model, dataset, own, **shared)
        if found[name] is None:
            return None
        accelerator.wait_for_everyone()  # the first process has written the file
        lines = (folder / name / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
        rows[name] = [json.loads(line) for line in lines[1:]]
    found["difference"] = {
        key: paired_difference(rows["default"], rows["chosen"], key, lambda i: group_key(dataset, i), config)
        for key in ("auc", "image_adds", "cnr", "top1")
    }
    return found


def analyse(
    model: Model,
    validation: ImageCaptionDataset,
    test: ImageCaptionDataset,
    evaluation: FullEvaluation,
    *,
    timesteps: Sequence[int],
    max_timesteps: int,
    validation_images: int,
    accelerator: Accelerator,
    folder: Path,
    label: str,
) -> JsonObject:
    """A model's entry of atlas.json: AUC of all cells, the subset chosen from them, and what it does on test images.

    timesteps: those of the cells, in addition to DEFAULT_TIMESTEPS. max_timesteps: most timesteps of the subset.
    validation_images: how many it is chosen on; evaluation.localization_images test images check it.
    """
    began = time.perf_counter()
    own = evaluation.model_copy(update={"localization_images": validation_images})
    timesteps = sorted({*timesteps, *DEFAULT_TIMESTEPS})
    shared: dict[str, Any] = {"accelerator": accelerator, "label": label}
    cells = compute_cells(model, validation, own, timesteps, **shared)
    measured = time.perf_counter()
    bar = tqdm(desc=f"{label} choice", unit="change", disable=not accelerator.is_main_process)

    def progress(auc: float) -> None:
        bar.set_postfix_str(f"AUC {auc:.4f}")
        bar.update()

    choice = choose_subset(cells, own, max_timesteps, device=accelerator.device, progress=progress)
    bar.close()
    values, findings = gather_pairs(cells, cells.auc)
    tables = macro_mean(values, findings).round(6)
    images = len({image_key(validation, i) for part in gather_object([cells.images.tolist()]) for i in part})
    chosen = time.perf_counter()
    result = compare_on_test(model, test, evaluation, choice.subset, folder=folder, **shared)
    if result is None:
        raise UserError("no test image has a region of a finding; the subset cannot be tested")
    return {
        "layers": list(cells.layers),
        "timesteps": list(cells.timesteps),
        "validation": {
            "images": images,
            "pairs": len(findings),
            "auc": {token: table.tolist() for token, table in zip(TOKEN_MAPS, tables, strict=True)},
        },
        "chosen": asdict(choice.subset)
        | {
            "auc": choice.auc,
            "default_auc": choice.default_auc,
            "is_better": choice.is_better,
            "steps": [asdict(subset) | {"auc": auc} for subset, auc in choice.steps],
        },
        "test": result,
        "seconds": {
            "cells": round(measured - began, 1),
            "choice": round(chosen - measured, 1),
            "test": round(time.perf_counter() - chosen, 1),
        },
    }


def subset_file(entry: Mapping[str, Any], config: Mapping[str, Any]) -> JsonObject:
    """Content of localization.json (see `distill.models.loading.read_subset`), with where the subset comes from."""
    chosen, test = entry["chosen"], entry["test"]
    return {
        "layers": chosen["layers"],
        "timesteps": chosen["timesteps"],
        "validation": {
            "images": entry["validation"]["images"],
            "pairs": entry["validation"]["pairs"],
            "auc": chosen["auc"],
            "default_auc": chosen["default_auc"],
        },
        "test": {
            "images": test["chosen"]["word"]["images"],
            "pairs": test["chosen"]["word"]["pairs"],
            "auc": test["chosen"]["word"]["auc"],
            "default_auc": test["default"]["word"]["auc"],
            "difference": test["difference"]["auc"]["value"],
            "difference_ci": test["difference"]["auc"]["ci"],
        },
        "config": dict(config),
        "provenance": provenance(),
    }
