"""fit(): the only training loop. It knows no method: an objective maps (batch, generator) to named losses."""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm.auto import tqdm

from distill.config import TrainerConfig
from distill.errors import UserError

KEPT_CHECKPOINTS = 2
"""Checkpoints kept, the newest."""
METHOD_FILE = "method.safetensors"
"""What a method keeps besides the trained parameters, in a checkpoint."""


@runtime_checkable
class HasState(Protocol):
    """An objective with a state besides its trained parameters."""

    def state(self) -> dict[str, torch.Tensor]: ...

    def load_state(self, state: dict[str, torch.Tensor]) -> None: ...


@dataclass(frozen=True)
class FitResult:
    """What a training cost. seconds: wall clock of the steps, checkpoints included, and
    without samples and looks at localization; peak_memory_gb: of this process
    (resident on the CPU, allocated on a GPU), in units of 1e9 bytes."""

    steps: int
    seconds: float
    peak_memory_gb: float
    trainable_parameters: int


def peak_memory_gb() -> float:
    """Peak memory of this process so far, in units of 1e9 bytes: allocated on the GPU, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def generator_at(seed: int, step: int, rank: int) -> torch.Generator:
    """CPU generator that depends on (seed, step, rank) only, so that a resumed run draws the same noise."""
    state = np.random.SeedSequence([seed, step, rank]).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(state[0]) << 32 | int(state[1]))


class StepSampler(Sampler[list[int]]):
    """Batches of indices of one rank for micro steps first..last-1.

    The stream of positions runs over epochs without a break; the order within an epoch depends on (seed, epoch) only.
    """

    def __init__(self, length: int, batch_size: int, seed: int, rank: int, world: int, first: int, last: int) -> None:
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.rank, self.world, self.first, self.last = rank, world, first, last

    def __len__(self) -> int:
        return self.last - self.first

    def __iter__(self) -> Iterator[list[int]]:
        epoch, order = -1, np.empty(0, dtype=np.int64)
        for step in range(self.first, self.last):
            start = (step * self.world + self.rank) * self.batch_size
            batch = []
            for position in range(start, start + self.batch_size):
                if position // self.length != epoch:
                    epoch = position // self.length
                    order = np.random.default_rng([self.seed, epoch]).permutation(self.length)
                batch.append(int(order[position % self.length]))
            yield batch


def make_accelerator(config: TrainerConfig, output_dir: Path) -> Accelerator:
    """One Accelerator a process, from the trainer's settings; devices and processes come from `accelerate launch`."""
    tracker = None if config.tracker == "none" else config.tracker
    # accelerate keeps the precision of the first Accelerator of a process; recipes with several stages have several.
    AcceleratorState._reset_state()
    return Accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_with=tracker,
        project_dir=str(output_dir),
        # Caption dropout can leave the text encoder of one rank without a gradient.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )


def fit(
    objective: nn.Module,
    dataset: Dataset[Any],
    config: TrainerConfig,
    *,
    accelerator: Accelerator,
    output_dir: Path,
    seed: int,
    collate: Callable[[list[Any]], Any] | None = None,
    parameter_groups: Sequence[dict[str, Any]] | None = None,
    on_sample: Callable[[int], None] | None = None,
    on_localize: Callable[[int], None] | None = None,
    label: str = "train",
) -> FitResult:
    """Train what requires a gradient in `objective` for config.max_steps optimizer steps.

    objective: forward(batch, generator) -> {"loss": scalar, every other term by name: scalar}.
    parameter_groups: lists of parameters with their own `lr`; default: all trainable ones at config.learning_rate.
    on_sample, on_localize: called with the step every config.sample_every_steps, localize_every_steps, on every process.
    Writes train_log.jsonl and, if asked, state/step-*; continues from the newest of them.
    Raises UserError on a non-finite loss, a data set smaller than needed, or nothing to train.
    """
    if len(dataset) == 0:  # type: ignore[arg-type]
        raise UserError(f"{label}: the training split is empty")
    named = [(name, p) for name, p in objective.named_parameters() if p.requires_grad]
    if not named:
        raise UserError(f"{label}: no parameter is trainable; train the U-Net or the text encoder")
    trainable = [p for _, p in named]
    groups = list(parameter_groups or [{"params": trainable, "lr": config.learning_rate}])
    if sum(len(g["params"]) for g in groups) != len(trainable):
        raise ValueError("parameter_groups must cover every trainable parameter once")
    optimizer = _optimizer(groups, config)
    scheduler = get_scheduler(
        {"constant": "constant_with_warmup"}.get(config.lr_schedule, config.lr_schedule),
        optimizer,
        num_warmup_steps=config.warmup_steps,
        num_training_steps=config.max_steps,
    )
    ema = None
    if config.ema_decay is not None:
        ema = EMAModel(trainable, decay=config.ema_decay, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    model, optimizer = accelerator.prepare(objective, optimizer)
    model.train()

    output_dir.mkdir(parents=True, exist_ok=True)
    log_path = output_dir / "train_log.jsonl"
    method = objective if isinstance(objective, HasState) else None
    start, seconds_before = _resume(
        output_dir, named, optimizer, scheduler, ema, seed, accelerator.num_processes, method
    )
    if ema is not None:
        ema.to(accelerator.device)
    if accelerator.is_main_process:
        _truncate_log(log_path, start)
    accumulation = config.gradient_accumulation_steps
    sampler = StepSampler(
        len(dataset),  # type: ignore[arg-type]
        config.batch_size,
        seed,
        accelerator.process_index,
        accelerator.num_processes,
        start * accumulation,
        config.max_steps * accumulation,
    )
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=config.num_workers,
        pin_memory=accelerator.device.type == "cuda",
    )
    if accelerator.log_with:
        accelerator.init_trackers(
            label,
            config={k: str(v) if isinstance(v, tuple) else v for k, v in config.model_dump(exclude_none=True).items()},
        )
    bar = tqdm(
        total=config.max_steps, initial=start, desc=label, unit="step", disable=not accelerator.is_main_process,
        dynamic_ncols=True, mininterval=1.0, smoothing=0.05,
    )  # fmt: skip
    began = time.perf_counter()
    sums: dict[str, torch.Tensor] = {}
    count, step = 0, start
    grad_norm: torch.Tensor | float = float("nan")
    for micro, batch in enumerate(loader, start=start * accumulation):
        batch = _moved(batch, accelerator.device)
        with accelerator.accumulate(model):
            generator = generator_at(seed, micro, accelerator.process_index)
            torch.manual_seed(generator.initial_seed())  # dropout draws from the global generators
            terms = model(batch, generator)
            if not torch.isfinite(terms["loss"]):
                raise UserError(
                    f"{label}: the loss is {float(terms['loss'])} at step {step + 1}; log: {log_path}. "
                    "Lower trainer.learning_rate, or use trainer.mixed_precision bf16 or no"
                )
            accelerator.backward(terms["loss"])
            if accelerator.sync_gradients:
                grad_norm = accelerator.clip_grad_norm_(trainable, config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        for name, value in terms.items():
            sums[name] = sums.get(name, torch.zeros((), device=accelerator.device)) + value.detach().float()
        count += 1
        if not accelerator.sync_gradients:
            continue
        step += 1
        scheduler.step()
        if ema is not None:
            ema.step(trainable)
        bar.update()
        if step % config.log_every_steps == 0 or step == config.max_steps:
            means = {k: float(accelerator.reduce(v / count, reduction="mean")) for k, v in sums.items()}
            sums, count = {}, 0
            if accelerator.is_main_process:
                row = {
                    "step": step,
                    **means,
                    "grad_norm": float(grad_norm),
                    "lr": scheduler.get_last_lr()[0],
                    "seconds": seconds_before + time.perf_counter() - began,
                }
                with log_path.open("a", encoding="utf-8") as log:
                    log.write(json.dumps(row) + "\n")
                bar.set_postfix(loss=f"{means['loss']:.4f}")
            if accelerator.log_with:
                accelerator.log(means, step=step)
        if config.checkpoint_every_steps and step % config.checkpoint_every_steps == 0 and step < config.max_steps:
            if accelerator.is_main_process:
                state = {
                    "step": step, "seed": seed, "processes": accelerator.num_processes,
                    "seconds": seconds_before + time.perf_counter() - began,
                }  # fmt: skip
                _save_state(output_dir, state, named, optimizer, scheduler, ema, method)
            accelerator.wait_for_everyone()
        for call, every in ((on_sample, config.sample_every_steps), (on_localize, config.localize_every_steps)):
            if call and every and step % every == 0:
                looked = time.perf_counter()
                model.eval()
                call(step)
                model.train()
                began += time.perf_counter() - looked
    bar.close()
    if ema is not None:
        ema.copy_to(trainable)
    # A later fit() has trackers of its own, and the accelerator would go on logging to these too.
    for tracker in accelerator.trackers:
        tracker.finish()
    accelerator.trackers = []
    accelerator.wait_for_everyone()
    accelerator.free_memory()
    model.eval()
    seconds = seconds_before + time.perf_counter() - began
    return FitResult(config.max_steps, seconds, peak_memory_gb(), sum(p.numel() for p in trainable))


def _moved(batch: Any, device: torch.device) -> Any:
    """A batch on the device: a record that moves itself, or a dictionary of tensors."""
    if isinstance(batch, dict):
        return {key: value.to(device, non_blocking=True) for key, value in batch.items()}
    return batch.to(device, non_blocking=True)


def _optimizer(groups: list[dict[str, Any]], config: TrainerConfig) -> torch.optim.Optimizer:
    options: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": config.adam_betas,
        "weight_decay": config.weight_decay,
    }
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, **options)
    import bitsandbytes  # only on request: its import probes the GPU driver

    return bitsandbytes.optim.AdamW8bit(groups, **options)


