"""fit(): the only training loop. It knows no method: an objective maps (batch, generator) to named losses."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from numpy.typing import NDArray
from torch import nn
from torch.profiler import record_function
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm.auto import tqdm

from distill import checkpoints
from distill.agreement import Control, Finite
from distill.checkpoints import BEST, Best, Checkpoint, Damaged
from distill.config import TrainerConfig
from distill.devices import loader_processes, tf32
from distill.draws import shared_generator
from distill.errors import Interrupted, UserError
from distill.files import JsonObject, write_atomic
from distill.interrupts import Stop, leave_signals_to_parent, noted
from distill.memory import peak_memory_gb
from distill.models.compilation import CompiledBlocks

ENDLESS = ("constant",)
"""Learning rate schedules of which a step does not depend on max_steps, so that a training can be made longer."""


def schedule_fault(config: TrainerConfig, planned: int, state: Path) -> str | None:
    """Why a training that was to take `planned` steps cannot take another number; None where it can. state: the folder
    of its checkpoints."""
    if planned == config.max_steps or config.lr_schedule in ENDLESS:
        return None
    return (
        f"trainer.max_steps is {config.max_steps}, and {state} is of a training of {planned} steps, whose "
        f"{config.lr_schedule} schedule ends there: it cannot go on as if it had been longer from the start. Give "
        f"max_steps {planned} again, or {begin_again(state)}; only lr_schedule constant has no end"
    )


def begin_again(state: Path) -> str:
    """What to do where a training cannot go on. state: the folder of its checkpoints."""
    # What has ended is in the arm's folder, or, of a single model, in that of the run.
    ended = next((folder for folder in (state.parent, state.parent.parent) if (folder / "cost.json").exists()), state)
    return f"choose another output_dir, or delete {ended} to train from the beginning"


class Record(Protocol):
    """A batch that moves itself."""

    def to(self, device: torch.device, non_blocking: bool = False) -> Record: ...


AnyBatch = dict[str, torch.Tensor] | Record
Collate = Callable[[list[Any]], AnyBatch]
Chances = NDArray[np.float64]


@runtime_checkable
class HasState(Protocol):
    """An objective with a state besides its trained parameters."""

    def state(self) -> dict[str, torch.Tensor]: ...

    def load_state(self, state: dict[str, torch.Tensor]) -> None: ...


@runtime_checkable
class HasDenoisers(Protocol):
    """An objective with denoisers, whose blocks trainer.compile compiles."""

    def denoisers(self) -> list[nn.Module]: ...


@runtime_checkable
class KnowsUnused(Protocol):
    """An objective that knows whether some of its trained parameters never get a gradient."""

    def leaves_parameters_unused(self) -> bool: ...


@dataclass(frozen=True)
class FitResult:
    """What a training cost. seconds: wall clock of the steps, checkpoints included, and without samples and looks at
    validation images. peak_memory_gb: see `peak_memory_gb`. best: the look whose weights are left; None for the last
    ones."""

    steps: int
    seconds: float
    peak_memory_gb: float
    trainable_parameters: int
    best: Best | None = None


class StepSampler(Sampler[list[int]]):
    """Batches of indices of one rank for micro steps first..last-1.

    The stream of positions runs over epochs without a break; the order within an epoch depends on (seed, epoch) only.
    chances: of each index to be drawn, with sum 1; None draws each once an epoch. An epoch is always `length` draws.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int,
        rank: int,
        world: int,
        first: int,
        last: int,
        chances: Chances | None = None,
    ) -> None:
        self.length, self.batch_size, self.seed, self.chances = length, batch_size, seed, chances
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
                    order = self._order(epoch)
                batch.append(int(order[position % self.length]))
            yield batch

    def _order(self, epoch: int) -> NDArray[np.int64]:
        """The indices of an epoch. By `chances` (systematic sampling), index i is there as often as length * chances[i]
        says, rounded up or down at random."""
        generator = np.random.default_rng([self.seed, epoch])
        order = generator.permutation(self.length)
        if self.chances is None:
            return order
        passed = np.floor(np.cumsum(self.chances[order]) * self.length + generator.random())
        passed[-1] = self.length  # whatever the rounding
        times = np.diff(np.minimum(passed, self.length), prepend=0.0).astype(np.int64)
        return generator.permutation(np.repeat(order, times))


