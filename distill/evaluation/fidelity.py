"""Numbers of generated images from their features: how real they are, over all and per finding, and whether they show
what their captions say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from distill.config import NO_LABEL, FullEvaluation
from distill.data.cache import model_fingerprint
from distill.data.captions import negated_findings
from distill.data.sample import ImageCaptionDataset
from distill.evaluation.results import FEWEST_IMAGES
from distill.files import JsonObject
from distill.metrics import FIDELITY, fidelity_resamples, finding_auroc, frechet_distance, frechet_interval
from distill.metrics.bootstrap import image_counts, numbered, percentile_interval
from distill.metrics.features import Features

CONDITIONAL = ("finding_auc", "finding_auc_negated", "finding_auc_unmentioned")
"""AUC of a classifier's scores of images whose captions state a finding, against all others, against those whose
captions negate it, and against those whose captions do not name it."""
RESAMPLES = 200


@dataclass(frozen=True)
class Generated:
    """What was scored of images, on the CPU, by data set index.

    labels: the findings of each image's caption. groups: the patient of each image, see `group_key`; whole groups are
    drawn in a bootstrap. Empty: each image is a group.
    """

    indices: list[int]
    features: torch.Tensor | None
    scores: torch.Tensor | None
    labels: Sequence[Sequence[str]] = ()
    groups: Sequence[str] = ()

    def numbered(self, places: Sequence[int] | None = None) -> NDArray[np.int64]:
        """The groups as numbers, of the images at `places` (None: all)."""
        places = range(len(self.indices)) if places is None else places
        return numbered([self.groups[place] if self.groups else str(place) for place in places])


def finding_labels(
    dataset: ImageCaptionDataset, indices: Sequence[int], features: Features
) -> tuple[list[int], torch.Tensor]:
    """Columns of the classifier's scores that are findings of the data, and (images, columns) bool: what captions
    say."""
    columns = [i for i, name in enumerate(features.findings) if name in {f.lower() for f in dataset.findings}]
    labels = [[features.findings[c] in {x.lower() for x in dataset.labels(i)} for c in columns] for i in indices]
    return columns, torch.tensor(labels)


def unknown_findings(dataset: ImageCaptionDataset, features: Features | None) -> list[str]:
    """Findings of the data that the classifier, if there is one, has no class for: finding AUC leaves them out."""
    known = features.findings if features else ()
    return [name for name in dataset.findings if known and name.lower() not in known]


def compare(
    generated: Generated,
    real: Generated,
    dataset: ImageCaptionDataset,
    config: FullEvaluation,
    features: Features | None,
    *,
    is_floor: bool = False,
) -> JsonObject:
    """FIDELITY of two sets of features, over all and per finding, and whether the first shows what its captions (rows
    of `dataset`) say; null where there is none.

    is_floor: `generated` are the real images, and `real` others: what the values are when nothing is wrong.
    """
    result: JsonObject = dict.fromkeys((*FIDELITY, *(f"{name}_ci" for name in FIDELITY)))
    result |= {f"{name}{end}": None for name in CONDITIONAL for end in ("", "_ci")}
    first, second = (generated, real) if is_floor else (real, generated)
    if first.features is not None and second.features is not None and min(len(first.indices), len(second.indices)) >= 2:
        result |= fidelity(first.features, second.features, config, [first.numbered(), second.numbered()])
    result |= of_each_finding(first, second, config, alike=is_floor)
    if features is not None and generated.scores is not None:
        result |= _conditional(generated, generated.scores, dataset, config, features, result["per_finding"] or {})
    used = {"features": features.name if features else None, "neighbours": config.neighbours}
    return result | {"images": len(generated.indices)} | used | {"extractor": _extractor(features, real)}


def _conditional(
    generated: Generated,
    scores: torch.Tensor,
    dataset: ImageCaptionDataset,
    config: FullEvaluation,
    features: Features,
    per_finding: Mapping[str, JsonObject],
) -> JsonObject:
    """CONDITIONAL with intervals; adds "finding_auc" to the entries of per_finding."""
    indices, groups = generated.indices, generated.numbered()
    columns, labels = finding_labels(dataset, indices, features)
    if not columns:
        return {}
    names, scores = [features.findings[column] for column in columns], scores[:, columns]
    absent = [{name.lower() for name in negated_findings(dataset, index)} for index in indices]
    negated = torch.tensor([[name in found for name in names] for found in absent])
    counted = zip(CONDITIONAL, (torch.ones_like(labels), labels | negated, labels | ~negated), strict=True)
    varied = [name for name, said in zip(names, labels.T, strict=True) if said.any() and not said.all()]
    result: JsonObject = {"finding_auc_of": varied}
    for key, rows in counted:
        result |= _area(key, scores, labels, rows, config, groups)
    for place, name in enumerate(names):
        if name in per_finding:
            one, said = scores[:, [place]], labels[:, [place]]
            per_finding[name].update(_area(CONDITIONAL[0], one, said, torch.ones_like(said), config, groups))
    return result


def _area(
    key: str,
    scores: torch.Tensor,
    labels: torch.Tensor,
    counted: torch.Tensor,
    config: FullEvaluation,
    groups: NDArray[np.int64],
) -> JsonObject:
    area = finding_auroc(scores, labels, config.bootstrap_samples, config.seed, counted=counted, groups=groups)
    return {key: area["auc"], f"{key}_ci": list(area["auc_ci"]) if area["auc_ci"] else None}


def _extractor(features: Features | None, real: Generated) -> JsonObject | None:
    """What FIDELITY rests on, besides the generated images."""
    if features is None or real.features is None:
        return None
    about = {"name": features.name, "weights": model_fingerprint(features), "resize": features.resize}
    return about | {"dimensions": real.features.shape[1], "real_images": len(real.indices)}


def fidelity(
    real: torch.Tensor, generated: torch.Tensor, config: FullEvaluation, groups: Sequence[NDArray[np.int64]]
) -> JsonObject:
    """FIDELITY, each with the interval of resamples of the groups of both sides. real: (N, d), generated: (M, d)."""
    found: JsonObject = {"fid": frechet_distance(real, generated)}
    samples = min(config.bootstrap_samples, RESAMPLES)
    interval = frechet_interval(real, generated, samples, config.seed, groups=groups)
    found["fid_ci"] = list(interval) if interval else None
    return found | _but_fid(real, generated, config, groups)


def _but_fid(
    real: torch.Tensor, generated: torch.Tensor, config: FullEvaluation, groups: Sequence[NDArray[np.int64]]
) -> JsonObject:
    """FIDELITY without FID, whose bias at few images is large."""
    samples, found = min(config.bootstrap_samples, RESAMPLES), dict[str, object]()
    counts = [
        np.concatenate(list(image_counts(side, samples, config.seed + place))) for place, side in enumerate(groups)
    ]
    several = all(side.max() > 0 for side in groups)
    for name, (value, resampled) in fidelity_resamples(real, generated, config.neighbours, *counts).items():
        interval = percentile_interval(resampled, 0.95) if several else None
        found |= {name: value, f"{name}_ci": list(interval) if interval else None}
    return found


def of_each_finding(
    real: Generated, generated: Generated, config: FullEvaluation, *, alike: bool = False
) -> JsonObject:
    """{"per_finding": finding in lower case -> FIDELITY without FID, "images" and "real_images"; "too_few": finding ->
    the smaller of these counts, where it is below FEWEST_IMAGES}. Both are None without features or labels.

    alike: take as many images of both sides, for real images against others: values depend on the number of images.
    """
    found: dict[str, JsonObject] = {}
    too_few: dict[str, int] = {}
    theirs, ours = _places(real.labels), _places(generated.labels)
    if real.features is None or generated.features is None or not (theirs and ours):
        return {"per_finding": None, "too_few": None}
    for name in sorted(theirs.keys() | ours.keys()):
        both = theirs.get(name, []), ours.get(name, [])
        fewest = min(map(len, both))
        if fewest < FEWEST_IMAGES:
            too_few[name] = fewest
            continue
        rows = [places[:fewest] if alike else places for places in both]
        groups = [side.numbered(places) for side, places in zip((real, generated), rows, strict=True)]
        measured = _but_fid(real.features[rows[0]], generated.features[rows[1]], config, groups)
        found[name] = measured | {"images": len(rows[1]), "real_images": len(rows[0])}
    return {"per_finding": found, "too_few": too_few}


def _places(labels: Sequence[Sequence[str]]) -> dict[str, list[int]]:
    """Finding in lower case -> places of its images; NO_LABEL: of those without. Empty where no image has a label."""
    found: dict[str, list[int]] = {}
    for place, names in enumerate(labels if any(labels) else ()):
        for name in {name.lower() for name in names} or {NO_LABEL}:
            found.setdefault(name, []).append(place)
    return found
