"""Which layers and timesteps localize? A subset of both, chosen on validation images, and a test of it on others.

The subset is a set of layers times a set of timesteps, whose mean map protocol `ours` scores; it is chosen by the word
maps alone, on validation images alone. The choice of layers and timesteps is common (Vilouras et al. 2024, arXiv
2404.12920, take four layers and a range of steps by inspection).
Work is shared between the processes of `accelerate launch`; every process must call these functions.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from distill.config import FullEvaluation
from distill.data.sample import ImageCaptionDataset, group_key, image_key
from distill.errors import UserError
from distill.evaluation.cells import MEASURES, Areas, Cells, Indices, Measure, compute_cells, macro_mean
from distill.evaluation.image_adds import PAIR_MEASURES, Row
from distill.evaluation.localization import TOKEN_MAPS, localization
from distill.evaluation.protocols import DEFAULT_TIMESTEPS
from distill.files import JsonObject, provenance
from distill.metrics import macro_mean_interval
from distill.models.family import AttentionSubset, Model

MIN_GAIN = 0.0005
"""What a change of the subset must gain on validation images; less is noise, and larger subsets would follow it."""

Subset = tuple[Indices, Indices]
"""Layers and timesteps, as positions among those of the cells."""
Scores = Mapping[Measure, float]


# --- the choice -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """The subset, its scores on the images that it was chosen on, those of all layers at DEFAULT_TIMESTEPS (None if
    those are not among the cells), and the subsets on the way, each with its scores, the last being the subset.

    by: the measure that chose. Scores: measure -> mean over findings; only of measures that a pair has.
    """

    subset: AttentionSubset
    scores: Scores
    by: Measure
    default: Scores | None
    steps: tuple[tuple[AttentionSubset, Scores], ...]

    @property
    def is_better(self) -> bool:
        """Than the default: in the measure that chose, and not worse in AUC."""
        if self.default is None:
            return True
        return self.scores["auc"] >= self.default["auc"] and self.scores[self.by] > self.default[self.by]


class Search:
    """Subsets of cells with their scores, each computed once. A subset is worth (what its AUC lacks to that of the
    default, at most 0; the measure): in this order, more is better.

    default: scores of all layers at DEFAULT_TIMESTEPS, None if those are not among the cells.
    """

    def __init__(
        self, cells: Cells, config: FullEvaluation, max_timesteps: int, device: torch.device | None = None
    ) -> None:
        self.cells, self.config, self.max_timesteps, self.device = cells, config, max_timesteps, device
        self._known: dict[Subset, Scores] = {}
        self.default: Scores | None = None
        if set(DEFAULT_TIMESTEPS) <= set(cells.timesteps):
            steps = tuple(cells.timesteps.index(t) for t in DEFAULT_TIMESTEPS)
            self.default = self.scores((tuple(range(len(cells.layers))), steps))

    def scores(self, subset: Subset) -> Scores:
        if subset not in self._known:
            layers, timesteps = subset
            pairs = self.cells.pairs
            mean = self.cells.maps[:, list(layers)][:, :, list(timesteps)].mean(dim=(1, 2)).to(self.device)
            found: Areas = {}
            for place, own in zip(self.cells.mine, mean, strict=True):
                found |= pairs.against_masks(own[None], place, self.config)
            by_measure = pairs.scores(found)
            means = {measure: pairs.mean(by_measure[measure], measure) for measure in MEASURES}
            self._known[subset] = {m: value.item() for m, value in means.items() if value is not None}
        return self._known[subset]

    def worth(self, subset: Subset, by: Measure) -> tuple[float, float]:
        """By AUC nothing is lacking: the AUC itself says it."""
        own = self.scores(subset)
        lack = 0.0 if by == "auc" or self.default is None else min(0.0, own["auc"] - self.default["auc"])
        return lack, own[by]

    def best_cell(self, by: Measure) -> Subset:
        """By its word maps."""
        means = self.cells.mean(by)
        assert means is not None, f"the cells were computed for another measure than {by}"
        words = means[TOKEN_MAPS.index("word")]
        layer, timestep = np.unravel_index(int(words.argmax()), words.shape)
        return (int(layer),), (int(timestep),)

    def climb(self, start: Subset, by: Measure, progress: Callable[[float], None]) -> list[Subset]:
        """The subsets from `start` to one that no single change makes better."""
        way = [start]
        while True:
            progress(self.scores(way[-1])[by])
            around = _neighbours(*way[-1], len(self.cells.layers), len(self.cells.timesteps), self.max_timesteps)
            following = max(around, key=lambda subset: self.worth(subset, by))
            if not is_worth_it(self.worth(way[-1], by), self.worth(following, by)):
                return way
            way.append(following)

    def named(self, subset: Subset) -> AttentionSubset:
        layers, timesteps = subset
        return AttentionSubset(
            tuple(self.cells.layers[i] for i in layers), tuple(self.cells.timesteps[i] for i in timesteps)
        )


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
    as long as one raises it by more than MIN_GAIN. By image_adds:
    - A subset with at least the AUC of the default is better than one with less, since a map of one layer may depend
      most on the image and yet find less. So changes raise the AUC first; one that reaches that of the default is made
      whatever it gains. If none is found on the way, the result has less.
    - A second search begins at the subset with the best AUC, and the better of both results is taken.

    progress: called with the value of each step. cells: computed for the measure `by`.
    """
    search = Search(cells, config, max_timesteps, device)
    ways = [search.climb(search.best_cell(by), by, progress)]
    if by != "auc":
        by_auc = search.climb(search.best_cell("auc"), "auc", progress)
        ways.append(search.climb(by_auc[-1], by, progress))
    best = max(ways, key=lambda way: search.worth(way[-1], by))
    steps = tuple((search.named(subset), search.scores(subset)) for subset in best)
    return Choice(*steps[-1], by, search.default, steps)


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
    with tqdm(desc=f"{label} choice", unit="change", disable=not accelerator.is_main_process) as bar:

        def progress(value: float) -> None:
            bar.set_postfix_str(f"{by} {value:.4f}")
            bar.update()

        choice = choose_subset(cells, own, max_timesteps, by, device=accelerator.device, progress=progress)
    chosen = time.perf_counter()
    result = compare_on_test(model, test, evaluation, choice.subset, folder=folder, **shared)
    if result is None:
        raise UserError("no test image has a region of a finding; the subset cannot be tested")
    ended = time.perf_counter()
    parts = {"cells": measured - began, "choice": chosen - measured, "test": ended - chosen}
    return {
        "layers": list(cells.layers),
        "timesteps": list(cells.timesteps),
        "validation": {
            "images": len({image_key(validation, image) for image in cells.pairs.images.tolist()}),
            "pairs": len(cells.pairs),
            **_tables(cells),
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
        "seconds": {part: round(seconds, 1) for part, seconds in parts.items()},
    }


def _tables(cells: Cells) -> JsonObject:
    """measure -> token map -> layer -> timestep: mean over findings; without the measures that no pair has."""
    return {
        measure: {token: table.tolist() for token, table in zip(TOKEN_MAPS, means.round(6), strict=True)}
        for measure in MEASURES
        if (means := cells.mean(measure)) is not None
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
