"""What our training steps cost beside diffusers' loops: speed in turns, shares, memory, time to the first step."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Protocol, TypedDict

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel
from typing_extensions import Unpack

from distill.config import BaseConfig, BlocksConfig, LoraConfig, RunConfig, TrainerConfig
from distill.errors import UserError
from distill.experiment.arms import Arm
from distill.experiment.fresh_process import Parts
from distill.experiment.peers import DiffusersTraining, Row, synchronize
from distill.experiment.run import Run, open_run
from distill.experiment.train import fit_arm
from distill.files import provenance, read_json, write_json
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
    @property
    def limit_minutes(self) -> float: ...


class Entry(TypedDict, total=False):
    """What was measured of a kind. turns: seconds a step of each turn; flops_share: of a large matrix product's
    speed."""

    seconds_a_step: float
    images_a_second: float
    turns: list[float]
    shares: dict[str, float]
    flops_a_step: float
    flops_share: float
    peak_memory_gb: float


class Results(TypedDict, total=False):
    """kinds: of each kind of step and peer. failed: part -> why it has no result."""

    kinds: dict[str, Entry]
    flops_a_second_of_a_product: float
    first_step_seconds: float
    environment: dict[str, str]
    failed: dict[str, str]


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
        """diffusers' loops of the kinds that are open, on models of their own, with the same images in memory."""
        run = next(iter(self.arms.values()))[0]
        assert run.train is not None
        count = min(len(run.train), 8 * self.config.trainer.batch_size)
        rows: list[Row] = [(run.train[i].pixel_values, run.train.caption(i)) for i in range(count)]
        ranks = {"diffusers_lora": self.config.lora.rank, "diffusers_full": None}
        for name, rank in ((name, ranks[name]) for name, kind in PEERS.items() if kind in self.arms):
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
    """These kinds on a U-Net without its middle block, as compress.py makes it; WHOLE is the name of the whole
    model."""
    base, folder = bench.own.base, bench.scratch / "smaller"
    prune(load_model(base), PRUNED_BLOCKS).pipeline.save_pretrained(folder)
    smaller = base.model_copy(update={"name": str(folder)})
    bench.open(trainings, base=smaller, references={WHOLE: lambda: load_model(base)})


def speed(bench: Bench, partial: Path) -> dict[str, Entry]:
    """Name -> seconds a step of each turn, and images a second; all kinds and peers take turns. partial: gets what is
    known after each turn."""
    bench.open_peers()
    found: dict[str, list[float]] = {}
    for _ in range(bench.config.turns):
        for name in (*bench.arms, *bench.peers):
            found.setdefault(name, []).append(bench.turn(name))
            gc.collect()
            write_json(partial, speed_of(found, bench.config.trainer.batch_size))
    return speed_of(found, bench.config.trainer.batch_size)


def speed_of(turns: Mapping[str, list[float]], batch: int) -> dict[str, Entry]:
    """turns: seconds a step of each turn, by name."""
    return {
        name: {
            "seconds_a_step": statistics.median(values),
            "images_a_second": batch / statistics.median(values),
            "turns": values,
        }
        for name, values in turns.items()
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


def first_step_seconds(config: Plan, base: BaseConfig, scratch: Path, limit_s: float) -> float:
    """Seconds from the command of finetune.py to its first logged step, where its caches are there. Raises UserError if
    it ends before, or takes longer than limit_s."""
    folder = scratch / "first"
    shutil.rmtree(folder, ignore_errors=True)
    recipe = Path(__file__).parents[2] / "recipes" / "finetune.py"
    options = {
        "base.name": base.name, "trainer.max_steps": 2, "trainer.log_every_steps": 1, "trainer.tracker": "none",
        "trainer.batch_size": config.trainer.batch_size, "trainer.mixed_precision": config.trainer.mixed_precision,
        "evaluation.features": "none", "evaluation.generated_images": 1, "evaluation.localization_images": 1,
        "output_dir": folder,
    }  # fmt: skip
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--quiet", "--num_processes", "1"]
    command += [str(recipe), *(f"--{key}={value}" for key, value in options.items())]
    log, began = folder / "model" / "train_log.jsonl", time.perf_counter()
    errors = (scratch / "first.log").open("w+", encoding="utf-8")
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
                               stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True)  # fmt: skip
    try:
        while not (log.exists() and log.stat().st_size):
            if process.poll() is not None or time.perf_counter() - began > limit_s:
                errors.seek(0)
                raise UserError(f"finetune.py has not come to its first step: {errors.read()[-1000:]}")
            time.sleep(0.05)
        return time.perf_counter() - began
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        errors.close()
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


Kinds = Mapping[str, Training]
"""Kind of step -> how it trains."""


