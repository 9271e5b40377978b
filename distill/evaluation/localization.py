"""Does the attention on a finding's words cover the finding, in real held-out images? By a protocol of protocols.py.

Nothing is generated. Work is shared between the processes of `accelerate launch`; every process must call
`localization`. It writes each batch of scores to disk, so that a later call makes only what is missing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm

from distill.attention.heat_maps import normalize
from distill.attention.recording import attention_layers
from distill.config import FullEvaluation
from distill.data.sample import ImageCaptionDataset, Sample, group_key, image_key, patient_of
from distill.evaluation.causal import causal_maps
from distill.evaluation.image_adds import MAP_TOKENS, finish_rows, map_tokens, packed_pairs, summary
from distill.evaluation.kept import Batches, Kept, digest, weights_of
from distill.evaluation.priors import MeanMasks, mean_masks, priors
from distill.evaluation.protocols import (
    PROTOCOLS,
    Protocol,
    Query,
    RealLatents,
    Recorder,
    at_size,
    ground_truths,
    open_recorder,
    prepare_inputs,
    queries,
    with_subset,
)
from distill.evaluation.within_prior import within_priors
from distill.files import JsonObject, write_atomic, write_tensors
from distill.metrics import AttentionMass, LocalizationMetric, MixtureMetric, macro_mean_interval
from distill.metrics.maps import mixture_masks
from distill.models.bits import check_finite
from distill.models.family import Model

TOKEN_MAPS = MAP_TOKENS
MAPS_FILE = "maps.safetensors"


class Scores:
    """The metrics of every token map, filled from the lines of pairs.

    One line a pair: {"query", "image", "cluster" (see image_key), "group" (see group_key, where it is another),
    "finding", "scores": {token: {metric: number or null}}, "mass": [4], "image_adds": {token: number or null}}.
    scored.jsonl holds the pair's "maps" and "mask" in the place of "image_adds" (see image_adds.py), because images that
    are added later are compared with them.
    """

    def __init__(self, protocol: Protocol, config: FullEvaluation, device: torch.device) -> None:
        self.metrics = {
            token: {key: metric.to(device) for key, metric in protocol.metrics(config).items()}
            for token in map_tokens(config)
        }
        self.mass = AttentionMass().to(device)

    def restore(self, rows: Sequence[JsonObject]) -> None:
        if not rows:
            return
        findings, images = [row["finding"] for row in rows], [row["image"] for row in rows]
        for token, metrics in self.metrics.items():
            for key, metric in metrics.items():
                values = [row["scores"][token][key] for row in rows]
                metric.restore([float("nan") if v is None else v for v in values], findings, images)
        by_query = {row["query"]: row["mass"] for row in rows}
        self.mass.update(torch.tensor(list(by_query.values()), dtype=torch.float64))


@dataclass(frozen=True)
class Recorded:
    """What was recorded of one query. maps: (4 + pairs, height, width). causal: (pairs, 2, height, width)."""

    number: int
    query: Query
    sample: Sample
    maps: torch.Tensor
    mass: torch.Tensor
    causal: torch.Tensor | None

    def parts(self, config: FullEvaluation) -> list[torch.Tensor]:
        """For each of `map_tokens` its maps: one, or one a pair."""
        several = PROTOCOLS[config.protocol].words == "finding"
        word = self.maps[4 : 4 + len(self.query.findings)] if several else self.maps[1:2]
        return [word, self.maps[2:3], self.maps[3:4], *(() if self.causal is None else self.causal.unbind(dim=1))]


PIXELS_AT_ONCE = 2**22
"""Of the maps that are scored together; a float64 copy of them takes 32 MB, and a metric makes several."""


def score_rows(
    found: Sequence[Recorded],
    metrics: dict[str, dict[str, LocalizationMetric]],
    names: Sequence[str],
    config: FullEvaluation,
    device: torch.device,
) -> list[list[JsonObject]]:
    """For each query its lines. The maps are on the CPU; those of one size are scored together on `device`."""
    truths = [ground_truths(one.query, one.sample, names, config) for one in found]
    rows: list[list[JsonObject]] = [
        [
            {"query": one.number, "image": one.query.image, "finding": f, "scores": {}, "mass": one.mass.tolist()}
            | packed
            for f, packed in zip(
                one.query.findings, packed_pairs(one.query, one.maps, masks, config, one.causal), strict=True
            )
        ]
        for one, (masks, _) in zip(found, truths, strict=True)
    ]
    for together in _of_one_size([masks for masks, _ in truths]):
        masks = torch.cat([truths[place][0] for place in together]).to(device)
        boxes = [box for place in together for box in truths[place][1]]
        lines = [line for place in together for line in rows[place]]
        for token, *parts in zip(map_tokens(config), *(found[place].parts(config) for place in together), strict=True):
            pairs = [len(rows[place]) for place in together]
            # A map that serves all pairs of its query is resized once.
            owner = torch.repeat_interleave(
                torch.arange(sum(map(len, parts))),
                torch.tensor([n for part, n in zip(parts, pairs, strict=True) for n in _shares(len(part), n)]),
            )
            full = at_size(normalize(torch.cat(parts).to(device)), masks.shape[-2:], config)[owner.to(device)]
            several = any(isinstance(metric, MixtureMetric) for metric in metrics[token].values())
            predicted = mixture_masks(full) if several else None
            for key, metric in metrics[token].items():
                for line, value in zip(lines, metric.pair_scores(full, masks, boxes, predicted).tolist(), strict=True):
                    line["scores"].setdefault(token, {})[key] = value if np.isfinite(value) else None
    return rows


def _shares(maps: int, pairs: int) -> list[int]:
    """How many pairs each map of a query serves."""
    return [1] * maps if maps == pairs else [pairs]


def _of_one_size(masks: Sequence[torch.Tensor]) -> Iterator[list[int]]:
    """Places of masks of one size, at most PIXELS_AT_ONCE together."""
    by_size: dict[torch.Size, list[int]] = {}
    for place, own in enumerate(masks):
        by_size.setdefault(own.shape[1:], []).append(place)
    for size, places in by_size.items():
        chunk: list[int] = []
        for place in places:
            if chunk and sum(len(masks[p]) for p in [*chunk, place]) * size.numel() > PIXELS_AT_ONCE:
                yield chunk
                chunk = []
            chunk.append(place)
        yield chunk


OF_ROWS_IRRELEVANT = (
    "batch_size", "generated_images", "diversity_captions", "diversity_samples", "num_inference_steps", "guidance_scale",
    "scheduler", "features", "neighbours", "bootstrap_samples", "examples", "localization_images", "parts",
    "memorization_limit",
)  # fmt: skip
"""Options of evaluation that change no score of an image."""


def rows_key(config: FullEvaluation, weights: str) -> str:
    """Hash of what decides the score of an image besides the image."""
    settings = {k: v for k, v in config.model_dump(mode="json").items() if k not in OF_ROWS_IRRELEVANT}
    return digest(settings, weights)


def query_key(dataset: ImageCaptionDataset, query: Query) -> str:
    """Hash of all of a data set that decides the scores of a query."""
    image = [query.image, dataset.fingerprint(query.image), image_key(dataset, query.image), query.truth]
    image += [patient] if (patient := patient_of(dataset, query.image)) else []
    names = [dataset.findings[finding] for finding in query.findings]
    return digest(image, query.text, query.findings, names, query.tokens)


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
    weights: str | None = None,
    latents: RealLatents | None = None,
) -> JsonObject | None:
    """The `localization` entry of metrics.json, None without regions.

    Writes the examples' maps to maps.safetensors, and the scores of each pair to pairs.jsonl. Scores of an earlier call
    in `arm_dir` are used again where all that decides them is the same.
    priors_dir: adds the entry "priors" (see priors.py), kept there for the run's other models. training: for its mean
    masks. weights: see kept.weights_of, before the weights were quantized. latents: of earlier models on the same data.
    """
    asked = queries(dataset, model, config, accelerator)
    if not asked:
        return None
    config = with_subset(config, model)
    names = PROTOCOLS[config.protocol].layers(attention_layers(model.denoiser, config.layers))
    weights = weights or weights_of(model)
    rows = _scored_rows(
        model, dataset, asked, config, names, weights,
        accelerator=accelerator, arm_dir=arm_dir, examples=examples, label=label, latents=latents,
    )  # fmt: skip
    scores = Scores(PROTOCOLS[config.protocol], config, accelerator.device)
    if accelerator.is_main_process:
        for start in range(0, len(asked), config.batch_size):
            scores.restore([row for row in rows if start <= row["query"] < start + config.batch_size])
    result: JsonObject = {token: _summary(metrics, dataset, config) for token, metrics in scores.metrics.items()}
    result["mass"] = {name: float(value) for name, value in scores.mass.compute().items()}
    result["protocol"] = config.protocol
    if config.protocol == "ours":
        result |= {"layers": list(names), "timesteps": list(config.timesteps or ())}
    means = MeanMasks()
    if priors_dir is not None and training is not None:
        means = mean_masks(training, dataset, asked, config, accelerator, priors_dir)
    added: list[Any] = [None]
    if accelerator.is_main_process:
        within = within_priors(rows, dataset.findings, means.masks, config, accelerator.device)
        finished = finish_rows(rows, dataset.findings, config, accelerator.device)
        finished = [row | {"within_prior": own} for row, own in zip(finished, within, strict=True)]
        lines = [json.dumps(line) for line in [{"key": rows_key(config, weights)}, *finished]]
        write_atomic(arm_dir / "pairs.jsonl", "\n".join(lines) + "\n")
        added = [summary(finished, config)]
    broadcast_object_list(added)
    for token, entry in added[0].items():
        result[token] |= entry
    if priors_dir is not None:
        result["priors"] = priors(dataset, training, asked, config, accelerator=accelerator, folder=priors_dir)
    return result


def _scored_rows(
    model: Model,
    dataset: ImageCaptionDataset,
    asked: Sequence[Query],
    config: FullEvaluation,
    names: Sequence[str],
    weights: str,
    *,
    accelerator: Accelerator,
    arm_dir: Path,
    examples: Sequence[int],
    label: str,
    latents: RealLatents | None,
) -> list[JsonObject]:
    """The lines of all pairs with their maps, in order, on the main process; also writes the examples' maps."""
    key, hashes = rows_key(config, weights), [query_key(dataset, query) for query in asked]
    shown = [n for n, query in enumerate(asked) if query.image in examples]
    order = [*shown, *(n for n in range(len(asked)) if n not in set(shown))]
    kept, maps = Kept(arm_dir, "scored", key, accelerator.process_index), _read_maps(arm_dir / MAPS_FILE, key)
    usable = {place: kept.entries[hashes[n]] for place, n in enumerate(order) if hashes[n] in kept.entries}
    names_of = {n: _map_names(dataset, asked[n]) for n in shown}
    for place, n in enumerate(shown):
        if not maps.keys() >= set(names_of[n]):
            usable.pop(place, None)
    batches = Batches(
        [hashes[n] for n in order], config.batch_size, rank=accelerator.process_index, world=accelerator.num_processes
    )
    missing = batches.missing(usable)
    accelerator.wait_for_everyone()  # all have read the files that are written from here on
    count = sum(map(len, missing))
    bar = tqdm(total=count, desc=f"{label} maps", unit="image", disable=not (count and accelerator.is_main_process))
    drawn: dict[str, torch.Tensor] = {}
    with ExitStack() as stack:
        stack.callback(kept.close)
        recorder = open_recorder(stack, model, names, config) if missing else None
        scores = Scores(PROTOCOLS[config.protocol], config, accelerator.device)
        for places in missing:
            assert recorder is not None
            recorded = _record(model, dataset, asked, [order[place] for place in places], config, recorder, latents)
            of_batch = score_rows(recorded, scores.metrics, dataset.findings, config, accelerator.device)
            for one, rows in zip(recorded, of_batch, strict=True):
                rows = [row | _clusters(dataset, one.query.image) for row in rows]
                kept.add({"made_of": hashes[one.number], "rows": rows} | batches.mark(places))
                if one.number in names_of:
                    word = normalize(one.maps[4 : 4 + len(one.query.findings)])
                    drawn |= {name: m.contiguous() for name, m in zip(names_of[one.number], word, strict=False)}
            bar.update(len(places))
    bar.close()
    gathered = dict(gather_object(list(drawn.items())))
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return []
    if names_of:
        all_maps = maps | gathered
        tensors = {name: all_maps[name] for names in names_of.values() for name in names}
        write_tensors(arm_dir / MAPS_FILE, tensors, {"key": key})
    kept.merge()
    entries = kept.read()
    return [row | {"query": n} for n, made_of in enumerate(hashes) for row in entries[made_of]["rows"]]


