"""One comparison out of several training seeds of the same arms: means, paired differences, and their intervals.

A folder holds seed-N/, each a run folder of recipes/tradeoff.py. All arms of all seeds were evaluated on the same
images and, for generation, the same captions and noise, so that differences are paired. Intervals: two-level bootstrap,
seeds and images drawn with replacement (Field, Welsh 2007); with few seeds they show the spread of these seeds, not of
all seeds. What has an interval in each run, but is not resampled here, gets Student's t over seeds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file
from tqdm.auto import tqdm

from distill.config import FullEvaluation, TrainerConfig
from distill.configuration.changes import without_harmless
from distill.errors import UserError, raise_all
from distill.evaluation.causal import CAUSAL
from distill.evaluation.claims import student_interval
from distill.evaluation.image_adds import MAP_TOKENS, PAIR_MEASURES
from distill.files import JsonObject, read_json
from distill.metrics.bootstrap import (
    divide_or_nan,
    drawn_rows,
    image_counts,
    mean_of_defined,
    percentile_interval,
    resample_counts,
)
from distill.metrics.fidelity import FIDELITY, fidelity_resamples
from distill.metrics.quality import frechet_by_factors, weighted_auroc

Array = NDArray[np.float64]
Resamples = tuple[Array, Array]
"""Values of each seed, (seeds,), and of resamples, (samples, seeds)."""
TOKENS = (*MAP_TOKENS, *CAUSAL)
LOCALIZATION = ("auc", "cnr", "top1", "iou")
QUALITY = (*FIDELITY, "finding_auc", "diversity")
FRECHET_SAMPLES = 200
SHARES = {
    "auc", "top1", "iou", "within_prior", "precision", "recall", "coverage", "finding_auc", "finding_auc_negated",
    "finding_auc_unmentioned", "generated", "real", "both",
}  # fmt: skip
"""Measures in 0 .. 1, at which Student's intervals end."""


def run_folders(folder: Path) -> dict[int, Path]:
    """Training seed -> its complete run folder."""
    found = {int(path.name[5:]): path for path in folder.glob("seed-*") if re.fullmatch(r"seed-\d+", path.name)}
    return {seed: found[seed] for seed in sorted(found) if (found[seed] / "metrics.json").exists()}


def combine(folder: Path, samples: int | None = None, compare_to: Sequence[str] = ()) -> JsonObject:
    """metrics.json of `folder`: each arm's means over the seeds, `per_seed` values, and `paired` differences.

    samples: resamples of the bootstrap, by default as many as the runs had. compare_to: the arms that all others but
    the base are compared with, as far as they are there; else the first.
    Raises UserError if the seeds' runs differ in configuration, arms or images.
    """
    runs = run_folders(folder)
    if not runs:
        raise UserError(f"{folder} holds no complete seed-N folder")
    metrics = {seed: read_json(path / "metrics.json") for seed, path in runs.items()}
    first = next(iter(metrics.values()))
    faults = []
    for seed, one in metrics.items():
        if list(one["arms"]) != list(first["arms"]):
            faults.append(f"seed-{seed} has the arms {list(one['arms'])}, not {list(first['arms'])}")
        if _comparable(one) != _comparable(first):
            faults.append(f"seed-{seed} has another configuration, see its config.yaml")
    raise_all(f"{folder}: the seeds cannot be compared", faults)
    if samples is None:
        samples = int(first["provenance"]["config"].get("evaluation", {}).get("bootstrap_samples", 1000))
    found = Resampled(runs, first["arms"], samples)

    arms: JsonObject = {}
    for arm in first["arms"]:
        entries = [one["arms"][arm] for one in metrics.values()]
        arms[arm] = _mean(entries)
        arms[arm] |= _of_one_seed(list(runs), entries)
        arms[arm]["per_seed"] = {str(seed): _values(entry) for seed, entry in zip(runs, entries, strict=True)}
        for key, (_, interval, _) in found.estimates((arm,)).items():
            part, name = key.split(".")
            where = arms[arm]["quality"] if part == "quality" else (arms[arm]["localization"] or {}).get(part)
            if where is not None and where.get(name) is not None:
                where[f"{name}_ci"] = interval
    # In a comparison of several commands, the base is an arm like any other.
    names = [arm for arm in arms if arm != "base" or "arms" in first["provenance"]]
    # A budget may be too small for a baseline.
    compare_to = tuple(name for name in compare_to if name in arms) or tuple(names[:1]) or ("base",)
    paired = found.paired(names, compare_to)
    origin = dict(first["provenance"])
    single = origin["seeds"]["training"]  # a list: compare.py, of runs of a seed each
    origin["seeds"] = origin["seeds"] | {"training": single if isinstance(single, list) else list(runs)}
    origin["commits"] = sorted({one["provenance"]["commit"] or "" for one in metrics.values()})
    origin["seconds"] = {
        name: sum(one["provenance"]["seconds"].get(name, 0.0) for one in metrics.values())
        for name in first["provenance"]["seconds"]
    }
    return {"arms": arms, "real": first["real"], "paired": paired, "compare_to": list(compare_to), "provenance": origin}


