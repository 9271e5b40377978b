"""Does the attention on a finding's words cover the finding, in real held-out images? By a protocol of protocols.py.

Nothing is generated. Work is shared between the processes of `accelerate launch`; every process must call
`localization`. It writes each batch of scores to disk, so that the same call continues after a kill.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from tqdm.auto import tqdm

from distill.attention.heat_maps import normalize
from distill.attention.recording import attention_layers
from distill.config import FullEvaluation
from distill.data.cache import model_fingerprint
from distill.data.sample import ImageCaptionDataset, Sample, image_key
from distill.evaluation.image_adds import OTHER_IMAGES, finish_rows, packed_pairs, summary
from distill.evaluation.priors import priors
from distill.evaluation.protocols import (
    PROTOCOLS,
    Protocol,
    Query,
    at_size,
    ground_truths,
    open_recorder,
    prepare_inputs,
    queries,
    with_subset,
)
from distill.files import write_atomic, write_tensors
from distill.metrics import AttentionMass, LocalizationMetric, MixtureMetric, macro_mean_interval
from distill.metrics.maps import mixture_masks
from distill.models.family import Model

TOKEN_MAPS = ("word", "eos", "padding")


class Scores:
    """The metrics of every token map, filled by batches or from the files of an earlier, killed call.

    One line a pair: {"query", "image", "cluster" (see image_key), "finding", "scores": {token: {metric: number or null}},
    "mass": [4], "image_adds": {token: number or null}}. Until all pairs are scored, a line holds the pair's "maps" and
    "mask" in the place of "image_adds" (see image_adds.py).
    """

    def __init__(self, protocol: Protocol, config: FullEvaluation, device: torch.device) -> None:
        self.metrics = {
            token: {key: metric.to(device) for key, metric in protocol.metrics(config).items()} for token in TOKEN_MAPS
        }
        self.mass = AttentionMass().to(device)

    def restore(self, rows: Sequence[dict[str, Any]]) -> None:
        if not rows:
            return
        findings, images = [row["finding"] for row in rows], [row["image"] for row in rows]
        for token, metrics in self.metrics.items():
            for key, metric in metrics.items():
                values = [row["scores"][token][key] for row in rows]
                metric.restore([float("nan") if v is None else v for v in values], findings, images)
        by_query = {row["query"]: row["mass"] for row in rows}
        self.mass.update(torch.tensor(list(by_query.values()), dtype=torch.float64))


def score_rows(
    number: int,
    query: Query,
    sample: Sample,
    maps: torch.Tensor,
    mass: torch.Tensor,
    metrics: dict[str, dict[str, LocalizationMetric]],
    names: Sequence[str],
    config: FullEvaluation,
) -> list[dict[str, Any]]:
    """The lines of one query; maps: (4 + pairs, height, width)."""
    protocol = PROTOCOLS[config.protocol]
    masks, boxes = ground_truths(query, sample, names, config)
    masks = masks.to(maps.device)
    pairs = len(query.findings)
    word = maps[4 : 4 + pairs] if protocol.words == "finding" else maps[1:2]
    rows: list[dict[str, Any]] = [
        {"query": number, "image": query.image, "finding": f, "scores": {}, "mass": mass.tolist()} | packed
        for f, packed in zip(query.findings, packed_pairs(query, maps, masks, config), strict=True)
    ]
    for token, part in zip(TOKEN_MAPS, (word, maps[2:3], maps[3:4]), strict=True):
        full = at_size(normalize(part), masks.shape[-2:], config).expand(pairs, -1, -1)
        several = any(isinstance(metric, MixtureMetric) for metric in metrics[token].values())
        predicted = mixture_masks(full) if several else None
        for key, metric in metrics[token].items():
            for row, value in zip(rows, metric.pair_scores(full, masks, boxes, predicted).tolist(), strict=True):
                row["scores"].setdefault(token, {})[key] = value if np.isfinite(value) else None
    return rows


def _evaluation_key(model: Model, dataset: ImageCaptionDataset, asked: Sequence[Query], config: FullEvaluation) -> str:
    """Hash of everything that decides a line of the scores."""
    irrelevant = ("batch_size", "generated_images", "diversity_captions", "diversity_samples", "num_inference_steps",
                  "guidance_scale", "scheduler", "features", "bootstrap_samples", "examples")  # fmt: skip
    settings = {key: value for key, value in config.model_dump(mode="json").items() if key not in irrelevant}
    parts = [json.dumps(settings, sort_keys=True), f"{OTHER_IMAGES} other images"]
    parts += [model_fingerprint(module) for module in model.modules()]
    parts += [f"{dataset.fingerprint(q.image)}{q.truth}{q.text}{q.findings}{q.tokens}" for q in asked]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _read_rows(folder: Path, key: str) -> list[dict[str, Any]]:
    """Lines of earlier calls with the same key; a line that was cut off by a kill is left out."""
    found: dict[tuple[int, int], dict[str, Any]] = {}
    for path in sorted(folder.glob("pairs*.jsonl")):
        lines = path.read_text(encoding="utf-8").splitlines()
        if not lines or lines[0] != json.dumps({"key": key}):
            continue
        for line in lines[1:]:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            found[row["query"], row["finding"]] = row
    return [found[k] for k in sorted(found)]


@torch.no_grad()
def localization(
    model: Model,
    dataset: ImageCaptionDataset,
    config: FullEvaluation,
    *,
    accelerator: Accelerator,
    arm_dir: Path,
    examples: Sequence[int] = (),
    label: str = "",
    training: ImageCaptionDataset | None = None,
    priors_dir: Path | None = None,
) -> dict[str, Any] | None:
    """The `localization` entry of metrics.json, None without regions.

    Writes the examples' maps to maps.safetensors, and the scores of each pair to pairs.jsonl.
    priors_dir: adds the entry "priors" (see priors.py), kept there for the run's other models. training: for its mean masks.
    """
    asked = queries(dataset, model, config, accelerator)
    if not asked:
        return None
    config = with_subset(config, model)
    device, protocol = accelerator.device, PROTOCOLS[config.protocol]
    names = protocol.layers(attention_layers(model.denoiser, config.layers))
    scores = Scores(protocol, config, device)
    key = _evaluation_key(model, dataset, asked, config)
    earlier = _read_rows(arm_dir, key)
    complete = {q: sum(row["query"] == q for row in earlier) for q in {row["query"] for row in earlier}}
    shown = [n for n, q in enumerate(asked) if q.image in examples]
    have = {n for n, count in complete.items() if count == len(asked[n].findings)}
    has_maps = (arm_dir / "maps.safetensors").exists()
    if not has_maps:
        have -= set(shown)
    order = [*shown, *(n for n in range(len(asked)) if n not in set(shown))]
    todo = [n for n in order if n not in have]
    mine = todo[accelerator.process_index :: accelerator.num_processes]
    accelerator.wait_for_everyone()  # all have read the files that are written from here on
    if accelerator.is_main_process:
        scores.restore([row for row in earlier if row["query"] in have])
    kept: list[tuple[str, np.ndarray]] = []
    arm_dir.mkdir(parents=True, exist_ok=True)
    bar = tqdm(total=len(mine), desc=f"{label} maps", unit="image", disable=not (mine and accelerator.is_main_process))
    with ExitStack() as stack:
        log = stack.enter_context(_part_file(arm_dir, accelerator.process_index, key))
        recorder = open_recorder(stack, model, names, config)
        for start in range(0, len(mine), config.batch_size):
            numbers = mine[start : start + config.batch_size]
            batch = [asked[n] for n in numbers]
            samples = [dataset[query.image] for query in batch]
            inputs = prepare_inputs(model, samples, batch, device)
            recorder.cross.reduce = inputs.reduce
            maps, mass = protocol.maps(inputs, config, recorder)
            rows: list[dict[str, Any]] = []
            for number, query, sample, own, own_mass in zip(numbers, batch, samples, maps, mass, strict=True):
                own_rows = score_rows(number, query, sample, own, own_mass, scores.metrics, dataset.findings, config)
                rows += [row | {"cluster": image_key(dataset, query.image)} for row in own_rows]
                if number in shown:
                    word = own[4 : 4 + len(query.findings)]
                    for finding, image in zip(query.findings, normalize(word).cpu().numpy(), strict=True):
                        kept.append((f"{sample.id}/{dataset.findings[finding]}", image))
            scores.restore(rows)
            log.write("".join(json.dumps(row) + "\n" for row in rows))
            log.flush()
            bar.update(len(batch))
    bar.close()
    gathered = dict(gather_object(kept))
    if accelerator.is_main_process and gathered:
        tensors = {
            name: torch.from_numpy(np.ascontiguousarray(value, dtype=np.float32)) for name, value in gathered.items()
        }
        write_tensors(arm_dir / "maps.safetensors", tensors)
    result: dict[str, Any] = {token: _summary(metrics, dataset, config) for token, metrics in scores.metrics.items()}
    result["mass"] = {name: float(value) for name, value in scores.mass.compute().items()}
    result["protocol"] = config.protocol
    if config.protocol == "ours":
        result |= {"layers": list(names), "timesteps": list(config.timesteps or ())}
    accelerator.wait_for_everyone()
    added: list[Any] = [None]
    if accelerator.is_main_process:
        rows = finish_rows(_read_rows(arm_dir, key), dataset.findings, config, device)
        _merge(arm_dir, key, rows)
        added = [summary(rows, config)]
    broadcast_object_list(added)
    for token, entry in added[0].items():
        result[token] |= entry
    if priors_dir is not None:
        result["priors"] = priors(dataset, training, asked, config, accelerator=accelerator, folder=priors_dir)
    return result


def _part_file(arm_dir: Path, rank: int, key: str) -> Any:
    path = arm_dir / f"pairs.{rank}.jsonl"
    head = json.dumps({"key": key}) + "\n"
    if path.exists() and path.read_text(encoding="utf-8").startswith(head):
        file = path.open("a", encoding="utf-8")
        file.write("\n")  # ends a line that a kill cut off
        return file
    file = path.open("w", encoding="utf-8")
    file.write(head)
    return file


def _merge(arm_dir: Path, key: str, rows: Sequence[dict[str, Any]]) -> None:
    """One pairs.jsonl of all rows, in the place of the files of the processes."""
    write_atomic(arm_dir / "pairs.jsonl", "\n".join(json.dumps(line) for line in [{"key": key}, *rows]) + "\n")
    for path in arm_dir.glob("pairs.*.jsonl"):
        path.unlink()


def _summary(
    metrics: dict[str, LocalizationMetric], dataset: ImageCaptionDataset, config: FullEvaluation
) -> dict[str, Any]:
    result: dict[str, Any] = {"top1": None, "top1_ci": None, "iou": None, "iou_ci": None}
    micro: dict[str, Any] = {}
    macro: dict[str, Any] = {}
    for key, metric in metrics.items():
        values, findings, images = metric.values()
        clusters = np.array([image_key(dataset, i) for i in images.tolist()])
        groups = findings if metric.average == "macro" else np.zeros_like(findings)
        result[key] = float(metric.compute()) if len(values) else None
        interval = macro_mean_interval(values, groups, clusters, config.bootstrap_samples, config.seed)
        result[f"{key}_ci"] = list(interval) if interval else None
        micro[key] = float(values.mean()) if len(values) else None
        macro[key] = (
            float(np.mean([values[findings == f].mean() for f in set(findings.tolist())])) if len(values) else None
        )
    # Counts are those of the AUC; the CNR also leaves out maps whose contrast is infinite.
    values, _, images = metrics["auc"].values()
    result |= {"micro": micro, "macro": macro, "average": metrics["auc"].average}
    per_metric = {key: metric.per_finding(dataset.findings) for key, metric in metrics.items()}
    result["images"], result["pairs"] = len({image_key(dataset, i) for i in images.tolist()}), len(values)
    result["per_finding"] = {
        name: {"top1": None, "iou": None}
        | {key: found[name]["value"] for key, found in per_metric.items()}
        | {"pairs": entry["pairs"]}
        for name, entry in per_metric["auc"].items()
        if entry["pairs"]
    }
    return result