def _record(
    model: Model,
    dataset: ImageCaptionDataset,
    asked: Sequence[Query],
    numbers: Sequence[int],
    config: FullEvaluation,
    recorder: Recorder,
    latents: RealLatents | None,
) -> list[Recorded]:
    """The maps of one batch of queries, `numbers` of `asked`, on the CPU. The causal ones if config.causal is set."""
    batch = [asked[n] for n in numbers]
    samples = [dataset[query.image] for query in batch]
    inputs = prepare_inputs(model, samples, batch, model.denoiser.device, latents)
    recorder.cross.reduce = inputs.reduce
    maps, mass = PROTOCOLS[config.protocol].maps(inputs, config, recorder)
    maps = maps.float().cpu()
    check_finite(maps, config.dtype, "the maps")
    causal = causal_maps(inputs, batch, config, recorder.cross) if config.causal else [None] * len(batch)
    on_cpu = [one if one is None else one.cpu() for one in causal]
    # One transfer of the masses for the batch: a wait for each would leave the device idle.
    return [Recorded(*one) for one in zip(numbers, batch, samples, maps, mass.cpu(), on_cpu, strict=True)]


def _clusters(dataset: ImageCaptionDataset, image: int) -> JsonObject:
    """What intervals draw as one: "cluster" (see image_key), and "group" (see group_key) where there are patients."""
    keys = {"cluster": image_key(dataset, image)}
    return keys | ({"group": group_key(dataset, image)} if patient_of(dataset, image) else {})


