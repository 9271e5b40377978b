"""What our training steps cost beside diffusers' loops: speed in turns, shares, memory, time to the first step."""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Protocol, TypedDict

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel
from typing_extensions import Unpack

from distill.config import BaseConfig, BlocksConfig, LoraConfig, RunConfig, TrainerConfig
from distill.experiment.arms import Arm
from distill.experiment.benchmark_memory import in_fresh_process
from distill.experiment.peers import DiffusersTraining, Row, synchronize
from distill.experiment.run import Run, open_run
from distill.experiment.train import fit_arm
from distill.memory import peak_memory_gb
from distill.methods.training import Training
from distill.models import Model, load_model
from distill.models.blocks import prune

PARTS = ("data", "text", "forward", "backward", "optimizer", "log")
"""Labels of the trainer's profile."""
PEERS = {"diffusers_lora": "lora", "diffusers_full": "full"}
"""Peer -> our kind of the same training."""
WHOLE = "whole"
PRUNED_BLOCKS = BlocksConfig(remove_mid_block=True)


class Plan(Protocol):
    """The options of the recipe."""

    @property
    def base(self) -> BaseConfig: ...
    @property
    def architecture(self) -> str: ...
    @property
    def parts(self) -> tuple[str, ...]: ...
    @property
    def turns(self) -> int: ...
    @property
    def steps(self) -> int: ...
    @property
    def warm_up_steps(self) -> int: ...
    @property
    def lora(self) -> LoraConfig: ...
    @property
    def trainer(self) -> TrainerConfig: ...


class Entry(TypedDict, total=False):
    """What was measured of a kind. turns: seconds a step of each turn; flops_share: of a large matrix product's speed."""

    seconds_a_step: float
    images_a_second: float
    turns: list[float]
    shares: dict[str, float]
    flops_a_step: float
    flops_share: float
    peak_memory_gb: float


class Results(TypedDict, total=False):
    """kinds: of each kind of step and peer."""

    kinds: dict[str, Entry]
    flops_a_second_of_a_product: float
    first_step_seconds: float


class Base(TypedDict, total=False):
    """Another base than the configuration's, and models that a method may name."""

    base: BaseConfig
    references: Mapping[str, Callable[[], Model]]


class Bench:
    """An open run with an arm for each kind, and what was measured."""

    def __init__(self, config: Plan, base: BaseConfig, scratch: Path) -> None:
        assert isinstance(config, RunConfig)
        self.config, self.scratch = config, scratch
        self.own: RunConfig = config.model_copy(update={"base": base, "output_dir": str(scratch / "run")})
        self.arms: dict[str, tuple[Run, Arm]] = {}
        self.peers: dict[str, DiffusersTraining] = {}

    def open(self, trainings: Mapping[str, Training], **options: Unpack[Base]) -> None:
        """Make arms of these kinds on a base. options: see open_run."""
        folder = Path(self.own.output_dir)
        arms = {
            name: Arm(name, folder / name, training, self.trainer(training), self.own.evaluation.full())
            for name, training in trainings.items()
        }
        run = open_run(self.own, arms, **options)
        self.arms |= {name: (run, arm) for name, arm in arms.items()}

    def trainer(self, training: Training) -> TrainerConfig:
        """The options of a turn: frozen text encoders are cached, as our recipes advise."""
        config = self.config
        cached = training.text_encoder == "frozen" and not training.method.needs_tokens
        return TrainerConfig.model_validate(
            config.trainer.model_dump()
            | {
                "max_steps": config.warm_up_steps + config.steps,
                "log_every_steps": config.warm_up_steps,
                "cache_text_embeddings": cached,
                "keep_last_state_gb": 0.0,
            }
        )

    def open_peers(self) -> None:
        """diffusers' loops on models of their own, with the same images in memory."""
        run = next(iter(self.arms.values()))[0]
        assert run.train is not None
        count = min(len(run.train), 8 * self.config.trainer.batch_size)
        rows: list[Row] = [(run.train[i].pixel_values, run.train.caption(i)) for i in range(count)]
        for name, rank in (("diffusers_lora", self.config.lora.rank), ("diffusers_full", None)):
            self.peers[name] = DiffusersTraining(
                load_model(self.own.base), rows, self.config.trainer, run.accelerator, rank
            )

    def turn(self, name: str) -> float:
        """Seconds a step."""
        if name in self.peers:
            return self.peers[name].turn(self.config.warm_up_steps, self.config.steps, name)
        run, arm = self.arms[name]
        with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
            fit_arm(run, arm, Path(folder))
            rows = [json.loads(line) for line in (Path(folder) / "train_log.jsonl").read_text().splitlines()]
        first = next(row for row in rows if row["step"] == self.config.warm_up_steps)
        return float((rows[-1]["seconds"] - first["seconds"]) / (rows[-1]["step"] - first["step"]))


