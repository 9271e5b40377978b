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
from rich import box
from rich.table import Table as RichTable
from rich.text import Text as RichText
from tqdm.auto import tqdm

from distill.attention.heat_maps import normalize, to_image
from distill.attention.recording import attention_layers, record_attention
from distill.config import FullEvaluation
from distill.data.sample import ImageCaptionDataset, Sample, image_key
from distill.errors import UserError
from distill.evaluation.image_adds import choose_others, differences
from distill.evaluation.localization import TOKEN_MAPS, localization
from distill.evaluation.protocols import (
    DEFAULT_TIMESTEPS,
    PROTOCOLS,
    ground_truth,
    post_process,
    prepare_inputs,
    queries,
)
from distill.files import provenance
from distill.metrics import PixelAUROC, macro_mean_interval
from distill.models.family import AttentionSubset, Model
from distill.report.document import UNKNOWN
from distill.report.tables import format_number

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
    return np.mean([values[findings == f].mean(axis=0) for f in np.unique(findings)], axis=0)


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


def cell_image_adds(cells: Cells, dataset: ImageCaptionDataset, config: FullEvaluation) -> NDArray[np.float64] | None:
    """(layers, timesteps): what the image adds to the AUC of each cell's word maps (see image_adds.py), macro over findings.

    None where no finding has two images. All processes must call this; each gathers the maps of one timestep at a time.
    """
    clusters = [image_key(dataset, i) for i in cells.images.tolist()]
    columns = []
    for step in range(len(cells.timesteps)):
        parts = (
            cells.numbers.tolist(),
            cells.findings.tolist(),
            clusters,
            cells.maps[:, :, step].numpy(),
            cells.masks.numpy(),
        )
        gathered = sorted(gather_object(list(zip(*parts, strict=True))), key=lambda pair: pair[0])
        numbers, findings, images, maps, masks = zip(*gathered, strict=True)
        others = choose_others([dataset.findings[f] for f in findings], images, numbers)
        bits = [np.packbits(mask) for mask in masks]
        tensors = [torch.from_numpy(own) for own in maps]
        added = differences(tensors, bits, masks[0].shape, others, config, torch.device("cpu"))
        known = ~np.isnan(added).any(axis=1)
        if not known.any():
            return None
        columns.append(macro_mean(added[known], np.array(findings)[known]))
    return np.stack(columns, axis=1)


