"""What localization costs and gives: recorded passes, protocols, and several processes."""

from __future__ import annotations

import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from tqdm.auto import tqdm

from distill.attention.heat_maps import aggregate, normalize, select_tokens
from distill.attention.recording import attention_layers, record_attention
from distill.config import BaseConfig, FullEvaluation
from distill.data.loading import load_dataset
from distill.data.sample import ImageCaptionDataset, group_key
from distill.data_config import AnyData
from distill.errors import UserError
from distill.evaluation.evaluate import finite
from distill.evaluation.localization import localization
from distill.evaluation.protocols import (
    PROTOCOLS,
    Inputs,
    Recorder,
    ddim_timesteps,
    ground_truth,
    ours,
    prepare_inputs,
    queries,
    with_subset,
)
from distill.experiment.benchmark_memory import Row, forward_inputs, full_size, memory_of_steps, seconds_of
from distill.experiment.fresh_process import Parts
from distill.experiment.run import quiet_libraries
from distill.metrics import PixelAUROC, macro_mean_interval
from distill.metrics.bootstrap import numbered
from distill.models import Model, load_model


def paper_way(inputs: Inputs, config: FullEvaluation) -> torch.Tensor:
    """Maps as Dombrowski et al. make them.

    50 sequential steps; the heads' mean of all places and tokens of every layer and step is kept on the device, as
    their code does, and the last 40 are averaged at 64 x 64.
    """
    model, kept = inputs.model, []
    family, noise = model.family, inputs.noise(50, config.seed)
    with record_attention(model.denoiser) as maps:
        for place, timestep in enumerate(ddim_timesteps(model, 50)):
            noisy = family.add_noise(model, inputs.latents, noise[:, place], inputs.steps(timestep))
            family.predict(model.denoiser, noisy, inputs.steps(timestep), inputs.conditions)
            kept.append(maps.take())
            maps.start()
    steps = [
        aggregate({name: p @ inputs.chosen for name, p in step.items()}, maps.sizes, (64, 64), mode="nearest")
        for step in kept[10:]
    ]
    return torch.stack(steps).mean(dim=0)


@torch.no_grad()
def against_paper(model: Model, dataset: ImageCaptionDataset, config: FullEvaluation, device: torch.device) -> Row:
    """Seconds an image from image and caption to maps, and the AUC of the same pairs, of ours and of the paper's
    way."""
    config = with_subset(config, model)
    assert config.timesteps is not None
    asked = queries(dataset, model, config)
    metric = PixelAUROC()
    scores: dict[str, list[tuple[float, int, int]]] = {"ours": [], "paper": []}
    spent: dict[str, list[float]] = {"ours": [], "paper": []}
    names = attention_layers(model.denoiser, config.layers)
    starts = range(0, len(asked), config.batch_size)
    for start in tqdm(starts, desc="ours and the paper's way", unit="batch"):
        batch = asked[start : start + config.batch_size]
        samples = [dataset[query.image] for query in batch]

        def fast(batch: Any = batch, samples: Any = samples) -> torch.Tensor:
            inputs = prepare_inputs(model, samples, batch, device)
            with record_attention(model.denoiser, names, inputs.reduce) as maps:
                return ours(inputs, config, Recorder(maps))[0]

        def slow(batch: Any = batch, samples: Any = samples) -> torch.Tensor:
            return paper_way(prepare_inputs(model, samples, batch, device), config)

        if start == 0:
            fast()  # warm-up
        for name, call in (("ours", fast), ("paper", slow)):
            maps, seconds = seconds_of(call, device)
            spent[name].append(seconds / len(batch))
            for query, sample, own in zip(batch, samples, maps.cpu(), strict=True):
                regions = {region.finding: region for region in sample.regions}
                side = sample.pixel_values.shape[-1]
                masks = [ground_truth(regions[dataset.findings[f]], side, side, "mask")[0] for f in query.findings]
                part = normalize(own[4 : 4 + len(masks)])[None]
                part = nn.functional.interpolate(part, (side, side), mode="bilinear", align_corners=False)[0]
                values = metric.pair_scores(part, torch.stack(masks))
                scores[name] += [(float(v), f, query.image) for v, f in zip(values, query.findings, strict=True)]
    result: Row = {
        "images": len({q.image for q in asked}),
        "pairs": len(scores["ours"]),
        "batch_size": config.batch_size,
    }
    result |= {"layers": names, "timesteps": list(config.timesteps)}
    for name, rows in scores.items():
        areas, findings, images = zip(*rows, strict=True)
        groups = numbered([group_key(dataset, image) for image in images])
        by_finding = [[v for v, f in zip(areas, findings, strict=True) if f == g] for g in sorted(set(findings))]
        result[f"auc_{name}"] = statistics.fmean(statistics.fmean(part) for part in by_finding)
        result[f"seconds_{name}"] = statistics.median(spent[name])
        interval = macro_mean_interval(areas, findings, groups, config.bootstrap_samples, config.seed)
        result[f"auc_{name}_ci"] = list(interval or ()) or None
    difference = [a[0] - b[0] for a, b in zip(scores["ours"], scores["paper"], strict=True)]
    interval = macro_mean_interval(difference, findings, groups, config.bootstrap_samples, config.seed)
    return result | {
        "auc_difference_ci": list(interval or ()) or None,
        "speedup_vs_paper": result["seconds_paper"] / result["seconds_ours"],
    }


