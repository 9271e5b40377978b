"""What localization costs, and what it gives: ours beside the paper's way and beside attention-map-diffusers, in one run.

    accelerate launch recipes/benchmark_localization.py --config recipes/configs/phantom/benchmark_localization.yaml

The last line is one JSON object. The peer needs torchvision: install both it and this project in an environment of its
own (pip install torch==2.14.1 torchvision==0.29.1 attention-map-diffusers) and run this recipe there; without it
`peer_overhead` is null.
"""

from __future__ import annotations

import importlib
import json
import math
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from torch import nn
from tqdm.auto import tqdm

from distill.attention.heat_maps import aggregate, normalize, record_pipeline, select_tokens
from distill.attention.recording import attention_layers, record_attention
from distill.cli import main, to_yaml
from distill.config import BenchmarkLocalizationConfig, EvaluationConfig
from distill.data.loading import load_dataset
from distill.errors import UserError
from distill.evaluation.evaluate import finite
from distill.evaluation.localization import localization
from distill.evaluation.protocols import (
    Inputs,
    Recorder,
    ddim_timesteps,
    ground_truth,
    ours,
    prepare_inputs,
    queries,
    with_subset,
)
from distill.files import provenance, write_json
from distill.metrics import PixelAUROC, macro_mean_interval
from distill.models.family import Model
from distill.models.loading import load_model
from distill.runs import quiet_libraries
from distill.trainer import peak_memory_gb

IGNORED = {f"evaluation.{name}": "the benchmark is of the model as it is" for name in ("quantization", "scheduler")}

Row = dict[str, Any]


def paper_way(inputs: Inputs, config: EvaluationConfig) -> torch.Tensor:
    """As Dombrowski et al. do it: 50 sequential steps, the probabilities of all heads, places and tokens of every layer
    and step kept, then the last 40 averaged at 64 x 64."""
    model, kept = inputs.model, []
    family, noise = model.family, inputs.noise(50, config.seed)
    with record_attention(model.denoiser, reduce=lambda probabilities: probabilities.cpu()) as maps:
        for place, timestep in enumerate(ddim_timesteps(model, 50)):
            noisy = family.add_noise(model, inputs.latents, noise[:, place], inputs.steps(timestep))
            family.predict(model.denoiser, noisy, inputs.steps(timestep), inputs.conditions)
            kept.append(maps.take())
            maps.start()
    chosen = inputs.chosen.cpu()
    steps = [
        aggregate({name: p.mean(dim=1) @ chosen for name, p in step.items()}, maps.sizes, (64, 64), mode="nearest")
        for step in kept[10:]
    ]
    return torch.stack(steps).mean(dim=0)


