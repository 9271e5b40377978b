"""Which layers and timesteps localize? Scores of each on validation images, a subset chosen from them, and a test of it.

A cell is a cross-attention layer at a timestep. The subset is a set of layers times a set of timesteps, whose mean map
protocol `ours` scores; it is chosen by the word maps alone, on validation images alone. The choice of layers and
timesteps is common (Vilouras et al. 2024, arXiv 2404.12920, take four layers and a range of steps by inspection).
Two scores can choose: what the image adds (see `distill.evaluation.image_adds`), and the AUC.
Work is shared between the processes of `accelerate launch`; every process must call these functions.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from numpy.typing import NDArray
from tqdm.auto import tqdm

from distill.attention.heat_maps import to_image
from distill.attention.recording import attention_layers, record_attention
from distill.config import FullEvaluation
from distill.data.sample import ImageCaptionDataset, group_key, image_key
from distill.errors import UserError
from distill.evaluation.image_adds import (
    PAIR_MEASURES,
    Row,
    areas_of_maps,
    choose_others,
    minus_others,
    readers_of,
)
from distill.evaluation.localization import TOKEN_MAPS, localization
from distill.evaluation.protocols import (
    DEFAULT_TIMESTEPS,
    Query,
    ground_truths,
    prepare_inputs,
    queries,
)
from distill.files import JsonObject, provenance
from distill.metrics import macro_mean_interval
from distill.models.family import AttentionSubset, Model

MIN_GAIN = 0.0005
"""What a change of the subset must gain on validation images; less is noise, and larger subsets would follow it."""

Indices = tuple[int, ...]
Subset = tuple[Indices, Indices]
"""Layers and timesteps, as positions among those of the cells."""
Values = NDArray[np.float64]
Measure = Literal["image_adds", "auc"]
Scores = Mapping[Measure, float]
"""What the subset is chosen by: the mean of what an image adds to its own map, or that of the AUC."""
MEASURES: tuple[Measure, ...] = ("image_adds", "auc")


@dataclass(frozen=True)
class Pairs:
    """The (image, finding) pairs of all processes whose masks are neither empty nor full.

    queries: (pairs,) number of each pair's query. places: its place among the query's findings. findings, images:
    (pairs,) indices in the data set. masks: packed bits of each mask. shape: of the masks. others: see `choose_others`.
    """

    queries: NDArray[np.int64]
    places: NDArray[np.int64]
    findings: NDArray[np.int64]
    images: NDArray[np.int64]
    masks: Sequence[NDArray[np.uint8]]
    shape: tuple[int, int]
    others: Sequence[Indices]
    readers: Sequence[Sequence[int]] = field(init=False)
    """See `readers_of`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "readers", readers_of(self.others))

    def __len__(self) -> int:
        return len(self.findings)

    def against_masks(
        self, maps: torch.Tensor, place: int, config: FullEvaluation
    ) -> Iterator[tuple[tuple[int, int], torch.Tensor]]:
        """((pair of the mask, `place`), (N,) AUC): maps (N, height, width) of a pair against all masks they are read
        for."""
        targets = self.readers[place]
        table = areas_of_maps(maps, [self.masks[target] for target in targets], self.shape, config)
        yield from (((target, place), row) for target, row in zip(targets, table, strict=True))

    def scores(self, found: Mapping[tuple[int, int], torch.Tensor]) -> dict[Measure, Values]:
        """(pairs, ...) of each measure, from this process's part of `minus_others`'s argument; the same on every
        process. What the image adds is NaN for a pair without another image."""
        whole = dict(gather_object(list(found.items())))
        own = np.stack([whole[place, place].numpy() for place in range(len(self))])
        return {"auc": own, "image_adds": minus_others(whole, self.others)}

    def mean(self, values: Values, measure: Measure) -> Values | None:
        """`macro_mean` of (pairs, ...) over the pairs that have the measure; None without any."""
        known = np.array([measure == "auc" or bool(others) for others in self.others])
        return macro_mean(values[known], self.findings[known]) if known.any() else None