def open_smaller(bench: Bench, trainings: Mapping[str, Training]) -> None:
    """These kinds on a U-Net without its middle block, as compress.py makes it; WHOLE is the name of the whole model."""
    base, folder = bench.own.base, bench.scratch / "smaller"
    prune(load_model(base), PRUNED_BLOCKS).pipeline.save_pretrained(folder)
    smaller = base.model_copy(update={"name": str(folder)})
    bench.open(trainings, base=smaller, references={WHOLE: lambda: load_model(base)})


def speed(bench: Bench) -> dict[str, Entry]:
    """Name -> seconds a step of each turn, and images a second; all kinds and peers take turns."""
    bench.open_peers()
    found: dict[str, list[float]] = {}
    for _ in range(bench.config.turns):
        for name in (*bench.arms, *bench.peers):
            found.setdefault(name, []).append(bench.turn(name))
            gc.collect()
    batch = bench.config.trainer.batch_size
    return {
        name: {
            "seconds_a_step": statistics.median(values),
            "images_a_second": batch / statistics.median(values),
            "turns": values,
        }
        for name, values in found.items()
    }


def shares(bench: Bench, name: str) -> dict[str, float]:
    """Part of a step -> its share of the labelled time. Text is taken out of forward."""
    run, arm = bench.arms[name]
    cuda = run.accelerator.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with tempfile.TemporaryDirectory(dir=bench.scratch) as folder, profile(activities=activities) as measured:
        fit_arm(run, arm, Path(folder))
    spent = dict.fromkeys(PARTS, 0.0)
    for event in measured.key_averages():
        if event.key in spent:
            spent[event.key] = max(spent[event.key], event.device_time_total if cuda else event.cpu_time_total)
    spent["forward"] -= spent["text"]
    total = sum(spent.values()) or 1.0
    return {part: value / total for part, value in spent.items()}


def flops_a_step(bench: Bench, name: str) -> float:
    """Floating-point operations of a step, matrix products and convolutions of forward and backward."""
    run, arm = bench.arms[name]
    few = arm.trainer.model_copy(update={"max_steps": 2, "warmup_steps": 0, "log_every_steps": 1})
    with tempfile.TemporaryDirectory(dir=bench.scratch) as folder, FlopCounterMode(display=False) as one:
        fit_arm(run, replace(arm, trainer=few.model_copy(update={"max_steps": 1})), Path(folder))
    with tempfile.TemporaryDirectory(dir=bench.scratch) as folder, FlopCounterMode(display=False) as two:
        fit_arm(run, replace(arm, trainer=few), Path(folder))
    return float(two.get_total_flops() - one.get_total_flops())


def peak_flops(device: torch.device, mixed_precision: str) -> float:
    """Operations a second of a large matrix product on this device, in the type that training computes in."""
    dtype = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[mixed_precision]
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    for _ in range(3):
        a @ b
    synchronize(device)
    began = time.perf_counter()
    for _ in range(10):
        a @ b
    synchronize(device)
    return 10 * 2 * size**3 / (time.perf_counter() - began)