def seconds_of(call: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    began = time.perf_counter()
    result = call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return result, time.perf_counter() - began


@torch.no_grad()
def against_paper(model: Model, dataset: Any, config: EvaluationConfig, device: torch.device) -> Row:
    """Seconds an image from image and caption to maps, and the AUC of the same pairs, of ours and of the paper's way."""
    config = with_subset(config, model)
    assert config.timesteps is not None
    asked = queries(dataset, model, config)
    metric, scores, spent = PixelAUROC(), {"ours": [], "paper": []}, {"ours": [], "paper": []}
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
        values, findings, images = zip(*rows, strict=True)
        by_finding = [[v for v, f in zip(values, findings, strict=True) if f == g] for g in sorted(set(findings))]
        result[f"auc_{name}"] = statistics.fmean(statistics.fmean(part) for part in by_finding)
        result[f"seconds_{name}"] = statistics.median(spent[name])
        interval = macro_mean_interval(values, findings, images, config.bootstrap_samples, config.seed)
        result[f"auc_{name}_ci"] = list(interval or ()) or None
    difference = [a[0] - b[0] for a, b in zip(scores["ours"], scores["paper"], strict=True)]
    interval = macro_mean_interval(difference, findings, images, config.bootstrap_samples, config.seed)
    return result | {
        "auc_difference_ci": list(interval or ()) or None,
        "speedup_vs_paper": result["seconds_paper"] / result["seconds_ours"],
    }


def forward_inputs(unet: UNet2DConditionModel, batch: int, size: int, device: torch.device) -> Row:
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn((batch, unet.config.in_channels, size, size), generator=generator)
    embeds = torch.randn((batch, 77, unet.config.cross_attention_dim), generator=generator)
    return {
        "sample": sample.to(device),
        "timestep": torch.tensor(500, device=device),
        "encoder_hidden_states": embeds.to(device),
    }


@torch.no_grad()
def overheads(model: Model, config: BenchmarkLocalizationConfig, device: torch.device) -> Row:
    """Time of a forward pass that records two words at all layers, over that of the plain pass (SDPA) on the same batch;
    ours and the peer's, each with its maps computed, in turns. And how far the maps are apart."""
    prompts = [
        f"There is a small pleural effusion and an edema, view {i}." for i in range(config.evaluation.batch_size)
    ]
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
        with peer.AttentionCapture(model.pipeline, relations="image->text", tokens=tokens, **options) as capture:
            model.denoiser(**inputs)
            seen["peer"] = capture.compute()

    ways: dict[str, Callable[[], None]] = {"plain": plain, "ours": recorded}
    if peer is not None:
        ways |= {"peer": theirs, "peer exact": lambda: theirs(mode="exact")}
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for turn in tqdm(range(config.repeats + 2), desc="recorded forward passes", unit="turn"):
        for name, call in ways.items():
            seconds = seconds_of(call, device)[1]
            if turn >= 2:
                spent[name].append(seconds)
    # Neighbours in time are compared, so that a slow moment of the machine hits both.
    ratio = {n: statistics.median(a / b for a, b in zip(t, spent["plain"], strict=True)) - 1 for n, t in spent.items()}
    result: Row = {
        "batch_size": len(prompts),
        "repeats": config.repeats,
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


# --- memory, each measurement in a fresh process ---------------------------------------------------------------------


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    pool = multiprocessing.get_context("spawn").Pool(1)
    try:
        return pool.apply(function, arguments)
    finally:
        pool.close()
        pool.join()


@torch.no_grad()
def memory_of_steps(config: BenchmarkLocalizationConfig, steps: int) -> Row:
    """Peak memory, and bytes that the recorder holds, after drawing images in `steps` steps with all words recorded."""
    quiet_libraries()
    model = load_model(config.base, config.run).to(Accelerator().device).freeze()
    pipe, prompts = model.pipeline, ["a small pleural effusion on the left"] * 4
    side = int(pipe.unet.config.sample_size) * model.vae_factor
    with record_pipeline(pipe, prompts) as maps:
        pipe(prompts, num_inference_steps=steps, guidance_scale=4.0, height=side, width=side, output_type="latent")
    held = sum(m.numel() * m.element_size() for m in maps.recorded.by_layer.values())
    return {"peak_gb": peak_memory_gb(), "held_bytes": held, "passes": maps.recorded.passes}


@torch.no_grad()
def full_size_pass(batch: int, records: bool, dtype: torch.dtype) -> Row:
    """SD 1.5's U-Net from its configuration, random weights, 512 x 512, one forward pass with two tokens recorded."""
    device = Accelerator().device
    torch.manual_seed(0)
    with torch.device(device):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768).eval().to(dtype)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()  # of the weights in fp32
    loaded = peak_memory_gb()
    inputs = forward_inputs(unet, batch, 64, device)
    inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}
    chosen = torch.zeros(batch, 77, 2, device=device)
    chosen[:, 5, 0] = chosen[:, 9, 1] = 1.0
    recording: AbstractContextManager[Any] = nullcontext()
    if records:
        recording = record_attention(unet, reduce=lambda probabilities: probabilities.mean(dim=1) @ chosen)
    with recording:
        if device.type == "cuda":
            seconds_of(lambda: unet(**inputs), device)  # loads the kernels
        seconds = seconds_of(lambda: unet(**inputs), device)[1]
    parameters = sum(p.numel() for p in unet.parameters())
    return {"seconds": seconds, "peak_gb": peak_memory_gb(), "loaded_gb": loaded, "parameters": parameters}


def full_size(budget_gb: float, dtype: torch.dtype) -> Row:
    """Of one image; and the largest batch within `budget_gb`, by the memory that each further image took. A GPU is fast
    enough to run that batch."""

    def run(batch: int, records: bool = True) -> Row:
        measured: Row = in_fresh_process(full_size_pass, batch, records, dtype)
        return measured

    plain, one, three = run(1, records=False), run(1), run(3)
    per_image = (three["peak_gb"] - one["peak_gb"]) / 2
    largest = 1 + math.floor((budget_gb - one["peak_gb"]) / per_image)
    result = {
        "parameters": one["parameters"],
        "seconds_plain": plain["seconds"],
        "seconds_recorded": one["seconds"],
        "peak_gb_plain": plain["peak_gb"],
        "peak_gb_recorded": one["peak_gb"],
        "gb_per_further_image": per_image,
        f"largest_batch_at_{budget_gb:g}_gb": max(0, largest),
    }
    if torch.cuda.is_available() and largest > 0:
        whole, plain = run(largest), run(largest, records=False)
        result |= {"peak_gb_of_largest": whole["peak_gb"], "seconds_of_largest": whole["seconds"]}
        result |= {"seconds_of_largest_plain": plain["seconds"]}
    return result