@torch.no_grad()
def overheads(model: Model, batch_size: int, repeats: int, device: torch.device) -> Row:
    """Time that recording adds to a forward pass, as a share of the plain pass (SDPA) on the same batch.

    Two words are recorded at all layers, by this project and by the peer, in turns, each with its maps computed. With
    the peer, also how far the maps are apart.
    """
    prompts = [f"There is a small pleural effusion and an edema, view {i}." for i in range(batch_size)]
    words = ("effusion", "edema")
    chosen = select_tokens(model.tokenizers, prompts, words)
    columns = [list(names).index(word) for names in chosen.names[:1] for word in words]
    tokens = [int(chosen.matrix[0, :, column].nonzero()[0]) for column in columns]
    reduce = replace(chosen, matrix=chosen.matrix[:, :, columns].to(device)).reduce()
    inputs = forward_inputs(model.denoiser, len(prompts), model.denoiser.config.sample_size, device)
    peer = importlib.import_module("attention_map_diffusers") if _has_peer() else None
    seen: Row = {}

    def plain() -> None:
        model.denoiser(**inputs)

    def recorded() -> None:
        with record_attention(model.denoiser, reduce=reduce) as maps:
            model.denoiser(**inputs)
        seen["ours"] = maps.by_layer

    def theirs(**options: Any) -> None:
        assert peer is not None
        with peer.AttentionCapture(model.pipeline, relations="image->text", tokens=tokens, **options) as capture:
            model.denoiser(**inputs)
            seen["peer"] = capture.compute()

    ways: dict[str, Callable[[], None]] = {"plain": plain, "ours": recorded}
    if peer is not None:
        ways |= {"peer": theirs, "peer exact": lambda: theirs(mode="exact")}
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for turn in tqdm(range(repeats + 2), desc="recorded forward passes", unit="turn"):
        for name, call in ways.items():
            seconds = seconds_of(call, device)[1]
            if turn >= 2:
                spent[name].append(seconds)
    # Neighbours in time are compared, so that a slow moment of the machine hits both.
    ratio = {n: statistics.median(a / b for a, b in zip(t, spent["plain"], strict=True)) - 1 for n, t in spent.items()}
    result: Row = {
        "batch_size": len(prompts),
        "repeats": repeats,
        "seconds_plain": statistics.median(spent["plain"]),
        "record_overhead": ratio["ours"],
        "peer_overhead": min((ratio[n] for n in ratio if n.startswith("peer")), default=None),
        "peer_overhead_by_mode": {n: r for n, r in ratio.items() if n.startswith("peer")},
        "peer_version": getattr(peer, "__version__", None),
    }
    if peer is not None:
        result["map_difference"] = max(_peer_difference(seen["ours"], record) for record in seen["peer"])
    return result


def _has_peer() -> bool:
    try:
        importlib.import_module("attention_map_diffusers")
    except ImportError:
        return False
    return True


def _peer_difference(mine: dict[str, torch.Tensor], record: Any) -> float:
    """Largest difference of a layer's maps of the two words."""
    name = record.layer_id.removeprefix("unet.")
    theirs = record.data.float()
    theirs = theirs.reshape(*mine[name].shape)
    return float((theirs.to(mine[name].device) - mine[name]).abs().max())