@dataclass(frozen=True)
class Cells:
    """The maps of every layer at every timestep, and their scores.

    mine: the pairs of this process, as positions in `pairs`. maps: (mine, layers, timesteps, height, width) float32,
    attention on the finding's words, at latent size. scores: for each measure (pairs, token maps, layers, timesteps),
    in the order of TOKEN_MAPS.
    """

    layers: tuple[str, ...]
    timesteps: Indices
    pairs: Pairs
    mine: Indices
    maps: torch.Tensor
    scores: Mapping[Measure, Values]

    def mean(self, measure: Measure) -> Values | None:
        """(token maps, layers, timesteps): mean over findings; None if no pair has the measure."""
        return self.pairs.mean(self.scores[measure], measure)


def macro_mean(values: Values, findings: NDArray[np.int64]) -> Values:
    """(pairs, ...) -> (...): mean over findings of the mean over the finding's pairs."""
    returned: Values = np.mean([values[findings == f].mean(axis=0) for f in np.unique(findings)], axis=0)
    return returned


@torch.no_grad()
def compute_cells(
    model: Model,
    dataset: ImageCaptionDataset,
    config: FullEvaluation,
    timesteps: Sequence[int],
    *,
    accelerator: Accelerator,
    by: Measure = "image_adds",
    label: str = "",
) -> Cells:
    """The cells of all cross-attention layers for the first `config.localization_images` images that have regions.

    timesteps: in ascending order. by: the measure that is wanted. The maps stay in memory: 4 bytes x pairs x layers x
    timesteps x latent places, shared between the processes. Raises UserError if no region can be scored, or no pair has
    the measure.
    """
    asked = queries(dataset, model, config, accelerator)
    layers = attention_layers(model.denoiser)
    numbers = list(range(len(asked)))[accelerator.process_index :: accelerator.num_processes]
    pairs = find_pairs(asked, numbers, dataset, config)
    if by == "image_adds" and not any(pairs.others):
        raise UserError(
            f"no finding has a region in two of the {len(set(pairs.images.tolist()))} validation images, so what an "
            "image adds to its map cannot be measured: more validation images are needed"
        )
    of_query: dict[int, list[int]] = {number: [] for number in numbers}
    for position, number in enumerate(pairs.queries.tolist()):
        if number in of_query:
            of_query[number].append(position)
    maps: list[torch.Tensor] = []
    found: dict[tuple[int, int], torch.Tensor] = {}
    mine: list[int] = []
    bar = tqdm(total=len(numbers), desc=f"{label} atlas", unit="image", disable=not accelerator.is_main_process)
    with record_attention(model.denoiser) as recorder:
        for start in range(0, len(numbers), config.batch_size):
            batch = numbers[start : start + config.batch_size]
            rows = [(row, position) for row, number in enumerate(batch) for position in of_query[number]]
            samples = [dataset[asked[number].image] for number in batch]
            inputs = prepare_inputs(model, samples, [asked[number] for number in batch], accelerator.device)
            recorder.reduce = partial(_chosen_columns, inputs.chosen)
            words = torch.empty(len(rows), len(layers), len(timesteps), *inputs.size)
            steps: list[dict[tuple[int, int], torch.Tensor]] = []
            for step, by_layer in enumerate(inputs.renoised(timesteps, config.seed, recorder) if rows else ()):
                images = torch.stack([to_image(by_layer[n], recorder.sizes[n], inputs.size) for n in layers], dim=1)
                scored: dict[tuple[int, int], torch.Tensor] = {}
                for own, (row, position) in enumerate(rows):
                    tokens = images[row][
                        :, [4 + int(pairs.places[position]), 2, 3]
                    ]  # as TOKEN_MAPS: word, EOS, padding
                    words[own, :, step] = tokens[:, 0].cpu()
                    for pair, auc in pairs.against_masks(tokens.transpose(0, 1).flatten(0, 1), position, config):
                        scored[pair] = auc.view(len(TOKEN_MAPS), len(layers))
                steps.append(scored)
            for pair in steps[0] if steps else ():
                found[pair] = torch.stack([scored[pair] for scored in steps], dim=-1)
            maps.append(words)
            mine += [position for _, position in rows]
            bar.update(len(batch))
    bar.close()
    return Cells(
        layers=tuple(layers),
        timesteps=tuple(timesteps),
        pairs=pairs,
        mine=tuple(mine),
        maps=torch.cat(maps) if maps else torch.zeros(0, len(layers), len(timesteps), 1, 1),
        scores=pairs.scores(found),
    )