@dataclass(frozen=True)
class PairScores:
    """Scores of every (sample, finding) pair of an arm. keys: (patient or image file, image, finding). scores: "word.auc" ->
    (pairs,), ..."""

    keys: Sequence[tuple[str, int, int]] = ()
    scores: Mapping[str, Array] = field(default_factory=dict)


class Resampled:
    """The scores and drawn images of arms, over one or several runs, resampled alike for every arm.

    runs: training seed -> run folder. arms: name -> entry of metrics.json. Raises UserError if the arms drew other
    captions.
    """

    def __init__(self, runs: Mapping[int, Path], arms: Mapping[str, Any], samples: int) -> None:
        self.seeds, self.samples = list(runs), samples
        # Files of a part that was not measured may be those of an earlier evaluation.
        self.scores = {
            arm: [_pairs(path / arm) if entry["localization"] else PairScores() for path in runs.values()]
            for arm, entry in arms.items()
        }
        drawn = {
            arm: [_images(path / arm) if (entry["quality"] or {}).get("features") else None for path in runs.values()]
            for arm, entry in arms.items()
        }
        real, faults = _images(next(iter(runs.values())) / "real"), []
        for arm, each in drawn.items():
            for seed, one in zip(runs, each, strict=True):
                if one is not None and real is not None and not np.array_equal(one["indices"], real["indices"]):
                    faults.append(
                        f"seed-{seed}: {arm} drew other captions than the real images of seed-{self.seeds[0]} have"
                    )
        raise_all("the arms cannot be compared", faults)
        located = next(iter(arms.values()))["localization"]
        self.micro = located is not None and located["word"].get("average") == "micro"
        labels = None if real is None or "labels" not in real else real["labels"].astype(bool)
        mixed = labels is not None and any(column.any() and not column.all() for column in labels.T)
        groups = np.arange(0 if real is None else len(real["indices"]))
        groups = groups if real is None else real.get("groups", groups)
        self.quality: dict[str, dict[str, Resamples]] = {}
        for arm, found_images in tqdm(drawn.items(), desc="resamples of images", unit="arm"):
            images = [one for one in found_images if one is not None]
            if real is None or len(images) < len(runs):
                continue
            own = self.quality[arm] = {}
            if groups.max() > 0:
                neighbours = arms[arm]["quality"].get("neighbours", FullEvaluation().neighbours)
                own |= feature_resamples(
                    [one["features"] for one in images], real["features"], samples, neighbours, groups
                )
            if labels is not None and mixed and groups.max() > 0 and all("scores" in one for one in images):
                own["finding_auc"] = auc_resamples([one["scores"] for one in images], labels, samples, groups)

    def paired(self, arms: Sequence[str], compare_to: Sequence[str]) -> JsonObject:
        """ "arm - baseline" -> metric -> {"value", "ci", "per_seed"} of the paired difference."""
        found: JsonObject = {}
        for other in compare_to:
            for arm in arms if other in self.scores else ():
                if arm == other or f"{other} - {arm}" in found:
                    continue
                found[f"{arm} - {other}"] = {
                    key: {
                        "value": value,
                        "ci": interval,
                        "per_seed": dict(zip(map(str, self.seeds), each, strict=True)),
                    }
                    for key, (value, interval, each) in self.estimates((arm, other)).items()
                }
        return found

    def estimates(self, arms: Sequence[str]) -> dict[str, tuple[float | None, list[float] | None, list[float]]]:
        """ "word.auc", ..., "quality.fid", ... -> mean over seeds, interval, value of each seed; of one arm, or of the
        difference of the first of two from the second."""
        return _estimates(self.scores, self.quality, arms, self.samples, self.micro)