def scale(recipe: Path, options: Sequence[str], output_dir: Path) -> Row:
    """Time and metrics of recipes/evaluate.py by one process of one thread, and by two.

    options: of the recipe, all but the output_dir.
    """
    results = {}
    for count in (1, 2):
        folder = output_dir / f"processes-{count}"
        command = [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            "--num_processes",
            str(count),
            "--num_machines",
            "1",
        ]
        command += ["--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1"]
        # accelerate's name for "several processes on this machine", with or without GPUs; --cpu would start one.
        command += ["--multi_gpu"] if count > 1 else []
        command += [str(recipe), *options, f"--output_dir={folder}"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        environment |= {} if torch.cuda.is_available() else {"ACCELERATE_USE_CPU": "true"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        if metrics["provenance"]["processes"] != count:
            raise RuntimeError(f"{metrics['provenance']['processes']} processes ran, and {count} were asked for")
        results[count] = metrics["arms"]["base"]
    one, two = (results[count]["localization"] for count in (1, 2))
    return {
        "seconds_1": results[1]["cost"]["localization_seconds"],
        "seconds_2": results[2]["cost"]["localization_seconds"],
        "time_2_over_1": results[2]["cost"]["localization_seconds"] / results[1]["cost"]["localization_seconds"],
        "largest_difference": max(abs(a - b) for a, b in zip(_numbers(one), _numbers(two), strict=True)),
    }


def _numbers(value: object) -> Iterator[float]:
    if isinstance(value, dict):
        for key in sorted(value):
            yield from _numbers(value[key])
    elif isinstance(value, list):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, float):
        yield value


def protocol(
    model: Model, dataset: ImageCaptionDataset, config: FullEvaluation, folder: Path, accelerator: Accelerator
) -> Row | None:
    """config.protocol with its own metrics."""
    began, name = time.perf_counter(), config.protocol
    result = localization(model, dataset, config, accelerator=accelerator, arm_dir=folder / name, label=name)
    return result and result | {"seconds": time.perf_counter() - began}


@dataclass(frozen=True)
class Subject:
    """What is measured; each part loads it in a process of its own."""

    base: BaseConfig
    run: str | None
    data: AnyData
    evaluation: FullEvaluation
    folder: Path

    def open(self) -> tuple[Model, Accelerator]:
        quiet_libraries()
        accelerator = Accelerator()
        return load_model(self.base, self.run).to(accelerator.device).freeze(), accelerator

    def overhead(self, repeats: int) -> Row:
        model, accelerator = self.open()
        return overheads(model, self.evaluation.batch_size, repeats, accelerator.device)

    def paper(self) -> Row:
        model, accelerator = self.open()
        return against_paper(model, load_dataset(self.data, "test"), self.evaluation, accelerator.device)

    def protocol(self, name: str) -> Row | None:
        model, accelerator = self.open()
        own = self.evaluation.model_copy(update={"protocol": name})
        return protocol(model, load_dataset(self.data, "test"), own, self.folder, accelerator)


Job = tuple[Callable[..., Row | None], tuple[object, ...]]


def jobs_of(
    subject: Subject, parts: Sequence[str], *, repeats: int, budget_gb: float, recipe: Path, options: Sequence[str]
) -> dict[str, Job]:
    """Name -> function and arguments of each measurement. recipe, options: see `scale`."""
    jobs: dict[str, Job] = {}
    if "overhead" in parts:
        jobs["overhead"] = (subject.overhead, (repeats,))
    if "paper" in parts:
        jobs["paper"] = (subject.paper, ())
    for steps in (1, 50) if "memory" in parts else ():
        jobs[f"memory.steps_{steps}"] = (memory_of_steps, (subject.base, subject.run, steps))
    for name in PROTOCOLS if "protocols" in parts else ():
        jobs[f"protocols.{name}"] = (subject.protocol, (name,))
    if "scale" in parts:
        jobs["scale"] = (scale, (recipe, options, subject.folder))
    if "full_size" in parts:
        jobs["full_size"] = (full_size, (budget_gb, torch.float32))
        if torch.cuda.is_available():
            jobs["full_size_bf16"] = (full_size, (budget_gb, torch.bfloat16))
    return jobs


def measure(jobs: Mapping[str, Job], limit_minutes: float, write: Callable[[Row], object]) -> Row:
    """Part -> its numbers, by the names of the jobs; a job gets an equal share of the time that is left. What fails or
    takes longer is in "failed". write: called with all that is known after each."""
    results: Row = {"failed": {}}
    parts = Parts(limit_minutes, results["failed"], lambda: write(results))
    for done, (name, (function, arguments)) in enumerate(jobs.items()):
        found = parts.fresh(name, function, *arguments, share=1 / (len(jobs) - done))
        if name in parts.failed:
            continue
        part, _, entry = name.partition(".")
        if entry:
            results.setdefault(part, {})[entry] = finite(found)
        else:
            results[part] = finite(found)
        if name == "memory.steps_50" and "steps_1" in results["memory"]:
            one, many = results["memory"]["steps_1"], results["memory"]["steps_50"]
            ratio = max(many["peak_gb"] / one["peak_gb"], many["held_bytes"] / one["held_bytes"])
            results["memory"]["memory_50_over_1"] = ratio
        write(results)
    return results
