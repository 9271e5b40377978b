"""What is wrong with generated images, as numbers of explain.json: the detector against real images, against real
images that went through the VAE, and the control of real against real."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from distill.data.sample import ImageCaptionDataset, image_key
from distill.evaluation import detection
from distill.evaluation.detection import KINDS, NAMES, Estimate, Explained, Fold, Pair, Rows
from distill.files import JsonObject
from distill.metrics.image_features import FEATURES

SHOWN = 5
"""Features whose partial dependence is measured, and parts of a single image's explanation."""


def one_of_each_image(dataset: ImageCaptionDataset, count: int) -> list[int]:
    """Indices of the first sample of each of the first `count` images."""
    first: dict[str, int] = {}
    for index in range(len(dataset)):
        first.setdefault(image_key(dataset, index), index)
        if len(first) == count:
            break
    return list(first.values())


def measure(
    picture: Callable[[Sequence[int]], torch.Tensor],
    groups: Sequence[str],
    *,
    batch_size: int,
    accelerator: Accelerator,
    label: str,
    gray: bool,
) -> Rows:
    """Rows of len(groups) images, shared between the processes. picture: places -> (N, 3, height, width) in [-1, 1].

    gray: take the mean of the channels first, before they are rounded: a mean of rounded channels has finer levels than
    a gray file.
    """
    mine = range(accelerator.process_index, len(groups), accelerator.num_processes)
    found: list[tuple[int, np.ndarray]] = []
    for start in tqdm(range(0, len(mine), batch_size), desc=label, disable=not accelerator.is_main_process):
        places = list(mine[start : start + batch_size])
        images = picture(places)
        images = images.mean(dim=1, keepdim=True).expand_as(images) if gray else images
        rows = Rows.of(images, [groups[place] for place in places])
        found += zip(places, rows.values, strict=True)
    everyone = sorted(gather_object(found), key=lambda pair: pair[0])
    return Rows(np.stack([values for _, values in everyone]), np.asarray(groups, dtype=str))


def is_gray(rows: Rows) -> bool:
    """Whether no image has any colour."""
    return not rows.values[:, NAMES.index("colour saturation")].any()


def compare(pairs: Sequence[Pair], seed: int, *, images: bool = False) -> JsonObject:
    """An entry of explain.json: AUC, and every feature with its importance, most important first.

    pairs: real rows, and as many other sets of rows as there are. images: also partial dependence, single images, and
    what would have to change.
    """
    folds = detection.train_detectors(pairs, seed)
    alone = detection.importance(folds, [[place] for place in range(len(NAMES))], seed)
    columns = [[place for place, feature in enumerate(FEATURES) if feature.kind == kind] for kind in KINDS]
    kinds = zip(KINDS, detection.importance(folds, columns, seed), strict=True)
    order = sorted(range(len(NAMES)), key=lambda place: -alone[place].value)
    entry: JsonObject = {
        **_estimate("auc", detection.auc(folds)),
        "per_set": [detection.auc([f for f in folds if f.of == number]).value for number in range(len(pairs))],
        "images": {"real": len(pairs[0].real), "other": len(pairs[0].other), "sets": len(pairs)},
        "features": [_feature(pairs, place, alone[place]) for place in order],
        "kinds": [
            {"name": kind} | _estimate("importance", found) for kind, found in sorted(kinds, key=lambda k: -k[1].value)
        ],
    }
    used = [place for place in order if alone[place].value > 0] or order[:1]
    return entry | _explained(pairs, folds, used[:SHOWN]) if images else entry


def _estimate(name: str, found: Estimate) -> JsonObject:
    return {name: found.value, f"{name}_ci": list(found.interval)}


def _feature(pairs: Sequence[Pair], place: int, importance: Estimate) -> JsonObject:
    """auc_alone: how well this feature alone tells the two apart, .5 to 1. real, other: medians."""
    areas, medians = [], []
    for pair in pairs:
        columns = [side.values[:, place] for side in pair]
        columns = [column[~np.isnan(column)] for column in columns]
        if all(map(len, columns)):
            is_other = np.arange(sum(map(len, columns))) >= len(columns[0])
            areas.append(detection.area_under_curve(is_other, np.concatenate(columns)))
            medians.append([float(np.median(column)) for column in columns])
    area = float(np.mean(areas)) if areas else 0.5
    real, other = np.mean(medians, axis=0).tolist() if medians else (None, None)
    found = {"name": NAMES[place], "kind": FEATURES[place].kind, **_estimate("importance", importance)}
    return found | {"auc_alone": max(area, 1 - area), "real": real, "other": other}


def _explained(pairs: Sequence[Pair], folds: Sequence[Fold], columns: Sequence[int]) -> JsonObject:
    curves = [(column, *detection.partial_dependence(folds, column)) for column in columns]
    found = sorted(detection.explain_images(pairs, folds), key=lambda image: -image.score)
    detected = [image for image in found if image.score >= 0.5]
    changes = [NAMES[image.change.column] for image in detected if image.change]
    shares = {name: changes.count(name) / len(detected) for name in dict.fromkeys(changes)}
    return {
        "dependence": [
            {"name": NAMES[column], "values": grid.tolist(), "probability": curve.tolist()}
            for column, grid, curve in curves
        ],
        "changes": {
            "detected": len(detected),
            "one_change_is_enough": len(changes) / len(detected) if detected else None,
            "features": dict(sorted(shares.items(), key=lambda pair: -pair[1])),
        },
        "examples": [_example(found[place]) for place in dict.fromkeys((0, len(found) // 2, len(found) - 1))],
    }


def _example(image: Explained) -> JsonObject:
    """parts: the features that add most to the logit of not being real, by TreeSHAP."""
    order = [place for place in np.argsort(-np.abs(image.added))[:SHOWN] if image.added[place]]
    change = image.change
    return {
        "image": image.row,
        "score": image.score,
        "parts": [{"name": NAMES[place], "logit": float(image.added[place])} for place in order],
        "change": {"name": NAMES[change.column], "before": change.before, "after": change.after} if change else None,
    }
