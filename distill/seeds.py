"""One comparison out of several training seeds of the same arms: means, paired differences, and their intervals.

A folder holds seed-N/, each a run folder of recipes/tradeoff.py. All arms of all seeds were evaluated on the same images
and, for generation, the same captions and noise, so that differences are paired. Intervals: two-level bootstrap, seeds and
images drawn with replacement (Field, Welsh 2007); with few seeds they show the spread of these seeds, not of all seeds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file

from distill.components import read_json
from distill.errors import UserError, raise_all
from distill.metrics.bootstrap import divide_or_nan, mean_of_defined, percentile_interval, resample_counts
from distill.metrics.quality import frechet_by_factors, weighted_auroc

Array = NDArray[np.float64]
TOKENS = ("word", "eos", "padding")
LOCALIZATION = ("auc", "cnr", "top1", "iou")
REFERENCES = ("frozen", "learnable")
FRECHET_SAMPLES = 200


def run_folders(folder: Path) -> dict[int, Path]:
    """Training seed -> its complete run folder."""
    found = {int(path.name[5:]): path for path in folder.glob("seed-*") if re.fullmatch(r"seed-\d+", path.name)}
    return {seed: found[seed] for seed in sorted(found) if (found[seed] / "metrics.json").exists()}


def combine(folder: Path, samples: int = 1000) -> dict[str, Any]:
    """metrics.json of `folder`: each arm's means over the seeds, `per_seed` values, and `paired` differences.

    Raises UserError if the seeds' runs differ in configuration, arms or images.
    """
    runs = run_folders(folder)
    if not runs:
        raise UserError(f"{folder} holds no complete seed-N folder")
    metrics = {seed: read_json(path / "metrics.json") for seed, path in runs.items()}
    first = next(iter(metrics.values()))
    faults = []
    for seed, found in metrics.items():
        if list(found["arms"]) != list(first["arms"]):
            faults.append(f"seed-{seed} has the arms {list(found['arms'])}, not {list(first['arms'])}")
        if _comparable(found) != _comparable(first):
            faults.append(f"seed-{seed} has another configuration, see its config.yaml")
    raise_all(f"{folder}: the seeds cannot be compared", faults)
    scores = {arm: [_pairs(path / arm) for path in runs.values()] for arm in first["arms"]}
    drawn = {arm: [_images(path / arm) for path in runs.values()] for arm in first["arms"]}
    real = _images(next(iter(runs.values())) / "real")
    labels = None if real is None or "labels" not in real else real["labels"].astype(bool)

    arms: dict[str, Any] = {}
    for arm in first["arms"]:
        entries = [found["arms"][arm] for found in metrics.values()]
        arms[arm] = _mean(entries)
        arms[arm]["per_seed"] = {str(seed): _values(entry) for seed, entry in zip(runs, entries, strict=True)}
        for key, (_, interval, _) in _estimates(scores[arm], drawn[arm], real, labels, None, samples).items():
            part, name = key.split(".")
            where = arms[arm]["quality"] if part == "quality" else (arms[arm]["localization"] or {}).get(part)
            if where is not None and where.get(name) is not None:
                where[f"{name}_ci"] = interval
    paired: dict[str, Any] = {}
    for other in REFERENCES:
        for arm in arms:
            if other not in arms or arm in ("base", other) or f"{other} - {arm}" in paired:
                continue
            estimates = _estimates(scores[arm], drawn[arm], real, labels, (scores[other], drawn[other]), samples)
            paired[f"{arm} - {other}"] = {
                key: {"value": value, "ci": interval, "per_seed": dict(zip(map(str, runs), each, strict=True))}
                for key, (value, interval, each) in estimates.items()
            }
    origin = dict(first["provenance"])
    origin["seeds"] = origin["seeds"] | {"training": list(runs)}
    origin["commits"] = sorted({found["provenance"]["commit"] or "" for found in metrics.values()})
    origin["seconds"] = {
        name: sum(found["provenance"]["seconds"].get(name, 0.0) for found in metrics.values())
        for name in first["provenance"]["seconds"]
    }
    return {"arms": arms, "real": first["real"], "paired": paired, "provenance": origin}


def _comparable(metrics: dict[str, Any]) -> dict[str, Any]:
    config = metrics["provenance"]["config"]
    return {key: value for key, value in config.items() if key not in ("seed", "seeds", "output_dir")}


def _values(entry: dict[str, Any]) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for token in TOKENS if entry["localization"] else ():
        found |= {f"{token}.{name}": entry["localization"][token][name] for name in LOCALIZATION}
    if entry["localization"]:
        found |= {f"mass.{name}": value for name, value in entry["localization"]["mass"].items()}
    return found | {f"quality.{name}": entry["quality"][name] for name in ("fid", "finding_auc", "diversity")}


def _mean(entries: Sequence[Any]) -> Any:
    """Means of numbers at the same place, null where any is null; what is no number is the first's."""
    first = entries[0]
    if isinstance(first, dict):
        return {key: _mean([entry.get(key) for entry in entries]) for key in first}
    if any(entry is None for entry in entries):
        return None
    if isinstance(first, float):
        return float(np.mean(entries))
    if isinstance(first, list) and len(first) == 2 and all(isinstance(v, float) for v in first):
        return [float(v) for v in np.mean(entries, axis=0)]
    return first