def find_pairs(
    asked: Sequence[Query], numbers: Sequence[int], dataset: ImageCaptionDataset, config: FullEvaluation
) -> Pairs:
    """The pairs of the queries `asked`, of which this process reads the masks of `numbers`. Raises UserError without
    any."""
    own = []
    for number in numbers:
        query = asked[number]
        masks, _ = ground_truths(query, dataset[query.image], dataset.findings, config)
        for place, (finding, mask) in enumerate(zip(query.findings, masks, strict=True)):
            if mask.any() and not mask.all():
                row = (number, place, finding, query.image, image_key(dataset, query.image))
                own.append((row, np.packbits(mask.numpy()), tuple(mask.shape)))
    gathered = sorted(gather_object(own), key=lambda one: one[0])
    if not gathered:
        raise UserError("no validation image has a region that can be scored: each is empty or the whole image")
    rows, bits, shapes = zip(*gathered, strict=True)
    of_query, places, findings, images, names = zip(*rows, strict=True)
    return Pairs(
        queries=np.array(of_query, dtype=np.int64),
        places=np.array(places, dtype=np.int64),
        findings=np.array(findings, dtype=np.int64),
        images=np.array(images, dtype=np.int64),
        masks=bits,
        shape=shapes[0],
        others=choose_others([dataset.findings[finding] for finding in findings], names, of_query),
    )