def first_step_seconds(config: Plan, scratch: Path) -> float:
    """Seconds from the command of finetune.py to its first bar and its first logged step, where its caches are there."""
    folder = scratch / "first"
    recipe = Path(__file__).parents[2] / "recipes" / "finetune.py"
    options = {
        "base.name": config.base.name, "trainer.max_steps": 2, "trainer.log_every_steps": 1, "trainer.tracker": "none",
        "trainer.batch_size": config.trainer.batch_size, "trainer.mixed_precision": config.trainer.mixed_precision,
        "evaluation.features": "none", "evaluation.generated_images": 1, "evaluation.localization_images": 1,
        "output_dir": folder,
    }  # fmt: skip
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--quiet", "--num_processes", "1"]
    command += [str(recipe), *(f"--{key}={value}" for key, value in options.items())]
    log, began = folder / "model" / "train_log.jsonl", time.perf_counter()
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)  # fmt: skip
    try:
        while process.poll() is None and not (log.exists() and log.stat().st_size):
            time.sleep(0.05)
        return time.perf_counter() - began
    finally:
        process.kill()
        process.wait()


def peak_of(config: Plan, base: BaseConfig, name: str, training: Training) -> float:
    """Peak memory in 1e9 bytes of a turn of one kind or peer; call it in a process that has done nothing else."""
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(config, base, Path(scratch))
        bench.open({PEERS.get(name, name): training})
        if name in PEERS:
            bench.open_peers()
        bench.turn(name)
        return peak_memory_gb()


def measure(config: Plan, kinds: dict[str, Training], smaller: Mapping[str, Training]) -> Results:
    """All parts that the configuration asks for. kinds: of steps of the base; smaller: of a smaller U-Net."""
    with tempfile.TemporaryDirectory() as folder, base_of(config, Path(folder)) as base:
        bench = Bench(config, base, Path(folder))
        bench.open(kinds)
        device = next(iter(bench.arms.values()))[0].accelerator.device
        results: Results = {"kinds": {}}
        open_smaller(bench, smaller)
        if "speed" in config.parts:
            results["kinds"] = speed(bench)
        if "shares" in config.parts:
            peak = results["flops_a_second_of_a_product"] = peak_flops(device, config.trainer.mixed_precision)
            for name in bench.arms:
                entry = results["kinds"].setdefault(name, {})
                entry["shares"] = shares(bench, name)
                entry["flops_a_step"] = flops_a_step(bench, name)
                if "seconds_a_step" in entry:
                    entry["flops_share"] = entry["flops_a_step"] / entry["seconds_a_step"] / peak
        if "memory" in config.parts:
            for name, training in (kinds | {peer: kinds[ours] for peer, ours in PEERS.items()}).items():
                peak = in_fresh_process(peak_of, config, base, name, training)
                results["kinds"].setdefault(name, {})["peak_memory_gb"] = peak
        if "start" in config.parts:
            results["first_step_seconds"] = first_step_seconds(config, Path(folder))
    return results


@contextmanager
def base_of(config: Plan, folder: Path) -> Iterator[BaseConfig]:
    """The base to train: that of the configuration, or Stable Diffusion 1.5 with random weights, saved for the time."""
    if config.architecture == "base":
        yield config.base
        return
    random_sd15().save_pretrained(folder / "sd15")
    yield config.base.model_copy(update={"name": str(folder / "sd15")})


def random_sd15() -> StableDiffusionPipeline:
    """Stable Diffusion 1.5 by its published configuration, with random weights and the embedded base's tokenizer."""
    down, up = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
    vae = AutoencoderKL(
        down_block_types=down, up_block_types=up, block_out_channels=(128, 256, 512, 512), layers_per_block=2,
        latent_channels=4, sample_size=512,
    )  # fmt: skip
    text = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
                          bos_token_id=49406, eos_token_id=49407, pad_token_id=49407)  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip
    return StableDiffusionPipeline(
        vae, CLIPTextModel(text), load_model(BaseConfig()).tokenizers[0],
        UNet2DConditionModel(sample_size=64, cross_attention_dim=768), scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