def _comparable(metrics: JsonObject) -> JsonObject:
    config = metrics["provenance"]["config"]
    found = {key: value for key, value in config.items() if key not in ("seed", "seeds", "output_dir", "compare_to")}
    if "trainer" in found:
        found["trainer"] = without_harmless(found["trainer"], TrainerConfig)
    for group, free in (("data", ("cache_dir",)), ("evaluation", ("batch_size", "parts"))):
        if group in found:
            found[group] = {key: value for key, value in found[group].items() if key not in free}
    return found


def _values(entry: JsonObject) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for token in TOKENS if entry["localization"] else ():
        own = entry["localization"].get(token, {})
        found |= {f"{token}.{name}": own[name] for name in (*LOCALIZATION, *PAIR_MEASURES) if name in own}
    if entry["localization"]:
        found |= {f"mass.{name}": value for name, value in entry["localization"]["mass"].items()}
    quality = entry["quality"] or {}
    return found | {f"quality.{name}": quality.get(name) for name in QUALITY}


def _mean(entries: Sequence[Any]) -> Any:
    """Means of numbers at the same place, null where any is null; what is no number is the first's.

    An interval is kept where all seeds have the same, as the blind maps do. Else it is Student's t of the seeds' values,
    null where it is not defined: a mean of the seeds' intervals would be no interval of the mean.
    """
    first = entries[0]
    if any(entry is None for entry in entries):
        return None
    if isinstance(first, dict):
        each = {key: [entry.get(key) for entry in entries] for key in first}
        ends = {key: _interval(key[:-3], each.get(key[:-3], []), each[key]) for key in each if key.endswith("_ci")}
        return {key: ends[key] if key in ends else _mean(values) for key, values in each.items()}
    return float(np.mean(entries)) if isinstance(first, float) else first


def _of_one_seed(seeds: Sequence[int], entries: Sequence[JsonObject]) -> JsonObject:
    """What has no mean: the verdict on copies, which is that of the worst seed, and the look whose weights were kept."""
    found: JsonObject = {}
    verdicts: list[JsonObject] = [entry["memorization"] for entry in entries if entry.get("memorization")]
    if len(verdicts) == len(entries) > 1:

        def harmless(place: int) -> tuple[bool, float]:
            one = verdicts[place]
            return not one.get("near") or one["near_held_out"] > 0, min(one["p"], one.get("near_p", 1.0))

        worst = min(range(len(verdicts)), key=harmless)
        # Bonferroni: of several seeds without copies, the smallest p is small by chance.
        ps = {
            key: min(1.0, len(verdicts) * verdicts[worst][key])
            for key in ("p", "least_p", "near_p")
            if key in verdicts[worst]
        }
        found["memorization"] = verdicts[worst] | ps | {"seed": seeds[worst]}
    cost = entries[0].get("cost") or {}
    if "kept" in cost and any((entry.get("cost") or {}).get("kept") != cost["kept"] for entry in entries):
        found["cost"] = _mean([{k: v for k, v in entry["cost"].items() if k != "kept"} for entry in entries])
    return found


def _interval(name: str, values: Sequence[object], intervals: Sequence[object]) -> object:
    """values: of the seeds; where they are equal, they say nothing of their spread. intervals: of the seeds, over
    images."""
    if all(interval == intervals[0] for interval in intervals):
        return intervals[0]
    known = [value for value in values if isinstance(value, float)]
    found = student_interval(known) if len(known) == len(values) and len(set(known)) > 1 else None
    if found is None:
        return None
    return [min(max(end, 0.0), 1.0) for end in found] if name in SHARES else list(found)


def _pairs(arm_dir: Path) -> PairScores:
    path = arm_dir / "pairs.jsonl"
    if not path.exists():
        return PairScores()
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[1:]]
        return _scores_of(rows)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(path, error) from error


def damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} is damaged ({error!r}); start the recipe of its run again, which makes it anew")


def _scores_of(rows: list[JsonObject]) -> PairScores:
    rows.sort(key=lambda row: (row["query"], row["finding"]))
    groups = [str(row.get("group", row.get("cluster", row["image"]))) for row in rows]
    keys = [(group, int(row["image"]), int(row["finding"])) for group, row in zip(groups, rows, strict=True)]
    found: dict[str, Array] = {}
    for token in TOKENS:
        for name in LOCALIZATION:
            values = [row["scores"].get(token, {}).get(name) for row in rows]
            found[f"{token}.{name}"] = np.array([np.nan if v is None else v for v in values], dtype=np.float64)
        for name in PAIR_MEASURES:
            values = [row.get(name, {}).get(token) for row in rows]
            found[f"{token}.{name}"] = np.array([np.nan if v is None else v for v in values], dtype=np.float64)
    return PairScores(keys, found)


def _images(folder: Path) -> dict[str, NDArray[Any]] | None:
    path = folder / "features.safetensors"
    if not path.exists():
        return None
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise damaged(path, error) from error


def _estimates(
    scores: Mapping[str, Sequence[PairScores]],
    quality: Mapping[str, Mapping[str, Resamples]],
    arms: Sequence[str],
    samples: int,
    micro: bool,
) -> dict[str, tuple[float | None, list[float] | None, list[float]]]:
    """ "word.auc", ..., "quality.fid", ... -> mean over seeds, interval, value of each seed; of one arm, or of the
    difference of the first of two from the second. quality: arm -> metric. micro: means over pairs, not over
    findings."""
    found: dict[str, tuple[float | None, list[float] | None, list[float]]] = {}
    each = [entry.keys for arm in arms for entry in scores[arm]]
    keys = each[0] if all(each) else ()  # an arm may lack localization
    if keys and any(other != keys for other in each):
        raise UserError("the arms were scored on different images")
    for key in (f"{token}.{name}" for token in TOKENS for name in (*LOCALIZATION, *PAIR_MEASURES)) if keys else ():
        tables = [np.stack([entry.scores[key] for entry in scores[arm]]) for arm in arms]
        table = tables[0] - tables[1] if len(tables) == 2 else tables[0]
        usable = ~np.isnan(table).any(axis=0)  # a contrast may be infinite
        if usable.any():
            clusters, _, findings = (np.array(part)[usable] for part in zip(*keys, strict=True))
            groups = np.zeros_like(findings) if micro else findings
            found[key] = of_pairs(table[:, usable], groups, clusters, samples)
    drawn = [quality.get(arm, {}) for arm in arms]
    for name in QUALITY:
        if all(name in one for one in drawn):
            found[f"quality.{name}"] = of_resamples([one[name] for one in drawn], relative=name == "fid")
    return found


def _draw_seeds(samples: int, count: int) -> Array:
    """(samples, count): how often each seed is drawn, over count."""
    return np.concatenate(list(resample_counts(count, samples, 1))) / count


def of_pairs(
    table: Array, findings: NDArray[Any], images: NDArray[Any], samples: int
) -> tuple[float, list[float] | None, list[float]]:
    """table: (seeds, pairs). Mean over findings of the mean over pairs, of each seed and of their mean, and its
    interval."""
    image_ids, rows = np.unique(images, return_inverse=True)
    finding_ids, columns = np.unique(findings, return_inverse=True)
    sums = np.zeros((len(table), len(image_ids), len(finding_ids)))
    pairs = np.zeros(sums.shape[1:])
    for seed, values in enumerate(table):
        np.add.at(sums[seed], (rows, columns), values)
    np.add.at(pairs, (rows, columns), 1.0)
    each = (sums.sum(axis=1) / pairs.sum(axis=0)).mean(axis=1)
    if len(image_ids) < 2:
        return float(each.mean()), None, [float(v) for v in each]
    weights, done, statistics = _draw_seeds(samples, len(table)), 0, []
    for counts in resample_counts(len(image_ids), samples, 0):
        part = np.einsum("bi,sif,bs->bf", counts, sums, weights[done : done + len(counts)], optimize=True)
        statistics.append(mean_of_defined(divide_or_nan(part, counts @ pairs)))
        done += len(counts)
    interval = percentile_interval(np.concatenate(statistics), 0.95)
    return float(each.mean()), list(interval) if interval else None, [float(v) for v in each]