# --- scale and protocols ---------------------------------------------------------------------------------------------


def scale(config: BenchmarkLocalizationConfig) -> Row:
    """recipes/evaluate.py by one process of one thread and by two: the same metrics in about half the time?"""
    results = {}
    for count in (1, 2):
        folder = Path(config.output_dir) / f"processes-{count}"
        few = {"generated_images": 1, "diversity_captions": 1, "diversity_samples": 2, "num_inference_steps": 1}
        options = [f"--evaluation.{name}={value}" for name, value in few.items()]
        options += [f"--evaluation.localization_images={config.evaluation.localization_images}"]
        options += [f"--evaluation.batch_size={config.evaluation.batch_size}", f"--base.name={config.base.name}"]
        options += [f"--data.test_size={config.data.test_size}", f"--output_dir={folder}"]
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
        command += [str(Path(__file__).with_name("evaluate.py")), *options]
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


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        for key in sorted(value):
            yield from _numbers(value[key])
    elif isinstance(value, list):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, float):
        yield value


def protocols(model: Model, dataset: Any, config: BenchmarkLocalizationConfig, accelerator: Accelerator) -> Row:
    """Every protocol with its own metrics on the same held-out images."""
    found: Row = {}
    for name in ("ours", "dombrowski", "vilouras"):
        own = replace(config.evaluation, protocol=name)
        folder = Path(config.output_dir) / name
        began = time.perf_counter()
        result = localization(model, dataset, own, accelerator=accelerator, arm_dir=folder, label=name)
        found[name] = result and result | {"seconds": time.perf_counter() - began}
    return found


def benchmark(config: BenchmarkLocalizationConfig) -> None:
    quiet_libraries()
    if config.dry_run:
        print(to_yaml(config))
    accelerator = Accelerator()
    if accelerator.num_processes > 1:
        raise UserError("the benchmark times one process, and starts others itself: launch it with --num_processes 1")
    device = accelerator.device
    model = load_model(config.base, config.run).to(device).freeze()
    dataset = load_dataset(config.data, "test")
    asked = queries(dataset, model, config.evaluation)
    print(
        f"{len({q.image for q in asked})} held-out images, {sum(len(q.findings) for q in asked)} pairs; "
        f"{torch.get_num_threads()} threads on {device.type}; parts: {', '.join(config.parts)}"
    )
    if config.dry_run:
        print("dry run: the data and the base are fine; nothing was written")
        return
    results: Row = {}
    if "overhead" in config.parts:
        results["overhead"] = overheads(model, config, device)
    if "paper" in config.parts:
        results["paper"] = against_paper(model, dataset, config.evaluation, device)
    if "memory" in config.parts:
        one, many = (in_fresh_process(memory_of_steps, config, steps) for steps in (1, 50))
        ratio = max(many["peak_gb"] / one["peak_gb"], many["held_bytes"] / one["held_bytes"])
        results["memory"] = {"steps_1": one, "steps_50": many, "memory_50_over_1": ratio}
    if "protocols" in config.parts:
        results["protocols"] = protocols(model, dataset, config, accelerator)
    if "scale" in config.parts:
        results["scale"] = scale(config)
    if "full_size" in config.parts:
        results["full_size"] = full_size(config.memory_budget_gb, torch.float32)
        if device.type == "cuda":
            results["full_size_bf16"] = full_size(config.memory_budget_gb, torch.bfloat16)
    results = finite(results)
    path = Path(config.output_dir) / "benchmark.json"
    write_json(path, results | {"config": asdict(config), "provenance": provenance()})
    for name, entry in results.get("protocols", {}).items():
        word = entry["word"] if entry else {}
        shown = {key: (word[key], word[f"{key}_ci"]) for key in word if f"{key}_ci" in word and word[key] is not None}
        print(f"{name}: " + ", ".join(f"{key} {value:.3f} {interval}" for key, (value, interval) in shown.items()))
    for part, values in results.items():
        print(f"{part}: " + json.dumps({k: v for k, v in values.items() if not isinstance(v, (dict, list))}))
    print(f"all numbers: {path}\nnext: accelerate launch recipes/evaluate.py --evaluation.protocol dombrowski")
    keys = {"paper": ("speedup_vs_paper", "auc_ours", "auc_paper"), "overhead": ("record_overhead", "peer_overhead")}
    keys["memory"] = ("memory_50_over_1",)
    print(json.dumps({key: results.get(part, {}).get(key) for part, names in keys.items() for key in names}))


if __name__ == "__main__":
    main(benchmark, BenchmarkLocalizationConfig, ignored=IGNORED)