def environment(config: Plan) -> dict[str, str]:
    """Device and versions, after a product of matrices in the type of the training."""
    found = provenance()
    device = Accelerator().device
    peak = peak_flops(device, config.trainer.mixed_precision)
    memory = f", {torch.cuda.get_device_properties(device).total_memory / 1e9:.0f} GB" if device.type == "cuda" else ""
    return {
        "device": f"{found['device']}{memory}",
        "torch": torch.__version__,
        "flops_a_second_of_a_product": f"{peak:.3g}",
    }


def speed_part(config: Plan, base: BaseConfig, kinds: Kinds, smaller: Kinds, partial: Path) -> Results:
    with opened(config, base, kinds, smaller) as bench:
        return {"kinds": speed(bench, partial)}


def shares_part(config: Plan, base: BaseConfig, kinds: Kinds, smaller: Kinds, partial: Path) -> Results:
    with opened(config, base, kinds, smaller) as bench:
        device = next(iter(bench.arms.values()))[0].accelerator.device
        found: Results = {
            "kinds": {},
            "flops_a_second_of_a_product": peak_flops(device, config.trainer.mixed_precision),
        }
        for name in bench.arms:
            found["kinds"][name] = {"shares": shares(bench, name), "flops_a_step": flops_a_step(bench, name)}
            write_json(partial, found["kinds"])
        return found


@contextmanager
def opened(config: Plan, base: BaseConfig, kinds: Kinds, smaller: Kinds) -> Iterator[Bench]:
    """Arms of all kinds, in a folder of their own."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(config, base, Path(folder))
        bench.open(kinds)
        if smaller:
            open_smaller(bench, smaller)
        yield bench


class Measurement:
    """All parts that the configuration asks for, each in a process of its own, and what they have found so far."""

    def __init__(self, config: Plan, write: Callable[[Results], object]) -> None:
        self.config, self.write = config, write
        self.results: Results = {"kinds": {}, "failed": {}}
        self.parts = Parts(config.limit_minutes, self.results["failed"], lambda: write(self.results))

    def run(self, kinds: Kinds, smaller: Kinds) -> Results:
        """kinds: of steps of the base; smaller: of a smaller U-Net. What fails or takes too long is in `failed`."""
        config, parts = self.config, self.config.parts
        with tempfile.TemporaryDirectory() as scratch, base_of(config, Path(scratch)) as base:
            found = self.parts.fresh("environment", environment, config)
            if found is None:
                return self.results
            self.results["environment"] = found
            self.write(self.results)
            arguments = (config, base, kinds, smaller, Path(scratch) / "partial.json")
            if "speed" in parts:
                self._add(self.parts.fresh("speed", speed_part, *arguments), arguments[-1])
            if "start" in parts:
                self._start(base, Path(scratch))
            for name in self._of_memory(kinds) if "memory" in parts else ():
                peak = self.parts.fresh(f"memory of {name}", peak_of, config, base, name, kinds[PEERS.get(name, name)])
                self._add({"kinds": {name: {"peak_memory_gb": peak}}} if peak else None)
            if "shares" in parts:
                self._add(self.parts.fresh("shares", shares_part, *arguments), arguments[-1])
        return self.results

    @staticmethod
    def _of_memory(kinds: Kinds) -> list[str]:
        """Our kinds, and the peers of those."""
        return [name for name in (*kinds, *PEERS) if PEERS.get(name, name) in kinds]

    def _add(self, found: Results | None, partial: Path | None = None) -> None:
        """Take the results of a part, or what it had written when it failed."""
        if found is None and partial is not None and partial.exists():
            found = {"kinds": read_json(partial)}
        for name, entry in (found or {}).get("kinds", {}).items():
            self.results["kinds"].setdefault(name, {}).update(entry)
        if partial is not None:
            partial.unlink(missing_ok=True)
        if found and "flops_a_second_of_a_product" in found:
            peak = self.results["flops_a_second_of_a_product"] = found["flops_a_second_of_a_product"]
            for entry in self.results["kinds"].values():
                if "flops_a_step" in entry and "seconds_a_step" in entry:
                    entry["flops_share"] = entry["flops_a_step"] / entry["seconds_a_step"] / peak
        self.write(self.results)

    def _start(self, base: BaseConfig, scratch: Path) -> None:
        print("start", flush=True)
        try:
            first_step_seconds(self.config, base, scratch, self.parts.left_s)  # makes the caches
            seconds = first_step_seconds(self.config, base, scratch, self.parts.left_s)
            self.results["first_step_seconds"] = seconds
        except UserError as error:
            self.results["failed"]["start"] = str(error)
        self.write(self.results)


@contextmanager
def base_of(config: Plan, folder: Path) -> Iterator[BaseConfig]:
    """The base to train: that of the configuration, or Stable Diffusion 1.5 with random weights, saved for the time."""
    if config.architecture == "base":
        yield config.base
        return
    random_sd15().save_pretrained(folder / "sd15")
    yield config.base.model_copy(update={"name": str(folder / "sd15")})


def random_sd15() -> StableDiffusionPipeline:
    """Stable Diffusion 1.5 by its published configuration, with random weights and the bundled base's tokenizer."""
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