def choose_subset(
    cells: Cells,
    config: FullEvaluation,
    max_timesteps: int,
    *,
    device: torch.device | None = None,
    progress: Callable[[float], None] = lambda auc: None,
) -> Choice:
    """Greedy search for the layers and timesteps (at most `max_timesteps`) whose mean word map has the highest AUC.

    From the best cell, the layer or timestep is added or dropped that raises the macro AUC most, as long as one raises it
    by more than MIN_GAIN; so the result is never worse than the best cell. progress: called with the AUC of each step.
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
) -> dict[str, Any]:
    """Chosen minus default of one metric of the word maps: macro mean over the pairs that both have, and its interval.

    default, chosen: lines of pairs.jsonl (see `distill.localization.Scores`). cluster: index of an image -> what the
    bootstrap draws. Returns {"value": None without pairs, "ci": [low, high] or None, "pairs"}.
    """
    earlier = {(row["query"], row["finding"]): row["scores"]["word"][key] for row in default}
    rows = [row for row in chosen if earlier.get((row["query"], row["finding"])) is not None]
    rows = [row for row in rows if row["scores"]["word"][key] is not None]
    values = np.array([row["scores"]["word"][key] - earlier[row["query"], row["finding"]] for row in rows])
    findings = np.array([row["finding"] for row in rows])
    clusters = [cluster(row["image"]) for row in rows]
    if not rows:
        return {"value": None, "ci": None, "pairs": 0}
    interval = macro_mean_interval(values, findings, clusters, config.bootstrap_samples, config.seed)
    return {"value": float(macro_mean(values, findings)), "ci": interval and list(interval), "pairs": len(rows)}


def compare_on_test(
    model: Model,
    dataset: ImageCaptionDataset,
    config: FullEvaluation,
    subset: AttentionSubset,
    *,
    accelerator: Accelerator,
    folder: Path,
    label: str = "",
) -> dict[str, Any] | None:
    """`localization` by all layers at DEFAULT_TIMESTEPS and by the subset, on the same pairs; None without regions.

    -> {"default": entry, "chosen": entry, "difference": {metric: see `paired_difference`}}. The scores of each pair are
    in <folder>/default and <folder>/chosen, from which the same call continues after a kill.
    """
    found: dict[str, Any] = {}
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
        key: paired_difference(rows["default"], rows["chosen"], key, lambda i: image_key(dataset, i), config)
        for key in ("auc", "cnr", "top1")
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
) -> dict[str, Any]:
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


def subset_file(entry: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
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


# --- what people read -----------------------------------------------------------------------------------------------


def short_layer(name: str) -> str:
    """`up_blocks.1.attentions.0.transformer_blocks.0.attn2` -> `up 1.0.0`."""
    block, *rest = name.split(".")
    return f"{block.partition('_')[0]} {'.'.join(part for part in rest if part.isdigit())}"


def _signed(value: float) -> str:
    text = format_number(value, 3)
    return text if text.startswith("-") else f"+{text}"


def _difference(entry: Mapping[str, Any], key: str) -> str:
    """`+.031 [+.010, +.052]`; a dash where unknown."""
    found = entry["test"]["difference"][key]
    if found["value"] is None:
        return UNKNOWN
    return _signed(found["value"]) + (f" [{', '.join(map(_signed, found['ci']))}]" if found["ci"] else "")


def answer(name: str, entry: Mapping[str, Any]) -> str:
    """Does the subset chosen on validation images raise the AUC on test images? One or two sentences, from the numbers."""
    chosen, test, found = entry["chosen"], entry["test"], entry["test"]["difference"]["auc"]
    start = (
        f"{name}: {len(chosen['layers'])} of {len(entry['layers'])} layers at {', '.join(map(str, chosen['timesteps']))}, "
        f"chosen on {entry['validation']['images']} validation images,"
    )
    end = (
        "" if chosen["is_better"] else " On validation it is no better than the default, so the model does not get it."
    )
    if found["value"] is None:
        return f"{start} could not be tested: no pair of a test image has an AUC.{end}"
    values = [format_number(test[which]["word"]["auc"], 3) for which in ("default", "chosen")]
    numbers = f"from {values[0]} to {values[1]}, difference {_difference(entry, 'auc')}"
    if found["ci"] is None:
        return f"{start} changes the word AUC on test images {numbers}; one image gives no interval.{end}"
    low, high = found["ci"]
    if low <= 0 <= high:
        verb, numbers = "does not clearly change", f"{numbers}: the 95 % interval holds 0"
    else:
        verb = "raises" if low > 0 else "lowers"
    return f"{start} {verb} the word AUC on test images ({numbers}).{end}"


HEAD = (
    "model", "layers", "timesteps", "validation AUC, default", "chosen", "test AUC, default", "chosen", "difference",
    "CNR difference", "Top-1 difference",
)  # fmt: skip


def summary_rows(entries: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """One row a model, in the columns of HEAD; AUC, CNR and Top-1 of the word maps."""
    rows = []
    for name, entry in entries.items():
        chosen, test = entry["chosen"], entry["test"]
        numbers = (chosen["default_auc"], chosen["auc"], test["default"]["word"]["auc"], test["chosen"]["word"]["auc"])
        rows.append(
            (
                name,
                f"{len(chosen['layers'])} of {len(entry['layers'])}",
                ", ".join(map(str, chosen["timesteps"])),
                *(UNKNOWN if value is None else format_number(value, 3) for value in numbers),
                *(_difference(entry, key) for key in ("auc", "cnr", "top1")),
            )
        )
    return rows


def terminal_table(entries: Mapping[str, Mapping[str, Any]]) -> RichTable:
    table = RichTable(
        box=box.SIMPLE_HEAD,
        padding=0,
        caption="word AUC; difference on test images with its 95 % bootstrap interval over images",
        caption_justify="left",
    )
    for place, name in enumerate(HEAD[:-2]):
        table.add_column(name.replace(" AUC, ", "\n"), justify="right" if place else "left")
    for row in summary_rows(entries):
        table.add_row(*(RichText(cell) for cell in row[:-2]))  # rich would read [brackets] as markup
    return table


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def markdown(entries: Mapping[str, Mapping[str, Any]], evaluation: FullEvaluation) -> str:
    """atlas.md: the answer, the comparison, and the AUC of each cell of each model."""
    first = next(iter(entries.values()))
    word = first["test"]["chosen"]["word"]
    parts = [
        "# Where the attention localizes",
        "Does choosing layers and timesteps on validation images raise the AUC on test images?",
        "\n".join(f"- {answer(name, entry)}" for name, entry in entries.items()),
        _markdown_table(HEAD, summary_rows(entries)),
        f"The default is all layers at the timesteps {', '.join(map(str, DEFAULT_TIMESTEPS))}. Validation: "
        f"{first['validation']['images']} images, {first['validation']['pairs']} image-finding pairs; the chosen subset's "
        f"AUC there is the best of many and so too high. Test: {word['images']} other images, {word['pairs']} pairs; "
        f"95 % intervals of {evaluation.bootstrap_samples:,} resamples of images; noise seed "
        f"{evaluation.seed}. CNR and Top-1 are of the same maps.",
    ]
    for name, entry in entries.items():
        chosen = entry["chosen"]
        parts += [
            f"## {name}",
            f"![AUC of {name} by layer and timestep]({name}/atlas.png)",
            f"Chosen layers: {', '.join(f'`{layer}`' for layer in chosen['layers'])}",
        ]
        for token in TOKEN_MAPS:
            rows = []
            for layer, values in zip(entry["layers"], entry["validation"]["auc"][token], strict=True):
                cells = [format_number(value, 3) for value in values]
                if token == "word" and layer in chosen["layers"]:
                    cells = [
                        f"**{cell}**" if timestep in chosen["timesteps"] else cell
                        for cell, timestep in zip(cells, entry["timesteps"], strict=True)
                    ]
                rows.append([short_layer(layer), *cells])
            parts.append(f"AUC of the {token} maps on validation images, by layer and timestep:")
            parts.append(_markdown_table(["layer", *map(str, entry["timesteps"])], rows))
    return "\n\n".join(parts) + "\n"