def _map_names(dataset: ImageCaptionDataset, query: Query) -> list[str]:
    """Names of a query's maps in maps.safetensors."""
    return [f"{dataset[query.image].id}/{dataset.findings[finding]}" for finding in query.findings]


def _read_maps(path: Path, key: str) -> dict[str, torch.Tensor]:
    """The maps of an earlier call with the same key; empty where there are none, or the file is damaged."""
    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("key") != key:
                return {}
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return {}


def _summary(
    metrics: dict[str, LocalizationMetric], dataset: ImageCaptionDataset, config: FullEvaluation
) -> JsonObject:
    result: JsonObject = {"top1": None, "top1_ci": None, "iou": None, "iou_ci": None}
    micro: JsonObject = {}
    macro: JsonObject = {}
    for key, metric in metrics.items():
        values, findings, images = metric.values()
        clusters = np.array([group_key(dataset, i) for i in images.tolist()])
        groups = findings if metric.average == "macro" else np.zeros_like(findings)
        result[key] = float(metric.compute()) if len(values) else None
        interval = macro_mean_interval(values, groups, clusters, config.bootstrap_samples, config.seed)
        result[f"{key}_ci"] = list(interval) if interval else None
        micro[key] = float(values.mean()) if len(values) else None
        macro[key] = (
            float(np.mean([values[findings == f].mean() for f in set(findings.tolist())])) if len(values) else None
        )
    # Counts are those of the AUC; the CNR also leaves out maps whose contrast is infinite.
    values, findings, images = metrics["auc"].values()
    clusters = np.array([group_key(dataset, i) for i in images.tolist()])
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
    for index, name in enumerate(dataset.findings):
        if name in result["per_finding"]:
            own = findings == index
            of_finding = (values[own], findings[own], clusters[own])
            interval = macro_mean_interval(*of_finding, config.bootstrap_samples, config.seed)
            result["per_finding"][name]["auc_ci"] = list(interval) if interval else None
    return result