def _chosen_columns(chosen: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
    return probabilities.mean(dim=1) @ chosen


# --- the choice -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """The subset, its scores on the images that it was chosen on, those of all layers at DEFAULT_TIMESTEPS (None if
    those are not among the cells), and the subsets on the way, each with its scores, the last being the subset.

    by: the measure that chose. Scores: measure -> mean over findings; only of measures that a pair has.
    """

    subset: AttentionSubset
    by: Measure
    scores: Scores
    default: Scores | None
    steps: tuple[tuple[AttentionSubset, Scores], ...]

    @property
    def is_better(self) -> bool:
        """Than the default: in the measure that chose, and not worse in AUC."""
        if self.default is None:
            return True
        return self.scores["auc"] >= self.default["auc"] and self.scores[self.by] > self.default[self.by]


def choose_subset(
    cells: Cells,
    config: FullEvaluation,
    max_timesteps: int,
    by: Measure = "image_adds",
    *,
    device: torch.device | None = None,
    progress: Callable[[float], None] = lambda value: None,
) -> Choice:
    """Greedy search for the layers and timesteps (at most `max_timesteps`) whose mean word map has the highest score.

    From the best cell, the layer or timestep is added or dropped that raises the macro mean of the measure `by` most,
    as long as one raises it by more than MIN_GAIN. Subsets whose AUC is below that of the default (where its timesteps
    are among the cells) are left first, by the change that raises the AUC most: a map of one layer may depend most on
    the image and yet find less. By image_adds a second search begins at the subset with the best AUC, and the better of
    both results is taken. progress: called with the value of each step. cells: computed for the measure `by`.
    """
    known: dict[Subset, Scores] = {}

    def scores(layers: Indices, timesteps: Indices) -> Scores:
        if (layers, timesteps) not in known:
            mean = cells.maps[:, list(layers)][:, :, list(timesteps)].mean(dim=(1, 2)).to(device)
            found: dict[tuple[int, int], torch.Tensor] = {}
            for place, own in zip(cells.mine, mean, strict=True):
                found |= cells.pairs.against_masks(own[None], place, config)
            by_measure = cells.pairs.scores(found)
            means = {measure: cells.pairs.mean(by_measure[measure], measure) for measure in MEASURES}
            known[layers, timesteps] = {m: value.item() for m, value in means.items() if value is not None}
        return known[layers, timesteps]

    default = None
    if set(DEFAULT_TIMESTEPS) <= set(cells.timesteps):
        default = scores(tuple(range(len(cells.layers))), tuple(cells.timesteps.index(t) for t in DEFAULT_TIMESTEPS))
    floor = default["auc"] if default else 0.0

    def value(subset: Subset, measure: Measure) -> tuple[float, float]:
        """What the AUC lacks to the floor, at most 0, and the measure: in this order, more is better."""
        own = scores(*subset)
        return min(0.0, own["auc"] - floor), own[measure]

    def best_cell(measure: Measure) -> Subset:
        means = cells.mean(measure)
        assert means is not None, f"the cells were computed for another measure than {by}"
        words = means[TOKEN_MAPS.index("word")]
        layer, timestep = np.unravel_index(int(words.argmax()), words.shape)
        return (int(layer),), (int(timestep),)

    def climb(start: Subset, measure: Measure) -> list[Subset]:
        """The subsets on the way from `start`."""
        way = [start]
        while True:
            progress(scores(*way[-1])[measure])
            around = _neighbours(*way[-1], len(cells.layers), len(cells.timesteps), max_timesteps)
            following = max(around, key=lambda subset: value(subset, measure))
            if not is_worth_it(value(way[-1], measure), value(following, measure)):
                return way
            way.append(following)

    ways = [climb(best_cell(by), by)]
    if by != "auc":
        ways.append(climb(climb(best_cell("auc"), "auc")[-1], by))
    best = max(ways, key=lambda way: value(way[-1], by))
    steps = [
        (AttentionSubset(tuple(cells.layers[i] for i in layers), tuple(cells.timesteps[i] for i in timesteps)), own)
        for layers, timesteps in best
        for own in [scores(layers, timesteps)]
    ]
    return Choice(steps[-1][0], by, steps[-1][1], default, tuple(steps))


def is_worth_it(before: tuple[float, float], after: tuple[float, float]) -> bool:
    """Whether the search makes a change. Each is (what the AUC lacks to the floor, at most 0; the measure)."""
    (lack, value), (next_lack, next_value) = before, after
    if lack == next_lack:
        return next_value - value > MIN_GAIN
    return next_lack == 0 or next_lack - lack > MIN_GAIN


def _neighbours(
    layers: Indices, timesteps: Indices, all_layers: int, all_timesteps: int, max_timesteps: int
) -> Iterator[Subset]:
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
    by: Measure,
    accelerator: Accelerator,
    folder: Path,
    label: str,
) -> JsonObject:
    """A model's entry of atlas.json: scores of all cells, the subset chosen from them, and what it does on test images.

    timesteps: those of the cells, in addition to DEFAULT_TIMESTEPS. max_timesteps: most timesteps of the subset.
    validation_images: how many it is chosen on, by the measure `by`; evaluation.localization_images test images check
    it.
    """
    began = time.perf_counter()
    own = evaluation.model_copy(update={"localization_images": validation_images})
    timesteps = sorted({*timesteps, *DEFAULT_TIMESTEPS})
    shared: dict[str, Any] = {"accelerator": accelerator, "label": label}
    cells = compute_cells(model, validation, own, timesteps, by=by, **shared)
    measured = time.perf_counter()
    bar = tqdm(desc=f"{label} choice", unit="change", disable=not accelerator.is_main_process)

    def progress(value: float) -> None:
        bar.set_postfix_str(f"{by} {value:.4f}")
        bar.update()

    choice = choose_subset(cells, own, max_timesteps, by, device=accelerator.device, progress=progress)
    bar.close()
    tables: JsonObject = {
        measure: {token: table.tolist() for token, table in zip(TOKEN_MAPS, means.round(6), strict=True)}
        for measure in MEASURES
        if (means := cells.mean(measure)) is not None
    }
    chosen = time.perf_counter()
    result = compare_on_test(model, test, evaluation, choice.subset, folder=folder, **shared)
    if result is None:
        raise UserError("no test image has a region of a finding; the subset cannot be tested")
    return {
        "layers": list(cells.layers),
        "timesteps": list(cells.timesteps),
        "validation": {
            "images": len({image_key(validation, image) for image in cells.pairs.images.tolist()}),
            "pairs": len(cells.pairs),
            **tables,
        },
        "chosen": {
            **asdict(choice.subset),
            "by": by,
            **choice.scores,
            "default": choice.default,
            "is_better": choice.is_better,
            "steps": [{**asdict(subset), **scores} for subset, scores in choice.steps],
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
            "chosen_by": chosen["by"],
            "chosen": {measure: chosen.get(measure) for measure in MEASURES},
            "default": chosen["default"],
        },
        "test": {
            "images": test["chosen"]["word"]["images"],
            "pairs": test["chosen"]["word"]["pairs"],
            **{which: {m: test[which]["word"][m] for m in MEASURES} for which in ("chosen", "default")},
            "difference": {m: test["difference"][m] for m in MEASURES},
        },
        "config": dict(config),
        "provenance": provenance(),
    }