def _pairs(arm_dir: Path) -> dict[str, Any]:
    """Scores of every (image, finding) pair of an arm: {"keys": [(image, finding)], "word.auc": (pairs,), ...}."""
    path = arm_dir / "pairs.jsonl"
    if not path.exists():
        return {"keys": []}
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[1:]]
    rows.sort(key=lambda row: (row["query"], row["finding"]))
    found: dict[str, Any] = {"keys": [(row["image"], row["finding"]) for row in rows]}
    for token in TOKENS:
        for name in LOCALIZATION:
            values = [row["scores"][token].get(name) for row in rows]
            found[f"{token}.{name}"] = np.array([np.nan if v is None else v for v in values], dtype=np.float64)
    return found


def _images(folder: Path) -> dict[str, NDArray[Any]] | None:
    path = folder / "features.safetensors"
    return load_file(path) if path.exists() else None


def _estimates(
    scores: Sequence[dict[str, Any]],
    drawn: Sequence[dict[str, NDArray[Any]] | None],
    real: dict[str, NDArray[Any]] | None,
    labels: NDArray[np.bool_] | None,
    other: tuple[Sequence[dict[str, Any]], Sequence[dict[str, NDArray[Any]] | None]] | None,
    samples: int,
) -> dict[str, tuple[float | None, list[float] | None, list[float]]]:
    """ "word.auc", ..., "quality.fid", "quality.finding_auc" -> mean over seeds, interval, value of each seed; of the
    difference to `other` if that is given."""
    found: dict[str, tuple[float | None, list[float] | None, list[float]]] = {}
    keys = scores[0]["keys"]
    compared = [*scores, *(other[0] if other else ())]
    if any(entry["keys"] != keys for entry in compared):
        raise UserError("the arms were scored on different images")
    for key in (f"{token}.{name}" for token in TOKENS for name in LOCALIZATION) if keys else ():
        table = np.stack([entry[key] for entry in scores])
        if other:
            table = table - np.stack([entry[key] for entry in other[0]])
        usable = ~np.isnan(table).any(axis=0)  # a contrast may be infinite
        if usable.any():
            images, findings = (np.array(part)[usable] for part in zip(*keys, strict=True))
            found[key] = of_pairs(table[:, usable], findings, images, samples)
    if real is None or any(entry is None for entry in (*drawn, *(other[1] if other else ()))):
        return found
    sides = [[entry["features"] for entry in drawn if entry is not None]]
    scored = [[entry["scores"] for entry in drawn if entry is not None and "scores" in entry]]
    if other:
        sides.append([entry["features"] for entry in other[1] if entry is not None])
        scored.append([entry["scores"] for entry in other[1] if entry is not None and "scores" in entry])
    found["quality.fid"] = of_features(sides, real["features"], min(samples, FRECHET_SAMPLES))
    if labels is not None and scored[0]:
        found["quality.finding_auc"] = of_classifier(scored, labels, samples)
    return found


def _draw_seeds(samples: int, count: int) -> Array:
    """(samples, count): how often each seed is drawn, over count."""
    return next(resample_counts(count, samples, 1)) / count


