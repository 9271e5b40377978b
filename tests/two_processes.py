"""One of two processes that train together: `python two_processes.py FOLDER SCENARIO...`, with RANK and MASTER_PORT
set.

Each scenario leaves FOLDER/<scenario>/<rank>.json, and FOLDER/<scenario>/weights.safetensors.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from fitting import LeastSquares, points, settings_of
from safetensors.torch import save_file
from tiny import tiny_sd
from torch import nn
from training import example

from distill import checkpoints, cli
from distill.config import FullEvaluation
from distill.data.batch import Batch
from distill.data.phantom.dataset import PhantomDataset
from distill.errors import Interrupted, UserError
from distill.evaluation.evaluate import evaluate, held_out
from distill.evaluation.validation import Looks
from distill.metrics.features import load_features
from distill.models import model_of
from distill.settings import Settings
from distill.trainer import fit, make_accelerator

STEPS: dict[str, Any] = {"max_steps": 3, "learning_rate": 1e-4, "log_every_steps": 1}
WHOLE_BATCH = 4
EQUAL_ROWS = ("attention_distillation", "supervised_attention", "consistency")
"""Methods with means over tokens or over some of the images: all images here have as many of them."""


def method_of(name: str) -> tuple[nn.Module, Any]:
    method, rows = example(name)
    return method, [rows[2]] * 12 if name.startswith(EQUAL_ROWS) else rows


class Broken(LeastSquares):
    """Does something on one process, at one step."""

    def __init__(self, rank: int, what: str) -> None:
        super().__init__()
        self.rank, self.what, self.calls = rank, what, 0

    def forward(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, torch.Tensor]:
        terms = super().forward(batch, generator)
        self.calls += 1
        if self.calls == 3 and self.rank == 1 and self.what == "not finite":
            terms["loss"] = terms["loss"] * float("nan")
        if self.calls == 3 and self.rank == 1 and self.what == "signal":
            os.kill(os.getpid(), signal.SIGTERM)
        if self.calls == 3 and self.rank == 0 and self.what == "full disk":
            checkpoints.save_file = no_space  # type: ignore[assignment]
        return terms


def no_space(*arguments: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def run(scenario: str, folder: Path, accelerator: Accelerator) -> dict[str, Any]:
    rank, known = accelerator.process_index, scenario in ("not finite", "signal", "full disk", "damage")
    objective, rows = (Broken(rank, scenario), points()) if known else method_of(scenario)
    options: dict[str, Any] = STEPS | {"batch_size": WHOLE_BATCH // accelerator.num_processes}
    if known:
        options |= {"max_steps": 8, "checkpoint_every_steps": 2, "learning_rate": 1e-2, "log_every_steps": 3}
    if scenario == "damage":
        (folder / "state/step-00000006").mkdir(parents=True, exist_ok=True)
    collate = Batch.stack if isinstance(rows[0], Batch) else None
    shared: dict[str, Any] = {"accelerator": accelerator, "output_dir": folder, "seed": 5, "collate": collate}
    found: dict[str, Any] = {}
    save_file_of_checkpoints = checkpoints.save_file
    try:
        fit(objective, rows, settings_of(**options), **shared)
    except (UserError, Interrupted) as error:
        found = {"error": f"{type(error).__name__}: {error}"}
    finally:
        checkpoints.save_file = save_file_of_checkpoints
    if accelerator.is_main_process:
        save_file({k: v.contiguous() for k, v in objective.state_dict().items()}, folder / "weights.safetensors")
    found["steps"] = checkpoints.steps_in(folder / "state")
    found["searches"] = accelerator.ddp_handler is not None and accelerator.ddp_handler.find_unused_parameters
    return found


def looked(folder: Path, accelerator: Accelerator) -> dict[str, Any]:
    """A look at validation images."""
    config = FullEvaluation(timesteps=(300,), num_inference_steps=1, batch_size=2)
    dataset = PhantomDataset("validation", 5, resolution=64)
    features = load_features("phantom", phantom_data=True)
    looks = Looks(dataset, config, config, 64, features, accelerator, folder / "look.partial")
    return looks.look(model_of(tiny_sd()), 7)


def evaluated(folder: Path, accelerator: Accelerator) -> dict[str, Any]:
    """All parts of an evaluation."""
    config = FullEvaluation(
        parts=("localization", "quality", "memorization", "utility", "explanation"), timesteps=(300,),
        num_inference_steps=1, batch_size=4,
        localization_images=6, generated_images=30, diversity_captions=2, diversity_samples=2, bootstrap_samples=10,
        examples=2, utility_steps=1, utility_seeds=2,
    )  # fmt: skip
    training, dataset = PhantomDataset("train", 12, resolution=64), PhantomDataset("test", 90, resolution=64)
    model, features = model_of(tiny_sd()), load_features("phantom", phantom_data=True)
    shared: dict[str, Any] = {"accelerator": accelerator}
    against = held_out(
        dataset, model, config, features, run_dir=folder / "run", training=training, copied_from=training, **shared
    )
    found = evaluate(model, against, config, resolution=64, arm_dir=folder / "run/arm", label="arm", **shared)
    return {"floor": against.quality, **{part: found[part] for part in config.parts}}


def said(rank: int, accelerator: Accelerator) -> dict[str, str]:
    """What this process prints for an error of both, of the second alone, and for a different one of each."""

    def printed(message: str | None) -> str:
        def recipe(config: Settings) -> None:
            if message is not None:
                raise UserError(message)

        text = io.StringIO()
        with contextlib.redirect_stderr(text), contextlib.suppress(SystemExit):
            cli.main(recipe, Settings, [])
        accelerator.wait_for_everyone()
        return text.getvalue()

    messages = {"both": "no data", "other": "no image" if rank == 1 else None, "different": f"row {rank}"}
    return {name: printed(message) for name, message in messages.items()}


def main() -> None:
    parent, scenarios = Path(sys.argv[1]), sys.argv[2:]
    for scenario in scenarios:
        folder = parent / scenario
        folder.mkdir(parents=True, exist_ok=True)
        accelerator = make_accelerator(settings_of(), folder)
        accelerator.wait_for_everyone()
        rank = accelerator.process_index
        if scenario in ("said", "look", "evaluate"):
            measured = {"look": looked, "evaluate": evaluated}
            found = said(rank, accelerator) if scenario == "said" else measured[scenario](folder, accelerator)
        else:
            found = run(scenario, folder, accelerator)
        (folder / f"{rank}.json").write_text(json.dumps(found))
        accelerator.wait_for_everyone()


if __name__ == "__main__":
    main()