def _save_state(
    output_dir: Path,
    state: dict[str, Any],
    named: list[tuple[str, nn.Parameter]],
    optimizer: Any,
    scheduler: Any,
    ema: EMAModel | None,
    method: HasState | None,
) -> None:
    """Write state/step-N in a temporary folder and rename it, so that a kill leaves the previous one whole."""
    folder = output_dir / "state" / f"step-{state['step']:08d}"
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file({name: p.detach().cpu().contiguous() for name, p in named}, partial / "trainable.safetensors")
    extra = {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
    if ema is not None:
        extra["ema"] = ema.state_dict()
    torch.save(extra, partial / "optimizer.pt")
    own = method.state() if method is not None else {}
    if own:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in own.items()}, partial / METHOD_FILE)
    (partial / "state.json").write_text(json.dumps(state))
    os.replace(partial, folder)
    for old in sorted(folder.parent.glob("step-*[0-9]"))[:-KEPT_CHECKPOINTS]:
        shutil.rmtree(old)


def _resume(
    output_dir: Path,
    named: list[tuple[str, nn.Parameter]],
    optimizer: Any,
    scheduler: Any,
    ema: EMAModel | None,
    seed: int,
    processes: int,
    method: HasState | None,
) -> tuple[int, float]:
    folders = sorted((output_dir / "state").glob("step-*[0-9]"))
    if not folders:
        return 0, 0.0
    folder = folders[-1]
    state = json.loads((folder / "state.json").read_text())
    tensors = load_file(folder / "trainable.safetensors")
    if state["seed"] != seed or set(tensors) != {name for name, _ in named}:
        raise UserError(f"{folder} was written by a run with other settings; choose another output_dir or delete it")
    if state.get("processes", processes) != processes:
        raise UserError(
            f"{folder} was written by a launch of {state['processes']} processes, and this one has {processes}: each step "
            f"would see other images; launch {state['processes']}, or choose another output_dir"
        )
    for name, p in named:
        p.data.copy_(tensors[name])
    extra = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
    optimizer.load_state_dict(extra["optimizer"])
    scheduler.load_state_dict(extra["scheduler"])
    if ema is not None:
        ema.load_state_dict(extra["ema"])
    if method is not None and (folder / METHOD_FILE).exists():
        method.load_state(load_file(folder / METHOD_FILE))
    return int(state["step"]), float(state["seconds"])


def _truncate_log(path: Path, step: int) -> None:
    """Drop a torn row, and rows after `step`: of a run killed after its last checkpoint, or of an earlier run."""
    if path.exists():
        whole = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
        path.write_text("".join(line for line in whole if json.loads(line)["step"] <= step), encoding="utf-8")