def of_pairs(
    table: Array, findings: NDArray[Any], images: NDArray[Any], samples: int
) -> tuple[float, list[float] | None, list[float]]:
    """table: (seeds, pairs). Mean over findings of the mean over pairs, of each seed and of their mean, and its interval."""
    image_ids, rows = np.unique(images, return_inverse=True)
    finding_ids, columns = np.unique(findings, return_inverse=True)
    sums = np.zeros((len(table), len(image_ids), len(finding_ids)))
    pairs = np.zeros(sums.shape[1:])
    for seed, values in enumerate(table):
        np.add.at(sums[seed], (rows, columns), values)
    np.add.at(pairs, (rows, columns), 1.0)
    each = (sums.sum(axis=1) / pairs.sum(axis=0)).mean(axis=1)
    weights, done, statistics = _draw_seeds(samples, len(table)), 0, []
    for counts in resample_counts(len(image_ids), samples, 0):
        part = np.einsum("bi,sif,bs->bf", counts, sums, weights[done : done + len(counts)], optimize=True)
        statistics.append(mean_of_defined(divide_or_nan(part, counts @ pairs)))
        done += len(counts)
    interval = percentile_interval(np.concatenate(statistics), 0.95)
    return float(each.mean()), list(interval) if interval else None, [float(v) for v in each]


def of_classifier(
    sides: Sequence[Sequence[Array]], labels: NDArray[np.bool_], samples: int
) -> tuple[float, list[float] | None, list[float]]:
    """Finding AUC, or its difference of two sides. sides: for each one (images, findings) scores a seed."""
    usable = [i for i, column in enumerate(labels.T) if column.any() and not column.all()]

    def areas(scores: Array, counts: Array) -> Array:
        columns = [weighted_auroc(scores[:, i].astype(np.float64), labels[:, i], counts) for i in usable]
        return mean_of_defined(np.stack(columns, axis=1))

    one = np.ones((1, len(labels)))
    each = np.array([areas(s, one)[0] for s in sides[0]])
    if len(sides) == 2:
        each = each - np.array([areas(s, one)[0] for s in sides[1]])
    weights, done, statistics = _draw_seeds(samples, len(each)), 0, []
    for counts in resample_counts(len(labels), samples, 0):
        values = np.stack([areas(s, counts) for s in sides[0]], axis=1)
        if len(sides) == 2:
            values = values - np.stack([areas(s, counts) for s in sides[1]], axis=1)
        statistics.append((values * weights[done : done + len(counts)]).sum(axis=1))
        done += len(counts)
    interval = percentile_interval(np.concatenate(statistics), 0.95)
    return float(each.mean()), list(interval) if interval else None, [float(v) for v in each]


def of_features(
    sides: Sequence[Sequence[NDArray[Any]]], real: NDArray[Any], samples: int
) -> tuple[float, list[float] | None, list[float]]:
    """FID, or its relative difference first / second - 1 of two sides. sides: for each one (images, d) features a seed.

    Generated images and their captions' real images are drawn together. The mean excess of resamples, which hold fewer
    different images, is taken off, as in `frechet_interval`.
    """
    target = torch.from_numpy(real).double()
    features = [[torch.from_numpy(f).double() for f in side] for side in sides]
    exact = np.array([[frechet_by_factors(target, f) for f in side] for side in features])  # (sides, seeds)

    def statistic(distances: Array) -> Array:
        """(sides, ...) -> (...)."""
        return distances[0] if len(distances) == 1 else distances[0] / distances[1] - 1

    generator = torch.Generator().manual_seed(0)
    resampled = np.empty((samples, *exact.shape))
    for sample in range(samples):
        rows = torch.randint(len(target), (len(target),), generator=generator)
        resampled[sample] = [[frechet_by_factors(target[rows], f[rows]) for f in side] for side in features]
    resampled += exact - resampled.mean(axis=0)
    weights = _draw_seeds(samples, exact.shape[1])
    means = np.einsum("bks,bs->kb", resampled, weights)
    interval = percentile_interval(statistic(means), 0.95)
    value = float(statistic(exact.mean(axis=1)))
    return value, list(interval) if interval else None, [float(v) for v in statistic(exact)]