def make_accelerator(config: TrainerConfig, output_dir: Path) -> Accelerator:
    """One Accelerator a process, from the trainer's settings; devices and processes come from `accelerate launch`.

    Raises UserError for a launch that this loop does not support.
    """
    for plugin in ("DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG"):
        if os.environ.get(f"ACCELERATE_USE_{plugin}", "").lower() in ("1", "true", "yes", "on"):
            raise UserError(_unsupported(plugin))
    tracker = None if config.tracker == "none" else config.tracker
    # accelerate keeps the precision of the first Accelerator of a process; recipes with several stages have several.
    AcceleratorState._reset_state()
    return Accelerator(
        mixed_precision=config.mixed_precision,
        # Not as a number, which an ACCELERATE_GRADIENT_ACCUMULATION_STEPS of the environment would replace.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=config.gradient_accumulation_steps),
        log_with=tracker,
        project_dir=str(output_dir),
        kwargs_handlers=[DistributedDataParallelKwargs()],  # fit() says whether to search for unused parameters
    )


def _unsupported(kind: str) -> str:
    return (
        f"accelerate is set to {kind}, which splits the weights between processes; here every process has all of them. "
        "Use one process, or several with plain data parallelism: accelerate launch --multi_gpu --num_processes N"
    )


def fit(
    objective: nn.Module,
    dataset: Dataset[object],
    config: TrainerConfig,
    *,
    accelerator: Accelerator,
    output_dir: Path,
    seed: int,
    collate: Collate | None = None,
    parameter_groups: Sequence[dict[str, Any]] | None = None,
    on_sample: Callable[[int], None] | None = None,
    on_validate: Callable[[int], float | None] | None = None,
    keep_best: bool = False,
    label: str = "train",
    fingerprints: Mapping[str, str] | None = None,
    chances: Chances | None = None,
) -> FitResult:
    """Train what requires a gradient in `objective` for config.max_steps optimizer steps.

    objective: forward(batch, generator) -> {"loss": scalar, every other term by name: scalar}.
    parameter_groups: lists of parameters with their own `lr`, and `until`, the step after which they stay as they are,
    or None; default: all trainable ones at config.learning_rate.
    on_sample, on_validate: called with the step every config.sample_every_steps, validate_every_steps, on every
    process, with the averaged weights where config.ema_decay asks for them.
    keep_best: leave the weights of the step for which on_validate gave the highest number, of equal ones the first;
    those after the last step where it gave none. It must give the same number on every process.
    fingerprints: hashes of what the training depends on, by a name for the user; a checkpoint with others is refused.
    chances: see `StepSampler`.
    Writes train_log.jsonl and state/step-*; continues from the newest whole checkpoint.
    Raises UserError on a non-finite loss, a data set smaller than needed, nothing to train, a checkpoint of another
    training, or files that cannot be written; Interrupted, with a checkpoint written, on SIGINT and SIGTERM.
    """
    if len(dataset) == 0:  # type: ignore[arg-type]
        raise UserError(f"{label}: the training split is empty")
    named = [(name, p) for name, p in objective.named_parameters() if p.requires_grad]
    if not named:
        raise UserError(f"{label}: no parameter is trainable; train the U-Net or the text encoder")
    if not (accelerator.distributed_type == "NO" or accelerator.distributed_type.startswith("MULTI_")):
        raise UserError(_unsupported(accelerator.distributed_type.value))
    groups: list[dict[str, Any]] = list(
        parameter_groups or [{"params": [p for _, p in named], "lr": config.learning_rate}]
    )
    if sum(len(g["params"]) for g in groups) != len(named):
        raise ValueError("parameter_groups must cover every trainable parameter once")
    loop = _Loop(
        objective, named, groups, config, accelerator, output_dir, seed, label, dict(fingerprints or {}), chances
    )

    def validate(step: int) -> None:
        score = on_validate(step) if on_validate else None
        if keep_best:
            loop.keep_if_best(score)

    looks = [(on_sample, config.sample_every_steps), (on_validate and validate, config.validate_every_steps)]
    try:
        return loop.run(dataset, collate, [(call, every) for call, every in looks if call and every])
    finally:
        loop.close()


