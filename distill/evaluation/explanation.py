"""What is wrong with generated images, as numbers of explain.json: the detector against real images, against real
images that went through the VAE, and the control of real against real."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from distill.data.sample import ImageCaptionDataset, group_key, image_key
from distill.errors import raise_all
from distill.evaluation import detection
from distill.evaluation.detection import KINDS, NAMES, Estimate, Explained, Fold, Pair, Rows
from distill.evaluation.images import save_png
from distill.files import JsonObject, write_json
from distill.metrics.image_features import FEATURES
from distill.models.family import Model

GENERATED, VAE, BEYOND, CONTROL = (
    "generated against real", "real through the VAE against real", "generated against real through the VAE",
    "real against real",
)  # fmt: skip
"""Names of the comparisons in explain.json."""
SHOWN = 5
"""Features whose partial dependence is measured, and parts of a single image's explanation."""


class Pictures(NamedTuple):
    """image: places -> (N, 3, height, width) in [-1, 1]. groups: of each picture, see `detection.Rows`. names: of each,
    its file or caption; empty where they have none."""

    image: Callable[[Sequence[int]], torch.Tensor]
    groups: Sequence[str]
    names: Sequence[str] = ()


def one_of_each_image(dataset: ImageCaptionDataset, order: Sequence[int], count: int) -> list[int]:
    """Indices, in this order, of the first sample of each of the first `count` images."""
    first: dict[str, int] = {}
    for index in order:
        first.setdefault(image_key(dataset, index), index)
        if len(first) == count:
            break
    return list(first.values())


def real_pictures(dataset: ImageCaptionDataset, rows: Sequence[int]) -> Pictures:
    return Pictures(
        lambda places: torch.stack([dataset[rows[place]].pixel_values for place in places]),
        [group_key(dataset, row) for row in rows],
    )


def check_groups(real: Sequence[str], count: int, sets: Sequence[Sequence[str]]) -> None:
    """Raise UserError without scikit-learn, and with all faults of `detection.group_faults`."""
    detection.check_installed()
    raise_all("too few images for a detector", detection.group_faults(real, count, sets))


def explain(
    real: Pictures,
    count: int,
    sets: Sequence[Pictures],
    *,
    seed: int,
    batch_size: int,
    accelerator: Accelerator,
    gray: bool | None = None,
    model: Model | None = None,
) -> dict[str, JsonObject]:
    """The comparisons of explain.json, by name. All processes call this.

    real: of which the first `count` are compared, and all serve the control. gray: see `measure`; None: where all real
    images are. model: also send the compared images through its VAE.
    """

    def rows(pictures: Pictures, label: str, gray: bool) -> Rows:
        return measure(pictures, batch_size=batch_size, accelerator=accelerator, label=label, gray=gray)

    everyone = rows(real, "real images", bool(gray))
    gray = is_gray(everyone) if gray is None else gray
    first = everyone.first(count)
    generated = [rows(pictures, f"generated set {number}", gray) for number, pictures in enumerate(sets, 1)]
    jobs = {GENERATED: [Pair(first, other) for other in generated]}
    if model is not None:
        vae = model
        decoded = Pictures(lambda places: detection.through_vae(vae, real.image(places)), real.groups[:count])
        after = rows(decoded, "real images through the VAE", gray)
        jobs |= {VAE: [Pair(first, after)], BEYOND: [Pair(after, other) for other in generated]}
    jobs[CONTROL] = detection.halves(everyone, 3, seed)
    mine = list(jobs)[accelerator.process_index :: accelerator.num_processes]
    made = dict(gather_object([(name, compare(jobs[name], seed, images=name == GENERATED)) for name in mine]))
    found: dict[str, JsonObject] = {name: made[name] for name in jobs}
    found[GENERATED] |= {"gray": gray, "spread": max(other.spread for other in generated)}
    for example in found[GENERATED]["examples"] if sets[0].names else ():
        example["name"] = sets[0].names[example["image"]]
    return found


def needed(entry: JsonObject, count: int = 3) -> list[JsonObject]:
    """The first features that the detector surely uses: the interval of their importance is above 0."""
    return [feature for feature in entry["features"] if feature["importance_ci"][0] > 0][:count]


EXPLAINED = "explain.json"


def write_explained(arm_dir: Path, comparisons: Mapping[str, JsonObject], pictures: Pictures) -> None:
    """explain.json of one model, and the single images that it explains, explained/*.png. On the main process."""
    write_json(arm_dir / EXPLAINED, {"comparisons": comparisons})
    for path in (arm_dir / "explained").glob("*.png"):
        path.unlink()
    places = [example["image"] for example in comparisons[GENERATED]["examples"]]
    for number, image in enumerate(pictures.image(places)):
        save_png((image + 1) / 2, arm_dir / "explained" / f"{number}.png")


def summary(comparisons: Mapping[str, JsonObject]) -> JsonObject:
    """The part `explanation` of metrics.json."""
    main, control = comparisons[GENERATED], comparisons[CONTROL]
    return {
        "auc": main["auc"], "auc_ci": main["auc_ci"], "real": control["auc"], "real_ci": control["auc_ci"],
        "images": main["images"]["other"], "told_by": [feature["name"] for feature in needed(main)],
    }  # fmt: skip


def measure(pictures: Pictures, *, batch_size: int, accelerator: Accelerator, label: str, gray: bool) -> Rows:
    """Rows of all pictures, shared between the processes.

    gray: take the mean of the channels first, before they are rounded: a mean of rounded channels has finer levels than
    a gray file.
    """
    mine = range(accelerator.process_index, len(pictures.groups), accelerator.num_processes)
    found: list[tuple[int, np.ndarray, float]] = []
    for start in tqdm(range(0, len(mine), batch_size), desc=label, disable=not accelerator.is_main_process):
        places = list(mine[start : start + batch_size])
        images = pictures.image(places)
        spreads = 127.5 * (images.amax(dim=1) - images.amin(dim=1)).mean(dim=(1, 2))
        images = images.mean(dim=1, keepdim=True).expand_as(images) if gray else images
        rows = Rows.of(images, [pictures.groups[place] for place in places])
        found += zip(places, rows.values, spreads.tolist(), strict=True)
    everyone = sorted(gather_object(found), key=lambda row: row[0])
    values, spread = np.stack([row[1] for row in everyone]), float(np.median([row[2] for row in everyone]))
    return Rows(values, np.asarray(pictures.groups, dtype=str), spread)


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