def auc_resamples(
    scores: Sequence[Array], labels: NDArray[np.bool_], samples: int, groups: NDArray[np.int64]
) -> tuple[Array, Array]:
    """Finding AUC of each seed, (seeds,), and of resamples of the images, (samples, seeds), the same for every arm.

    scores: (images, findings) a seed. Some column of labels (images, findings) must hold both classes. groups: (images,),
    which are drawn, see `bootstrap.numbered`.
    """
    usable = [i for i, column in enumerate(labels.T) if column.any() and not column.all()]

    def areas(one: Array, counts: Array) -> Array:
        columns = [weighted_auroc(one[:, i].astype(np.float64), labels[:, i], counts) for i in usable]
        return mean_of_defined(np.stack(columns, axis=1))

    exact = np.array([areas(one, np.ones((1, len(labels))))[0] for one in scores])
    blocks = [np.stack([areas(one, counts) for one in scores], axis=1) for counts in image_counts(groups, samples, 0)]
    return exact, np.concatenate(blocks)


def fid_resamples(
    features: Sequence[NDArray[Any]], real: NDArray[Any], samples: int, groups: NDArray[np.int64]
) -> tuple[Array, Array]:
    """FID of each seed, (seeds,), and of resamples of its images, (samples, seeds). features: (images, d) a seed.
    groups: (images,), which are drawn, see `bootstrap.numbered`.

    Generated images and their captions' real images are drawn together, the same for every arm and seed. The mean
    excess of resamples, which hold fewer different images, is taken off, as in `frechet_interval`.
    """
    target, generated = torch.from_numpy(real).double(), [torch.from_numpy(f).double() for f in features]
    exact = np.array([frechet_by_factors(target, f) for f in generated])
    generator = torch.Generator().manual_seed(0)
    resampled = np.empty((min(samples, FRECHET_SAMPLES), len(exact)))
    for sample in range(len(resampled)):
        rows = drawn_rows(groups, generator)
        resampled[sample] = [frechet_by_factors(target[rows], f[rows]) for f in generated]
    return exact, resampled + exact - resampled.mean(axis=0)


def feature_resamples(
    features: Sequence[Array], real: Array, samples: int, neighbours: int, groups: NDArray[np.int64]
) -> dict[str, Resamples]:
    """FIDELITY, as far as there are enough images -> values of each seed, (seeds,), and of resamples, (samples, seeds).

    Images are drawn as in `fid_resamples`. features: (images, d) a seed.
    """
    found = {"fid": fid_resamples(features, real, samples, groups)}
    counts = np.concatenate(list(image_counts(groups, min(samples, FRECHET_SAMPLES), 0)))
    target = torch.from_numpy(real)
    seeds = [fidelity_resamples(target, torch.from_numpy(one), neighbours, counts, counts) for one in features]
    for name in seeds[0]:
        exact, resampled = zip(*(seed[name] for seed in seeds), strict=True)
        found[name] = np.array(exact), np.stack(resampled, axis=1)
    return found


def of_resamples(sides: Sequence[Resamples], relative: bool = False) -> tuple[float, list[float] | None, list[float]]:
    """Mean over seeds of a value of one arm, or of the difference first - second (relative: first / second - 1) of two,
    its interval, and the value of each seed. sides: what fid_resamples or auc_resamples made of each arm."""

    def statistic(values: Sequence[Array]) -> Array:
        if len(values) == 1:
            return values[0]
        return values[0] / values[1] - 1 if relative else values[0] - values[1]

    weights = _draw_seeds(len(sides[0][1]), len(sides[0][0]))
    means = [(resampled * weights).sum(axis=1) for _, resampled in sides]
    interval = percentile_interval(statistic(means), 0.95)
    value = float(statistic([np.array(exact.mean()) for exact, _ in sides]))
    each = statistic([exact for exact, _ in sides])
    return value, list(interval) if interval else None, [float(v) for v in each]