Look = tuple[Callable[[int], None], int]
"""A call with the step, and the steps between two of them."""


class _Loop:
    """A training: what changes from step to step, and how it is written and read back."""

    def __init__(
        self,
        objective: nn.Module,
        named: list[tuple[str, nn.Parameter]],
        groups: list[dict[str, Any]],
        config: TrainerConfig,
        accelerator: Accelerator,
        output_dir: Path,
        seed: int,
        label: str,
        fingerprints: dict[str, str],
        chances: Chances | None,
    ) -> None:
        self.named, self.trainable = named, [p for _, p in named]
        self.config, self.accelerator, self.seed, self.label = config, accelerator, seed, label
        self.folder, self.log_path = output_dir / "state", output_dir / checkpoints.LOG
        self.method = objective if isinstance(objective, HasState) else None
        self.fingerprints, self.chances, self.control = fingerprints, chances, Control(accelerator, output_dir)
        self.until: list[tuple[list[nn.Parameter], int]] = [
            (group["params"], group["until"]) for group in groups if group.get("until") is not None
        ]
        optimizer = _optimizer(groups, config, accelerator.device)
        self.scheduler = get_scheduler(
            {"constant": "constant_with_warmup"}.get(config.lr_schedule, config.lr_schedule),
            optimizer,
            num_warmup_steps=config.warmup_steps,
            num_training_steps=config.max_steps,
        )
        self.ema: EMAModel | None = None
        if config.ema_decay is not None:
            self.ema = EMAModel(
                self.trainable, decay=config.ema_decay, use_ema_warmup=True, inv_gamma=1.0, power=0.75,
                foreach=accelerator.device.type == "cuda",
            )  # fmt: skip
        if accelerator.ddp_handler is not None:
            # A search at each step; an objective that knows nothing may need it.
            searches = not isinstance(objective, KnowsUnused) or objective.leaves_parameters_unused()
            accelerator.ddp_handler.find_unused_parameters = searches
        compiled = objective.denoisers() if config.compile and isinstance(objective, HasDenoisers) else []
        self.blocks = CompiledBlocks(compiled)
        self.model, self.optimizer = accelerator.prepare(objective, optimizer)
        self.step, self.seconds_before = 0, 0.0
        self.best: Best | None = None
        self.rows: list[str] = []
        self.finite = Finite(accelerator)
        self.sums: dict[str, torch.Tensor] = {}
        self.counts: dict[str, int] = {}
        self.grad_norm: torch.Tensor | float = float("nan")

    def run(self, dataset: Dataset[object], collate: Collate | None, looks: list[Look]) -> FitResult:
        config, accelerator = self.config, self.accelerator
        self.model.train()
        self._resume()
        if accelerator.log_with:
            values = config.model_dump(exclude_none=True)
            accelerator.init_trackers(
                self.label, config={k: str(v) if isinstance(v, tuple) else v for k, v in values.items()}
            )
        bar = tqdm(
            total=config.max_steps, initial=self.step, desc=self.label, unit="step", dynamic_ncols=True, mininterval=1.0,
            disable=not accelerator.is_main_process, smoothing=0.05,
        )  # fmt: skip
        self.began = time.perf_counter()
        if self.step:
            self._look(looks)  # a run that was stopped may have written the checkpoint and not come to these
        with bar, noted() as stop, tf32(accelerator.device):
            for micro, batch in self._batches(dataset, collate):
                if not self._micro_step(micro, batch):
                    continue
                bar.update()
                if self.step % config.log_every_steps == 0:
                    with record_function("log"):
                        loss = self._log()["loss"]
                    bar.set_postfix(loss=f"{loss:.4f}")
                self._stop_if_asked(stop)
                if self._checkpoint_is_due():
                    self._save()
                self._look(looks)
            self._stop_if_asked(stop)
        if self.counts:
            self._log()
        self.finite.check(self._fault)
        if self.best is not None:
            self._take_best(self.best)
        elif self.ema is not None:
            self.ema.copy_to(self.trainable)
        seconds = self._seconds()
        accelerator.wait_for_everyone()
        self.model.eval()
        count = sum(p.numel() for p in self.trainable)
        return FitResult(config.max_steps, seconds, peak_memory_gb(), count, self.best)

    def _stop_if_asked(self, stop: Stop) -> None:
        """All processes at the same step, with a checkpoint."""
        signal = self.control.largest(stop.signal)
        if signal:
            self._save()
            raise Interrupted(
                f"{self.label}: stopped after step {self.step} of {self.config.max_steps}; the same command goes on "
                f"from {checkpoints.folder_of(self.folder, self.step)}",
                signal,
            )

    def close(self) -> None:
        self.blocks.close()
        # A later fit() has trackers of its own, and the accelerator would go on logging to these too.
        for tracker in self.accelerator.trackers:
            tracker.finish()
        self.accelerator.trackers = []
        self.accelerator.free_memory()
        self.control.close()

    def _batches(self, dataset: Dataset[object], collate: Collate | None) -> Iterator[tuple[int, AnyBatch]]:
        """(micro step, batch on the device) from this step on."""
        config, accelerator = self.config, self.accelerator
        first, last = (step * config.gradient_accumulation_steps for step in (self.step, config.max_steps))
        sampler = StepSampler(
            len(dataset),  # type: ignore[arg-type]
            config.batch_size,
            self.seed,
            accelerator.process_index,
            accelerator.num_processes,
            first,
            last,
            self.chances,
        )
        loader = DataLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=collate,
            num_workers=loader_processes(config.num_workers, accelerator.device),
            worker_init_fn=leave_signals_to_parent,
            pin_memory=accelerator.device.type == "cuda",
        )
        rows = iter(loader)
        for micro in range(first, last):
            with record_function("data"):
                batch = _moved(next(rows), accelerator.device)
            yield micro, batch

    def _micro_step(self, micro: int, batch: AnyBatch) -> bool:
        """One forward and backward pass; whether it ended an optimizer step."""
        accelerator = self.accelerator
        with accelerator.accumulate(self.model):
            generator = shared_generator(
                self.seed, micro, accelerator.process_index, accelerator.num_processes, step=self.step + 1
            )
            torch.manual_seed(generator.own_seed)  # dropout draws from the global generators
            with record_function("forward"):
                terms = self.model(batch, generator)
            self.finite.see("loss", terms["loss"], self.step + 1)
            with record_function("backward"):
                accelerator.backward(terms["loss"])
            with record_function("optimizer"):
                if accelerator.sync_gradients:
                    self._leave_alone()
                    norm: torch.Tensor = accelerator.clip_grad_norm_(self.trainable, self.config.max_grad_norm)
                    self.grad_norm = norm
                    if accelerator.scaler is None:  # which else skips steps whose gradient is not finite
                        self.finite.see("norm of the gradient", norm, self.step + 1)
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
        for name, value in terms.items():
            before = self.sums.get(name, torch.zeros((), device=accelerator.device))
            self.sums[name] = before + value.detach().float()
            self.counts[name] = self.counts.get(name, 0) + 1
        if not accelerator.sync_gradients:
            return False
        self.step += 1
        if not self.optimizer.step_was_skipped:
            self.scheduler.step()
            if self.ema is not None:
                self.ema.step(self.trainable)
        return True

    def _leave_alone(self) -> None:
        """Parameters whose steps are over: without a gradient the optimizer passes them by, weight decay included."""
        for parameters, until in self.until:
            if self.step >= until:
                for parameter in parameters:
                    parameter.grad = None

    def _seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.began

    def _fault(self, name: str, value: float, step: int) -> UserError:
        return UserError(
            f"{self.label}: the {name} is {value} at step {step}; log: {self.log_path}. "
            "Lower trainer.learning_rate, or use trainer.mixed_precision bf16 or no"
        )

    def _log(self) -> dict[str, float]:
        """Write a row with the means since the row before, of a term over the batches that have it; returns them."""
        self.finite.check(self._fault)
        accelerator = self.accelerator
        means = {k: float(accelerator.reduce(v / self.counts[k], reduction="mean")) for k, v in self.sums.items()}
        self.sums, self.counts = {}, {}
        norm = float(self.grad_norm)
        row = {
            "step": self.step,
            **means,
            "grad_norm": norm if np.isfinite(norm) else None,  # fp16: the step was skipped
            "lr": self.scheduler.get_last_lr()[0],
            "seconds": self._seconds(),
        }
        self.rows.append(json.dumps(row) + "\n")
        self.control.on_main(self._append)
        if accelerator.log_with:
            accelerator.log(means, step=self.step)
        return means

    def _append(self) -> None:
        with self.log_path.open("a", encoding="utf-8") as log:
            log.write(self.rows[-1])

    def _look(self, looks: list[Look]) -> None:
        """Samples and measurements that are due, in eval mode and with the weights that would be exported."""
        due = [call for call, every in looks if self.step % every == 0]
        if not due:
            return
        self.finite.check(self._fault)
        began = time.perf_counter()
        self.model.eval()
        if self.ema is not None:
            self.ema.store(self.trainable)
            self.ema.copy_to(self.trainable)
        with tf32(self.accelerator.device, allowed=False), self.blocks.paused():
            for call in due:
                call(self.step)
        if self.ema is not None:
            self.ema.restore(self.trainable)
        self.model.train()
        self.began += time.perf_counter() - began

    def keep_if_best(self, score: float | None) -> None:
        """Write the weights of a look that is better than all before it."""
        if score is None or not math.isfinite(score) or (self.best is not None and score <= self.best.score):
            return
        method = self.method.state() if self.method is not None else {}
        self.best = Best(self.step, score, "")  # the main process alone knows the hash

        def write() -> None:
            self.best = checkpoints.write_best(self.folder, self.step, score, *self._on_cpu(method))

        self.control.on_main(write)

    def _take_best(self, best: Best) -> None:
        """Give the student the weights of the best look."""

        def check() -> None:
            try:
                checkpoints.check_best(self.folder, best)
            except Damaged as damage:
                raise UserError(
                    f"{self.label}: {damage}; the same command goes on from a checkpoint, or from the beginning"
                ) from damage

        self.control.on_main(check)
        self._set(*checkpoints.read_best(self.folder, best.step))

    def _checkpoint_is_due(self) -> bool:
        config = self.config
        if self.step == config.max_steps:
            return self._last_state_gb() <= config.keep_last_state_gb
        return bool(config.checkpoint_every_steps) and self.step % (config.checkpoint_every_steps or 1) == 0

    def _last_state_gb(self) -> float:
        """About the size of a checkpoint: weights, two moments, and averages."""
        copies = 3 + (self.ema is not None)
        return copies * sum(p.numel() * p.element_size() for p in self.trainable) / 1e9

    def _save(self) -> None:
        self.finite.check(self._fault)
        scaler = self.accelerator.scaler
        parts = {"optimizer": self.optimizer, "scheduler": self.scheduler, "ema": self.ema, "scaler": scaler}
        loop: dict[str, object] = {name: part.state_dict() for name, part in parts.items() if part is not None}
        values = torch.stack(
            [*self.sums.values(), torch.as_tensor(float(self.grad_norm), device=self.accelerator.device)]
        )
        gathered = self.accelerator.gather(values[None]).cpu()  # each process has sums of its own
        loop["means"] = {
            "counts": self.counts,
            "sums": gathered[:, :-1],
            "norm": gathered[0, -1],
        }
        facts: JsonObject = {"seconds": self._seconds()} | self._identity()
        if self.best is not None:
            facts[BEST] = asdict(self.best)
        method = self.method.state() if self.method is not None else {}

        def write() -> None:
            trained, own = self._on_cpu(method)
            checkpoints.write(self.folder, Checkpoint(self.step, facts, trained, loop, "".join(self.rows), own))

        self.control.on_main(write)

    def _on_cpu(self, method: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """The trained parameters, and what the method keeps, as they are written."""
        trained, own = ({k: v.detach().cpu().contiguous() for k, v in part} for part in (self.named, method.items()))
        return trained, own

    def _set(self, trained: dict[str, torch.Tensor], method: dict[str, torch.Tensor]) -> None:
        """Take what `_on_cpu` gave."""
        for name, p in self.named:
            p.data.copy_(trained[name])
        if self.method is not None and method:
            self.method.load_state(method)

    def _identity(self) -> JsonObject:
        """What a checkpoint says of its training, to be compared when it is read."""
        return {
            "seed": self.seed,
            "processes": self.accelerator.num_processes,
            "max_steps": self.config.max_steps,
            "lr_schedule": self.config.lr_schedule,
            "fingerprints": self.fingerprints,
        }

    def _resume(self) -> None:
        """Take the newest whole checkpoint, and give train_log.jsonl the rows up to it."""
        found: list[Checkpoint | None] = [None]

        def look() -> None:
            self.log_path.parent.mkdir(parents=True, exist_ok=True)
            found[0] = checkpoints.newest(self.folder, lambda message: print(f"{self.label}: {message}", flush=True))
            if found[0] is not None:
                self._check(found[0])
                write_atomic(self.log_path, found[0].log)
            else:
                self.log_path.unlink(missing_ok=True)

        self.control.on_main(look)
        step = self.control.largest(found[0].step if found[0] else 0)
        if step:
            self._load(found[0] or checkpoints.read(checkpoints.folder_of(self.folder, step)))
        if self.ema is not None:
            self.ema.to(self.accelerator.device)

    def _check(self, checkpoint: Checkpoint) -> None:
        """UserError unless this training would have written the checkpoint."""
        there, here, config = checkpoint.facts, self._identity(), self.config
        folder = checkpoints.folder_of(self.folder, checkpoint.step)
        other = begin_again(self.folder)
        shapes = {name: p.shape for name, p in self.named}
        if there["seed"] != self.seed or {name: t.shape for name, t in checkpoint.trained.items()} != shapes:
            raise UserError(f"{folder} was written by a run with other settings; {other}")
        if there["processes"] != here["processes"]:
            raise UserError(
                f"{folder} was written by a launch of {there['processes']} processes, and this one has "
                f"{here['processes']}: each step would see other images; launch {there['processes']}, or {other}"
            )
        hashes = {**there["fingerprints"], **self.fingerprints}
        changed = [name for name in hashes if there["fingerprints"].get(name) != self.fingerprints.get(name)]
        if changed:
            raise UserError(
                f"{folder} was written with other files than there are now: {', '.join(changed)} changed. "
                f"Put back what was there, or {other}"
            )
        if checkpoint.step > config.max_steps:
            raise UserError(
                f"trainer.max_steps is {config.max_steps}, and {folder} is after more steps; raise it, or {other}"
            )
        if fault := schedule_fault(config, there["max_steps"], self.folder):
            raise UserError(fault)

    def _load(self, checkpoint: Checkpoint) -> None:
        loop, means = checkpoint.loop, checkpoint.loop["means"]
        self._set(checkpoint.trained, checkpoint.method)
        parts = {
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "ema": self.ema,
            "scaler": self.accelerator.scaler,
        }
        for name, part in parts.items():
            if part is not None:
                part.load_state_dict(loop[name])
        sums = means["sums"][self.accelerator.process_index].to(self.accelerator.device)
        # Earlier versions kept one count for all terms.
        self.counts = means["counts"] if "counts" in means else dict.fromkeys(means["names"], means["count"])
        self.sums = dict(zip(self.counts, sums.unbind(), strict=True))
        self.grad_norm = means["norm"]
        self.step, self.seconds_before = checkpoint.step, float(checkpoint.facts["seconds"])
        self.rows, self.best = checkpoint.log.splitlines(keepends=True), checkpoint.best


def _moved(batch: AnyBatch, device: torch.device) -> AnyBatch:
    """A batch on the device: a record that moves itself, or a dictionary of tensors."""
    if isinstance(batch, dict):
        return {key: value.to(device, non_blocking=True) for key, value in batch.items()}
    return batch.to(device, non_blocking=True)


def _optimizer(groups: list[dict[str, Any]], config: TrainerConfig, device: torch.device) -> torch.optim.Optimizer:
    options: dict[str, Any] = {
        "lr": config.learning_rate,
        "weight_decay": config.weight_decay,
    }
    if config.optimizer == "adamw":
        # On a CPU it rounds otherwise, and resumed trainings would differ from those that earlier versions began.
        return torch.optim.AdamW(groups, fused=True if device.type == "cuda" else None, **options)
    import bitsandbytes  # only on request: its import probes the GPU driver

    return bitsandbytes.optim.AdamW8bit(groups, **options)
