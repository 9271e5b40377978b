"""A tiny objective for fit(), trainings of it, and what they leave behind."""

from __future__ import annotations

import gc
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from torch.utils.data import Dataset

from distill.config import TrainerConfig
from distill.data.batch import Batch
from distill.trainer import FitResult, fit, make_accelerator

gc.freeze()  # fit() ends with a collection of garbage, which would look at everything that the libraries made

CHECKPOINT_FILES = {"manifest.json", "optimizer.pt", "state.json", "train_log.jsonl", "trainable.safetensors"}


class LeastSquares(nn.Module):
    """A small objective with all that the loop knows of one: parameters, a batch, noise of the generator, terms."""

    def __init__(self, noise: float = 0.1, width: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.noise, self.linear, self.dropout = noise, nn.Linear(width, width), nn.Dropout(dropout)

    def forward(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, torch.Tensor]:
        x = batch["x"] + self.noise * torch.randn(batch["x"].shape, generator=generator)
        loss = (self.linear(self.dropout(x)) - batch["y"]).square().mean()
        return {"loss": loss, "squares": loss, "constant": torch.tensor(2.0)}


def points(count: int = 8, width: int = 4) -> Any:
    x = torch.randn(count, width, generator=torch.Generator().manual_seed(1))
    return [{"x": row, "y": row.flip(0) + 1} for row in x]


def settings_of(**options: Any) -> TrainerConfig:
    defaults = {"max_steps": 4, "batch_size": 2, "learning_rate": 1e-2, "log_every_steps": 1, "tracker": "none"}
    return TrainerConfig(**(defaults | options))


def fresh_accelerator(config: TrainerConfig, folder: Path) -> Accelerator:
    """As a new process would have it: accelerate keeps its state in the process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return make_accelerator(config, folder)


def train(
    objective: nn.Module,
    folder: Path,
    dataset: Dataset[Any] | None = None,
    *,
    on: Any = None,
    scaler: torch.amp.GradScaler | None = None,
    score: Any = None,
    chances: Any = None,
    **options: Any,
) -> FitResult:
    """fit(). scaler: as accelerate has one for fp16 on a GPU. score: of a step, by which the best weights are kept."""
    config = settings_of(**options)
    accelerator = fresh_accelerator(config, folder)
    if scaler is not None:
        accelerator.scaler, accelerator.native_amp, accelerator.state._mixed_precision = scaler, True, "fp16"
    data = points() if dataset is None else dataset
    collate = Batch.stack if data and isinstance(data[0], Batch) else None
    return fit(
        objective, data, config, accelerator=accelerator, output_dir=folder, seed=5, on_sample=on, collate=collate,
        on_validate=score, keep_best=score is not None, chances=chances,
    )  # fmt: skip


def log_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]


def state_of(*modules: nn.Module) -> list[torch.Tensor]:
    return [v.clone() for module in modules for v in module.state_dict().values()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


class Killed(Exception):
    pass


def kill_at(last: int) -> Any:
    def on_sample(step: int) -> None:
        if step == last:
            raise Killed

    return on_sample


def without_time(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def edit_facts(folder: Path, **changes: Any) -> None:
    """Change state.json of a checkpoint that stays whole."""
    facts, manifest = folder / "state.json", folder / "manifest.json"
    facts.write_text(json.dumps(json.loads(facts.read_text()) | changes))
    sums = json.loads(manifest.read_text())["sha256"] | {"state.json": hashlib.sha256(facts.read_bytes()).hexdigest()}
    manifest.write_text(json.dumps({"sha256": sums}))
